package cluster

import (
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/raft"

	"sealfs"
)

func initCommand() command {
	return command{kind: cmdInit, init: Map{Cluster: testID(1), Name: "lab", Shards: 64, Replicas: 2, OpVersion: 1}}
}

// goldenCommands has one command of each kind with its encoding.
var goldenCommands = []struct {
	c   command
	hex string
}{
	{initCommand(), "0101" + "101112131415161718191a1b1c1d1e1f" + "036c6162" + "40" + "02" + "01"},
	{
		command{kind: cmdStore, store: StoreInfo{ID: testID(2), Addr: "h:1", Host: "h", Rack: "r", Weight: 300, Bytes: 5}},
		"0102" + "202122232425262728292a2b2c2d2e2f" + "03683a31" + "0168" + "0172" + "ac02" + "05",
	},
	{command{kind: cmdStoreState, store: StoreInfo{ID: testID(2), State: StoreDown}}, "0103" + "202122232425262728292a2b2c2d2e2f" + "03"},
	{
		command{kind: cmdCreateVolume, volume: VolumeInfo{Name: "v", Bytes: 128, Inodes: 2, Created: time.Unix(0, 3).UTC(), Mode: 0o755, UID: 4, GID: 5}},
		"0104" + "0176" + "8001" + "02" + "06" + "ed03" + "04" + "05",
	},
	{command{kind: cmdVolumeReady, volume: VolumeInfo{ID: 7, Root: 300}}, "0105" + "07" + "ac02"},
	{command{kind: cmdResizeVolume, volume: VolumeInfo{ID: 7, Bytes: 1, Inodes: 2}}, "0106" + "07" + "01" + "02"},
	{command{kind: cmdDeleteVolume, volume: VolumeInfo{ID: 7}}, "0107" + "07"},
	{command{kind: cmdVolumeDeleted, volume: VolumeInfo{ID: 7}}, "0108" + "07"},
	{
		command{kind: cmdServeStore, store: StoreInfo{ID: testID(2), Addr: "h:1", Host: "h", Rack: "r", Weight: 300, Bytes: 5, Server: testID(3)}},
		"0109" + "303132333435363738393a3b3c3d3e3f" + "202122232425262728292a2b2c2d2e2f" + "03683a31" + "0168" + "0172" + "ac02" + "05",
	},
	{command{kind: cmdSetStore, store: StoreInfo{ID: testID(2), Weight: 7, Bad: true}}, "010a" + "202122232425262728292a2b2c2d2e2f" + "07" + "01"},
	{
		command{kind: cmdOpenSession, session: Session{SessionInfo: SessionInfo{Volume: "v", Host: "h", Mount: "/m", PID: 300}, Opened: time.Unix(0, 3).UTC()}},
		"010b" + "0176" + "0168" + "022f6d" + "ac02" + "06",
	},
	{command{kind: cmdEndSessions, ended: []sealfs.Session{1, 300}}, "010c" + "02" + "01" + "ac02"},
	{
		command{kind: cmdMakeVolume, volume: VolumeInfo{Name: "v", Bytes: 128, Inodes: 2, Created: time.Unix(0, 3).UTC(), Mode: 0o755, UID: 4, GID: 5}},
		"010d" + "0176" + "8001" + "02" + "06" + "ed03" + "04" + "05",
	},
	{command{kind: cmdSetQuota, volume: VolumeInfo{ID: 7, Bytes: 1, Inodes: 2}}, "010e" + "07" + "01" + "02"},
}

func TestCommandGolden(t *testing.T) {
	for _, g := range goldenCommands {
		b := g.c.encode()
		if hex.EncodeToString(b) != g.hex {
			t.Errorf("kind %d: got %x, want %s", g.c.kind, b, g.hex)
		}
		if c, err := decodeCommand(b); err != nil || !reflect.DeepEqual(*c, g.c) {
			t.Errorf("kind %d decodes to %+v, %v", g.c.kind, c, err)
		}
		for n := range b {
			if _, err := decodeCommand(b[:n]); !errors.Is(err, sealfs.ErrCorrupt) {
				t.Errorf("kind %d cut to %d bytes: %v", g.c.kind, n, err)
			}
		}
		if _, err := decodeCommand(append(b, 0)); !errors.Is(err, sealfs.ErrCorrupt) {
			t.Errorf("kind %d with a byte too many: %v", g.c.kind, err)
		}
	}
}

func TestCommandVersion(t *testing.T) {
	for b, want := range map[string]string{"\x02\x01": "format 2", "\x01\xc8": "kind 200", "\x01\x00": "kind 0"} {
		if _, err := decodeCommand([]byte(b)); !errors.Is(err, sealfs.ErrVersion) || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v", b, err)
		}
	}
}

func FuzzCommand(f *testing.F) {
	for _, g := range goldenCommands {
		f.Add(g.c.encode())
	}
	m, _ := apply(nil, &goldenCommands[0].c)
	m, _ = apply(m, &goldenCommands[1].c)
	f.Fuzz(func(t *testing.T, b []byte) {
		c, err := decodeCommand(b)
		if err != nil {
			return
		}
		if !bytes.Equal(c.encode(), b) {
			t.Fatalf("the encoding %x is not unique", b)
		}
		if c.init.Shards > 256 {
			return // right, but slow
		}
		if c.isSession() {
			before := newSessionTable()
			if after, r := before.apply(c); !after.ok() || r.err != nil && after != before {
				t.Fatalf("sessions after %+v: %+v, %v", c, after, r.err)
			}
			return
		}
		for _, before := range []*Map{nil, m} {
			after, r := apply(before, c)
			if r.err != nil && after != before {
				t.Fatal("a refused command changed the map")
			}
			if after != nil {
				if err := after.check(); err != nil {
					t.Fatal(err)
				}
			}
		}
	})
}

// world applies commands and checks after each that the map before is
// untouched and the map after keeps all rules.
type world struct {
	t *testing.T
	m *Map
}

func (w *world) do(c command) result {
	w.t.Helper()
	var before []byte
	if w.m != nil {
		before = w.m.Encode()
	}
	next, r := apply(w.m, &c)
	switch {
	case w.m != nil && !bytes.Equal(before, w.m.Encode()):
		w.t.Fatalf("kind %d changed the map it was given", c.kind)
	case r.err != nil && next != w.m:
		w.t.Fatalf("kind %d: refused with %v, but the map changed", c.kind, r.err)
	case w.m != nil && next != w.m && next.Version != w.m.Version+1:
		w.t.Fatalf("kind %d: version %d after %d", c.kind, next.Version, w.m.Version)
	}
	if next != nil {
		if err := next.check(); err != nil {
			w.t.Fatalf("kind %d: %v", c.kind, err)
		}
	}
	w.m = next
	return r
}

func (w *world) must(c command) VolumeInfo {
	w.t.Helper()
	r := w.do(c)
	if r.err != nil {
		w.t.Fatal(r.err)
	}
	return r.volume
}

func (w *world) refused(c command, want sealfs.Code, say string) {
	w.t.Helper()
	if r := w.do(c); !errors.Is(r.err, want) || !strings.Contains(fmt.Sprint(r.err), say) {
		w.t.Errorf("kind %d: got %v, want %v with %q", c.kind, r.err, want, say)
	}
}

func storeCommand(n byte) command {
	return command{kind: cmdStore, store: StoreInfo{ID: testID(n), Host: fmt.Sprint("h", n), Weight: 10}}
}

func stateCommand(n byte, s StoreState) command {
	return command{kind: cmdStoreState, store: StoreInfo{ID: testID(n), State: s}}
}

func volumeCommand(k commandKind, v VolumeInfo) command { return command{kind: k, volume: v} }

func TestApply(t *testing.T) {
	w := &world{t: t}
	create := func(name string) command {
		return volumeCommand(cmdCreateVolume, VolumeInfo{Name: name, Mode: 0o755, Created: time.Unix(1, 0).UTC()})
	}
	w.refused(storeCommand(2), sealfs.ErrUnavailable, "not initialised")
	bad := initCommand()
	bad.init.Shards, bad.init.Replicas = 5, 0
	w.refused(bad, sealfs.ErrInvalid, "0 replicas")
	w.must(initCommand())
	w.refused(initCommand(), sealfs.ErrExist, "exists")
	w.refused(create("early"), sealfs.ErrUnavailable, "no stores")

	w.must(storeCommand(2))
	if row := w.m.Table[5]; len(row.Replicas) != 1 || row.Epoch != 1 {
		t.Errorf("with one store: %+v", row)
	}
	w.must(storeCommand(3))
	for s, row := range w.m.Table {
		if len(row.Replicas) != 2 || row.Epoch != 2 {
			t.Fatalf("with two stores, shard %d: %+v", s, row)
		}
	}
	version := w.m.Version
	w.must(storeCommand(3))
	w.must(stateCommand(3, StoreUp))
	if w.m.Version != version {
		t.Error("commands without an effect changed the version")
	}
	w.refused(stateCommand(9, StoreUp), sealfs.ErrNotExist, "not in the cluster")
	w.refused(stateCommand(3, 77), sealfs.ErrInvalid, "state 77")
	w.must(storeCommand(4))
	w.must(stateCommand(4, StoreLeft))
	w.refused(storeCommand(4), sealfs.ErrExist, "for ever")
	w.refused(stateCommand(4, StoreUp), sealfs.ErrInvalid, "for ever")
	for s, row := range w.m.Table {
		if len(row.Replicas) != 2 || row.Replicas[0] == 2 || row.Replicas[1] == 2 {
			t.Fatalf("after store 4 left, shard %d: %+v", s, row)
		}
	}

	v := w.must(create("home"))
	if v.ID != 1 || v.State != VolumeCreating || v.Mode != 0o755 {
		t.Errorf("created %+v", v)
	}
	w.refused(create("home"), sealfs.ErrExist, `volume "home" (creating)`)
	w.refused(create(".."), sealfs.ErrInvalid, "reserved")
	w.refused(volumeCommand(cmdVolumeReady, VolumeInfo{ID: 1}), sealfs.ErrInvalid, "inode 0")
	w.refused(volumeCommand(cmdVolumeReady, VolumeInfo{ID: 5, Root: 64}), sealfs.ErrNotExist, "volume 5")
	if v = w.must(volumeCommand(cmdVolumeReady, VolumeInfo{ID: 1, Root: 64})); v.State != VolumeReady || v.Root != 64 {
		t.Errorf("ready %+v", v)
	}
	w.must(volumeCommand(cmdVolumeReady, VolumeInfo{ID: 1, Root: 64}))
	w.refused(volumeCommand(cmdVolumeReady, VolumeInfo{ID: 1, Root: 65}), sealfs.ErrExist, "another root")
	if v = w.must(volumeCommand(cmdResizeVolume, VolumeInfo{ID: 1, Bytes: 5, Inodes: 6})); v.Bytes != 5 || v.Inodes != 6 {
		t.Errorf("resized %+v", v)
	}

	// There is data now: the table must not change under it.
	table := w.m.Table
	w.must(storeCommand(5))
	w.refused(stateCommand(3, StoreLeft), sealfs.ErrBusy, "holds shards")
	w.must(stateCommand(5, StoreLeft))
	if !reflect.DeepEqual(table, w.m.Table) {
		t.Error("the table changed after the first volume")
	}

	w.refused(volumeCommand(cmdVolumeDeleted, VolumeInfo{ID: 1}), sealfs.ErrInvalid, "not deleting")
	w.must(volumeCommand(cmdDeleteVolume, VolumeInfo{ID: 1}))
	w.must(volumeCommand(cmdDeleteVolume, VolumeInfo{ID: 1}))
	w.refused(create("home"), sealfs.ErrExist, "deleting")
	w.refused(volumeCommand(cmdResizeVolume, VolumeInfo{ID: 1}), sealfs.ErrBusy, "being deleted")
	w.refused(volumeCommand(cmdVolumeReady, VolumeInfo{ID: 1, Root: 64}), sealfs.ErrBusy, "being deleted")
	w.must(volumeCommand(cmdVolumeDeleted, VolumeInfo{ID: 1}))
	w.refused(volumeCommand(cmdVolumeDeleted, VolumeInfo{ID: 1}), sealfs.ErrNotExist, "no such volume")
	if v = w.must(create("home")); v.ID != 2 {
		t.Errorf("the number of a deleted volume was used again: %+v", v)
	}
}

// TestQuotaSince wants the map to say since when there is a quota of what there was none of before.
func TestQuotaSince(t *testing.T) {
	m, _ := apply(nil, &goldenCommands[0].c)
	m, _ = apply(m, &goldenCommands[1].c)
	add := func(kind commandKind, name string, bytes, inodes uint64) VolumeInfo {
		t.Helper()
		c := volumeCommand(kind, VolumeInfo{Name: name, Bytes: bytes, Inodes: inodes, Mode: 0o755, Created: time.Unix(1, 0).UTC()})
		next, r := apply(m, &c)
		if r.err != nil {
			t.Fatal(r.err)
		}
		m = next
		return r.volume
	}
	for name, want := range map[string]uint64{"free": 0, "bytes": BornLimited, "inodes": BornLimited} {
		bytes, inodes := uint64(0), uint64(0)
		switch name {
		case "bytes":
			bytes = 1
		case "inodes":
			inodes = 1
		}
		if v := add(cmdMakeVolume, name, bytes, inodes); v.Since != want {
			t.Errorf("a volume with a quota of %s holds it since %d", name, v.Since)
		}
	}
	if v := add(cmdCreateVolume, "old", 5, 5); v.Since != 0 {
		t.Errorf("the log of an older program says since %d", v.Since)
	}
	v := add(cmdMakeVolume, "v", 0, 0)
	since := uint64(0)
	for _, step := range []struct {
		bytes, inodes uint64
		begins        bool
	}{{5, 0, true}, {6, 0, false}, {3, 0, false}, {3, 7, true}, {0, 7, false}, {0, 0, false}, {0, 7, true}, {1, 7, true}, {1, 7, false}} {
		c := volumeCommand(cmdSetQuota, VolumeInfo{ID: v.ID, Bytes: step.bytes, Inodes: step.inodes})
		next, r := apply(m, &c)
		m = next
		if step.begins {
			since = m.Version
		}
		if r.err != nil || r.volume.Since != since || r.volume.Bytes != step.bytes || r.volume.Inodes != step.inodes {
			t.Errorf("%+v: %+v, %v, want it since %d", step, r.volume, r.err, since)
		}
	}
}

// randomCommand proposes anything, mostly about things that exist.
func randomCommand(r *rand.Rand) command {
	v := VolumeInfo{
		ID: sealfs.Volume(r.IntN(12)), Name: fmt.Sprint("v", r.IntN(8)), Bytes: r.Uint64(), Inodes: r.Uint64(),
		Root: sealfs.Ino(r.IntN(4) * 64), Mode: 0o700, Created: time.Unix(0, r.Int64()).UTC(),
	}
	switch k := commandKind(r.IntN(15)); k {
	case cmdInit:
		return initCommand()
	case cmdServeStore:
		return command{kind: k, store: StoreInfo{ID: testID(byte(r.IntN(6))), Server: testID(byte(r.IntN(2))), Addr: fmt.Sprint("a:", r.IntN(3)), Weight: 1 + r.Uint32N(9)}}
	case cmdSetStore:
		return command{kind: k, store: StoreInfo{ID: testID(byte(r.IntN(6))), Weight: r.Uint32N(9), Bad: r.IntN(2) == 0}}
	case cmdOpenSession:
		return command{kind: k, session: Session{SessionInfo: SessionInfo{Volume: fmt.Sprint("v", r.IntN(8)), Mount: "/m", PID: r.IntN(9)}, Opened: v.Created}}
	case cmdEndSessions:
		return command{kind: k, ended: []sealfs.Session{sealfs.Session(r.IntN(12)), sealfs.Session(r.IntN(12))}}
	case cmdStore:
		return storeCommand(byte(r.IntN(6)))
	case cmdStoreState:
		return stateCommand(byte(r.IntN(6)), StoreState(r.IntN(6)))
	default:
		c, err := decodeCommand((&command{kind: max(k, cmdCreateVolume), volume: v}).encode())
		if err != nil {
			panic(err)
		}
		return *c
	}
}

// TestDeterminism runs the same entries through two state machines, one of
// which is replaced by its own snapshot again and again.
func TestDeterminism(t *testing.T) {
	for seed := range uint64(20) {
		r := rand.New(rand.NewPCG(seed, 3))
		w := &world{t: t}
		one, two := newFSM(newLatch()), newFSM(newLatch())
		for i := range uint64(150) {
			c := randomCommand(r)
			if !c.isSession() {
				w.do(c)
			}
			entry := &raft.Log{Index: i + 1, Data: c.encode()}
			a, b := one.Apply(entry).(result), two.Apply(entry).(result)
			if a.volume != b.volume || a.session != b.session || fmt.Sprint(a.err) != fmt.Sprint(b.err) {
				t.Fatalf("seed %d: %v and %v", seed, a, b)
			}
			if one.m.Load() == nil {
				continue
			}
			if !bytes.Equal(one.encode(), two.encode()) || !bytes.Equal(one.m.Load().Encode(), w.m.Encode()) {
				t.Fatalf("seed %d: the maps differ after entry %d", seed, i)
			}
			if r.IntN(10) == 0 {
				three := newFSM(newLatch())
				if err := three.Restore(io.NopCloser(bytes.NewReader(two.encode()))); err != nil {
					t.Fatal(err)
				}
				two = three
			}
		}
	}
}

func (f *fsm) encode() []byte { return encodeState(f.m.Load(), f.sessions.Load()) }

// TestUnknownCommandStops: a manager that is too old must not go on.
func TestUnknownCommandStops(t *testing.T) {
	f := newFSM(newLatch())
	c := initCommand()
	if r := f.Apply(&raft.Log{Index: 1, Data: c.encode()}).(result); r.err != nil {
		t.Fatal(r.err)
	}
	if r := f.Apply(&raft.Log{Index: 2, Data: []byte{1, 99}}).(result); !errors.Is(r.err, sealfs.ErrVersion) {
		t.Errorf("got %v", r.err)
	}
	c = storeCommand(2)
	if r := f.Apply(&raft.Log{Index: 3, Data: c.encode()}).(result); !errors.Is(r.err, sealfs.ErrVersion) || len(f.m.Load().Stores) != 0 {
		t.Errorf("went on after an unknown command: %v", r.err)
	}
	if _, err := f.Snapshot(); !errors.Is(err, sealfs.ErrVersion) {
		t.Errorf("a snapshot without the command: %v", err)
	}
}

func TestRestoreRefuses(t *testing.T) {
	f := newFSM(newLatch())
	b := testMap().Encode()
	b[8] = 9
	if err := f.Restore(io.NopCloser(bytes.NewReader(b))); !errors.Is(err, sealfs.ErrVersion) || f.m.Load() != nil {
		t.Errorf("got %v", err)
	}
}
