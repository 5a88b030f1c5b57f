package lsfs

import (
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"sealfs"
	"sealfs/disk"
	"sealfs/lsfs/layout"
	"sealfs/pmem"
)

// PayloadMax is the largest payload of one record in a store with large
// segments: what whole blocks 128 KiB of a file touch at most, wherever they
// begin. See Store.PayloadMax.
const PayloadMax = 128<<10 + sealfs.BlockSize

// Owner knows to whom the payloads in the log belong.
type Owner interface {
	// Live calls fn for each part of the payload [at, at+n), which was written
	// for inode ino at file offset off, that is still referenced.
	Live(r pmem.Reader, ino sealfs.Ino, off uint64, at sealfs.LSN, n uint32, fn func(Part)) error
	// Move makes p refer to its copy at to, if it still refers to p.At, and
	// keeps account of both with tx.Retain and tx.Release.
	Move(tx *Tx, ino sealfs.Ino, p Part, to sealfs.LSN) (moved bool, err error)
}

// Part is a live piece of a payload: Len bytes of a file at Off, stored at At.
type Part struct {
	Off uint64
	At  sealfs.LSN
	Len uint32
}

// Store is an open store. All methods are safe for concurrent use.
type Store struct {
	dev        *disk.Watched
	region     *pmem.Region
	regionName string
	rings      pmem.Rings // the region's medium, if it knows of rings
	owner      Owner
	o          Options
	log        *slog.Logger
	store      sealfs.UUID
	seg        int64 // bytes of a segment

	super struct {
		sync.Mutex
		block layout.Superblock
	}

	incarnation uint32
	seed        uint32 // of the chain's checksums under this incarnation
	failed      atomic.Pointer[failure]
	torn        atomic.Bool // region or ring were being changed when their memory failed
	crowded     atomic.Bool // the region takes more memory than its budget

	mu        sync.RWMutex // guards everything to the next blank line; see doc.go
	closed    bool         // no more updates but those of Close
	gone      bool         // closed: ring and region are gone
	staging   *pmem.Staging
	hot       []*hotSegment // in the ring, oldest first; the last one is open
	chain     uint32        // header CRC of the last record
	nextSlot  uint32        // successor of the open segment, announced in it
	nextSeq   uint32
	segs      []segment         // mirror of the region's table
	slotOf    map[uint32]uint32 // seq → slot, of all segments that are not free
	free      []uint32          // slots that may be opened
	live      int64             // sum of live bytes
	changes   uint64            // that requests have made
	taken     atomic.Uint64     // segments that requests and far checkpoints took
	dying     int               // sealed segments that lost their last live bytes since the last checkpoint began
	tx        Tx
	redo      []byte
	changing  bool   // since the lock was taken by locked, region or ring are being changed
	record    []byte // is put together here, on persistent memory
	logged    int64  // bytes of log since the last checkpoint began
	waiting   int64  // bytes of log since the last drain began
	unchecked int64  // bytes of log since it was last asked whether the collector is needed

	pins  []atomic.Int32 // readers of a slot
	cache *cache

	sync  syncer
	gc    collector
	far   farState
	bg    background
	scrub scrubber

	stats counters
}

type failure struct{ err error }

// hotSegment is a segment of the log that stands in the ring.
type hotSegment struct {
	seq, slot uint32
	chunk     int
	filled    uint32      // end of its records (Store.mu)
	sealed    bool        // nothing will be appended (Store.mu)
	given     uint32      // bytes handed to the device (drain leader)
	durable   atomic.Bool // sealed and wholly durable: its chunk may be reused
}

func (s *Store) open() *hotSegment { return s.hot[len(s.hot)-1] }

// tail returns the position of the next record. Needs mu.
func (s *Store) tail() sealfs.LSN {
	o := s.open()
	return sealfs.MakeLSN(o.seq, o.filled)
}

// fail makes the store read-only for good: after a failed write or flush
// nobody knows what the device holds, and trying again may be told a lie.
func (s *Store) fail(err error) error {
	if err == sealfs.ErrClosed {
		s.failed.CompareAndSwap(nil, &failure{fmt.Errorf("store on %s: %w", s.dev.Name(), err)})
		return s.failed.Load().err
	}
	f := &failure{fmt.Errorf("store on %s is read-only since a write failed: %w", s.dev.Name(), err)}
	if s.failed.CompareAndSwap(nil, f) {
		s.log.Error("store is read-only", "dev", s.dev.Name(), "err", err)
	}
	return s.failed.Load().err
}

// Failure returns why the store is read-only, nil if it is not.
func (s *Store) Failure() error {
	if f := s.failed.Load(); f != nil {
		return f.err
	}
	return nil
}

// Stalled returns for how long the device has been silent about what it was asked,
// 0 if it owes no answer.
func (s *Store) Stalled() time.Duration { return s.dev.Stalled() }

// PayloadMax returns the largest payload of one Update, in bytes: 33 blocks, or a
// quarter of a small segment, in whole blocks.
func (s *Store) PayloadMax() int {
	return int(min(PayloadMax, s.seg/4))
}

// ID returns the identity of the store.
func (s *Store) ID() sealfs.UUID { return s.store }

// Incarnation returns how often the store was recovered: it grows with every Open.
func (s *Store) Incarnation() uint32 { return s.incarnation }

// Superblock returns a copy of the superblock as last written.
func (s *Store) Superblock() layout.Superblock {
	s.super.Lock()
	defer s.super.Unlock()
	return s.super.block
}

// writeSuper changes the superblock and writes it to the older of its two
// places. It is durable on return.
func (s *Store) writeSuper(change func(*layout.Superblock)) error {
	s.super.Lock()
	defer s.super.Unlock()
	next := s.super.block
	change(&next)
	next.Update++
	if err := putSuper(s.dev, &next); err != nil {
		return s.fail(err)
	}
	s.super.block = next
	return nil
}

// Require makes programs that do not know an incompatible feature refuse the device
// from now on, durably, in both superblocks. It must be called before anything is stored
// that they would not understand. When it was called before it costs nothing.
func (s *Store) Require(feature uint64) error {
	if s.Superblock().Incompat&feature == feature {
		return nil
	}
	if err := s.Failure(); err != nil {
		return err
	}
	for range 2 {
		if err := s.writeSuper(func(sb *layout.Superblock) { sb.Incompat |= feature }); err != nil {
			return err
		}
	}
	return nil
}

func putSuper(dev disk.Device, sb *layout.Superblock) error {
	if _, err := dev.WriteAt(sb.Encode(), int64(sb.Update%2)*layout.BlockSize); err != nil {
		return fmt.Errorf("superblock of %s: %w", dev.Name(), err)
	}
	if err := dev.Flush(); err != nil {
		return fmt.Errorf("superblock of %s: %w", dev.Name(), err)
	}
	return nil
}

// ReadSuper returns the newer valid superblock of a device. If none is valid
// the error is that of the first, or ErrVersion if either says so.
func ReadSuper(dev disk.Device) (*layout.Superblock, error) {
	var best *layout.Superblock
	var first error
	for i := int64(0); i < 2; i++ {
		b := disk.AlignedBuffer(layout.BlockSize)
		_, err := dev.ReadAt(b, i*layout.BlockSize)
		var sb *layout.Superblock
		if err == nil {
			sb, err = layout.DecodeSuperblock(b, dev.Name(), i*layout.BlockSize)
		}
		if err == nil && dev.Size() < sb.End() {
			err = &sealfs.Corruption{Where: dev.Name(), Off: -1, What: "the device is shorter than its superblock says", Want: uint64(sb.End()), Got: uint64(dev.Size())}
		}
		switch {
		case err != nil && (first == nil || isVersion(err)):
			first = err
		case err == nil && (best == nil || sb.Update > best.Update):
			best = sb
		}
	}
	if best == nil || isVersion(first) {
		return nil, first
	}
	return best, nil
}
