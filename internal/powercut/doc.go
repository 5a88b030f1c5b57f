// Package powercut holds tests that cut the power of the real programs. They need
// tools that not every machine has, so they run only when asked for:
//
//	make dax-vm        a QEMU guest with emulated persistent memory, ended by SIGKILL
//	make crash-device  a device that logs its writes, replayed up to every flush
//
// A test says by name what is missing, with the package that has it.
package powercut
