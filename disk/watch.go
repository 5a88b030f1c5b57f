package disk

import (
	"sync/atomic"
	"time"
)

// watchSlots bounds the calls under way that Watched knows of; more go unwatched.
const watchSlots = 64

// Watched is a Device that knows for how long its calls have been under way: a
// disk that stalls returns neither success nor an error, for minutes or for ever.
type Watched struct {
	Device
	began time.Time
	slots [watchSlots]atomic.Int64 // when the call began, in nanoseconds since began; 0: free
	next  atomic.Uint32
}

var _ Device = (*Watched)(nil)

// Watch returns d, watched. It costs some ten nanoseconds a call.
func Watch(d Device) *Watched { return &Watched{Device: d, began: time.Now()} }

// Stalled returns for how long the oldest call has been under way, 0 if there is none.
func (w *Watched) Stalled() time.Duration {
	oldest := int64(0)
	for i := range w.slots {
		if at := w.slots[i].Load(); at != 0 && (oldest == 0 || at < oldest) {
			oldest = at
		}
	}
	if oldest == 0 {
		return 0
	}
	return time.Since(w.began) - time.Duration(oldest)
}

// enter notes that a call begins, and returns where; nil if all slots are taken.
func (w *Watched) enter() *atomic.Int64 {
	now := int64(time.Since(w.began)) | 1
	for range watchSlots {
		s := &w.slots[w.next.Add(1)%watchSlots]
		if s.Load() == 0 && s.CompareAndSwap(0, now) {
			return s
		}
	}
	return nil
}

func leave(s *atomic.Int64) {
	if s != nil {
		s.Store(0)
	}
}

// ReadAt implements Device.
func (w *Watched) ReadAt(p []byte, off int64) (int, error) {
	s := w.enter()
	defer leave(s)
	return w.Device.ReadAt(p, off)
}

// WriteAt implements Device.
func (w *Watched) WriteAt(p []byte, off int64) (int, error) {
	s := w.enter()
	defer leave(s)
	return w.Device.WriteAt(p, off)
}

// Flush implements Device.
func (w *Watched) Flush() error {
	s := w.enter()
	defer leave(s)
	return w.Device.Flush()
}

// Discard implements Device.
func (w *Watched) Discard(off, n int64) error {
	s := w.enter()
	defer leave(s)
	return w.Device.Discard(off, n)
}
