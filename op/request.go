package op

import (
	"sealfs"
)

// Type says what a request asks for. Values stand on the wire and in logs:
// append only, never reorder.
type Type uint8

// Changes come first: they are logged, carry a time and, for clients that may
// have to retry, a session sequence.
const (
	_ Type = iota

	MakeRoot    // make the root directory of Volume: Ino (result), Mode, UID, GID
	Create      // regular file Name in Dir: Mode, Valid (the umask), UID, GID; flag Excl
	Mknod       // device, fifo, socket or regular file Name in Dir: Mode, Valid (the umask), UID, GID, Rdev
	Mkdir       // directory Name in Dir, its inode in shard Shard2: Mode, Valid (the umask), UID, GID. Resolved, in a decision: Data is the ACL that is handed down
	Symlink     // Name in Dir with target Data: UID, GID
	Link        // Name in Dir for Ino
	Unlink      // Name in Dir, not a directory
	Rmdir       // Name in Dir, an empty directory
	Rename      // Name in Dir to Name2 in Dir2; flags NoReplace, Exchange. Resolved, in a decision: Off and Ino are what the names stand for
	Setattr     // Ino: the fields that Valid names
	Write       // Ino: payload at Off; flags Append, KillPriv, Within. Resolved: Off and Data cover whole blocks (but for the file's tail), Size is where the sender's bytes end
	Fallocate   // Ino: Off, Len, Mode (the FALLOC_FL bits)
	Setxattr    // Ino: attribute Name = Data; flags XCreate, XReplace. ACLAccess or ACLDefault: a POSIX ACL, an empty one removes it; flag KillPriv only
	Removexattr // Ino: attribute Name; that there is no ACL is no error
	SetLock     // Ino: Lock; LockType Unlock releases
	DropOwner   // Ino: all POSIX locks of Owner (close), or flock with flag Flock
	DropSession // shard Shard: everything that session Owner holds there
	Reclaim     // Ino: one bounded step of freeing what nobody can reach
	Tmpfile     // nameless regular file in the directory Dir: Mode, Valid (the umask), UID, GID
	DropVolume  // shard Shard: one bounded step of freeing the volume's inodes

	lastChange // below: questions, which are not logged

	Lookup    // Name in Dir
	Getattr   // Ino
	Readlink  // Ino
	Read      // Ino: Off, Len
	Readdir   // Dir from cookie Off, about Len bytes; flag Plus
	Getxattr  // Ino: Name, at most Len bytes (0: only the size)
	Listxattr // Ino
	Statfs    // Volume
	TestLock  // Ino: Lock; answers the lock in the way, or Unlock
	Seek      // Ino: Off; Mode 3 = SEEK_DATA, 4 = SEEK_HOLE. In a chunk, for data: up to Len behind Off, in all chunks that the shard has
	Sync      // everything answered so far is durable on return
	Open      // Ino: the session holds it open. The content of a file of at most Len bytes comes along
	Release   // Ino: the session lets it go, Len times; and what is listed in Data (see AppendOpens), of the same store
	WaitLock  // SetLock that waits

	// Changes between servers, and those of large files: they came later.

	Prepare // a party's Part of Tx, on the object that the part names; Coord decides. Lock.Owner is the session that has asked for it all. Answers the object's attributes: the vote
	Commit  // shard Shard: what was prepared there for Tx happens, at the time Mtime
	Abort   // shard Shard: what was prepared there for Tx is forgotten
	Forget  // shard Shard of a coordinator: every party has Tx durably
	Extend  // Ino, of generation Gen: Size is raised to Size and Bound to Off, if they are less; the times are touched
	Purge   // shard Shard: one bounded step of freeing what it holds of Ino's chunks at or beyond Off, of generations before Gen. Answers Eof when nothing is left

	Resolve   // shard Shard of a coordinator: the fate of Tx, in the reply's Off, and when it was decided, in Attr.Mtime
	Ancestors // Ino, a directory: it and what is above it, as far as the store knows, in the reply's Entries; Off is the next to ask for elsewhere, 0 after a root. Tx, if any, may see its own parties
	Register  // shard Shard: the files of its store that the session holds open, and no others: Len in all, those from number Off on listed in Data (see AppendOpens, OpensDelayed). It counts with the last of them

	WaitFor // shard Shard, which knows the waits of Volume: Lock.Owner of Session waits on Ino, by the wait number Off, for the owners listed in Data (see AppendOwners); for nobody any more without Data. The wait number Len, if not 0, was found to be over. Answers in Data the waits that close a circle with it, if any (see AppendWait). With Mode 1 Data lists such a circle instead: Eof says that all of it is known still, and that the wait Off is taken out
	Waiting // Ino: whether the one wait listed in Data (see AppendWait) is one still: Eof

	Watch // shard Shard: the session has carried out the revocations of that store up to number Off, and believes nothing any more of the inodes listed in Data (see AppendOpens); waits for further ones, Len milliseconds at most. Answers Revokes

	Tally // shard Shard, Ino: the step Mode of passing totals of directories on

	Grant  // shard Shard, of the keeper of Volume's quota: the store listed in Data has the limits Off (bytes) and Len (inodes) by the version Gen, since Size, knows the map Ctime, and needs Atime bytes and Mtime inodes more. Answers its new limits in Space, and their version in Off. Resolved: that store's row becomes what Off, Len, Gen and Size say
	Recall // shard Shard: its store gives back what it may use of Volume and does not, under the quota Off (bytes) and Len (inodes), in force since Size, by the version Gen. Answers its limits in Space, their version in Off, and Eof unless it is about to free something

	// Changes of directories whose entries are split over shards, between servers, and what a client asks
	// the home of one.

	Split     // Ino, a directory: its home does the Step in Mode
	Partition // the partition Ino of a directory, or shard Shard: the Step in Mode
	Join      // Ino, a directory: its home takes its partitions back if all are empty

	numTypes
)

// The steps of a Tally.
const (
	_         = iota
	TallyTell // Ino tells its parent, or the directories of its names, what is new: from Dir on, at the version Gen. Answers Eof, or Off and the version
	TallySend // what shard Shard has for the directory Ino elsewhere becomes a letter. Answers Eof if there is nothing
	TallyTake // the directory Ino takes the letter Gen of shard Shard2, which is in Data
	TallySent // the directory Ino has the letter Gen of shard Shard durably. Answers Eof if nothing else waits
)

// The extended attributes under which a directory tells what the tree below it holds: the
// sizes of its files, how many names there are of what is no directory, and directories. They
// can only be read, and are not listed.
const (
	AttrTotals = "sealfs.dir." // begins all of them
	AttrBytes  = AttrTotals + "bytes"
	AttrFiles  = AttrTotals + "files"
	AttrDirs   = AttrTotals + "dirs"
)

// The steps of a Split: what happens at the home of a directory, Ino.
const (
	SplitBegin  = 1 + iota // entries may move from now on
	SplitMoved             // the partition Off has moved to the directory Dir2: Len entries, of which Size are subdirectories
	SplitClean             // one bounded step of freeing what has moved. Answers Eof when nothing is left
	SplitSealed            // partitions are about to be sealed
	SplitFold              // its times are Mtime and Ctime, its version is greater by Len: what the sealed partitions say
	SplitJoined            // it has no partitions any more
	SplitDone              // nothing is left to be done: all partitions are open, or, after SplitJoined, gone
)

// The steps of a Partition.
const (
	PartitionBegin  = 1 + iota // shard Shard, of the directory Dir, number Off: it is there, empty and not in use, for attempt Gen, with Volume, Mtime, and, of the directory, the mode in Rdev, UID, GID and the default ACL in Data, and with the flag Counted in totals. Answers Attr; Eof when it is empty
	PartitionAdd               // the entries in Data (see AppendEntry) come to the Len that it has from attempt Gen
	PartitionOpen              // it has Len entries from attempt Gen (0: whatever it has), and is in use from now on
	PartitionSeal              // its entries do not change until it is opened again. Gen is greater than any before. Flag Excl: it must be empty, and nothing of it is believed any more
	PartitionReopen            // sealed by the Seal of number Gen, it is in use again, with Mtime, Rdev, UID, GID and Data as for Begin
	PartitionDrop              // shard Shard, of the directory Dir, number Off: closed by the Seal of number Gen, it is freed
)

// The fates of a transaction, in the answer to Resolve.
const (
	FateAborted   = 0 // nothing is known of it, so it never will be committed
	FatePending   = 1
	FateCommitted = 2
)

// lateChanges are the changes that came after the questions.
const lateChanges, lateQuestions = Prepare, Resolve

var typeNames = [numTypes]string{
	MakeRoot: "makeroot", Create: "create", Mknod: "mknod", Mkdir: "mkdir", Symlink: "symlink",
	Link: "link", Unlink: "unlink", Rmdir: "rmdir", Rename: "rename", Setattr: "setattr",
	Write: "write", Fallocate: "fallocate", Setxattr: "setxattr", Removexattr: "removexattr",
	SetLock: "setlock", DropOwner: "dropowner", DropSession: "dropsession", Reclaim: "reclaim",
	Tmpfile: "tmpfile", DropVolume: "dropvolume",
	Lookup: "lookup", Getattr: "getattr", Readlink: "readlink", Read: "read", Readdir: "readdir",
	Getxattr: "getxattr", Listxattr: "listxattr", Statfs: "statfs", TestLock: "testlock",
	Seek: "seek", Sync: "sync", Open: "open", Release: "release", WaitLock: "waitlock",
	Prepare: "prepare", Commit: "commit", Abort: "abort", Forget: "forget", Extend: "extend", Purge: "purge",
	Resolve: "resolve", Ancestors: "ancestors", Register: "register", Watch: "watch", Tally: "tally",
	WaitFor: "waitfor", Waiting: "waiting", Grant: "grant", Recall: "recall", Split: "split", Partition: "partition", Join: "join",
}

// String returns the lower-case name of t.
func (t Type) String() string {
	if t.Valid() {
		return typeNames[t]
	}
	return "unknown"
}

// Valid reports whether t is defined.
func (t Type) Valid() bool { return t < numTypes && typeNames[t] != "" }

// Changes reports whether requests of type t change state and are logged.
func (t Type) Changes() bool {
	return t > 0 && t < lastChange || t >= lateChanges && t < lateQuestions || t == Grant || t == Tally || t == Split || t == Partition
}

// Types returns all defined types in order.
func Types() []Type {
	var ts []Type
	for t := Type(1); t < numTypes; t++ {
		if t.Valid() {
			ts = append(ts, t)
		}
	}
	return ts
}

// Flags modify a request.
type Flags uint32

// The flags. Those marked resolved are set by the primary, never by clients.
const (
	Excl      Flags = 1 << iota // Create: the name must be new
	NoReplace                   // Rename: the target must not exist
	Exchange                    // Rename: the two names change places
	Append                      // Write: at the end of the file
	KillPriv                    // Write, Setattr: clear setuid and setgid bits; Setxattr of ACLAccess: clear the setgid bit
	XCreate                     // Setxattr: the attribute must be new
	XReplace                    // Setxattr: the attribute must exist
	Plus                        // Readdir: with attributes
	Flock                       // SetLock, DropOwner: flock(2) locks, apart from POSIX ones
	Held                        // Unlink, Rmdir, Rename: (resolved) what loses its last name is held open: keep it
	OpenIt                      // Create, Tmpfile: the sender holds the new file open
	AllOwners                   // DropOwner: whatever the owner within the session
	Walked                      // Rename: (resolved) no moved directory is above its new place
	Purged                      // Reclaim: (resolved) no chunk of the file is left in other shards
	OFD                         // WaitLock: the owner is an open file, not a process: it may wait in a circle
	WantWrite                   // Open: the sender is going to write, and wants the lease to delay it
	Counted                     // Prepare of PartNew: the directory has totals

	flagsAll Flags = 1<<iota - 1
)

// Within, in a Write, says that the file must not grow: what lies beyond its end is left out. It is the bit that
// means NoReplace in a Rename.
const Within = NoReplace

// The attributes under which an inode has POSIX ACLs, in Linux's format (version
// 2): who may access it, and, of a directory, what it hands down to what is made in it.
const (
	ACLAccess  = "system.posix_acl_access"
	ACLDefault = "system.posix_acl_default"
)

// ModeACL is set in Attr.Mode, above the bits of stat(2), for an inode that has an
// access ACL: without it nobody need ask.
const ModeACL = 1 << 16

// Valid bits of Setattr, in Request.Valid. Their number is that of the bits of
// a umask, which stands there in requests that make inodes.
const (
	SetMode uint32 = 1 << iota
	SetUID
	SetGID
	SetSize
	SetAtime
	SetMtime
	SetAtimeNow
	SetMtimeNow
	SetCtime
	SetNothing // a change of owner and group that changes neither: the time of change alone
	// SetAccess says that Ino was read at Atime (see Accessed), and so were others of the
	// shard, AccessMax in all, whose times stand in Data as counts do (AppendOpens). It stands alone.
	SetAccess
	setAll uint32 = 1<<iota - 1
)

// AccessMax is how many inodes one Setattr with SetAccess may be about.
const AccessMax = 64

// Accessed returns the time of access of an inode with these times after it was read at the
// time now. It is Linux's relatime: reading counts when nobody has read
// the inode since it was changed, and once a day.
func Accessed(atime, mtime, ctime, now int64) int64 {
	const day = 24 * 60 * 60 * 1e9
	if atime <= mtime || atime <= ctime || now-atime >= day {
		return now
	}
	return atime
}

// Tx names a transaction: an operation whose parties lie on several stores. Age
// orders transactions, the older going first; a new attempt of the same operation keeps
// it and takes another nonce. The zero Tx is none.
type Tx struct {
	Age   int64  // when the operation began, in nanoseconds since 1970
	Nonce uint64 // random
}

// IsZero reports whether t is none.
func (t Tx) IsZero() bool { return t == Tx{} }

// Before reports whether t is older than o.
func (t Tx) Before(o Tx) bool { return t.Age < o.Age || t.Age == o.Age && t.Nonce < o.Nonce }

// Part is what a party of a transaction is asked to do.
type Part uint8

// The parts.
const (
	_          Part = iota
	PartNew         // in shard Shard: a new directory with the parent Dir: Mode (with its type), UID, GID, Volume, Data (the ACL that Dir hands down, if any). Ino is resolved
	PartDrop        // Ino, which must be in Volume, loses a name in Dir; a directory must be empty
	PartLink        // Ino, which must be in Volume, gets another name
	PartMove        // Ino gets its name in Dir in place of the one in Dir2
	PartName        // Dir, which must be in Volume: Name stands for Ino, whose type is in Mode; so far for the inode Off (0: for none)
	PartVolume      // Ino, a root: no other operation moves directories in the volume
	numParts
)

// Valid reports whether p is defined.
func (p Part) Valid() bool { return p > 0 && p < numParts }

// LockType is the kind of a lock.
type LockType uint8

// The kinds of locks.
const (
	Unlock LockType = iota
	ReadLock
	WriteLock
)

// Lock is a byte-range lock (or a flock over everything).
type Lock struct {
	Type  LockType
	Start uint64 // first byte
	End   uint64 // last byte, inclusive; 1<<63-1 is "to the end"
	Owner uint64 // who, within the session
	PID   uint32 // for TestLock's answer
}

// Request is one operation. See the types for the fields that each one uses.
type Request struct {
	Type   Type
	Flags  Flags
	Shard  sealfs.Shard  // home of the object that the request is addressed to
	Shard2 sealfs.Shard  // Mkdir: home of the new inode
	Epoch  sealfs.Epoch  // the shard's epoch as the sender knows it
	Volume sealfs.Volume // the volume that the sender mounted

	Session sealfs.Session // who asks; 0 is a sender that cannot outlive the server
	Seq     uint64         // of the change within the session, from 1; 0: never retried
	Low     uint64         // the session has answers to all below

	Ino  sealfs.Ino
	Dir  sealfs.Ino
	Dir2 sealfs.Ino

	Name  string
	Name2 string

	Mode, UID, GID, Rdev uint32

	Valid        uint32 // Setattr: what is set. Create, Mknod, Mkdir, Tmpfile: the umask, which counts unless Dir hands an ACL down
	Size         uint64
	Atime, Mtime int64 // nanoseconds since 1970
	Ctime        int64

	Off uint64
	Len uint64

	Lock Lock

	// Time is when the change happens, in nanoseconds since 1970 (resolved).
	Time int64

	// Tx is the transaction to which the request belongs, Coord the shard that
	// decides it. A change other than Prepare, Commit, Abort and Forget with a Tx is the decision.
	Tx    Tx
	Coord sealfs.Shard
	Part  Part // of a Prepare
	// Votes are the attributes, in a decision, of the parties in other stores.
	Votes []Attr

	// Gen is the generation of the file as the sender knows it, in requests for
	// what lies beyond sealfs.HomeBytes: see Attr.Gen.
	Gen uint64

	// Stamp seeds the block sums of a Write (resolved).
	Stamp uint32
	// Sums holds one seeded CRC-32C for each block of a resolved Write's Data.
	// They follow from the rest and are not encoded.
	Sums []uint32

	// Data is the payload. The codec carries it for all types but Write.
	// It belongs to the caller, who may reuse it when the request is answered.
	Data []byte
}

// Attr is what stat(2) tells of an inode.
type Attr struct {
	Ino                 sealfs.Ino
	Mode                uint32 // type and permission bits; ModeACL
	Nlink               uint32
	UID, GID            uint32
	Rdev                uint32
	Size                uint64
	Blocks              uint64 // of 512 bytes
	Atime, Mtime, Ctime int64  // nanoseconds since 1970
	Btime               int64
	Version             uint64 // grows with every change of the inode; 0: only Ino and the type in Mode are known here, ask the inode's home
	Gen                 uint64 // counts the truncations of a file that has chunks
	Bound               uint64 // no chunk has data beyond; 0: the file is whole in its home shard
}

// Dirent is an entry of a directory.
type Dirent struct {
	Name   string
	Ino    sealfs.Ino
	Cookie uint64 // continue after this entry
	Type   uint8  // upper four bits of the mode's type field: mode>>12
	Attr   Attr   // with Plus only; Attr.Ino is 0 when the inode lies in another shard's store, or a transaction has its names in hand
}

// Reply answers a Request. A reply with a non-zero Code carries nothing else.
type Reply struct {
	Code    sealfs.Code
	Attr    Attr
	Lock    Lock
	Off     uint64     // Seek: the offset; Write: where the data went; Getxattr: size of the value
	Eof     bool       // Read: the data ends at the end of the file; Readdir: no more entries
	Held    sealfs.Ino // change: this inode lost its last name (resolved by the primary)
	Entries []Dirent
	Space   Space
	Dir     Attr   // change of one directory's entries: its attributes afterwards, so that nobody need ask
	Lease   Lease  // what the sender may believe until it is revoked
	Stamp   uint64 // with Lease, or Watch: number of the last revocation that was issued to the session by this store
	Revokes []Revoke
	Data    []byte // Read, Readlink, Getxattr, Listxattr (names ended by NUL)
}

// Lease says what of an answer its receiver may believe until it is revoked.
type Lease uint8

// The leases of a reply.
const (
	LeaseIno   Lease = 1 << iota // the inode of Attr: attributes and content. In Readdir, of each entry with attributes
	LeaseDir                     // the directory Dir of the request: attributes, and the names that were asked for
	LeaseWrite                   // the inode of Attr, alone: writes may be delayed
	leaseAll   Lease = 1<<iota - 1
)

// RevokeKind is what a session must stop to believe.
type RevokeKind uint8

// The kinds of revocations.
const (
	_           RevokeKind = iota
	RevokeInode            // everything about Ino
	RevokeName             // Name in the directory Ino, its listing and its attributes; other names remain
	RecallWrite            // send what is delayed for Ino, then delay no more; the rest remains
	RevokeOwn              // what was told of Ino, or with a Name RevokeName, for a change that the session itself has asked for; the lease remains
	numRevokeKinds
)

// Revoke is one revocation of a lease.
type Revoke struct {
	Num  uint64 // ascending by one, within a session and an incarnation of a store
	Kind RevokeKind
	Ino  sealfs.Ino
	Name string // RevokeName, and RevokeOwn of a name
}

// Space is the room in a volume.
type Space struct {
	Bytes, BytesFree   uint64
	Inodes, InodesFree uint64
}

// Err returns the reply's code as an error, nil for success.
func (r *Reply) Err() error {
	if r.Code == 0 {
		return nil
	}
	return r.Code
}

// Reset empties r for reuse; buffers keep their room.
func (r *Reply) Reset() {
	*r = Reply{Entries: r.Entries[:0], Revokes: r.Revokes[:0], Data: r.Data[:0]}
}
