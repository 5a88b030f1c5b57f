package lsfs

import (
	"errors"
	"fmt"

	"sealfs"
	"sealfs/lsfs/layout"
	"sealfs/pmem"
)

// On persistent memory (a region whose backing is pmem.Persistent) the ring lies
// beside the region and survives power cuts as well. The order of stores:
//
//	record      into the ring, past the cache; fence: the operation has happened
//	redo        in place, its lines written back, not waited for: the next
//	            record's fence, or the next header's, orders them
//	header      by log volume: fence, header slot with the tail as start, fence
//
// So nothing stands in place whose record is not durable, and everything below
// the header's start is in place and durable. What lies between is replayed. Sync
// has nothing to do; the device is flushed so that chunks of the ring and segments
// can be reused, by the same rules as with a file-backed region.
//
// From the first record on the region may be newer than the log on the device, so
// without the ring it would be of no use: its header says so (FeatureDax) from
// before that record until the store is closed.

// isDax reports whether the region is persistent memory.
func (s *Store) isDax() bool { return s.region.Durable() }

// stage returns the memory in which the n bytes at off of chunk i are to be put
// together, and staged brings them to the ring. In a file-backed store that is the
// ring itself. Needs mu.
func (s *Store) stage(chunk int, off, n uint32) []byte {
	if !s.isDax() {
		return s.staging.Chunk(chunk)[off:][:n]
	}
	if uint32(len(s.record)) < n {
		s.record = make([]byte, max(n, 64<<10))
	}
	return s.record[:n]
}

// staged stores what was put together in b, on persistent memory without waiting.
func (s *Store) staged(chunk int, off uint32, b []byte) {
	if s.isDax() {
		s.staging.Store(chunk, int(off), b)
	}
}

// findRing looks for the ring on persistent memory that belongs to the region. If
// the region is of no use without it, its absence is an error.
func (s *Store) findRing(sb *layout.Superblock, h *pmem.Header) (*pmem.Staging, error) {
	var err error = sealfs.ErrNotExist
	if s.rings != nil {
		var ring *pmem.Staging
		if ring, err = s.rings.OpenRing(); err == nil {
			r := ring.Header()
			if r.Store == sb.Store && r.Incarnation == sb.Incarnation && r.SegmentBytes == sb.SegmentBytes {
				return ring, nil
			}
			err = errors.Join(ring.Close(false), fmt.Errorf("it is of store %v, incarnation %d", r.Store, r.Incarnation))
		}
	}
	if h.Incompat&pmem.FeatureDax == 0 {
		return nil, nil
	}
	return nil, &sealfs.Corruption{Where: s.regionName, Off: 0, What: fmt.Sprintf("the region was in use on persistent memory and needs its ring, the file with .ring after its name, of incarnation %d; without it, sealfs-fsck --rebuild-region makes a new region of what the device has: %v", sb.Incarnation, err)}
}

// createRing makes the ring on persistent memory, and says in both header slots
// that the region needs it from now on.
func (s *Store) createRing(h pmem.StagingHeader, rec *recovered) error {
	p := s.rings.(pmem.Persistent)
	var err error
	if s.staging, err = s.roomFor(h, p.CreateRing); err != nil {
		return err
	}
	for range 2 {
		err := s.region.PutHeader(pmem.Header{
			Incompat: pmem.FeatureDax, Incarnation: s.incarnation, Start: rec.end, StartSlot: rec.slot, Chain: rec.chain,
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// leaveRing says in the header that the region does not need its ring any more,
// since the device has everything, and ends the store.
func (s *Store) leaveRing() error {
	s.gc.mu.Lock()
	defer s.gc.mu.Unlock()
	s.mu.RLock()
	h := s.header()
	s.mu.RUnlock()
	h.Incompat = 0
	if err := s.guarded(func() error { return s.region.PutHeader(h) }); err != nil {
		return err
	}
	s.fail(sealfs.ErrClosed) // no checkpoint may say otherwise
	return nil
}
