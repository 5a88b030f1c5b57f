package meta

import (
	"bytes"
	"encoding/binary"
	"math/rand/v2"
	"testing"

	"sealfs"
	"sealfs/op"
)

// aclOf returns an ACL of entries (tag, permissions, who).
func aclOf(entries ...[3]uint32) []byte {
	b := []byte{aclVersion, 0, 0, 0}
	for _, e := range entries {
		b = binary.LittleEndian.AppendUint16(b, uint16(e[0]))
		b = binary.LittleEndian.AppendUint16(b, uint16(e[1]))
		b = binary.LittleEndian.AppendUint32(b, e[2])
	}
	return b
}

const nobody = aclNobody

// randomACL returns an ACL that is valid more often than not, and large at times.
func randomACL(rng *rand.Rand) []byte {
	perm := func() uint32 { return uint32(rng.IntN(8)) }
	entries := [][3]uint32{{aclUserObj, perm(), nobody}}
	named := []int{0, 0, 1, 3, 60, 250}[rng.IntN(6)]
	for range named {
		entries = append(entries, [3]uint32{aclUser, perm(), uint32(rng.IntN(4))})
	}
	entries = append(entries, [3]uint32{aclGroupObj, perm(), nobody})
	for range named {
		entries = append(entries, [3]uint32{aclGroup, perm(), uint32(rng.IntN(4))})
	}
	if named > 0 || rng.IntN(3) == 0 {
		entries = append(entries, [3]uint32{aclMask, perm(), nobody})
	}
	b := aclOf(append(entries, [3]uint32{aclOther, perm(), uint32(rng.IntN(3)) - 1})...)
	switch rng.IntN(10) {
	case 0:
		b[rng.IntN(len(b))] ^= 1 << rng.IntN(8)
	case 1:
		b = b[:rng.IntN(len(b))]
	case 2:
		b = b[:aclHead]
	}
	return b
}

func TestACLFormat(t *testing.T) {
	u, g, o, m := [3]uint32{aclUserObj, 7, nobody}, [3]uint32{aclGroupObj, 5, nobody}, [3]uint32{aclOther, 4, nobody}, [3]uint32{aclMask, 6, nobody}
	named, group := [3]uint32{aclUser, 3, 8}, [3]uint32{aclGroup, 1, 9}
	version3 := aclOf(u, g, o)
	version3[0] = 3
	long := [][3]uint32{u}
	for range (sealfs.ACLMax-aclHead)/aclEntry - 4 {
		long = append(long, named)
	}
	longest := aclOf(append(long, g, m, o)...)
	for _, c := range []struct {
		name string
		acl  []byte
		code sealfs.Code
		mode uint32
		all  bool
	}{
		{"minimal", aclOf(u, g, o), 0, 0o754, true},
		{"mask", aclOf(u, g, m, o), 0, 0o764, false},
		{"user", aclOf(u, named, g, m, o), 0, 0o764, false},
		{"twice the same user", aclOf(u, named, named, g, m, o), 0, 0o764, false},
		{"group", aclOf(u, g, group, m, o), 0, 0o764, false},
		{"mask of nothing", aclOf(u, g, [3]uint32{aclMask, 0, nobody}, o), 0, 0o704, false},
		{"longest", longest, 0, 0o764, false},
		{"too long", aclOf(append(long, named, named, g, m, o)...), sealfs.ErrArgTooBig, 0, false},
		{"other version", version3, sealfs.ErrNotSupported, 0, false},
		{"half a head", []byte{2, 0}, sealfs.ErrInvalid, 0, false},
		{"half an entry", aclOf(u, g, o)[:24], sealfs.ErrInvalid, 0, false},
		{"user without mask", aclOf(u, named, g, o), sealfs.ErrInvalid, 0, false},
		{"group without mask", aclOf(u, g, group, o), sealfs.ErrInvalid, 0, false},
		{"no owner", aclOf(g, o), sealfs.ErrInvalid, 0, false},
		{"no group", aclOf(u, o), sealfs.ErrInvalid, 0, false},
		{"no others", aclOf(u, g), sealfs.ErrInvalid, 0, false},
		{"owner twice", aclOf(u, u, g, o), sealfs.ErrInvalid, 0, false},
		{"mask twice", aclOf(u, g, m, m, o), sealfs.ErrInvalid, 0, false},
		{"other order", aclOf(u, g, named, m, o), sealfs.ErrInvalid, 0, false},
		{"permission", aclOf([3]uint32{aclUserObj, 8, nobody}, g, o), sealfs.ErrInvalid, 0, false},
		{"tag", aclOf(u, g, o, [3]uint32{64, 1, nobody}), sealfs.ErrInvalid, 0, false},
		{"tag of two", aclOf(u, [3]uint32{3, 1, nobody}, g, o), sealfs.ErrInvalid, 0, false},
		{"nobody", aclOf(u, [3]uint32{aclUser, 3, nobody}, g, m, o), sealfs.ErrInvalid, 0, false},
	} {
		a, err := parseACL(c.acl)
		if c.code != 0 {
			if err != refusal(c.code) {
				t.Errorf("%s: %v, want %v", c.name, err, c.code)
			}
			continue
		}
		if err != nil || !bytes.Equal(a, c.acl) {
			t.Errorf("%s: %x, %v", c.name, a, err)
			continue
		}
		if mode, all := a.mode(); mode != c.mode || all != c.all {
			t.Errorf("%s: mode %o, %v", c.name, mode, all)
		}
		if mode, _ := a.with(0o1273).mode(); mode != 0o273 || !bytes.Equal(a, c.acl) {
			t.Errorf("%s: mode %o after chmod", c.name, mode)
		}
	}
	if a, err := parseACL(aclOf([3]uint32{aclUserObj, 7, 5}, g, o)); err != nil || !bytes.Equal(a, aclOf(u, g, o)) {
		t.Errorf("whom an owner's entry names counts: %x, %v", a, err)
	}
}

// TestACL follows an ACL from directory to file: what is stored, what the mode says.
func TestACL(t *testing.T) {
	f := newFixture(t, 4)
	set := func(ino sealfs.Ino, name string, acl []byte, flags op.Flags) op.Attr {
		t.Helper()
		return f.ok(op.Request{Type: op.Setxattr, Ino: ino, Name: name, Data: acl, Flags: flags}).Attr
	}
	get := func(ino sealfs.Ino, name string, want []byte) {
		t.Helper()
		if want == nil {
			f.refused(sealfs.ErrNoData, op.Request{Type: op.Getxattr, Ino: ino, Name: name, Len: sealfs.ACLMax})
		} else if got := f.ok(op.Request{Type: op.Getxattr, Ino: ino, Name: name, Len: sealfs.ACLMax}).Data; !bytes.Equal(got, want) {
			t.Errorf("%s of %d:\n %x, want\n %x", name, ino, got, want)
		}
	}
	u, o := func(p uint32) [3]uint32 { return [3]uint32{aclUserObj, p, nobody} }, func(p uint32) [3]uint32 { return [3]uint32{aclOther, p, nobody} }
	g, m := func(p uint32) [3]uint32 { return [3]uint32{aclGroupObj, p, nobody} }, func(p uint32) [3]uint32 { return [3]uint32{aclMask, p, nobody} }
	named := [3]uint32{aclUser, 6, 1000}
	dir := f.mkdir("d")
	ino := f.create("d/f")

	a := set(ino, op.ACLAccess, aclOf(u(6), named, g(4), m(6), o(0)), op.XReplace)
	if a.Mode != typeFile|0o660|op.ModeACL {
		t.Errorf("mode %#o", a.Mode)
	}
	if a := f.ok(op.Request{Type: op.Setattr, Ino: ino, Valid: op.SetMode, Mode: 0o6715}).Attr; a.Mode != typeFile|0o6715|op.ModeACL {
		t.Errorf("mode %#o after chmod", a.Mode)
	}
	get(ino, op.ACLAccess, aclOf(u(7), named, g(4), m(1), o(5)))
	if a := f.ok(op.Request{Type: op.Removexattr, Ino: ino, Name: op.ACLAccess}).Attr; a.Mode != typeFile|0o6715 {
		t.Errorf("mode %#o without the ACL", a.Mode)
	}
	get(ino, op.ACLAccess, nil)
	before := f.attr("d/f")
	f.ok(op.Request{Type: op.Removexattr, Ino: ino, Name: op.ACLAccess})
	f.ok(op.Request{Type: op.Removexattr, Ino: ino, Name: op.ACLDefault})
	set(ino, op.ACLDefault, nil, 0)
	if f.attr("d/f") != before {
		t.Error("removing what is not there changes something")
	}
	if a := set(ino, op.ACLAccess, aclOf(u(7), g(1), o(0)), op.KillPriv); a.Mode != typeFile|0o4710 {
		t.Errorf("mode %#o after a minimal ACL", a.Mode)
	}
	get(ino, op.ACLAccess, nil)
	f.refused(sealfs.ErrAccess, op.Request{Type: op.Setxattr, Ino: ino, Name: op.ACLDefault, Data: aclOf(u(7), g(1), o(0))})
	f.refused(sealfs.ErrInvalid, op.Request{Type: op.Setxattr, Ino: ino, Name: op.ACLAccess, Data: aclOf(u(7), g(1))})

	// Without a default ACL the umask counts, with one it does not.
	making := func(typ op.Type, name string, mode, umask uint32) op.Request {
		req := f.named(typ, name)
		req.Mode, req.Valid = mode, umask
		return req
	}
	if a := f.ok(making(op.Create, "d/g", 0o4666, 0o027)).Attr; a.Mode != typeFile|0o4640 {
		t.Errorf("mode %#o with a umask", a.Mode)
	}
	given := aclOf(u(7), named, g(7), m(7), o(1))
	set(dir, op.ACLDefault, given, 0)
	for _, typ := range []op.Type{op.Create, op.Mknod, op.Tmpfile} {
		req := making(typ, "d/"+typ.String(), 0o764, 0o777)
		if typ == op.Mknod {
			req.Mode |= typeFifo
		}
		if typ == op.Tmpfile {
			req.Name = ""
		}
		a := f.ok(req).Attr
		if a.Mode&^typeMask != 0o760|op.ModeACL {
			t.Errorf("%v: mode %#o", typ, a.Mode)
		}
		get(a.Ino, op.ACLAccess, aclOf(u(7), named, g(7), m(6), o(0)))
		get(a.Ino, op.ACLDefault, nil)
	}
	sub := f.ok(making(op.Mkdir, "d/sub", 0o2755, 0o777)).Attr
	if sub.Mode != typeDir|0o2751|op.ModeACL {
		t.Errorf("directory: mode %#o", sub.Mode)
	}
	get(sub.Ino, op.ACLAccess, aclOf(u(7), named, g(7), m(5), o(1)))
	get(sub.Ino, op.ACLDefault, given)
	link := making(op.Symlink, "d/link", 0, 0o777)
	link.Data = []byte("target")
	if a := f.ok(link).Attr; a.Mode != typeLink|0o777 {
		t.Errorf("link: mode %#o", a.Mode)
	}
	f.refused(sealfs.ErrNotSupported, op.Request{Type: op.Setxattr, Ino: f.attr("d/link").Ino, Name: op.ACLAccess, Data: given})
	f.refused(sealfs.ErrNotSupported, op.Request{Type: op.Removexattr, Ino: f.attr("d/link").Ino, Name: op.ACLAccess})

	// A minimal one bounds the mode, too, and stays with directories.
	set(dir, op.ACLDefault, aclOf(u(7), g(5), o(0)), 0)
	if a := f.ok(making(op.Create, "d/minimal", 0o666, 0o777)).Attr; a.Mode != typeFile|0o640 {
		t.Errorf("mode %#o from a minimal ACL", a.Mode)
	}
	a = f.ok(making(op.Mkdir, "d/minimal dir", 0o777, 0)).Attr
	get(a.Ino, op.ACLAccess, nil)
	get(a.Ino, op.ACLDefault, aclOf(u(7), g(5), o(0)))

	// What does not fit into a part of a transaction keeps subdirectories at home.
	long := [][3]uint32{u(7)}
	for i := range uint32(109) {
		long = append(long, [3]uint32{aclUser, 7, i})
	}
	for i, c := range []struct {
		acl  []byte
		near bool
	}{
		{aclOf(append(long[:109:109], g(7), m(7), o(7))...), false},
		{aclOf(append(long[:110:110], g(7), m(7), o(7))...), true},
	} {
		set(dir, op.ACLDefault, c.acl, 0)
		req := making(op.Mkdir, "d/long"+string(rune('0'+i)), 0o777, 0)
		req.Shard2 = (dir.Home(4) + 1) % 4
		if a := f.ok(req).Attr; (a.Ino.Home(4) == dir.Home(4)) != c.near {
			t.Errorf("an ACL of %d bytes: home %d, the parent's is %d", len(c.acl), a.Ino.Home(4), dir.Home(4))
		} else {
			get(a.Ino, op.ACLDefault, c.acl)
		}
	}
	f.check()
}

// TestACLDecision refuses a decision when the directory hands down something else by
// now than the other store has prepared for.
func TestACLDecision(t *testing.T) {
	f := newFixture(t, 4)
	f.c.Local = func(s sealfs.Shard) bool { return s != 3 }
	entries := func(user uint32) []byte {
		return aclOf([3]uint32{aclUserObj, 7, nobody}, [3]uint32{aclUser, 7, user}, [3]uint32{aclGroupObj, 5, nobody}, [3]uint32{aclMask, 5, nobody}, [3]uint32{aclOther, 0, nobody})
	}
	set := func(acl []byte) { f.ok(op.Request{Type: op.Setxattr, Ino: f.root, Name: op.ACLDefault, Data: acl}) }
	set(entries(1))
	req := op.Request{Type: op.Mkdir, Dir: f.root, Name: "d", Mode: 0o777, Valid: 0o777, Shard: f.root.Home(4), Shard2: 3}
	plan := func() Plan {
		t.Helper()
		p, err := MakePlan(f.r, f.c, &req, Target{}, nil)
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	before := plan()
	if len(before.Parts) != 1 || !bytes.Equal(before.Parts[0].Data, entries(1)) || before.Parts[0].Mode != typeDir|0o750 {
		t.Fatalf("%+v", before.Parts)
	}
	decide := req
	decide.Tx, decide.Data = op.Tx{Age: 1, Nonce: 1}, before.Parts[0].Data
	decide.Votes = []op.Attr{{Ino: 4*100 + 3, Mode: typeDir | 0o750 | op.ModeACL, Nlink: 2, Version: 1}}
	// The modes are the same, the users are not.
	set(entries(2))
	if after := plan(); after.Equal(&before) {
		t.Error("plans with different ACLs are said to be equal")
	}
	f.refused(sealfs.ErrStale, decide)
	set(nil)
	f.refused(sealfs.ErrStale, decide)
	// So much that the directory comes to lie at home.
	long := [][3]uint32{{aclUserObj, 7, nobody}}
	for i := range uint32(200) {
		long = append(long, [3]uint32{aclUser, 7, i})
	}
	set(aclOf(append(long, [3]uint32{aclGroupObj, 5, nobody}, [3]uint32{aclMask, 5, nobody}, [3]uint32{aclOther, 0, nobody})...))
	if p := plan(); len(p.Parts) != 0 {
		t.Errorf("%+v", p.Parts)
	}
	f.refused(sealfs.ErrStale, decide)
	f.ok(req)
	f.c.Local = nil
}

// TestACLPrepared has the part of a new directory be refused whose ACL is none.
func TestACLPrepared(t *testing.T) {
	f := newFixture(t, 4)
	part := op.Request{Type: op.Prepare, Part: op.PartNew, Tx: op.Tx{Age: 1, Nonce: 2}, Shard: 2, Dir: f.root, Mode: typeDir | 0o700, Volume: 1, Data: []byte("no ACL")}
	f.refused(sealfs.ErrInvalid, part)
	long := [][3]uint32{{aclUserObj, 7, nobody}, {aclGroupObj, 5, nobody}}
	for i := range uint32(111) {
		long = append(long, [3]uint32{aclGroup, 7, i})
	}
	part.Data = aclOf(append(long, [3]uint32{aclMask, 5, nobody}, [3]uint32{aclOther, 0, nobody})...)
	f.refused(sealfs.ErrInvalid, part)
	// The longest that there may be fits into the row, whatever else stands in it.
	part.Data = aclOf(append(long[:110:110], [3]uint32{aclMask, 5, nobody}, [3]uint32{aclOther, 0, nobody})...)
	part.Shard, part.Coord, part.UID, part.GID, part.Volume, part.Dir = 3, 3, 1<<32-1, 1<<32-1, 1<<32-1, sealfs.InoMax
	part.Tx = op.Tx{Age: 1<<63 - 1, Nonce: 1<<64 - 1}
	part.Time = 1<<63 - 1
	a := f.ok(part).Attr
	if again := f.ok(part).Attr; again != a || a.Mode != typeDir|0o700|op.ModeACL {
		t.Errorf("prepared %+v, again %+v", a, again)
	}
	f.ok(op.Request{Type: op.Abort, Shard: 3, Tx: part.Tx})
}
