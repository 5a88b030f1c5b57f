package client

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sealfs"
	"sealfs/internal/oracle"
	"sealfs/op"
	sealserver "sealfs/server"
)

// serveEnv makes the test binary mount the model (or, with _STORE, a real server) on the directory that it names,
// until its standard input ends or it is asked to stop. The mount is served by a
// process of its own because one that uses its own mount can run out of
// threads. It also is a way to try other suites by hand:
//
//	go test -c -o t ./client && SEALFS_TEST_SERVE=/mnt/x ./t
const serveEnv = "SEALFS_TEST_SERVE"

func TestMain(m *testing.M) {
	if dir := os.Getenv(serveEnv); dir != "" {
		if err := serve(dir); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	if what := os.Getenv(callEnv); what != "" {
		name, path, _ := strings.Cut(what, " ")
		if err := makeCall(name, path); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	if dir := os.Getenv(stuckEnv); dir != "" {
		fmt.Fprintln(os.Stderr, serveStuck(dir))
		os.Exit(1)
	}
	if os.Getenv(lockerEnv) != "" {
		lockerMain()
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// testShards is the shard count of the models under test.
const testShards = 64

// newModel returns a model and its root.
func newModel() (*oracle.FS, sealfs.Ino) {
	h := oracle.New(testShards)
	var rep op.Reply
	h.Do(context.Background(), &op.Request{Type: op.MakeRoot, Volume: 1, Shard: 5, Mode: 0o755}, &rep)
	return h, rep.Attr.Ino
}

// newClient returns a client of a new model.
func newClient(t testing.TB) (*Client, *oracle.FS) {
	h, root := newModel()
	c := New(h, Options{Volume: 1, Root: root, Shards: testShards})
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	})
	return c, h
}

// newEngine returns a real server on a store below dir, and its root.
func newEngine(dir string) (*sealserver.Server, sealfs.Ino, error) {
	st := sealserver.StoreOptions{Device: filepath.Join(dir, "device"), Region: filepath.Join(dir, "region"), Staging: filepath.Join(dir, "ring")}
	if _, err := sealserver.Format(sealserver.FormatOptions{Device: st.Device, Region: st.Region, Size: 2 << 30}); err != nil {
		return nil, 0, err
	}
	s, err := sealserver.Open(context.Background(), sealserver.Options{Shards: testShards, Stores: []sealserver.StoreOptions{st}})
	if err != nil {
		return nil, 0, err
	}
	root, err := s.MakeRoot(context.Background(), 1, 0o755, 0, 0)
	return s, root, err
}

func serve(dir string) (err error) {
	if strings.Contains(dir, ":") {
		return servePair(strings.Split(dir, ":"))
	}
	var h op.Handler
	var root sealfs.Ino
	var o Options
	var net *oracle.Net
	if os.Getenv(serveEnv+"_NET") != "" {
		var model *oracle.FS
		model, root = newModel()
		net = oracle.NewNet(model, 3, 1)
		h, o = net, Options{Session: 7, Chunked: true, Each: net.Each}
	} else if store := os.Getenv(serveEnv + "_STORE"); store != "" {
		var s *sealserver.Server
		if s, root, err = newEngine(store); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, s.Close()) }()
		h = s
	} else {
		h, root = newModel()
	}
	o.Volume, o.Root, o.Shards = 1, root, testShards
	if second := os.Getenv(serveEnv + "_SECOND"); second != "" {
		// Another mount, as of another machine: each has its session.
		o2 := o
		o.Session, o2.Session = 7, 8
		c2 := New(h, o2)
		m2, err := Mount(context.Background(), c2, MountOptions{Dir: second, Name: "second", AllowOther: os.Geteuid() == 0})
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, m2.Unmount(), c2.Close()) }()
	}
	c := New(h, o)
	if net != nil {
		net.Register = c.Register
		net.Lose(0.02)
	}
	mo := MountOptions{Dir: dir, Name: "test", AllowOther: os.Geteuid() == 0, Suid: true, Dev: true}
	if os.Getenv(serveEnv+"_DEBUG") != "" {
		mo.Debug = true
		mo.Logger = slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug}))
	}
	m, err := Mount(context.Background(), c, mo)
	if err != nil {
		return err
	}
	fmt.Println("mounted")
	go func() {
		// The end of the input, if it is a pipe: the test is over or dead.
		if info, err := os.Stdin.Stat(); err == nil && info.Mode()&os.ModeNamedPipe != 0 {
			io.Copy(io.Discard, os.Stdin)
			m.Unmount()
		}
	}()
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGTERM, syscall.SIGINT)
	go func() {
		<-stop
		m.Unmount()
	}()
	m.Wait()
	if net != nil {
		net.Lose(0)
	}
	return c.Close()
}

// server is a child process with a mount.
type server struct {
	dir  string
	cmd  *exec.Cmd
	pipe io.WriteCloser
	out  *bufio.Reader
}

// needFUSE skips, visibly, where nothing can be mounted.
func needFUSE(t testing.TB) {
	f, err := os.OpenFile("/dev/fuse", os.O_RDWR, 0)
	if err != nil {
		t.Skipf("no FUSE here: %v", err)
	}
	f.Close()
	if os.Geteuid() != 0 {
		if _, err := exec.LookPath("fusermount3"); err != nil {
			t.Skip("neither root nor fusermount3")
		}
	}
}

// mountDir returns a directory to mount on, which is cleared after the test
// whatever happened. It is not t.TempDir, which would empty what is still mounted.
func mountDir(t testing.TB) string {
	dir, err := os.MkdirTemp("", "sealfs-mount-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		for range 10 {
			if unmount(dir, unix.MNT_DETACH) != nil {
				break
			}
		}
		if err := os.Remove(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// startServer mounts an empty model in a process of its own.
func startServer(t testing.TB) *server {
	t.Helper()
	needFUSE(t)
	return startServerAt(t, mountDir(t))
}

// startEngine mounts a real server on an empty store.
func startEngine(t testing.TB) *server {
	t.Helper()
	needFUSE(t)
	return startServerAt(t, mountDir(t), serveEnv+"_STORE="+t.TempDir())
}

// startNet mounts a model in three stores over connections that lose answers, with large files in chunks.
func startNet(t testing.TB) *server {
	t.Helper()
	needFUSE(t)
	return startServerAt(t, mountDir(t), serveEnv+"_NET=1")
}

func startServerAt(t testing.TB, dir string, env ...string) *server {
	t.Helper()
	s := &server{dir: dir, cmd: exec.Command(os.Args[0])}
	s.cmd.Env = append(append(os.Environ(), serveEnv+"="+dir), env...)
	s.cmd.Stderr = os.Stderr
	var err error
	if s.pipe, err = s.cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	out, err := s.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := s.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.stop(t) })
	s.out = bufio.NewReader(out)
	if line, err := s.out.ReadString('\n'); strings.TrimSpace(line) != "mounted" {
		t.Fatalf("mount: %q, %v", line, err)
	}
	return s
}

// stop unmounts and expects the server to end well.
func (s *server) stop(t testing.TB) {
	if s.cmd == nil {
		return
	}
	s.pipe.Close()
	timer := time.AfterFunc(20*time.Second, func() { s.cmd.Process.Kill() })
	if err := s.cmd.Wait(); err != nil {
		t.Errorf("server: %v", err)
	}
	timer.Stop()
	s.cmd = nil
}

// kill ends the server as a crash would, and leaves the mount dead.
func (s *server) kill(t testing.TB) {
	if err := s.cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	s.cmd.Wait()
	s.pipe.Close()
	s.cmd = nil
}
