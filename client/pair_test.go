package client

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sealfs"
	"sealfs/op"
	sealserver "sealfs/server"
)

// servePair mounts one real server on several directories, each with a client
// and a session of its own, until the input ends. A line of it is answered by the
// requests that the first of them has sent.
func servePair(dirs []string) (err error) {
	o := Options{Volume: 1, Shards: testShards}
	var s *sealserver.Server
	if split := os.Getenv(serveEnv + "_SPLIT"); split != "" {
		s, err = newApart(os.Getenv(serveEnv+"_STORE"), split, &o)
	} else {
		s, o.Root, err = newEngine(os.Getenv(serveEnv + "_STORE"))
	}
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.Close()) }()
	var clients []*Client
	for i, dir := range dirs {
		var h op.Handler = s
		if i > 0 {
			h = encoded{s}
		}
		o.Session, o.Local = sealfs.Session(i+1), i == 0
		c := New(h, o)
		m, err := Mount(context.Background(), c, MountOptions{Dir: dir, Name: "pair", AllowOther: os.Geteuid() == 0})
		if err != nil {
			return err
		}
		clients = append(clients, c)
		defer func() { err = errors.Join(err, m.Unmount(), c.Close(), s.EndSession(c.Session())) }()
	}
	fmt.Println("mounted")
	for line := make([]byte, 1); ; {
		if _, rerr := os.Stdin.Read(line); rerr != nil {
			return err
		}
		var n uint64
		byType := ""
		clients[0].Requests(func(t op.Type, sent uint64) {
			if t != op.Watch && sent > 0 {
				n += sent
				byType += fmt.Sprintf(",%v=%d", t, sent)
			}
		})
		fmt.Println(n, byType)
	}
}

// encoded passes requests on as a connection does.
type encoded struct{ op.Handler }

func (e encoded) Do(ctx context.Context, req *op.Request, rep *op.Reply) error {
	var there op.Request
	if err := op.DecodeRequest(&there, req.AppendTo(nil)); err != nil {
		rep.Code = sealfs.ErrInvalid
		return nil
	}
	if req.Type == op.Write {
		there.Data = req.Data
	}
	return e.Handler.Do(ctx, &there, rep)
}

// pair is two mounts of one volume on one server.
type pair struct {
	*server
	dirs   [2]string
	byType string // what sent returned, by type
	store  string // where its stores are, if there are several
}

func startPair(t testing.TB) *pair {
	t.Helper()
	needFUSE(t)
	p := &pair{dirs: [2]string{mountDir(t), mountDir(t)}}
	p.server = startServerAt(t, strings.Join(p.dirs[:], ":"), serveEnv+"_STORE="+t.TempDir())
	return p
}

// sent returns how many requests the first mount has sent.
func (p *pair) sent(t testing.TB) (n uint64) {
	t.Helper()
	if _, err := io.WriteString(p.pipe, "?"); err != nil {
		t.Fatal(err)
	}
	if _, err := fmt.Fscanln(p.out, &n, &p.byType); err != nil {
		t.Fatal(err)
	}
	return n
}

// TestStatsCostNothing looks at what was seen once, and counts requests.
func TestStatsCostNothing(t *testing.T) { statsCostNothing(t, startPair(t)) }

func statsCostNothing(t *testing.T, p *pair) {
	dir := filepath.Join(p.dirs[0], "d")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	file, none := filepath.Join(dir, "f"), filepath.Join(dir, "none")
	if err := os.WriteFile(file, []byte("content"), 0o644); err != nil {
		t.Fatal(err)
	}
	look := func() {
		t.Helper()
		for _, name := range []string{dir, file} {
			if _, err := os.Stat(name); err != nil {
				t.Fatal(err)
			}
		}
		if b, err := os.ReadFile(file); err != nil || string(b) != "content" {
			t.Fatalf("%q, %v", b, err)
		}
		if _, err := os.Stat(none); !errors.Is(err, os.ErrNotExist) {
			t.Fatal(err)
		}
	}
	stat := func() {
		t.Helper()
		for range 10_000 {
			if _, err := os.Stat(file); err != nil {
				t.Fatal(err)
			}
			if _, err := os.Stat(none); !errors.Is(err, os.ErrNotExist) {
				t.Fatal(err)
			}
		}
	}
	look()
	look()
	await(t, "releases are still sent", func() bool {
		before := p.sent(t)
		<-time.After(3 * releaseDelay)
		return p.sent(t) == before
	})
	before := p.sent(t)
	stat()
	if n := p.sent(t) - before; n != 0 {
		t.Errorf("20,000 stats cost %d requests", n)
	}
	// And what the other one does is seen at once.
	if err := os.WriteFile(filepath.Join(p.dirs[1], "d", "none"), []byte("now"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(filepath.Join(p.dirs[1], "d", "f"), 0o600); err != nil {
		t.Fatal(err)
	}
	if i, err := os.Stat(none); err != nil || i.Size() != 3 {
		t.Fatalf("%v, %v", i, err)
	}
	if i, err := os.Stat(file); err != nil || i.Mode().Perm() != 0o600 {
		t.Fatalf("%v, %v", i, err)
	}
}

// quiet waits until the first mount sends nothing any more, and returns how many requests it has sent.
func (p *pair) quiet(t testing.TB) (n uint64) {
	t.Helper()
	await(t, "releases are still sent", func() bool {
		before := p.sent(t)
		<-time.After(3 * releaseDelay)
		n = p.sent(t)
		return n == before
	})
	return n
}

// TestSmallFilesCost counts the requests for new files with their content in a new directory: the
// file, its content, and its release, which remote clients gather (TestNewFilesTakeTwoRequests).
func TestSmallFilesCost(t *testing.T) {
	p := startPair(t)
	make := func(name string) {
		if err := os.WriteFile(filepath.Join(p.dirs[0], name), []byte("content"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	make("first")
	if err := os.Mkdir(filepath.Join(p.dirs[0], "d"), 0o755); err != nil {
		t.Fatal(err)
	}
	before := p.quiet(t)
	const files = 200
	for i := range files {
		make(fmt.Sprint("d/f", i))
	}
	n := p.quiet(t) - before
	t.Logf("%d files cost %d requests: %s", files, n, p.byType)
	if n > 3*files+5 {
		t.Errorf("%d files cost %d requests", files, n)
	}
	// What is there is looked at, opened, cut, asked for capabilities, written and let go.
	before = p.quiet(t)
	for range files {
		make("first")
	}
	n = p.quiet(t) - before
	t.Logf("written anew %d times: %d requests: %s", files, n, p.byType)
	if n > 7*files {
		t.Errorf("to write a file anew %d times cost %d requests", files, n)
	}
}

// BenchmarkVisible measures the time from before a change on one mount until another one, which has all
// of it in its caches, has seen it.
func BenchmarkVisible(b *testing.B) {
	p := startPair(b)
	file := func(m int) string { return filepath.Join(p.dirs[m], "f") }
	if err := os.WriteFile(file(0), nil, 0o644); err != nil {
		b.Fatal(err)
	}
	for _, bench := range []struct {
		name   string
		change func(i int) error
	}{
		{"attributes", func(i int) error { return os.Chmod(file(0), os.FileMode(0o600|i%2)) }},
		{"content", func(i int) error { return os.WriteFile(file(0), fmt.Append(nil, i), 0o600) }},
		{"names", func(i int) error {
			return os.Rename(filepath.Join(p.dirs[0], fmt.Sprint("n", i%2)), filepath.Join(p.dirs[0], fmt.Sprint("n", 1-i%2)))
		}},
	} {
		b.Run(bench.name, func(b *testing.B) {
			if err := os.WriteFile(filepath.Join(p.dirs[0], "n0"), nil, 0o644); err != nil {
				b.Fatal(err)
			}
			os.Remove(filepath.Join(p.dirs[0], "n1"))
			var all []time.Duration
			for i := range b.N {
				os.Stat(filepath.Join(p.dirs[1], "n0"))
				os.Stat(filepath.Join(p.dirs[1], "n1"))
				os.ReadFile(file(1))
				start := time.Now()
				if err := bench.change(i); err != nil {
					b.Fatal(err)
				}
				info, err := os.Stat(file(1))
				if err != nil {
					b.Fatal(err)
				}
				_, there := os.Stat(filepath.Join(p.dirs[1], fmt.Sprint("n", 1-i%2)))
				all = append(all, time.Since(start))
				if bench.name == "attributes" && info.Mode().Perm() != os.FileMode(0o600|i%2) || bench.name == "names" && there != nil {
					b.Fatalf("change %d is not seen: %v, %v", i, info.Mode(), there)
				}
			}
			slices.Sort(all)
			b.ReportMetric(float64(all[len(all)/2].Microseconds()), "µs-median")
		})
	}
}

// TestOldPages has one mount keep pages of a file, which the other one overwrites; what the first one
// changes of the file itself must not make its pages look new.
func TestOldPages(t *testing.T) {
	p := startPair(t)
	name := func(m int) string { return filepath.Join(p.dirs[m], "f") }
	for what, change := range map[string]func() error{
		"chmod":    func() error { return os.Chmod(name(0), 0o600) },
		"truncate": func() error { return os.Truncate(name(0), 8) },
		"times":    func() error { return os.Chtimes(name(0), time.Time{}, time.Unix(1, 0)) },
	} {
		if err := os.WriteFile(name(0), []byte("old text"), 0o644); err != nil {
			t.Fatal(err)
		}
		f, err := os.OpenFile(name(0), os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		var b [8]byte
		for i := range 20 {
			if _, err := f.ReadAt(b[:], 0); err != nil {
				t.Fatal(err)
			}
			want := fmt.Sprintf("new %04d", i)
			other, err := os.OpenFile(name(1), os.O_RDWR, 0)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := other.WriteAt([]byte(want), 0); err != nil {
				t.Fatal(err)
			}
			if err := errors.Join(other.Close(), change()); err != nil {
				t.Fatal(err)
			}
			if _, err := f.ReadAt(b[:], 0); err != nil || string(b[:]) != want {
				t.Errorf("%s: %q, %v; want %q", what, b[:], err, want)
			}
		}
		f.Close()
	}
}

// TestMountsAgree has the two mounts take turns: what one has done, the other one must
// see, with all of the kernel's caches filled before.
func TestMountsAgree(t *testing.T) { mountsAgree(t, startPair(t)) }

func mountsAgree(t *testing.T, p *pair) {
	rounds := 300
	if testing.Short() {
		rounds = 60
	}
	for _, test := range []struct {
		name string
		// act changes something in the directory that both see; check looks for it. Both get the round.
		act, check func(dir string, i int) error
	}{
		{"create and unlink", func(dir string, i int) error {
			name := filepath.Join(dir, "f")
			if i%2 == 0 {
				return os.WriteFile(name, nil, 0o644)
			}
			return os.Remove(name)
		}, func(dir string, i int) error {
			_, err := os.Stat(filepath.Join(dir, "f"))
			names, rerr := os.ReadDir(dir)
			if there := err == nil; there != (i%2 == 0) || rerr != nil || (len(names) == 1) != there {
				return fmt.Errorf("stat: %v; %d names, %v", err, len(names), rerr)
			}
			return nil
		}},
		{"rename", func(dir string, i int) error {
			if i == 0 {
				return os.WriteFile(filepath.Join(dir, "0"), []byte("x"), 0o644)
			}
			return os.Rename(filepath.Join(dir, fmt.Sprint((i-1)%3)), filepath.Join(dir, fmt.Sprint(i%3)))
		}, func(dir string, i int) error {
			for j := range 3 {
				if _, err := os.Stat(filepath.Join(dir, fmt.Sprint(j))); (err == nil) != (j == i%3) {
					return fmt.Errorf("%d: %v", j, err)
				}
			}
			return nil
		}},
		{"write", func(dir string, i int) error {
			f, err := os.OpenFile(filepath.Join(dir, "f"), os.O_CREATE|os.O_RDWR, 0o644)
			if err != nil {
				return err
			}
			defer f.Close()
			_, err = f.WriteAt(fmt.Appendf(nil, "%08d", i), int64(i%5)*4000)
			return err
		}, func(dir string, i int) error {
			b, err := os.ReadFile(filepath.Join(dir, "f"))
			if at := i % 5 * 4000; err != nil || len(b) < at+8 || string(b[at:at+8]) != fmt.Sprintf("%08d", i) {
				return fmt.Errorf("%d bytes, %v", len(b), err)
			}
			return nil
		}},
		{"append", func(dir string, i int) error {
			f, err := os.OpenFile(filepath.Join(dir, "f"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
			if err != nil {
				return err
			}
			_, err = fmt.Fprintf(f, "%07d\n", i)
			return errors.Join(err, f.Close())
		}, func(dir string, i int) error {
			b, err := os.ReadFile(filepath.Join(dir, "f"))
			if err != nil || len(b) != 8*(i+1) || string(b[8*i:]) != fmt.Sprintf("%07d\n", i) {
				return fmt.Errorf("%d bytes, %v", len(b), err)
			}
			return nil
		}},
		{"truncate", func(dir string, i int) error {
			name := filepath.Join(dir, "f")
			if i == 0 {
				return os.WriteFile(name, make([]byte, 9000), 0o644)
			}
			return os.Truncate(name, int64(i*37%9000))
		}, func(dir string, i int) error {
			want := i * 37 % 9000
			if i == 0 {
				want = 9000
			}
			b, err := os.ReadFile(filepath.Join(dir, "f"))
			if err != nil || len(b) != want {
				return fmt.Errorf("%d bytes of %d, %v", len(b), want, err)
			}
			return nil
		}},
		{"attributes", func(dir string, i int) error {
			name := filepath.Join(dir, "f")
			if i == 0 {
				if err := os.WriteFile(name, nil, 0o644); err != nil {
					return err
				}
			}
			return errors.Join(os.Chmod(name, os.FileMode(0o600+i%64)), unix.Setxattr(name, "user.i", fmt.Append(nil, i), 0),
				os.Chtimes(name, time.Unix(int64(i), 0), time.Unix(int64(i), 5)), os.Chmod(dir, os.FileMode(0o700+i%64)))
		}, func(dir string, i int) error {
			name := filepath.Join(dir, "f")
			var b [20]byte
			n, err := unix.Getxattr(name, "user.i", b[:])
			info, err2 := os.Stat(name)
			parent, err3 := os.Stat(dir)
			if err := errors.Join(err, err2, err3); err != nil {
				return err
			}
			if string(b[:n]) != fmt.Sprint(i) || info.Mode().Perm() != os.FileMode(0o600+i%64) || info.ModTime() != time.Unix(int64(i), 5) || parent.Mode().Perm() != os.FileMode(0o700+i%64) {
				return fmt.Errorf("%s, %v, %v, %v", b[:n], info.Mode(), info.ModTime(), parent.Mode())
			}
			return nil
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			sub := strings.ReplaceAll(test.name, " ", "-")
			if err := os.Mkdir(filepath.Join(p.dirs[0], sub), 0o755); err != nil {
				t.Fatal(err)
			}
			for i := range rounds {
				// Whose turn it is changes in no simple rhythm.
				actor := rand.IntN(2)
				if err := test.act(filepath.Join(p.dirs[actor], sub), i); err != nil {
					t.Fatalf("round %d, mount %d: %v", i, actor, err)
				}
				for _, looker := range []int{1 - actor, actor} {
					if err := test.check(filepath.Join(p.dirs[looker], sub), i); err != nil {
						t.Fatalf("round %d by mount %d, seen by mount %d: %v", i, actor, looker, err)
					}
				}
			}
		})
	}
}

// TestNamesOutliveTheirLease has a directory's lease taken as a whole, by a change of the
// directory itself or by many names in it: names that the kernel was told under it are not believed any longer.
func TestNamesOutliveTheirLease(t *testing.T) {
	p := startPair(t)
	for _, test := range []struct {
		name string
		act  func(dir string) error
	}{
		{"chmod", func(dir string) error { return os.Chmod(dir, 0o700) }},
		{"many", func(dir string) error {
			for i := range 100 {
				if err := os.WriteFile(filepath.Join(dir, fmt.Sprint(i)), nil, 0o644); err != nil {
					return err
				}
			}
			return nil
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			mine, others := filepath.Join(p.dirs[0], test.name), filepath.Join(p.dirs[1], test.name)
			file := filepath.Join(others, "f")
			moved := filepath.Join(others, "moved")
			if err := errors.Join(os.Mkdir(mine, 0o755), os.WriteFile(filepath.Join(mine, "f"), nil, 0o644), os.WriteFile(filepath.Join(mine, "moved"), nil, 0o644)); err != nil {
				t.Fatal(err)
			}
			for range 2 {
				if _, err := os.Stat(file); err != nil {
					t.Fatal(err)
				}
				if _, err := os.Stat(moved); err != nil {
					t.Fatal(err)
				}
				if _, err := os.Stat(filepath.Join(others, "none")); !errors.Is(err, os.ErrNotExist) {
					t.Fatal(err)
				}
			}
			if err := errors.Join(test.act(mine), os.Remove(filepath.Join(mine, "f")), os.WriteFile(filepath.Join(mine, "none"), nil, 0o644),
				os.Rename(filepath.Join(mine, "moved"), filepath.Join(mine, "away"))); err != nil {
				t.Fatal(err)
			}
			if _, err := os.Stat(file); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("a name that was removed is still seen: %v", err)
			}
			if _, err := os.Stat(moved); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("a file is still seen under its old name: %v", err)
			}
			if _, err := os.Stat(filepath.Join(others, "none")); err != nil {
				t.Errorf("a name that was made is not seen: %v", err)
			}
		})
	}
}

// TestOpenFilesAgree keeps a file open in both mounts; what one has written or
// appended, the other one reads, while its writes would be delayed otherwise.
func TestOpenFilesAgree(t *testing.T) {
	p := startPair(t)
	var files [2]*os.File
	for i, dir := range p.dirs {
		var err error
		if files[i], err = os.OpenFile(filepath.Join(dir, "f"), os.O_CREATE|os.O_RDWR, 0o644); err != nil {
			t.Fatal(err)
		}
		defer files[i].Close()
	}
	var want []byte
	for i := range 500 {
		who := rand.IntN(2)
		text := fmt.Appendf(nil, "%d by %d;", i, who)
		off := rand.IntN(20_000)
		want = append(want, make([]byte, max(off+len(text)-len(want), 0))...)
		copy(want[off:], text)
		if _, err := files[who].WriteAt(text, int64(off)); err != nil {
			t.Fatal(err)
		}
		for _, f := range [...]*os.File{files[1-who], files[who]} {
			b := make([]byte, len(want)+1)
			n, err := f.ReadAt(b, 0)
			if err != io.EOF || !bytes.Equal(b[:n], want) {
				t.Fatalf("round %d by %d: %d bytes of %d are not what was written, %v", i, who, n, len(want), err)
			}
		}
		if i%97 == 96 {
			size := rand.IntN(len(want))
			want = slices.Clone(want[:size])
			if err := files[1-who].Truncate(int64(size)); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// TestMountsAtOnce has both mounts work in one directory, and on one file, as fast as
// they can: nobody waits for ever, and at the end they agree.
func TestMountsAtOnce(t *testing.T) { mountsAtOnce(t, startPair(t)) }

func mountsAtOnce(t *testing.T, p *pair) {
	var over atomic.Bool
	var wg sync.WaitGroup
	var count [3]atomic.Int64
	fail := make(chan error, 100)
	loop := func(what int, fn func(i int) error) {
		wg.Go(func() {
			for i := 0; !over.Load(); i++ {
				if err := fn(i); err != nil {
					fail <- err
					return
				}
				count[what].Add(1)
			}
		})
	}
	for m, dir := range p.dirs {
		name := filepath.Join(dir, "f")
		loop(0, func(i int) error {
			n := filepath.Join(dir, fmt.Sprintf("%d.%d", m, i%10))
			if err := os.WriteFile(n, []byte("x"), 0o644); err != nil {
				return err
			}
			return os.Remove(n)
		})
		loop(0, func(i int) error { // the same names by both
			n := filepath.Join(dir, fmt.Sprint("n", i%3))
			f, err := os.OpenFile(n, os.O_CREATE|os.O_WRONLY, 0o644)
			if err == nil {
				err = f.Close()
			}
			if err != nil && !errors.Is(err, syscall.ESTALE) && !errors.Is(err, os.ErrNotExist) {
				return err
			}
			if err := os.Remove(n); err != nil && !errors.Is(err, os.ErrNotExist) {
				return err
			}
			return nil
		})
		loop(1, func(i int) error {
			f, err := os.OpenFile(name, os.O_CREATE|os.O_RDWR|os.O_APPEND, 0o644)
			if err != nil {
				if errors.Is(err, syscall.ESTALE) {
					return nil
				}
				return err
			}
			defer f.Close()
			_, err = f.WriteString(".")
			return err
		})
		loop(2, func(int) error {
			if _, err := os.ReadDir(dir); err != nil {
				return err
			}
			_, err := os.ReadFile(name)
			if errors.Is(err, os.ErrNotExist) {
				err = nil
			}
			return err
		})
	}
	length := 2 * time.Second
	if testing.Short() {
		length /= 4
	}
	select {
	case <-time.After(length):
	case err := <-fail:
		t.Error(err)
	}
	over.Store(true)
	ended := make(chan struct{})
	go func() { wg.Wait(); close(ended) }()
	select {
	case <-ended:
	case <-time.After(30 * time.Second):
		t.Fatal("somebody waits for ever")
	}
	select {
	case err := <-fail:
		t.Error(err)
	default:
	}
	t.Logf("%d creations, %d appends, %d looks", count[0].Load(), count[1].Load(), count[2].Load())
	for i := range count {
		if count[i].Load() == 0 {
			t.Errorf("nothing of kind %d was done", i)
		}
	}
	var seen [2]string
	for i, dir := range p.dirs {
		names, err := os.ReadDir(dir)
		if err != nil {
			t.Fatal(err)
		}
		b, err := os.ReadFile(filepath.Join(dir, "f"))
		if err != nil {
			t.Fatal(err)
		}
		seen[i] = fmt.Sprint(names, len(b))
		if n := count[1].Load(); int64(len(b)) > n || int64(len(b)) < n-2 && len(fail) == 0 {
			t.Errorf("%d bytes after %d appends", len(b), n)
		}
	}
	if seen[0] != seen[1] {
		t.Errorf("one sees %s, the other %s", seen[0], seen[1])
	}
}

// TestKernelForgets looks at what the kernel makes of the notifications: which requests it
// sends afterwards for what it believed before.
func TestKernelForgets(t *testing.T) {
	_, c, net, dir := netMount(t)
	k := c.kernel.Load()
	if !k.epochs {
		t.Skip("this kernel has no epochs")
	}
	ino, path := fileIn(t, c, net, net.Store(c.Root().Home(testShards)), "f")
	path = filepath.Join(dir, path)
	connected(t, c)
	asked := func(cmd string) (lookups, getattrs uint64) {
		t.Helper()
		before := [2]uint64{c.requests[op.Lookup].Load(), c.requests[op.Getattr].Load()}
		if out, err := exec.Command("sh", "-c", cmd, path).CombinedOutput(); err != nil {
			t.Fatalf("%v %s", err, out)
		}
		return c.requests[op.Lookup].Load() - before[0], c.requests[op.Getattr].Load() - before[1]
	}
	look := `stat "$0" >/dev/null && cat "$0"`
	asked(look)
	asked(look)
	if l, g := asked(look); l != 0 || g != 0 {
		t.Errorf("%d lookups and %d getattrs for what is believed", l, g)
	}
	k.allNames()
	if l, _ := asked(look); l < 2 {
		t.Errorf("%d lookups in another epoch, of a directory and a file", l)
	}
	asked(look)
	k.inode(ino, true)
	if _, g := asked(`cat "$0"`); g == 0 {
		t.Error("no attributes were asked for before a cached read, after they were revoked")
	}
	// A request for the directory is under way: its lock must not be waited for.
	parent, _ := c.Lookup(context.Background(), c.Root(), filepath.Base(filepath.Dir(path)))
	name := filepath.Base(path)
	<-time.After(hotTime) // or names are told without validity
	asked(look)
	net.Hang(net.Store(ino.Home(testShards)))
	p := startCall(t, "mkdir", filepath.Join(filepath.Dir(path), "new"))
	p.begin()
	await(t, "no request for the directory is under way", func() bool { return k.busy(parent.Ino, 0) > 0 })
	entry := make(chan struct{})
	go func() {
		k.entryNotify(parent.Ino, name)
		close(entry)
	}()
	start := time.Now()
	k.forgetNames([]op.Revoke{{Num: 1, Kind: op.RevokeName, Ino: parent.Ino, Name: name}}, false)
	if d := time.Since(start); d > time.Second {
		t.Errorf("a name was revoked in %v", d)
	}
	select {
	case <-entry:
		t.Error("the kernel did not wait for the directory: then nothing else is needed")
	default:
	}
	net.Back(net.Store(ino.Home(testShards)))
	p.end(t)
	<-entry
}
