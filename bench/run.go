package bench

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"sealfs"
)

// Run measures o.Dir. It works in a new directory there, sealfs-bench.PID, and
// removes it before it returns, also when ctx is cancelled or something fails.
//
// A failed operation does not end the run: it is counted in its row. Run then
// returns the whole report together with an error that says how many failed and
// wraps the first cause: sealfs.ErrCorrupt if contents, sizes or names were not
// what had been written, a syscall.Errno otherwise. If ctx ends, the report
// holds the phases that were complete and the error wraps ctx's cause. It is
// nil only if nothing could be started: faulty options (sealfs.ErrInvalid, see
// Validate), no room (sealfs.ErrNoSpace), no workers.
//
// With threads as workers, Run raises GOMAXPROCS of the process while it runs.
func Run(ctx context.Context, o Options) (*Report, error) {
	if err := o.Validate(); err != nil {
		return nil, err
	}
	o = o.withDefaults()
	// Absolute, so that a worker or clean-up never depends on the working directory.
	dir, err := filepath.Abs(o.Dir)
	if err != nil {
		return nil, fmt.Errorf("bench: %w", err)
	}
	o.Dir = dir
	if err := room(o); err != nil {
		return nil, err
	}
	work, err := makeWorkDir(dir)
	if err != nil {
		return nil, err
	}
	report, err := runIn(ctx, work, o)
	if e := os.RemoveAll(work); e != nil {
		err = errors.Join(err, fmt.Errorf("bench: clean up: %w", e))
	}
	return report, err
}

// makeWorkDir makes dir/sealfs-bench.PID, or a name with a random suffix if a
// process of that number on another machine has taken it.
func makeWorkDir(dir string) (string, error) {
	name := "sealfs-bench." + strconv.Itoa(os.Getpid())
	work := filepath.Join(dir, name)
	err := os.Mkdir(work, 0o755)
	if errors.Is(err, fs.ErrExist) {
		work, err = os.MkdirTemp(dir, name+".*")
	}
	if err != nil {
		return "", fmt.Errorf("bench: %w", err)
	}
	return work, nil
}

// room reports whether the files fit, as far as the file system knows: filling
// a disk that others use is not a measurement.
func room(o Options) error {
	var st unix.Statfs_t
	if err := unix.Statfs(o.Dir, &st); err != nil {
		return fmt.Errorf("bench: statfs %s: %w", o.Dir, err)
	}
	var size int64
	for _, s := range o.Sizes {
		size = max(size, s)
	}
	files := float64(o.Files) * float64(o.Workers)
	if st.Blocks > 0 && float64(size)*files > float64(st.Bavail)*float64(st.Bsize) {
		return fmt.Errorf("bench: %.0f files of %d bytes do not fit into %s: %w", files, size, o.Dir, sealfs.ErrNoSpace)
	}
	if st.Files > 0 && files > float64(st.Ffree) {
		return fmt.Errorf("bench: %.0f files are more than the free inodes of %s: %w", files, o.Dir, sealfs.ErrNoSpace)
	}
	return nil
}

// runner is the state of one Run.
type runner struct {
	o      Options
	work   string
	crew   *crew
	report *Report
	// measures holds what the repetitions gave for each row of the report.
	measures [][]measure
	// failure is the first failed operation; damage goes before other failures.
	failure error
	failed  int64
}

// measure is one phase of one repetition.
type measure struct {
	ops, bytes, errors int64
	seconds            float64
	p50, p99, max      time.Duration
}

func (m measure) opsPerSec() float64 { return rate(float64(m.ops), m.seconds) }

func rate(n, seconds float64) float64 {
	if seconds <= 0 {
		return 0
	}
	return n / seconds
}

func runIn(ctx context.Context, work string, o Options) (*Report, error) {
	if !o.Processes {
		defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(threadsNeeded(o.Workers)))
	}
	c, err := hire(ctx, o.Workers, o.Processes)
	if err != nil {
		return nil, err
	}
	r := &runner{o: o, work: work, crew: c, report: newReport(o)}
	for _, w := range r.report.Warnings {
		r.progress("warning: %s\n", w)
	}
	for run := 0; run < o.Repeat && err == nil; run++ {
		row := 0
		for i, size := range o.Sizes {
			if row, err = r.size(ctx, run, i, size, row); err != nil {
				break
			}
		}
	}
	closed := c.close()
	if err == nil {
		// Workers of a cancelled run are cut off, which is no news.
		err = closed
	}
	r.report.Rows = r.rows()
	if r.failed > 0 {
		err = errors.Join(err, fmt.Errorf("bench: %d operations failed, the first: %w", r.failed, r.failure))
	}
	return r.report, err
}

// size runs all phases for one size, the first of which has the number row in
// the report, and returns the number of the next row.
func (r *runner) size(ctx context.Context, run, i int, size int64, row int) (int, error) {
	base := filepath.Join(r.work, fmt.Sprintf("run%d.size%d", run+1, size))
	dirs := make([]string, r.o.Workers)
	for w := range dirs {
		dirs[w] = filepath.Join(base, "shared")
		if !r.o.Shared {
			dirs[w] = filepath.Join(base, "w"+strconv.Itoa(w))
		}
		if err := os.MkdirAll(dirs[w], 0o755); err != nil {
			return row, fmt.Errorf("bench: %w", err)
		}
	}
	t := task{
		Workers: r.o.Workers, Files: r.o.Files, Size: size, Seed: r.o.Seed,
		Shared: r.o.Shared, Shuffle: r.o.Shuffle, Fsync: r.o.Fsync, Verify: r.o.Verify,
	}
	for _, phase := range r.o.Phases {
		if i > 0 && sizeless(phase) {
			continue
		}
		if r.o.DropCaches {
			r.dropCaches()
		}
		t.Phase = phase
		results, err := r.crew.phase(ctx, func(w int) task {
			t := t
			t.Worker, t.Dir = w, dirs[w]
			return t
		})
		if err != nil {
			return row, err
		}
		switch phase {
		case PhaseCreate:
			t.HaveFiles = true
		case PhaseRemove:
			t.HaveFiles = false
		case PhaseMkdir:
			t.HaveDirs = true
		case PhaseRmdir:
			t.HaveDirs = false
		}
		if run == 0 {
			n := size
			if sizeless(phase) {
				n = 0
			}
			r.report.Rows = append(r.report.Rows, Row{Size: n, Phase: phase})
			r.measures = append(r.measures, nil)
		}
		m := r.combine(results)
		r.measures[row] = append(r.measures[row], m)
		r.progress("run %d/%d  size %s  %s: %.0f ops/s, p50 %s, p99 %s, %d errors\n", run+1, r.o.Repeat,
			sizeText(r.report.Rows[row].Size), phase, m.opsPerSec(), durationText(m.p50), durationText(m.p99), m.errors)
		row++
	}
	if err := os.RemoveAll(base); err != nil {
		return row, fmt.Errorf("bench: clean up: %w", err)
	}
	return row, nil
}

// combine joins the workers' results of a phase.
func (r *runner) combine(results []*result) measure {
	var m measure
	latency := new(histogram)
	begin, end := int64(math.MaxInt64), int64(math.MinInt64)
	for _, w := range results {
		begin, end = min(begin, w.Begin), max(end, w.End)
		m.ops += w.Ops
		m.bytes += w.Bytes
		m.errors += w.Errors
		latency.merge(&w.Latency)
		if w.Errors == 0 {
			continue
		}
		r.failed += w.Errors
		if r.failure == nil || w.Corrupt && !errors.Is(r.failure, sealfs.ErrCorrupt) {
			r.failure = w.failure()
		}
	}
	m.seconds = float64(end-begin) / 1e9
	m.p50, m.p99, m.max = latency.quantile(0.50), latency.quantile(0.99), time.Duration(latency.max)
	return m
}

// failure rebuilds the first error of a result, so that errors.Is and As work
// on it although it came as text.
func (w *result) failure() error {
	switch {
	case w.Corrupt:
		return &remoteError{w.FirstError, sealfs.ErrCorrupt}
	case w.Errno != 0:
		return &remoteError{w.FirstError, w.Errno}
	}
	return &remoteError{w.FirstError, sealfs.ErrIO}
}

// remoteError is an error that a worker described, with the cause to compare with.
type remoteError struct {
	text  string
	cause error
}

func (e *remoteError) Error() string { return e.text }
func (e *remoteError) Unwrap() error { return e.cause }

// rows fills the rows with the medians of the repetitions. A row that the first
// run did not reach does not exist; one that only some runs reached has those.
func (r *runner) rows() []Row {
	rows := r.report.Rows
	for i := range rows {
		var seconds, rates []float64
		var p50, p99, longest []time.Duration
		var ops, bytes []int64
		row := &rows[i]
		for _, m := range r.measures[i] {
			seconds, rates = append(seconds, m.seconds), append(rates, m.opsPerSec())
			p50, p99, longest = append(p50, m.p50), append(p99, m.p99), append(longest, m.max)
			ops, bytes = append(ops, m.ops), append(bytes, m.bytes)
			row.Errors += m.errors
		}
		row.Ops, row.Bytes = median(ops), median(bytes)
		row.Seconds, row.OpsPerSec, row.Runs = median(seconds), median(rates), rates
		row.P50, row.P99, row.Max = median(p50), median(p99), median(longest)
	}
	return rows
}

// dropCaches writes everything back and drops the kernel's caches. The first
// failure is a warning; there is no second.
func (r *runner) dropCaches() {
	if err := dropCaches(); err != nil {
		r.o.DropCaches = false
		w := fmt.Sprintf("the caches were not dropped: %v", err)
		r.report.Warnings = append(r.report.Warnings, w)
		r.progress("warning: %s\n", w)
	}
}

// dropCaches empties page cache, dentries and inodes of the whole machine. The
// sync comes first because dirty pages cannot be dropped.
func dropCaches() error {
	f, err := os.OpenFile("/proc/sys/vm/drop_caches", os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	syscall.Sync()
	_, err = f.WriteString("3\n")
	return err
}

// progress is best effort: a closed terminal does not spoil a measurement.
func (r *runner) progress(format string, args ...any) { progress(r.o.Progress, format, args...) }

func progress(w io.Writer, format string, args ...any) {
	if w != nil {
		fmt.Fprintf(w, format, args...)
	}
}
