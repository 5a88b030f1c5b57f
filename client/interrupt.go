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
)

// interruptGrace is for how long a request that the kernel has interrupted may go on,
// once to twice. A signal must not make a short operation fail that never failed on
// a local file system: think of the Go runtime's own signals, of
// SIGCHLD and SIGWINCH. What hangs for longer ends, so that its program can be stopped.
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
	flushing   int             // the thread that closes a file, if the request is that
	list       *interrupts
	prev, next *interruptible
}

// wait returns a context for the handling of a request, and what must be told
// that it is over. A client without a session never waits for a server, so
// that there is nothing to interrupt.
func (f *filesystem) wait(cancel <-chan struct{}) (context.Context, *interruptible) {
	if !f.c.remote {
		return bg, nil
	}
	r := &interruptible{cancel: cancel, list: &f.interrupts}
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

// flushes says that the request is a close by a thread.
func (r *interruptible) flushes(tid uint32) {
	if r != nil {
		r.list.mu.Lock()
		defer r.list.mu.Unlock()
		r.flushing = int(tid)
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

// exiting reports whether a thread is about to end.
func exiting(tid int) bool {
	const flagExiting = 0x4 // PF_EXITING in the kernel's include/linux/sched.h
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", tid))
	if err != nil {
		return false
	}
	// The name, in parentheses, may hold anything; then come state, five numbers, and flags.
	fields := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:]))
	if len(fields) < 7 {
		return false
	}
	flags, err := strconv.ParseUint(fields[6], 10, 64)
	return err == nil && flags&flagExiting != 0
}

// look ends the requests that were interrupted when it looked last.
func (l *interrupts) look() {
	l.mu.Lock()
	defer l.mu.Unlock()
	for r := l.first; r != nil; r = r.next {
		// A process that ends closes its files without anybody to hear of errors, and
		// gets no signals any more. One that waits here before it ends does get them.
		if r.looks++; r.seen || r.looks == 2 && r.flushing != 0 && exiting(r.flushing) {
			r.stop()
			continue
		}
		select {
		case <-r.cancel:
			r.seen = true
		default:
		}
	}
	if l.timer = l.first != nil; l.timer {
		time.AfterFunc(interruptGrace, l.look)
	}
}
