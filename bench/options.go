package bench

import (
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"slices"
	"strings"

	"sealfs"
)

// The phases, in their usual order.
const (
	PhaseMkdir   = "mkdir"   // make empty directories; independent of the size
	PhaseCreate  = "create"  // open with O_CREAT|O_EXCL, write, close
	PhaseStat    = "stat"    // stat by path
	PhaseRead    = "read"    // open, read all bytes, close
	PhaseReaddir = "readdir" // list the directory once per worker; an operation is an entry
	PhaseRemove  = "remove"  // unlink
	PhaseRmdir   = "rmdir"   // remove the directories of mkdir
)

// Limits of the options. They keep a slip of the finger from filling a disk
// with inodes or a machine with processes.
const (
	WorkersMax = 1024
	FilesMax   = 100_000_000 // of all workers together
	SizeMax    = 1 << 40     // bytes per file
	RepeatMax  = 1000
)

// Options says what Run does. Zero values of Phases, Sizes, Files, Workers and
// Repeat stand for their defaults; Verify has to be set by the caller, or by
// starting from DefaultOptions.
type Options struct {
	// Dir is an existing directory on the file system to measure.
	Dir string `json:"dir"`
	// Phases run in this order for each size. Default: create, stat, read,
	// readdir, remove.
	Phases []string `json:"phases"`
	// Sizes of the files in bytes. Default: 0, 3901 (IO500's), 4096, 65536.
	Sizes []int64 `json:"sizes"`
	// Files is the number of files of each worker. Default: 1000.
	Files int `json:"files"`
	// Workers run side by side. Default: 4.
	Workers int `json:"workers"`
	// Processes makes each worker a process of its own, by executing this
	// program again with the argument WorkerCommand, which its main function
	// has to dispatch to WorkerMain. Otherwise workers are threads of this process.
	Processes bool `json:"processes"`
	// Shared puts the files of all workers into one directory instead of a
	// directory for each.
	Shared bool `json:"shared"`
	// Shuffle visits the files in a random order (a function of Seed) in all
	// phases but create and readdir.
	Shuffle bool `json:"shuffle"`
	// Fsync calls fsync before the close in the create phase.
	Fsync bool `json:"fsync"`
	// DropCaches syncs and drops the kernel's caches before each phase,
	// outside the measured time. It needs root and only warns without.
	DropCaches bool `json:"drop_caches"`
	// Repeat runs everything so often; the report holds medians. Default: 1.
	Repeat int `json:"repeat"`
	// Verify checks sizes in stat, contents in read and the set of names in
	// readdir. A mismatch counts as an error.
	Verify bool `json:"verify"`
	// Seed determines contents and order.
	Seed uint64 `json:"seed"`
	// Progress, if not nil, receives a line when a phase has ended. Writes come
	// from Run's goroutine, between phases.
	Progress io.Writer `json:"-"`
}

// DefaultOptions returns the defaults for dir, with Verify set.
func DefaultOptions(dir string) Options {
	return Options{Dir: dir, Verify: true}.withDefaults()
}

// withDefaults fills in the zero values that stand for a default.
func (o Options) withDefaults() Options {
	if o.Phases == nil {
		o.Phases = []string{PhaseCreate, PhaseStat, PhaseRead, PhaseReaddir, PhaseRemove}
	}
	if o.Sizes == nil {
		o.Sizes = []int64{0, 3901, 4096, 65536}
	}
	if o.Files == 0 {
		o.Files = 1000
	}
	if o.Workers == 0 {
		o.Workers = 4
	}
	if o.Repeat == 0 {
		o.Repeat = 1
	}
	return o
}

// Validate reports all faults of the options at once, joined; each of them is
// sealfs.ErrInvalid. It looks at Dir but changes nothing.
func (o Options) Validate() error {
	o = o.withDefaults()
	var faults []error
	fault := func(format string, args ...any) {
		faults = append(faults, fmt.Errorf("bench: "+format+": %w", append(args, sealfs.ErrInvalid)...))
	}
	within := func(what string, v, low, high int64) {
		if v < low || v > high {
			fault("%s is %d, want %d to %d", what, v, low, high)
		}
	}
	if o.Dir == "" {
		fault("no directory given")
	} else if st, err := os.Stat(o.Dir); err != nil {
		fault("directory: %v", err)
	} else if !st.IsDir() {
		fault("%s is not a directory", o.Dir)
	}
	within("number of workers", int64(o.Workers), 1, WorkersMax)
	within("number of files of a worker", int64(o.Files), 1, FilesMax/int64(min(max(o.Workers, 1), WorkersMax)))
	within("number of repetitions", int64(o.Repeat), 1, RepeatMax)
	if len(o.Sizes) == 0 {
		fault("no sizes given")
	}
	for i, s := range o.Sizes {
		within("file size", s, 0, SizeMax)
		if slices.Contains(o.Sizes[:i], s) {
			fault("file size %d is given twice", s)
		}
	}
	if len(o.Phases) == 0 {
		fault("no phases given")
	}
	faults = append(faults, phaseOrderFaults(o.Phases)...)
	if o.Processes && os.Getenv(workerEnv) != "" {
		// A program that does not dispatch WorkerCommand would otherwise
		// start itself again and again.
		fault("a worker process cannot start worker processes")
	}
	return errors.Join(faults...)
}

// phaseOrderFaults plays the phases through: nothing can be read before it was
// created or after it was removed.
func phaseOrderFaults(phases []string) []error {
	var faults []error
	var files, dirs bool
	for _, name := range phases {
		fault := func(why string) {
			faults = append(faults, fmt.Errorf("bench: phase %q %s: %w", name, why, sealfs.ErrInvalid))
		}
		switch name {
		case PhaseCreate:
			if files {
				fault("comes while the files of the last one exist")
			}
			files = true
		case PhaseStat, PhaseRead, PhaseRemove:
			if !files {
				fault("comes before there are files: put create first")
			}
			files = files && name != PhaseRemove
		case PhaseReaddir:
			if !files && !dirs {
				fault("comes before there is anything to list: put create or mkdir first")
			}
		case PhaseMkdir:
			if dirs {
				fault("comes while the directories of the last one exist")
			}
			dirs = true
		case PhaseRmdir:
			if !dirs {
				fault("comes before there are directories: put mkdir first")
			}
			dirs = false
		default:
			fault("is not known; there are " + strings.Join(phaseNames, ", "))
		}
	}
	return faults
}

var phaseNames = []string{PhaseMkdir, PhaseCreate, PhaseStat, PhaseRead, PhaseReaddir, PhaseRemove, PhaseRmdir}

// sizeless reports whether a phase does the same whatever the files' size.
func sizeless(phase string) bool { return phase == PhaseMkdir || phase == PhaseRmdir }

// String describes the options in the words of the table's head.
func (o Options) String() string {
	kind, where := "threads", "one directory each"
	if o.Processes {
		kind = "processes"
	}
	if o.Shared {
		where = "one shared directory"
	}
	s := fmt.Sprintf("%d %s, %d files each, %s", o.Workers, kind, o.Files, where)
	for _, x := range []struct {
		on   bool
		text string
	}{
		{o.Fsync, "fsync"}, {o.Shuffle, "shuffled"}, {o.DropCaches, "caches dropped"}, {!o.Verify, "not verified"},
		{o.Repeat > 1, fmt.Sprintf("medians of %d runs", o.Repeat)},
	} {
		if x.on {
			s += ", " + x.text
		}
	}
	return s
}

// threadsNeeded is the GOMAXPROCS with which no worker thread that returns from
// a system call waits for another one's turn to end: the kernel, not Go's
// scheduler, shall share out the CPUs.
func threadsNeeded(workers int) int { return max(runtime.GOMAXPROCS(0), workers+2) }
