package node

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"

	"sealfs"
	"sealfs/cluster"
)

// What the main process of `sealfs up` adds to the admin socket (see api.go):
//
//	GET    /v1/map             cluster.Map
//	GET    /v1/volumes         [VolumeStatus]
//	POST   /v1/volumes         cluster.VolumeSpec → VolumeStatus
//	POST   /v1/volumes/NAME/quota  Quota → VolumeStatus
//	DELETE /v1/volumes/NAME
//	GET    /v1/locate?ino=N    Location
//	POST   /v1/sessions        Session with volume's name, pid, mount → Session
//
// The answer to the last one stays open: the session lives as long as the
// connection, and so ends with the client's process, however that ends. A second
// object, {}, says that the main process is about to end when the client has.

// api returns what the admin socket answers; ctx ends when the node is about to.
func (n *Node) api(ctx context.Context) *api {
	sick := func() string { return n.running().Reason }
	a := n.newAPI(RoleMain, sick, func(context.Context) (any, error) { return n.running(), nil })
	a.scrub(n.server)
	a.get("GET /v1/map", func(*http.Request) (any, error) { return n.manager.Map(), nil })
	a.get("GET /v1/volumes", func(*http.Request) (any, error) { return n.listVolumes(), nil })
	a.get("POST /v1/volumes", func(r *http.Request) (any, error) {
		var spec cluster.VolumeSpec
		if err := readBody(r, &spec); err != nil {
			return nil, err
		}
		return n.createVolume(r.Context(), spec)
	})
	a.get("POST /v1/volumes/{name}/quota", func(r *http.Request) (any, error) {
		var q Quota
		if err := readBody(r, &q); err != nil {
			return nil, err
		}
		return n.setQuota(r.Context(), r.PathValue("name"), q)
	})
	a.get("DELETE /v1/volumes/{name}", func(r *http.Request) (any, error) {
		return struct{}{}, n.deleteVolume(r.Context(), r.PathValue("name"))
	})
	a.get("GET /v1/locate", func(r *http.Request) (any, error) {
		ino, err := strconv.ParseUint(r.FormValue("ino"), 10, 64)
		if err != nil {
			return nil, fmt.Errorf("ino: %w: %w", err, sealfs.ErrInvalid)
		}
		return n.locate(sealfs.Ino(ino))
	})
	a.mux.HandleFunc("POST /v1/sessions", func(w http.ResponseWriter, r *http.Request) { n.serveSession(ctx, a, w, r) })
	return a
}

// sessionRequest asks for a session.
type sessionRequest struct {
	Volume string `json:"volume"`
	Mount  string `json:"mount"`
	PID    int    `json:"pid"`
}

// serveSession opens a session and ends it when the client hangs up, or has to be given up. When
// ctx is done it asks the client to hang up.
func (n *Node) serveSession(ctx context.Context, a *api, w http.ResponseWriter, r *http.Request) {
	var req sessionRequest
	err := readBody(r, &req)
	var s *openSession
	if err == nil {
		s, err = n.openSession(req.Volume, req.Mount, req.PID)
	}
	if err != nil {
		a.refuse(w, r, err)
		return
	}
	n.work.Add(1) // the server must not be closed before this has ended
	defer n.work.Done()
	defer n.endSession(s)
	w.Header().Set("Content-Type", "application/json")
	send := func(err error) bool { return err == nil && http.NewResponseController(w).Flush() == nil }
	if !send(json.NewEncoder(w).Encode(s.Session)) {
		return
	}
	select {
	case <-r.Context().Done():
		return
	case <-s.over:
		return
	case <-ctx.Done():
	}
	if send(json.NewEncoder(w).Encode(struct{}{})) {
		<-r.Context().Done() // at the latest when the grace is over
	}
}

// Map returns the cluster map.
func (a *Admin) Map(ctx context.Context) (*cluster.Map, error) {
	m := new(cluster.Map)
	return m, a.call(ctx, http.MethodGet, "/v1/map", nil, m)
}

// Running returns what the main process says of itself.
func (a *Admin) Running(ctx context.Context) (*Running, error) {
	r := new(Running)
	return r, a.call(ctx, http.MethodGet, "/v1/status", nil, r)
}

// Volumes returns all volumes.
func (a *Admin) Volumes(ctx context.Context) (list []VolumeStatus, err error) {
	err = a.call(ctx, http.MethodGet, "/v1/volumes", nil, &list)
	return list, err
}

// CreateVolume makes a volume.
func (a *Admin) CreateVolume(ctx context.Context, spec cluster.VolumeSpec) (v VolumeStatus, err error) {
	err = a.call(ctx, http.MethodPost, "/v1/volumes", spec, &v)
	return v, err
}

// SetQuota changes what a volume may hold.
func (a *Admin) SetQuota(ctx context.Context, name string, q Quota) (v VolumeStatus, err error) {
	err = a.call(ctx, http.MethodPost, "/v1/volumes/"+url.PathEscape(name)+"/quota", q, &v)
	return v, err
}

// DeleteVolume deletes a volume and all that is in it.
func (a *Admin) DeleteVolume(ctx context.Context, name string) error {
	return a.call(ctx, http.MethodDelete, "/v1/volumes/"+url.PathEscape(name), nil, nil)
}

// Locate finds an inode.
func (a *Admin) Locate(ctx context.Context, ino sealfs.Ino) (l Location, err error) {
	err = a.call(ctx, http.MethodGet, "/v1/locate?ino="+strconv.FormatUint(uint64(ino), 10), nil, &l)
	return l, err
}

// session opens a session for a mount of this process, which lasts until body is
// closed. goodbye returns when the main process is about to end, has ended, or has ended the session.
func (a *Admin) session(ctx context.Context, req sessionRequest) (s Session, goodbye func(), body io.Closer, err error) {
	r, err := a.open(ctx, http.MethodPost, "/v1/sessions", req)
	if err != nil {
		return Session{}, nil, nil, err
	}
	d := json.NewDecoder(r)
	if err := d.Decode(&s); err != nil {
		r.Close()
		return Session{}, nil, nil, fmt.Errorf("answer of the main process of %s: %w", a.dir, err)
	}
	return s, func() { d.Decode(new(struct{})) }, r, nil
}
