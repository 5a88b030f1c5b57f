package fsck

import (
	"fmt"
	"io"
	"slices"

	"sealfs/fsck/mend"
	pmlayout "sealfs/pmem/layout"
)

// Step is a step of a plan: what will be done about a problem, or about what
// follows from another repair.
type Step struct {
	Problem ID     `json:"problem"`
	Name    string `json:"name"`
	Where   string `json:"where"`
	What    string `json:"what"` // will change
}

// String returns the repair in one line.
func (r *Step) String() string { return fmt.Sprintf("[%d] %s: %s", r.Problem, r.Where, r.What) }

// fix is a repair that is being planned.
type fix struct {
	Step
	// do changes the records in memory, or what else the job is about. It returns
	// in words what that will do, "" if nothing is left to be done.
	do func(e *editor) string
	// early: in the stage of files, whatever the problem.
	early bool
}

func (f *fix) stage() int {
	if f.early {
		return stageFiles
	}
	return stageOf(f.Problem)
}

// Repairs are planned in stages, each on what those before will leave: what is lost with
// a record is known when the record is out of the way, a name can be given when the
// inodes are there that shall have one, and what counts is counted last.
const (
	stageGround  = iota // superblocks, log, segment table, tree
	stageRecords        // records that are damaged or in the wrong place
	stageFiles          // what belongs to inodes
	stageEntries
	stageLinks
	stageCounts
	stages
)

// stageOf returns the stage in which a problem is repaired.
func stageOf(id ID) int {
	switch id {
	case InoBeyond, InoTwice:
		return stageRecords
	case DirNames, DirLoop:
		return stageEntries
	case DirParent, LinkCount, NoName, OrphanRow, OrphanMissing, TailRow:
		return stageLinks
	case ExtentBeyond, BytesWrong, AttrNames, SessionRows, UsageWrong, DirSize, DirLinks,
		PartBytes, PartVolume, PartGen, PartBound, TotalsWrong, TotalsPlace, TotalsQueue:
		return stageCounts
	case EntryNoDir, ExtentNowhere, ExtentOutside, ExtentShared: // before names of what is not there are removed
		return stageFiles
	case LiveWrong:
		return stageCounts
	}
	switch {
	case id < KeyUnknown, id >= ExtentNowhere:
		return stageGround
	case id < EntryNoDir:
		return stageRecords
	case id < DirSize:
		return stageEntries
	}
	return stageFiles
}

const (
	// fixesMax bounds the repairs of one round, and with them its memory.
	fixesMax = 50_000
	// roundsMax bounds the rounds, and triesMax how often the same is repaired: repairs that
	// undo each other are a mistake of this program, and must not keep it from ending.
	roundsMax = 64
	triesMax  = 8
)

// addFix takes a repair into the plan of the round.
func (c *checker) addFix(f *fix) {
	if len(c.fixes) < fixesMax {
		c.fixes = append(c.fixes, f)
	}
}

// mendBy plans a repair; do is called when the pass has ended.
func (c *checker) mendBy(id ID, where string, do func(e *editor) string) {
	c.addFix(&fix{Step: Step{Problem: id, Where: where}, do: do})
}

// mendBy is the same in a part of a pass.
func (s *sink) mendBy(c *checker, id ID, where string, do func(e *editor) string) {
	if s.count[id] > fixesMax {
		return // of a later round
	}
	s.found = append(s.found, finding{fix: &fix{Step: Step{Problem: id, Where: where}, do: do}, c: c})
}

func (r *reader) mendBy(id ID, where string, do func(e *editor) string) {
	r.out.mendBy(r.c, id, where, do)
}

// plan makes of what the check has found a plan, and judges the stores as they
// will be when it has been carried out. Nothing is written.
func (w *whole) plan(all []*checker) error {
	some := false
	for _, c := range all {
		c.fixable = c.err == nil && c.fatal == 0 && !c.o.judge
		if c.fixable && c.hdr.Incompat&pmlayout.FeatureDax != 0 && c.rep.Counts[LogCut]+c.rep.Counts[LogStaging] > 0 {
			c.tell("%s: nothing is repaired: the log breaks off at %v, and the region on persistent memory may be newer: make it again with --rebuild-region", c.rep.Device, c.end.lsn)
			c.fixable = false
		}
		if c.fixable && !c.o.CutLog && len(c.fixes) > 0 && c.rep.Counts[LogCut]+c.rep.Counts[LogStaging] > 0 {
			c.tell("%s: nothing is repaired: the log breaks off at %v, and what was done after it, also what was synced, would be lost; --cut-log allows that", c.rep.Device, c.end.lsn)
			c.fixable = false
		}
		if c.fixable && c.sb.ROCompat != 0 && len(c.fixes) > 0 {
			c.tell("%s: nothing is repaired: writing needs features %#x that this program does not know", c.rep.Device, c.sb.ROCompat)
			c.fixable = false
		}
		if !c.fixable {
			c.fixes = nil
			continue
		}
		c.job, c.over, c.quiet, c.tried = &mend.Job{}, &overlay{}, true, map[string]int{}
		c.editor = &editor{c: c}
		some = some || len(c.fixes) > 0
	}
	if !some {
		return nil
	}
	reports := make([]*Report, len(all))
	for i, c := range all {
		reports[i] = c.rep
	}
	defer func() {
		for i, c := range all {
			reports[i].Plan, c.rep, c.quiet = c.steps, reports[i], false
		}
	}()
	for range roundsMax {
		before := w.effects
		for stage := 0; stage < stages && w.effects == before; stage++ {
			for _, c := range all {
				c.carryOut(stage)
			}
		}
		if w.effects == before {
			break
		}
		for _, c := range all {
			// All others are planned afresh on what these leave.
			c.fixes = nil
			if c.over != nil {
				c.over.sort()
			}
		}
		if err := w.again(all); err != nil {
			return err
		}
	}
	return nil
}

// carryOut makes the repairs of a stage, in memory.
func (c *checker) carryOut(stage int) {
	if len(c.fixes) == 0 {
		return
	}
	now := map[string]bool{}
	for _, f := range c.fixes {
		if f.stage() != stage {
			continue
		}
		for _, n := range c.w.stores {
			if n.c.editor != nil {
				n.c.editor.batch = nil
			}
		}
		tried := fmt.Sprint(f.Problem, f.Where)
		if !now[tried] {
			now[tried] = true
			c.tried[tried]++
		}
		if c.tried[tried] > triesMax {
			continue
		}
		before := c.w.effects
		if f.What = f.do(c.editor); f.What != "" && c.w.effects != before {
			p, _ := Lookup(f.Problem)
			f.Name = p.Name
			c.steps = append(c.steps, f.Step)
			for _, n := range c.w.stores { // it may concern others as well
				if n.c != c && n.c.editor != nil && n.c.editor.batch != nil {
					n.c.steps = append(n.c.steps, f.Step)
				}
			}
		}
	}
	c.editor.batch = nil
}

// again judges what is planned to be there.
func (w *whole) again(all []*checker) error {
	w.forget()
	for _, c := range all {
		c.names = nil
		if !c.fixable {
			continue
		}
		c.holes, c.rep = false, &Report{Device: c.rep.Device, Region: c.rep.Region, Staging: c.rep.Staging, Counts: map[ID]int{}}
		c.judgeTable()
	}
	w.namespaces(all, func(c *checker) error {
		if !c.fixable {
			w.missing = true
			return nil
		}
		return c.collect()
	})
	for _, c := range all {
		if c.err == nil && c.fixable && c.ground() {
			c.err = c.segments()
		}
		if c.err != nil {
			return c.err
		}
	}
	return nil
}

// shownMax is how many repairs of one problem are shown to people; reports have all.
const shownMax = 100

// Show writes the plan for people: what will be done, and what remains.
func (r *Report) Show(out io.Writer) {
	if len(r.Plan) > 0 {
		fmt.Fprintf(out, "%s: %s planned\n", r.Device, count(len(r.Plan), "repair"))
		shown := map[ID]int{}
		for i := range r.Plan {
			id := r.Plan[i].Problem
			if shown[id]++; shown[id] <= shownMax {
				fmt.Fprintf(out, "  %d. %s\n", i+1, r.Plan[i].String())
			} else if shown[id] == shownMax+1 {
				fmt.Fprintf(out, "  %d. [%d] … and more of them\n", i+1, id)
			}
		}
	}
	var none []ID
	for id := range r.Counts {
		if p, _ := Lookup(id); p.Remedy == None {
			none = append(none, id)
		}
	}
	slices.Sort(none)
	for _, id := range none {
		p, _ := Lookup(id)
		fmt.Fprintf(out, "%s: [%d] %s is not repaired: %s\n", r.Device, id, p.Name, p.Mend)
	}
}
