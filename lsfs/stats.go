package lsfs

import (
	"sync/atomic"

	"sealfs"
	"sealfs/disk"
	"sealfs/pmem"
)

type counters struct {
	records, logBytes, redoBytes, padBytes, rolls      atomic.Uint64
	drains, drainBytes, flushes                        atomic.Uint64
	ringReads, cacheHits, cacheMisses, deviceReads     atomic.Uint64
	ringWaits, spaceWaits, spaceBrakes, memoryWaits    atomic.Uint64
	checkpoints, cleaned, moved, movedBytes, givenBack atomic.Uint64
	scrubBytes, scrubDamages                           atomic.Uint64
	farCheckpoints, farPages, farBytes, farGivenUp     atomic.Uint64
}

// Stats is what a store has done since it was opened, and how full it is.
type Stats struct {
	Records     uint64 `json:"records"`      // appended to the log
	LogBytes    uint64 `json:"log_bytes"`    // of all records
	RedoBytes   uint64 `json:"redo_bytes"`   // of them, redo
	PadBytes    uint64 `json:"pad_bytes"`    // of them, padding before flushes
	Rolls       uint64 `json:"rolls"`        // segments opened
	Drains      uint64 `json:"drains"`       // writes of the log to the device
	DrainBytes  uint64 `json:"drain_bytes"`  // in them
	Flushes     uint64 `json:"flushes"`      // of the device for the log
	RingReads   uint64 `json:"ring_reads"`   // pieces read from the ring
	CacheHits   uint64 `json:"cache_hits"`   // from the cache
	CacheMisses uint64 `json:"cache_misses"` // windows read into it
	DeviceReads uint64 `json:"device_reads"` // of data
	RingWaits   uint64 `json:"ring_waits"`   // updates that waited for the ring
	SpaceWaits  uint64 `json:"space_waits"`  // updates that waited for the cleaner
	SpaceBrakes uint64 `json:"space_brakes"` // updates that were slowed down to the cleaner's speed
	MemoryWaits uint64 `json:"memory_waits"` // updates that waited for the region's budget
	Checkpoints uint64 `json:"checkpoints"`
	Cleaned     uint64 `json:"cleaned"`     // segments
	Moved       uint64 `json:"moved"`       // extents
	MovedBytes  uint64 `json:"moved_bytes"` // in them
	GivenBack   uint64 `json:"given_back"`  // segments

	FarCheckpoints uint64     `json:"far_checkpoints"`
	FarPages       uint64     `json:"far_pages"`            // of the region, copied for them
	FarBytes       uint64     `json:"far_bytes"`            // written for them
	FarGivenUp     uint64     `json:"far_given_up"`         // how often space was short
	FarSegments    int        `json:"far_segments"`         // that hold copies now
	FarHeld        int        `json:"far_held_segments"`    // dead ones of the log that a rebuild would need
	FarStart       sealfs.LSN `json:"far_start"`            // where a rebuild would begin, 0 if it cannot
	FarReason      string     `json:"far_reason,omitempty"` // why the region cannot be rebuilt; "" if it can
	FarFailed      string     `json:"far_failed,omitempty"` // why the last far checkpoint was not completed; "" if it was

	Segments     int        `json:"segments"`
	SegmentBytes int64      `json:"segment_bytes"`
	Free         int        `json:"free_segments"`
	Live         int64      `json:"live_bytes"`
	Usable       int64      `json:"usable_bytes"` // what Live may grow to beside the far checkpoint
	Tail         sealfs.LSN `json:"tail"`
	Durable      sealfs.LSN `json:"durable"`
	Incarnation  uint32     `json:"incarnation"`
	Device       disk.Stats `json:"device"`
	Region       pmem.Usage `json:"region"`
	RegionMode   string     `json:"region_mode"` // how it is mapped: pmem.ModeFile or pmem.ModeDax
	// What was done on persistent memory, for region and ring.
	Persisted pmem.Persisted `json:"persisted"`
}

// Stats returns the store's counters.
func (s *Store) Stats() Stats {
	c := &s.stats
	st := Stats{
		Records: c.records.Load(), LogBytes: c.logBytes.Load(), RedoBytes: c.redoBytes.Load(), PadBytes: c.padBytes.Load(),
		Rolls: c.rolls.Load(), Drains: c.drains.Load(), DrainBytes: c.drainBytes.Load(), Flushes: c.flushes.Load(),
		RingReads: c.ringReads.Load(), CacheHits: c.cacheHits.Load(), CacheMisses: c.cacheMisses.Load(), DeviceReads: c.deviceReads.Load(),
		RingWaits: c.ringWaits.Load(), SpaceWaits: c.spaceWaits.Load(), SpaceBrakes: c.spaceBrakes.Load(), MemoryWaits: c.memoryWaits.Load(), Checkpoints: c.checkpoints.Load(),
		Cleaned: c.cleaned.Load(), Moved: c.moved.Load(), MovedBytes: c.movedBytes.Load(), GivenBack: c.givenBack.Load(),
		FarCheckpoints: c.farCheckpoints.Load(), FarPages: c.farPages.Load(), FarBytes: c.farBytes.Load(), FarGivenUp: c.farGivenUp.Load(),
		Device: s.dev.Stats(), Durable: s.Durable(), Incarnation: s.incarnation,
	}
	s.View(func(pmem.Reader) error { // without an error's figures: the store says why
		s.addState(&st)
		return nil
	})
	return st
}

// addState adds what the lock guards. Needs mu, shared.
func (s *Store) addState(st *Stats) {
	st.Segments, st.SegmentBytes, st.Free, st.Live, st.Usable, st.Tail = len(s.segs), s.seg, len(s.free), s.live, s.usable(), s.tail()
	st.FarSegments, st.FarHeld, st.FarReason, st.FarFailed = len(s.far.segs), len(s.far.held), s.far.reason, s.far.failed
	if st.FarReason == "" {
		st.FarStart = s.far.start
	}
	st.Usable = max(st.Live, st.Usable-int64(st.FarSegments)*s.seg)
	st.Region, st.RegionMode = s.region.Usage(), pmem.ModeFile
	if s.isDax() {
		st.RegionMode = pmem.ModeDax
		st.Persisted = s.region.Persisted().Plus(s.staging.Persisted())
	}
}
