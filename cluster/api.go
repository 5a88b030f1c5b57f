package cluster

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httputil"
	"slices"
	"strconv"
	"strings"
	"time"

	"sealfs"
)

// The HTTP API. Bodies are JSON, but for the map. A failure has the body
// {"code": n, "error": "..."}, where n is a sealfs.Code.
//
//	GET    /v1/status                  ManagerStatus, of the manager that is asked
//	GET    /v1/map?after=V&wait=30s    Map.Encode; 204 if after the wait there is none newer than V
//	GET    /v1/shards/N                ShardRow
//	POST   /v1/beat                    Beat → BeatReply
//	GET    /v1/sessions                []Session
//	POST   /v1/sessions                SessionInfo → Session
//	POST   /v1/sessions/ID/renew
//	POST   /v1/sessions/ID/fence       ends it when all servers refuse it, and then answers
//	DELETE /v1/sessions/ID             ends it at once
//	GET    /v1/volumes                 []VolumeStatus
//	POST   /v1/volumes                 VolumeSpec → VolumeInfo
//	POST   /v1/volumes/ID/ready        {"root": n} → VolumeInfo
//	POST   /v1/volumes/ID/resize       {"bytes": n, "inodes": n} → VolumeInfo
//	DELETE /v1/volumes/ID              begins to delete it → VolumeInfo
//	POST   /v1/volumes/ID/deleted
//	GET    /v1/stores                  []StoreStatus
//	PUT    /v1/stores/ID               {"weight": n, "bad": b}
//	DELETE /v1/stores/ID
//	GET    /v1/managers                []ManagerInfo
//	POST   /v1/managers                {"id": u, "addr": a}
//	DELETE /v1/managers/ID
//
// Status and map come from the manager that is asked, everything else from the
// one that leads: another one forwards it, once.
const (
	headerCluster  = "X-Sealfs-Cluster"   // both ways; requests may lack it
	headerLeader   = "X-Sealfs-Leader"    // of answers: address of the leader
	headerManagers = "X-Sealfs-Managers"  // of answers: addresses of all managers
	headerForward  = "X-Sealfs-Forwarded" // of requests: a manager has passed it on

	waitMax = 30 * time.Second // of a request for the next map
	bodyMax = 64 << 10
	beatMax = 16 << 20
)

// ManagerStatus is how a manager is.
type ManagerStatus struct {
	ID         sealfs.UUID   `json:"id"`
	Addr       string        `json:"addr"`
	Cluster    sealfs.UUID   `json:"cluster"`
	Name       string        `json:"name"`  // of the cluster
	State      string        `json:"state"` // leader, follower, candidate, joining, stopped
	Reason     string        `json:"reason,omitempty"`
	Leader     string        `json:"leader"` // its address
	Applied    uint64        `json:"applied"`
	MapVersion uint64        `json:"map_version"`
	Managers   []ManagerInfo `json:"managers"`
}

// ShardRow is a row of the map with the stores that it names.
type ShardRow struct {
	Version uint64       `json:"version"` // of the map
	Shard   sealfs.Shard `json:"shard"`
	ShardInfo
	Stores []StoreInfo `json:"stores"` // of Replicas, in that order
}

// VolumeStatus is a volume with what it uses, as far as the leader has heard.
type VolumeStatus struct {
	VolumeInfo
	UsedBytes  uint64 `json:"used_bytes"`
	UsedInodes uint64 `json:"used_inodes"`
}

type encodedMap struct {
	m *Map
	b []byte
}

// Status returns how this manager is. It always answers.
func (m *Manager) Status() ManagerStatus {
	s := ManagerStatus{ID: m.id, Addr: m.o.Addr, Cluster: m.cluster, Leader: m.Leader(), Applied: m.raft.AppliedIndex()}
	s.Managers, _ = m.Managers(context.Background())
	if mp := m.Map(); mp != nil {
		s.Cluster, s.Name, s.MapVersion = mp.Cluster, mp.Name, mp.Version
	}
	self, ok := m.member(m.id)
	switch err := m.Err(); {
	case err != nil:
		s.State, s.Reason = "stopped", err.Error()
	case m.Leading():
		s.State = "leader"
	case !ok || self.Suffrage != 0:
		s.State = "joining"
	case s.Leader == "":
		s.State = "candidate"
	default:
		s.State = "follower"
	}
	return s
}

// api answers requests.
type api struct {
	m     *Manager
	proxy *httputil.ReverseProxy
}

// Handler returns the HTTP API. On a manager that does not lead it forwards to
// the one that does.
func (m *Manager) Handler() http.Handler {
	a := &api{m: m}
	a.proxy = &httputil.ReverseProxy{
		Transport: newTransport(false),
		Rewrite: func(r *httputil.ProxyRequest) {
			leader, _ := r.In.Context().Value(leaderKey{}).(string)
			r.Out.URL.Scheme, r.Out.URL.Host = "http", leader
			r.Out.Header.Set(headerForward, m.id.String())
		},
		ModifyResponse: func(r *http.Response) error {
			for _, h := range []string{headerCluster, headerLeader, headerManagers} {
				r.Header.Del(h) // the answer has them already
			}
			return nil
		},
		ErrorHandler: func(w http.ResponseWriter, r *http.Request, err error) {
			if isUnsent(err) {
				a.fail(w, fmt.Errorf("the leading manager %s cannot be reached: %w: %w", m.Leader(), err, sealfs.ErrUnavailable))
				return
			}
			a.fail(w, fmt.Errorf("the leading manager gave no answer, it is not known whether the change happened: %w: %w", err, sealfs.ErrInterrupted))
		},
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/status", func(w http.ResponseWriter, _ *http.Request) { a.answer(w, m.Status(), nil) })
	mux.HandleFunc("GET /v1/map", a.getMap)
	lead := func(pattern string, h http.HandlerFunc) {
		mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) { a.lead(w, r, h) })
	}
	lead("GET /v1/shards/{id}", a.getShard)
	lead("POST /v1/beat", func(w http.ResponseWriter, r *http.Request) {
		call(a, w, r, func(ctx context.Context, b Beat) (any, error) { return m.ServerBeat(ctx, b) })
	})
	a.sessionRoutes(lead)
	a.volumeRoutes(lead)
	a.storeRoutes(lead)
	a.managerRoutes(lead)
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		a.fail(w, fmt.Errorf("%s %s is not known: %w", r.Method, r.URL.Path, sealfs.ErrNoSys))
	})
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { a.serve(w, r, mux) })
}

// serve does what all requests need.
func (a *api) serve(w http.ResponseWriter, r *http.Request, next http.Handler) {
	m := a.m
	cluster := m.cluster
	if mp := m.Map(); mp != nil {
		cluster = mp.Cluster
	}
	if !cluster.IsZero() {
		w.Header().Set(headerCluster, cluster.String())
	}
	w.Header().Set(headerLeader, headerText(m.Leader()))
	var addrs []string
	for _, s := range m.servers() {
		addrs = append(addrs, headerText(string(s.Address)))
	}
	w.Header().Set(headerManagers, strings.Join(addrs, ","))
	if want := r.Header.Get(headerCluster); want != "" && want != cluster.String() {
		a.fail(w, fmt.Errorf("manager %s belongs to cluster %s, the request is for cluster %.40q: %w", m.o.Addr, cluster, want, sealfs.ErrInvalid))
		return
	}
	if err := m.Err(); err != nil && r.URL.Path != "/v1/status" {
		a.fail(w, fmt.Errorf("manager %s has stopped: %w: %w", m.o.Addr, sealfs.ErrUnavailable, err))
		return
	}
	limit := int64(bodyMax)
	if r.URL.Path == "/v1/beat" {
		limit = beatMax
	}
	r.Body = http.MaxBytesReader(w, r.Body, limit)
	next.ServeHTTP(w, r)
}

// leaderKey is the context's key of the leader to whom a request is passed on: by the
// time it is, nobody may lead.
type leaderKey struct{}

// lead has h answer if this manager leads, and passes the request on otherwise.
func (a *api) lead(w http.ResponseWriter, r *http.Request, h http.HandlerFunc) {
	leader := a.m.Leader()
	switch {
	case a.m.Leading():
		h(w, r)
	case leader == "" || leader == a.m.o.Addr || leader == embeddedAddr || r.Header.Get(headerForward) != "":
		a.fail(w, a.m.notLeading())
	default:
		a.proxy.ServeHTTP(w, r.WithContext(context.WithValue(r.Context(), leaderKey{}, leader)))
	}
}

// call reads a body of type T, and answers with what f says.
func call[T any](a *api, w http.ResponseWriter, r *http.Request, f func(context.Context, T) (any, error)) {
	var in T
	if err := json.NewDecoder(r.Body).Decode(&in); err != nil {
		if _, ok := errors.AsType[*http.MaxBytesError](err); ok {
			a.fail(w, fmt.Errorf("body of the request: %w: %w", err, sealfs.ErrArgTooBig))
			return
		}
		a.fail(w, fmt.Errorf("body of the request: %w: %w", err, sealfs.ErrInvalid))
		return
	}
	out, err := f(r.Context(), in)
	a.answer(w, out, err)
}

func (a *api) answer(w http.ResponseWriter, out any, err error) {
	if err != nil {
		a.fail(w, err)
		return
	}
	b, err := json.Marshal(out)
	if err != nil {
		a.fail(w, err)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.Write(append(b, '\n')) // the receiver of an answer that is cut short sees it
}

// failure is the body of an answer that reports one.
type failure struct {
	Code  sealfs.Code `json:"code"`
	Error string      `json:"error"`
}

var statusOf = map[sealfs.Code]int{
	sealfs.ErrNotExist: http.StatusNotFound, sealfs.ErrNoSys: http.StatusNotFound, sealfs.ErrExist: http.StatusConflict, sealfs.ErrBusy: http.StatusConflict,
	sealfs.ErrInvalid: http.StatusBadRequest, sealfs.ErrNameTooLong: http.StatusBadRequest, sealfs.ErrArgTooBig: http.StatusRequestEntityTooLarge,
	sealfs.ErrSession: http.StatusGone, sealfs.ErrUnavailable: http.StatusServiceUnavailable, sealfs.ErrInterrupted: http.StatusGatewayTimeout,
	sealfs.ErrTimeout: http.StatusGatewayTimeout, sealfs.ErrNoSpace: http.StatusInsufficientStorage, sealfs.ErrNotSupported: http.StatusNotImplemented,
}

func (a *api) fail(w http.ResponseWriter, err error) {
	code, ok := errors.AsType[sealfs.Code](err)
	if _, rot := errors.AsType[*sealfs.Corruption](err); !ok && rot {
		code = sealfs.ErrCorrupt
	} else if !ok {
		code = sealfs.ErrIO
	}
	status, ok := statusOf[code]
	if !ok {
		status = http.StatusInternalServerError
	}
	b, err := json.Marshal(failure{code, err.Error()})
	if err != nil {
		b = []byte("{}")
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	w.Write(append(b, '\n'))
}

// getMap answers with the map, at once or when there is a newer one.
func (a *api) getMap(w http.ResponseWriter, r *http.Request) {
	m := a.m
	after, err := number(r.FormValue("after"), 64)
	wait := time.Duration(0)
	if v := r.FormValue("wait"); err == nil && v != "" {
		wait, err = time.ParseDuration(v)
	}
	if err != nil {
		a.fail(w, fmt.Errorf("after or wait: %w: %w", err, sealfs.ErrInvalid))
		return
	}
	timer := time.NewTimer(min(max(wait, 0), waitMax))
	defer timer.Stop()
	for {
		changed, mp := m.Changed(), m.Map()
		if mp != nil && mp.Version > after {
			e := m.encoded.Load()
			if e == nil || e.m != mp {
				e = &encodedMap{mp, mp.Encode()}
				m.encoded.Store(e)
			}
			w.Header().Set("Content-Type", "application/octet-stream")
			w.Header().Set("Content-Length", strconv.Itoa(len(e.b)))
			w.Write(e.b)
			return
		}
		select {
		case <-changed:
			continue
		case <-timer.C:
		case <-r.Context().Done():
		case <-m.ctx.Done():
		case <-m.latch.done:
		}
		if mp == nil {
			a.fail(w, errNoMap)
			return
		}
		w.WriteHeader(http.StatusNoContent)
		return
	}
}

func (a *api) getShard(w http.ResponseWriter, r *http.Request) {
	mp := a.m.Map()
	n, err := number(r.PathValue("id"), 16)
	if err != nil || mp == nil || n >= uint64(mp.Shards) {
		a.fail(w, fmt.Errorf("shard %.40q does not exist: %w", r.PathValue("id"), sealfs.ErrNotExist))
		return
	}
	row := ShardRow{Version: mp.Version, Shard: sealfs.Shard(n), ShardInfo: mp.Table[n]}
	for _, i := range row.Replicas {
		row.Stores = append(row.Stores, mp.Stores[i])
	}
	a.answer(w, row, nil)
}

func (a *api) sessionRoutes(lead func(string, http.HandlerFunc)) {
	m := a.m
	lead("GET /v1/sessions", func(w http.ResponseWriter, r *http.Request) {
		list, err := m.Sessions(r.Context())
		a.answer(w, nonNil(list), err)
	})
	lead("POST /v1/sessions", func(w http.ResponseWriter, r *http.Request) {
		call(a, w, r, func(ctx context.Context, s SessionInfo) (any, error) { return m.OpenSession(ctx, s) })
	})
	lead("POST /v1/sessions/{id}/renew", a.numbered(64, func(ctx context.Context, id uint64) (any, error) {
		return nil, m.RenewSession(ctx, sealfs.Session(id))
	}))
	lead("POST /v1/sessions/{id}/fence", a.numbered(64, func(ctx context.Context, id uint64) (any, error) {
		return nil, m.FenceSession(ctx, sealfs.Session(id))
	}))
	lead("DELETE /v1/sessions/{id}", a.numbered(64, func(ctx context.Context, id uint64) (any, error) {
		return nil, m.EndSession(ctx, sealfs.Session(id))
	}))
}

type (
	volumeRoot struct {
		Root sealfs.Ino `json:"root"`
	}
	volumeLimits struct {
		Bytes  uint64 `json:"bytes"`
		Inodes uint64 `json:"inodes"`
	}
	storeSetting struct {
		Weight uint32 `json:"weight"`
		Bad    bool   `json:"bad"`
	}
	managerAt struct {
		ID   sealfs.UUID `json:"id"`
		Addr string      `json:"addr"`
	}
)

func (a *api) volumeRoutes(lead func(string, http.HandlerFunc)) {
	m := a.m
	lead("GET /v1/volumes", func(w http.ResponseWriter, r *http.Request) {
		list, err := m.Volumes(r.Context())
		a.answer(w, nonNil(list), err)
	})
	lead("POST /v1/volumes", func(w http.ResponseWriter, r *http.Request) {
		call(a, w, r, func(ctx context.Context, s VolumeSpec) (any, error) { return m.CreateVolume(ctx, s) })
	})
	lead("POST /v1/volumes/{id}/ready", func(w http.ResponseWriter, r *http.Request) {
		call(a, w, r, func(ctx context.Context, b volumeRoot) (any, error) {
			id, err := pathVolume(r)
			if err != nil {
				return nil, err
			}
			return m.VolumeReady(ctx, id, b.Root)
		})
	})
	lead("POST /v1/volumes/{id}/resize", func(w http.ResponseWriter, r *http.Request) {
		call(a, w, r, func(ctx context.Context, b volumeLimits) (any, error) {
			id, err := pathVolume(r)
			if err != nil {
				return nil, err
			}
			return m.ResizeVolume(ctx, id, b.Bytes, b.Inodes)
		})
	})
	lead("DELETE /v1/volumes/{id}", a.numbered(32, func(ctx context.Context, id uint64) (any, error) {
		return m.DeleteVolume(ctx, sealfs.Volume(id))
	}))
	lead("POST /v1/volumes/{id}/deleted", a.numbered(32, func(ctx context.Context, id uint64) (any, error) {
		return nil, m.VolumeDeleted(ctx, sealfs.Volume(id))
	}))
}

func (a *api) storeRoutes(lead func(string, http.HandlerFunc)) {
	m := a.m
	lead("GET /v1/stores", func(w http.ResponseWriter, r *http.Request) {
		list, err := m.Stores(r.Context())
		a.answer(w, nonNil(list), err)
	})
	lead("PUT /v1/stores/{id}", func(w http.ResponseWriter, r *http.Request) {
		call(a, w, r, func(ctx context.Context, b storeSetting) (any, error) {
			id, err := pathUUID(r)
			if err != nil {
				return nil, err
			}
			return nil, m.SetStore(ctx, id, b.Weight, b.Bad)
		})
	})
	lead("DELETE /v1/stores/{id}", func(w http.ResponseWriter, r *http.Request) {
		id, err := pathUUID(r)
		if err == nil {
			err = m.RemoveStore(r.Context(), id)
		}
		a.answer(w, nil, err)
	})
}

func (a *api) managerRoutes(lead func(string, http.HandlerFunc)) {
	m := a.m
	lead("GET /v1/managers", func(w http.ResponseWriter, r *http.Request) {
		// Who is missing in this list stops: it has to be the list of the leader.
		if err := m.await(r.Context(), m.raft.VerifyLeader()); err != nil {
			a.fail(w, err)
			return
		}
		list, err := m.Managers(r.Context())
		a.answer(w, nonNil(list), err)
	})
	lead("POST /v1/managers", func(w http.ResponseWriter, r *http.Request) {
		call(a, w, r, func(ctx context.Context, b managerAt) (any, error) { return nil, m.AddManager(ctx, b.ID, b.Addr) })
	})
	lead("DELETE /v1/managers/{id}", func(w http.ResponseWriter, r *http.Request) {
		id, err := pathUUID(r)
		if err == nil {
			err = m.RemoveManager(r.Context(), id)
		}
		a.answer(w, nil, err)
	})
}

// numbered answers requests whose path has a number of so many bits.
func (a *api) numbered(bits int, f func(context.Context, uint64) (any, error)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		n, err := number(r.PathValue("id"), bits)
		if err != nil {
			a.fail(w, fmt.Errorf("%w: %w", err, sealfs.ErrNotExist))
			return
		}
		out, err := f(r.Context(), n)
		a.answer(w, out, err)
	}
}

// number reads a decimal number; nothing is 0.
func number(s string, bits int) (uint64, error) {
	if s == "" {
		return 0, nil
	}
	return strconv.ParseUint(s, 10, bits)
}

func pathVolume(r *http.Request) (sealfs.Volume, error) {
	n, err := number(r.PathValue("id"), 32)
	if err != nil {
		return 0, fmt.Errorf("%w: %w", err, sealfs.ErrNotExist)
	}
	return sealfs.Volume(n), nil
}

func pathUUID(r *http.Request) (sealfs.UUID, error) {
	id, err := sealfs.ParseUUID(r.PathValue("id"))
	if err != nil {
		return id, fmt.Errorf("%w: %w", err, sealfs.ErrNotExist)
	}
	return id, nil
}

// nonNil makes JSON's [] of what would be null.
func nonNil[T any](list []T) []T { return slices.Grow(list, 1) }

// Volumes returns all volumes with what they use.
func (m *Manager) Volumes(context.Context) ([]VolumeStatus, error) {
	if err := m.working(); err != nil {
		return nil, err
	}
	lead, mp := m.lead.Load(), m.Map()
	switch {
	case lead == nil:
		return nil, m.notLeading()
	case mp == nil:
		return nil, errNoMap
	}
	list := make([]VolumeStatus, len(mp.Volumes))
	for i, v := range mp.Volumes {
		u := lead.leases.usage(v.ID)
		list[i] = VolumeStatus{v, u.Bytes, u.Inodes}
	}
	return list, nil
}
