package client

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// stuckEnv makes the test binary serve a mount on the directory that it names, in
// which mkdir never ends, and wait for the directory that mkdir holds.
const stuckEnv = "SEALFS_TEST_STUCK"

type stuck struct {
	fuse.RawFileSystem
	srv *fuse.Server
}

func (s *stuck) GetAttr(_ <-chan struct{}, in *fuse.GetAttrIn, out *fuse.AttrOut) fuse.Status {
	out.Attr = fuse.Attr{Ino: in.NodeId, Mode: modeDir | 0o755, Nlink: 2}
	out.AttrValid = 3600
	return fuse.OK
}

func (s *stuck) Lookup(<-chan struct{}, *fuse.InHeader, string, *fuse.EntryOut) fuse.Status {
	return fuse.ENOENT
}

func (s *stuck) Mkdir(cancel <-chan struct{}, in *fuse.MkdirIn, name string, out *fuse.EntryOut) fuse.Status {
	go s.srv.EntryNotify(fuse.FUSE_ROOT_ID, "other")
	fmt.Println("mkdir")
	select {}
}

func serveStuck(dir string) error {
	s := &stuck{RawFileSystem: fuse.NewDefaultRawFileSystem()}
	var err error
	o := &fuse.MountOptions{FsName: "sealfs:stuck", Name: "sealfs", DirectMount: os.Geteuid() == 0}
	if s.srv, err = fuse.NewServer(s, dir, o); err != nil {
		return err
	}
	closeDeviceOnExec()
	go s.srv.Serve()
	if err := s.srv.WaitMount(); err != nil {
		return err
	}
	fmt.Println("mounted")
	select {}
}

// TestStuckServer kills a process that waits in the kernel for a directory of its own mount. It
// cannot end, until its connection is aborted by who clears its mount away, or by who
// waits for its end.
func TestStuckServer(t *testing.T) {
	needFUSE(t)
	for name, clear := range map[string]func(t *testing.T, dir string, pid int){
		"clear": func(t *testing.T, dir string, pid int) {
			if cleared, err := ClearStale(dir); !cleared || err != nil {
				t.Errorf("cleared %v, %v", cleared, err)
			}
		},
		"die": func(t *testing.T, dir string, pid int) { AbortDying(pid) },
	} {
		t.Run(name, func(t *testing.T) {
			dir := mountDir(t)
			cmd := exec.Command(os.Args[0])
			cmd.Env, cmd.Stderr = append(os.Environ(), stuckEnv+"="+dir), os.Stderr
			pipe, err := cmd.StdoutPipe()
			if err == nil {
				err = cmd.Start()
			}
			if err != nil {
				t.Fatal(err)
			}
			pid, ended := cmd.Process.Pid, make(chan error, 1)
			out := bufio.NewReader(pipe)
			said := func(want string) {
				t.Helper()
				if line, err := out.ReadString('\n'); strings.TrimSpace(line) != want {
					cmd.Process.Kill()
					t.Fatalf("said %q, %v; want %q", line, err, want)
				}
			}
			said("mounted")
			caller := exec.Command("mkdir", filepath.Join(dir, "d"))
			if err := caller.Start(); err != nil {
				t.Fatal(err)
			}
			called := make(chan error, 1)
			go func() { called <- caller.Wait() }()
			said("mkdir")
			if AbortOrphan(dir); len(connections(pid)) == 0 {
				t.Fatal("the mount of a living process was aborted")
			}
			waitUntil(t, "a thread waits for the directory", func() bool { return waits(pid) })
			cmd.Process.Kill()
			go func() {
				io.Copy(io.Discard, out)
				ended <- cmd.Wait()
			}()
			waitUntil(t, "the process is dying", func() bool { return Dying(pid) })
			waitUntil(t, "no thread is left but the one that waits", func() bool { return threads(pid) <= 2 })
			select {
			case err := <-ended:
				t.Fatalf("the process has ended by itself: %v", err)
			case err := <-called:
				t.Fatalf("mkdir has ended: %v", err)
			default:
			}
			clear(t, dir, pid)
			for what, c := range map[string]chan error{"the process": ended, "mkdir": called} {
				select {
				case err := <-c:
					if err == nil {
						t.Errorf("%s ended well", what)
					}
				case <-time.After(10 * time.Second):
					t.Fatalf("%s does not end", what)
				}
			}
			var st unix.Statfs_t
			if err := unix.Statfs(dir, &st); name == "die" && err == nil && st.Type == fuseMagic {
				t.Error("the mount is served by nobody, and answers")
			}
		})
	}
	if Dying(os.Getpid()) || Dying(1<<30) {
		t.Error("a process that lives, or does not exist, is said to be dying")
	}
}

// waitUntil returns when a condition holds, which is looked at often.
func waitUntil(t *testing.T, what string, holds func() bool) {
	t.Helper()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for end := time.Now().Add(20 * time.Second); !holds(); <-tick.C {
		if time.Now().After(end) {
			t.Fatalf("never: %s", what)
		}
	}
}

// fuseMagic is how statfs(2) names FUSE.
const fuseMagic = 0x65735546

// threads returns how many threads a process has that have not ended.
func threads(pid int) (n int) {
	all, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", pid))
	for _, f := range all {
		if state := threadState(f); state != "Z" && state != "X" {
			n++
		}
	}
	return n
}

// waits reports whether a thread of a process waits uninterruptibly.
func waits(pid int) bool {
	all, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", pid))
	for _, f := range all {
		if threadState(f) == "D" {
			return true
		}
	}
	return false
}

func threadState(file string) string {
	b, err := os.ReadFile(file)
	if errors.Is(err, os.ErrNotExist) || len(b) == 0 {
		return "X"
	}
	w := strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+1:]))
	return w[0]
}
