package server

import (
	"errors"
	"fmt"

	"sealfs"
	"sealfs/lsfs"
	"sealfs/meta"
	"sealfs/pmem"
)

// Claims appends to claims what of a payload is referenced, with its sums.
func (o *owner) Claims(r pmem.Reader, ino sealfs.Ino, off uint64, at sealfs.LSN, n uint32, claims []lsfs.Claim) ([]lsfs.Claim, error) {
	err := meta.Live(r, o.cfg, ino, off, at, n, func(e *meta.Extent) { claims = appendClaim(claims, ino, e) })
	return claims, err
}

// Search appends to claims what the next keys from key on refer to in [from, to).
func (o *owner) Search(r pmem.Reader, key []byte, from, to sealfs.LSN, claims []lsfs.Claim) ([]lsfs.Claim, []byte, error) {
	next, err := meta.Search(r, key, from, to, func(ino sealfs.Ino, e *meta.Extent) { claims = appendClaim(claims, ino, e) })
	return claims, next, err
}

// Match reports whether data are block i of the claim.
func (o *owner) Match(c *lsfs.Claim, i int, data []byte) bool {
	return i < len(c.Sums) && meta.BlockSum(c.Ino, c.Off/sealfs.BlockSize+uint64(i), c.Stamp, data) == c.Sums[i]
}

// appendClaim appends an extent as a claim, in the memory of an older one if
// there is some.
func appendClaim(claims []lsfs.Claim, ino sealfs.Ino, e *meta.Extent) []lsfs.Claim {
	var sums []uint32
	if n := len(claims); n < cap(claims) {
		sums = claims[:n+1][n].Sums[:0]
	}
	for i := range e.Blocks() {
		sums = append(sums, e.Sum(i))
	}
	return append(claims, lsfs.Claim{Part: lsfs.Part{Off: e.Off, At: e.Addr, Len: e.Stored()}, Ino: ino, Stamp: e.Stamp, Sums: sums})
}

// ScrubReport is what a server tells of the scrubs of one store.
type ScrubReport struct {
	ID     sealfs.UUID `json:"id"`
	Device string      `json:"device"`
	lsfs.ScrubStatus
}

// The verbs of Scrub.
const (
	ScrubStart  = "start"
	ScrubStop   = "stop"
	ScrubStatus = "status"
)

// Scrub starts or stops to verify a store, which is named by its id or its device, or
// all of them without a name, and tells how it is, with all that was found. A verb that
// is none is ErrInvalid, a store that is not here ErrNotExist.
func (s *Server) Scrub(verb, name string, o lsfs.ScrubOptions) ([]ScrubReport, error) {
	if verb != ScrubStart && verb != ScrubStop && verb != ScrubStatus {
		return nil, fmt.Errorf("scrub %q: neither start nor stop nor status: %w", verb, sealfs.ErrInvalid)
	}
	list := []ScrubReport{}
	var errs []error
	for _, st := range s.all() {
		device := absolute(st.opts.Device)
		if name != "" && name != st.ID().String() && name != st.opts.Device && name != device {
			continue
		}
		switch verb {
		case ScrubStart:
			errs = append(errs, st.StartScrub(o))
		case ScrubStop:
			st.StopScrub()
		}
		list = append(list, ScrubReport{ID: st.ID(), Device: device, ScrubStatus: st.Scrub(true)})
	}
	if len(list) == 0 && name != "" {
		return nil, fmt.Errorf("there is no store %s here: %w", name, sealfs.ErrNotExist)
	}
	return list, errors.Join(errs...)
}
