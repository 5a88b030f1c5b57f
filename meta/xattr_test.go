package meta

import (
	"bytes"
	"fmt"
	"slices"
	"strings"
	"testing"

	"sealfs"
	"sealfs/op"
)

func TestXattr(t *testing.T) {
	for _, mask := range []uint64{0, ^uint64(0)} { // all names in one hash
		f := newFixtureOf(t, Config{Shards: 2, hashMask: mask}, newSpace(64, 1<<20), 16<<20)
		ino := f.create("a")
		set := func(name string, n int, flags op.Flags) op.Request {
			return op.Request{Type: op.Setxattr, Ino: ino, Name: name, Data: pattern(n, byte(len(name))), Flags: flags}
		}
		sizes := []int{0, 1, 500, attrPart, 5000, 2, 65536, 641, 640, 639}
		for _, n := range sizes {
			for _, name := range []string{"user.x", strings.Repeat("n", sealfs.XattrNameMax), fmt.Sprintf("user.%d", n)} {
				f.ok(set(name, n, 0))
				rep := f.ok(op.Request{Type: op.Getxattr, Ino: ino, Name: name, Len: 1 << 20})
				if !bytes.Equal(rep.Data, pattern(n, byte(len(name)))) || rep.Off != uint64(n) {
					t.Fatalf("value of %d bytes reads as %d", n, len(rep.Data))
				}
				if rep := f.ok(op.Request{Type: op.Getxattr, Ino: ino, Name: name}); rep.Off != uint64(n) || len(rep.Data) != 0 {
					t.Errorf("size of %d bytes is %d", n, rep.Off)
				}
				if n > 1 {
					f.refused(sealfs.ErrRange, op.Request{Type: op.Getxattr, Ino: ino, Name: name, Len: uint64(n - 1)})
				}
			}
		}
		f.check()
		list := f.ok(op.Request{Type: op.Listxattr, Ino: ino, Len: 1 << 20})
		names := strings.Split(strings.TrimSuffix(string(list.Data), "\x00"), "\x00")
		if len(names) != len(sizes)+2 || int(list.Off) != len(list.Data) {
			t.Errorf("names: %q", names)
		}
		if n := f.ok(op.Request{Type: op.Listxattr, Ino: ino}).Off; n != list.Off {
			t.Errorf("length of the list %d", n)
		}
		f.refused(sealfs.ErrRange, op.Request{Type: op.Listxattr, Ino: ino, Len: list.Off - 1})
		f.refused(sealfs.ErrExist, set("user.x", 1, op.XCreate))
		f.refused(sealfs.ErrNoData, set("user.y", 1, op.XReplace))
		f.refused(sealfs.ErrArgTooBig, set("user.y", 65537, 0))
		f.refused(sealfs.ErrRange, set(strings.Repeat("n", 256), 1, 0))
		f.refused(sealfs.ErrInvalid, set("", 1, 0))
		f.refused(sealfs.ErrInvalid, set("a\x00", 1, 0))
		f.refused(sealfs.ErrNoData, op.Request{Type: op.Getxattr, Ino: ino, Name: "user.y"})
		f.refused(sealfs.ErrNoData, op.Request{Type: op.Removexattr, Ino: ino, Name: "user.y"})
		before := f.attr("a")
		f.ok(op.Request{Type: op.Removexattr, Ino: ino, Name: "user.x"})
		if a := f.attr("a"); a.Ctime != f.now || a.Mtime != before.Mtime || a.Version != before.Version+1 {
			t.Errorf("after removexattr: %+v", a)
		}
		for _, name := range names {
			if name != "user.x" && slices.Contains(names[:len(names)/2], name) {
				f.ok(op.Request{Type: op.Removexattr, Ino: ino, Name: name})
			}
		}
		f.ok(set("user.new", 10, op.XCreate)) // into a gap of the ordinals
		f.check()
		for rep := f.ok(f.named(op.Unlink, "a")); !rep.Eof; rep = f.ok(op.Request{Type: op.Reclaim, Ino: ino}) {
			f.check()
		}
	}
}

func TestXattrLimits(t *testing.T) {
	f := newFixture(t, 1)
	ino := f.create("a")
	pad := strings.Repeat("n", 250)
	for i := range sealfs.XattrListMax / 256 {
		f.ok(op.Request{Type: op.Setxattr, Ino: ino, Name: fmt.Sprintf("%s%05d", pad, i)})
	}
	f.refused(sealfs.ErrArgTooBig, op.Request{Type: op.Setxattr, Ino: ino, Name: "x"})
	if n := f.ok(op.Request{Type: op.Listxattr, Ino: ino, Len: 65536}).Off; n != 65536 {
		t.Errorf("list of %d bytes", n)
	}
	// More rows than one operation frees.
	rep := f.ok(f.named(op.Unlink, "a"))
	for !rep.Eof {
		f.check()
		rep = f.ok(op.Request{Type: op.Reclaim, Ino: ino})
	}
	c := newFixtureOf(t, Config{Shards: 1, hashMask: ^uint64(0)}, newSpace(64, 64), 16<<20)
	ino = c.create("a")
	for i := range ordinals {
		c.ok(op.Request{Type: op.Setxattr, Ino: ino, Name: fmt.Sprint(i)})
	}
	c.refused(sealfs.ErrNoSpace, op.Request{Type: op.Setxattr, Ino: ino, Name: "x"})
}
