package lsfs

import (
	"fmt"
	"runtime"
	"runtime/debug"

	"sealfs"
	"sealfs/pmem"
)

// A mapping can fail like any other medium: a line of persistent memory is bad, or
// somebody has cut the file short. Then the kernel sends a signal to whoever
// touches it. Everything in this package that touches region or ring does so below
// one of the functions in this file, which turn the signal into an error: the store
// is read-only from then on, and what went wrong while region or ring were being
// changed keeps it from being read, too.

// View calls fn with the store's state, locked for reading. fn must not wait, nor
// call View, and what aliases the region must not be used after it. View returns
// what fn returns, or why the state cannot be read.
func (s *Store) View(fn func(pmem.Reader) error) (err error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	defer s.caught(debug.SetPanicOnFault(true), &err)
	if s.torn.Load() {
		return s.Failure()
	}
	return fn(s.region)
}

// Torn reports whether the store failed in the middle of a change: then nothing of
// it can be read any more, and whether that change has happened, though it was
// answered with an error, shows when the store is opened again.
func (s *Store) Torn() bool { return s.torn.Load() }

// locked calls fn with the exclusive lock.
func (s *Store) locked(fn func() error) (err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	defer s.caught(debug.SetPanicOnFault(true), &err)
	s.changing = false
	return fn()
}

// guarded calls fn.
func (s *Store) guarded(fn func() error) (err error) {
	defer s.caught(debug.SetPanicOnFault(true), &err)
	return fn()
}

// caught ends what SetPanicOnFault began, and makes an error of a fault in one of
// the store's mappings. It must be deferred.
func (s *Store) caught(before bool, err *error) {
	debug.SetPanicOnFault(before)
	r := recover()
	if r == nil {
		return
	}
	fault, ok := r.(interface {
		runtime.Error
		Addr() uintptr
	})
	if !ok {
		panic(r) // not ours
	}
	where, off := s.regionName, int64(-1)
	if s.region != nil {
		off = s.region.Find(fault.Addr())
	}
	if off < 0 && s.staging != nil {
		if off = s.staging.Find(fault.Addr()); off >= 0 {
			where = "the ring of " + s.regionName
		}
	}
	if off < 0 && s.region != nil && s.staging != nil {
		panic(r) // no mapping of ours
	}
	if s.changing {
		s.torn.Store(true)
	}
	f := &failure{fmt.Errorf("store on %s has failed: memory at byte %d of %s cannot be used, the file was cut short or its medium is damaged: %w", s.dev.Name(), off, where, sealfs.ErrIO)}
	if s.failed.CompareAndSwap(nil, f) {
		s.log.Error("store has failed", "dev", s.dev.Name(), "err", f.err)
	}
	*err = f.err
}
