// Package server is one server process: it owns stores and answers requests on
// the shards that lie on them. It joins meta (what an operation means), lsfs
// (where it becomes durable) and the cluster map (who is responsible), and adds
// what is neither: who holds a file open, who waits for a lock, how much a
// volume may hold, and the freeing of what nobody can reach in steps.
//
// # Life of a change
//
//	Do          route to the store of req.Shard; check epoch and volume
//	resolve     time; for a Write the merge with partial blocks, sums, CRC
//	lsfs.Update → change.Apply under the store's lock:
//	              meta.Apply, "is it held open?", the volume's limit
//	after       waiters of locks are woken, leftovers are queued for reclaim
//
// # Locks
//
//	store.stripes   data changes of one inode, over the merge and its Update
//	  lsfs.Store.mu (see lsfs)
//	    store.holds.mu, store.usage.mu: leaves, nothing is called under them
//	store.locks.mu  leaf, taken with nothing held
package server
