package cluster

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"sealfs"
)

// RemoteOptions says how a Remote behaves.
type RemoteOptions struct {
	// Cluster is the cluster that the managers must belong to. Zero takes any, and
	// from the first answer on only that one.
	Cluster sealfs.UUID
	// Timeout bounds a call whose context has no deadline; 15 s if 0.
	Timeout time.Duration
	// Logger gets what an operator should know; nil discards it.
	Logger *slog.Logger
}

// Remote is a client of the managers. Its methods may be called from anywhere.
//
// A call tries all managers, first the one that led last, again and again with
// pauses until its context ends. What must not happen twice is not tried again
// once it may have happened: that is ErrInterrupted. Without any answer the
// error is ErrUnavailable, and names who was asked and what they said.
type Remote struct {
	o     RemoteOptions
	http  *http.Client
	fresh *http.Client // a connection for each request: see newTransport

	mu      sync.Mutex
	addrs   []string // those given first, then such as answers named
	given   int
	leader  string
	near    string // answered last, where any manager will do
	cluster sealfs.UUID
	changed chan struct{} // closed when m changes

	m atomic.Pointer[Map]
}

// Bounds of a Remote.
const (
	dialTimeout    = time.Second
	attemptTimeout = 5 * time.Second // of one manager, before the next is asked
	backoffMin     = 20 * time.Millisecond
	backoffMax     = time.Second
	learnedMax     = 2 * ManagersMax // addresses beyond those given
	answerMax      = 64 << 20        // bytes of an answer
)

// NewRemote returns a client of the managers at addrs, of the form host:port.
// It connects when it is used.
func NewRemote(addrs []string, o RemoteOptions) *Remote {
	o.Timeout = cmp.Or(o.Timeout, 15*time.Second)
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	r := &Remote{o: o, cluster: o.Cluster, changed: make(chan struct{}), http: &http.Client{Transport: newTransport(true)}, fresh: &http.Client{Transport: newTransport(false)}}
	for _, a := range addrs {
		if !slices.Contains(r.addrs, a) {
			r.addrs = append(r.addrs, a)
		}
	}
	r.given = len(r.addrs)
	return r
}

// newTransport returns connections to managers. No proxy of the environment
// stands between. What must not happen twice goes over fresh connections: if
// the manager has died since a connection was last used, nobody can tell
// whether it got the request, but that a connection is refused is certain.
func newTransport(reuse bool) *http.Transport {
	return &http.Transport{
		DisableKeepAlives:   !reuse,
		DialContext:         (&net.Dialer{Timeout: dialTimeout}).DialContext,
		MaxIdleConnsPerHost: 4, IdleConnTimeout: idleTimeout / 2, DisableCompression: true, MaxResponseHeaderBytes: headerMax,
	}
}

// Close closes idle connections. A Run has to be ended by its context.
func (r *Remote) Close() error {
	r.http.CloseIdleConnections()
	return nil
}

// Cluster returns the cluster that the managers belong to, zero if that is not
// known yet.
func (r *Remote) Cluster() sealfs.UUID {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.cluster
}

// request is one call of the API.
type request struct {
	method, path string
	in, out      any                        // JSON, nil for none
	read         func(*http.Response) error // instead of out
	once         bool                       // must not be sent again when it may have happened
	any          bool                       // any manager will do
	wait         time.Duration              // the manager may take so long
}

// What became of an attempt.
type outcome uint8

const (
	answered  outcome = iota // the error, if any, is the answer
	untouched                // nothing happened: ask another manager
	stranger                 // as untouched, and it will not get better by itself
	unknown                  // it may have happened
)

// do makes a call.
func (r *Remote) do(ctx context.Context, q request) error {
	if _, ok := ctx.Deadline(); !ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, r.o.Timeout+q.wait)
		defer cancel()
	}
	var body []byte
	if q.in != nil {
		var err error
		if body, err = json.Marshal(q.in); err != nil {
			return fmt.Errorf("%w: %w", err, sealfs.ErrInvalid)
		}
	}
	said := make(map[string]error)
	for pause := backoffMin; ; pause = min(2*pause, backoffMax) {
		strangers, addrs := 0, r.order(q.any)
		for _, addr := range addrs {
			o, err := r.attempt(ctx, addr, q, body)
			switch o {
			case answered:
				return err
			case unknown:
				if q.once {
					return fmt.Errorf("manager %s: not known whether it happened: %w: %w", addr, err, sealfs.ErrInterrupted)
				}
			case stranger:
				strangers++
			}
			// That the context ended says less than what was said before.
			if said[addr] == nil || ctx.Err() == nil {
				said[addr] = err
			}
			if ctx.Err() != nil {
				return r.failed(ctx, said)
			}
		}
		if strangers == len(addrs) {
			return r.failed(ctx, said)
		}
		select {
		case <-ctx.Done():
			return r.failed(ctx, said)
		case <-time.After(pause/2 + rand.N(pause)):
		}
	}
}

// order returns whom to ask, in this order.
func (r *Remote) order(any bool) []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	addrs := slices.Clone(r.addrs)
	rand.Shuffle(len(addrs), func(i, j int) { addrs[i], addrs[j] = addrs[j], addrs[i] })
	first := r.leader
	if any && r.near != "" {
		first = r.near
	}
	if i := slices.Index(addrs, first); i > 0 {
		addrs[0], addrs[i] = addrs[i], addrs[0]
	}
	return addrs
}

// failed is the error of a call that nobody answered.
func (r *Remote) failed(ctx context.Context, said map[string]error) error {
	if errors.Is(ctx.Err(), context.Canceled) {
		return fmt.Errorf("%w: %w", context.Cause(ctx), sealfs.ErrInterrupted)
	}
	if len(said) == 0 {
		return fmt.Errorf("no manager is known: give the address of one: %w", sealfs.ErrUnavailable)
	}
	var b strings.Builder
	codes := []error{sealfs.ErrUnavailable}
	for _, addr := range r.order(false) {
		if err := said[addr]; err != nil {
			fmt.Fprintf(&b, "\n  %s: %v", addr, err)
			if errors.Is(err, sealfs.ErrInvalid) {
				codes = []error{sealfs.ErrInvalid} // a wrong address or cluster: no use to wait
			}
		}
	}
	return fmt.Errorf("no manager answers; tried%s\ncheck that a majority of the managers runs and can be reached, and that the addresses are right: %w", b.String(), codes[0])
}

// attempt makes a call to one manager.
func (r *Remote) attempt(ctx context.Context, addr string, q request, body []byte) (outcome, error) {
	ctx, cancel := context.WithTimeout(ctx, attemptTimeout+q.wait)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, q.method, "http://"+addr+q.path, bytes.NewReader(body))
	if err != nil {
		return stranger, fmt.Errorf("%w: %w", err, sealfs.ErrInvalid)
	}
	if c := r.Cluster(); !c.IsZero() {
		req.Header.Set(headerCluster, c.String())
	}
	client := r.http
	if q.once {
		client = r.fresh
	}
	resp, err := client.Do(req)
	if err != nil {
		r.forget(addr)
		if isUnsent(err) {
			return untouched, unwrapURL(err)
		}
		return unknown, unwrapURL(err)
	}
	defer resp.Body.Close()
	if err := r.meet(addr, resp.Header, q.any); err != nil {
		return stranger, err
	}
	if resp.StatusCode >= 300 {
		return r.refused(resp)
	}
	switch {
	case q.read != nil:
		err = q.read(resp)
	case q.out != nil:
		err = json.NewDecoder(io.LimitReader(resp.Body, answerMax)).Decode(q.out)
	}
	if err != nil {
		return unknown, fmt.Errorf("answer: %w", err)
	}
	return answered, nil
}

// refused reads an answer that reports a failure.
func (r *Remote) refused(resp *http.Response) (outcome, error) {
	var f failure
	if err := json.NewDecoder(io.LimitReader(resp.Body, bodyMax)).Decode(&f); err != nil || !f.Code.Known() {
		return unknown, fmt.Errorf("answer %q: %w", resp.Status, sealfs.ErrIO)
	}
	err := error(&told{f})
	switch f.Code {
	case sealfs.ErrUnavailable:
		return untouched, err
	case sealfs.ErrInterrupted, sealfs.ErrIO, sealfs.ErrCorrupt, sealfs.ErrClosed, sealfs.ErrVersion:
		return unknown, err // that manager is in trouble
	}
	return answered, err
}

// told is an error that a manager answered.
type told struct{ f failure }

// Error implements error.
func (t *told) Error() string { return t.f.Error }

// Unwrap returns the code.
func (t *told) Unwrap() error { return t.f.Code }

// meet learns what the headers of an answer say, and reports a manager of
// another cluster.
func (r *Remote) meet(addr string, h http.Header, any bool) error {
	text := h.Get(headerCluster)
	cluster, err := sealfs.ParseUUID(text)
	r.mu.Lock()
	defer r.mu.Unlock()
	if err != nil {
		return fmt.Errorf("there is no SealFS manager: %w", sealfs.ErrInvalid)
	}
	if r.cluster.IsZero() {
		r.cluster = cluster
	}
	if cluster != r.cluster {
		return fmt.Errorf("it belongs to cluster %s, not %s: %w", cluster, r.cluster, sealfs.ErrInvalid)
	}
	if any {
		r.near = addr
	}
	learned := slices.Clone(r.addrs[:r.given])
	for a := range strings.SplitSeq(h.Get(headerManagers), ",") {
		if checkAddr("", a) == nil && !slices.Contains(learned, a) && len(learned) < r.given+learnedMax {
			learned = append(learned, a)
		}
	}
	if len(learned) > r.given { // one that is joining knows nobody
		r.addrs = learned
	}
	if l := h.Get(headerLeader); slices.Contains(r.addrs, l) {
		r.leader = l
	}
	return nil
}

// forget makes others be asked first.
func (r *Remote) forget(addr string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.leader == addr {
		r.leader = ""
	}
	if r.near == addr {
		r.near = ""
	}
}

// isUnsent reports whether a request certainly did not reach anybody.
func isUnsent(err error) bool {
	op, ok := errors.AsType[*net.OpError](err)
	return ok && op.Op == "dial"
}

// unwrapURL drops method and address, which the caller says.
func unwrapURL(err error) error {
	return errors.Unwrap(err)
}
