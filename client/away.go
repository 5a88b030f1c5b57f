package client

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	"sealfs"
	"sealfs/op"
)

// errGaveUp says that a caller's context ended before there was an answer.
// Whether the request happens is not known then, and its call may be asked on.
var errGaveUp = fmt.Errorf("gave up waiting for an answer: %w", sealfs.ErrInterrupted)

// errUnsure is errGaveUp of a lock that may have been granted: the server's answer was lost.
var errUnsure = fmt.Errorf("a lock that may have been granted: %w", errGaveUp)

const (
	// pauseMin and pauseMax bound the time between two attempts.
	pauseMin = 5 * time.Millisecond
	pauseMax = time.Second
	// staleMax is how often an answer "stale" is asked again: the router below
	// has asked anew for the place of the shard each time.
	staleMax = 10
)

// briefKey marks the context of somebody who has better things to do than to
// wait for a server that is away.
type briefKey struct{}

// brief returns a context under which requests give up as soon as a server does
// not answer, at the latest after d.
func brief(ctx context.Context, d time.Duration) (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.WithValue(ctx, briefKey{}, true), d)
}

// ask sends k until there is an answer, the time-out is over, ctx ends or the
// client is closed. It returns errGaveUp in the last two cases, and then k may be asked again,
// for the same number in its session: it happens once. Otherwise k must be finished.
func (c *Client) ask(ctx context.Context, k *call) error {
	c.startWatching()
	var p patience
	for {
		if err := c.enlist(ctx, k); err != nil {
			return err
		}
		k.rep.Reset()
		k.registered = c.registered[k.Shard].Load()
		c.about(k)
		err := c.h.Do(ctx, &k.Request, &k.rep)
		switch {
		case err == nil && k.rep.Code == 0:
			c.learn(k)
			return nil
		case err == nil && k.rep.Code == sealfs.ErrSession:
			c.fence(k.ses, k.rep.Code)
			continue
		case err == nil:
			if err = k.rep.Code; err == sealfs.ErrNotExist {
				c.learn(k) // that there is no such name
			}
			if stale := err == sealfs.ErrStale; stale && (k.layout || p.stale >= staleMax) ||
				!stale && err != sealfs.ErrUnavailable && err != sealfs.ErrBusy {
				return err
			} else if stale {
				p.stale++
			}
		case errors.Is(err, sealfs.ErrUnavailable), errors.Is(err, sealfs.ErrTimeout):
			k.unsure = true
		case errors.Is(err, sealfs.ErrInterrupted) && (ctx.Err() != nil || c.life.Err() != nil):
			// The end of a wait for a lock is the server's word: see wire.Conn.
			k.unsure = k.unsure || k.Type != op.WaitLock
			return errGaveUp
		default:
			return err
		}
		if err := p.wait(ctx, c, k, err); err != nil {
			return err
		}
		if c.o.Epoch != nil {
			k.Epoch = c.o.Epoch(k.Shard)
		}
	}
}

// patience is how long somebody has waited for an answer.
type patience struct {
	began time.Time
	pause time.Duration
	stale int
}

// wait pauses before the next attempt, a little longer each time and never as
// long as others. cause is why there must be one.
func (p *patience) wait(ctx context.Context, c *Client, k *call, cause error) error {
	if ctx.Value(briefKey{}) != nil {
		return errGaveUp
	}
	now := time.Now()
	if p.pause == 0 {
		p.began, p.pause = now, pauseMin
	}
	pause := p.pause/2 + rand.N(p.pause/2)
	if c.o.Retry > 0 {
		left := c.o.Retry - now.Sub(p.began)
		if left <= 0 {
			return fmt.Errorf("%v: %w: no answer for %v: %w", k.Type, sealfs.ErrIO, c.o.Retry, cause)
		}
		pause = min(pause, left)
	}
	p.pause = min(2*p.pause, pauseMax)
	timer := time.NewTimer(pause)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-k.ses.over: // the next attempt finds out what that means
	case <-ctx.Done():
		return errGaveUp
	case <-c.life.Done():
		return errGaveUp
	}
	return nil
}

// finish notes that k will not be asked again.
func (c *Client) finish(k *call) {
	if k.ses != nil && k.Seq != 0 {
		k.ses.seqs[k.Shard].finish(k.Seq)
	}
}

// insist is none for what must happen once it was begun: when ctx ends, k is asked
// on in the background, and its outcome remains unknown to the caller.
func (c *Client) insist(ctx context.Context, k *call) error {
	if !c.remote {
		return c.none(ctx, k)
	}
	c.address(k)
	err := c.ask(ctx, k)
	if err != errGaveUp {
		c.finish(k)
		k.end()
		return err
	}
	go func() {
		if err := c.ask(c.life, k); err != nil && err != errGaveUp {
			c.log.Warn("a request of an interrupted caller failed", "request", k.Type, "ino", uint64(k.Ino), "err", err)
		}
		c.finish(k)
		k.end()
	}()
	return err
}

// pursued reports whether requests of type t, interrupted, are asked on until it is known whether they have happened:
// all changes of what this client may believe, but for those that a caller of do asks on itself.
func pursued(t op.Type) bool {
	switch t {
	case op.SetLock, op.DropOwner:
		return false
	}
	return t.Changes()
}

// pursue asks on in the background what an interrupted caller has begun. A server tells no client of what that
// has done itself, so what this one believes would be wrong, once it happens, until the answer is there.
func (c *Client) pursue(k *call) {
	on := c.begin(k.Type, 0)
	on.Request, on.ses, on.unsure = k.Request, k.ses, true
	on.Data = bytes.Clone(k.Data) // it is the caller's
	go func() {
		if err := c.ask(c.life, on); err == nil {
			c.happened(on)
		}
		c.finish(on)
		on.end()
	}()
}

// happened is for a change of this client's own that its caller was not told of.
func (c *Client) happened(k *call) {
	if kernel := c.kernel.Load(); kernel != nil {
		kernel.happened(c, k)
	}
}

// boundToSession reports whether requests of type t belong to a file that the
// session holds open, so that they must not be repeated by another session.
func boundToSession(t op.Type) bool {
	switch t {
	case op.Write, op.Read, op.Fallocate, op.Seek, op.Extend, op.Sync, op.SetLock, op.WaitLock, op.TestLock,
		op.DropOwner, op.Release:
		return true
	}
	return false
}
