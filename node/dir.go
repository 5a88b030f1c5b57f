package node

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"sealfs"
	"sealfs/client"
	"sealfs/wire"
)

// DefaultDir is the data directory of a machine where nothing else is said.
const DefaultDir = "/var/lib/sealfs"

// Dir is a data directory, as a process of one role sees it: several roles may
// be at work on one. Its methods look and touch, but keep nothing open.
type Dir struct {
	path string
	role string // "" for the main process
}

// as returns the directory as the processes of a role see it.
func (d Dir) as(role string) Dir {
	if role == RoleMain {
		role = ""
	}
	return Dir{d.path, role}
}

// roleName returns the name of the process that d's lock is of.
func (d Dir) roleName() string { return cmp.Or(d.role, RoleMain) }

// OpenDir names a data directory, which need not exist. The path is made
// absolute, so that it can be handed to other processes.
func OpenDir(path string) (Dir, error) {
	if path == "" {
		return Dir{}, fault(sealfs.ErrInvalid, "the name of the data directory is empty: give --data DIR")
	}
	abs, err := filepath.Abs(path)
	if err != nil {
		return Dir{}, fmt.Errorf("data directory %s: %w", path, err)
	}
	return Dir{path: abs}, nil
}

// String returns the absolute path.
func (d Dir) String() string { return d.path }

func (d Dir) join(elem ...string) string { return filepath.Join(append([]string{d.path}, elem...)...) }

// LogPath returns the path of the log.
func (d Dir) LogPath() string { return d.join("log", cmp.Or(d.role, "sealfs")+".log") }

func (d Dir) adminSocket() string { return d.join("run", cmp.Or(d.role, "admin")+".sock") }

func (d Dir) lockPath() string {
	if d.role == "" {
		return d.join("lock")
	}
	return d.join("run", d.role+".lock")
}

func (d Dir) dataSocket() string { return d.join("run", "data.sock") }

// abs makes a path of the configuration absolute.
func (d Dir) abs(path string) string {
	if filepath.IsAbs(path) {
		return path
	}
	return d.join(path)
}

// ours are the names that SealFS makes in a data directory. Those that hold
// what cannot be made again are true.
var ours = map[string]bool{
	"config.yaml": false, "lock": false, "log": false, "map": false, "mounts.yaml": false, "pids": false, "run": false,
	"server.yaml": false, "manager": true, "regions": true, "stores": true,
}

// survey looks at what stands in the directory. It returns whether there are
// stores or a manager, and the name of something that is not ours, if any.
func (d Dir) survey() (used bool, foreign string, err error) {
	entries, err := os.ReadDir(d.path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return false, "", fmt.Errorf("data directory: %w", err)
	}
	for _, e := range entries {
		keep, known := ours[e.Name()]
		switch {
		case known && keep:
			inside, err := os.ReadDir(d.join(e.Name()))
			if err != nil {
				return false, "", fmt.Errorf("data directory: %w", err)
			}
			used = used || len(inside) > 0
		// A directory that is a mount point of its own has this from mke2fs.
		case !known && e.Name() != "lost+found" && foreign == "":
			foreign = e.Name()
		}
	}
	return used, foreign, nil
}

// make makes the directory and those in it that every process needs.
func (d Dir) make() error {
	for _, dir := range []string{d.path, d.join("log"), d.join("pids"), d.join("run")} {
		err := os.MkdirAll(dir, 0o700)
		if errors.Is(err, fs.ErrPermission) {
			return fault(sealfs.ErrAccess, "%s cannot be made or written (permission denied): name another data directory with --data, or run as its owner", d)
		}
		if err != nil {
			return fmt.Errorf("data directory: %w", err)
		}
	}
	return nil
}

// A lock is a file that this process has locked. The lock ends with the process,
// however that ends. It is one of fcntl's open file description locks: unlike
// flock's, others can ask about it without taking it for a moment themselves.
type lock struct{ f *os.File }

func (l lock) release() error { return l.f.Close() }

func flockt(typ int16) *unix.Flock_t {
	return &unix.Flock_t{Type: typ, Whence: io.SeekStart}
}

func tryLock(f *os.File) (bool, error) {
	err := unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, flockt(unix.F_WRLCK))
	if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EACCES) {
		return false, nil
	}
	if err != nil {
		return false, &fs.PathError{Op: "lock", Path: f.Name(), Err: err}
	}
	return true, nil
}

// locked reports whether a process holds a lock on the file.
func locked(f *os.File) (bool, error) {
	l := flockt(unix.F_WRLCK)
	if err := unix.FcntlFlock(f.Fd(), unix.F_OFD_GETLK, l); err != nil {
		return false, &fs.PathError{Op: "query lock", Path: f.Name(), Err: err}
	}
	return l.Type != unix.F_UNLCK, nil
}

// lockWait is how long a process that starts waits for one that ends.
const lockWait = 10 * time.Second

// lock makes this process the main one of the directory, which must exist. If
// there is one, the error is ErrBusy and names its pid; one that does not answer
// (any more) gets a while to end.
func (d Dir) lock(wait time.Duration) (lock, error) {
	f, err := os.OpenFile(d.lockPath(), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return lock{}, fmt.Errorf("data directory: %w", err)
	}
	if err := d.takeLock(f, time.Now().Add(wait)); err != nil {
		f.Close()
		return lock{}, err
	}
	return lock{f}, nil
}

func (d Dir) takeLock(f *os.File, deadline time.Time) error {
	for {
		ok, err := tryLock(f)
		if err != nil {
			return err
		}
		pid := readPID(f)
		if ok {
			// A killed process gives its files back one by one: wait for the last.
			if client.Dying(pid) {
				awaitExit(pid, lockWait)
			}
			if err := f.Truncate(0); err != nil {
				return err
			}
			_, err := f.WriteAt(fmt.Appendln(nil, os.Getpid()), 0)
			return err
		}
		who := "another process, which is starting or stopping"
		if pid > 0 {
			who = fmt.Sprintf("process %d", pid)
		}
		client.AbortDying(pid) // which could not end without
		left := time.Until(deadline)
		if left <= 0 || !client.Dying(pid) && d.answers() {
			return fault(sealfs.ErrBusy, "%s is in use by %s: see `sealfs status --data %s`, or stop it with `sealfs down --data %s`", d.path, who, d.path, d.path)
		}
		awaitExit(pid, min(left, 50*time.Millisecond))
	}
}

// answers reports whether somebody listens at the admin socket, or at that of
// the main process, which holds the locks of all roles.
func (d Dir) answers() bool {
	for _, d := range []Dir{d, d.as(RoleMain)} {
		if nc, err := wire.DialUnix(context.Background(), d.adminSocket()); err == nil {
			nc.Close()
			return true
		}
	}
	return false
}

// awaitExit waits until a process has ended and given all back, but not longer
// than timeout. Without such a process it waits in vain.
func awaitExit(pid int, timeout time.Duration) {
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		if timeout < lockWait {
			time.Sleep(timeout) // between the end of one and our next look
		}
		return
	}
	defer unix.Close(fd)
	unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, int(timeout.Milliseconds()))
}

func readPID(f *os.File) int {
	b := make([]byte, 20)
	n, _ := f.ReadAt(b, 0)
	pid, _ := strconv.Atoi(strings.TrimSpace(string(b[:n])))
	return pid
}

// holder returns whether somebody holds the directory's lock, and who, 0 if
// that is not yet known.
func (d Dir) holder() (pid int, held bool, err error) {
	f, err := os.Open(d.lockPath())
	if errors.Is(err, fs.ErrNotExist) {
		return 0, false, nil
	}
	if err != nil {
		return 0, false, fmt.Errorf("data directory: %w", err)
	}
	defer f.Close()
	if held, err = locked(f); !held || err != nil {
		return 0, false, err
	}
	return readPID(f), true, nil
}

// The roles of processes.
const (
	RoleMain    = "main"    // `sealfs up`: manager, server and the first mount
	RoleMount   = "mount"   // a further mount of such a one
	RoleManager = "manager" // `sealfs manager`
	RoleServer  = "server"  // `sealfs server`
	RoleDaemon  = "daemon"  // `sealfs daemon`: all mounts of a machine
)

// Process is what a process of a data directory says of itself, in a file named
// by its pid in DIR/pids that it has locked as long as it lives. The file of a
// killed process stays, so that what it left behind can be found.
type Process struct {
	PID     int       `json:"pid"`
	Role    string    `json:"role"`
	Volume  string    `json:"volume,omitempty"`
	Mount   string    `json:"mount,omitempty"` // mount point
	Started time.Time `json:"started"`
}

// registration is this process's entry in DIR/pids.
type registration struct {
	lock
	path string
}

// register enters this process.
func (d Dir) register(p Process) (registration, error) {
	p.PID, p.Started = os.Getpid(), time.Now().UTC().Truncate(time.Millisecond)
	text, err := json.Marshal(p)
	if err != nil {
		return registration{}, err
	}
	// Locked before it has its name: what has a name and no lock is dead.
	draft, path := d.join("pids", fmt.Sprintf(".%d", p.PID)), d.join("pids", strconv.Itoa(p.PID))
	f, err := os.OpenFile(draft, os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return registration{}, fmt.Errorf("register process: %w", err)
	}
	ok, err := tryLock(f)
	if err == nil && !ok {
		err = fault(sealfs.ErrBusy, "%s is locked by another process", draft)
	}
	if err == nil {
		_, err = f.Write(append(text, '\n'))
	}
	if err == nil {
		err = os.Rename(draft, path)
	}
	if err != nil {
		f.Close()
		return registration{}, fmt.Errorf("register process: %w", err)
	}
	return registration{lock{f}, path}, nil
}

// end removes the entry.
func (r registration) end() error { return errors.Join(os.Remove(r.path), r.release()) }

// processes returns the entries of DIR/pids in the order of their pids: of the
// living processes, and of those that died without a farewell.
func (d Dir) processes() (live, dead []Process, err error) {
	entries, err := os.ReadDir(d.join("pids"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil, nil
	}
	if err != nil {
		return nil, nil, fmt.Errorf("data directory: %w", err)
	}
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		p, alive, err := d.process(pid)
		if errors.Is(err, fs.ErrNotExist) {
			continue // it ended this moment
		}
		if err != nil {
			return nil, nil, err
		}
		if alive {
			live = append(live, p)
		} else {
			dead = append(dead, p)
		}
	}
	order := func(a, b Process) int { return a.PID - b.PID }
	slices.SortFunc(live, order)
	slices.SortFunc(dead, order)
	return live, dead, nil
}

// process reads the entry of one process.
func (d Dir) process(pid int) (p Process, alive bool, err error) {
	f, err := os.Open(d.join("pids", strconv.Itoa(pid)))
	if err != nil {
		return Process{}, false, fmt.Errorf("data directory: %w", err)
	}
	defer f.Close()
	if alive, err = locked(f); err != nil {
		return Process{}, false, err
	}
	text, err := io.ReadAll(io.LimitReader(f, 64<<10))
	if err != nil {
		return Process{}, false, fmt.Errorf("data directory: %w", err)
	}
	if json.Unmarshal(text, &p) != nil {
		p = Process{} // a power cut can leave an empty file; its name is enough
	}
	p.PID = pid
	return p, alive, nil
}

// forget removes the entries of dead processes. The caller holds the
// directory's lock.
func (d Dir) forget(dead []Process) error {
	var errs []error
	for _, p := range dead {
		if _, alive, err := d.process(p.PID); err != nil || alive {
			continue // removed by another, or its pid is in use again
		}
		errs = append(errs, os.Remove(d.join("pids", strconv.Itoa(p.PID))))
	}
	return errors.Join(errs...)
}

// replaceFile writes a file so that after a crash it is the old or the new one.
func replaceFile(path string, b []byte, mode os.FileMode) error {
	draft := path + ".new"
	f, err := os.OpenFile(draft, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, mode)
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	err = errors.Join(err, f.Sync(), f.Close())
	if err == nil {
		err = os.Rename(draft, path)
	}
	if err != nil {
		return errors.Join(err, os.Remove(draft))
	}
	return syncDir(filepath.Dir(path))
}

func syncDir(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}
