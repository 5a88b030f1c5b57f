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
//
// # Simulation
//
// TestSimulate runs the driver of package server, step by step but without
// goroutines, over pretended stores, messages and power cuts; everything follows from one seed.
//
//	go test ./txn -run Simulate -args -seeds 20000       a campaign
//	go test ./txn -v -run Simulate -args -seed 19        the story of one seed
//
// It relies on what connections promise: a message reaches only the life of the
// process that it was sent to, and a Prepare arrives once. One that came again
// after the outcome would be executed as a new one.
package txn
