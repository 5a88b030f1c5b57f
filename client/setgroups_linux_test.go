package client

import (
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// setgroups sets the groups of this thread only, which package syscall does not offer.
func setgroups(n int, list *uint32) syscall.Errno {
	_, _, errno := unix.RawSyscall(unix.SYS_SETGROUPS, uintptr(n), uintptr(unsafe.Pointer(list)), 0)
	return errno
}
