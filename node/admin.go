package node

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"time"

	"sealfs"
	"sealfs/cluster"
	"sealfs/wire"
)

// The admin socket speaks HTTP with JSON over a unix socket that only the owner
// may open:
//
//	GET    /v1/status          Running
//	GET    /v1/map             cluster.Map
//	GET    /v1/volumes         [VolumeStatus]
//	POST   /v1/volumes         cluster.VolumeSpec → VolumeStatus
//	DELETE /v1/volumes/NAME
//	GET    /v1/locate?ino=N    Location
//	POST   /v1/sessions        Session with volume's name, pid, mount → Session
//
// The answer to the last one stays open: the session lives as long as the
// connection, and so ends with the client's process, however that ends. A second
// object, {}, says that the main process is about to end when the client has. A
// failure is an answer of status 4xx or 5xx with an adminError.

// adminError is the body of an answer that reports a failure.
type adminError struct {
	Error string      `json:"error"`
	Code  sealfs.Code `json:"code"`
}

// adminBodyMax bounds the body of a request, in bytes.
const adminBodyMax = 1 << 20

// serveAdmin answers at l until ctx is done.
func (n *Node) serveAdmin(ctx context.Context, l net.Listener) error {
	mux := http.NewServeMux()
	get := func(path string, f func(*http.Request) (any, error)) { n.handle(mux, path, f) }
	get("GET /v1/status", func(*http.Request) (any, error) { return n.running(), nil })
	get("GET /v1/map", func(*http.Request) (any, error) { return n.manager.Map(), nil })
	get("GET /v1/volumes", func(*http.Request) (any, error) { return n.listVolumes(), nil })
	get("POST /v1/volumes", func(r *http.Request) (any, error) {
		var spec cluster.VolumeSpec
		if err := readBody(r, &spec); err != nil {
			return nil, err
		}
		return n.createVolume(r.Context(), spec)
	})
	get("DELETE /v1/volumes/{name}", func(r *http.Request) (any, error) {
		return struct{}{}, n.deleteVolume(r.Context(), r.PathValue("name"))
	})
	get("GET /v1/locate", func(r *http.Request) (any, error) {
		ino, err := strconv.ParseUint(r.FormValue("ino"), 10, 64)
		if err != nil {
			return nil, fmt.Errorf("ino: %w: %w", err, sealfs.ErrInvalid)
		}
		return n.locate(sealfs.Ino(ino))
	})
	srv := &http.Server{Handler: mux, ReadHeaderTimeout: 10 * time.Second}
	mux.HandleFunc("POST /v1/sessions", func(w http.ResponseWriter, r *http.Request) { n.serveSession(ctx, w, r) })
	ended := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(ended)
		grace, cancel := context.WithTimeout(context.WithoutCancel(ctx), adminGrace)
		defer cancel()
		if srv.Shutdown(grace) != nil {
			srv.Close()
		}
	})
	err := srv.Serve(l)
	if !stop() {
		<-ended
		return nil
	}
	return err
}

// adminGrace is how long requests and further mounts get to end at shutdown.
const adminGrace = 10 * time.Second

// handle registers a function whose result is answered as JSON.
func (n *Node) handle(mux *http.ServeMux, pattern string, f func(*http.Request) (any, error)) {
	mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
		v, err := f(r)
		if err != nil {
			n.refuse(w, r, err)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		if err := json.NewEncoder(w).Encode(v); err != nil {
			n.log.Debug("admin: the client is gone", "err", err)
		}
	})
}

func (n *Node) refuse(w http.ResponseWriter, r *http.Request, err error) {
	n.log.Info("admin request refused", "request", r.Method+" "+r.URL.Path, "err", err)
	status := http.StatusInternalServerError
	switch code := codeOf(err); code {
	case sealfs.ErrNotExist:
		status = http.StatusNotFound
	case sealfs.ErrExist, sealfs.ErrBusy:
		status = http.StatusConflict
	case sealfs.ErrInvalid, sealfs.ErrNameTooLong:
		status = http.StatusBadRequest
	case sealfs.ErrUnavailable:
		status = http.StatusServiceUnavailable
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	json.NewEncoder(w).Encode(adminError{err.Error(), codeOf(err)})
}

func readBody(r *http.Request, v any) error {
	d := json.NewDecoder(io.LimitReader(r.Body, adminBodyMax))
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		return fmt.Errorf("body of the request: %w: %w", err, sealfs.ErrInvalid)
	}
	// To its end: only then does the server watch whether the client hangs up.
	if _, err := d.Token(); err != io.EOF {
		return fmt.Errorf("body of the request holds more than one object: %w", sealfs.ErrInvalid)
	}
	return nil
}

// sessionRequest asks for a session.
type sessionRequest struct {
	Volume string `json:"volume"`
	Mount  string `json:"mount"`
	PID    int    `json:"pid"`
}

// serveSession opens a session and ends it when the client hangs up. When ctx is
// done it asks the client to.
func (n *Node) serveSession(ctx context.Context, w http.ResponseWriter, r *http.Request) {
	var req sessionRequest
	err := readBody(r, &req)
	var s Session
	if err == nil {
		s, err = n.openSession(req.Volume, req.Mount, req.PID)
	}
	if err != nil {
		n.refuse(w, r, err)
		return
	}
	n.work.Add(1) // the server must not be closed before this has ended
	defer n.work.Done()
	defer n.endSession(s)
	w.Header().Set("Content-Type", "application/json")
	send := func(err error) bool { return err == nil && http.NewResponseController(w).Flush() == nil }
	if !send(json.NewEncoder(w).Encode(s)) {
		return
	}
	select {
	case <-r.Context().Done():
		return
	case <-ctx.Done():
	}
	if send(json.NewEncoder(w).Encode(struct{}{})) {
		<-r.Context().Done() // at the latest when the grace is over
	}
}

// Admin is a client of the admin socket.
type Admin struct {
	dir  Dir
	http *http.Client
}

// Admin returns a client of the directory's main process, which need not run.
func (d Dir) Admin() *Admin {
	t := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) { return wire.DialUnix(ctx, d.adminSocket()) }}
	return &Admin{d, &http.Client{Transport: t}}
}

// Close gives idle connections back.
func (a *Admin) Close() { a.http.CloseIdleConnections() }

// call does one request; in and out may be nil.
func (a *Admin) call(ctx context.Context, method, path string, in, out any) error {
	body, err := a.open(ctx, method, path, in)
	if err != nil {
		return err
	}
	defer body.Close()
	if out == nil {
		return nil
	}
	if err := json.NewDecoder(body).Decode(out); err != nil {
		return fmt.Errorf("answer of the main process of %s: %w", a.dir, err)
	}
	return nil
}

// open does one request and returns the body of its answer.
func (a *Admin) open(ctx context.Context, method, path string, in any) (io.ReadCloser, error) {
	var b bytes.Buffer
	if in != nil {
		if err := json.NewEncoder(&b).Encode(in); err != nil {
			return nil, err
		}
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://sealfs"+path, &b)
	if err != nil {
		return nil, err
	}
	resp, err := a.http.Do(req)
	if err != nil {
		return nil, a.unreachable(ctx, err)
	}
	if resp.StatusCode < 400 {
		return resp.Body, nil
	}
	defer resp.Body.Close()
	text, _ := io.ReadAll(io.LimitReader(resp.Body, 64<<10))
	var e adminError
	if json.Unmarshal(text, &e) != nil || e.Error == "" {
		return nil, fmt.Errorf("%s: %s %s", resp.Status, method, path)
	}
	return nil, fault(e.Code, "%s", e.Error)
}

// unreachable says why the main process did not answer.
func (a *Admin) unreachable(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return fmt.Errorf("main process of %s: %w", a.dir, context.Cause(ctx))
	}
	pid, held, e := a.dir.holder()
	switch {
	case e != nil:
		return e
	case !held:
		return fault(sealfs.ErrUnavailable, "nothing runs on %s: start it with `sealfs up --data %s --mount DIR`, or name another directory with --data", a.dir, a.dir)
	}
	return fault(sealfs.ErrUnavailable, "process %d of %s does not answer (it may be starting or stopping; its log is %s): %v", pid, a.dir, a.dir.LogPath(), errors.Unwrap(err))
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
// closed. goodbye returns when the main process is about to end, or has ended.
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
