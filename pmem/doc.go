// Package pmem is the memory of a store: a region of 4 KiB pages, changed by
// transactions that yield redo, with one B+tree of byte-string keys in it; the
// mechanics of its checkpoint; and the staging memory of the store's log.
//
// # Region and latch
//
// A Region is seen through a mapping that the medium does not see: bytes reach
// the medium only by a checkpoint. Package pmem does not lock. The caller has a
// latch (lsfs.Store.mu) and every method says how it must be held: shared, where
// the region's bytes are read, exclusive, where they or the sets of dirty pages
// change, or not at all. Only Grow, NeedsGrowth, VerifyAll and a checkpoint's Write
// and Finish may run without it, beside anything else.
//
// # Transactions
//
// There is one Tx. Pages that it changes are copied to an overlay, where it sees
// them; the region itself stays as it is until Commit. AppendRedo encodes the
// difference as absolute bytes. The caller makes that redo safe in its log
// between the two; replaying redo in the order of the log, from the start that
// the last checkpoint noted, over whatever mixture of older and newer pages the
// medium holds, gives back the committed state: every byte that changed since
// then is in it.
//
// # Damage
//
// A page is compared with its sum when it is looked at first after it came from
// the medium. Still nothing in it is believed: an offset is checked before it is
// followed, a child must lie one level below its parent, so that every search
// ends. What breaks a rule is a *sealfs.Corruption that names the region and the
// byte.
//
// The bytes are described in package sealfs/pmem/layout.
package pmem
