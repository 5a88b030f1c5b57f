// Package fsck judges a store that nobody has open: device and region are read,
// the log is followed and replayed in memory as the next recovery will do it, and
// the result is cross-checked in numbered passes. It has code of its own for
// the log, for redo and for the tree's pages, so that a mistake in lsfs or pmem
// is not repeated by their judge; of the formats it shares the layout packages
// and the record codecs of meta.
//
// Nothing is written unless a repair is asked for, and a repair is planned from
// a finished check, shown, and then applied.
//
// What a killed process or a power cut leaves is not a problem: the log behind
// the checkpoint, what only staging holds, a torn end, inodes without names that
// were held open. What is left of redundancy (one of two superblock copies)
// is a warning, because it cannot be told from decay.
package fsck
