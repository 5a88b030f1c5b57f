package client

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// A process that is killed while one of its threads waits in the kernel for a directory
// of its own mount (see kernel.entryNotify) cannot end: whoever holds the directory waits for
// an answer of this very process. As long as it does not end its connection stays, and
// everybody who looks at the mount waits, too. The kernel breaks the circle when it is told to
// abort the connection. That is done by who clears the mount away, or takes the
// place of the process.

// Dying reports whether a process has been killed, or is about to end, and has not ended yet.
func Dying(pid int) bool {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return false
	}
	// PID (NAME) STATE PPID PGRP SESSION TTY TPGID FLAGS ...; NAME may hold anything.
	w := strings.Fields(string(text[bytes.LastIndexByte(text, ')')+1:]))
	if len(w) < 7 {
		return false
	}
	const pfExiting = 4
	if flags, _ := strconv.ParseUint(w[6], 10, 64); flags&pfExiting != 0 {
		return true
	}
	// Its first thread may be the one that waits. What kills is pending there.
	if text, err = os.ReadFile(fmt.Sprintf("/proc/%d/status", pid)); err != nil {
		return false
	}
	for line := range strings.Lines(string(text)) {
		if set, ok := strings.CutPrefix(line, "SigPnd:"); ok {
			pending, _ := strconv.ParseUint(strings.TrimSpace(set), 16, 64)
			return pending&(1<<(unix.SIGKILL-1)) != 0
		}
	}
	return false
}

// AbortDying aborts the FUSE connections of a process that is dying, which may wait for them
// itself. Of other processes it leaves them alone.
func AbortDying(pid int) {
	if pid <= 0 || !Dying(pid) {
		return
	}
	for number := range connections(pid) {
		if orphaned(number) {
			abort(number)
		}
	}
}

// AbortOrphan aborts the connection of what is mounted at dir, an absolute path without
// symbolic links, if it is a mount of ours that only dying processes serve. It looks at nothing
// within the mount, where it would have to wait for them.
func AbortOrphan(dir string) {
	at, err := findMount(dir)
	if err != nil || at == nil || at.fsType != fsType {
		return
	}
	if _, minor, _ := strings.Cut(at.dev, ":"); orphaned(minor) {
		abort(minor)
	}
}

// orphaned reports whether all processes that have a connection open are dying, and there are some.
// From 6.16 on the kernel says which one an open device belongs to; before, nobody
// waits for directories.
func orphaned(number string) bool {
	all, err := os.ReadDir("/proc")
	if err != nil {
		return false
	}
	var live []int
	some := false
	for _, e := range all {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		if !Dying(pid) {
			live = append(live, pid)
		} else if _, ok := connections(pid)[number]; ok {
			some = true
		}
	}
	if !some {
		return false // which is so nearly always, and costs little
	}
	for _, pid := range live {
		if _, ok := connections(pid)[number]; ok {
			return false
		}
	}
	return true
}

// connections returns the numbers of the FUSE connections that a process has open. The first thread of
// one that is dying may have given its files back already.
func connections(pid int) map[string]struct{} {
	found := map[string]struct{}{}
	threads, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*", pid))
	for _, thread := range threads {
		links, _ := os.ReadDir(thread + "/fd")
		for _, l := range links {
			if to, err := os.Readlink(thread + "/fd/" + l.Name()); err == nil && to == "/dev/fuse" {
				if n := connectionOf(thread + "/fdinfo/" + l.Name()); n != "" {
					found[n] = struct{}{}
				}
			}
		}
		if len(links) > 0 {
			break // threads share their files
		}
	}
	return found
}

// abort aborts a connection. Where the control file system is not mounted, forced
// unmounting does it.
func abort(number string) {
	if os.WriteFile("/sys/fs/fuse/connections/"+number+"/abort", []byte("1"), 0) == nil {
		return
	}
	mounts, _ := mounts()
	for _, at := range mounts {
		if at.dev == "0:"+number && at.fsType == fsType {
			unix.Unmount(at.dir, unix.MNT_FORCE|unix.UMOUNT_NOFOLLOW)
			return
		}
	}
}
