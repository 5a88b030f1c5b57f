package metrics

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync/atomic"
	"time"

	"sealfs"
	"sealfs/op"
)

// class is what the outcome of a request means to an operator.
type class uint8

const (
	classOK          class = iota
	classRefused           // the caller asked for what cannot be: no such file, not empty, …
	classFull              // space, quota or a table is used up
	classConflict          // somebody or something else was in the way: ask again, perhaps elsewhere
	classUnavailable       // no answer, or none in time
	classFailed            // a medium, a store or a program is at fault
	numClasses
)

var classNames = [numClasses]string{
	classOK: "ok", classRefused: "refused", classFull: "full",
	classConflict: "conflict", classUnavailable: "unavailable", classFailed: "failed",
}

// classOf returns the class of a reply's code. A code of a newer program counts
// as a failure, so that nobody overlooks it.
func classOf(c sealfs.Code) class {
	switch c {
	case 0:
		return classOK
	case sealfs.ErrNotExist, sealfs.ErrExist, sealfs.ErrNotDir, sealfs.ErrIsDir, sealfs.ErrNotEmpty, sealfs.ErrPerm, sealfs.ErrAccess,
		sealfs.ErrInvalid, sealfs.ErrNameTooLong, sealfs.ErrTooManyLinks, sealfs.ErrTooBig, sealfs.ErrRange, sealfs.ErrArgTooBig,
		sealfs.ErrNoData, sealfs.ErrCrossDevice, sealfs.ErrNotSupported, sealfs.ErrNoSys, sealfs.ErrWouldLoop, sealfs.ErrNoDevice,
		sealfs.ErrTooManySymlinks:
		return classRefused
	case sealfs.ErrNoSpace, sealfs.ErrQuota, sealfs.ErrNoLocks:
		return classFull
	case sealfs.ErrAgain, sealfs.ErrDeadlock, sealfs.ErrBusy, sealfs.ErrStale, sealfs.ErrInterrupted, sealfs.ErrSession:
		return classConflict
	case sealfs.ErrTimeout, sealfs.ErrUnavailable, sealfs.ErrClosed:
		return classUnavailable
	}
	// ErrIO, ErrCorrupt, ErrVersion; and ErrReadOnly, which a store answers
	// after a device has failed.
	return classFailed
}

// classOfError returns the class of a request that was not answered.
func classOfError(err error) class {
	if code, ok := errors.AsType[sealfs.Code](err); ok && code != 0 {
		return classOf(code)
	}
	if errors.Is(err, context.Canceled) {
		return classConflict
	}
	return classUnavailable
}

// counts are what is known of the requests of one type. How many are under way
// is the difference of begun and done.
type counts struct {
	begun   atomic.Uint64
	done    [numClasses]atomic.Uint64
	latency Histogram
	_       [64]byte // so that the next type's are in other cache lines
}

// handler is an op.Handler that counts.
type handler struct {
	next          op.Handler
	role          string
	types         []counts // by op.Type; the first is for types that are not known
	read, written *Counter
	start         time.Time // what the clock is read against: a monotonic reading alone is the cheapest
	untimed       uint64    // a request is timed when its number, from 0, has none of these bits
}

// The names of the families that Handler registers.
const (
	requestsName = "sealfs_requests_total"
	underWayName = "sealfs_requests_under_way"
	durationName = "sealfs_request_duration_seconds"
	readName     = "sealfs_request_read_bytes_total"
	writtenName  = "sealfs_request_written_bytes_total"
)

// Handler returns a handler that passes everything to h and counts it in
// reg under the given role, such as "server" or "client", which a registry may
// know once:
//
//	sealfs_requests_total{op,result,role}        answered, by class of result
//	sealfs_requests_under_way{op,role}           not answered yet
//	sealfs_request_duration_seconds{op,role}     until the answer
//	sealfs_request_read_bytes_total{role}        data of successful Reads
//	sealfs_request_written_bytes_total{role}     payloads of successful Writes
//
// The classes of results are ok, refused, full, conflict, unavailable and
// failed. Types of operations that were never asked for are left out; of the
// others every class is there, so that the first failure is seen as an increase.
// Where reading the clock is slow, only one request in several is timed: the
// distribution of durations is right then, its count is not.
//
// The returned handler allocates nothing. The errors are those of the registry,
// which should be given up then.
func Handler(reg *Registry, role string, h op.Handler) (op.Handler, error) {
	if h == nil || role == "" {
		return nil, fmt.Errorf("metrics of a handler need a handler and a role: %w", sealfs.ErrInvalid)
	}
	types := op.Types()
	w := &handler{next: h, role: role, start: time.Now(), types: make([]counts, slices.Max(types)+1)}
	w.untimed = untimedMask(clockCost(w.start))
	var err error
	labels := Labels{"role": role}
	if w.read, err = reg.Counter(readName, "Bytes that reads returned.", labels); err != nil {
		return nil, err
	}
	if w.written, err = reg.Counter(writtenName, "Bytes that writes brought.", labels); err != nil {
		return nil, err
	}
	err = reg.Collect([]Desc{
		{requestsName, "Requests answered, by operation and class of result.", KindCounter, []string{"role", "op", "result"}},
		{underWayName, "Requests that are not answered yet.", KindGauge, []string{"role", "op"}},
		{durationName, "Time from a request to its answer; of a sample of the requests where the clock is slow.", KindHistogram, []string{"role", "op"}},
	}, w.collect)
	if err != nil {
		return nil, err
	}
	return w, nil
}

// Do implements op.Handler.
func (w *handler) Do(ctx context.Context, req *op.Request, rep *op.Reply) error {
	t := req.Type
	if !t.Valid() || int(t) >= len(w.types) {
		t = 0
	}
	// The caller may use req again, or lose it, once it is answered.
	c, had, brought := &w.types[t], len(rep.Data), len(req.Data)
	// The first request of each type is timed in any case.
	timed := (c.begun.Add(1)-1)&w.untimed == 0
	var began time.Duration
	if timed {
		began = time.Since(w.start)
	}
	err := w.next.Do(ctx, req, rep)
	if timed {
		c.latency.Observe(time.Since(w.start) - began)
	}
	k := classOf(rep.Code)
	if err != nil {
		k = classOfError(err)
	}
	if k == classOK {
		switch t {
		case op.Read:
			w.read.Add(uint64(max(len(rep.Data)-had, 0)))
		case op.Write:
			w.written.Add(uint64(brought))
		}
	}
	c.done[k].Add(1)
	return err
}

// collect emits what has been asked for.
func (w *handler) collect(s *Sink) {
	for t := range w.types {
		c := &w.types[t]
		// What has begun is read first: who reads it after what is done counts those, too, that
		// came and went while he was kept from running.
		begun := c.begun.Load()
		if begun == 0 {
			continue
		}
		var done [numClasses]uint64
		var sum uint64
		for k := range done {
			done[k] = c.done[k].Load()
			sum += done[k]
		}
		name := op.Type(t).String()
		for k, n := range done {
			s.Emit(requestsName, float64(n), w.role, name, classNames[k])
		}
		s.Emit(underWayName, float64(begun-min(sum, begun)), w.role, name)
		s.EmitHistogram(durationName, &c.latency, w.role, name)
	}
}

// clockCostMax is what timing may add to a request: some percent of the
// fastest.
const clockCostMax = 100 * time.Nanosecond

// clockCost measures what the two readings of the clock cost that a request
// takes. It is the least of several rounds, for others may have the processor.
func clockCost(start time.Time) time.Duration {
	const rounds, reads = 5, 200
	best := time.Hour
	for range rounds {
		began := time.Since(start)
		for range reads {
			_ = time.Since(start)
		}
		best = min(best, (time.Since(start)-began)*2/reads)
	}
	return best
}

// untimedMask returns the mask by which timing costs at most clockCostMax on
// the average: 0 is every request, 1 every second, 3 every fourth.
func untimedMask(cost time.Duration) uint64 {
	mask := uint64(0)
	for cost > clockCostMax && mask < 1<<10-1 {
		mask = mask<<1 | 1
		cost /= 2
	}
	return mask
}
