package sealfs

// Limits that several packages and the formats agree on.
const (
	// BlockSize is the unit of data checksums, of region pages and of
	// alignment in files, in bytes.
	BlockSize = 4096
	// NameMax is the longest name of a directory entry, in bytes (POSIX NAME_MAX).
	NameMax = 255
	// SymlinkMax is the longest symlink target, in bytes (PATH_MAX less its NUL).
	SymlinkMax = 4095
	// XattrNameMax and XattrValueMax are Linux's own limits.
	XattrNameMax  = 255
	XattrValueMax = 65536
	// XattrListMax bounds the names of all attributes of one inode (Linux's XATTR_LIST_MAX).
	XattrListMax = 65536
	// ACLMax bounds a POSIX ACL, in bytes (511 entries): the kernel reads those of a
	// mount into one page, and nobody could use a file whose ACL is longer.
	ACLMax = 4096
	// LinkMax is the largest link count of a file or directory.
	LinkMax = 1<<31 - 1
	// FileSizeMax is the largest file size: off_t.
	FileSizeMax = 1<<63 - 1
	// ShardsMax is the largest shard count of a cluster; ShardsDefault the usual one.
	ShardsMax     = 1 << 16
	ShardsDefault = 4096
	// InoMax bounds inode numbers, so that they survive a float64.
	InoMax = 1<<53 - 1
	// InoCounterMin is the first inode counter of a shard: numbers below it
	// (FUSE's root is node 1) never name a real inode.
	InoCounterMin = 16
	// LocksPerFile bounds the locks of one file, POSIX and OFD ones together and flocks each for
	// themselves; LocksPerSession those of a mount, and LocksPerStore all, in one store.
	// More are refused with ErrNoLocks (ENOLCK).
	LocksPerFile    = 4096
	LocksPerSession = 1 << 16
	LocksPerStore   = 1 << 20
	// IOMax is the largest read or write of one request, in bytes.
	IOMax = 1 << 20
	// HomeBytes is how much of a file's data lies with its inode, in bytes;
	// what is beyond lies in chunks of ChunkBytes, each in a shard of its own.
	HomeBytes  = 64 << 20
	ChunkBytes = 4 << 20
	// BoundStep is the largest step in which a file announces how far its chunks reach (see BoundFor).
	BoundStep = 1 << 30
)

// BoundFor returns the bound that a file announces before it has data in chunks
// up to end: twice HomeBytes and its doubles at first, so that little need be searched when a file that is
// hardly larger than HomeBytes goes, then multiples of BoundStep. end is at
// most FileSizeMax - BoundStep for a result that is larger than end.
func BoundFor(end uint64) uint64 {
	for bound := uint64(2 * HomeBytes); bound < BoundStep; bound *= 2 {
		if end <= bound {
			return bound
		}
	}
	return (end + BoundStep - 1) / BoundStep * BoundStep
}
