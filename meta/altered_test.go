package meta

import (
	"testing"

	"sealfs"
	"sealfs/pmem"
)

// allRows returns all keys and values.
func (f *fixture) allRows() map[string]string {
	f.Helper()
	m := map[string]string{}
	var cur pmem.Cursor
	for ok := cur.Seek(f.r, []byte{0}); ok; ok = cur.Next() {
		m[string(cur.Key())] = string(cur.Value())
	}
	if err := cur.Err(); err != nil {
		f.Fatal(err)
	}
	return m
}

// visible returns an inode's record without what no session is told of it, or believes: totals.
func visible(t *testing.T, value string) string {
	t.Helper()
	if value == "" {
		return ""
	}
	var in Inode
	if err := DecodeInode([]byte(value), 1, &in); err != nil {
		t.Fatal(err)
	}
	in.Counted, in.Flags = false, in.Flags&^flagQueued
	return string(in.Append(nil))
}

// TestAltered: whatever a change alters, Config.Altered hears of.
func TestAltered(t *testing.T) {
	type what struct {
		ino  sealfs.Ino
		name string
	}
	heard, within, gone := map[what]bool{}, map[sealfs.Ino]bool{}, map[sealfs.Ino]bool{}
	m := newModel(t, Config{Shards: 4, Altered: func(ino sealfs.Ino, name string, lost bool) {
		heard[what{ino, name}] = true
		within[ino] = within[ino] || name != ""
		gone[ino] = gone[ino] || lost
	}}, 5)
	compared := map[Kind]int{}
	before := m.allRows()
	for step := range 2500 {
		clear(heard)
		clear(within)
		clear(gone)
		m.step(12)
		after := m.allRows()
		look := func(key, value, other string, known bool) {
			k, err := DecodeKey([]byte(key))
			if err != nil {
				t.Fatal(err)
			}
			if value == other && known || k.Kind == KindInode && known && visible(t, value) == visible(t, other) {
				return
			}
			self := InodeKey(m.c.Shards, k.Ino)
			_, was := before[string(self[:])]
			_, is := after[string(self[:])]
			switch k.Kind {
			case KindInode:
				if was && !heard[what{k.Ino, ""}] && !within[k.Ino] {
					t.Fatalf("step %d: the inode %d was altered", step, k.Ino)
				}
				if was && !is && !gone[k.Ino] {
					t.Fatalf("step %d: the inode %d is gone", step, k.Ino)
				}
			case KindExtent, KindAttribute, KindSymlink:
				if was && !heard[what{k.Ino, ""}] {
					t.Fatalf("step %d: kind %#x of inode %d was altered", step, k.Kind, k.Ino)
				}
			case KindEntry:
				var e Entry
				if err := DecodeEntry([]byte(value), k.Ino, k.Pos, &e); err != nil {
					t.Fatal(err)
				}
				if was && !heard[what{k.Ino, string(e.Name)}] && !gone[k.Ino] {
					t.Fatalf("step %d: the entry %q of %d was altered", step, e.Name, k.Ino)
				}
			default:
				return
			}
			compared[k.Kind]++
		}
		for key, value := range before {
			now, known := after[key]
			look(key, value, now, known)
		}
		for key, value := range after {
			if _, known := before[key]; !known {
				look(key, value, "", false)
			}
		}
		before = after
	}
	for _, k := range []Kind{KindInode, KindEntry, KindExtent, KindAttribute, KindSymlink} {
		if compared[k] < 20 {
			t.Errorf("%d rows of kind %#x were altered", compared[k], k)
		}
	}
}
