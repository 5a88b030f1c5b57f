package fsck

import (
	"context"
	"errors"
	"fmt"
	"io"
	"path/filepath"

	"sealfs"
	"sealfs/disk"
	"sealfs/lsfs/layout"
	"sealfs/pmem"
	pmlayout "sealfs/pmem/layout"
)

// Medium is what the check needs of a region's medium: every pmem.Backing and
// every disk.Device has it. A check only reads; repairs need Writer as well.
type Medium interface {
	ReadAt(p []byte, off int64) (int, error)
	Size() int64
	Name() string
}

// Writer is what a repair needs of a Medium.
type Writer interface {
	WriteAt(p []byte, off int64) (int, error)
	Flush() error
}

// Repair says which problems are repaired after the check.
type Repair uint8

// The ways to repair.
const (
	RepairNone Repair = iota // change nothing, not a byte
	RepairSafe               // what cannot make anything worse
	RepairAll                // everything that there is a repair for
)

// Options say what is checked and how.
type Options struct {
	// Device is the path of the data device. It is opened exclusively, so that a
	// live store is refused with ErrBusy.
	Device string
	// Region is the path of the region; "": the file "region" beside the device.
	Region string
	// Staging is the path of the ring; "": StagingPath of the store.
	Staging string

	// Dev, Reg and Ring are open handles to be used in place of paths; they stay
	// the caller's. With Dev, no staging but Ring or the one at Staging is looked for,
	// and Ring may be of any boot.
	Dev  disk.Device
	Reg  Medium
	Ring *pmem.Staging

	Shards uint32 // shard count of the cluster; 0: found out from the inodes
	Repair Repair
	NoData bool // do not read the files' data
	Keep   int  // findings to report in full of each number; default 20

	Out      io.Writer                         // passes and problems as they come, for humans; nil: none
	Verbose  bool                              // more of it
	Progress func(pass int, done, total int64) // called now and then; nil: never
	Confirm  func(f Found, repair string) bool // asked before each repair; nil: yes
}

// StagingPath returns where the ring of a store stands by convention.
func StagingPath(store sealfs.UUID) string {
	return "/dev/shm/sealfs-" + store.String() + ".ring"
}

// newChecker prepares the check of a store.
func newChecker(ctx context.Context, o Options) *checker {
	if o.Keep == 0 {
		o.Keep = 20
	}
	if o.Out == nil {
		o.Out = io.Discard
	}
	return &checker{
		ctx: ctx, o: o, staged: map[uint32]span{}, failed: map[int]bool{}, cachePages: cachePages,
		rep: &Report{Device: o.Device, Region: o.Region, Counts: map[ID]int{}, Found: []Found{}},
	}
}

// checker is a check of one store under way.
type checker struct {
	ctx   context.Context
	o     Options
	rep   *Report
	w     *whole
	alone bool  // no other store is judged with it
	err   error // why it could not go on

	dev    disk.Device
	reg    Medium
	ring   *pmem.Staging
	opened []io.Closer // what is ours to close

	fatal   int          // fatal problems that were found
	failed  map[int]bool // passes that found some, and those that build on them
	repairs []repair

	sb   *layout.Superblock
	hdr  pmlayout.Header
	img  *image
	sums *pageSums // of the region

	end        logEnd
	staged     map[uint32]span // slot → what the next recovery writes there from staging
	segs       []segment       // the segment table, by slot
	slotOf     map[uint32]uint32
	leaves     []leaf
	tableHoles bool      // parts of the segment table are damaged
	holes      bool      // parts of the tree could not be read: what is missing elsewhere proves nothing
	extents    [][]piece // by slot, the parts of it that are referred to
	names      *namespace
	cachePages int
}

// repair is a planned repair of a finding.
type repair struct {
	id    ID
	found int // index in the report's Found, -1 if it is not kept
	what  string
	apply func() error
}

// open opens what the options name by path.
func (c *checker) open() error {
	c.dev, c.reg, c.ring = c.o.Dev, c.o.Reg, c.o.Ring
	// The page cache must not hide what the medium holds by now.
	how := disk.OpenOptions{ReadOnly: c.o.Repair == RepairNone, Exclusive: true, Direct: true}
	if c.dev == nil {
		dev, err := disk.Open(c.o.Device, how)
		if err != nil {
			return busy(err)
		}
		c.dev = dev
		c.opened = append(c.opened, dev)
	}
	c.rep.Device = c.dev.Name()
	if c.reg == nil {
		if c.rep.Region == "" {
			c.rep.Region = filepath.Join(filepath.Dir(c.o.Device), RegionName)
		}
		how.Direct = false // read page by page
		reg, err := disk.Open(c.rep.Region, how)
		if errors.Is(err, sealfs.ErrNotExist) {
			return fmt.Errorf("%w: the region of %s is missing; without it the store is lost, name its path if it lies elsewhere", err, c.rep.Device)
		}
		if err != nil {
			return busy(err)
		}
		c.reg = reg
		c.opened = append(c.opened, reg)
	}
	c.rep.Region = c.reg.Name()
	return nil
}

func busy(err error) error {
	if errors.Is(err, sealfs.ErrBusy) {
		return fmt.Errorf("%w: a store is checked offline, stop it first", err)
	}
	return err
}

func (c *checker) close() error {
	var errs []error
	for _, f := range c.opened {
		errs = append(errs, f.Close())
	}
	if c.ring != nil && c.ring != c.o.Ring {
		errs = append(errs, c.ring.Close(false))
	}
	return errors.Join(errs...)
}

// problem reports a finding and returns its index in Found, -1 if there are
// enough of its number already.
func (c *checker) problem(id ID, where, format string, args ...any) int {
	p, _ := Lookup(id)
	c.rep.Counts[id]++
	if p.Severity == Fatal {
		c.fatal++
	}
	n := c.rep.Counts[id]
	if n > c.o.Keep {
		if n == c.o.Keep+1 {
			c.say("[%d] … and more of them", id)
		}
		return -1
	}
	f := Found{ID: id, Name: p.Name, Severity: p.Severity, Where: where, Detail: fmt.Sprintf(format, args...)}
	c.rep.Found = append(c.rep.Found, f)
	if c.alone {
		c.say("%s", f.String())
	} else { // many are found when all stores have been read
		c.say("%s: %s", c.rep.Device, f.String())
	}
	return len(c.rep.Found) - 1
}

// plan notes a repair for the finding at index found.
func (c *checker) plan(id ID, found int, what string, apply func() error) {
	c.repairs = append(c.repairs, repair{id, found, what, apply})
}

// say writes a line for humans.
func (c *checker) say(format string, args ...any) {
	fmt.Fprintf(c.o.Out, "  "+format+"\n", args...)
}

// tick is called now and then in long work: it reports progress and ends the
// check when the context is done.
func (c *checker) tick(pass int, done, total int64) error {
	if c.o.Progress != nil {
		c.o.Progress(pass, done, total)
	}
	if c.ctx.Err() != nil {
		return fmt.Errorf("check of %s: %w", c.rep.Device, sealfs.ErrInterrupted)
	}
	return nil
}

// repair applies what was planned, as far as the options allow. While there are
// errors nothing is touched: what looks like the damaged copy may hold what is
// missing elsewhere.
func (c *checker) repair() error {
	if c.o.Repair == RepairNone {
		return nil
	}
	for id, n := range c.rep.Counts {
		if p, _ := Lookup(id); p.Remedy == NotYet && n > 0 {
			c.say("[%d] %s: repair of this problem is not available yet", id, p.Name)
		}
	}
	if len(c.repairs) > 0 && c.rep.left(Error) > 0 {
		c.say("nothing is repaired while there are errors that cannot be")
		return nil
	}
	for _, r := range c.repairs {
		p, _ := Lookup(r.id)
		if p.Remedy == NotYet || p.Remedy == Ask && c.o.Repair < RepairAll {
			continue
		}
		c.say("repair of [%d]: %s", r.id, r.what)
		if c.o.Confirm != nil && r.found >= 0 && !c.o.Confirm(c.rep.Found[r.found], r.what) {
			continue
		}
		if err := r.apply(); err != nil {
			return fmt.Errorf("repair of %s: %w", p.Name, err)
		}
		if c.rep.Fixed == nil {
			c.rep.Fixed = map[ID]int{}
		}
		c.rep.Fixed[r.id]++
		if r.found >= 0 {
			c.rep.Found[r.found].Repaired = true
		}
	}
	return nil
}
