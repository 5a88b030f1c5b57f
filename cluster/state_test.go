package cluster

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"errors"
	"reflect"
	"strings"
	"testing"
	"time"

	"sealfs"
	"sealfs/internal/enc"
)

func testID(n byte) (u sealfs.UUID) {
	for i := range u {
		u[i] = n<<4 | byte(i)
	}
	return u
}

// testMap is a small map in which every field has a value of its own.
func testMap() *Map {
	return &Map{
		Version: 300, Cluster: testID(1), Name: "lab", Shards: 4, Replicas: 2, OpVersion: 3, NextVolume: 9,
		Stores: []StoreInfo{
			{ID: testID(2), Addr: "10.0.0.1:7000", Host: "a", Rack: "r1", Weight: 100, Bytes: 100 << 30, State: StoreUp},
			{ID: testID(3), Addr: "10.0.0.2:7000", Host: "b", Rack: "r2", Weight: 200, Bytes: 200 << 30, State: StoreSuspect, Server: testID(4), Bad: true},
		},
		Volumes: []VolumeInfo{
			{
				ID: 1, Name: "home", Bytes: 1 << 40, Inodes: 1000, Root: 64, State: VolumeReady, Created: time.Unix(1_700_000_000, 5).UTC(),
				Mode: 0o755, UID: 1000, GID: 100, Since: 300,
			},
			{ID: 8, Name: "new.vol", State: VolumeCreating, Created: time.Unix(0, -7).UTC(), Mode: 0o700},
		},
		Table: []ShardInfo{{[]uint16{0, 1}, 1}, {[]uint16{1, 0}, 2}, {[]uint16{1}, 200}, {nil, 0}},
	}
}

const goldenMap = `
5345414c46536331 0300 0000 d6000000 3510023e
ac02 101112131415161718191a1b1c1d1e1f 036c6162 04 02 03 09
02
 202122232425262728292a2b2c2d2e2f 0d31302e302e302e313a37303030 0161 027231 64 80808080 9003 01
 00000000000000000000000000000000 00
 303132333435363738393a3b3c3d3e3f 0d31302e302e302e323a37303030 0162 027232 c801 80808080 a006 02
 404142434445464748494a4b4c4d4e4f 01
02
 01 04686f6d65 808080808020 e807 40 02 8a80d0e2c6bfce972f ed03 e807 64 ac02
 08 076e65772e766f6c 00 00 00 01 0d c003 00 00 00
02 00 01 01  02 01 00 02  01 01 c801  00 00`

// goldenMap2 is testMap as the second version had it: it is not known since when quotas hold.
const goldenMap2 = `
5345414c46536331 0200 0000 d3000000 eb0a14f4
ac02 101112131415161718191a1b1c1d1e1f 036c6162 04 02 03 09
02
 202122232425262728292a2b2c2d2e2f 0d31302e302e302e313a37303030 0161 027231 64 80808080 9003 01
 00000000000000000000000000000000 00
 303132333435363738393a3b3c3d3e3f 0d31302e302e302e323a37303030 0162 027232 c801 80808080 a006 02
 404142434445464748494a4b4c4d4e4f 01
02
 01 04686f6d65 808080808020 e807 40 02 8a80d0e2c6bfce972f ed03 e807 64
 08 076e65772e766f6c 00 00 00 01 0d c003 00 00
02 00 01 01  02 01 00 02  01 01 c801  00 00`

// goldenMap1 is testMap as the first version had it: without servers, and nothing is bad.
const goldenMap1 = `
5345414c46536331 0100 0000 b1000000 47ec4c26
ac02 101112131415161718191a1b1c1d1e1f 036c6162 04 02 03 09
02
 202122232425262728292a2b2c2d2e2f 0d31302e302e302e313a37303030 0161 027231 64 80808080 9003 01
 303132333435363738393a3b3c3d3e3f 0d31302e302e302e323a37303030 0162 027232 c801 80808080 a006 02
02
 01 04686f6d65 808080808020 e807 40 02 8a80d0e2c6bfce972f ed03 e807 64
 08 076e65772e766f6c 00 00 00 01 0d c003 00 00
02 00 01 01  02 01 00 02  01 01 c801  00 00`

func TestMapGolden(t *testing.T) {
	got := hex.EncodeToString(testMap().Encode())
	if want := strings.Join(strings.Fields(goldenMap), ""); got != want {
		t.Errorf("the format of maps changed: it needs another version\ngot  %s\nwant %s", got, want)
	}
}

// TestMapVersion2 reads what the second version wrote.
func TestMapVersion2(t *testing.T) {
	b, err := hex.DecodeString(strings.Join(strings.Fields(goldenMap2), ""))
	if err != nil {
		t.Fatal(err)
	}
	want := testMap()
	want.Volumes[0].Since = 0
	if got, err := Decode(b); err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("Decode = %+v, %v", got, err)
	}
}

// TestMapVersion1 reads what the first version wrote.
func TestMapVersion1(t *testing.T) {
	b, err := hex.DecodeString(strings.Join(strings.Fields(goldenMap1), ""))
	if err != nil {
		t.Fatal(err)
	}
	want := testMap()
	want.Volumes[0].Since = 0
	want.Stores[1].Server, want.Stores[1].Bad = sealfs.UUID{}, false
	if got, err := Decode(b); err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("Decode = %+v, %v", got, err)
	}
	if got, sessions, err := decodeState(b); err != nil || !reflect.DeepEqual(got, want) || sessions.next != 1 {
		t.Errorf("as a snapshot: %+v, %+v, %v", got, sessions, err)
	}
}

// TestStateGolden freezes the snapshot's second half.
func TestStateGolden(t *testing.T) {
	table := &sessionTable{version: 300, next: 9, live: []Session{
		{ID: 3, SessionInfo: SessionInfo{Volume: "home", Host: "h", Mount: "/m", PID: 300}, Opened: time.Unix(0, 3).UTC()}, {ID: 8, Opened: time.Unix(0, -7).UTC()},
	}}
	b := encodeState(testMap(), table)
	rest, ok := bytes.CutPrefix(b, testMap().Encode())
	want := "5345414c46536e31" + "0100" + "0000" + "18000000" + "5e2f9323" + "ac02" + "09" + "02" +
		"03" + "04686f6d65" + "0168" + "022f6d" + "ac02" + "06" + "08" + "00" + "00" + "00" + "00" + "0d"
	if got := hex.EncodeToString(rest); !ok || got != want {
		t.Errorf("the format of snapshots changed: it needs another version\ngot  %s\nwant %s", got, want)
	}
	if m, got, err := decodeState(b); err != nil || !reflect.DeepEqual(m, testMap()) || !reflect.DeepEqual(got, table) {
		t.Errorf("read back: %+v, %+v, %v", m, got, err)
	}
	for bit := range len(b) * 8 {
		b[bit/8] ^= 1 << (bit % 8)
		if _, _, err := decodeState(b); !errors.Is(err, sealfs.ErrCorrupt) && !errors.Is(err, sealfs.ErrVersion) {
			t.Fatalf("bit %d flipped: %v", bit, err)
		}
		b[bit/8] ^= 1 << (bit % 8)
	}
	for n := range b {
		if _, _, err := decodeState(b[:n]); !errors.Is(err, sealfs.ErrCorrupt) {
			t.Fatalf("cut to %d bytes: %v", n, err)
		}
	}
	table.live[1].ID = 9
	if _, _, err := decodeState(encodeState(testMap(), table)); !errors.Is(err, sealfs.ErrCorrupt) {
		t.Errorf("a session from the future: %v", err)
	}
}

func TestMapRoundTrip(t *testing.T) {
	m := testMap()
	got, err := Decode(m.Encode())
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(got, m) {
		t.Errorf("got  %+v\nwant %+v", got, m)
	}
}

func TestMapDamage(t *testing.T) {
	good := testMap().Encode()
	b := bytes.Clone(good)
	for bit := range len(b) * 8 {
		b[bit/8] ^= 1 << (bit % 8)
		_, err := Decode(b)
		if !errors.Is(err, sealfs.ErrCorrupt) && !errors.Is(err, sealfs.ErrVersion) {
			t.Fatalf("bit %d flipped: %v", bit, err)
		}
		b[bit/8] ^= 1 << (bit % 8)
	}
	for n := range good {
		if _, err := Decode(good[:n]); !errors.Is(err, sealfs.ErrCorrupt) {
			t.Fatalf("cut to %d bytes: %v", n, err)
		}
	}
	if _, err := Decode(append(b, 0)); !errors.Is(err, sealfs.ErrCorrupt) {
		t.Errorf("a byte too many: %v", err)
	}
}

func TestMapVersion(t *testing.T) {
	b := testMap().Encode()
	b[8] = stateVersion + 1
	_, err := Decode(b)
	if !errors.Is(err, sealfs.ErrVersion) || !strings.Contains(err.Error(), "version 4") {
		t.Errorf("got %v", err)
	}
}

// TestMapRules breaks each rule that a decoded map must keep.
func TestMapRules(t *testing.T) {
	for name, damage := range map[string]func(m *Map){
		"no version":          func(m *Map) { m.Version = 0 },
		"no cluster":          func(m *Map) { m.Cluster = sealfs.UUID{} },
		"bad name":            func(m *Map) { m.Name = "a b" },
		"shards":              func(m *Map) { m.Shards, m.Table = 3, m.Table[:3] },
		"replicas":            func(m *Map) { m.Replicas = ReplicasMax + 1 },
		"store twice":         func(m *Map) { m.Stores[1].ID = m.Stores[0].ID },
		"store state":         func(m *Map) { m.Stores[1].State = 0 },
		"volume order":        func(m *Map) { m.Volumes[0].ID = 8 },
		"volume too new":      func(m *Map) { m.NextVolume = 8 },
		"volume name":         func(m *Map) { m.Volumes[1].Name = "-x" },
		"volume names":        func(m *Map) { m.Volumes[1].Name = "home" },
		"volume state":        func(m *Map) { m.Volumes[1].State = 4 },
		"ready without root":  func(m *Map) { m.Volumes[1].State = VolumeReady },
		"root too large":      func(m *Map) { m.Volumes[0].Root = sealfs.InoMax + 1 },
		"mode":                func(m *Map) { m.Volumes[0].Mode = 1 << 16 },
		"shard names a store": func(m *Map) { m.Table[0].Replicas[0] = 2 },
		"store twice in row":  func(m *Map) { m.Table[0].Replicas[0] = 1 },
	} {
		m := testMap()
		damage(m)
		if _, err := Decode(m.Encode()); !errors.Is(err, sealfs.ErrCorrupt) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestMapJSON(t *testing.T) {
	b, err := json.Marshal(testMap())
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		`"next_volume":9`, `"state":"suspect"`, `"state":"creating"`, `"created":"2023-11-14T22:13:20.000000005Z"`,
		`"table":[{"replicas":[0,1],"epoch":1}`, `"cluster":"10111213-1415-1617-1819-1a1b1c1d1e1f"`,
	} {
		if !strings.Contains(string(b), want) {
			t.Errorf("%s is not in %s", want, b)
		}
	}
	var m Map
	if err := json.Unmarshal(b, &m); err != nil || !reflect.DeepEqual(&m, testMap()) {
		t.Errorf("read back: %v, %+v", err, m)
	}
	if err := json.Unmarshal([]byte(`{"stores":[{"state":"sideways"}]}`), &m); !errors.Is(err, sealfs.ErrInvalid) {
		t.Errorf("unknown state: %v", err)
	}
}

// seal puts a right header before a body, so that fuzzing gets beyond it.
func seal(body []byte) []byte {
	b := enc.AppendU32(append([]byte(stateMagic), stateVersion, 0, 0, 0), uint32(len(body)))
	return append(enc.AppendU32(b, enc.CRC(enc.CRC(0, b), body)), body...)
}

func FuzzDecode(f *testing.F) {
	f.Add(testMap().Encode()[stateHeader:])
	f.Fuzz(func(t *testing.T, body []byte) {
		if _, err := Decode(body); err == nil && len(body) < stateHeader {
			t.Fatal("less than a header decodes")
		}
		b := seal(body)
		if m, err := Decode(b); err == nil && !bytes.Equal(m.Encode(), b) {
			t.Fatalf("the encoding %x is not unique", b)
		}
	})
}

func FuzzState(f *testing.F) {
	m := testMap().Encode()
	table := &sessionTable{version: 2, next: 9, live: []Session{{ID: 3, SessionInfo: SessionInfo{Volume: "home", Host: "h", Mount: "/m", PID: 300}, Opened: time.Unix(0, 3).UTC()}}}
	f.Add(encodeState(testMap(), table)[len(m)+stateHeader:])
	f.Fuzz(func(t *testing.T, body []byte) {
		if _, _, err := decodeState(body); err == nil {
			t.Fatal("a body without a header decodes")
		}
		b := append(make([]byte, stateHeader), body...)
		sealBlock(b, sessionsMagic, sessionsVersion)
		b = append(bytes.Clone(m), b...)
		if m, table, err := decodeState(b); err == nil && !bytes.Equal(encodeState(m, table), b) {
			t.Fatalf("the encoding %x is not unique", body)
		}
	})
}

func TestCheckName(t *testing.T) {
	for name, want := range map[string]error{
		"a": nil, "A-b_c.9": nil, strings.Repeat("x", 64): nil, "0": nil,
		"": sealfs.ErrInvalid, strings.Repeat("x", 65): sealfs.ErrNameTooLong,
		".": sealfs.ErrInvalid, "..": sealfs.ErrInvalid, ".x": sealfs.ErrInvalid, "-x": sealfs.ErrInvalid,
		"a/b": sealfs.ErrInvalid, "a b": sealfs.ErrInvalid, "ä": sealfs.ErrInvalid, "a\x00": sealfs.ErrInvalid, "a@b": sealfs.ErrInvalid,
	} {
		if err := CheckName(name); !errors.Is(err, want) {
			t.Errorf("CheckName(%q) = %v, want %v", name, err, want)
		}
	}
}
