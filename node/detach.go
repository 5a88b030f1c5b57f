package node

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"sealfs"
)

// A process in the background is this program executed again, in a session of
// its own, with a pipe over which it says, once, that it is ready or why it is
// not. Go cannot fork without executing.

// readyEnv names, in the environment of such a process, the pipe's descriptor.
const readyEnv = "SEALFS_READY_FD"

// Started is what a process says of itself when it is ready.
type Started struct {
	PID    int     `json:"pid"`
	Role   string  `json:"role,omitempty"` // of a process that has one role only
	Data   string  `json:"data"`
	Addr   string  `json:"addr,omitempty"`   // where others reach it
	Stores []Store `json:"stores,omitempty"` // absolute paths
	Volume string  `json:"volume,omitempty"`
	Mount  string  `json:"mount,omitempty"`
	Log    string  `json:"log"`
}

// report is the one message over the pipe.
type report struct {
	Started *Started    `json:"started,omitempty"`
	Error   string      `json:"error,omitempty"`
	Code    sealfs.Code `json:"code,omitempty"`
}

// Background executes this program with args, detached from terminal and
// working directory, and waits until it is ready or has failed; its error is
// returned as if it had happened here. When ctx ends first, the process is told
// to end (SIGTERM), and waited for.
func Background(ctx context.Context, args []string) (*Started, error) {
	exe, err := os.Executable()
	if err != nil {
		return nil, err
	}
	// What it says before it has its log, above all if it crashes.
	words, err := os.CreateTemp("", "sealfs-*.err")
	if err != nil {
		return nil, err
	}
	defer words.Close()
	os.Remove(words.Name())
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer r.Close()
	cmd := exec.Command(exe, args...)
	cmd.Dir = "/"
	cmd.Env = append(os.Environ(), readyEnv+"=3")
	cmd.Stdout, cmd.Stderr = words, words
	cmd.ExtraFiles = []*os.File{w}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	err = cmd.Start()
	w.Close()
	if err != nil {
		return nil, err
	}
	stop := context.AfterFunc(ctx, func() { cmd.Process.Signal(syscall.SIGTERM) })
	defer stop()
	text, err := io.ReadAll(r)
	if err != nil {
		return nil, err
	}
	var m report
	if json.Unmarshal(text, &m) == nil && m.Started != nil {
		return m.Started, cmd.Process.Release()
	}
	err = cmd.Wait()
	switch {
	case ctx.Err() != nil:
		return nil, fault(sealfs.ErrInterrupted, "interrupted; the process that was starting has ended")
	case m.Error != "":
		return nil, fault(m.Code, "%s", m.Error)
	}
	last := make([]byte, 4096)
	n, _ := words.ReadAt(last, 0)
	said := strings.TrimSpace(string(last[:n]))
	if said != "" {
		said = ", saying:\n" + said
	}
	return nil, fault(sealfs.ErrUnavailable, "the process in the background ended before it was ready (%v)%s", err, said)
}

// Reporter is the child's end of the pipe. The nil Reporter belongs to a
// process in the foreground, and says nothing.
type Reporter struct{ f *os.File }

// NewReporter returns the way to the parent if Background started this process,
// nil if not.
func NewReporter() *Reporter {
	fd, err := strconv.Atoi(os.Getenv(readyEnv))
	os.Unsetenv(readyEnv)
	if err != nil || fd < 3 {
		return nil
	}
	var st unix.Stat_t
	if unix.Fstat(fd, &st) != nil || st.Mode&unix.S_IFMT != unix.S_IFIFO {
		return nil
	}
	unix.CloseOnExec(fd)
	return &Reporter{os.NewFile(uintptr(fd), "ready")}
}

// Ready says that this process is ready. Only the first call of Ready or Failed counts.
func (r *Reporter) Ready(s Started) error { return r.send(report{Started: &s}) }

// Failed says why this process will not be ready.
func (r *Reporter) Failed(err error) error {
	return r.send(report{Error: err.Error(), Code: codeOf(err)})
}

func (r *Reporter) send(m report) error {
	if r == nil || r.f == nil {
		return nil
	}
	var b bytes.Buffer
	err := json.NewEncoder(&b).Encode(m)
	if err == nil {
		_, err = r.f.Write(b.Bytes())
	}
	err = errors.Join(err, r.f.Close())
	r.f = nil
	if err != nil {
		return fmt.Errorf("tell the parent process: %w", err)
	}
	return nil
}
