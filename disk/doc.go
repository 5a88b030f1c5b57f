// Package disk is the single door to block storage: a raw block device or an
// image file (File), and the simulation of one (Sim), behind one interface.
//
// # What a Device promises
//
// A write that has returned is seen by every later read, but survives a power
// cut only when a Flush that began after it has returned nil. Until then each
// sector of it independently holds its old bytes or its new ones: there is no
// order between writes and no atomicity beyond one sector. Whoever needs order
// puts a Flush in between.
//
// A Device that has failed a write or a flush refuses all further changes until
// it is opened again, because the kernel reports a lost write once and then
// considers the page clean: a second flush that succeeds proves nothing. Reads
// go on.
//
// A Device does not verify what it reads. Checksums are the business of the
// formats above.
//
// # Simulation
//
// Sim keeps every write since the last flush, so that a test can ask for each
// device a power cut at this instant can leave (Sim.Crashes, Sim.CrashStates),
// run recovery on it and compare with a model. Faults (Sim.Fail) and damage
// (Sim.FlipBit and its like) cover what disks do while the power stays on.
// Clones share their unchanged pages, so thousands of states cost little more
// than the sectors in which they differ.
//
// # Before a device is overwritten
//
// Probe says what stands on a device and Mounted whether it is in use as a file
// system. OpenOptions.Exclusive keeps a second process away.
package disk
