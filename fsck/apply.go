package fsck

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"sealfs"
	"sealfs/disk"
	"sealfs/fsck/mend"
	"sealfs/pmem"
)

// Saved is one line of the file in which is kept what repairs remove or change:
// JSON, bytes in base64.
type Saved struct {
	Problem ID     `json:"problem,omitempty"`
	Where   string `json:"where,omitempty"`
	Key     []byte `json:"key,omitempty"`  // of a record
	Old     []byte `json:"old,omitempty"`  // value of the record, or the bytes at Where
	New     []byte `json:"new,omitempty"`  // value that it gets; none: it is removed
	Data    []byte `json:"data,omitempty"` // of the file, of an extent that is removed
}

// save keeps something for the file of what is removed.
func (c *checker) save(s Saved) { c.saved = append(c.saved, s) }

// planned reports whether there is anything to be carried out.
func (c *checker) planned() bool { return c.fixable && len(c.rep.Plan) > 0 }

// allowed reports whether the options allow the plan.
func (c *checker) allowed() bool {
	if c.o.Repair == RepairSafe {
		for _, r := range c.rep.Plan {
			if p, _ := Lookup(r.Problem); p.Remedy != Safe {
				c.tell("%s: nothing is repaired with -p, since not all of it is safe: look at the plan, then use -y", c.rep.Device)
				return false
			}
		}
	}
	return c.o.Repair != RepairNone
}

// tell writes a line about what is planned or done.
func (c *checker) tell(format string, args ...any) {
	fmt.Fprintf(c.o.plans, "  "+format+"\n", args...)
}

// attemptsMax bounds how often repairs are planned: when a damage is gone, others may
// come to light that it was in the way of.
const attemptsMax = 4

// apply shows the plans of all stores, asks, carries them out, and judges what
// is there then.
func (w *whole) apply(all []*checker, attempt int) {
	var plan []Step
	var todo []*checker
	for _, c := range all {
		if c.err == nil {
			c.rep.Show(c.o.plans)
		}
		if c.planned() && c.allowed() {
			todo = append(todo, c)
			plan = append(plan, c.rep.Plan...)
		}
	}
	if len(todo) == 0 {
		return
	}
	if ask := todo[0].o.Confirm; ask != nil && !ask(plan) {
		return
	}
	for _, c := range todo {
		if c.err = c.carry(); c.err != nil {
			c.err = fmt.Errorf("repair of %s: %w; check it again: what was done is whole, and what is left is found", c.rep.Device, c.err)
			return
		}
	}
	w.recheck(all, attempt+1)
}

// carry makes the changes to one store.
func (c *checker) carry() error {
	if err := c.writeSaved(); err != nil {
		return err
	}
	for _, write := range c.raw {
		if err := write(); err != nil {
			return err
		}
	}
	if c.openStore || c.changes() {
		if err := c.mendStore(); err != nil {
			return err
		}
	}
	return c.finish()
}

// mendStore makes those changes that the store's own log makes.
func (c *checker) mendStore() error {
	region, err := c.backing()
	if err != nil {
		return err
	}
	j := c.job
	j.Moves = c.moves()
	j.Dev, j.Region = lent{c.dev}, region
	if c.ring != nil && c.ring == c.o.Ring {
		j.Ring = c.ring.Clone()
	}
	if j.Staging = c.ringPath(); c.o.Dev != nil && c.o.Staging == "" {
		j.Staging = ""
	}
	res, err := mend.Run(c.ctx, j)
	if err == nil && res.Moved+res.Left > 0 {
		c.tell("%s: %s written anew, %d left where they are", c.rep.Device, count(res.Moved, "extent"), res.Left)
	}
	return err
}

// changes reports whether there is anything to do for which the store must be opened.
func (c *checker) changes() bool {
	j := c.job
	return len(c.moving)+len(c.strays)+len(c.evacuate) > 0 || len(j.Entries) > 0 || j.NextSeq > 0 || len(j.Least) > 0 || len(j.Bits) > 0 || j.Counts != nil || j.Tree != nil ||
		len(j.Batches) > 0 || len(j.Live) > 0
}

// lent is a device that stays ours.
type lent struct{ disk.Device }

// Close does nothing.
func (lent) Close() error { return nil }

// backing opens the region to be changed. Ours is closed before: it is locked.
func (c *checker) backing() (pmem.Backing, error) {
	if c.o.Reg != nil {
		if b, ok := c.o.Reg.(pmem.Backing); ok {
			return b, nil
		}
		d, ok := c.o.Reg.(pmem.Device)
		if !ok {
			return nil, fmt.Errorf("%s cannot be written: %w", c.reg.Name(), sealfs.ErrReadOnly)
		}
		return pmem.NewMemory(d), nil
	}
	if err := c.closeRegion(); err != nil {
		return nil, err
	}
	if c.job.Tree != nil { // which is read meanwhile, without the lock that the other one has
		f, err := os.Open(c.rep.Region)
		if err != nil {
			return nil, fmt.Errorf("region %s: %w: %w", c.rep.Region, err, sealfs.ErrIO)
		}
		c.img.m = unlocked{f}
		c.opened = append(c.opened, f)
	}
	return pmem.OpenFile(c.rep.Region, false)
}

// closeRegion closes the region if it is ours.
func (c *checker) closeRegion() error {
	for i, f := range c.opened {
		if any(f) == any(c.reg) {
			c.opened = append(c.opened[:i], c.opened[i+1:]...)
			return f.Close()
		}
	}
	return nil
}

// unlocked is a region that is read while it is being changed.
type unlocked struct{ *os.File }

// Size is not asked for: the image knows it.
func (unlocked) Size() int64 { return 0 }

// writeSaved writes the file of what is removed or changed, durably, and tells its name.
func (c *checker) writeSaved() (err error) {
	dir := c.o.SaveDir
	if dir == "" && c.o.Dev == nil {
		dir = filepath.Dir(c.rep.Region)
	}
	if dir == "" {
		return nil // media of the caller's, who did not ask for it
	}
	name := fmt.Sprintf("sealfs-fsck-%s-%s.jsonl", c.sb.Store, time.Now().UTC().Format("20060102-150405.000"))
	path := filepath.Join(dir, name)
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return fmt.Errorf("file for what is removed: %w", err)
	}
	c.rep.Saved = append(c.rep.Saved, path)
	out := json.NewEncoder(f)
	for _, s := range c.saved {
		err = errors.Join(err, out.Encode(s))
	}
	for _, b := range c.job.Batches {
		for _, r := range b.Rows {
			err = errors.Join(err, out.Encode(Saved{Key: r.Key, Old: r.Old, New: r.New}))
		}
	}
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return fmt.Errorf("file for what is removed: %w", err)
	}
	c.tell("%s: what is removed or changed is saved in %s", c.rep.Device, path)
	return nil
}

// recheck judges all stores afresh, repairs what has come to light only now, and
// notes in the reports what has been repaired.
func (w *whole) recheck(all []*checker, attempt int) {
	again := &whole{layout: w.layout, absent: map[sealfs.Shard]bool{}, maybe: map[sealfs.Ino]bool{}}
	var second []*checker
	for _, c := range all {
		o := c.o
		o.Out, o.judge, o.Progress = nil, attempt == attemptsMax, nil
		if o.Dev == nil { // it stays locked
			o.Dev, o.devOurs = c.dev, true
		}
		if c.o.Ring != nil && len(c.rep.Plan) > 0 {
			o.Ring = nil // what was in it is on the device
		}
		n := newChecker(c.ctx, o)
		n.w, n.alone, n.cachePages = again, c.alone, c.cachePages
		if n.err = errors.Join(c.err, c.closeRegion()); n.err == nil {
			n.err = n.open()
		}
		second = append(second, n)
	}
	again.check(second)
	if err := again.plan(second); err != nil {
		second[0].err = errors.Join(second[0].err, err)
	} else if attempt < attemptsMax {
		again.apply(second, attempt)
	}
	for i, c := range all {
		n := second[i]
		c.err = errors.Join(n.err, n.close())
		c.rep.settle(n.rep)
	}
}

// settle notes what a second check has found, and repaired: what it did not find, or
// has repaired, is repaired.
func (r *Report) settle(second *Report) {
	fixed, counts := map[ID]int{}, map[ID]int{}
	for _, m := range []map[ID]int{r.Counts, second.Counts} {
		for id := range m {
			left := second.Counts[id] - second.Fixed[id]
			if fixed[id] = max(r.Counts[id]-left, second.Fixed[id], 0); fixed[id] == 0 {
				delete(fixed, id)
			}
			counts[id] = fixed[id] + left
		}
	}
	r.Counts, r.Fixed = counts, nil
	if len(fixed) > 0 {
		r.Fixed = fixed
	}
	r.Plan, r.Saved = append(r.Plan, second.Plan...), append(r.Saved, second.Saved...)
	at := map[string]*Found{}
	for i := range second.Found {
		f := &second.Found[i]
		at[fmt.Sprint(f.ID, f.Where)] = f
	}
	for i := range r.Found {
		f := &r.Found[i]
		key := fmt.Sprint(f.ID, f.Where)
		s := at[key]
		delete(at, key)
		f.Repaired = fixed[f.ID] > 0 && (s == nil || s.Repaired)
	}
	for i := range second.Found {
		f := &second.Found[i]
		if at[fmt.Sprint(f.ID, f.Where)] == f {
			r.Found = append(r.Found, *f)
		}
	}
}

// ringPath returns where the ring of the store stands by convention or by the options.
func (c *checker) ringPath() string {
	if c.o.Staging != "" {
		return c.o.Staging
	}
	path := StagingPath(c.sb.Store)
	if _, err := os.Stat(filepath.Dir(path)); err != nil && c.o.Device != "" { // then it lies beside the device
		path = filepath.Join(filepath.Dir(c.o.Device), filepath.Base(path))
	}
	return path
}
