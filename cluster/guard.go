package cluster

import (
	"fmt"
	"sync"

	"github.com/hashicorp/raft"

	"sealfs"
)

// guard stands between the network and Raft, which panics over configurations
// that it cannot decode: what comes from a peer must not end the process.
type guard struct {
	*raft.NetworkTransport
	out  chan raft.RPC
	done chan struct{}
	once sync.Once
}

func newGuard(t *raft.NetworkTransport) *guard {
	g := &guard{NetworkTransport: t, out: make(chan raft.RPC), done: make(chan struct{})}
	go g.run()
	return g
}

// Consumer implements raft.Transport.
func (g *guard) Consumer() <-chan raft.RPC { return g.out }

// Close implements raft.WithClose.
func (g *guard) Close() error {
	g.once.Do(func() { close(g.done) })
	return g.NetworkTransport.Close()
}

func (g *guard) run() {
	for {
		select {
		case rpc := <-g.NetworkTransport.Consumer():
			if err := checkRPC(rpc.Command); err != nil {
				rpc.Respond(nil, err)
				continue
			}
			select {
			case g.out <- rpc:
			case <-g.done:
				return
			}
		case <-g.done:
			return
		}
	}
}

// checkRPC reports whether Raft can decode what a peer asks.
func checkRPC(command any) error {
	switch c := command.(type) {
	case *raft.AppendEntriesRequest:
		for _, e := range c.Entries {
			if e == nil {
				return fmt.Errorf("an empty entry: %w", sealfs.ErrInvalid)
			}
			if e.Type != raft.LogConfiguration {
				continue
			}
			if err := checkConfiguration(e.Data); err != nil {
				return err
			}
		}
	case *raft.InstallSnapshotRequest:
		if c.SnapshotVersion < 1 {
			return fmt.Errorf("a snapshot of version %d: %w", c.SnapshotVersion, sealfs.ErrVersion)
		}
		if c.Size < 0 || c.Size > 2*StateMax {
			return fmt.Errorf("a snapshot of %d bytes: %w", c.Size, sealfs.ErrInvalid)
		}
		return checkConfiguration(c.Configuration)
	}
	return nil
}

func checkConfiguration(b []byte) (err error) {
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("%v: %w", r, sealfs.ErrInvalid)
		}
	}()
	raft.DecodeConfiguration(b)
	return nil
}
