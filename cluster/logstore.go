package cluster

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/raft"
	raftboltdb "github.com/hashicorp/raft-boltdb/v2"
	"go.etcd.io/bbolt"

	"sealfs"
	"sealfs/internal/enc"
)

// A latch remembers the first failure for ever.
type latch struct {
	once sync.Once
	done chan struct{}
	err  error // set before done is closed
}

func newLatch() *latch { return &latch{done: make(chan struct{})} }

// shut records the first error it is given.
func (l *latch) shut(err error) {
	l.once.Do(func() {
		l.err = err
		close(l.done)
	})
}

// Err returns the first failure, or nil.
func (l *latch) Err() error {
	select {
	case <-l.done:
		return l.err
	default:
		return nil
	}
}

// boltStore is what logStore needs of raft-boltdb: a test puts a failing one in.
type boltStore interface {
	raft.LogStore
	raft.StableStore
	Close() error
}

// logStore keeps the Raft log and Raft's few variables. raft-boltdb verifies
// nothing that it reads, and raft goes on as a follower after a failed write.
// So logStore gives each value a checksum that binds it to its place, verifies
// it on every read, and latches shut at the first failure: after a failed sync
// nobody knows what the medium holds, and a damaged manager must not vote.
//
//	entry     raft.Log.Extensions: 4 bytes CRC-32C of the data, seeded with index, term and type
//	variable  the value, then 4 bytes CRC-32C of it, seeded with the CRC-32C of its key
type logStore struct {
	path  string
	bolt  boltStore
	latch *latch
	// running is set once raft's own goroutines call. Raft panics where it
	// cannot go on without the medium; as that would end the whole process,
	// only the calling goroutine is ended, and the manager shuts raft down.
	running atomic.Bool
}

const (
	boltFile    = "raft.db"
	checksumLen = 4
	// lockTimeout bounds the wait for bbolt's lock. Whoever holds it does so for
	// as long as it lives, but a process that was just killed may need a moment.
	lockTimeout = 200 * time.Millisecond
)

// openLogStore opens the file in dir, or makes it if there is none.
func openLogStore(dir string, l *latch) (*logStore, error) {
	path := filepath.Join(dir, boltFile)
	if _, err := os.Stat(path); errors.Is(err, os.ErrNotExist) {
		if err := createBolt(dir, path); err != nil {
			return nil, fmt.Errorf("create %s: %w", path, err)
		}
	} else if err != nil {
		return nil, err
	}
	if err := checkBolt(path); err != nil {
		return nil, err
	}
	s := &logStore{path: path, latch: l}
	err := s.do("open", func() (err error) {
		s.bolt, err = openBolt(path)
		return err
	})
	if err != nil {
		return nil, err
	}
	return s, nil
}

func openBolt(path string) (*raftboltdb.BoltStore, error) {
	return raftboltdb.New(raftboltdb.Options{Path: path, BoltOptions: &bbolt.Options{
		Timeout: lockTimeout, FreelistType: bbolt.FreelistMapType,
		NoFreelistSync: true, // it is found again when the file is opened
	}})
}

// createBolt makes the file under another name, so that a process that is
// killed meanwhile leaves no half of one.
func createBolt(dir, path string) error {
	draft := path + ".new"
	if err := os.Remove(draft); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	b, err := openBolt(draft)
	if err != nil {
		return err
	}
	if err := b.Close(); err != nil {
		return err
	}
	if err := os.Rename(draft, path); err != nil {
		return err
	}
	return syncDir(dir)
}

func syncDir(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

// do runs f unless the latch is shut, and shuts it if f fails. bbolt panics
// and reads beyond its mapping when its pages contradict each other; both are
// errors here. That an entry or variable is absent is no failure.
func (s *logStore) do(what string, f func() error) error {
	if err := s.latch.Err(); err != nil {
		return err
	}
	err := func() (err error) {
		defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
		defer func() {
			if r := recover(); r != nil {
				err = &sealfs.Corruption{Where: s.path, Off: -1, What: fmt.Sprint(what, ": ", r)}
			}
		}()
		return f()
	}()
	if err == nil || errors.Is(err, raft.ErrLogNotFound) || errors.Is(err, raftboltdb.ErrKeyNotFound) {
		return err
	}
	if _, ok := errors.AsType[*sealfs.Corruption](err); !ok {
		err = fmt.Errorf("%s: %s: %w: %w", s.path, what, err, sealfs.ErrIO)
	}
	s.latch.shut(err)
	return err
}

// end ends the calling goroutine where raft would panic over err: see running.
func (s *logStore) end(err error) error {
	if s.latch.Err() != nil && s.running.Load() {
		runtime.Goexit()
	}
	return err
}

// entrySum is the checksum of an entry.
func entrySum(l *raft.Log) uint32 {
	return enc.CRC(enc.Seed(0, l.Index, l.Term, uint64(l.Type)), l.Data)
}

// FirstIndex implements raft.LogStore.
func (s *logStore) FirstIndex() (i uint64, err error) {
	err = s.do("read the first index", func() (err error) {
		i, err = s.bolt.FirstIndex()
		return err
	})
	return i, err
}

// LastIndex implements raft.LogStore.
func (s *logStore) LastIndex() (i uint64, err error) {
	err = s.do("read the last index", func() (err error) {
		i, err = s.bolt.LastIndex()
		return err
	})
	return i, err
}

// GetLog implements raft.LogStore. The entry is verified.
func (s *logStore) GetLog(index uint64, l *raft.Log) error {
	err := s.do(fmt.Sprint("read entry ", index), func() error {
		if err := s.bolt.GetLog(index, l); err != nil {
			return err
		}
		sum := entrySum(l)
		if l.Index != index || len(l.Extensions) != checksumLen || binary.LittleEndian.Uint32(l.Extensions) != sum {
			return &sealfs.Corruption{Where: s.path, Off: -1, What: fmt.Sprintf("checksum of Raft log entry %d", index)}
		}
		l.Extensions = nil
		return nil
	})
	if err != nil {
		return s.end(err)
	}
	return nil
}

// StoreLog implements raft.LogStore.
func (s *logStore) StoreLog(l *raft.Log) error { return s.StoreLogs([]*raft.Log{l}) }

// StoreLogs implements raft.LogStore. The entries are durable when it returns.
func (s *logStore) StoreLogs(logs []*raft.Log) error {
	// Raft goes on using its entries, so the checksums go into copies.
	sealed := make([]*raft.Log, len(logs))
	for i, l := range logs {
		c := *l
		c.Extensions = enc.AppendU32(nil, entrySum(l))
		sealed[i] = &c
	}
	return s.do("append to the Raft log", func() error { return s.bolt.StoreLogs(sealed) })
}

// IsMonotonic implements raft.MonotonicLogStore: verify wants a log without
// gaps, so raft removes what is before a snapshot that it got from a leader.
func (s *logStore) IsMonotonic() bool { return true }

// DeleteRange implements raft.LogStore.
func (s *logStore) DeleteRange(first, last uint64) error {
	return s.do("shorten the Raft log", func() error { return s.bolt.DeleteRange(first, last) })
}

// variableSum is the checksum of a variable.
func variableSum(key, value []byte) uint32 {
	return enc.CRC(enc.Seed(0, uint64(enc.CRC(0, key))), value)
}

// Set implements raft.StableStore. The value is durable when it returns.
func (s *logStore) Set(key, value []byte) error {
	b := enc.AppendU32(append([]byte(nil), value...), variableSum(key, value))
	err := s.do(fmt.Sprintf("set %s", key), func() error { return s.bolt.Set(key, b) })
	if err != nil {
		return s.end(err)
	}
	return nil
}

// Get implements raft.StableStore. The value is verified.
func (s *logStore) Get(key []byte) (value []byte, err error) {
	err = s.do(fmt.Sprintf("read %s", key), func() error {
		b, err := s.bolt.Get(key)
		if err != nil {
			return err
		}
		n := len(b) - checksumLen
		if n < 0 || binary.LittleEndian.Uint32(b[n:]) != variableSum(key, b[:n]) {
			return &sealfs.Corruption{Where: s.path, Off: -1, What: fmt.Sprintf("checksum of %s", key)}
		}
		value = b[:n]
		return nil
	})
	return value, err
}

// SetUint64 implements raft.StableStore. A value that stands already is not
// written again: raft sets the term it has just read whenever it starts.
func (s *logStore) SetUint64(key []byte, v uint64) error {
	if old, err := s.GetUint64(key); err == nil && old == v {
		return nil
	}
	return s.Set(key, binary.LittleEndian.AppendUint64(nil, v))
}

// GetUint64 implements raft.StableStore.
func (s *logStore) GetUint64(key []byte) (uint64, error) {
	b, err := s.Get(key)
	if err != nil {
		return 0, err
	}
	if len(b) != 8 {
		err := &sealfs.Corruption{Where: s.path, Off: -1, What: fmt.Sprintf("length of %s", key), Want: 8, Got: uint64(len(b))}
		s.latch.shut(err)
		return 0, err
	}
	return binary.LittleEndian.Uint64(b), nil
}

// Close closes the file. Nothing may be under way.
func (s *logStore) Close() error { return s.bolt.Close() }

// verify reads the whole log, before raft does: what raft finds damaged later
// would stop a manager that others rely on already.
func (s *logStore) verify() error {
	first, err := s.FirstIndex()
	if err != nil {
		return err
	}
	last, err := s.LastIndex()
	if err != nil {
		return err
	}
	for i := first; first > 0 && i <= last; i++ {
		err := s.GetLog(i, new(raft.Log))
		if errors.Is(err, raft.ErrLogNotFound) {
			err = &sealfs.Corruption{Where: s.path, Off: -1, What: fmt.Sprintf("Raft log entry %d of [%d,%d] is missing", i, first, last)}
			s.latch.shut(err)
		}
		if err != nil {
			return err
		}
	}
	if _, err := s.GetUint64([]byte("CurrentTerm")); last > 0 && err != nil {
		return fmt.Errorf("Raft's term: %w", err)
	}
	return nil
}
