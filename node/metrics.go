package node

import (
	"errors"
	"strconv"

	"sealfs/cluster"
	"sealfs/internal/metrics"
	"sealfs/lsfs"
	"sealfs/op"
	"sealfs/router"
	"sealfs/server"
	"sealfs/wire"
)

// meters are the numbers of a process, as /metrics tells them. A fault of one of
// them is a fault of the program, and is kept until the start asks for it.
type meters struct {
	*metrics.Registry
	err error
}

func newMeters() *meters {
	m := &meters{Registry: metrics.NewRegistry()}
	m.keep(metrics.Process(m.Registry))
	return m
}

func (m *meters) keep(err error) { m.err = errors.Join(m.err, err) }

// counted returns h with its requests counted.
func (m *meters) counted(role string, h op.Handler) op.Handler {
	c, err := metrics.Handler(m.Registry, role, h)
	if m.keep(err); err != nil {
		return h
	}
	return c
}

// gauge tells a number that is asked for.
func (m *meters) gauge(name, help string, f func() float64) {
	m.keep(m.Func(name, help, metrics.KindGauge, nil, f))
}

// meter is one number of each thing of type T.
type meter[T any] struct {
	name, help string
	kind       metrics.Kind
	value      func(*T) float64
}

// collect tells the numbers of all things that list returns, each by its label.
func collect[T any](m *meters, label string, list func() []T, name func(*T) string, all []meter[T]) {
	var descs []metrics.Desc
	for _, x := range all {
		descs = append(descs, metrics.Desc{Name: x.name, Help: x.help, Kind: x.kind, Labels: []string{label}})
	}
	m.keep(m.Collect(descs, func(s *metrics.Sink) {
		for _, t := range list() {
			for _, x := range all {
				s.Emit(x.name, x.value(&t), name(&t))
			}
		}
	}))
}

// stores tells how the stores of this process are.
func (m *meters) stores(srv *server.Server) {
	type st = server.StoreStatus
	collect(m, "store", func() []st { return srv.Status().Stores }, func(s *st) string { return s.ID.String() }, []meter[st]{
		{"sealfs_store_up", "1 if the store takes changes, 0 if it is read-only or its device is silent.", metrics.KindGauge, func(s *st) float64 { return truth(s.Reason == "") }},
		{"sealfs_store_files", "Inodes of all volumes.", metrics.KindGauge, func(s *st) float64 { return float64(s.Files) }},
		{"sealfs_store_live_bytes", "Bytes of the log that are in use.", metrics.KindGauge, func(s *st) float64 { return float64(s.Stats.Live) }},
		{"sealfs_store_usable_bytes", "What the live bytes may grow to.", metrics.KindGauge, func(s *st) float64 { return float64(s.Stats.Usable) }},
		{"sealfs_store_free_segments", "Segments that are free.", metrics.KindGauge, func(s *st) float64 { return float64(s.Stats.Free) }},
		{"sealfs_store_segments", "Segments of the device.", metrics.KindGauge, func(s *st) float64 { return float64(s.Stats.Segments) }},
		{"sealfs_store_records_total", "Records appended to the log.", metrics.KindCounter, func(s *st) float64 { return float64(s.Stats.Records) }},
		{"sealfs_store_log_bytes_total", "Bytes appended to the log.", metrics.KindCounter, func(s *st) float64 { return float64(s.Stats.LogBytes) }},
		{"sealfs_store_redo_bytes_total", "Bytes of redo among them.", metrics.KindCounter, func(s *st) float64 { return float64(s.Stats.RedoBytes) }},
		{"sealfs_store_drains_total", "Writes of the log to the device.", metrics.KindCounter, func(s *st) float64 { return float64(s.Stats.Drains) }},
		{"sealfs_store_flushes_total", "Flushes of the device for the log.", metrics.KindCounter, func(s *st) float64 { return float64(s.Stats.Flushes) }},
		{"sealfs_store_cache_hits_total", "Reads answered by the block cache.", metrics.KindCounter, func(s *st) float64 { return float64(s.Stats.CacheHits) }},
		{"sealfs_store_cache_misses_total", "Windows read into the block cache.", metrics.KindCounter, func(s *st) float64 { return float64(s.Stats.CacheMisses) }},
		{"sealfs_store_device_reads_total", "Reads of data from the device.", metrics.KindCounter, func(s *st) float64 { return float64(s.Stats.DeviceReads) }},
		{"sealfs_store_ring_waits_total", "Updates that waited for staging.", metrics.KindCounter, func(s *st) float64 { return float64(s.Stats.RingWaits) }},
		{"sealfs_store_space_waits_total", "Updates that waited for the cleaner.", metrics.KindCounter, func(s *st) float64 { return float64(s.Stats.SpaceWaits) }},
		{"sealfs_store_checkpoints_total", "Checkpoints of the region.", metrics.KindCounter, func(s *st) float64 { return float64(s.Stats.Checkpoints) }},
		{"sealfs_store_far_checkpoints_total", "Checkpoints of the region on the data device.", metrics.KindCounter, func(s *st) float64 { return float64(s.Stats.FarCheckpoints) }},
		{"sealfs_store_far_bytes_total", "Bytes written for them.", metrics.KindCounter, func(s *st) float64 { return float64(s.Stats.FarBytes) }},
		{"sealfs_store_far_segments", "Segments that hold them.", metrics.KindGauge, func(s *st) float64 { return float64(s.Stats.FarSegments) }},
		{"sealfs_store_region_rebuildable", "1 if a lost region can be made again, 0 if it cannot at present.", metrics.KindGauge, func(s *st) float64 { return truth(s.Stats.FarReason == "") }},
		{"sealfs_store_cleaned_segments_total", "Segments that the cleaner emptied.", metrics.KindCounter, func(s *st) float64 { return float64(s.Stats.Cleaned) }},
		{"sealfs_store_moved_bytes_total", "Live bytes that the cleaner moved.", metrics.KindCounter, func(s *st) float64 { return float64(s.Stats.MovedBytes) }},
		{"sealfs_store_leases", "Leases that sessions hold on inodes.", metrics.KindGauge, func(s *st) float64 { return float64(s.Leases.Held) }},
		{"sealfs_store_lease_sessions", "Sessions that may hold leases.", metrics.KindGauge, func(s *st) float64 { return float64(s.Leases.Sessions) }},
		{"sealfs_store_lease_revocations_total", "Revocations of leases.", metrics.KindCounter, func(s *st) float64 { return float64(s.Leases.Revoked) }},
		{"sealfs_store_lease_waits_total", "Requests that waited until a lease was given back.", metrics.KindCounter, func(s *st) float64 { return float64(s.Leases.Waits) }},
		{"sealfs_store_scrub_running", "1 while a scrub runs.", metrics.KindGauge, func(s *st) float64 { return truth(s.Scrub.State == lsfs.ScrubRunning) }},
		{"sealfs_store_scrub_progress_ratio", "How much of the present scrub is done, 0 to 1; 0 without one.", metrics.KindGauge, func(s *st) float64 { return scrubDone(s.Scrub.Round) }},
		{"sealfs_store_scrub_ended_seconds", "When the last whole scrub ended, in seconds since 1970; 0: none since the start.", metrics.KindGauge, func(s *st) float64 { return scrubEnded(&s.Scrub) }},
		{"sealfs_store_scrub_bytes_total", "Bytes that scrubs have read.", metrics.KindCounter, func(s *st) float64 { return float64(s.Scrub.Bytes) }},
		{"sealfs_store_scrub_damages_total", "Damaged places that scrubs have found; each scrub counts them again.", metrics.KindCounter, func(s *st) float64 { return float64(s.Scrub.Damages) }},
		{"sealfs_store_damaged_places", "Damaged places that the last whole scrub found, or the present one if these are more.", metrics.KindGauge, func(s *st) float64 { return float64(s.Scrub.Standing()) }},
	})
	type usage = server.VolumeUsage
	collect(m, "volume", srv.Usages, func(u *usage) string { return strconv.FormatUint(uint64(u.ID), 10) }, []meter[usage]{
		{"sealfs_volume_bytes", "What a volume holds on the stores of this process, in bytes.", metrics.KindGauge, func(u *usage) float64 { return float64(u.Bytes) }},
		{"sealfs_volume_inodes", "What a volume holds on the stores of this process, in inodes.", metrics.KindGauge, func(u *usage) float64 { return float64(u.Inodes) }},
	})
}

// peers tells how the servers are reached that routers send requests to.
func (m *meters) peers(list func() []router.ServerStats) {
	type st = router.ServerStats
	collect(m, "server", list, func(s *st) string { return s.Addr }, []meter[st]{
		{"sealfs_peer_up", "1 if there is a connection to the server.", metrics.KindGauge, func(s *st) float64 { return truth(s.State == router.Up) }},
		{"sealfs_peer_requests_total", "Requests for the server.", metrics.KindCounter, func(s *st) float64 { return float64(s.Requests) }},
		{"sealfs_peer_failures_total", "Requests that the server did not answer.", metrics.KindCounter, func(s *st) float64 { return float64(s.Failures) }},
		{"sealfs_peer_connects_total", "How often the server was connected to.", metrics.KindCounter, func(s *st) float64 { return float64(s.Links) }},
		{"sealfs_peer_sent_bytes_total", "Bytes sent to the server.", metrics.KindCounter, func(s *st) float64 { return float64(s.Wire.BytesOut) }},
		{"sealfs_peer_received_bytes_total", "Bytes received from the server.", metrics.KindCounter, func(s *st) float64 { return float64(s.Wire.BytesIn) }},
	})
}

// mounts tells what mounts have asked servers for.
func (m *meters) mounts(list func() []*mount) {
	const name = "sealfs_mount_requests_total"
	d := metrics.Desc{Name: name, Help: "Requests that a mount has sent to servers.", Kind: metrics.KindCounter, Labels: []string{"mount", "type"}}
	m.keep(m.Collect([]metrics.Desc{d}, func(s *metrics.Sink) {
		for _, at := range list() {
			at.client.Requests(func(t op.Type, n uint64) {
				if n > 0 {
					s.Emit(name, float64(n), at.point, t.String())
				}
			})
		}
	}))
}

// wire tells what all clients together sent and received.
func (m *meters) wire(stats func() wire.Stats) {
	type st = wire.Stats
	count := func(name, help string, f func(*st) uint64) {
		m.keep(m.Func(name, help, metrics.KindCounter, nil, func() float64 { s := stats(); return float64(f(&s)) }))
	}
	count("sealfs_wire_frames_in_total", "Frames received.", func(s *st) uint64 { return s.FramesIn })
	count("sealfs_wire_frames_out_total", "Frames sent.", func(s *st) uint64 { return s.FramesOut })
	count("sealfs_wire_bytes_in_total", "Bytes received.", func(s *st) uint64 { return s.BytesIn })
	count("sealfs_wire_bytes_out_total", "Bytes sent.", func(s *st) uint64 { return s.BytesOut })
}

// manager tells how a manager is, and what it knows.
func (m *meters) manager(k *cluster.Manager) {
	m.gauge("sealfs_manager_leading", "1 if this manager leads.", func() float64 { return truth(k.Leading()) })
	m.gauge("sealfs_manager_has_leader", "1 if this manager knows of one that leads.", func() float64 { return truth(k.Leader() != "") })
	m.gauge("sealfs_manager_map_version", "Version of the cluster map.", func() float64 {
		if mp := k.Map(); mp != nil {
			return float64(mp.Version)
		}
		return 0
	})
	m.gauge("sealfs_manager_sessions", "Sessions of clients that live.", func() float64 { return float64(len(k.SessionList().Live)) })
	type st = cluster.StoreInfo
	collect(m, "store", func() []st {
		if mp := k.Map(); mp != nil {
			return mp.Stores
		}
		return nil
	}, func(s *st) string { return s.ID.String() }, []meter[st]{
		{"sealfs_cluster_store_up", "1 if the store is up, as the cluster map has it.", metrics.KindGauge, func(s *st) float64 { return truth(s.State == cluster.StoreUp) }},
		{"sealfs_cluster_store_bytes", "Capacity of the store.", metrics.KindGauge, func(s *st) float64 { return float64(s.Bytes) }},
	})
}

func truth(b bool) float64 {
	if b {
		return 1
	}
	return 0
}
