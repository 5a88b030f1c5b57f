package server

import (
	"fmt"
	"path/filepath"
	"time"

	"sealfs"
	"sealfs/lease"
	"sealfs/lsfs"
	"sealfs/pmem"
)

// Status is what a server tells of itself.
type Status struct {
	Stores []StoreStatus `json:"stores"`
}

// StoreStatus is the state of one store.
type StoreStatus struct {
	ID           sealfs.UUID `json:"id"`
	Device       string      `json:"device"` // absolute
	Region       string      `json:"region"`
	Staging      string      `json:"staging"`
	State        string      `json:"state"`            // up, read-only, stalled
	Reason       string      `json:"reason,omitempty"` // why it is not up
	Rebuild      string      `json:"rebuild"`          // whether a lost region can be made again
	Files        int64       `json:"files"`            // inodes of all volumes
	BytesPerFile float64     `json:"region_bytes_per_file"`
	Stats        lsfs.Stats  `json:"stats"`
	Leases       lease.Stats `json:"leases"`
	Splitting    int64       `json:"splitting,omitempty"` // directories whose entries are being moved to partitions
	// Scrub is without findings, which Server.Scrub tells.
	Scrub lsfs.ScrubStatus `json:"scrub"`
}

// Status returns the state of the server.
func (s *Server) Status() Status {
	var out Status
	for _, st := range s.all() {
		x := StoreStatus{
			ID: st.ID(), Device: absolute(st.opts.Device), Region: absolute(st.opts.Region), Staging: absolute(st.opts.Staging),
			State: "up", Stats: st.Stats(), Files: st.usage.inodes(), Leases: st.leases.Stats(), Splitting: st.splits.busy.Load(), Scrub: st.Scrub(false),
		}
		x.Rebuild = "the region can be rebuilt"
		if why := x.Stats.FarReason; why != "" {
			x.Rebuild = "the region cannot be rebuilt at present: " + why
		}
		if x.Stats.RegionMode == pmem.ModeDax {
			x.Staging = pmem.RingPath(x.Region)
		}
		if err := st.Failure(); err != nil {
			x.State, x.Reason = "read-only", err.Error()
		} else if d := st.Stalled(); d > s.pace.stalled {
			x.State = "stalled"
			x.Reason = fmt.Sprintf("%s has not answered for %v: what needs it waits, what stands in memory can be read", x.Device, d.Round(time.Second))
		}
		if x.Files > 0 {
			x.BytesPerFile = float64(x.Stats.Region.Used*sealfs.BlockSize) / float64(x.Files)
		}
		out.Stores = append(out.Stores, x)
	}
	return out
}

func absolute(path string) string {
	if a, err := filepath.Abs(path); err == nil && path != "" {
		return a
	}
	return path
}

func (u *usage) inodes() int64 {
	u.mu.Lock()
	defer u.mu.Unlock()
	var n int64
	for _, c := range u.of {
		n += c.inodes
	}
	return n
}
