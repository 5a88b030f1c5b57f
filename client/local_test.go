package client

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// A probe does system calls in an empty directory and tells what they said. What it tells of
// a mount must be what it tells of a local file system.
type probe struct {
	dir  string
	told []string
}

// p is the path of a name in the probe's directory.
func (p *probe) p(name string) string { return filepath.Join(p.dir, name) }

func (p *probe) tell(format string, args ...any) {
	p.told = append(p.told, strings.ReplaceAll(fmt.Sprintf(format, args...), p.dir, "DIR"))
}

// err tells how a call ended.
func (p *probe) err(what string, err error) {
	var errno syscall.Errno
	if errors.As(err, &errno) {
		p.tell("%s: %s", what, unix.ErrnoName(errno))
		return
	}
	p.tell("%s: %v", what, err)
}

// open is for probes that cannot go on without; its end is told only if it is bad.
func (p *probe) open(name string, flags int, mode uint32) int {
	fd, err := unix.Open(p.p(name), flags|unix.O_CLOEXEC, mode)
	if err != nil {
		p.err("open "+name, err)
	}
	return fd
}

func (p *probe) stat(name string) (st unix.Stat_t) {
	if err := unix.Lstat(p.p(name), &st); err != nil {
		p.err("lstat "+name, err)
	}
	return st
}

func (p *probe) fstat(fd int) (st unix.Stat_t) {
	if err := unix.Fstat(fd, &st); err != nil {
		p.err("fstat", err)
	}
	return st
}

// as does something as another user.
func (p *probe) as(user int, do func()) {
	become(actors[user])
	defer become(actors[0])
	do()
}

func (p *probe) content(name string) string {
	b, err := os.ReadFile(p.p(name))
	if err != nil {
		return err.Error()
	}
	if len(b) > 64 {
		return fmt.Sprintf("%d bytes, sum %x", len(b), sum(b))
	}
	return fmt.Sprintf("%q", b)
}

// TestCallsLikeLocal does the same calls below mounts and in a local directory, and compares
// what they say. What local file systems do differently among themselves is left out.
func TestCallsLikeLocal(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root can be other users")
	}
	p, net := startPair(t), startNet(t)
	dirs := []string{likeExt4(t), p.dirs[0], p.dirs[1], net.dir}
	for _, test := range []struct {
		name   string
		mounts int // how many of dirs
		do     func(p *probe)
	}{
		{"sticky", len(dirs), probeSticky},
		{"setgid directory", len(dirs), probeSetgidDirectory},
		{"suid", len(dirs), probeSuid},
		{"times", len(dirs), probeTimes},
		{"what changes times", len(dirs), probeWhatChangesTimes},
		{"relatime", len(dirs), probeRelatime},
		{"links of directories", len(dirs), probeLinksOfDirectories},
		{"sparse", len(dirs), probeSparse},
		{"fallocate", len(dirs), probeFallocate},
		{"append", len(dirs), probeAppend},
		{"without a name", len(dirs), probeWithoutAName},
		{"rename over open", len(dirs), probeRenameOverOpen},
		{"directory offsets", len(dirs), probeDirectoryOffsets},
		{"names", len(dirs), probeNames},
		{"paths", len(dirs), probePaths},
		{"sizes", len(dirs), probeSizes},
		{"mappings", len(dirs), probeMappings},
		{"direct", len(dirs), probeDirect},
		{"extended attributes", len(dirs), probeExtendedAttributes},
		{"special files", len(dirs), probeSpecialFiles},
		{"other calls", len(dirs), probeOtherCalls},
		{"large files", 3, probeLarge}, // the model has other holes at the end of a file,
	} {
		t.Run(test.name, func(t *testing.T) {
			var told [][]string
			for _, dir := range dirs[:test.mounts] {
				told = append(told, runProbe(t, filepath.Join(dir, strings.ReplaceAll(fmt.Sprint(len(told), test.name), " ", "-")), test.do))
			}
			if len(told[0]) == 0 {
				t.Error("nothing was told")
			}
			for i, mount := range [...]string{"", "main mount", "further mount", "mount from a cluster"} {
				if i > 0 && i < len(told) && !slices.Equal(told[i], told[0]) {
					t.Errorf("%s:\n%s", mount, difference(told[i], told[0]))
				}
			}
		})
	}
}

// runProbe runs a probe as root with an ordinary umask, on a thread that may become other users.
func runProbe(t *testing.T, dir string, do func(*probe)) []string {
	p := &probe{dir: dir}
	if err := errors.Join(os.Mkdir(dir, 0o755), os.Chmod(dir, 0o755)); err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // it ends with the goroutine
		if err := unix.Unshare(unix.CLONE_FS); err != nil {
			p.err("unshare", err)
		}
		unix.Umask(0o022)
		do(p)
	}()
	<-done
	return p.told
}

// difference shows the lines that are not the same.
func difference(got, want []string) string {
	var b strings.Builder
	line := func(list []string, i int) string {
		if i < len(list) {
			return list[i]
		}
		return "nothing"
	}
	for i := range max(len(got), len(want)) {
		if g, w := line(got, i), line(want, i); g != w {
			fmt.Fprintf(&b, "mount: %s\nlocal: %s\n", g, w)
		}
	}
	return b.String()
}

// likeExt4 returns a directory that others can reach, of a file system that does what ext4 does.
func likeExt4(t *testing.T) string {
	dir := t.TempDir()
	for d := dir; d != os.TempDir() && d != "/"; d = filepath.Dir(d) {
		if err := os.Chmod(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		t.Fatal(err)
	}
	const ext4, xfs = 0xef53, 0x58465342
	if st.Type != ext4 && st.Type != xfs {
		t.Skipf("no ext4 to compare with below %s (type %#x): TMPDIR can name one", dir, st.Type)
	}
	return dir
}

// fault reads or writes a byte of a mapping and reports whether that was a SIGBUS.
func fault(do func()) (hit string) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if r := recover(); r != nil {
			hit = "fault"
		}
	}()
	do()
	return "ok"
}

// tick waits until the clock by which file systems take their times has moved on.
func tick() {
	var t, u unix.Timespec
	unix.ClockGettime(unix.CLOCK_REALTIME_COARSE, &t)
	for u = t; u == t; {
		<-time.After(time.Millisecond)
		unix.ClockGettime(unix.CLOCK_REALTIME_COARSE, &u)
	}
}

// dirent is what getdents tells of an entry: off is the place after it.
type dirent struct {
	name string
	off  int64
}

func parseDirents(b []byte) (all []dirent) {
	for len(b) > 0 {
		size := int(binary.LittleEndian.Uint16(b[16:]))
		name, _, _ := strings.Cut(string(b[19:size]), "\x00")
		all = append(all, dirent{name, int64(binary.LittleEndian.Uint64(b[8:]))})
		b = b[size:]
	}
	return all
}
