// Package txn holds the plain parts of two-phase commit: the locks that what is
// prepared holds in a store, and the state machine of a coordinator. There is
// no clock, no I/O and no goroutine in it; package server drives it over
// stores and connections, and the simulator of its tests over pretended ones.
//
// # Protocol
//
//	coordinator            party                      durable before the next step
//	Prepare ─────────────► check, lock, row Prepared  the row, on the device
//	◄───────────── vote or refusal
//	decision: the operation itself with the votes,
//	one record with the row Decision                  the record, on the device
//	Commit ──────────────► do the part, delete the row
//	answer to the client
//	Sync ────────────────► (later, for many at once)  the commit, on the device
//	Forget: delete the row Decision
//
// Presumed abort: a coordinator that has no Decision and is not busy with the
// transaction answers Resolve with "aborted"; so nothing need be written to abort.
// A party with a row that nobody has come back for asks by Resolve, again and
// again until somebody answers it; it never decides alone.
//
// # Conflicts
//
// What is prepared is locked until its fate is known. Operations of one store
// wait then; they hold nothing meanwhile. A Prepare, and a decision, waits only for
// a younger transaction; for an older one it gives up ("dies") and the
// coordinator starts again with the same age. So waiting goes from older to younger
// only, no circle can form, and the oldest always gets through.
// (Rosenkrantz, Stearns, Lewis: System Level Concurrency Control for
// Distributed Database Systems, 1978.)
package txn
