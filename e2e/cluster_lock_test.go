package e2e

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// lockerEnv makes the test binary a process that locks files as it is told.
const lockerEnv = "SEALFS_E2E_LOCKER"

// lockerMain reads "CALL PATH" a line and writes "CALL PATH ERROR" when that has ended: lock waits for a POSIX
// lock on all of the file, unlock releases it, write writes "CALL" at its beginning, and sync makes that durable.
func lockerMain() {
	files := map[string]*os.File{}
	var mu sync.Mutex
	say := func(line string, err error) {
		mu.Lock()
		defer mu.Unlock()
		fmt.Println(line, err)
	}
	for in := bufio.NewScanner(os.Stdin); in.Scan(); {
		call, path, _ := strings.Cut(in.Text(), " ")
		f, line := files[path], in.Text()
		if f == nil {
			var err error
			if f, err = os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o644); err != nil {
				say(line, err)
				continue
			}
			files[path] = f
		}
		l := unix.Flock_t{Type: unix.F_WRLCK}
		switch call {
		case "lock":
			go func() { say(line, unix.FcntlFlock(f.Fd(), unix.F_SETLKW, &l)) }()
		case "unlock":
			l.Type = unix.F_UNLCK
			say(line, unix.FcntlFlock(f.Fd(), unix.F_SETLK, &l))
		case "sync":
			say(line, f.Sync())
		default:
			_, err := f.WriteAt([]byte(call), 0)
			say(line, err)
		}
	}
}

// locker is such a process.
type locker struct {
	t     testing.TB
	cmd   *exec.Cmd
	in    io.WriteCloser
	lines chan string
}

func startLocker(t testing.TB) *locker {
	t.Helper()
	l := &locker{t: t, cmd: exec.Command(os.Args[0]), lines: make(chan string, 100)}
	l.cmd.Env = append(os.Environ(), lockerEnv+"=1")
	l.cmd.Stderr = os.Stderr
	var err error
	if l.in, err = l.cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	out, err := l.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := l.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		for in := bufio.NewScanner(out); in.Scan(); {
			l.lines <- in.Text()
		}
		close(l.lines)
	}()
	t.Cleanup(l.kill)
	return l
}

func (l *locker) kill() {
	l.cmd.Process.Kill()
	l.cmd.Wait()
}

func (l *locker) begin(call string) {
	l.t.Helper()
	if _, err := fmt.Fprintln(l.in, call); err != nil {
		l.t.Fatal(err)
	}
}

// ends wants the call that is under way to end so.
func (l *locker) ends(call, want string) {
	l.t.Helper()
	select {
	case got := <-l.lines:
		if got != call+" "+want {
			l.t.Fatalf("%q, want %q to end with %q", got, call, want)
		}
	case <-time.After(commandTime):
		l.t.Fatalf("%q does not end", call)
	}
}

func (l *locker) do(call string) {
	l.t.Helper()
	l.begin(call)
	l.ends(call, "<nil>")
}

// waits wants no call to end for a while.
func (l *locker) waits() {
	l.t.Helper()
	select {
	case got := <-l.lines:
		l.t.Fatalf("%q ends", got)
	case <-time.After(notTime):
	}
}

// TestClusterLocks locks files of two servers through two mounts: a circle is refused, locks
// and waits survive SIGKILL of the servers, and a mount that was given up writes nothing any more.
func TestClusterLocks(t *testing.T) {
	s := newSite(t, shape{managers: 1, servers: 2, disks: 1, daemons: 2, size: "1G"}, nil)
	s.up(t)
	probes := s.newProbes(t)
	at := func(mount, probe int) string {
		rel, err := filepath.Rel(s.mounts[0].path, probes[probe].path)
		if err != nil {
			t.Fatal(err)
		}
		return filepath.Join(s.mounts[mount].path, rel, "locked")
	}
	a, b := startLocker(t), startLocker(t)
	a.do("lock " + at(0, 0))
	b.do("lock " + at(1, 1))
	a.begin("lock " + at(0, 1))
	a.waits()
	began := time.Now()
	b.begin("lock " + at(1, 0))
	b.ends("lock "+at(1, 0), unix.EDEADLK.Error())
	t.Logf("a circle over two mounts and two servers is refused after %v", time.Since(began).Round(time.Millisecond))
	a.waits()
	b.begin("lock " + at(1, 0))
	b.ends("lock "+at(1, 0), unix.EDEADLK.Error()) // again, as long as it is one
	b.do("unlock " + at(1, 1))
	a.ends("lock "+at(0, 1), "<nil>")

	b.begin("lock " + at(1, 0))
	b.waits()
	for range 2 {
		for _, p := range s.servers {
			p.kill(t)
		}
		for _, p := range s.servers {
			p.begin(t)
		}
		for _, p := range s.servers {
			p.ready(t)
		}
		s.goOn(t, probes, nil, goOnTime)
		b.waits()
	}
	a.do("unlock " + at(0, 0))
	b.ends("lock "+at(1, 0), "<nil>")

	// A process that is killed while it waits leaves nothing.
	c := startLocker(t)
	c.begin("lock " + at(0, 0))
	c.waits()
	c.kill()
	b.do("unlock " + at(1, 0))
	a.do("lock " + at(0, 0))
	if !*full {
		return
	}

	// The daemon of one mount stands still until its session has ended, with a write that it has not sent.
	a.do("before " + at(0, 0))
	s.daemons[0].signal(t, unix.SIGSTOP)
	began = time.Now()
	b.do("lock " + at(1, 0))
	t.Logf("the lock of a mount that stands still is given to another after %v", time.Since(began).Round(time.Second))
	b.do("after! " + at(1, 0))
	b.do("sync " + at(1, 0))
	s.daemons[0].signal(t, unix.SIGCONT)
	a.begin("late!! " + at(0, 0))
	a.ends("late!! "+at(0, 0), "write "+at(0, 0)+": "+unix.EIO.Error())
	got, err := os.ReadFile(at(1, 0))
	if err != nil || string(got) != "after!" {
		t.Errorf("under the lock stands %q, %v", got, err)
	}
}
