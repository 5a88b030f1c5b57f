// Package e2e holds tests of the whole: the built programs, a real mount, other
// people's programs in it, and SIGKILL of every process at random moments. They
// use the documented command lines only and import nothing of ours.
//
// `go test ./e2e` runs a short sample, `make e2e` all of it. The programs are
// those in the directory that SEALFS_BIN names; without it they are built.
package e2e
