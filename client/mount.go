package client

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"sealfs"
)

// MountOptions says where and how to mount.
type MountOptions struct {
	Dir  string // the mount point: an empty directory
	Name string // of the volume: /proc/mounts shows sealfs:NAME

	AllowOther bool // users other than the mounting one may use it
	ReadOnly   bool
	Suid       bool // setuid and setgid bits count (root only)
	Dev        bool // device files work (root only)
	NoAtime    bool // reading does not change times of access; otherwise the rules are relatime's
	NoDirAtime bool // the same for directories

	// For how long the kernel believes what it was told at most: that a name exists, that
	// one does not, and attributes. Negative is not at all, 0 for as long as the lease lasts
	// under which it was told. What is told without a lease is not believed; but
	// a client without a session has no leases, and these are the times then, one second if 0.
	// What this mount changes it knows at once.
	EntryTimeout    time.Duration
	NegativeTimeout time.Duration
	AttrTimeout     time.Duration

	Debug  bool         // log every request and answer
	Logger *slog.Logger // nil: nobody

	// Processors is the process's; nil leaves GOMAXPROCS as it is.
	Processors *Processors
}

// fsType is how our mounts look in /proc/self/mountinfo.
const fsType = "fuse.sealfs"

// readAhead is how much the kernel reads ahead in a file, in bytes.
const readAhead = 1 << 20

// MountPoint is a mounted volume.
type MountPoint struct {
	c    *Client
	o    MountOptions
	dir  string
	srv  *fuse.Server
	done chan struct{}
}

// Mount mounts the client's root and returns when it can be used. Root mounts by
// itself, others need fusermount3. A dead mount of ours at the same place is
// cleared away. ctx bounds the mounting, not the mount's life. The process's umask
// does not matter. Programs must not use a mount from within the process that
// serves it, or only with several threads to spare.
func Mount(ctx context.Context, c *Client, o MountOptions) (*MountPoint, error) {
	for _, d := range []*time.Duration{&o.EntryTimeout, &o.NegativeTimeout, &o.AttrTimeout} {
		switch {
		case *d == 0 && c.leasing:
			*d = math.MaxInt64
		case *d == 0:
			*d = time.Second
		case *d < 0:
			*d = 0
		}
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	dir, err := checkMountPoint(o.Dir)
	if err != nil {
		return nil, fmt.Errorf("mount point %s: %w", o.Dir, err)
	}
	if a, err := c.Getattr(ctx, c.o.Root); err != nil {
		return nil, fmt.Errorf("root directory %d of volume %d: %w", c.o.Root, c.o.Volume, err)
	} else if a.Mode&modeType != modeDir {
		return nil, fmt.Errorf("root %d of volume %d: %w", c.o.Root, c.o.Volume, sealfs.ErrNotDir)
	}
	m := &MountPoint{c: c, o: o, dir: dir, done: make(chan struct{})}
	c.layoutAge.Store(int64(o.AttrTimeout))
	c.lazy.Store(true)
	f := newFilesystem(c, o)
	err = o.Processors.mount(func() error {
		var err error
		m.srv, err = fuse.NewServer(f, dir, m.fuseOptions())
		return err
	})
	if err != nil {
		// The kernel may have mounted before the protocol failed.
		if at, ferr := findMount(dir); ferr == nil && at != nil && at.fsType == fsType {
			detach(dir)
		}
		return nil, fmt.Errorf("mount %s: %w", dir, err)
	}
	closeDeviceOnExec()
	if f.k != nil {
		// Nothing was told yet, and nothing is served.
		if err := f.k.attach(m.srv, dir); err != nil {
			o.Logger.Info("this kernel cannot be told to forget names at any time (from 6.16 on it can): they are looked up each time", "err", err)
		}
		c.kernel.Store(f.k)
	}
	go func() {
		m.srv.Serve()
		m.o.Processors.unmount()
		if f.k != nil {
			c.kernel.Store(nil)
			f.k.close()
		}
		close(m.done)
	}()
	// The test that go-fuse makes here may be forbidden to us by the root's mode.
	if err := m.srv.WaitMount(); err != nil && !errors.Is(err, unix.EACCES) {
		return nil, errors.Join(fmt.Errorf("mount %s: %w", dir, err), m.Unmount())
	}
	m.setReadAhead()
	if err := ctx.Err(); err != nil {
		return nil, errors.Join(err, m.Unmount())
	}
	return m, nil
}

// closeDeviceOnExec keeps programs that this process starts from inheriting the
// device, which would keep a mount alive that nobody serves any more. go-fuse leaves it open.
func closeDeviceOnExec() {
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return
	}
	for _, e := range fds {
		fd, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		if at, err := os.Readlink("/proc/self/fd/" + e.Name()); err == nil && at == "/dev/fuse" {
			unix.CloseOnExec(fd)
		}
	}
}

func (m *MountPoint) fuseOptions() *fuse.MountOptions {
	level := slog.LevelWarn
	if m.o.Debug {
		level = slog.LevelDebug
	}
	o := &fuse.MountOptions{
		AllowOther:   m.o.AllowOther,
		Options:      []string{"default_permissions"},
		FsName:       "sealfs:" + m.o.Name,
		Name:         "sealfs",
		MaxWrite:     sealfs.IOMax,
		MaxReadAhead: readAhead,
		// Reads ahead and writes from mappings run in the background.
		MaxBackground:        m.background(),
		EnableLocks:          true,
		EnableAcl:            true, // the kernel asks for ACLs and checks them
		EnableSymlinkCaching: true, // a target never changes, and an inode number never comes back
		DisableSplice:        true, // our answers are in memory
		Debug:                m.o.Debug,
		Logger:               slog.NewLogLogger(m.o.Logger.Handler(), level),
		ExtraCapabilities: fuse.CAP_ATOMIC_O_TRUNC | fuse.CAP_DONT_MASK | fuse.CAP_ASYNC_DIO |
			fuse.CAP_HANDLE_KILLPRIV_V2 | fuse.CAP_SETXATTR_EXT | fuse.CAP_DIRECT_IO_ALLOW_MMAP | fuse.CAP_READDIRPLUS_AUTO,
		DisabledCapabilities: fuse.CAP_PASSTHROUGH, // it would cost a level of stacking
	}
	if os.Geteuid() == 0 {
		o.DirectMountStrict = true
		// The kernel ignores this bit, but go-fuse takes 0 for its own default.
		o.DirectMountFlags = unix.MS_MGC_VAL
		if !m.o.Suid {
			o.DirectMountFlags |= unix.MS_NOSUID
		}
		if !m.o.Dev {
			o.DirectMountFlags |= unix.MS_NODEV
		}
		if m.o.ReadOnly {
			o.DirectMountFlags |= unix.MS_RDONLY
		}
	} else if m.o.ReadOnly {
		o.Options = append(o.Options, "ro")
	}
	return o
}

// background bounds the requests that run in the background. With servers that may be
// away, or clients that may hang, it is high: requests that wait for one of them must not keep others out.
func (m *MountPoint) background() int {
	if m.c.leasing {
		return 4096
	}
	return 64
}

// setReadAhead raises what the kernel reads ahead beyond the 128 KiB that it offers
// in the protocol. Only root may; for others it stays.
func (m *MountPoint) setReadAhead() {
	var st unix.Stat_t
	if unix.Stat(m.dir, &st) != nil {
		return
	}
	name := fmt.Sprintf("/sys/class/bdi/%d:%d/read_ahead_kb", unix.Major(st.Dev), unix.Minor(st.Dev))
	if err := os.WriteFile(name, []byte(strconv.Itoa(readAhead>>10)), 0); err != nil {
		m.o.Logger.Debug("readahead stays at the kernel's default", "err", err)
	}
}

// Dir returns the mount point as an absolute path.
func (m *MountPoint) Dir() string { return m.dir }

// Wait returns when the kernel has let go of the mount, whoever unmounted it.
func (m *MountPoint) Wait() { <-m.done }

// unmountTries is how often a busy mount is tried: programs that just ended may
// still be about to close their files.
const unmountTries = 8

// Unmount unmounts and waits for the end. A mount that stays busy is detached:
// nobody finds it any more, and Wait returns when its last user is gone.
func (m *MountPoint) Unmount() error {
	var err error
	wait := time.Millisecond
	for range unmountTries {
		select {
		case <-m.done:
			return m.c.FlushAll()
		default:
		}
		if err = unmount(m.dir, 0); err == nil {
			<-m.done
			return m.c.FlushAll()
		}
		time.Sleep(wait)
		wait *= 2
	}
	m.o.Logger.Warn("mount is busy, detaching it", "dir", m.dir, "err", err)
	return errors.Join(detach(m.dir), m.c.FlushAll())
}

// unmount unmounts dir with flags of umount2(2), or by fusermount3 where we are not root.
func unmount(dir string, flags int) error {
	err := unix.Unmount(dir, flags|unix.UMOUNT_NOFOLLOW)
	if err != unix.EPERM || os.Geteuid() == 0 {
		return err
	}
	how := "-u"
	if flags&unix.MNT_DETACH != 0 {
		how = "-uz"
	}
	out, err := exec.Command("fusermount3", how, "--", dir).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%w: %s", err, bytes.TrimSpace(out))
	}
	return nil
}

func detach(dir string) error {
	if err := unmount(dir, unix.MNT_DETACH); err != nil {
		return fmt.Errorf("detach %s: %w", dir, err)
	}
	return nil
}

// ClearStale detaches mounts of ours at dir whose process is gone, so that every
// access fails with ENOTCONN, and reports whether there was one. That of a process that cannot
// end because of its own mount is aborted first.
func ClearStale(dir string) (cleared bool, err error) {
	if dir, err = filepath.Abs(dir); err != nil {
		return false, err
	}
	before, _ := findMount(dir)
	AbortOrphan(dir)
	if parent, err := filepath.EvalSymlinks(filepath.Dir(dir)); err == nil {
		AbortOrphan(filepath.Join(parent, filepath.Base(dir)))
	}
	if dir, err = resolve(dir); err != nil {
		return false, err
	}
	if at, err := findMount(dir); err == nil && at == nil {
		cleared = before != nil && before.fsType == fsType // forced unmounting aborted it
	}
	for tries := 0; ; tries++ {
		// Without the force the kernel would answer for the dead from its cache.
		var st unix.Statx_t
		err := unix.Statx(unix.AT_FDCWD, dir, unix.AT_STATX_FORCE_SYNC, unix.STATX_BASIC_STATS, &st)
		if err == unix.ECONNABORTED && tries < 100 {
			continue // it ended just now, and the next one to ask hears so
		}
		if err != unix.ENOTCONN {
			return cleared, nil
		}
		at, err := findMount(dir)
		if err != nil {
			return cleared, err
		}
		if at == nil || at.fsType != fsType {
			return cleared, fmt.Errorf("%s is a dead mount, but not one of SealFS: %w", dir, sealfs.ErrBusy)
		}
		if err := detach(dir); err != nil {
			return cleared, err
		}
		cleared = true
	}
}

// checkMountPoint returns the absolute path of dir if it can be mounted on.
func checkMountPoint(dir string) (string, error) {
	if dir == "" {
		return "", fmt.Errorf("none given: %w", sealfs.ErrInvalid)
	}
	if _, err := ClearStale(dir); err != nil {
		return "", err
	}
	dir, err := resolve(dir)
	if err != nil {
		return "", err
	}
	if at, err := findMount(dir); err != nil {
		return "", err
	} else if at != nil && at.fsType == fsType {
		return "", fmt.Errorf("%s is mounted there: %w", at.source, sealfs.ErrBusy)
	}
	info, err := os.Stat(dir)
	if err != nil {
		return "", err
	}
	if !info.IsDir() {
		return "", sealfs.ErrNotDir
	}
	d, err := os.Open(dir)
	if err != nil {
		return "", err
	}
	defer d.Close()
	switch _, err := d.Readdirnames(1); err {
	case io.EOF:
		return dir, nil
	case nil:
		return "", sealfs.ErrNotEmpty
	default:
		return "", err
	}
}

// resolve returns the absolute path of dir without symbolic links. The last part
// may be a dead mount.
func resolve(dir string) (string, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return "", err
	}
	real, err := filepath.EvalSymlinks(dir)
	if errors.Is(err, unix.ENOTCONN) {
		if real, err = filepath.EvalSymlinks(filepath.Dir(dir)); err == nil {
			real = filepath.Join(real, filepath.Base(dir))
		}
	}
	return real, err
}

// mountInfo is a line of /proc/self/mountinfo.
type mountInfo struct{ dir, fsType, source, dev string }

// findMount returns what is mounted at dir, on top if there are several, or nil.
func findMount(dir string) (found *mountInfo, err error) {
	all, err := mounts()
	for i := range all {
		if all[i].dir == dir {
			found = &all[i]
		}
	}
	return found, err
}

// mounts returns all mounts, those on top of others behind them.
func mounts() (all []mountInfo, err error) {
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	for lines := bufio.NewScanner(bytes.NewReader(b)); lines.Scan(); {
		// ID PARENT MAJOR:MINOR ROOT DIR OPTIONS [TAGS...] - TYPE SOURCE OPTIONS
		fields := strings.Fields(lines.Text())
		i := slices.Index(fields, "-")
		if i < 5 || len(fields) < i+3 {
			continue
		}
		all = append(all, mountInfo{unescape(fields[4]), fields[i+1], unescape(fields[i+2]), fields[2]})
	}
	return all, nil
}

// unescape undoes the octal escapes of blanks and backslashes in mountinfo.
func unescape(s string) string {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			if v, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(v))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}
