package lsfs

import (
	"fmt"

	"sealfs"
	"sealfs/pmem"
)

// BeginRead locks the store's state for reading and returns it, for tests and for
// who must hold several stores at once. Nothing that waits may be done before
// EndRead. Where a View would return an error because memory failed, the process ends.
func (s *Store) BeginRead() pmem.Reader {
	s.mu.RLock()
	return s.region
}

// EndRead ends what BeginRead began; slices of the region must not be used after it.
func (s *Store) EndRead() { s.mu.RUnlock() }

// Fetch is a piece of the log to be read in two steps: Load in a View, then Finish
// with nothing held.
type Fetch struct {
	At     sealfs.LSN
	Dst    []byte
	Around bool // neighbours will be wanted soon: read and cache what stands around it
	slot   uint32
	wanted bool
}

// Load copies the piece from the ring if it is there. If not, it pins the
// segment, so that it is not reused before Finish, which must be called.
func (s *Store) Load(f *Fetch) error {
	if s.gone {
		return fmt.Errorf("store on %s: %w", s.dev.Name(), sealfs.ErrClosed)
	}
	seq, off := f.At.Seq(), f.At.Off()
	if int64(off)+int64(len(f.Dst)) > s.seg {
		return s.badAddress(f.At)
	}
	for i := len(s.hot) - 1; i >= 0; i-- {
		if h := s.hot[i]; h.seq == seq {
			copy(f.Dst, s.staging.Chunk(h.chunk)[off:])
			s.stats.ringReads.Add(1)
			return nil
		}
	}
	slot, ok := s.slotOf[seq]
	if !ok {
		return s.badAddress(f.At)
	}
	s.pins[slot].Add(1)
	f.slot, f.wanted = slot, true
	return nil
}

func (s *Store) badAddress(at sealfs.LSN) error {
	return &sealfs.Corruption{Where: s.dev.Name(), Off: -1, What: fmt.Sprintf("an extent refers to %v, where no segment stands", at)}
}

// Finish reads the piece from the device if Load left it to be read. The bytes
// are not verified: the caller knows their sums.
func (s *Store) Finish(f *Fetch) error {
	if !f.wanted {
		return nil
	}
	f.wanted = false
	defer s.pins[f.slot].Add(-1)
	if err := s.cache.read(s, f); err != nil {
		return fmt.Errorf("read of %d bytes at %v (byte %d of %s): %w: %w",
			len(f.Dst), f.At, s.slotOffset(f.slot)+int64(f.At.Off()), s.dev.Name(), err, sealfs.ErrIO)
	}
	return nil
}

// Place returns the byte of the device at which a piece of the log stands, or
// will when it is written; -1 if its segment is gone.
func (s *Store) Place(at sealfs.LSN) int64 {
	s.mu.RLock()
	defer s.mu.RUnlock()
	slot, ok := s.slotOf[at.Seq()]
	if !ok {
		return -1
	}
	return s.slotOffset(slot) + int64(at.Off())
}

// Forget drops what the cache holds of the piece, so that the next read goes
// to the device: for bytes that did not verify.
func (s *Store) Forget(f *Fetch) { s.cache.forget(f.At, len(f.Dst)) }
