package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

var (
	full   = flag.Bool("full", false, "run everything, not a sample")
	rounds = flag.Int("rounds", 0, "how many times TestKill kills; 0: 2, or 10 with -full")
	seed   = flag.Uint64("seed", 0, "seed of the random choices; 0: by the clock")
)

// bin is the directory of the programs under test.
var bin string

func TestMain(m *testing.M) {
	if os.Getenv(lockerEnv) != "" {
		lockerMain()
		return
	}
	flag.Parse()
	os.Exit(func() int {
		if bin = os.Getenv("SEALFS_BIN"); bin != "" || testing.Short() {
			return m.Run()
		}
		dir, err := os.MkdirTemp("", "sealfs-bin-")
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		defer os.RemoveAll(dir)
		bin = dir
		build := exec.Command("go", "build", "-o", dir+"/", "sealfs/cmd/...")
		if out, err := build.CombinedOutput(); err != nil {
			fmt.Fprintf(os.Stderr, "build the programs: %v\n%s", err, out)
			return 1
		}
		return m.Run()
	}())
}

// Deadlines. They are generous: they end what hangs, they measure nothing.
const (
	commandTime = 2 * time.Minute  // one of our commands
	programTime = 10 * time.Minute // one of other people's
)

// result is what a program that has ended leaves.
type result struct {
	code        int
	out, errOut string
}

func (r result) String() string {
	return fmt.Sprintf("exit status %d\n%s%s", r.code, r.out, r.errOut)
}

// program is a command line with its surroundings.
type program struct {
	args  []string
	dir   string
	env   []string // in addition to ours
	stdin string
}

// run runs a program to its end. Only that it cannot be run is an error.
func (p program) run(t testing.TB, limit time.Duration) result {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	cmd := exec.CommandContext(ctx, p.args[0], p.args[1:]...)
	cmd.Dir, cmd.Env = p.dir, append(os.Environ(), p.env...)
	cmd.Stdin = strings.NewReader(p.stdin)
	cmd.WaitDelay = 10 * time.Second
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	err := cmd.Run()
	r := result{cmd.ProcessState.ExitCode(), out.String(), errOut.String()}
	if _, exited := errors.AsType[*exec.ExitError](err); ctx.Err() != nil || err != nil && !exited {
		t.Fatalf("%s: %v (limit %v)\n%v", strings.Join(p.args, " "), err, limit, r)
	}
	return r
}

// must runs a program in dir and returns its output; it has to succeed.
func must(t testing.TB, dir string, args ...string) string {
	t.Helper()
	r := program{args: args, dir: dir}.run(t, programTime)
	if r.code != 0 {
		t.Fatalf("%s: %v", strings.Join(args, " "), r)
	}
	return r.out
}

// sealfs runs one of our programs; want is its exit status.
func sealfs(t testing.TB, want int, args ...string) result {
	t.Helper()
	r := program{args: append([]string{filepath.Join(bin, args[0])}, args[1:]...)}.run(t, commandTime)
	if r.code != want {
		t.Fatalf("%s: want exit status %d, got %v", strings.Join(args, " "), want, r)
	}
	return r
}

// status is the part of `sealfs status --json` that scripts rely on.
type status struct {
	State  string `json:"state"`
	PIDs   []int  `json:"pids"`
	Stores []struct {
		Device  string `json:"device"`
		Region  string `json:"region"`
		Staging string `json:"staging"`
	} `json:"stores"`
	Volumes []struct {
		Name string `json:"name"`
	} `json:"volumes"`
	Mounts []string `json:"mounts"`
}

// instance is a data directory and its mount point, in a temporary directory.
type instance struct {
	t         testing.TB
	data, mnt string
	dir       string // for whatever else a test keeps outside of the mount
}

// newInstance skips the test where nothing can be mounted. When the test
// ends, it ends whatever runs on the data directory and removes everything.
func newInstance(t testing.TB) *instance {
	t.Helper()
	if testing.Short() {
		t.Skip("skipped: real mounts take too long for -short")
	}
	if why := cannotMount(); why != "" {
		t.Skip("skipped: " + why)
	}
	dir := t.TempDir()
	i := &instance{t: t, dir: dir, data: filepath.Join(dir, "data"), mnt: filepath.Join(dir, "mnt")}
	t.Cleanup(i.remove)
	return i
}

// cannotMount says why nothing can be mounted here, "" if it can.
func cannotMount() string {
	f, err := os.OpenFile("/dev/fuse", os.O_RDWR, 0)
	if err != nil {
		return fmt.Sprintf("/dev/fuse cannot be used: %v", err)
	}
	f.Close()
	if os.Geteuid() != 0 {
		if _, err := exec.LookPath("fusermount3"); err != nil {
			return "an ordinary user needs fusermount3 to mount"
		}
		return ""
	}
	text, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return err.Error()
	}
	_, hex, _ := strings.Cut(string(text), "\nCapEff:\t")
	hex, _, _ = strings.Cut(hex, "\n")
	if caps, err := strconv.ParseUint(hex, 16, 64); err == nil && caps&(1<<unix.CAP_SYS_ADMIN) == 0 {
		return "mount(2) is not permitted here (no CAP_SYS_ADMIN)"
	}
	return ""
}

// up starts everything and returns what the command printed.
func (i *instance) up(flags ...string) string {
	i.t.Helper()
	return sealfs(i.t, 0, append([]string{"sealfs", "up", "--data", i.data, "--mount", i.mnt}, flags...)...).out
}

func (i *instance) down() {
	i.t.Helper()
	sealfs(i.t, 0, "sealfs", "down", "--data", i.data)
	if s := i.status(); s.State != "down" || len(s.PIDs) > 0 || len(s.Mounts) > 0 {
		i.t.Fatalf("after down the status is %+v", s)
	}
	if m := mountsBelow(i.t, i.dir); len(m) > 0 {
		i.t.Fatalf("after down these are still mounted: %v", m)
	}
}

func (i *instance) status() status {
	i.t.Helper()
	out := sealfs(i.t, 0, "sealfs", "status", "--data", i.data, "--json").out
	var s status
	if err := json.Unmarshal([]byte(out), &s); err != nil {
		i.t.Fatalf("status --json: %v\n%s", err, out)
	}
	return s
}

// fsck wants the stores to be clean. Nothing may run.
func (i *instance) fsck() {
	i.t.Helper()
	sealfs(i.t, 0, "sealfs-fsck", "-n", "--data", i.data)
}

// A killer holds all processes of an instance by descriptors, which name them
// even when their numbers are used again.
type killer struct{ fds []int }

// killer returns a killer of the processes that live now.
func (i *instance) killer() *killer {
	i.t.Helper()
	k := new(killer)
	for _, pid := range i.status().PIDs {
		fd, err := unix.PidfdOpen(pid, 0)
		if err != nil {
			i.t.Fatalf("process %d of status: %v", pid, err)
		}
		k.fds = append(k.fds, fd)
	}
	if len(k.fds) == 0 {
		i.t.Fatal("status names no process")
	}
	return k
}

// kill sends SIGKILL to all and returns when all have ended.
func (k *killer) kill(t testing.TB) {
	t.Helper()
	for _, fd := range k.fds {
		if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
			t.Fatalf("SIGKILL: %v", err)
		}
	}
	deadline := time.Now().Add(commandTime)
	for _, fd := range k.fds {
		// A descriptor of a process becomes readable when that has ended.
		for {
			n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, int(time.Until(deadline).Milliseconds()))
			if n == 1 {
				break
			}
			if !errors.Is(err, unix.EINTR) {
				t.Fatalf("a killed process did not end within %v (%v)", commandTime, err)
			}
		}
		unix.Close(fd)
	}
	k.fds = nil
}

// mountsBelow returns the mount points below dir, the topmost last.
func mountsBelow(t testing.TB, dir string) (points []string) {
	t.Helper()
	table, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(table)) {
		if f := strings.Fields(line); len(f) > 4 && strings.HasPrefix(f[4], dir+"/") {
			points = append(points, f[4])
		}
	}
	return points
}

// remove ends and removes everything, whatever state the test has left it in.
func (i *instance) remove() {
	t := i.t
	if t.Failed() {
		log, err := os.ReadFile(filepath.Join(i.data, "log", "sealfs.log"))
		lines := strings.Split(strings.TrimSpace(string(log)), "\n")
		t.Logf("end of the log (%v):\n%s", err, strings.Join(lines[max(0, len(lines)-40):], "\n"))
	}
	if _, err := os.Stat(i.data); errors.Is(err, os.ErrNotExist) {
		return
	}
	s := i.status()
	r := program{args: []string{filepath.Join(bin, "sealfs"), "down", "--data", i.data, "--timeout", "30s", "--force"}}.run(t, commandTime)
	if r.code != 0 {
		t.Errorf("down at the end of the test: %v", r)
		for _, pid := range s.PIDs {
			unix.Kill(pid, unix.SIGKILL)
		}
	}
	for _, point := range slices.Backward(mountsBelow(t, i.dir)) {
		t.Errorf("%s is still mounted after down", point)
		if unix.Unmount(point, unix.MNT_DETACH) != nil {
			exec.Command("fusermount3", "-u", "-z", point).Run()
		}
	}
	if s.State == "empty" {
		return
	}
	r = program{args: []string{filepath.Join(bin, "sealfs"), "destroy", "--data", i.data, "--yes"}}.run(t, commandTime)
	if r.code != 0 {
		t.Errorf("destroy at the end of the test: %v", r)
	}
	for _, st := range s.Stores {
		for _, path := range []string{st.Device, st.Region, st.Staging} {
			if _, err := os.Stat(path); path != "" && !errors.Is(err, os.ErrNotExist) {
				t.Errorf("%s is left after destroy (%v)", path, err)
				os.Remove(path)
			}
		}
	}
}
