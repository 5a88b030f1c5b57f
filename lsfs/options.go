package lsfs

import (
	"errors"
	"fmt"
	"log/slog"
	"time"

	"sealfs"
	"sealfs/internal/turn"
	"sealfs/pmem"
)

// Options of a run. The zero value of a field means its default.
type Options struct {
	Logger *slog.Logger // nil: no log

	StagingPath  string // file of the ring, on tmpfs; "": heap memory (nothing survives the process)
	StagingBytes int64  // size of the ring: at least two segments, at most a quarter of the device; default 128 MiB

	DrainBytes    int64         // drain when so much waits; default 1 MiB
	DrainInterval time.Duration // and after this time in any case; default 10 ms
	LagMax        time.Duration // flush at least so often while there is anything to flush; default 500 ms

	CheckpointBytes int64 // checkpoint after so much log; default 64 MiB
	BudgetBytes     int64 // private memory of the region; default 256 MiB
	FarBytes        int64 // far checkpoint after so much log; default 1/16 of the device, from 4 segments to 2 GiB; negative: none
	RegionMaxBytes  int64 // the region grows up to this; default 64 GiB
	CacheBytes      int64 // cache of device blocks; default 32 MiB

	ReserveSegments int     // kept for cleaner, checkpoints and deletes; default 3
	CleanLow        int     // clean when fewer segments are free, the harder the fewer; default see cleanLow
	CleanLimit      float64 // segments fuller than this are not cleaned; default 0.95

	// Mend changes the region of a damaged store when the log has been replayed and
	// before anything that stands in it is believed; nil: nothing. What it does
	// becomes durable with the checkpoint of the recovery.
	Mend func(tx *pmem.Tx) error

	ScrubInterval time.Duration // verify everything so often; 0: only when asked
	ScrubRate     int64         // with so many bytes a second; 0: no limit

	// CutLog opens a store although its log has rotted in a place that recovery
	// needs: everything that was done after it is lost, also what was synced.
	CutLog bool

	// Turns are the lanes of the store's goroutines in a simulation, which numbers
	// them; its owner has those from TurnsUsed on for its own.
	Turns turn.Turns

	manual  bool  // tests: no background goroutines
	farStep int64 // tests: bytes of one step of a far checkpoint, 16 MiB otherwise
}

// The lanes of a store's goroutines.
const (
	turnDrainer = iota
	turnCollector

	TurnsUsed // how many lanes of Options.Turns a store uses itself
)

func (o Options) withDefaults(segments uint32) Options {
	def := func(p *int64, v int64) {
		if *p == 0 {
			*p = v
		}
	}
	def(&o.StagingBytes, 128<<20)
	def(&o.DrainBytes, 1<<20)
	def(&o.CheckpointBytes, 64<<20)
	def(&o.BudgetBytes, 256<<20)
	def(&o.RegionMaxBytes, 64<<30)
	def(&o.farStep, 16<<20)
	def(&o.CacheBytes, 32<<20)
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.DrainInterval == 0 {
		o.DrainInterval = 10 * time.Millisecond
	}
	if o.LagMax == 0 {
		o.LagMax = 500 * time.Millisecond
	}
	if o.ReserveSegments == 0 {
		o.ReserveSegments = 3
	}
	if o.CleanLow == 0 {
		o.CleanLow = cleanLow(int(segments), o.ReserveSegments)
	}
	if o.CleanLimit == 0 {
		o.CleanLimit = 0.95
	}
	return o
}

// Validate reports all faults of o at once.
func (o Options) Validate() error {
	var errs []error
	bad := func(ok bool, format string, args ...any) {
		if !ok {
			errs = append(errs, fmt.Errorf(format+": %w", append(args, sealfs.ErrInvalid)...))
		}
	}
	bad(o.StagingBytes >= 0, "staging of %d bytes", o.StagingBytes)
	bad(o.DrainBytes >= 0, "drain threshold of %d bytes", o.DrainBytes)
	bad(o.DrainInterval >= 0 && o.DrainInterval <= time.Second, "drain interval %v is not between 0 and 1s", o.DrainInterval)
	bad(o.LagMax >= 0 && o.LagMax <= time.Second, "flush lag %v is not between 0 and 1s", o.LagMax)
	bad(o.CheckpointBytes >= 0, "checkpoint interval of %d bytes", o.CheckpointBytes)
	bad(o.BudgetBytes >= 0, "memory budget of %d bytes", o.BudgetBytes)
	bad(o.RegionMaxBytes >= 0, "region limit of %d bytes", o.RegionMaxBytes)
	bad(o.CacheBytes >= 0, "cache of %d bytes", o.CacheBytes)
	bad(o.ReserveSegments == 0 || o.ReserveSegments >= 3, "reserve of %d segments is below 3", o.ReserveSegments)
	bad(o.CleanLimit >= 0 && o.CleanLimit < 1, "clean limit %g is not between 0 and 1", o.CleanLimit)
	bad(o.ScrubInterval >= 0, "scrub interval of %v", o.ScrubInterval)
	bad(o.ScrubRate >= 0, "scrub at %d bytes a second", o.ScrubRate)
	return errors.Join(errs...)
}

// cleanLow returns the default of Options.CleanLow: a thirty-second of all
// segments. What is kept free makes cleaning dearer, since the rest is the fuller.
// So much must be free that bursts find room; of few segments a larger part.
func cleanLow(segments, reserve int) int {
	return max(segments/32, min(segments/16, reserve+5), reserve+2)
}
