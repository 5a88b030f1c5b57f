package server

import (
	"path/filepath"

	"sealfs"
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
	State        string      `json:"state"`            // up, read-only
	Reason       string      `json:"reason,omitempty"` // why it is read-only
	Files        int64       `json:"files"`            // inodes of all volumes
	BytesPerFile float64     `json:"region_bytes_per_file"`
	Stats        lsfs.Stats  `json:"stats"`
}

// Status returns the state of the server.
func (s *Server) Status() Status {
	var out Status
	for _, st := range s.all() {
		x := StoreStatus{
			ID: st.ID(), Device: absolute(st.opts.Device), Region: absolute(st.opts.Region), Staging: absolute(st.opts.Staging),
			State: "up", Stats: st.Stats(), Files: st.usage.inodes(),
		}
		if x.Stats.RegionMode == pmem.ModeDax {
			x.Staging = pmem.RingPath(x.Region)
		}
		if err := st.Failure(); err != nil {
			x.State, x.Reason = "read-only", err.Error()
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
