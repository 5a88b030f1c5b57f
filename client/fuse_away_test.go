package client

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"sealfs"
	"sealfs/internal/oracle"
	"sealfs/op"
)

// callEnv makes the test binary do one system call on a file, when it is told to, and say how that ends.
const callEnv = "SEALFS_TEST_CALL"

// callOf returns what such a process can do. What opens is done at once, the
// call itself when it is told to.
func callOf(name, path string) (func() error, error) {
	open := func(flags int) int {
		fd, err := unix.Open(path, flags, 0o600)
		if err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		return fd
	}
	switch name {
	case "stat":
		return func() error { var st unix.Stat_t; return unix.Stat(path, &st) }, nil
	case "open":
		return func() error { _, err := unix.Open(path, unix.O_RDONLY, 0); return err }, nil
	case "mkdir":
		return func() error { return unix.Mkdir(path+".d", 0o700) }, nil
	case "rename":
		return func() error { return unix.Rename(path, path+".r") }, nil
	case "unlink":
		return func() error { return unix.Unlink(path) }, nil
	case "statfs":
		return func() error { var st unix.Statfs_t; return unix.Statfs(path, &st) }, nil
	case "write":
		fd := open(unix.O_WRONLY | unix.O_APPEND | unix.O_DSYNC)
		return func() error { _, err := unix.Write(fd, []byte("w")); return err }, nil
	case "read":
		fd := open(unix.O_RDONLY)
		return func() error { _, err := unix.Pread(fd, make([]byte, 1), 0); return err }, nil
	case "exit":
		fd := open(unix.O_WRONLY | unix.O_APPEND)
		_, err := unix.Write(fd, []byte("w"))
		return func() error { return nil }, err
	case "close", "fsync":
		fd := open(unix.O_WRONLY | unix.O_APPEND)
		if _, err := unix.Write(fd, []byte("w")); err != nil {
			return nil, err
		}
		if name == "close" {
			return func() error { return unix.Close(fd) }, nil
		}
		return func() error { return unix.Fsync(fd) }, nil
	}
	return nil, fmt.Errorf("no call %q", name)
}

// makeCall is the life of such a process.
func makeCall(name, path string) error {
	runtime.LockOSThread()
	signal.Notify(make(chan os.Signal, 10), unix.SIGHUP)
	do, err := callOf(name, path)
	if err != nil {
		return err
	}
	fmt.Println(unix.Gettid())
	if _, err := bufio.NewReader(os.Stdin).ReadString('\n'); err != nil {
		return err
	}
	err = do()
	fmt.Println(err)
	// Its files are closed by the kernel, which does not wait.
	return nil
}

// callerProcess is such a process.
type callerProcess struct {
	cmd *exec.Cmd
	in  io.WriteCloser
	out *bufio.Reader
	tid int
}

func startCall(t *testing.T, name, path string) *callerProcess {
	t.Helper()
	p := &callerProcess{cmd: exec.Command(os.Args[0])}
	p.cmd.Env = append(os.Environ(), callEnv+"="+name+" "+path)
	p.cmd.Stderr = os.Stderr
	var err error
	if p.in, err = p.cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	out, err := p.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	p.out = bufio.NewReader(out)
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := fmt.Fscanln(p.out, &p.tid); err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	return p
}

func (p *callerProcess) begin() { fmt.Fprintln(p.in) }

// end waits for the outcome.
func (p *callerProcess) end(t *testing.T) string {
	t.Helper()
	told, err := p.out.ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	if err := p.cmd.Wait(); err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(told)
}

// netMount mounts a model in three stores in this process. Only other processes may use it.
func netMount(t *testing.T) (*cluster, *Client, *oracle.Net, string) {
	needFUSE(t)
	u := newCluster()
	c, net := u.lone(t, 7, Options{})
	m, err := Mount(context.Background(), c, MountOptions{Dir: mountDir(t), Name: "net"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		for i := range 3 {
			net.Back(i)
		}
		if err := m.Unmount(); err != nil {
			t.Errorf("unmount: %v", err)
		}
	})
	return u, c, net, m.Dir()
}

// fileIn makes a file in a directory whose store is the given one, and returns
// its inode and its path below the mount.
func fileIn(t *testing.T, c *Client, net *oracle.Net, store int, name string) (sealfs.Ino, string) {
	t.Helper()
	ctx := context.Background()
	ino := createIn(t, c, net, store, name)
	if err := c.Release(ctx, ino); err != nil {
		t.Fatal(err)
	}
	for i := 0; ; i++ {
		dir := fmt.Sprintf("%s.%d", name, i)
		d, err := c.Lookup(ctx, c.Root(), dir)
		if err != nil {
			t.Fatal(err)
		}
		if net.Store(d.Ino.Home(testShards)) == store {
			return ino, filepath.Join(dir, name)
		}
	}
}

// TestSignalsInterruptCalls sends signals that ask programs to end to processes in the middle of a call
// whose server hangs: each call ends with EINTR, or the process with
// the signal, and what was written arrives nevertheless.
func TestSignalsInterruptCalls(t *testing.T) {
	u, c, net, dir := netMount(t)
	home := net.Store(u.root.Home(testShards))
	store, other := (home+1)%3, (home+2)%3 // paths can be walked
	want := ""
	ino, path := fileIn(t, c, net, store, "f")
	_, path2 := fileIn(t, c, net, other, "g")
	path, path2 = filepath.Join(dir, path), filepath.Join(dir, path2)
	for _, name := range []string{"stat", "open", "mkdir", "write", "fsync", "close", "exit"} {
		connected(t, c) // so that writes are delayed
		p := startCall(t, name, path)
		net.Hang(store)
		p.begin()
		await(t, name+" does not get to the server", func() bool { return net.Waiting(store) > 0 })
		// Meanwhile others go on.
		script := `echo x >> "$0" && test -s "$0"`
		if name == "stat" {
			script += ` && df "$0"`
		}
		if out, err := exec.Command("sh", "-c", script, path2).CombinedOutput(); err != nil {
			t.Fatalf("%s: another file: %v %s", name, err, out)
		}
		expect := unix.EINTR.Error()
		if name == "exit" {
			expect = "<nil>" // which cannot be interrupted, and does not wait
		} else if err := errors.Join(unix.Tgkill(p.cmd.Process.Pid, p.tid, unix.SIGURG), unix.Tgkill(p.cmd.Process.Pid, p.tid, unix.SIGHUP)); err != nil {
			t.Fatal(err)
		}
		if got := p.end(t); got != expect {
			t.Errorf("%s: %s", name, got)
		}
		net.Back(store)
		if name == "write" || name == "fsync" || name == "close" || name == "exit" {
			want += "w"
		}
		await(t, name+": the data does not arrive once", func() bool { return string(u.content(t, ino, 0)) == want })
	}
	// SIGINT ends a program that does nothing about it.
	net.Hang(store)
	cat := exec.Command("cat", path)
	if err := cat.Start(); err != nil {
		t.Fatal(err)
	}
	await(t, "cat does not get to the server", func() bool { return net.Waiting(store) > 0 })
	cat.Process.Signal(syscall.SIGINT)
	err := cat.Wait()
	if ws, ok := cat.ProcessState.Sys().(syscall.WaitStatus); !ok || !ws.Signaled() || ws.Signal() != syscall.SIGINT {
		t.Errorf("cat ended with %v", err)
	}
}

// slow is a server that takes its time for unlinks: whoever asks may go, and it happens nevertheless.
type slow struct {
	op.Handler
	now chan struct{} // closed to let them happen
}

func (s slow) Do(ctx context.Context, req *op.Request, rep *op.Reply) error {
	if req.Type == op.Unlink {
		select {
		case <-s.now:
		case <-ctx.Done():
			go func(late op.Request) {
				<-s.now
				s.Handler.Do(context.Background(), &late, new(op.Reply))
			}(*req)
			return sealfs.ErrInterrupted
		}
	}
	return s.Handler.Do(ctx, req, rep)
}

// TestInterruptedChangeIsSeen interrupts an unlink that a server is slow to answer: when it happens after all,
// the mount, whose kernel believes that there is such a name, sees it.
func TestInterruptedChangeIsSeen(t *testing.T) {
	needFUSE(t)
	u := newCluster()
	net := oracle.NewNet(u.model, 3, 7)
	server := slow{generous{net}, make(chan struct{})}
	c := u.clientOf(t, net, server, 7, Options{})
	connected(t, c)
	m, err := Mount(context.Background(), c, MountOptions{Dir: mountDir(t), Name: "slow"})
	if err != nil {
		t.Fatal(err)
	}
	defer m.Unmount()
	_, path := fileIn(t, c, net, 1, "f")
	path = filepath.Join(m.Dir(), path)
	there := func() bool { return exec.Command("stat", path).Run() == nil }
	believed := func() {
		await(t, "the name is not believed", func() bool {
			before := c.requests[op.Lookup].Load() + c.requests[op.Getattr].Load()
			return there() && c.requests[op.Lookup].Load()+c.requests[op.Getattr].Load() == before
		})
	}
	believed()
	p := startCall(t, "unlink", path)
	p.begin()
	await(t, "unlink is not sent", func() bool { return c.requests[op.Unlink].Load() > 0 })
	if err := unix.Tgkill(p.cmd.Process.Pid, p.tid, unix.SIGHUP); err != nil {
		t.Fatal(err)
	}
	if got := p.end(t); got != unix.EINTR.Error() {
		t.Fatal(got)
	}
	believed() // the kernel forgets the name by itself, but asks again
	close(server.now)
	await(t, "the mount does not see what it has removed itself", func() bool { return !there() })
}

// TestShortCallsAreNotInterrupted sends signals all the time while calls are answered as usual.
func TestShortCallsAreNotInterrupted(t *testing.T) {
	_, c, net, dir := netMount(t)
	_, path := fileIn(t, c, net, 1, "f")
	script := `trap : WINCH; i=0; while [ $i -lt 300 ]; do i=$((i+1)); echo $i >> "$0" || exit 1; test -s "$0" || exit 2; mkdir "$0.$i" || exit 3; done`
	cmd := exec.Command("sh", "-c", script, filepath.Join(dir, path))
	var out bytes.Buffer
	cmd.Stderr = &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	done := make(chan error)
	go func() { done <- cmd.Wait() }()
	for {
		select {
		case err := <-done:
			if err != nil {
				t.Fatalf("%v: %s", err, out.String())
			}
			return
		default:
			cmd.Process.Signal(syscall.SIGWINCH)
			runtime.Gosched()
		}
	}
}

// TestProgramsDoNotInheritTheDevice looks at the descriptors of a child: one with
// the FUSE device would keep a mount alive whose process is gone.
func TestProgramsDoNotInheritTheDevice(t *testing.T) {
	netMount(t)
	out, err := exec.Command("sh", "-c", "ls -l /proc/self/fd/").CombinedOutput()
	if err != nil || !strings.Contains(string(out), "->") || strings.Contains(string(out), "/dev/fuse") {
		t.Fatalf("%v: %s", err, out)
	}
}

// TestLostSessionOnAMount ends the session under a mount: open files fail, new ones work.
func TestLostSessionOnAMount(t *testing.T) {
	u, c, net, dir := netMount(t)
	ino, path := fileIn(t, c, net, 1, "f")
	path = filepath.Join(dir, path)
	calls := map[string]*callerProcess{}
	for _, name := range []string{"read", "fsync", "close", "write"} {
		calls[name] = startCall(t, name, path)
	}
	before := len(u.content(t, ino, 0))
	u.model.EndSession(7)
	c.Fence(nil)
	if err := c.Resume(8); err != nil {
		t.Fatal(err)
	}
	for name, p := range calls {
		p.begin()
		if got := p.end(t); got != unix.EIO.Error() {
			t.Errorf("%s: %s", name, got)
		}
	}
	if out, err := exec.Command("sh", "-c", `echo new >> "$0" && cat "$0"`, path).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if b := u.content(t, ino, 0); len(b) != before+4 {
		t.Fatalf("%q", b)
	}
	await(t, "handles are left", func() bool { return u.model.Held() == 0 })
}

// TestLargeFilesOnAMount does the same random calls on a sparse file of 200 MiB
// below a mount and in memory, and compares every answer and then the contents.
func TestLargeFilesOnAMount(t *testing.T) {
	s := startNet(t)
	local, err := os.MkdirTemp("/dev/shm", "sealfs-local-")
	if err != nil {
		local = t.TempDir()
	}
	defer os.RemoveAll(local)
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	a := &largeCaller{t: t, name: filepath.Join(local, "f"), rng: rand.New(rand.NewPCG(seed, 0))}
	b := &largeCaller{t: t, name: filepath.Join(s.dir, "f"), rng: rand.New(rand.NewPCG(seed, 0))}
	defer a.close()
	defer b.close()
	a.open(os.O_CREATE)
	b.open(os.O_CREATE)
	steps := 1500
	if testing.Short() {
		steps = 400
	}
	for i := range steps {
		if want, got := a.step(), b.step(); got != want {
			t.Fatalf("step %d:\nmount: %s\nlocal: %s", i, got, want)
		}
	}
	a.open(0)
	b.open(0)
	x, y := make([]byte, 1<<20), make([]byte, 1<<20)
	for off := int64(0); ; off += int64(len(x)) {
		n, _ := a.f.ReadAt(x, off)
		m, err := b.f.ReadAt(y, off)
		if n != m || !bytes.Equal(x[:n], y[:m]) {
			t.Fatalf("at %d: %d bytes, want %d, or other ones: %v", off, m, n, err)
		}
		if n < len(x) {
			break
		}
	}
}

// largeCaller does random calls on one large file.
type largeCaller struct {
	t    *testing.T
	name string
	rng  *rand.Rand
	f    *os.File
}

func (c *largeCaller) close() { c.f.Close() }

func (c *largeCaller) open(flags int) {
	c.t.Helper()
	if c.f != nil {
		if err := c.f.Close(); err != nil {
			c.t.Fatal(err)
		}
	}
	var err error
	if c.f, err = os.OpenFile(c.name, os.O_RDWR|flags, 0o600); err != nil {
		c.t.Fatal(err)
	}
}

func (c *largeCaller) step() string {
	const most = 200 << 20
	kind, fill := c.rng.IntN(16), byte(c.rng.IntN(255)+1)
	off, n := int64(near(c.rng)), 1+c.rng.IntN(300<<10)
	if c.rng.IntN(3) == 0 {
		off = int64(c.rng.IntN(most - 4<<20))
	}
	if c.rng.IntN(10) == 0 {
		n = 1 + c.rng.IntN(3<<20)
	}
	flags := []int{0, os.O_APPEND, os.O_APPEND, unix.O_SYNC}[c.rng.IntN(4)]
	fd := int(c.f.Fd())
	info, err := c.f.Stat()
	if err != nil {
		c.t.Fatal(err)
	}
	size := info.Size()
	switch kind {
	case 0, 1, 2, 3:
		n, err := unix.Pwrite(fd, bytes.Repeat([]byte{fill}, n), off)
		return fmt.Sprintf("pwrite at %d: %d %v", off, n, err)
	case 4, 5:
		if size > most-4<<20 {
			return "full"
		}
		if _, err := unix.Seek(fd, 0, io.SeekEnd); err != nil {
			c.t.Fatal(err)
		}
		n, err := unix.Write(fd, bytes.Repeat([]byte{fill}, n))
		return fmt.Sprintf("write at %d: %d %v", size, n, err)
	case 6, 7, 8:
		b := make([]byte, n)
		n, err := unix.Pread(fd, b, off)
		return fmt.Sprintf("pread at %d: %d %v %x", off, n, err, sum(b[:max(n, 0)]))
	case 9:
		if c.rng.IntN(3) > 0 {
			return ""
		}
		return fmt.Sprintf("truncate %d: %v", off, unix.Ftruncate(fd, off))
	case 10, 11:
		mode := []uint32{0, unix.FALLOC_FL_KEEP_SIZE, unix.FALLOC_FL_PUNCH_HOLE | unix.FALLOC_FL_KEEP_SIZE}[c.rng.IntN(3)]
		return fmt.Sprintf("fallocate %d at %d +%d: %v", mode, off, n, unix.Fallocate(fd, mode, off, int64(n)))
	case 12:
		return fmt.Sprintf("size %d", size)
	case 13:
		c.open(flags)
		return "open"
	case 14:
		return fmt.Sprintf("fsync %v", c.f.Sync())
	default:
		// A hole may be told as data, but data never as a hole: the next data is compared
		// by where the first byte is that is not zero.
		at, err := unix.Seek(fd, off, unix.SEEK_DATA)
		if err == unix.ENXIO {
			at = size
		} else if err != nil {
			return fmt.Sprint("seek ", err)
		}
		b := make([]byte, 64<<10)
		for ; at < size; at += int64(len(b)) {
			n, _ := unix.Pread(fd, b, at)
			if i := bytes.IndexFunc(b[:max(n, 0)], func(r rune) bool { return r != 0 }); i >= 0 {
				return fmt.Sprintf("data after %d at %d", off, at+int64(i))
			}
		}
		return fmt.Sprintf("no data after %d", off)
	}
}
