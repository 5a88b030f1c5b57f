// Package meta is the namespace of a store: directories, inodes, extents,
// attributes, locks, sessions and counters of all its shards, as a pure function
//
//	(state, request) → (redo, reply)
//
// over the B+tree of pmem. It does no I/O, reads no clock, draws no random
// number and keeps nothing between calls, so the same history of requests
// gives the same state on every replica. What differs between replicas, the
// addresses of payloads, comes in through Space and stays out of Dump.
//
// # Contract
//
//   - Apply runs under the store's exclusive latch, everything else under the
//     shared one. Nothing blocks. Nothing that is handed out aliasing a page
//     (Extent.Sums, decoded records) may be kept beyond the latch or a change.
//   - A refusal is a code in the reply; the caller then drops the transaction.
//   - Damaged records are reported as *sealfs.Corruption and never panic.
//   - Apply bumps the sequence and the last time of the addressed shard
//     (Request.Shard) only. Of the other shards that an operation touches it
//     changes the row in the tree only when their inode counter moves. A request
//     that turns out to change nothing (a rename onto itself, a create that finds
//     its file) leaves the addressed row as it was, too.
//
// # Bounded work
//
// One operation frees at most FreeMax items (extents, parts of attributes,
// locks). What remains of a large file keeps a row in the orphan table and is
// freed by Reclaim. Reply.Held names the inode that lost its last name, whose
// truncated tail is not freed yet, or that Reclaim was asked for; Reply.Eof with
// it says that nothing is left to reclaim. Whoever holds an inode open has the
// flag op.Held set in everything that may take its last name, and in Reclaim:
// then its contents stay.
package meta
