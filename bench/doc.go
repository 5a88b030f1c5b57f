// Package bench measures what small files cost on any mounted file system: the
// phases of mdtest (create, stat, read, list, remove) with empty and small
// files, by several workers at once. It speaks to the file system by system
// calls on a directory only, so that the same command measures SealFS, a peer
// or a local file system.
//
// # A run
//
// Run makes DIR/sealfs-bench.PID, starts the workers and then, for each
// repetition, each size and each phase:
//
//	parent                                worker (a thread or a process)
//	sync and drop the caches (if asked)
//	task ────────────────────────────────► prepare names, order and buffers
//	◄─────────────────────────────── ready
//	start at T (CLOCK_MONOTONIC) ────────► sleep until T
//	                                       one system call sequence per file,
//	                                       each timed
//	◄────────── begin, end, counts, latencies
//
// A phase lasts from the first worker's begin to the last worker's end, as in
// mdtest. The clock is the same in all processes of a machine, so the pipes
// between them are in no result. Threads and processes run the same loop behind
// the same messages; a worker stops after its current operation when its input
// is closed, which is how a run is cancelled and how orphans end.
//
// Contents are a function of seed, file name and position, so that a read can
// be compared without remembering anything. Comparing counts into the time of
// the phase but into no latency.
//
// RunExternal does the same service for mdtest and IOR with IO500's flags,
// where they are installed.
package bench
