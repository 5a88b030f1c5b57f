package cluster

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/raft"

	"sealfs"
)

func testLog(i uint64) *raft.Log {
	return &raft.Log{Index: i, Term: 1 + i/10, Type: raft.LogCommand, Data: fmt.Append(nil, "entry ", i), AppendedAt: time.Unix(int64(i), 0).UTC()}
}

// fillStore makes a store with entries [first, last] and Raft's variables.
func fillStore(t *testing.T, dir string, first, last uint64) {
	t.Helper()
	s, err := openLogStore(dir, newLatch())
	if err != nil {
		t.Fatal(err)
	}
	var logs []*raft.Log
	for i := first; i <= last; i++ {
		logs = append(logs, testLog(i))
	}
	err = errors.Join(s.SetUint64([]byte("CurrentTerm"), 7), s.Set([]byte("LastVoteCand"), []byte("me")), s.StoreLogs(logs), s.Close())
	if err != nil {
		t.Fatal(err)
	}
}

func TestLogStore(t *testing.T) {
	dir := t.TempDir()
	fillStore(t, dir, 1, 50)
	s, err := openLogStore(dir, newLatch())
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if err := s.DeleteRange(1, 20); err != nil {
		t.Fatal(err)
	}
	if err := s.verify(); err != nil {
		t.Fatal(err)
	}
	first, _ := s.FirstIndex()
	last, _ := s.LastIndex()
	if first != 21 || last != 50 {
		t.Errorf("entries [%d,%d], want [21,50]", first, last)
	}
	var l raft.Log
	if err := s.GetLog(33, &l); err != nil || !reflect.DeepEqual(&l, testLog(33)) {
		t.Errorf("entry 33: %+v, %v", l, err)
	}
	if err := s.GetLog(20, &l); !errors.Is(err, raft.ErrLogNotFound) {
		t.Errorf("entry 20: %v", err)
	}
	if v, err := s.GetUint64([]byte("CurrentTerm")); v != 7 || err != nil {
		t.Errorf("term %d, %v", v, err)
	}
	// Raft compares this text.
	if _, err := s.GetUint64([]byte("Nothing")); err == nil || err.Error() != "not found" {
		t.Errorf("absent variable: %v", err)
	}
	if s.latch.Err() != nil {
		t.Errorf("absent things shut the latch: %v", s.latch.Err())
	}
}

// TestRotInEntry changes what bbolt keeps, below the checksums.
func TestRotInEntry(t *testing.T) {
	for name, damage := range map[string]func(s *logStore) error{
		"data":    func(s *logStore) error { return rewrite(s, 5, func(l *raft.Log) { l.Data[0] ^= 1 }) },
		"term":    func(s *logStore) error { return rewrite(s, 5, func(l *raft.Log) { l.Term++ }) },
		"type":    func(s *logStore) error { return rewrite(s, 5, func(l *raft.Log) { l.Type = raft.LogNoop }) },
		"no sum":  func(s *logStore) error { return rewrite(s, 5, func(l *raft.Log) { l.Extensions = nil }) },
		"missing": func(s *logStore) error { return s.bolt.DeleteRange(5, 5) },
		"other's": func(s *logStore) error {
			b, err := s.bolt.Get([]byte("LastVoteCand"))
			return errors.Join(err, s.bolt.Set([]byte("CurrentTerm"), b))
		},
		"no term": func(s *logStore) error { return s.bolt.Set([]byte("CurrentTerm"), nil) },
	} {
		dir := t.TempDir()
		fillStore(t, dir, 1, 9)
		s, err := openLogStore(dir, newLatch())
		if err != nil {
			t.Fatal(err)
		}
		if err := damage(s); err != nil {
			t.Fatal(err)
		}
		if err := s.verify(); !errors.Is(err, sealfs.ErrCorrupt) {
			t.Errorf("%s: verify = %v", name, err)
		}
		if err := s.StoreLog(testLog(10)); !errors.Is(err, sealfs.ErrCorrupt) {
			t.Errorf("%s: a damaged store was written to: %v", name, err)
		}
		s.Close()
	}
}

func rewrite(s *logStore, i uint64, change func(*raft.Log)) error {
	var l raft.Log
	if err := s.bolt.GetLog(i, &l); err != nil {
		return err
	}
	change(&l)
	return s.bolt.StoreLog(&l)
}

// TestRotInFile flips bits of the file. Opening must refuse, or find exactly
// what was stored; and it must not panic, on whatever goroutine.
func TestRotInFile(t *testing.T) {
	dir := t.TempDir()
	fillStore(t, dir, 1, 200) // several pages
	s, err := openLogStore(dir, newLatch())
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(s.DeleteRange(1, 30), s.StoreLog(testLog(201)), s.Close()); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, boltFile)
	good, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	r := rand.New(rand.NewPCG(1, 2))
	refused, flips := 0, 600
	for range flips {
		page := r.IntN(16)
		off := page*os.Getpagesize() + r.IntN(os.Getpagesize())
		if r.IntN(2) == 0 {
			off = page*os.Getpagesize() + r.IntN(128) // where the structure is
		}
		bad := bytes.Clone(good[:min(len(good), 16*os.Getpagesize())])
		if off >= len(bad) {
			continue
		}
		bad[off] ^= 1 << r.IntN(8)
		if err := os.WriteFile(path, bad, 0o600); err != nil {
			t.Fatal(err)
		}
		s, err := openLogStore(dir, newLatch())
		if err == nil {
			err = s.verify()
			if err == nil {
				err = same(s)
				if err != nil {
					t.Fatalf("byte %d flipped, and believed: %v", off, err)
				}
			} else {
				refused++
			}
			s.Close()
		} else {
			refused++
		}
		if err != nil && !errors.Is(err, sealfs.ErrCorrupt) && !errors.Is(err, sealfs.ErrVersion) {
			t.Fatalf("byte %d flipped: %v", off, err)
		}
	}
	if refused < flips/10 {
		t.Errorf("only %d of %d flips were noticed", refused, flips)
	}
}

// same compares what TestRotInFile stored.
func same(s *logStore) error {
	first, err1 := s.FirstIndex()
	last, err2 := s.LastIndex()
	term, err3 := s.GetUint64([]byte("CurrentTerm"))
	vote, err4 := s.Get([]byte("LastVoteCand"))
	if err := errors.Join(err1, err2, err3, err4); err != nil {
		return err
	}
	if first != 31 || last != 201 || term != 7 || string(vote) != "me" {
		return fmt.Errorf("entries [%d,%d], term %d, vote %q", first, last, term, vote)
	}
	return nil
}

func FuzzCheckBolt(f *testing.F) {
	dir := f.TempDir()
	s, err := openLogStore(dir, newLatch())
	if err != nil {
		f.Fatal(err)
	}
	if err := errors.Join(s.StoreLog(testLog(1)), s.Close()); err != nil {
		f.Fatal(err)
	}
	b, err := os.ReadFile(filepath.Join(dir, boltFile))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b[:min(len(b), 8*os.Getpagesize())])
	f.Fuzz(func(t *testing.T, b []byte) {
		c := &boltChecker{path: "fuzz", b: b, seen: make(map[uint64]bool)}
		if err := c.file(); err != nil && !errors.Is(err, sealfs.ErrCorrupt) && !errors.Is(err, sealfs.ErrVersion) {
			t.Fatal(err)
		}
	})
}

// failing is a bolt store whose medium fails from some write on.
type failing struct {
	boltStore
	left int // writes that still succeed
}

var errMedium = errors.New("the medium failed")

func (f *failing) write() error {
	if f.left--; f.left < 0 {
		return errMedium
	}
	return nil
}

func (f *failing) StoreLogs(l []*raft.Log) error {
	if err := f.write(); err != nil {
		return err
	}
	return f.boltStore.StoreLogs(l)
}

func (f *failing) Set(k, v []byte) error {
	if err := f.write(); err != nil {
		return err
	}
	return f.boltStore.Set(k, v)
}

// TestLatch: after the first failed sync nothing is written, even if the medium
// claims to be well again.
func TestLatch(t *testing.T) {
	dir := t.TempDir()
	fillStore(t, dir, 1, 5)
	s, err := openLogStore(dir, newLatch())
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	s.bolt = &failing{boltStore: s.bolt, left: 1}
	if err := s.StoreLog(testLog(6)); err != nil {
		t.Fatal(err)
	}
	if err := s.StoreLog(testLog(7)); !errors.Is(err, sealfs.ErrIO) || !errors.Is(err, errMedium) {
		t.Errorf("got %v", err)
	}
	s.bolt.(*failing).left = 100
	for name, err := range map[string]error{
		"append": s.StoreLog(testLog(7)), "set": s.SetUint64([]byte("CurrentTerm"), 8), "delete": s.DeleteRange(1, 2), "read": s.GetLog(1, new(raft.Log)),
	} {
		if !errors.Is(err, errMedium) {
			t.Errorf("%s after a failure: %v", name, err)
		}
	}
}

// TestPanicIsError: bbolt's panics and faults are errors.
func TestPanicIsError(t *testing.T) {
	s := &logStore{path: "x", latch: newLatch()}
	err := s.do("walk", func() error { panic("page 7: not a leaf") })
	if !errors.Is(err, sealfs.ErrCorrupt) || !strings.Contains(err.Error(), "page 7") {
		t.Errorf("got %v", err)
	}
}
