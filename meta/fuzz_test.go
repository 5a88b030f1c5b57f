package meta

import (
	"bytes"
	"testing"

	"sealfs/op"
)

// Every decoder must refuse bytes or give back what encodes to the same bytes.

func FuzzKey(f *testing.F) {
	lock := LockKey(4, 77, 1, 5, 6, 7)
	entry := EntryKey(4, 77, 1<<20)
	attr := AttributeKey(4, 77, 5, 6, 7)
	session := SessionKey(3, 4, 5)
	part := PartKey(3, 77)
	for _, k := range [][]byte{lock[:], entry[:], attr[:], session[:], part[:], {0, 0, 1}, {0, 0, 2, 0, 0, 0, 1}, {}, {1}} {
		f.Add(k)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		k, err := DecodeKey(b)
		if err != nil {
			if !isCorrupt(err) {
				t.Fatal(err)
			}
		} else if got := k.Append(nil); !bytes.Equal(got, b) {
			t.Fatalf("%x becomes %+v becomes %x", b, k, got)
		}
	})
}

func FuzzInode(f *testing.F) {
	in := Inode{Mode: typeFile | 0o644, Nlink: 2, UID: 1, GID: 1000, Size: 4096, Bytes: 9000, Btime: 1, Atime: 3, Mtime: 2, Ctime: 4, Version: 200, Volume: 1, Names: 5, Flags: flagTail}
	in.First = Extent{Len: 4000, Cover: 4096, Addr: 1 << 40, Stamp: 7, Sums: []byte{1, 2, 3, 4}}
	f.Add(in.Append(nil))
	in.Gen, in.Bound, in.Cut = 3, 1<<30, 1<<31
	f.Add(in.Append(nil))
	in = Inode{Mode: typeDir, Nlink: 3, Parent: 5, Size: 7}
	f.Add(in.Append(nil))
	in = Inode{Mode: typeLink, Nlink: 1, Size: 3, Target: []byte("abc")}
	f.Add(in.Append(nil))
	in = Inode{Mode: typeChar, Nlink: 1, Rdev: 3, Volume: 1 << 20}
	f.Add(in.Append(nil))
	f.Fuzz(func(t *testing.T, b []byte) {
		var in Inode
		if err := DecodeInode(b, 9, &in); err != nil {
			if !isCorrupt(err) {
				t.Fatal(err)
			}
			return
		}
		if got := in.Append(nil); !bytes.Equal(got, b) || len(got) > inodeRecordMax {
			t.Fatalf("%x becomes %+v becomes %x", b, in, got)
		}
		// A record that owns what it holds does not need the page any more.
		page := bytes.Clone(b)
		if err := DecodeInode(page, 9, &in); err != nil {
			t.Fatal(err)
		}
		in.own()
		clear(page)
		if got := in.Append(nil); !bytes.Equal(got, b) {
			t.Fatalf("%x becomes %x when owned", b, got)
		}
	})
}

func FuzzExtent(f *testing.F) {
	e := Extent{Len: 5000, Cover: 1000, Addr: 1 << 40, Stamp: 7, Sums: make([]byte, 8)}
	f.Add(e.Append(nil), uint64(9))
	e.Cover = 0
	f.Add(e.Append(nil), uint64(1))
	f.Fuzz(func(t *testing.T, b []byte, last uint64) {
		var e Extent
		if err := DecodeExtent(b, last, &e); err != nil {
			if !isCorrupt(err) {
				t.Fatal(err)
			}
			return
		}
		if got := e.Append(nil); !bytes.Equal(got, b) || e.lastBlock() != last || len(e.Sums) != 4*e.Blocks() || e.Stored() < e.Len || len(got) > extentRecordMax {
			t.Fatalf("%x at %d becomes %+v becomes %x", b, last, e, got)
		}
	})
}

func FuzzEntry(f *testing.F) {
	e := Entry{Ino: 300, Type: 8, Name: []byte("name")}
	f.Add(e.Append(nil))
	f.Fuzz(func(t *testing.T, b []byte) {
		var e Entry
		if err := DecodeEntry(b, 1, 256, &e); err != nil {
			if !isCorrupt(err) {
				t.Fatal(err)
			}
		} else if got := e.Append(nil); !bytes.Equal(got, b) {
			t.Fatalf("%x becomes %+v becomes %x", b, e, got)
		}
	})
}

func FuzzAttribute(f *testing.F) {
	a := Attribute{Name: []byte("user.a"), Total: 5, Value: []byte("value")}
	f.Add(a.Append(nil))
	a = Attribute{Name: []byte("user.a"), Total: 50000, Value: make([]byte, attrPart-attrHead(6, 50000))}
	f.Add(a.Append(nil))
	f.Fuzz(func(t *testing.T, b []byte) {
		var a Attribute
		if err := DecodeAttribute(b, &a); err != nil {
			if !isCorrupt(err) {
				t.Fatal(err)
			}
		} else if got := a.Append(nil); !bytes.Equal(got, b) || len(got) > attrPart {
			t.Fatalf("%x becomes %+v becomes %x", b, a, got)
		}
	})
}

// FuzzRow covers the small records, chosen by the first byte.
func FuzzRow(f *testing.F) {
	s := ShardState{Epoch: 1, Seq: 2, Time: 3, Counter: 16}
	u := Usage{5, 6}
	l := LockRow{Lock: op.Lock{Type: op.WriteLock, Start: 3, End: 5, PID: 7}}
	st := SessionState{Low: 4, Rows: 3}
	w := ResultRow{Ino: 300, Off: 1 << 40, Held: 7, Eof: true}
	g := Grant{Bytes: 5, Inodes: 6, Version: 7, Since: 8}
	for i, b := range [][]byte{s.Append(nil), u.Append(nil), l.Append(nil), st.Append(nil), w.Append(nil), {3}, g.Append(nil)} {
		f.Add(append([]byte{byte(i)}, b...))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) == 0 {
			return
		}
		var got []byte
		var err error
		which, b := b[0], b[1:]
		switch which {
		case 0:
			var s ShardState
			s, err = DecodeShardState(b)
			got = s.Append(nil)
		case 1:
			var u Usage
			u, err = DecodeUsage(b)
			got = u.Append(nil)
		case 2:
			var l LockRow
			l, err = DecodeLock(b, &Key{Kind: KindLock, Ino: 5, Pos: 3})
			got = l.Append(nil)
		case 3:
			var s SessionState
			s, err = DecodeSession(b)
			got = s.Append(nil)
		case 4:
			var w ResultRow
			w, err = DecodeResult(b)
			got = w.Append(nil)
		case 5:
			var nameless, tail bool
			nameless, tail, err = DecodeOrphan(b)
			var why byte
			if nameless {
				why |= orphanNameless
			}
			if tail {
				why |= orphanTail
			}
			got = []byte{why}
		case 6:
			var g Grant
			g, err = DecodeGrant(b)
			got = g.Append(nil)
		default:
			return
		}
		if err != nil {
			if !isCorrupt(err) {
				t.Fatal(err)
			}
		} else if !bytes.Equal(got, b) {
			t.Fatalf("record %d: %x becomes %x", which, b, got)
		}
	})
}
