// Package lsfs is the store: an append-only log over the segments of one data
// device, with the metadata region beside it. It knows nothing of files; who
// does hands it operations as Change and is asked, when segments are cleaned,
// which payloads still live (Owner).
//
// # Life of an update
//
//	Update  admit (space, ring)            may wait, holds nothing
//	        lock                           Store.mu, exclusive
//	        Change.Apply on an overlay     no effect yet
//	        record into the ring           the operation has happened for a SIGKILL
//	        overlay into the region        and for readers
//	        unlock
//	drain   ring → device, in big writes   by the drainer, or by whoever syncs
//	flush                                  the operation has happened for a power cut
//
// # Locks
//
//	Store.gc.mu      one checkpoint or cleaning at a time
//	  Store.mu       exclusive: Update, roll, start of a checkpoint; shared: reads, copies of pages
//	  Store.sync.mu  who leads the drain; the leader holds no lock while it writes,
//	                 and takes Store.mu for padding with sync.mu released
//
// # Crash argument
//
// See DESIGN.md 4.6. Its three hinges in this package: recovery stops at the
// first record that does not continue the chain (recover.go); a page goes to
// the region only after the log is durable up to it (checkpoint.go); a segment
// is given back only when a durable checkpoint lies beyond what made it dead
// (checkpoint.go).
package lsfs
