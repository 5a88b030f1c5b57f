package node

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/pprof"
	"os"
	"time"

	"sealfs"
	"sealfs/wire"
)

// Every process answers HTTP with JSON at its admin socket, a unix socket that
// only the owner may open:
//
//	GET /v1/health     {"ok": true} or 503 with the reason
//	GET /v1/status     what the process says of itself
//	GET /metrics       Prometheus's text
//	GET /debug/pprof/  profiles, as net/http/pprof has them
//
// and what its role adds. A failure is an answer of status 4xx or 5xx with an
// adminError.

// adminError is the body of an answer that reports a failure.
type adminError struct {
	Error string      `json:"error"`
	Code  sealfs.Code `json:"code"`
}

// Health is the answer to /v1/health.
type Health struct {
	OK     bool   `json:"ok"`
	Role   string `json:"role"`
	PID    int    `json:"pid"`
	Reason string `json:"reason,omitempty"` // why it is not well
}

const (
	adminBodyMax = 1 << 20          // of a request's body, in bytes
	adminGrace   = 10 * time.Second // for requests and further mounts at shutdown
)

// api is the admin socket's server.
type api struct {
	mux *http.ServeMux
	log *slog.Logger
}

// newAPI returns an API with what every process has. sick says why the process
// is not well, "" if it is; status is what /v1/status answers.
func (l *life) newAPI(role string, sick func() string, status func(context.Context) (any, error)) *api {
	a := &api{http.NewServeMux(), l.log}
	a.mux.HandleFunc("GET /v1/health", func(w http.ResponseWriter, _ *http.Request) {
		h := Health{Role: role, PID: os.Getpid(), Reason: sick()}
		h.OK = h.Reason == ""
		w.Header().Set("Content-Type", "application/json")
		if !h.OK {
			w.WriteHeader(http.StatusServiceUnavailable)
		}
		a.write(w, h)
	})
	a.get("GET /v1/status", func(r *http.Request) (any, error) { return status(r.Context()) })
	a.mux.Handle("GET /metrics", l.meters)
	a.mux.HandleFunc("GET /debug/pprof/", pprof.Index)
	a.mux.HandleFunc("GET /debug/pprof/cmdline", pprof.Cmdline)
	a.mux.HandleFunc("GET /debug/pprof/profile", pprof.Profile)
	a.mux.HandleFunc("GET /debug/pprof/symbol", pprof.Symbol)
	a.mux.HandleFunc("GET /debug/pprof/trace", pprof.Trace)
	return a
}

// get registers a function whose result is answered as JSON.
func (a *api) get(pattern string, f func(*http.Request) (any, error)) {
	a.mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
		v, err := f(r)
		if err != nil {
			a.refuse(w, r, err)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		a.write(w, v)
	})
}

func (a *api) write(w io.Writer, v any) {
	if err := json.NewEncoder(w).Encode(v); err != nil {
		a.log.Debug("admin: the client is gone", "err", err)
	}
}

func (a *api) refuse(w http.ResponseWriter, r *http.Request, err error) {
	a.log.Info("admin request refused", "request", r.Method+" "+r.URL.Path, "err", err)
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
	a.write(w, adminError{err.Error(), codeOf(err)})
}

// serve answers at l until ctx is done.
func (a *api) serve(ctx context.Context, l net.Listener) error {
	srv := &http.Server{Handler: a.mux, ReadHeaderTimeout: 10 * time.Second}
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

// listenAdmin opens the process's admin socket.
func (d Dir) listenAdmin() (net.Listener, error) { return wire.ListenUnix(d.adminSocket()) }

// caller is a client of an admin socket.
type caller struct {
	dir  Dir
	http *http.Client
}

// caller returns a client of the process that serves the directory in d's role;
// it need not run.
func (d Dir) caller() caller {
	t := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) { return wire.DialUnix(ctx, d.adminSocket()) }}
	return caller{d, &http.Client{Transport: t}}
}

// Close gives idle connections back.
func (a caller) Close() { a.http.CloseIdleConnections() }

// call does one request; in and out may be nil.
func (a caller) call(ctx context.Context, method, path string, in, out any) error {
	body, err := a.open(ctx, method, path, in)
	if err != nil {
		return err
	}
	defer body.Close()
	if out == nil {
		return nil
	}
	if err := json.NewDecoder(body).Decode(out); err != nil {
		return fmt.Errorf("answer of the %s process of %s: %w", a.dir.roleName(), a.dir, err)
	}
	return nil
}

// open does one request and returns the body of its answer.
func (a caller) open(ctx context.Context, method, path string, in any) (io.ReadCloser, error) {
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

// unreachable says why the process did not answer.
func (a caller) unreachable(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return fmt.Errorf("%s process of %s: %w", a.dir.roleName(), a.dir, context.Cause(ctx))
	}
	pid, held, e := a.dir.holder()
	switch {
	case e != nil:
		return e
	case !held && a.dir.role == "":
		return fault(sealfs.ErrUnavailable, "nothing runs on %s: start it with `sealfs up --data %s --mount DIR`, or name another directory with --data", a.dir, a.dir)
	case !held:
		return fault(sealfs.ErrUnavailable, "no %s runs on %s: start it with `sealfs %s --data %s`", a.dir.role, a.dir, a.dir.role, a.dir)
	}
	return fault(sealfs.ErrUnavailable, "process %d of %s does not answer (it may be starting or stopping; its log is %s): %v", pid, a.dir, a.dir.LogPath(), errors.Unwrap(err))
}

// Admin is a client of the main process's admin socket.
type Admin struct{ caller }

// Admin returns a client of the directory's main process, which need not run.
func (d Dir) Admin() *Admin { return &Admin{d.caller()} }
