package client

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// interruptGrace is how often the requests that the kernel has interrupted are looked
// at; one goes on for one to two times as long in any case.
//
// The kernel tells of every signal that a thread gets. But a signal must not make an
// operation fail that never failed on a local file system: think of the Go runtime's
// own signals, of SIGCHLD and SIGWINCH; and a change that is said to have
// been interrupted happens nevertheless when its server is back, so that a program that
// tries again finds it done. So a request ends only for a signal that asks its
// program to end (see ending), and waiting for a lock for every one, as POSIX has it.
const interruptGrace = 100 * time.Millisecond

// interrupts watches the requests of a mount whose servers may be away. One
// timer looks at all of them, so that a request costs a place in a list and no goroutine.
type interrupts struct {
	mu    sync.Mutex
	first *interruptible
	timer bool
}

// interruptible is a request of the kernel's, and the context for its handling.
type interruptible struct {
	context.Context
	stop       context.CancelFunc
	cancel     <-chan struct{} // closed when the kernel interrupts
	seen       bool            // closed already when the timer looked last
	looks      int             // how often the timer has looked
	tid        uint32          // the thread that asks; 0: any signal ends the request
	flushing   bool            // it closes a file
	list       *interrupts
	prev, next *interruptible
}

// wait returns a context for the handling of a request, and what must be told
// that it is over. A client without a session never waits, neither for
// a server nor for other clients, so that there is nothing to interrupt.
// tid is the thread that asks.
func (f *filesystem) wait(cancel <-chan struct{}, tid uint32) (context.Context, *interruptible) {
	if !f.c.leasing {
		return bg, nil
	}
	r := &interruptible{cancel: cancel, tid: tid, list: &f.interrupts}
	r.Context, r.stop = context.WithCancel(bg)
	r.list.add(r)
	return r, r
}

func (l *interrupts) add(r *interruptible) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if r.next = l.first; r.next != nil {
		r.next.prev = r
	}
	l.first = r
	if !l.timer {
		l.timer = true
		time.AfterFunc(interruptGrace, l.look)
	}
}

// flushes says that the request is a close.
func (r *interruptible) flushes() {
	if r != nil {
		r.list.mu.Lock()
		defer r.list.mu.Unlock()
		r.flushing = true
	}
}

// over takes the request out; nil is a request that was never in.
func (r *interruptible) over() {
	if r == nil {
		return
	}
	l := r.list
	l.mu.Lock()
	defer l.mu.Unlock()
	if r.prev != nil {
		r.prev.next = r.next
	} else {
		l.first = r.next
	}
	if r.next != nil {
		r.next.prev = r.prev
	}
}

// exiting reports whether a thread is about to end: it has no memory any more when
// it closes its files. (What stands in /proc/TID/stat cannot be read while a thread
// that executes another program closes files before.)
func exiting(tid uint32) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", tid))
	return err == nil && bytes.HasPrefix(b, []byte("0 "))
}

// endingSignals are those that ask a program to end, whether it handles them or not.
const endingSignals = 1<<(unix.SIGKILL-1) | 1<<(unix.SIGINT-1) | 1<<(unix.SIGTERM-1) | 1<<(unix.SIGQUIT-1) | 1<<(unix.SIGHUP-1)

// ending reports whether a signal that asks its program to end waits for a thread.
// Of a thread that cannot be looked at, in another namespace, it is assumed.
func ending(tid uint32) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", tid))
	if tid == 0 || err != nil {
		return true
	}
	for line := range strings.Lines(string(b)) {
		name, value, _ := strings.Cut(line, ":")
		if name != "SigPnd" && name != "ShdPnd" {
			continue
		}
		pending, err := strconv.ParseUint(strings.TrimSpace(value), 16, 64)
		if err != nil || pending&endingSignals != 0 {
			return true
		}
	}
	return false
}

// look ends the requests that were interrupted when it looked last.
func (l *interrupts) look() {
	var asked, closing []*interruptible
	l.mu.Lock()
	for r := l.first; r != nil; r = r.next {
		r.looks++
		switch {
		case r.seen:
			asked = append(asked, r)
		case r.looks == 2 && r.flushing:
			closing = append(closing, r)
		}
		select {
		case <-r.cancel:
			r.seen = true
		default:
		}
	}
	l.mu.Unlock()
	// Not under the lock, which every request takes: this asks the kernel.
	for _, r := range asked {
		if ending(r.tid) {
			r.stop()
		}
	}
	// A process that ends closes its files without anybody to hear of errors, and
	// gets no signals any more. One that waits here before it ends does get them.
	for _, r := range closing {
		if exiting(r.tid) {
			r.stop()
		}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.timer = l.first != nil; l.timer {
		time.AfterFunc(interruptGrace, l.look)
	}
}
