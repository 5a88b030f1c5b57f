package client

import (
	"os"
	"runtime"
	"sync"
)

// readersMax is how many threads go-fuse lets wait for the kernel's requests, one
// more than there are processors, up to this.
const readersMax = 17

// Processors gives a process that serves mounts the processors (GOMAXPROCS) that
// they need. The zero value is ready; a process has one. A process whose
// environment sets GOMAXPROCS keeps what that says.
//
// A thread that waits for a request of the kernel is in a system call, where it
// keeps its processor until the runtime's monitor takes that away. With two cores two
// such threads have all processors there are: each time somebody else has work to do, it
// must wait for the monitor, which looks every 20 µs as long as it finds
// something. So every thread that may wait like this gets a processor of its own, beside
// those for work. They are numbers for the scheduler, not threads: as many run as there is
// work for.
type Processors struct {
	mu     sync.Mutex
	mounts int
	own    int // without mounts; 0: the environment has decided
}

// mount runs open, which makes go-fuse's server, and accounts for the mount if it
// succeeds. go-fuse takes the number of processors for that of its threads, so
// that it must not see what other mounts have added. nil accounts for nothing.
func (p *Processors) mount(open func() error) error {
	if p == nil {
		return open()
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.mounts == 0 {
		if p.own = runtime.GOMAXPROCS(0); os.Getenv("GOMAXPROCS") != "" {
			p.own = 0
		}
	} else if p.own > 0 {
		runtime.GOMAXPROCS(p.own)
	}
	err := open()
	if err == nil {
		p.mounts++
	}
	p.set()
	return err
}

// unmount accounts for the end of a mount.
func (p *Processors) unmount() {
	if p == nil {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.mounts--
	p.set()
}

// set tells the runtime. Requires mu.
func (p *Processors) set() {
	switch {
	case p.own == 0:
	case p.mounts > 0:
		runtime.GOMAXPROCS(p.own + p.mounts*min(max(p.own, 2)+1, readersMax))
	default:
		runtime.SetDefaultGOMAXPROCS() // which follows the machine from then on again
	}
}
