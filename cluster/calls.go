package cluster

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"slices"
	"time"

	"sealfs"
)

// Run keeps the map fresh until ctx ends, which it returns. Somebody has to call
// it for Map, Changed and WaitMap.
func (r *Remote) Run(ctx context.Context) error {
	said := ""
	for pause := backoffMin; ; {
		err := r.fetch(ctx, waitMax)
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if err == nil {
			if said != "" {
				r.o.Logger.Info("a manager answers again")
			}
			said, pause = "", backoffMin
			continue
		}
		if err.Error() != said {
			r.o.Logger.Warn("cannot get the cluster map; files stay usable where nothing changed", "error", err)
			said = err.Error()
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(pause/2 + rand.N(pause)):
		}
		pause = min(2*pause, backoffMax)
	}
}

// fetch gets the map that follows the one known, if it comes within wait.
func (r *Remote) fetch(ctx context.Context, wait time.Duration) error {
	var after uint64
	if m := r.Map(); m != nil {
		after = m.Version
	}
	return r.do(ctx, request{
		method: http.MethodGet, path: fmt.Sprintf("/v1/map?after=%d&wait=%s", after, wait), any: true, wait: wait,
		read: func(resp *http.Response) error {
			if resp.StatusCode == http.StatusNoContent {
				return nil
			}
			b, err := io.ReadAll(io.LimitReader(resp.Body, StateMax+1))
			if err != nil {
				return err
			}
			m, err := Decode(b)
			if err != nil {
				return err
			}
			if c := r.Cluster(); m.Cluster != c {
				return fmt.Errorf("a map of cluster %s, not %s: %w", m.Cluster, c, sealfs.ErrInvalid)
			}
			r.set(m)
			return nil
		},
	})
}

// set takes a map over, unless a newer one is known: not all managers are
// equally far.
func (r *Remote) set(m *Map) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if old := r.m.Load(); old != nil && m.Version <= old.Version {
		return
	}
	r.publish(m)
}

// publish needs r.mu.
func (r *Remote) publish(m *Map) {
	r.m.Store(m)
	close(r.changed)
	r.changed = make(chan struct{})
}

// Map returns the latest map, nil if none is known yet.
func (r *Remote) Map() *Map { return r.m.Load() }

// Changed returns a channel that is closed with the next change of the map. Take
// the channel first and the map then, and no change is missed.
func (r *Remote) Changed() <-chan struct{} {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.changed
}

// WaitMap returns the latest map; if none is known yet, it gets one.
func (r *Remote) WaitMap(ctx context.Context) (*Map, error) {
	for {
		if m := r.Map(); m != nil {
			return m, nil
		}
		if err := r.fetch(ctx, 0); err != nil {
			return nil, err
		}
	}
}

// Refresh gets one row of the map from the leading manager, after a server said
// that it is stale. If the row names stores that the map does not, it gets the
// whole map.
func (r *Remote) Refresh(ctx context.Context, shard sealfs.Shard) error {
	if _, err := r.WaitMap(ctx); err != nil {
		return err
	}
	var row ShardRow
	if err := r.do(ctx, request{method: http.MethodGet, path: fmt.Sprint("/v1/shards/", shard), out: &row}); err != nil {
		return err
	}
	if r.merge(shard, &row) {
		return nil
	}
	return r.fetch(ctx, 0)
}

// merge puts a row into the map, and reports whether that was possible.
func (r *Remote) merge(shard sealfs.Shard, row *ShardRow) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	old := r.m.Load()
	if row.Shard != shard || int(shard) >= len(old.Table) || len(row.Stores) != len(row.Replicas) {
		return false
	}
	if row.Version <= old.Version {
		return true
	}
	next := *old
	next.Stores = slices.Clone(old.Stores)
	for k, i := range row.Replicas {
		if int(i) >= len(next.Stores) || next.Stores[i].ID != row.Stores[k].ID {
			return false
		}
		next.Stores[i] = row.Stores[k]
	}
	next.Table = slices.Clone(old.Table)
	next.Table[shard] = row.ShardInfo
	if next.check() != nil {
		return false
	}
	r.publish(&next)
	return true
}

// Status returns how some manager is.
func (r *Remote) Status(ctx context.Context) (s ManagerStatus, err error) {
	err = r.do(ctx, request{method: http.MethodGet, path: "/v1/status", out: &s, any: true})
	return s, err
}

// StatusAll asks all managers how they are. One that does not answer within a
// few seconds has the state "unreachable" and a reason.
func (r *Remote) StatusAll(ctx context.Context) []ManagerStatus {
	r.mu.Lock()
	list := make([]ManagerStatus, len(r.addrs))
	addrs := slices.Clone(r.addrs)
	r.mu.Unlock()
	done := make(chan struct{})
	for i, addr := range addrs {
		go func() {
			defer func() { done <- struct{}{} }()
			_, err := r.attempt(ctx, addr, request{method: http.MethodGet, path: "/v1/status", out: &list[i], any: true}, nil)
			if err != nil {
				list[i] = ManagerStatus{Addr: addr, State: "unreachable", Reason: err.Error()}
			}
		}()
	}
	for range addrs {
		<-done
	}
	return list
}

// Beat sends a server's heartbeat. It returns within the deadline of ctx, which
// should be well below the lease's term; see Manager.ServerBeat.
func (r *Remote) Beat(ctx context.Context, b Beat) (reply BeatReply, err error) {
	err = r.do(ctx, request{method: http.MethodPost, path: "/v1/beat", in: b, out: &reply})
	return reply, err
}

// OpenSession begins a session; see Manager.OpenSession.
func (r *Remote) OpenSession(ctx context.Context, info SessionInfo) (s Session, err error) {
	// A session that was opened twice ends by itself.
	err = r.do(ctx, request{method: http.MethodPost, path: "/v1/sessions", in: info, out: &s})
	return s, err
}

// RenewSession lets a session live for another TTL. ErrSession says that it has
// ended.
func (r *Remote) RenewSession(ctx context.Context, id sealfs.Session) error {
	return r.do(ctx, request{method: http.MethodPost, path: fmt.Sprintf("/v1/sessions/%d/renew", id)})
}

// FenceSession ends a session of which requests may be under way; see Manager.FenceSession.
func (r *Remote) FenceSession(ctx context.Context, id sealfs.Session) error {
	return r.do(ctx, request{method: http.MethodPost, path: fmt.Sprintf("/v1/sessions/%d/fence", id), wait: writeTimeout / 2})
}

// EndSession ends a session; see Manager.EndSession.
func (r *Remote) EndSession(ctx context.Context, id sealfs.Session) error {
	return r.do(ctx, request{method: http.MethodDelete, path: fmt.Sprint("/v1/sessions/", id)})
}

// Sessions returns the sessions that live.
func (r *Remote) Sessions(ctx context.Context) (list []Session, err error) {
	err = r.do(ctx, request{method: http.MethodGet, path: "/v1/sessions", out: &list})
	return list, err
}

// CreateVolume gives a new volume its number; see Manager.CreateVolume.
// ErrInterrupted: it may exist now.
func (r *Remote) CreateVolume(ctx context.Context, spec VolumeSpec) (v VolumeInfo, err error) {
	err = r.do(ctx, request{method: http.MethodPost, path: "/v1/volumes", in: spec, out: &v, once: true})
	return v, err
}

// VolumeReady says that the volume's root directory exists.
func (r *Remote) VolumeReady(ctx context.Context, id sealfs.Volume, root sealfs.Ino) (v VolumeInfo, err error) {
	err = r.do(ctx, request{method: http.MethodPost, path: fmt.Sprintf("/v1/volumes/%d/ready", id), in: volumeRoot{root}, out: &v})
	return v, err
}

// ResizeVolume sets the volume's quotas, 0 for none.
func (r *Remote) ResizeVolume(ctx context.Context, id sealfs.Volume, quotaBytes, quotaInodes uint64) (v VolumeInfo, err error) {
	err = r.do(ctx, request{method: http.MethodPost, path: fmt.Sprintf("/v1/volumes/%d/resize", id), in: volumeLimits{quotaBytes, quotaInodes}, out: &v})
	return v, err
}

// DeleteVolume begins to delete a volume; see Manager.DeleteVolume.
func (r *Remote) DeleteVolume(ctx context.Context, id sealfs.Volume) (v VolumeInfo, err error) {
	err = r.do(ctx, request{method: http.MethodDelete, path: fmt.Sprint("/v1/volumes/", id), out: &v})
	return v, err
}

// VolumeDeleted takes a volume that is being deleted off the map. One that is
// off it already is no error.
func (r *Remote) VolumeDeleted(ctx context.Context, id sealfs.Volume) error {
	err := r.do(ctx, request{method: http.MethodPost, path: fmt.Sprintf("/v1/volumes/%d/deleted", id)})
	if errors.Is(err, sealfs.ErrNotExist) {
		return nil // an attempt that was not answered did it
	}
	return err
}

// Volumes returns all volumes with what they use.
func (r *Remote) Volumes(ctx context.Context) (list []VolumeStatus, err error) {
	err = r.do(ctx, request{method: http.MethodGet, path: "/v1/volumes", out: &list})
	return list, err
}

// Stores returns all stores, those that have left too, in the order of the map.
func (r *Remote) Stores(ctx context.Context) (list []StoreStatus, err error) {
	err = r.do(ctx, request{method: http.MethodGet, path: "/v1/stores", out: &list})
	return list, err
}

// RemoveStore takes a store out of the cluster for ever; see Manager.RemoveStore.
func (r *Remote) RemoveStore(ctx context.Context, id sealfs.UUID) error {
	return r.do(ctx, request{method: http.MethodDelete, path: "/v1/stores/" + id.String()})
}

// SetStore sets a store's weight and whether it is bad; see Manager.SetStore.
func (r *Remote) SetStore(ctx context.Context, id sealfs.UUID, weight uint32, bad bool) error {
	return r.do(ctx, request{method: http.MethodPut, path: "/v1/stores/" + id.String(), in: storeSetting{weight, bad}})
}

// Managers returns the managers of the cluster, as the leading one knows them.
func (r *Remote) Managers(ctx context.Context) (list []ManagerInfo, err error) {
	err = r.do(ctx, request{method: http.MethodGet, path: "/v1/managers", out: &list})
	return list, err
}

// AddManager takes a manager in, or gives a member its new address; see
// Manager.AddManager.
func (r *Remote) AddManager(ctx context.Context, id sealfs.UUID, addr string) error {
	return r.do(ctx, request{method: http.MethodPost, path: "/v1/managers", in: managerAt{id, addr}, wait: writeTimeout / 2})
}

// RemoveManager takes a manager out of the cluster; see Manager.RemoveManager.
func (r *Remote) RemoveManager(ctx context.Context, id sealfs.UUID) error {
	return r.do(ctx, request{method: http.MethodDelete, path: "/v1/managers/" + id.String()})
}
