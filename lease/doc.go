// Package lease knows what the sessions of one store believe, and takes it back
// before it becomes untrue.
//
// A session that watches (op.Watch) may hold a lease on an inode. With Read it
// believes what it was told of the inode while it held it: attributes, extended
// attributes, content, and of a directory names and listings. With Write, which
// nobody else can hold anything beside, it also delays writes. A change of another
// session that would make something untrue that somebody may believe, or a question
// whose answer a holder of Write alone knows, must wait until that is given back.
//
//	Ask ──► nobody is in the way: leases are granted with the answer
//	   └──► somebody is: revocations are issued, the ticket waits, nothing else is held
//	          Watch (acknowledges) or End ──► the ticket is ready ──► Ask again
//
// A Table is plain state without goroutines, clocks, channels or I/O. It is
// consulted under the lock of the store whose state the answer was read from, or
// the change is made in, so nothing comes between. Its own mutex is a leaf.
//
// What makes it sound, each rule with what would go wrong without it:
//
//   - A session gets nothing of an inode while a revocation of it is not
//     acknowledged: the acknowledgement would cover what was told after it.
//   - Nobody gets anything of an inode while a ticket waits for it, or keeps it
//     for the rest of its request: a name that was given back would be believed again
//     before the change, and a stream of questions could hold a change up for ever.
//   - Every answer that grants carries the number of the last revocation issued:
//     its receiver ignores the grant if it has seen a later one of that inode, which
//     has overtaken the answer.
//   - The numbers of an incarnation of the store begin where no earlier ones
//     have been, so that a late acknowledgement never counts for another revocation.
//   - A lease is forgotten here only when the session has acknowledged its end,
//     has said itself that it believes nothing any more, or has ended, or when the
//     inode itself is gone.
package lease
