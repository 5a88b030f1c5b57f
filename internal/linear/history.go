package linear

import (
	"cmp"
	"fmt"
	"math"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/anishathalye/porcupine"
)

// Step is one call with its answer, and when they were, by a clock that only counts.
type Step struct {
	Actor       int
	Call        Call
	Answer      Answer
	Begin, Over int64
}

// History is what happened in an arena. Its methods may be called at the same time.
type History struct {
	Dirs   []uint64 // inodes of the arena's directories, empty at the start
	mounts []string // of each actor, "" for one that has none
	clock  atomic.Int64

	mu    sync.Mutex
	steps []Step
}

// Do makes a call and notes it.
func (h *History) Do(i int, actor Actor, c Call) Answer {
	begin := h.clock.Add(1)
	a := actor.Do(&c)
	over := h.clock.Add(1)
	h.mu.Lock()
	defer h.mu.Unlock()
	h.steps = append(h.steps, Step{i, c, a, begin, over})
	return a
}

// Steps returns what was noted, in the order in which it began.
func (h *History) Steps() []Step {
	h.mu.Lock()
	defer h.mu.Unlock()
	return slices.SortedFunc(slices.Values(h.steps), func(a, b Step) int { return cmp.Compare(a.Begin, b.Begin) })
}

// Verdict is what Check says of a history.
type Verdict struct {
	Bad       bool   // no order explains it
	Undecided bool   // there was no time to find out
	Report    string // of a bad one
}

// Check looks for an order in which one file system would have given all the answers.
func (h *History) Check(limit time.Duration) Verdict {
	steps := h.Steps()
	var ops []porcupine.Operation
	for i := range steps {
		if steps[i].Call.Kind == Link {
			continue
		}
		steps[i].Answer.Loose = steps[i].Answer.Loose && (sizedMeanwhile(steps, &steps[i]) || movedMeanwhile(steps, &steps[i]))
	}
	for i := range steps {
		s := &steps[i]
		if !s.Call.Kind.changes() && (s.Answer.Lost || h.overtaken(steps, s)) {
			continue
		}
		over := s.Over
		if s.Answer.Lost {
			over = math.MaxInt64
		}
		ops = append(ops, porcupine.Operation{ClientId: s.Actor, Input: s, Output: s, Call: s.Begin, Return: over})
	}
	model := porcupine.Model{
		Init:  func() any { return newState(h.Dirs) },
		Equal: func(a, b any) bool { return a.(*state).equal(b.(*state)) },
		Hash:  func(a any) uint64 { return a.(*state).sum },
		Step: func(at, in, out any) (bool, any) {
			return at.(*state).step(&in.(*Step).Call, &out.(*Step).Answer)
		},
	}
	result, info := porcupine.CheckOperationsVerbose(model, ops, limit)
	switch result {
	case porcupine.Ok:
		return Verdict{}
	case porcupine.Unknown:
		return Verdict{Undecided: true}
	}
	return Verdict{Bad: true, Report: h.report(steps, info.PartialLinearizationsOperations())}
}

// overtaken reports whether r is a question about what another program on the same mount was changing at that time. Others
// may see such a change before this kernel hears that it has happened, and r, answered from the kernel's
// caches, was told what was before. Linux has changes of a directory and listings wait for each other.
func (h *History) overtaken(steps []Step, r *Step) bool {
	if h.mounts[r.Actor] == "" || r.Call.Kind == Readdir {
		return false
	}
	return slices.ContainsFunc(steps, func(s Step) bool {
		if s.Actor == r.Actor || h.mounts[s.Actor] != h.mounts[r.Actor] || !s.Call.Kind.changes() || s.Begin > r.Over || s.Over < r.Begin && !s.Answer.Lost {
			return false
		}
		if r.Call.Kind == Getattr || r.Call.Kind == Read {
			// Of which inode a name is taken is not said.
			return s.Call.Ino == 0 || s.Call.Ino == r.Call.Ino
		}
		return r.Call.Dir == s.Call.Dir && r.Call.Name == s.Call.Name || r.Call.Dir == s.Call.Dir2 && r.Call.Name == s.Call.Name2
	})
}

// sizedMeanwhile reports whether the size of the file that r reads may have been changed at the same time.
func sizedMeanwhile(steps []Step, r *Step) bool {
	return slices.ContainsFunc(steps, func(s Step) bool {
		return (s.Call.Kind == Truncate || s.Call.Kind == Append || s.Call.Kind == Write) && s.Call.Ino == r.Call.Ino && s.Begin < r.Over && (r.Begin < s.Over || s.Answer.Lost)
	})
}

// movedMeanwhile reports whether the names that r renames may have been changed at the same time.
func movedMeanwhile(steps []Step, r *Step) bool {
	return slices.ContainsFunc(steps, func(s Step) bool {
		c := &s.Call
		names := c.Kind != Lookup && c.Kind != Open && c.Kind != OpenDir && c.Kind != Readdir && c.Ino == 0 || c.Kind == Link
		renames := r.Call.Kind == Rename || r.Call.Kind == RenameNoReplace || r.Call.Kind == Exchange
		return names && renames && s.Begin != r.Begin && s.Begin < r.Over && (r.Begin < s.Over || s.Answer.Lost)
	})
}

// report tells a history, and how far an order of it can be found.
func (h *History) report(steps []Step, found [][][]porcupine.Operation) string {
	var b strings.Builder
	order := map[*Step]int{}
	longest := []porcupine.Operation{}
	for _, p := range found {
		for _, seq := range p {
			if len(seq) > len(longest) {
				longest = seq
			}
		}
	}
	for i, o := range longest {
		order[o.Input.(*Step)] = i + 1
	}
	byBegin := map[int64]int{}
	for s, i := range order {
		byBegin[s.Begin] = i
	}
	fmt.Fprintf(&b, "the arena's directories are %v; of %d calls %d can be put in an order, which stands in front\n", h.Dirs, len(steps), len(longest))
	for _, s := range steps {
		place := "  ?"
		if i, ok := byBegin[s.Begin]; ok {
			place = fmt.Sprintf("%3d", i)
		}
		fmt.Fprintf(&b, "%s  %4d-%-4d actor %d: %v: %s\n", place, s.Begin, s.Over, s.Actor, &s.Call, s.Answer.describe(s.Call.Kind))
	}
	return b.String()
}
