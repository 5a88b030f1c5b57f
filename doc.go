// Package sealfs holds the vocabulary that every other package of SealFS
// shares: identifiers, error codes and limits. It imports nothing of ours, does
// no I/O and has no state.
package sealfs
