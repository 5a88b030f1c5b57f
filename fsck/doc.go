// Package fsck judges a store that nobody has open: device and region are read,
// the log is followed and replayed in memory as the next recovery will do it, and
// the result is cross-checked in numbered passes. It has code of its own for
// the log, for redo and for the tree's pages, so that a mistake in lsfs or pmem
// is not repeated by their judge; of the formats it shares the layout packages
// and the record codecs of meta.
//
// Nothing is written unless a repair is asked for. Repairs are planned from a
// finished check: the records are changed in memory, and judged again, until it is
// known what will be done and what will be left. The plan is shown, and carried out
// by package mend; then everything is judged afresh.
//
// Stores of one cluster are judged together: what an entry on one of them stands
// for may lie on another, and so may a file's other names. The namespace is
// judged as it will be when the transactions in doubt have ended, each as its
// coordinator has decided. What refers to stores that were not given is not a
// problem; it is counted as not judged.
//
// What a killed process or a power cut leaves is not a problem: the log behind
// the checkpoint, what only staging holds, a torn end, inodes without names that
// were held open. What is left of redundancy (one of two superblock copies)
// is a warning, because it cannot be told from decay.
package fsck
