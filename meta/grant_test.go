package meta

import (
	"encoding/hex"
	"maps"
	"testing"

	"sealfs"
	"sealfs/op"
)

// TestGrantGolden freezes key and record.
func TestGrantGolden(t *testing.T) {
	k := GrantKey(0x102, 0x3040506, sealfs.UUID{1, 2, 3, 15: 16})
	g := Grant{Bytes: 1 << 40, Inodes: 300, Version: 7, Since: 1 << 33}
	if got, want := hex.EncodeToString(k[:]), "0102"+"03"+"03040506"+"01020300000000000000000000000010"; got != want {
		t.Errorf("key %s, want %s", got, want)
	}
	if got, want := hex.EncodeToString(g.Append(nil)), "0000000000010000"+"2c01000000000000"+"0700000000000000"+"0000000002000000"; got != want {
		t.Errorf("record %s, want %s", got, want)
	}
	key, err := DecodeKey(k[:])
	if err != nil || key.Kind != KindGrant || key.Shard != 0x102 || key.Volume != 0x3040506 || key.Store != (sealfs.UUID{1, 2, 3, 15: 16}) {
		t.Errorf("the key is read as %+v, %v", key, err)
	}
}

// TestGrants notes, changes and forgets rows of more stores than one step forgets.
func TestGrants(t *testing.T) {
	f := newFixture(t, 8)
	shard := sealfs.Shard(3)
	want := map[sealfs.UUID]Grant{}
	for i := range 2*FreeMax + 5 {
		id := sealfs.UUID{byte(i), byte(i >> 8), 1}
		want[id] = Grant{Bytes: int64(i), Inodes: int64(i + 1), Version: uint64(i + 1), Since: 9}
		g := want[id]
		f.ok(op.Request{Type: op.Grant, Shard: shard, Volume: 2, Data: id[:], Off: uint64(g.Bytes), Len: uint64(g.Inodes), Gen: g.Version, Size: g.Since})
	}
	first := sealfs.UUID{0, 0, 1}
	want[first] = Grant{Bytes: 1 << 50, Version: 2, Since: 10}
	f.ok(op.Request{Type: op.Grant, Shard: shard, Volume: 2, Data: first[:], Off: 1 << 50, Gen: 2, Size: 10})
	f.ok(op.Request{Type: op.Grant, Shard: shard, Volume: 3, Data: first[:], Gen: 1})
	grants := func(v sealfs.Volume) map[sealfs.UUID]Grant {
		got := map[sealfs.UUID]Grant{}
		if err := Grants(f.r, shard, v, func(id sealfs.UUID, g Grant) { got[id] = g }); err != nil {
			t.Fatal(err)
		}
		return got
	}
	if !maps.Equal(grants(2), want) {
		t.Errorf("%d rows are read, or others than were written", len(grants(2)))
	}
	for _, req := range []op.Request{
		{Gen: 1}, {Gen: 1, Data: first[:15]}, {Gen: 1, Data: append(first[:], 1)}, {Gen: 1, Data: make([]byte, 16)}, {Data: first[:]},
		{Gen: 1, Data: first[:], Off: 1 << 63}, {Gen: 1, Data: first[:], Len: 1 << 63},
	} {
		req.Type, req.Shard, req.Volume = op.Grant, shard, 2
		f.refused(sealfs.ErrInvalid, req)
	}
	steps := 0
	for done := false; !done; steps++ {
		done = f.ok(op.Request{Type: op.DropVolume, Shard: shard, Volume: 2}).Eof
	}
	if steps != 3 || len(grants(2)) != 0 || len(grants(3)) != 1 {
		t.Errorf("after %d steps there are %d rows of the volume and %d of another", steps, len(grants(2)), len(grants(3)))
	}
}
