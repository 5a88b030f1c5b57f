package linear

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"syscall"
)

// Actor is a client under test. One goroutine uses it.
type Actor interface {
	// Enter opens a directory of the arena by its path in the volume.
	Enter(path string) (ino uint64, err error)
	// Do makes a call. What it opens stays open.
	Do(c *Call) Answer
	// Close closes what Enter, Create, Open or OpenDir has opened, but not its locks:
	// the caller holds none.
	Close(ino uint64)
}

// Plan says what is to be done in an arena.
type Plan struct {
	Seed   uint64
	Dirs   []string // paths of its directories, which are empty
	Actors []Actor
	Calls  int  // of each actor
	Files  bool // mostly work on a few files, instead of names
	// Flat keeps actors from opening directories that they make. A mount needs it: Linux takes the
	// directory that it found under a name for the one that a rename replaced, and lets nobody use
	// that any more, though another mount had put another one there.
	Flat bool
	// Plain leaves out calls about two names, and content.
	Plain bool
}

// Run has the actors work at the same time, and returns what happened.
func Run(p Plan) (*History, error) {
	h := &History{}
	for i, a := range p.Actors {
		mount := ""
		if m, ok := a.(*Mounted); ok && p.Flat { // not a local file system
			mount = m.root
		}
		h.mounts = append(h.mounts, mount)
		var dirs []uint64
		for _, path := range p.Dirs {
			ino, err := a.Enter(path)
			if err != nil {
				return nil, fmt.Errorf("actor %d: %s: %w", i, path, err)
			}
			dirs = append(dirs, ino)
		}
		if h.Dirs == nil {
			h.Dirs = dirs
		}
		if !slices.Equal(h.Dirs, dirs) {
			return nil, fmt.Errorf("actor %d sees directories %v, actor 0 %v", i, dirs, h.Dirs)
		}
	}
	var all sync.WaitGroup
	for i, a := range p.Actors {
		w := &worker{h: h, i: i, a: a, rng: rand.New(rand.NewPCG(p.Seed, uint64(i))), files: p.Files, flat: p.Flat, plain: p.Plain, dirs: slices.Clone(h.Dirs), actors: len(p.Actors)}
		all.Go(func() {
			for range p.Calls {
				w.call()
			}
			w.end()
		})
	}
	all.Wait()
	return h, nil
}

// worker makes up the calls of one actor.
type worker struct {
	h      *History
	i      int
	actors int
	a      Actor
	rng    *rand.Rand
	n      int // calls so far
	files  bool
	flat   bool
	plain  bool
	dirs   []uint64 // open; the arena's first
	open   []uint64 // files
	locked uint64   // file on which it holds a lock
	stuck  bool     // it does not know whether it holds one
}

const (
	openMax = 3
	dirsMax = 2 // beside the arena's
)

var names = [...]string{"a", "b", "c"}

func pick[T any](w *worker, from []T) T { return from[w.rng.IntN(len(from))] }

// weight is how often a kind of call is made.
type weight struct {
	kind Kind
	n    int
}

var nameWork = []weight{
	{Lookup, 8}, {Getattr, 6}, {Readdir, 6}, {Create, 5}, {CreateExcl, 6}, {Open, 5}, {OpenDir, 2}, {Mkdir, 5}, {Rmdir, 4}, {Unlink, 8}, {Link, 5},
	{Rename, 10}, {RenameNoReplace, 3}, {Exchange, 4}, {Read, 3}, {Write, 3}, {Append, 2}, {Truncate, 1}, {TryLock, 1}, {Unlock, 1},
}

var fileWork = []weight{
	{Lookup, 2}, {Getattr, 9}, {Create, 6}, {Open, 4}, {Unlink, 1}, {Link, 1}, {Rename, 1}, {Read, 14}, {Write, 12}, {Append, 9}, {Truncate, 6},
	{TryLock, 3}, {TryShare, 3}, {WaitLock, 2}, {Unlock, 8},
}

// choose returns the kind of the next call that is possible.
func (w *worker) choose() Kind {
	list := nameWork
	if w.files {
		list = fileWork
	}
	sum := 0
	for _, x := range list {
		sum += x.n
	}
	for {
		k := Lookup
		at := w.rng.IntN(sum)
		for _, x := range list {
			if at -= x.n; at < 0 {
				k = x.kind
				break
			}
		}
		if w.plain && (k >= Link && k <= Truncate) {
			continue
		}
		switch k {
		case OpenDir:
			if w.flat {
				continue
			}
		case Link, Read, Write, Append, Truncate:
			if len(w.open) == 0 {
				continue
			}
		case TryLock, TryShare, WaitLock:
			if len(w.open) == 0 || w.locked != 0 || w.stuck {
				continue
			}
		case Unlock:
			if w.locked == 0 {
				continue
			}
		}
		return k
	}
}

// call makes one call.
func (w *worker) call() {
	w.n++
	c := Call{Kind: w.choose(), Birth: 1 + w.n*w.actors + w.i, Dir: pick(w, w.dirs), Name: pick(w, names[:])}
	if w.files {
		c.Dir, c.Name = w.dirs[0], names[w.rng.IntN(2)]
	}
	switch c.Kind {
	case Getattr:
		if c.Ino, c.Dir = c.Dir, 0; len(w.open) > 0 && w.rng.IntN(3) > 0 {
			c.Ino = pick(w, w.open)
		}
	case Rename, RenameNoReplace, Exchange:
		c.Dir2, c.Name2 = pick(w, w.dirs), pick(w, names[:])
	case Link:
		c.Ino = pick(w, w.open)
	case Read, Write, Append, Truncate, TryLock, TryShare, WaitLock:
		c.Ino, c.Dir, c.Name, c.Owner = pick(w, w.open), 0, "", w.i+1
		c.Off, c.Len = w.rng.IntN(6), 1+w.rng.IntN(12)
		c.Data = fmt.Sprintf("%c%d.", 'A'+w.i, w.n)
	case Unlock:
		c.Ino, c.Dir, c.Name, c.Owner = w.locked, 0, "", w.i+1
	}
	a := w.h.Do(w.i, w.a, c)
	if a.Lost && c.Kind >= TryLock {
		w.stuck, w.locked = true, 0
	}
	if a.Lost || a.Errno != 0 {
		return
	}
	switch c.Kind {
	case Create, CreateExcl, Open:
		w.open = w.keep(w.open, a.Ino, openMax)
	case OpenDir:
		fixed := len(w.h.Dirs)
		w.dirs = append(w.dirs[:fixed:fixed], w.keep(w.dirs[fixed:], a.Ino, dirsMax)...)
	case TryLock, TryShare, WaitLock:
		w.locked = c.Ino
	case Unlock:
		w.locked = 0
	}
}

// keep adds what was opened to what is open, and closes one if there are too many.
func (w *worker) keep(open []uint64, ino uint64, most int) []uint64 {
	if slices.Contains(open, ino) {
		return open
	}
	open = append(slices.Clone(open), ino)
	if len(open) > most {
		if k := w.rng.IntN(most); open[k] != w.locked && !w.stuck {
			w.a.Close(open[k])
			open = slices.Delete(open, k, k+1)
		}
	}
	return open
}

// end gives everything back.
func (w *worker) end() {
	if w.locked != 0 {
		w.h.Do(w.i, w.a, Call{Kind: Unlock, Ino: w.locked, Owner: w.i + 1})
	}
	for _, ino := range slices.Concat(w.open, w.dirs) {
		w.a.Close(ino)
	}
}

// failed is the answer that is an error.
func failed(e syscall.Errno) Answer {
	if lost(e) {
		return Answer{Lost: true}
	}
	return Answer{Errno: e}
}
