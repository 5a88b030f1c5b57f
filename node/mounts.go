package node

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"sealfs"
	"sealfs/client"
)

// mountEntry is a line of /proc/self/mountinfo.
type mountEntry struct {
	point, fstype, source string
	dev                   string // major:minor
}

// ours reports whether the mount is one of SealFS.
func (m mountEntry) ours() bool { return m.fstype == "fuse.sealfs" }

// mountAt returns what is mounted at exactly this path, the topmost if several are.
func mountAt(path string) (found mountEntry, ok bool, err error) {
	table, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return mountEntry{}, false, err
	}
	for line := range strings.Lines(string(table)) {
		if m, valid := parseMount(line); valid && m.point == path {
			found, ok = m, true
		}
	}
	return found, ok, nil
}

// parseMount reads a line of mountinfo:
// 36 35 98:0 /root /mnt rw,noatime shared:1 - ext4 /dev/sda1 rw.
func parseMount(line string) (mountEntry, bool) {
	before, after, _ := strings.Cut(line, " - ")
	mount, source := strings.Fields(before), strings.Fields(after)
	if len(mount) < 5 || len(source) < 2 {
		return mountEntry{}, false
	}
	return mountEntry{point: unescape(mount[4]), dev: mount[2], fstype: source[0], source: unescape(source[1])}, true
}

// unescape undoes the kernel's \ooo for blanks and backslashes.
func unescape(s string) string {
	if !strings.Contains(s, `\`) {
		return s
	}
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			if n := int(s[i+1]-'0')<<6 | int(s[i+2]-'0')<<3 | int(s[i+3]-'0'); n >= 0 && n < 256 {
				b.WriteByte(byte(n))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

// mountPath makes the path of a mount point absolute and free of symbolic links,
// as the kernel's table names it. The last element is not looked at: where a
// killed process left its mount, every look at it fails.
func mountPath(path string) (string, error) {
	abs, err := filepath.Abs(path)
	if err != nil {
		return "", fmt.Errorf("mount point %s: %w", path, err)
	}
	if abs == "/" {
		return "", fault(sealfs.ErrInvalid, "/ cannot be a mount point of SealFS: name an empty directory")
	}
	if _, mounted, err := mountAt(abs); err == nil && mounted {
		return abs, nil
	}
	if fi, err := os.Lstat(abs); err == nil && fi.Mode()&fs.ModeSymlink != 0 {
		if abs, err = filepath.EvalSymlinks(abs); err != nil {
			return "", fmt.Errorf("mount point: %w", err)
		}
		return abs, nil
	}
	parent, err := filepath.EvalSymlinks(filepath.Dir(abs))
	if errors.Is(err, fs.ErrNotExist) {
		return abs, nil // it is yet to be made
	}
	if err != nil {
		return "", fmt.Errorf("mount point: %w", err)
	}
	return filepath.Join(parent, filepath.Base(abs)), nil
}

// checkMountPoint makes the mount point if there is none, and says why nothing
// can be mounted there, if so. Stale mounts have been cleared before.
func checkMountPoint(path string) error {
	if m, mounted, err := mountAt(path); err != nil {
		return err
	} else if mounted {
		return fault(sealfs.ErrBusy, "mount point %s is busy: %s (%s) is mounted there; unmount it, or name another directory", path, m.source, m.fstype)
	}
	if err := os.MkdirAll(path, 0o755); err != nil {
		if fi, e := os.Stat(path); e == nil && !fi.IsDir() {
			return fault(sealfs.ErrNotDir, "mount point %s is not a directory: name an empty directory", path)
		}
		return fmt.Errorf("mount point: %w", err)
	}
	f, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("mount point: %w", err)
	}
	defer f.Close()
	names, err := f.Readdirnames(1)
	if err != nil && !errors.Is(err, io.EOF) {
		return fmt.Errorf("mount point: %w", err)
	}
	if len(names) > 0 {
		return fault(sealfs.ErrNotEmpty, "mount point %s is not empty (%q is in it, and would be hidden): name an empty directory", path, names[0])
	}
	return nil
}

// stale reports whether a killed process left a mount of ours at the path.
func stale(path string) bool {
	m, mounted, err := mountAt(path)
	if err != nil || !mounted || !m.ours() {
		return false
	}
	client.AbortOrphan(path)
	// Not stat: the kernel answers that out of its cache for a while. Who asks
	// while the process is dying gets ECONNABORTED, and the next one ENOTCONN.
	for range 100 {
		var st unix.Statfs_t
		if err := unix.Statfs(path, &st); err != unix.ECONNABORTED && err != unix.EINTR {
			return err == unix.ENOTCONN
		}
	}
	return false
}

// clearMount detaches stale mounts at the path, of which several may lie on top of
// each other.
func clearMount(path string) error {
	for stale(path) {
		if err := unmountPath(path, true); err != nil {
			return fault(sealfs.ErrBusy, "the stale mount at %s cannot be cleared: %v; run `umount -l %s` as root", path, err, path)
		}
	}
	return nil
}

// unmountPath unmounts what is mounted at the path; lazy detaches it although it
// is in use. An ordinary user needs fusermount3 for it.
func unmountPath(path string, lazy bool) error {
	flags, args := unix.UMOUNT_NOFOLLOW, []string{"-u"}
	if lazy {
		flags, args = flags|unix.MNT_DETACH, []string{"-u", "-z"}
	}
	err := unix.Unmount(path, flags)
	if !errors.Is(err, unix.EPERM) {
		return err
	}
	out, err := exec.Command("fusermount3", append(args, "--", path)...).CombinedOutput()
	text := strings.TrimSpace(string(out))
	switch {
	case err == nil:
		return nil
	case strings.Contains(text, "busy"):
		return unix.EBUSY
	case text != "":
		return errors.New(text)
	}
	return fmt.Errorf("fusermount3: %w", err)
}

// CheckOurs refuses a path whose object lies on a device, as stat(2) numbers them, that is
// no mount of SealFS.
func CheckOurs(path string, dev uint64) error {
	table, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	number := fmt.Sprintf("%d:%d", unix.Major(dev), unix.Minor(dev))
	fstype := "another file system"
	for line := range strings.Lines(string(table)) {
		if m, valid := parseMount(line); valid && m.dev == number {
			if m.ours() {
				return nil
			}
			fstype = m.fstype
		}
	}
	return fault(sealfs.ErrInvalid, "%s is not on SealFS, but on %s", path, fstype)
}
