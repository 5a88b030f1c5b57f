package node

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"golang.org/x/sys/unix"

	"sealfs"
	"sealfs/server"
)

// The states of a data directory, as `sealfs status` begins with them.
const (
	StateRunning  = "running"  // files can be used
	StateDegraded = "degraded" // runs, but something has failed: see Status.Reason
	StateBusy     = "busy"     // the main process starts, stops or hangs
	StateDown     = "down"     // nothing runs
	StateEmpty    = "empty"    // nothing runs, and nothing was ever formatted
)

// Running is what the main process says of itself.
type Running struct {
	State    string               `json:"state"`
	Reason   string               `json:"reason"`
	PID      int                  `json:"pid"`
	Stores   []server.StoreStatus `json:"stores"`
	Volumes  []VolumeStatus       `json:"volumes"`
	Sessions []Session            `json:"sessions"`
}

// running describes the node.
func (n *Node) running() Running {
	r := Running{State: StateRunning, PID: os.Getpid(), Stores: n.server.Status().Stores, Volumes: n.listVolumes(), Sessions: []Session{}}
	n.volumes.Lock()
	for _, s := range n.sessions {
		r.Sessions = append(r.Sessions, s.Session)
	}
	n.volumes.Unlock()
	var faults []string
	for _, s := range r.Stores {
		if s.Reason != "" {
			faults = append(faults, fmt.Sprintf("store %s is %s: %s", s.ID, s.State, s.Reason))
		}
	}
	if err := n.manager.Err(); err != nil {
		faults = append(faults, fmt.Sprintf("the manager has stopped (%v): files can be used, volumes cannot be changed; restart", err))
	}
	if len(faults) > 0 {
		r.State, r.Reason = StateDegraded, strings.Join(faults, "; ")
	}
	return r
}

// Status describes a data directory, whether something runs on it or not. All
// paths are absolute; lists are never null.
type Status struct {
	State     string         `json:"state"`
	Reason    string         `json:"reason,omitempty"` // why it is degraded or busy
	Data      string         `json:"data"`
	PIDs      []int          `json:"pids"` // every live process, further mounts included
	Cluster   sealfs.UUID    `json:"cluster"`
	Shards    uint32         `json:"shards"`
	Stores    []StoreStatus  `json:"stores"`
	Volumes   []VolumeStatus `json:"volumes"`
	Mounts    []string       `json:"mounts"`                 // mount points that are served
	Stale     []string       `json:"stale_mounts,omitempty"` // that killed processes left; up and down clear them
	Processes []Process      `json:"processes"`
	Roles     []RoleStatus   `json:"roles,omitempty"` // of manager, server and daemon, where these run
	Log       string         `json:"log"`
}

// RoleStatus is what the process of a role says of itself.
type RoleStatus struct {
	Role   string          `json:"role"`
	PID    int             `json:"pid"`
	State  string          `json:"state"`
	Reason string          `json:"reason,omitempty"`
	Addr   string          `json:"addr,omitempty"`
	Detail json.RawMessage `json:"detail,omitempty"` // ManagerStatus, ServerStatus or DaemonStatus
}

// StoreStatus describes a store. The embedded part but its paths is empty while
// nothing runs.
type StoreStatus struct {
	server.StoreStatus
	Size      Size  `json:"size"`      // of the image
	Allocated int64 `json:"allocated"` // bytes of image and region that really take up space: both are sparse
}

// Status looks at the directory. An error means that it cannot be judged, for
// instance since config.yaml is damaged.
func (d Dir) Status(ctx context.Context) (*Status, error) {
	s := &Status{State: StateEmpty, Data: d.path, PIDs: []int{}, Stores: []StoreStatus{}, Volumes: []VolumeStatus{}, Mounts: []string{}, Processes: []Process{}, Log: d.LogPath()}
	cfg, err := d.Config()
	if err != nil {
		return nil, err
	}
	live, dead, err := d.processes()
	if err != nil {
		return nil, err
	}
	for _, p := range live {
		s.PIDs, s.Processes = append(s.PIDs, p.PID), append(s.Processes, p)
		if _, mounted, err := mountAt(p.Mount); err == nil && mounted {
			s.Mounts = append(s.Mounts, p.Mount)
		}
	}
	for _, p := range dead {
		if stale(p.Mount) {
			s.Stale = append(s.Stale, p.Mount)
		}
	}
	if cfg.formatted() {
		s.Cluster, s.Shards = cfg.Cluster, cfg.Shards
	}
	if cfg.formatted() || d.known() && !cfg.Formatting && cfg.Options == nil {
		s.State = StateDown
	}
	var run *Running
	if pid, held, err := d.holder(); err != nil {
		return nil, err
	} else if held {
		if pid > 0 && !slices.Contains(s.PIDs, pid) {
			s.PIDs = append(s.PIDs, pid) // it has not come to its entry yet
		}
		run = d.ask(ctx, s)
	} else if len(live) > 0 {
		s.State, s.Reason = StateBusy, "the main process has ended, its further mounts are ending"
	}
	stores, err := d.Stores()
	if err != nil && !errors.Is(err, sealfs.ErrNotExist) {
		return nil, err
	}
	if run == nil {
		if run, err = d.askRoles(ctx, s); err != nil {
			return nil, err
		}
	}
	describeStores(s, stores, run)
	switch {
	case run != nil && run.Volumes != nil:
		s.Volumes = run.Volumes
	default:
		if m := d.savedMap(); m != nil && m.Cluster == cfg.Cluster {
			for _, v := range m.Volumes {
				s.Volumes = append(s.Volumes, describe(v))
			}
		}
	}
	return s, nil
}

// ask asks the main process, and puts its state into s.
func (d Dir) ask(ctx context.Context, s *Status) *Running {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	a := d.Admin()
	defer a.Close()
	run, err := a.Running(ctx)
	if err != nil {
		s.State, s.Reason = StateBusy, err.Error()
		return nil
	}
	s.State, s.Reason = run.State, run.Reason
	return run
}

// askRoles asks the processes of roles, and puts what they say into s. The result
// holds what a server says of its stores, nil if none runs.
func (d Dir) askRoles(ctx context.Context, s *Status) (run *Running, err error) {
	for _, role := range roles[1:] {
		d := d.as(role)
		pid, held, err := d.holder()
		if err != nil {
			return nil, err
		}
		if !held {
			continue
		}
		if !slices.Contains(s.PIDs, pid) && pid > 0 {
			s.PIDs = append(s.PIDs, pid)
		}
		r := RoleStatus{Role: role, PID: pid}
		a := d.caller()
		actx, cancel := context.WithTimeout(ctx, 10*time.Second)
		if err := a.call(actx, http.MethodGet, "/v1/status", nil, &r.Detail); err != nil {
			r.State, r.Reason = StateBusy, err.Error()
		} else if err := json.Unmarshal(r.Detail, &r); err != nil {
			r.State, r.Reason = StateBusy, err.Error()
		}
		cancel()
		a.Close()
		if role == RoleServer && r.State != StateBusy {
			run = new(Running)
			if err := json.Unmarshal(r.Detail, run); err != nil {
				return nil, fmt.Errorf("answer of the server of %s: %w", d, err)
			}
		}
		if role == RoleDaemon && r.State != StateBusy {
			var x DaemonStatus
			if err := json.Unmarshal(r.Detail, &x); err != nil {
				return nil, fmt.Errorf("answer of the daemon of %s: %w", d, err)
			}
			for _, m := range x.Mounts {
				if m.State == MountActive {
					s.Mounts = append(s.Mounts, m.Mount)
				}
			}
		}
		s.Roles = append(s.Roles, r)
		switch {
		case len(s.Roles) == 1:
			s.State, s.Reason, s.Log = r.State, r.Reason, d.LogPath()
		case r.State != StateRunning:
			s.State, s.Reason = r.State, r.Reason
		}
	}
	return run, nil
}

func describeStores(s *Status, stores []Store, run *Running) {
	for _, st := range stores {
		x := StoreStatus{Size: st.Size, StoreStatus: server.StoreStatus{ID: st.ID, Device: st.Device, Region: st.Region, Staging: StagingPath(st.ID, st.Device), State: StateDown}}
		if run != nil {
			for _, r := range run.Stores {
				if r.ID == st.ID {
					x.StoreStatus = r
				}
			}
		}
		for _, path := range []string{st.Device, st.Region} {
			var fi unix.Stat_t
			switch err := unix.Stat(path, &fi); {
			case errors.Is(err, unix.ENOENT):
				x.State, x.Reason = "missing", path+" is missing"
			case err == nil:
				x.Allocated += fi.Blocks * 512
			}
		}
		s.Stores = append(s.Stores, x)
	}
}

// WriteTo writes the status for people. Its first word is the state.
func (s *Status) WriteTo(w io.Writer) (int64, error) {
	c := &counter{w: w}
	fmt.Fprintln(c, s.State)
	if s.Reason != "" {
		fmt.Fprintf(c, "because %s\n", s.Reason)
	}
	t := tabwriter.NewWriter(c, 0, 0, 2, ' ', 0)
	fmt.Fprintf(t, "data\t%s\n", s.Data)
	if len(s.PIDs) > 0 {
		fmt.Fprintf(t, "pids\t%s\n", strings.Trim(fmt.Sprint(s.PIDs), "[]"))
	}
	for _, r := range s.Roles {
		fmt.Fprintf(t, "%s\t%s\tprocess %d", r.Role, r.State, r.PID)
		if r.Addr != "" {
			fmt.Fprintf(t, " at %s", r.Addr)
		}
		fmt.Fprintln(t)
	}
	for _, st := range s.Stores {
		fmt.Fprintf(t, "store\t%s\t%s", st.ID, st.State)
		if st.Reason != "" {
			fmt.Fprintf(t, ": %s", st.Reason)
		}
		fmt.Fprintf(t, "\n  device\t%s\n  region\t%s", st.Device, st.Region)
		if st.Stats.RegionMode != "" {
			fmt.Fprintf(t, ", mode %s", st.Stats.RegionMode)
		}
		fmt.Fprintln(t)
		fmt.Fprintf(t, "  size\t%s, sparse: %s allocated", st.Size, Size(st.Allocated).About())
		if st.Stats.Segments > 0 {
			fmt.Fprintf(t, ", %s live, %d of %d segments free", Size(st.Stats.Live).About(), st.Stats.Free, st.Stats.Segments)
		}
		fmt.Fprintln(t)
		if st.Files > 0 {
			fmt.Fprintf(t, "  files\t%d, %.0f bytes of region each\n", st.Files, st.BytesPerFile)
		}
		if st.Stats.Segments > 0 {
			fmt.Fprintf(t, "  scrub\t%s\n", DescribeScrub(&st.Scrub))
		}
	}
	for _, v := range s.Volumes {
		fmt.Fprintf(t, "volume\t%s\t%s\n", v.Name, v.describe())
	}
	for _, p := range s.Processes {
		if p.Mount != "" {
			fmt.Fprintf(t, "mount\t%s\tvolume %s, process %d\n", p.Mount, p.Volume, p.PID)
		}
	}
	for _, m := range s.Stale {
		fmt.Fprintf(t, "stale\t%s\tleft by a killed process; `sealfs down` or the next `sealfs up` clears it\n", m)
	}
	fmt.Fprintf(t, "log\t%s\n", s.Log)
	err := t.Flush()
	return c.n, errors.Join(err, c.err)
}

// describe returns state, limit and contents in words.
func (v VolumeStatus) describe() string {
	s := v.State
	if v.UsedBytes >= 0 {
		s += fmt.Sprintf(", %s in %d inodes", Size(v.UsedBytes).About(), v.UsedInodes)
	}
	if v.Size > 0 {
		s += fmt.Sprintf(", limit %s", v.Size)
	}
	return s
}

// counter counts what is written and remembers the first error.
type counter struct {
	w   io.Writer
	n   int64
	err error
}

func (c *counter) Write(p []byte) (int, error) {
	n, err := c.w.Write(p)
	c.n += int64(n)
	if c.err == nil {
		c.err = err
	}
	return n, err
}
