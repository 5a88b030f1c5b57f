package client

import (
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

func probeSticky(p *probe) {
	unix.Mkdir(p.p("s"), 0o755)
	unix.Chmod(p.p("s"), 0o1777)
	p.as(1, func() {
		p.err("create", unix.Close(p.open("s/f", unix.O_CREAT|unix.O_WRONLY, 0o666)))
		p.err("mkdir", unix.Mkdir(p.p("s/d"), 0o777))
	})
	p.as(2, func() {
		p.err("unlink another's", unix.Unlink(p.p("s/f")))
		p.err("rename another's", unix.Rename(p.p("s/f"), p.p("s/g")))
		unix.Close(p.open("s/mine", unix.O_CREAT|unix.O_WRONLY, 0o666))
		p.err("rename over another's", unix.Rename(p.p("s/mine"), p.p("s/f")))
		p.err("exchange", unix.Renameat2(unix.AT_FDCWD, p.p("s/mine"), unix.AT_FDCWD, p.p("s/f"), unix.RENAME_EXCHANGE))
		p.err("rmdir another's", unix.Rmdir(p.p("s/d")))
		p.err("set a user attribute of it", unix.Setxattr(p.p("s"), "user.a", nil, 0))
		p.err("rename own", unix.Rename(p.p("s/mine"), p.p("s/own")))
		p.err("unlink own", unix.Unlink(p.p("s/own")))
	})
	unix.Chown(p.p("s"), 1002, -1)
	p.as(2, func() { p.err("owner of the directory", unix.Unlink(p.p("s/f"))) })
	p.as(1, func() { p.err("owner of the entry", unix.Rmdir(p.p("s/d"))) })
}

func probeSetgidDirectory(p *probe) {
	unix.Mkdir(p.p("s"), 0o755)
	unix.Chown(p.p("s"), 0, 2003)
	unix.Chmod(p.p("s"), 0o2777)
	for u := range 3 {
		p.as(u, func() {
			for _, mode := range []uint32{0o644, 0o2755, 0o2644, 0o6755} {
				name := fmt.Sprintf("s/%d-%o", u, mode)
				unix.Close(p.open(name, unix.O_CREAT|unix.O_WRONLY, mode))
				st := p.stat(name)
				p.tell("%s: %o group %d", name, st.Mode, st.Gid)
				name += "m"
				p.err("mknod", unix.Mknod(p.p(name), unix.S_IFREG|mode, 0))
				st = p.stat(name)
				p.tell("%s: %o group %d", name, st.Mode, st.Gid)
				name += "d"
				p.err("mkdir", unix.Mkdir(p.p(name), mode))
				st = p.stat(name)
				p.tell("%s: %o group %d", name, st.Mode, st.Gid)
			}
			name := fmt.Sprintf("s/%d-l", u)
			p.err("symlink", unix.Symlink("x", p.p(name)))
			st := p.stat(name)
			p.tell("%s: %o group %d", name, st.Mode, st.Gid)
			fd := p.open("s", unix.O_TMPFILE|unix.O_RDWR, 0o2755)
			st = p.fstat(fd)
			p.tell("tmpfile: %o group %d", st.Mode, st.Gid)
			unix.Close(fd)
		})
	}
	p.as(1, func() {
		unix.Close(p.open("s/c", unix.O_CREAT|unix.O_WRONLY, 0o755))
		p.err("chmod g+s of another group's", unix.Chmod(p.p("s/c"), 0o2755))
		p.tell("%o", p.stat("s/c").Mode)
	})
}

func probeSuid(p *probe) {
	// Version 2 of a capability set, empty, is the shortest valid one.
	capabilities := append([]byte{0, 0, 0, 2}, make([]byte, 16)...)
	for _, user := range []int{0, 1} {
		for _, mode := range []uint32{0o4777, 0o6777, 0o2777, 0o4666} {
			for _, how := range []struct {
				name string
				do   func(fd int) error
			}{
				{"write", func(fd int) error { _, err := unix.Write(fd, []byte("x")); return err }},
				{"write nothing", func(fd int) error { _, err := unix.Write(fd, nil); return err }},
				{"pwritev", func(fd int) error { _, err := unix.Pwritev(fd, [][]byte{{1}, {2}}, 3); return err }},
				{"ftruncate", func(fd int) error { return unix.Ftruncate(fd, 2) }},
				{"ftruncate to the same", func(fd int) error { return unix.Ftruncate(fd, 5) }},
				{"fallocate", func(fd int) error { return unix.Fallocate(fd, 0, 0, 9000) }},
				{"punch", func(fd int) error {
					return unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 0, 4)
				}},
				{"fchmod", func(fd int) error { return unix.Fchmod(fd, mode) }},
				{"fchown nothing", func(fd int) error { return unix.Fchown(fd, -1, -1) }},
				{"fchown group", func(fd int) error { return unix.Fchown(fd, -1, 2002) }},
				{"copy", func(fd int) error {
					in := p.open("in", unix.O_CREAT|unix.O_RDWR, 0o644)
					defer unix.Close(in)
					unix.Write(in, []byte("abc"))
					zero := int64(0)
					_, err := unix.CopyFileRange(in, &zero, fd, nil, 3, 0)
					return err
				}},
			} {
				unix.Unlink(p.p("f"))
				unix.Unlink(p.p("in"))
				fd := p.open("f", unix.O_CREAT|unix.O_RDWR, 0o666)
				unix.Write(fd, []byte("12345"))
				unix.Close(fd)
				unix.Chown(p.p("f"), 1001, 2001)
				unix.Chmod(p.dir, 0o777)
				unix.Chmod(p.p("f"), mode)
				if how.name != "fchown nothing" || user != 0 {
					unix.Setxattr(p.p("f"), capability, capabilities, 0)
				}
				p.as(user, func() {
					fd := p.open("f", unix.O_RDWR, 0)
					p.err(how.name, how.do(fd))
					_, cerr := unix.Fgetxattr(fd, capability, nil)
					p.err("capabilities", cerr)
					p.tell("%s by %d: %o then %o", how.name, user, mode, p.stat("f").Mode)
					unix.Close(fd)
				})
			}
		}
	}
	unix.Mkdir(p.p("d"), 0o755)
	unix.Chmod(p.p("d"), 0o6755)
	p.err("chown of a directory", unix.Chown(p.p("d"), 1001, 2001))
	p.tell("%o", p.stat("d").Mode)
}

func probeTimes(p *probe) {
	fd := p.open("f", unix.O_CREAT|unix.O_RDWR, 0o644)
	defer unix.Close(fd)
	omit, now := unix.Timespec{Nsec: unix.UTIME_OMIT}, unix.Timespec{Nsec: unix.UTIME_NOW}
	set := func(a, m unix.Timespec) {
		p.err("utimens", unix.UtimesNanoAt(unix.AT_FDCWD, p.p("f"), []unix.Timespec{a, m}, 0))
	}
	told := func() {
		st := p.fstat(fd)
		p.tell("%v %v, changed %v after", st.Atim, st.Mtim, st.Ctim.Sec > 1<<30)
	}
	set(unix.Timespec{Sec: 1, Nsec: 123456789}, unix.Timespec{Sec: 2, Nsec: 987654321})
	told()
	set(omit, unix.Timespec{Sec: 3, Nsec: 1})
	told()
	set(unix.Timespec{Sec: 4, Nsec: 999999999}, omit)
	told()
	set(unix.Timespec{Sec: -1, Nsec: 5}, unix.Timespec{Sec: 1 << 32, Nsec: 7})
	told()
	before := p.fstat(fd)
	set(omit, omit)
	p.tell("nothing: %v", p.fstat(fd).Ctim == before.Ctim)
	set(now, omit)
	p.tell("now: %v", p.fstat(fd).Atim.Sec > 1<<30)
	set(unix.Timespec{Nsec: 1e9}, omit)
	p.err("symlink", unix.Symlink("f", p.p("l")))
	p.err("of a symlink", unix.UtimesNanoAt(unix.AT_FDCWD, p.p("l"), []unix.Timespec{{Sec: 5}, {Sec: 6}}, unix.AT_SYMLINK_NOFOLLOW))
	st := p.stat("l")
	p.tell("%v %v", st.Atim, st.Mtim)
	unix.Chmod(p.p("f"), 0o666)
	p.as(1, func() {
		set(now, now)
		set(now, omit)
		set(omit, unix.Timespec{Sec: 1})
		p.err("null", unix.UtimesNanoAt(unix.AT_FDCWD, p.p("f"), nil, 0))
	})
}

func probeWhatChangesTimes(p *probe) {
	unix.Mkdir(p.p("d"), 0o755)
	unix.Mkdir(p.p("e"), 0o755)
	fd := p.open("d/f", unix.O_CREAT|unix.O_RDWR, 0o644)
	defer unix.Close(fd)
	unix.Write(fd, []byte("12345678"))
	old := []unix.Timespec{{Sec: 1e9, Nsec: 1}, {Sec: 1e9, Nsec: 2}}
	for _, test := range []struct {
		name string
		do   func() error
	}{
		{"chmod", func() error { return unix.Fchmod(fd, 0o600) }},
		{"chown", func() error { return unix.Fchown(fd, 0, 0) }},
		{"chown nothing", func() error { return unix.Fchown(fd, -1, -1) }},
		{"link", func() error { return unix.Link(p.p("d/f"), p.p("e/l")) }},
		{"rename", func() error { return unix.Rename(p.p("e/l"), p.p("e/m")) }},
		{"rename to itself", func() error { return unix.Rename(p.p("e/m"), p.p("e/m")) }},
		{"rename to another link", func() error { return unix.Rename(p.p("e/m"), p.p("d/f")) }},
		{"unlink", func() error { return unix.Unlink(p.p("e/m")) }},
		{"write", func() error { _, err := unix.Write(fd, []byte("x")); return err }},
		{"write nothing", func() error { _, err := unix.Write(fd, nil); return err }},
		{"ftruncate", func() error { return unix.Ftruncate(fd, 3) }},
		{"ftruncate to the same", func() error { return unix.Ftruncate(fd, 3) }},
		{"truncate to the same", func() error { return unix.Truncate(p.p("d/f"), 3) }},
		{"open to truncate", func() error {
			fd, err := unix.Open(p.p("d/f"), unix.O_WRONLY|unix.O_TRUNC, 0)
			unix.Close(fd)
			return err
		}},
		{"open to truncate nothing", func() error {
			fd, err := unix.Open(p.p("d/f"), unix.O_WRONLY|unix.O_TRUNC, 0)
			unix.Close(fd)
			return err
		}},
		{"open with O_CREAT", func() error {
			fd, err := unix.Open(p.p("d/f"), unix.O_WRONLY|unix.O_CREAT, 0)
			unix.Close(fd)
			return err
		}},
		{"fallocate", func() error { return unix.Fallocate(fd, 0, 0, 100) }},
		{"fallocate within", func() error { return unix.Fallocate(fd, 0, 0, 50) }},
		{"fallocate, size kept", func() error { return unix.Fallocate(fd, unix.FALLOC_FL_KEEP_SIZE, 0, 50) }},
		{"punch", func() error {
			return unix.Fallocate(fd, unix.FALLOC_FL_KEEP_SIZE|unix.FALLOC_FL_PUNCH_HOLE, 0, 50)
		}},
		{"setxattr", func() error { return unix.Setxattr(p.p("d/f"), "user.a", []byte("1"), 0) }},
		{"removexattr", func() error { return unix.Removexattr(p.p("d/f"), "user.a") }},
		{"fsync", func() error { return unix.Fsync(fd) }},
		{"mkdir", func() error { return unix.Mkdir(p.p("e/sub"), 0o755) }},
		{"rename a directory", func() error { return unix.Rename(p.p("e/sub"), p.p("d/sub")) }},
		{"rmdir", func() error { return unix.Rmdir(p.p("d/sub")) }},
		{"create", func() error { fd, err := unix.Open(p.p("e/c"), unix.O_CREAT, 0o600); unix.Close(fd); return err }},
		{"exchange", func() error {
			return unix.Renameat2(unix.AT_FDCWD, p.p("e/c"), unix.AT_FDCWD, p.p("d/f"), unix.RENAME_EXCHANGE)
		}},
		{"exchange back", func() error {
			return unix.Renameat2(unix.AT_FDCWD, p.p("e/c"), unix.AT_FDCWD, p.p("d/f"), unix.RENAME_EXCHANGE)
		}},
		{"rename over", func() error { return unix.Rename(p.p("e/c"), p.p("d/f")) }},
	} {
		var was [3]unix.Stat_t
		names := [...]string{"d", "e"}
		for _, n := range names {
			p.err("utimens", unix.UtimesNanoAt(unix.AT_FDCWD, p.p(n), old, 0))
		}
		p.err("utimens", unix.UtimesNanoAt(unix.AT_FDCWD, fmt.Sprintf("/proc/self/fd/%d", fd), old, 0))
		was[0], was[1], was[2] = p.stat("d"), p.stat("e"), p.fstat(fd)
		tick()
		p.err(test.name, test.do())
		for i, now := range [...]unix.Stat_t{p.stat("d"), p.stat("e"), p.fstat(fd)} {
			p.tell("%s: %d: atime %v, mtime %v, ctime %v", test.name, i, now.Atim != was[i].Atim, now.Mtim != was[i].Mtim, now.Ctim != was[i].Ctim)
		}
	}
}

func probeRelatime(p *probe) {
	fd := p.open("f", unix.O_CREAT|unix.O_RDWR, 0o644)
	unix.Write(fd, []byte("content"))
	unix.Close(fd)
	unix.Mkdir(p.p("d"), 0o755)
	unix.Mkdir(p.p("d/x"), 0o755)
	unix.Symlink("f", p.p("l"))
	read := func() { os.ReadFile(p.p("f")) }
	list := func() { os.ReadDir(p.p("d")) }
	link := func() { os.Readlink(p.p("l")) }
	follow := func() { os.ReadFile(p.p("l")) }
	look := func(what, name string, do func()) {
		was := p.stat(name)
		tick()
		do()
		now := p.stat(name)
		p.tell("%s %s: atime %v, ctime %v", name, what, now.Atim != was.Atim, now.Ctim != was.Ctim)
	}
	set := func(name string, a, m int64) {
		unix.UtimesNanoAt(unix.AT_FDCWD, p.p(name), []unix.Timespec{{Sec: a}, {Sec: m}}, unix.AT_SYMLINK_NOFOLLOW)
	}
	for _, c := range []struct {
		name string
		do   func()
	}{{"f", read}, {"d", list}, {"l", link}, {"l", follow}, {"f", follow}} {
		look("new", c.name, c.do)
		look("again", c.name, c.do)
		if c.name == "l" {
			continue // the kernel keeps what it has read
		}
		set(c.name, 5, 6)
		look("older than mtime", c.name, c.do)
		look("again", c.name, c.do)
		unix.Lchown(p.p(c.name), 0, 0)
		look("older than ctime", c.name, c.do)
		look("again", c.name, c.do)
		look("touched by nobody", c.name, func() {})
	}
	fd = p.open("f", unix.O_RDWR, 0)
	look("write", "f", func() { unix.Pwrite(fd, []byte("more"), 20) })
	look("read what was written", "f", func() { unix.Pread(fd, make([]byte, 30), 0) })
	look("write", "f", func() { unix.Pwrite(fd, []byte("more"), 20) })
	look("read nothing", "f", func() { unix.Pread(fd, make([]byte, 0), 0) })
	unix.Close(fd)
	fd = p.open("f", unix.O_RDWR|unix.O_NOATIME, 0)
	unix.Pwrite(fd, []byte("more"), 20)
	look("without atime", "f", func() { unix.Pread(fd, make([]byte, 30), 0) })
	unix.Close(fd)
	look("opened only", "f", func() { unix.Close(p.open("f", unix.O_RDONLY, 0)) })
	fd = p.open("f", unix.O_RDWR, 0)
	look("mapped", "f", func() {
		m, err := unix.Mmap(fd, 0, 4, unix.PROT_READ, unix.MAP_SHARED)
		p.err("mmap", err)
		p.tell("%d", m[0])
		unix.Munmap(m)
	})
	unix.Close(fd)
}

func probeLinksOfDirectories(p *probe) {
	told := func(names ...string) {
		for _, n := range names {
			p.tell("%s: %d", n, p.stat(n).Nlink)
		}
	}
	unix.Mkdir(p.p("a"), 0o755)
	unix.Mkdir(p.p("b"), 0o755)
	told("a", "b", ".")
	unix.Mkdir(p.p("a/1"), 0o755)
	unix.Mkdir(p.p("a/2"), 0o755)
	unix.Close(p.open("a/f", unix.O_CREAT, 0o644))
	told("a", "b")
	p.err("rename", unix.Rename(p.p("a/1"), p.p("b/1")))
	told("a", "b", "b/1")
	p.err("rename over", unix.Rename(p.p("a/2"), p.p("b/1")))
	told("a", "b", "b/1")
	p.err("exchange with a file", unix.Renameat2(unix.AT_FDCWD, p.p("a/f"), unix.AT_FDCWD, p.p("b/1"), unix.RENAME_EXCHANGE))
	told("a", "b", "b/1", "a/f")
	d := p.open("a/f", unix.O_RDONLY|unix.O_DIRECTORY, 0)
	p.err("rmdir", unix.Rmdir(p.p("a/f")))
	told("a", "b")
	p.tell("removed: %d", p.fstat(d).Nlink)
	p.err("mkdir in it", unix.Mkdirat(d, "x", 0o755))
	_, err := unix.Openat(d, "x", unix.O_CREAT|unix.O_RDWR, 0o644)
	p.err("create in it", err)
	fd, err := unix.Openat(d, ".", unix.O_RDONLY, 0)
	p.err("open .", err)
	unix.Close(fd)
	fd, err = unix.Openat(d, "..", unix.O_RDONLY, 0)
	p.err("open ..", err)
	unix.Close(fd)
	n, err := unix.Getdents(d, make([]byte, 1000))
	p.err(fmt.Sprint("getdents ", n), err)
	unix.Close(d)
}

func probeSparse(p *probe) {
	fd := p.open("f", unix.O_CREAT|unix.O_RDWR, 0o644)
	defer unix.Close(fd)
	seeks := func() {
		unix.Fsync(fd)
		for _, off := range []int64{0, 1, 4095, 4096, 8191, 8192, 65536, 65537, 131071, 1 << 20, 1<<20 + 4095, 1<<20 + 4096, 3 << 20, 3<<20 + 10, 1 << 30} {
			d, err := unix.Seek(fd, off, unix.SEEK_DATA)
			p.err(fmt.Sprintf("data from %d: %d", off, d), err)
			h, err := unix.Seek(fd, off, unix.SEEK_HOLE)
			p.err(fmt.Sprintf("hole from %d: %d", off, h), err)
		}
		st := p.fstat(fd)
		p.tell("size %d", st.Size)
	}
	seeks()
	unix.Ftruncate(fd, 1<<20)
	seeks()
	unix.Pwrite(fd, []byte("x"), 65537)
	seeks()
	unix.Pwrite(fd, make([]byte, 10000), 3<<20-5000)
	seeks()
	p.err("punch", unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 65000, 5000))
	seeks()
	unix.Pwrite(fd, []byte("start"), 0)
	unix.Ftruncate(fd, 3<<20)
	seeks()
	_, err := unix.Seek(fd, -1, unix.SEEK_DATA)
	p.err("negative", err)
	_, err = unix.Seek(fd, 0, 99)
	p.err("bad whence", err)
	p.tell("%s", p.content("f"))
}

func probeFallocate(p *probe) {
	const keep, punch, collapse, zero, insert, unshare = 1, 2, 8, 16, 32, 64
	fd := p.open("f", unix.O_CREAT|unix.O_RDWR, 0o644)
	defer unix.Close(fd)
	for _, mode := range []uint32{0, keep, punch, punch | keep, zero, zero | keep, zero | punch | keep, unshare, 128, collapse | keep, insert | keep, insert | collapse} {
		for _, r := range [][2]int64{{0, 4096}, {100, 50}, {4000, 5000}, {30000, 4096}, {20000, 10}, {0, 0}, {-1, 10}, {10, -1}, {1<<63 - 10, 100}} {
			unix.Ftruncate(fd, 0)
			unix.Pwrite(fd, []byte(strings.Repeat("0123456789", 2000)), 0)
			err := unix.Fallocate(fd, mode, r[0], r[1])
			p.err(fmt.Sprintf("mode %d at %d +%d", mode, r[0], r[1]), err)
			st := p.fstat(fd)
			p.tell("size %d, %s", st.Size, p.content("f"))
		}
	}
	ro := p.open("f", unix.O_RDONLY, 0)
	p.err("read-only", unix.Fallocate(ro, 0, 0, 10))
	unix.Close(ro)
	d := p.open(".", unix.O_RDONLY, 0)
	p.err("directory", unix.Fallocate(d, 0, 0, 10))
	unix.Close(d)
}

func probeAppend(p *probe) {
	fd := p.open("f", unix.O_CREAT|unix.O_RDWR|unix.O_APPEND, 0o644)
	other := p.open("f", unix.O_RDWR, 0)
	defer unix.Close(fd)
	defer unix.Close(other)
	pos := func(fd int) {
		at, err := unix.Seek(fd, 0, unix.SEEK_CUR)
		p.err(fmt.Sprint("at ", at), err)
	}
	unix.Write(fd, []byte("one"))
	pos(fd)
	unix.Pwrite(other, []byte("xxxxxx"), 0)
	unix.Write(fd, []byte("two"))
	pos(fd)
	n, err := unix.Pwrite(fd, []byte("three"), 1)
	p.err(fmt.Sprint("pwrite ", n), err)
	pos(fd)
	n, err = unix.Pwritev2(other, [][]byte{[]byte("four")}, 2, 0x10) // RWF_APPEND
	p.err(fmt.Sprint("RWF_APPEND ", n), err)
	pos(other)
	unix.Seek(fd, 0, unix.SEEK_SET)
	b := make([]byte, 3)
	n, err = unix.Read(fd, b)
	p.err(fmt.Sprintf("%q", b[:n]), err)
	unix.Write(fd, []byte("six"))
	pos(fd)
	fl, err := unix.FcntlInt(uintptr(other), unix.F_SETFL, unix.O_APPEND)
	p.err(fmt.Sprint("SETFL ", fl), err)
	unix.Write(other, []byte("seven"))
	pos(other)
	fl, err = unix.FcntlInt(uintptr(fd), unix.F_SETFL, 0)
	p.err(fmt.Sprint("SETFL ", fl), err)
	unix.Pwrite(fd, []byte("8"), 0)
	p.tell("%s", p.content("f"))
}

func probeWithoutAName(p *probe) {
	fd := p.open(".", unix.O_TMPFILE|unix.O_RDWR, 0o640)
	n, err := unix.Write(fd, []byte("tmpfile"))
	p.err(fmt.Sprint("write ", n), err)
	p.tell("links %d mode %o", p.fstat(fd).Nlink, p.fstat(fd).Mode)
	p.err("link", unix.Linkat(fd, "", unix.AT_FDCWD, p.p("a"), unix.AT_EMPTY_PATH))
	p.tell("links %d, %s", p.fstat(fd).Nlink, p.content("a"))
	p.err("link again", unix.Linkat(unix.AT_FDCWD, fmt.Sprintf("/proc/self/fd/%d", fd), unix.AT_FDCWD, p.p("b"), unix.AT_SYMLINK_FOLLOW))
	p.tell("links %d", p.fstat(fd).Nlink)
	p.err("exists", unix.Linkat(fd, "", unix.AT_FDCWD, p.p("b"), unix.AT_EMPTY_PATH))
	unix.Unlink(p.p("a"))
	unix.Unlink(p.p("b"))
	p.tell("links %d", p.fstat(fd).Nlink)
	p.err("link what was removed", unix.Linkat(fd, "", unix.AT_FDCWD, p.p("c"), unix.AT_EMPTY_PATH))
	unix.Close(fd)
	fd = p.open(".", unix.O_TMPFILE|unix.O_RDWR|unix.O_EXCL, 0o600)
	p.err("link an exclusive one", unix.Linkat(fd, "", unix.AT_FDCWD, p.p("c"), unix.AT_EMPTY_PATH))
	p.err("proc", unix.Linkat(unix.AT_FDCWD, fmt.Sprintf("/proc/self/fd/%d", fd), unix.AT_FDCWD, p.p("c"), unix.AT_SYMLINK_FOLLOW))
	p.err("fsetxattr", unix.Fsetxattr(fd, "user.a", []byte("1"), 0))
	p.err("fchmod", unix.Fchmod(fd, 0o4755))
	p.err("ftruncate", unix.Ftruncate(fd, 100))
	unix.Close(fd)
	_, err = unix.Open(p.dir, unix.O_TMPFILE|unix.O_RDONLY, 0o600)
	p.err("read-only", err)
	unix.Close(p.open("f", unix.O_CREAT, 0o600))
	_, err = unix.Open(p.p("f"), unix.O_TMPFILE|unix.O_RDWR, 0o600)
	p.err("in a file", err)
	_, err = unix.Open(p.p("none"), unix.O_TMPFILE|unix.O_RDWR, 0o600)
	p.err("nowhere", err)
}

func probeRenameOverOpen(p *probe) {
	a := p.open("a", unix.O_CREAT|unix.O_RDWR, 0o644)
	b := p.open("b", unix.O_CREAT|unix.O_RDWR, 0o644)
	defer unix.Close(a)
	defer unix.Close(b)
	unix.Write(a, []byte("this is a"))
	unix.Write(b, []byte("and b"))
	p.err("rename", unix.Rename(p.p("a"), p.p("b")))
	p.tell("links %d %d, %s", p.fstat(a).Nlink, p.fstat(b).Nlink, p.content("b"))
	buf := make([]byte, 20)
	n, err := unix.Pread(b, buf, 0)
	p.err(fmt.Sprintf("%q", buf[:n]), err)
	n, err = unix.Write(b, []byte(", on its way"))
	p.err(fmt.Sprint(n), err)
	p.err("truncate", unix.Ftruncate(b, 8))
	n, err = unix.Pread(b, buf, 0)
	p.err(fmt.Sprintf("%q", buf[:n]), err)
	p.err("fchmod", unix.Fchmod(b, 0o600))
	p.err("fsetxattr", unix.Fsetxattr(b, "user.a", []byte("1"), 0))
	n, err = unix.Fgetxattr(b, "user.a", buf)
	p.err(fmt.Sprint(n), err)
	p.err("fsync", unix.Fsync(b))
	p.err("link", unix.Linkat(b, "", unix.AT_FDCWD, p.p("c"), unix.AT_EMPTY_PATH))
	m, err := unix.Mmap(b, 0, 8, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	p.err("mmap", err)
	copy(m, "MAP")
	n, err = unix.Pread(b, buf, 0)
	p.err(fmt.Sprintf("%q", buf[:n]), err)
	unix.Munmap(m)
	re, err := unix.Open(fmt.Sprintf("/proc/self/fd/%d", b), unix.O_RDWR, 0)
	p.err("open again", err)
	n, err = unix.Pread(re, buf, 0)
	p.err(fmt.Sprintf("%q", buf[:n]), err)
	unix.Close(re)
	link, _ := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", b))
	p.tell("%s", strings.TrimPrefix(link, p.dir))
}

func probeDirectoryOffsets(p *probe) {
	for i := range 500 {
		unix.Close(p.open(fmt.Sprintf("%0100d", i), unix.O_CREAT, 0o600))
	}
	d := p.open(".", unix.O_RDONLY, 0)
	defer unix.Close(d)
	// Every position is that from which the rest follows.
	list := func() (all []dirent) {
		for b := make([]byte, 4096); ; {
			n, err := unix.Getdents(d, b)
			if n <= 0 || err != nil {
				return all
			}
			all = append(all, parseDirents(b[:n])...)
		}
	}
	first := list()
	p.tell("%d entries", len(first))
	bad := 0
	for i := 0; i < len(first); i += 37 {
		unix.Seek(d, first[i].off, unix.SEEK_SET)
		rest := list()
		if len(rest) != len(first)-i-1 || len(rest) > 0 && rest[0].name != first[i+1].name {
			bad++
		}
	}
	p.tell("%d bad", bad)
	unix.Seek(d, first[100].off, unix.SEEK_SET)
	for i := range 101 {
		if len(first[i].name) > 2 {
			unix.Unlink(p.p(first[i].name))
		}
	}
	p.tell("%d after removal of those before", len(list()))
	unix.Seek(d, 0, unix.SEEK_SET)
	p.tell("%d of all", len(list()))
	at, err := unix.Seek(d, 0, unix.SEEK_END)
	p.err("end", err)
	_ = at
	_, err = unix.Seek(d, -1, unix.SEEK_SET)
	p.err("negative", err)
	unix.Getdents(d, make([]byte, 3))
	unix.Seek(d, 0, unix.SEEK_SET)
	n, err := unix.Getdents(d, make([]byte, 3))
	p.err(fmt.Sprint("small buffer ", n), err)
	n, err = unix.Read(d, make([]byte, 3))
	p.err(fmt.Sprint("read ", n), err)
	f := p.open("f", unix.O_CREAT|unix.O_RDWR, 0o600)
	n, err = unix.Getdents(f, make([]byte, 300))
	p.err(fmt.Sprint("getdents of a file ", n), err)
	unix.Close(f)
}

func probeNames(p *probe) {
	var all []byte
	for c := 1; c < 256; c++ {
		if c != '/' {
			all = append(all, byte(c))
		}
	}
	for _, name := range []string{string(all), string(all) + "x", strings.Repeat("\xff", 255), strings.Repeat("ü", 127), "a\nb", " ", "...", "-", "\x01", strings.Repeat("n", 256), "", ".", ".."} {
		short := fmt.Sprintf("%.10q (%d)", name, len(name))
		path := p.dir + "/" + name
		p.err("create "+short, unix.Mknod(path, unix.S_IFREG|0o600, 0))
		p.err("mkdir "+short, unix.Mkdir(path+"", 0o700))
		p.err("symlink "+short, unix.Symlink("x", path))
		p.err("link "+short, unix.Link(p.p("a\nb"), path))
		var st unix.Stat_t
		p.err("stat "+short, unix.Lstat(path, &st))
		p.err("rename "+short, unix.Rename(path, p.dir+"/"+"other"))
		p.err("rename back "+short, unix.Rename(p.dir+"/"+"other", path))
		_, err := unix.Getxattr(path, "user.none", nil)
		p.err("getxattr "+short, err)
	}
	names, err := os.ReadDir(p.dir)
	p.err("readdir", err)
	for _, n := range names {
		p.tell("%q", n.Name())
		p.err("unlink", unix.Unlink(p.p(n.Name())))
	}
	unix.Close(p.open("f", unix.O_CREAT, 0o600))
	unix.Mkdir(p.p("d"), 0o755)
	unix.Symlink("d", p.p("l"))
	unix.Symlink("none", p.p("dangling"))
	unix.Symlink("loop", p.p("loop"))
	unix.Symlink("f", p.p("lf"))
	for _, name := range []string{"f/", "d/", "d/.", "d/..", "l/", "l", "dangling", "dangling/", "loop", "loop/", "lf", "lf/", "new/", "f/x", "none/x", "f/..", "f/."} {
		path := p.dir + "/" + name
		var st unix.Stat_t
		p.err("stat "+name, unix.Stat(path, &st))
		p.err("lstat "+name, unix.Lstat(path, &st))
		for _, flags := range []int{unix.O_RDONLY, unix.O_RDWR, unix.O_CREAT | unix.O_EXCL, unix.O_CREAT, unix.O_DIRECTORY, unix.O_NOFOLLOW, unix.O_PATH | unix.O_NOFOLLOW} {
			fd, err := unix.Open(path, flags, 0o600)
			p.err(fmt.Sprintf("open %s %o", name, flags), err)
			unix.Close(fd)
		}
		unix.Unlink(p.p("none"))
		unix.Unlink(p.p("new"))
		p.err("rmdir "+name, unix.Rmdir(path))
		unix.Mkdir(p.p("d"), 0o755)
		p.err("mkdir "+name, unix.Mkdir(path, 0o755))
		p.err("rename from "+name, unix.Rename(path, p.p("to")))
		p.err("and back "+name, unix.Rename(p.p("to"), path))
		p.err("rename d to "+name, unix.Rename(p.p("d"), path))
		unix.Mkdir(p.p("d"), 0o755)
		p.err("rename f to "+name, unix.Rename(p.p("f"), path))
		unix.Close(p.open("f", unix.O_CREAT, 0o600))
		p.err("link to "+name, unix.Link(p.p("f"), path))
		p.err("link from "+name, unix.Link(path, p.p("linked")))
		unix.Unlink(p.p("linked"))
		p.err("symlink "+name, unix.Symlink("f", path))
		p.err("unlink "+name, unix.Unlink(path))
		p.err("truncate "+name, unix.Truncate(path, 3))
		p.err("chmod "+name, unix.Chmod(path, 0o755))
		_, err := unix.Readlink(path, make([]byte, 10))
		p.err("readlink "+name, err)
		os.RemoveAll(p.p("new"))
		os.Remove(p.p("none"))
		for _, l := range [][2]string{{"d", "l"}, {"none", "dangling"}, {"loop", "loop"}, {"f", "lf"}} {
			os.RemoveAll(p.p(l[1]))
			unix.Symlink(l[0], p.p(l[1]))
		}
		if st := p.stat("f"); st.Mode&unix.S_IFMT != unix.S_IFREG {
			os.RemoveAll(p.p("f"))
			unix.Close(p.open("f", unix.O_CREAT, 0o600))
		}
	}
}

func probePaths(p *probe) {
	// Deep directories, and paths of 4,095 bytes with the NUL.
	name := strings.Repeat("d", 250)
	rel := "."
	for len(rel)+251 < 4000 {
		rel += "/" + name
		p.err("mkdir", unix.Mkdir(p.dir+"/"+rel, 0o755))
	}
	if err := unix.Chdir(p.dir); err != nil {
		p.err("chdir", err)
	}
	defer unix.Chdir("/")
	fill := func(n int) string {
		deep := rel
		for len(deep) < n-251 {
			deep += "/."
		}
		return deep + "/" + strings.Repeat("f", n-len(deep)-1)
	}
	for _, n := range []int{4094, 4095, 4096} {
		path := fill(n)
		p.tell("%d bytes", len(path))
		p.err("mknod", unix.Mknod(path, unix.S_IFREG|0o600, 0))
		var st unix.Stat_t
		p.err("stat", unix.Stat(path, &st))
		p.err("rename", unix.Rename(path, "there"))
		p.err("link", unix.Link("there", path))
		p.err("truncate", unix.Truncate(path, 9))
		_, err := unix.Getxattr(path, "user.a", nil)
		p.err("getxattr", err)
		p.err("unlink", unix.Unlink(path))
		p.err("symlink", unix.Symlink(path, "l"))
		b := make([]byte, 5000)
		m, err := unix.Readlink("l", b)
		p.err(fmt.Sprint("readlink ", m), err)
		unix.Unlink("l")
		unix.Unlink("there")
	}
}

func probeSizes(p *probe) {
	fd := p.open("f", unix.O_CREAT|unix.O_RDWR, 0o644)
	defer unix.Close(fd)
	const most = 1<<63 - 1
	p.err("negative", unix.Ftruncate(fd, -1))
	p.err("negative by name", unix.Truncate(p.p("f"), -1))
	_, err := unix.Pwrite(fd, []byte("x"), -1)
	p.err("write before the start", err)
	n, err := unix.Pwrite(fd, []byte("xy"), most)
	p.err(fmt.Sprint("write at the end of all ", n), err)
	n, err = unix.Pread(fd, make([]byte, 10), most)
	p.err(fmt.Sprint("read there ", n), err)
	at, err := unix.Seek(fd, most, unix.SEEK_SET)
	_, _ = at, err
	_, err = unix.Seek(fd, -1, unix.SEEK_SET)
	p.err("seek before the start", err)
	n, err = unix.Pwrite(fd, []byte("far"), 40<<30)
	p.err(fmt.Sprint("at 40 GiB ", n), err)
	p.tell("%d", p.fstat(fd).Size)
	b := make([]byte, 10)
	n, err = unix.Pread(fd, b, 40<<30-2)
	p.err(fmt.Sprintf("%q", b[:n]), err)
	off, err := unix.Seek(fd, 0, unix.SEEK_DATA)
	p.err(fmt.Sprint("data at ", off), err)
	p.err("cut", unix.Ftruncate(fd, 30<<30))
	off, err = unix.Seek(fd, 0, unix.SEEK_DATA)
	p.err(fmt.Sprint("data at ", off), err)
	n, err = unix.Write(-1, nil)
	p.err(fmt.Sprint("no file ", n), err)
	ro := p.open("f", unix.O_RDONLY, 0)
	_, err = unix.Write(ro, []byte("x"))
	p.err("write to what is open for reading", err)
	p.err("truncate it", unix.Ftruncate(ro, 0))
	unix.Close(ro)
	wo := p.open("f", unix.O_WRONLY, 0)
	_, err = unix.Read(wo, b)
	p.err("read from what is open for writing", err)
	unix.Close(wo)
}

func probeMappings(p *probe) {
	const page = 4096
	fd := p.open("f", unix.O_CREAT|unix.O_RDWR, 0o644)
	defer unix.Close(fd)
	unix.Pwrite(fd, []byte(strings.Repeat("0123456789abcdef", 2*page/16+10)), 0) // two pages and 160 bytes
	shared, err := unix.Mmap(fd, 0, 4*page, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	p.err("shared", err)
	private, err := unix.Mmap(fd, 0, 4*page, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE)
	p.err("private", err)
	defer unix.Munmap(shared)
	defer unix.Munmap(private)
	read := func(what string, m []byte, at int) {
		var c byte
		hit := fault(func() { c = m[at] })
		p.tell("%s at %d: %q %s", what, at, c, hit)
	}
	all := func() {
		for _, at := range []int{0, page - 1, page, 2*page + 159, 2*page + 160, 3*page - 1, 3 * page, 4*page - 1} {
			read("shared", shared, at)
			read("private", private, at)
		}
		p.tell("size %d, %s", p.fstat(fd).Size, p.content("f"))
	}
	all()
	p.tell("write to the shared one: %s", fault(func() { copy(shared[10:], "SHARED") }))
	b := make([]byte, 20)
	n, err := unix.Pread(fd, b, 5)
	p.err(fmt.Sprintf("%q", b[:n]), err)
	p.tell("write to the private one: %s", fault(func() { copy(private[20:], "PRIVATE") }))
	n, err = unix.Pread(fd, b, 15)
	p.err(fmt.Sprintf("%q", b[:n]), err)
	unix.Pwrite(fd, []byte("WRITTEN"), page+3)
	p.tell("%q %q", shared[page:page+12], private[page:page+12])
	p.tell("beyond the end, in its page: %s", fault(func() { shared[2*page+200] = 'y' }))
	p.tell("beyond its page: %s", fault(func() { shared[3*page+1] = 'y' }))
	p.err("msync", unix.Msync(shared[:3*page], unix.MS_SYNC))
	p.err("grow", unix.Ftruncate(fd, 4*page))
	all()
	p.tell("what was written beyond the end: %q", shared[2*page+200])
	p.tell("now there: %s", fault(func() { shared[3*page+1] = 'z' }))
	p.err("cut", unix.Ftruncate(fd, page+100))
	all()
	p.tell("private, copied before: %s", fault(func() { private[21]++ }))
	p.err("grow again", unix.Ftruncate(fd, 3*page))
	all()
	p.err("punch", unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 0, page))
	all()
	p.tell("write after the punch: %s", fault(func() { shared[page] = 'q' }))
	n, err = unix.Pread(fd, b, page-2)
	p.err(fmt.Sprintf("%q", b[:n]), err)
	second := p.open("f", unix.O_RDWR, 0)
	unix.Pwrite(second, []byte("by another"), page)
	p.tell("%q", shared[page:page+12])
	third := p.open("f", unix.O_WRONLY, 0)
	unix.Pwrite(third, []byte("BY A THIRD"), page)
	p.tell("%q", shared[page:page+12])
	direct := p.open("f", unix.O_RDWR|unix.O_DIRECT, 0)
	block := alignedBlock()
	copy(block, "direct")
	n, err = unix.Pwrite(direct, block, page)
	p.err(fmt.Sprint("direct ", n), err)
	p.tell("%q", shared[page:page+12])
	copy(shared[page:], "after")
	n, err = unix.Pread(direct, block, page)
	p.err(fmt.Sprintf("direct %d %q", n, block[:10]), err)
	ap := p.open("f", unix.O_WRONLY|unix.O_APPEND, 0)
	unix.Write(ap, []byte("appended"))
	p.tell("%q", shared[3*page:3*page+8])
	for _, fd := range []int{second, third, direct, ap} {
		unix.Close(fd)
	}
	ro := p.open("f", unix.O_RDONLY, 0)
	_, err = unix.Mmap(ro, 0, page, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	p.err("shared and writable of what is read-only", err)
	unix.Close(ro)
	wo := p.open("f", unix.O_WRONLY, 0)
	_, err = unix.Mmap(wo, 0, page, unix.PROT_READ, unix.MAP_SHARED)
	p.err("of what is write-only", err)
	_, err = unix.Mmap(wo, 1, page, unix.PROT_READ, unix.MAP_SHARED)
	p.err("at an odd place", err)
	unix.Close(wo)
	unix.Unlink(p.p("f"))
	p.tell("after unlink: %s", fault(func() { shared[page] = 'u' }))
	n, err = unix.Pread(fd, b, page)
	p.err(fmt.Sprintf("%q", b[:n]), err)
	e := p.open("empty", unix.O_CREAT|unix.O_RDWR, 0o600)
	m, err := unix.Mmap(e, 0, page, unix.PROT_READ, unix.MAP_SHARED)
	p.err("of an empty file", err)
	read("empty", m, 0)
	unix.Munmap(m)
	d := p.open("d", unix.O_CREAT|unix.O_RDWR|unix.O_DIRECT, 0o600)
	unix.Ftruncate(d, page)
	m, err = unix.Mmap(d, 0, page, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	p.err("of what is open past the cache", err)
	if err == nil {
		copy(m, "mapped")
		n, err = unix.Pread(d, block, 0)
		p.err(fmt.Sprintf("%d %q", n, block[:8]), err)
		unix.Munmap(m)
	}
	unix.Close(d)
	unix.Close(e)
}

func probeDirect(p *probe) {
	fd := p.open("f", unix.O_CREAT|unix.O_RDWR|unix.O_DIRECT, 0o644)
	defer unix.Close(fd)
	other := p.open("f", unix.O_RDWR, 0)
	defer unix.Close(other)
	a := alignedBlock()
	copy(a, "first")
	n, err := unix.Pwrite(fd, a, 0)
	p.err(fmt.Sprint("write ", n), err)
	copy(a, "other")
	n, err = unix.Pwrite(fd, a, 8192)
	p.err(fmt.Sprint("write ", n), err)
	b := make([]byte, 5)
	n, err = unix.Pread(other, b, 8192)
	p.err(fmt.Sprintf("%q", b[:n]), err)
	unix.Pwrite(other, []byte("buffered"), 8192)
	n, err = unix.Pread(fd, a, 8192)
	p.err(fmt.Sprintf("%d %q", n, a[:10]), err)
	n, err = unix.Pread(fd, a, 4096)
	p.err(fmt.Sprintf("%d %q", n, a[:10]), err)
	n, err = unix.Pread(fd, a, 12288)
	p.err(fmt.Sprintf("at the end %d", n), err)
	unix.Ftruncate(fd, 10000)
	n, err = unix.Pread(fd, a, 8192)
	p.err(fmt.Sprintf("the last block %d", n), err)
	fl, _ := unix.FcntlInt(uintptr(other), unix.F_GETFL, 0)
	_, err = unix.FcntlInt(uintptr(other), unix.F_SETFL, fl|unix.O_DIRECT)
	p.err("SETFL", err)
	copy(a, "late")
	n, err = unix.Pwrite(other, a, 0)
	p.err(fmt.Sprint("write ", n), err)
	p.tell("%s", p.content("f"))
}

func probeExtendedAttributes(p *probe) {
	unix.Close(p.open("f", unix.O_CREAT, 0o644))
	unix.Mkdir(p.p("d"), 0o755)
	unix.Symlink("f", p.p("l"))
	unix.Mkfifo(p.p("fifo"), 0o644)
	unix.Mknod(p.p("dev"), unix.S_IFCHR|0o644, 0x103)
	name255 := "user." + strings.Repeat("n", 250)
	for user := range 2 {
		p.as(user, func() {
			for _, file := range []string{"f", "d", "l", "fifo", "dev", "none"} {
				for _, name := range []string{"user.a", "user.", "user", "", "trusted.a", "trusted.", "security.a", "security.", "system.a", "other.a", "noprefix", name255, name255 + "x", "user.\xff\x01", "user.a/b"} {
					short := fmt.Sprintf("%d %s %.20q (%d)", user, file, name, len(name))
					p.err("set "+short, unix.Lsetxattr(p.p(file), name, []byte("value"), 0))
					b := make([]byte, 100)
					n, err := unix.Lgetxattr(p.p(file), name, b)
					p.err(fmt.Sprintf("get %s: %d", short, n), err)
					p.err("remove "+short, unix.Lremovexattr(p.p(file), name))
					p.err("remove again "+short, unix.Lremovexattr(p.p(file), name))
				}
				n, err := unix.Llistxattr(p.p(file), make([]byte, 100))
				p.err(fmt.Sprintf("list %s %d", file, n), err)
			}
		})
	}
	set := func(what, name string, size, flags int) {
		p.err(what, unix.Setxattr(p.p("f"), name, []byte(strings.Repeat("v", size)), flags))
	}
	get := func(what, name string, size int) {
		n, err := unix.Getxattr(p.p("f"), name, make([]byte, size))
		p.err(fmt.Sprintf("%s: %d", what, n), err)
	}
	set("empty", "user.e", 0, 0)
	get("empty", "user.e", 10)
	get("size of empty", "user.e", 0)
	set("create", "user.c", 5, unix.XATTR_CREATE)
	set("create again", "user.c", 6, unix.XATTR_CREATE)
	set("replace", "user.c", 7, unix.XATTR_REPLACE)
	set("replace nothing", "user.n", 7, unix.XATTR_REPLACE)
	set("both", "user.c", 7, unix.XATTR_CREATE|unix.XATTR_REPLACE)
	set("both, nothing", "user.n", 7, unix.XATTR_CREATE|unix.XATTR_REPLACE)
	set("unknown flag", "user.c", 7, 4)
	set("too large", "user.big", 65537, 0)
	set("1 MiB", "user.big", 1<<20, 0)
	set("3,000", "user.k", 3000, 0)
	get("all of it", "user.k", 3000)
	get("too little", "user.k", 2999)
	get("1", "user.k", 1)
	get("0", "user.k", 0)
	get("much", "user.k", 65536)
	get("more than allowed", "user.k", 1<<20)
	n, err := unix.Listxattr(p.p("f"), make([]byte, 100))
	p.err(fmt.Sprint("list ", n), err)
	n, err = unix.Listxattr(p.p("f"), make([]byte, 1))
	p.err(fmt.Sprint("list too small ", n), err)
	n, err = unix.Listxattr(p.p("f"), nil)
	p.err(fmt.Sprint("list size ", n), err)
	unix.Chmod(p.p("f"), 0)
	p.as(1, func() {
		get("without the right", "user.k", 100)
		set("without the right", "user.k", 1, 0)
		get("trusted", "trusted.k", 100)
	})
}

func probeSpecialFiles(p *probe) {
	for _, mode := range []uint32{unix.S_IFIFO, unix.S_IFSOCK, unix.S_IFCHR, unix.S_IFBLK, unix.S_IFREG, unix.S_IFDIR, unix.S_IFLNK, 0, 0o170000} {
		name := fmt.Sprintf("m%o", mode)
		p.err(name, unix.Mknod(p.p(name), mode|0o644, int(unix.Mkdev(259, 1<<19|77))))
		var st unix.Stat_t
		if unix.Lstat(p.p(name), &st) == nil {
			p.tell("%o %d:%d size %d links %d", st.Mode, unix.Major(st.Rdev), unix.Minor(st.Rdev), st.Size, st.Nlink)
		}
		p.as(1, func() { p.err("by a user", unix.Mknod(p.p(name+"u"), mode|0o644, 5)) })
	}
	p.as(1, func() {})
	r := p.open(fmt.Sprintf("m%o", unix.S_IFIFO), unix.O_RDONLY|unix.O_NONBLOCK, 0)
	w := p.open(fmt.Sprintf("m%o", unix.S_IFIFO), unix.O_WRONLY|unix.O_NONBLOCK, 0)
	unix.Write(w, []byte("through"))
	b := make([]byte, 10)
	n, err := unix.Read(r, b)
	p.err(fmt.Sprintf("%q", b[:n]), err)
	unix.Close(r)
	unix.Close(w)
	_, err = unix.Open(p.p(fmt.Sprintf("m%o", unix.S_IFSOCK)), unix.O_RDONLY, 0)
	p.err("open a socket", err)
	unix.Chdir(p.dir)
	defer unix.Chdir("/")
	s, _ := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM, 0)
	p.err("bind", unix.Bind(s, &unix.SockaddrUnix{Name: "sock"}))
	p.err("bind again", unix.Bind(s, &unix.SockaddrUnix{Name: "sock"}))
	p.err("listen", unix.Listen(s, 1))
	c, _ := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM, 0)
	p.err("connect", unix.Connect(c, &unix.SockaddrUnix{Name: "sock"}))
	unix.Close(c)
	unix.Close(s)
	p.err("chmod a symlink", unix.Fchmodat(unix.AT_FDCWD, "none", 0o600, unix.AT_SYMLINK_NOFOLLOW))
}

func probeOtherCalls(p *probe) {
	fd := p.open("f", unix.O_CREAT|unix.O_RDWR, 0o644)
	defer unix.Close(fd)
	out := p.open("o", unix.O_CREAT|unix.O_RDWR, 0o644)
	defer unix.Close(out)
	unix.Write(fd, []byte(strings.Repeat("0123456789", 1000)))
	off := int64(0)
	n, err := unix.Sendfile(out, fd, &off, 5000)
	p.err(fmt.Sprint("sendfile ", n), err)
	in, to := int64(100), int64(7000)
	n, err = unix.CopyFileRange(fd, &in, out, &to, 3000, 0)
	p.err(fmt.Sprint("copy ", n), err)
	in, to = 9990, 0
	n, err = unix.CopyFileRange(fd, &in, out, &to, 3000, 0)
	p.err(fmt.Sprint("copy at the end ", n), err)
	in, to = 0, 100
	n, err = unix.CopyFileRange(fd, &in, fd, &to, 3000, 0)
	p.err(fmt.Sprint("copy onto itself ", n), err)
	n, err = unix.CopyFileRange(fd, &in, out, &to, 3000, 1)
	p.err(fmt.Sprint("copy with flags ", n), err)
	p.tell("%s", p.content("o"))
	p.err("clone", unix.IoctlFileClone(out, fd))
	p.err("fadvise", unix.Fadvise(fd, 0, 100, unix.FADV_DONTNEED))
	p.err("sync_file_range", unix.SyncFileRange(fd, 0, 100, unix.SYNC_FILE_RANGE_WRITE))
	p.err("syncfs", unix.Syncfs(fd))
	p.err("fdatasync", unix.Fdatasync(fd))
	d := p.open(".", unix.O_RDONLY, 0)
	p.err("fsync of a directory", unix.Fsync(d))
	p.err("write to a directory", func() error { _, err := unix.Write(d, []byte("x")); return err }())
	p.err("truncate a directory", unix.Ftruncate(d, 0))
	unix.Close(d)
	p.err("rename to .", unix.Rename(p.p("f"), p.p(".")+"/."))
	p.err("rename . ", unix.Rename(p.dir+"/.", p.p("x")))
	p.err("rmdir .", unix.Rmdir(p.dir+"/."))
	p.err("rmdir ..", unix.Rmdir(p.dir+"/.."))
	p.err("unlink .", unix.Unlink(p.dir+"/."))
	p.err("mkdir .", unix.Mkdir(p.dir+"/.", 0o755))
	p.err("link .", unix.Link(p.dir+"/.", p.p("x")))
	p.err("noreplace and exchange", unix.Renameat2(unix.AT_FDCWD, p.p("f"), unix.AT_FDCWD, p.p("o"), unix.RENAME_EXCHANGE|unix.RENAME_NOREPLACE))
	p.err("unknown rename", unix.Renameat2(unix.AT_FDCWD, p.p("f"), unix.AT_FDCWD, p.p("o"), 1<<10))
	h, _, err := unix.NameToHandleAt(unix.AT_FDCWD, p.p("f"), 0)
	p.err("name_to_handle_at", err)
	if err == nil {
		m := p.open(".", unix.O_RDONLY, 0)
		hfd, err := unix.OpenByHandleAt(m, h, unix.O_RDONLY)
		p.err("open_by_handle_at", err)
		unix.Close(hfd)
		unix.Close(m)
	}
	_, err = unix.FcntlInt(uintptr(fd), unix.F_SETLEASE, unix.F_WRLCK)
	p.err("lease", err)
	_, err = unix.FcntlInt(uintptr(fd), unix.F_SETLEASE, unix.F_UNLCK)
	p.err("no lease", err)
	wd, err := unix.InotifyInit1(0)
	_, err2 := unix.InotifyAddWatch(wd, p.dir, unix.IN_ALL_EVENTS)
	p.err("inotify", err)
	p.err("inotify", err2)
	unix.Close(wd)
	var sx unix.Statx_t
	p.err("statx", unix.Statx(unix.AT_FDCWD, p.p("f"), 0, unix.STATX_ALL, &sx))
	p.tell("%#x", sx.Mask&(unix.STATX_BASIC_STATS|unix.STATX_BTIME))
	var sf unix.Statfs_t
	p.err("fstatfs", unix.Fstatfs(fd, &sf))
	p.tell("relatime %v, names %d", sf.Flags&0x1000 != 0, sf.Namelen)
}

// probeLarge is about what lies beyond sealfs.HomeBytes.
func probeLarge(p *probe) {
	fd := p.open("f", unix.O_CREAT|unix.O_RDWR, 0o644)
	defer unix.Close(fd)
	const base = 64 << 20
	seeks := func() {
		unix.Fsync(fd)
		for _, off := range []int64{0, 4096, base - 4096, base, base + 4096, base + 4<<20, base + 9<<20, base + 40<<20} {
			d, err := unix.Seek(fd, off, unix.SEEK_DATA)
			p.err(fmt.Sprintf("data from %d: %d", off, d), err)
			h, err := unix.Seek(fd, off, unix.SEEK_HOLE)
			p.err(fmt.Sprintf("hole from %d: %d", off, h), err)
		}
		p.tell("size %d", p.fstat(fd).Size)
	}
	look := func(off int64) {
		b := make([]byte, 12)
		n, err := unix.Pread(fd, b, off)
		p.err(fmt.Sprintf("at %d: %q", off, b[:n]), err)
	}
	unix.Pwrite(fd, []byte(strings.Repeat("0123456789abcdef", 1024)), base-8192)
	seeks()
	unix.Pwrite(fd, []byte("far"), base+9<<20+100)
	seeks()
	p.err("punch over the border", unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, base-4096, 8192))
	seeks()
	look(base - 4100)
	look(base + 4090)
	p.err("zero", unix.Fallocate(fd, unix.FALLOC_FL_ZERO_RANGE, base+9<<20, 1<<20))
	look(base + 9<<20 + 100)
	p.tell("size %d", p.fstat(fd).Size)
	p.err("cut", unix.Ftruncate(fd, base+5000))
	p.err("grow", unix.Ftruncate(fd, base+20<<20))
	seeks()
	look(base + 4990)
	m, err := unix.Mmap(fd, base, 8192, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	p.err("mmap", err)
	copy(m[4990:], "mapped")
	look(base + 4990)
	unix.Munmap(m)
	ap := p.open("f", unix.O_WRONLY|unix.O_APPEND, 0)
	n, err := unix.Write(ap, []byte("appended"))
	p.err(fmt.Sprint("append ", n), err)
	unix.Close(ap)
	look(base + 20<<20 - 2)
	in, to := int64(base-8192), int64(base+30<<20)
	n, err = unix.CopyFileRange(fd, &in, fd, &to, 16384, 0)
	p.err(fmt.Sprint("copy ", n), err)
	look(base + 30<<20)
	p.err("to a directory's end", unix.Unlink(p.p("f")))
	look(base + 30<<20)
}
