// Package linear judges whether what clients of a file system were answered could have been
// answered by one file system that does one thing after the other: linearizability.
//
// Actors, which are mounts and library clients, make random calls in an arena of a few
// directories and names (Run). What was called when, and what was answered when, is a
// History, which the checker porcupine holds against a sequential model of a file system
// (Check). An arena is independent of all others, so histories stay short and many are judged.
//
// What a call means is chosen so that it is one step. Directories and files are named by
// what was opened, and names have one component: who resolves a path does one thing after the
// other, on a local file system, too. So stat of a name tells the inode, stat of an
// open file its attributes; link goes from an open file to a name; and a listing is what
// one getdents returned.
//
// A call whose answer was lost (EIO, EINTR and the like) may have happened at any time
// since, or never: it stays open to the end of the history.
package linear
