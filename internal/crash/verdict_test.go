package crash

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"

	"sealfs"
	"sealfs/fsck"
	"sealfs/lsfs"
	"sealfs/meta"
	"sealfs/op"
	"sealfs/pmem"
)

// claim is what must hold of a state.
type claim struct {
	h      *history
	inos   []sealfs.Ino
	synced []int
	begun  int
	clock  int64 // when the power went, nanoseconds since 1970
}

// at returns what must hold when the power goes at a moment; killed what must when
// only the process dies: all that was answered is there.
func (c *claim) killed(mo *moment) *claim {
	k := c.at(mo)
	k.synced = make([]int, len(mo.synced))
	for s := range k.synced {
		k.synced[s] = max(0, mo.begun-1)
	}
	return k
}

func (c *claim) at(mo *moment) *claim {
	return &claim{h: c.h, inos: c.inos, synced: mo.synced, begun: mo.begun, clock: mo.clock}
}

// verdict judges what a power cut left, and changes it: the media are sound to
// fsck; recovery succeeds, and comes to the end of the log that fsck found; every
// file is as it was after one of the operations that the claim allows; and when all
// has settled and the server is closed, fsck finds nothing at all. again, if not
// nil, records the moments of the recovery. It returns the positions that were found.
func (g *geometry) verdict(t *testing.T, m media, r rings, c *claim, again *recorder) (at []position, err error) {
	if err := g.put(r); err != nil {
		return nil, err
	}
	before, err := g.check(m)
	if err != nil {
		return nil, fmt.Errorf("fsck before recovery: %w", err)
	}
	for _, r := range before.Stores {
		if !r.Sound() {
			return nil, fmt.Errorf("fsck before recovery: %s", findings(before))
		}
	}
	if again != nil {
		again.watch(m)
	}
	synctest.Test(t, func(*testing.T) {
		w, e := g.open(m, c.clock)
		if e != nil {
			err = fmt.Errorf("recovery: %w", e)
			return
		}
		if e = w.ended(before); e == nil {
			w.settle()
		}
		if again != nil {
			again.stop()
		}
		if e == nil {
			at, e = w.compare(c)
		}
		if e != nil {
			// What it would write now is of no interest.
			err = e
			w.srv.Close()
			return
		}
		if e := w.srv.Close(); e != nil {
			err = fmt.Errorf("close: %w", e)
		}
	})
	if err != nil {
		return nil, err
	}
	closed := make(media, len(m))
	for i := range m {
		closed[i] = m[i].Reopen()
	}
	after, err := g.check(closed)
	if err != nil {
		return nil, fmt.Errorf("fsck afterwards: %w", err)
	}
	for _, r := range after.Stores {
		if !r.Clean() || r.Orphans != 0 || r.InDoubt != 0 {
			return nil, fmt.Errorf("fsck afterwards: %d orphans, %d transactions in doubt, %s", r.Orphans, r.InDoubt, findings(after))
		}
	}
	if g.stores > 1 {
		err = finished(closed)
	}
	return at, err
}

// finished makes sure that no decision is left: once all parties have it, it is forgotten.
func finished(m media) error {
	for i := 1; i < len(m); i += 2 {
		r, _, err := pmem.Open(pmem.NewMemory(m[i]), pmem.Options{})
		if err != nil {
			return err
		}
		left := 0
		for s := range sealfs.Shard(shards) {
			err = errors.Join(err, meta.Decisions(r, s, func(op.Tx, meta.Decision) { left++ }))
		}
		if err = errors.Join(err, r.Close()); err != nil {
			return err
		}
		if left > 0 {
			return fmt.Errorf("%s keeps %d decisions though all stores were there", m[i].Name(), left)
		}
	}
	return nil
}

// ended compares the end of the log to which each store was recovered with what
// fsck had found.
func (w *world) ended(before *fsck.Together) error {
	for i, r := range before.Stores {
		sb, err := lsfs.ReadSuper(w.m[2*i])
		if err != nil {
			return err
		}
		if sb.FirstPrev != r.LogEnd {
			return fmt.Errorf("store %d was recovered to %v; fsck finds the end of its log at %v", i, sb.FirstPrev, r.LogEnd)
		}
	}
	return nil
}

// compare holds what the stores hold against the model.
func (w *world) compare(c *claim) ([]position, error) {
	v, err := look(w, w.g, c.inos)
	if err != nil {
		return nil, fmt.Errorf("after recovery: %w", err)
	}
	at, err := c.h.find(v.texts, c.synced, c.begun)
	if err != nil {
		return nil, err
	}
	for i, s := range w.srv.Status().Stores {
		if s.Files != v.inodes[i] {
			return nil, fmt.Errorf("store %d counts %d inodes, %d are to be found", i, s.Files, v.inodes[i])
		}
		if s.State != "up" {
			return nil, errors.New(s.Reason)
		}
	}
	return at, nil
}

func findings(t *fsck.Together) string {
	var b strings.Builder
	for i, r := range t.Stores {
		fmt.Fprintf(&b, "store %d: %v", i, r.IDs())
		for _, f := range r.Found {
			fmt.Fprintf(&b, "\n    %s", f.String())
		}
		b.WriteString("\n  ")
	}
	return b.String()
}
