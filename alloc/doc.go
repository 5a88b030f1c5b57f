// Package alloc holds the decisions about space, and nothing but them: it
// works on bytes and numbers that its callers own, keeps no state, takes no
// lock, does no I/O and never fails.
package alloc
