package crash

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"sealfs"
	"sealfs/internal/oracle"
	"sealfs/internal/turn"
	"sealfs/lsfs"
	"sealfs/op"
)

// sequence is a kind of run: a shape of stores, and what is done to them.
type sequence struct {
	name   string
	about  string
	g      geometry
	lives  int
	steps  int  // of a life
	sync   int  // one of so many steps is a sync
	wait   int  // one of so many steps lets time pass, so that what is delayed happens
	files  int  // inodes that are in use at a time
	write  int  // the longest write, in bytes
	blocks int  // writes begin at one of the first so many blocks; 0: anywhere
	kill   bool // lives also end by the death of the process
	large  bool // writes may take several records
	far    bool // of some states the regions are lost, too
	fill   int  // files with attributes that are there before the first cut: a tree of some pages
	// of is how often each kind of step comes, relative to the others.
	of map[string]int
}

// namespace are the weights of a sequence of all operations.
var namespace = map[string]int{
	"create": 6, "mkdir": 3, "symlink": 2, "mknod": 1, "tmpfile": 1, "link": 2, "unlink": 4, "rmdir": 2, "rename": 4,
	"truncate": 2, "setattr": 2, "write": 8, "append": 2, "fallocate": 2, "setxattr": 2, "removexattr": 1, "lock": 1, "open": 4, "release": 1,
}

// overwriting are the weights of a sequence that makes garbage.
var overwriting = map[string]int{"create": 2, "unlink": 1, "truncate": 1, "write": 16, "append": 1, "rename": 1}

// options returns the log's options for segments of the given size. Nothing is
// drained by volume; checkpoints come with every few segments.
func options(segment int64, more func(*lsfs.Options)) lsfs.Options {
	o := lsfs.Options{
		StagingBytes: 2 * segment, DrainBytes: 1 << 30, DrainInterval: 10 * time.Millisecond, LagMax: 500 * time.Millisecond,
		CheckpointBytes: 2 * segment, CacheBytes: 128 << 10,
	}
	if more != nil {
		more(&o)
	}
	return o
}

const kib = 1 << 10

// sequences are all kinds of runs. An upgrade of a format, when there is one, comes
// with a geometry whose media begin in the older one.
var sequences = []sequence{
	{
		name: "names", about: "every operation, on one store",
		g:     geometry{stores: 1, segment: 32 * kib, segments: 40, region: 640 * kib, log: options(32*kib, nil)},
		lives: 3, steps: 40, sync: 12, wait: 10, files: 30, write: 7000, of: namespace, fill: 6,
	},
	{
		name: "churn", about: "overwriting on a small store: segments are cleaned and used again",
		g:     geometry{stores: 1, segment: 32 * kib, segments: 20, region: 640 * kib, log: options(32*kib, func(o *lsfs.Options) { o.CleanLow = 9; o.CheckpointBytes = 32 * kib })},
		lives: 3, steps: 60, sync: 15, wait: 12, files: 12, write: 8000, of: overwriting,
	},
	{
		name: "clean", about: "long-lived and short-lived files side by side: the cleaner always has something to do",
		g:     geometry{stores: 1, segment: 32 * kib, segments: 18, region: 640 * kib, log: options(32*kib, func(o *lsfs.Options) { o.CleanLow = 8 })},
		lives: 3, steps: 80, sync: 10, wait: 20, files: 24, write: 6000, blocks: 3, fill: 14,
		of: map[string]int{"create": 2, "write": 24, "unlink": 1, "truncate": 1},
	},
	{
		name: "spin", about: "few files on few segments: what was written dies at once, and its segment is used again",
		g:     geometry{stores: 1, segment: 32 * kib, segments: 12, region: 640 * kib, log: options(32*kib, nil)},
		lives: 3, steps: 70, sync: 8, wait: 15, files: 4, write: 8000, of: map[string]int{"create": 1, "write": 24, "truncate": 2, "unlink": 1},
	},
	{
		name: "trim", about: "a region with hardly any memory: checkpoints and trims at every chance",
		g:     geometry{stores: 1, segment: 32 * kib, segments: 24, region: 640 * kib, log: options(32*kib, func(o *lsfs.Options) { o.BudgetBytes = 16 * kib; o.CheckpointBytes = 16 * kib })},
		lives: 3, steps: 40, sync: 15, wait: 12, files: 40, write: 8000, of: namespace, fill: 24,
	},
	{
		name: "durable", about: "every answer survives a power cut",
		g:     geometry{stores: 1, segment: 32 * kib, segments: 24, region: 640 * kib, durable: true, log: options(32*kib, nil)},
		lives: 3, steps: 25, sync: 50, wait: 8, files: 20, write: 6000, of: namespace,
	},
	{
		name: "large", about: "writes of several records, in larger segments",
		g:     geometry{stores: 1, segment: 64 * kib, segments: 20, region: 640 * kib, log: options(64*kib, nil)},
		lives: 3, steps: 30, sync: 10, wait: 8, files: 8, write: 40000, large: true, of: overwriting,
	},
	{
		name: "kill", about: "every operation, on one store: the process is killed, then the power goes, or an old ring is left",
		g:     geometry{stores: 1, segment: 32 * kib, segments: 24, region: 640 * kib, log: options(32*kib, nil)},
		lives: 3, steps: 40, sync: 14, wait: 10, files: 20, write: 7000, of: namespace, kill: true,
	},
	{
		name: "far", about: "far checkpoints one after another; the regions are lost with the power, or when the process is killed",
		g:     geometry{stores: 1, segment: 32 * kib, segments: 48, region: 640 * kib, log: options(32*kib, func(o *lsfs.Options) { o.FarBytes = 32 * kib })},
		lives: 3, steps: 80, sync: 10, wait: 12, files: 20, write: 7000, fill: 6, kill: true, far: true, of: namespace,
	},
	{
		name: "pair", about: "every operation, on two stores: two-phase commits",
		g:     geometry{stores: 2, segment: 32 * kib, segments: 24, region: 640 * kib, log: options(32*kib, func(o *lsfs.Options) { o.LagMax = time.Second })},
		lives: 3, steps: 25, sync: 12, wait: 8, files: 24, write: 5000,
		of: map[string]int{"create": 5, "mkdir": 6, "symlink": 1, "link": 4, "unlink": 4, "rmdir": 4, "rename": 8, "write": 4, "truncate": 1, "setattr": 1, "tmpfile": 1, "setxattr": 1},
	},
	{
		name: "three", about: "every operation, on three stores: transactions of which not all are parties",
		g:     geometry{stores: 3, segment: 32 * kib, segments: 24, region: 640 * kib, log: options(32*kib, func(o *lsfs.Options) { o.LagMax = time.Second })},
		lives: 3, steps: 25, sync: 10, wait: 8, files: 24, write: 5000,
		of: map[string]int{"create": 5, "mkdir": 7, "link": 4, "unlink": 4, "rmdir": 4, "rename": 10, "write": 4, "setattr": 1, "setxattr": 1},
	},
	{
		name: "chunks", about: "files with chunks on two stores: they grow, are cut off and deleted",
		g:     geometry{stores: 2, segment: 32 * kib, segments: 24, region: 640 * kib, chunks: true, log: options(32*kib, nil)},
		lives: 3, steps: 30, sync: 15, wait: 8, files: 6, write: 5000,
		of: map[string]int{"create": 3, "mkdir": 1, "unlink": 2, "rename": 2, "truncate": 4, "write": 3, "chunk": 12},
	},
	{
		name: "pairchurn", about: "two small stores that are cleaned while transactions go on",
		g:     geometry{stores: 2, segment: 32 * kib, segments: 20, region: 640 * kib, log: options(32*kib, func(o *lsfs.Options) { o.CleanLow = 9; o.CheckpointBytes = 32 * kib })},
		lives: 3, steps: 30, sync: 15, wait: 8, files: 12, write: 8000,
		of: map[string]int{"create": 3, "mkdir": 2, "unlink": 1, "rename": 3, "write": 14, "link": 1},
	},
}

// payload returns the most that one record of the log holds.
func (q *sequence) payload() uint64 { return uint64(q.g.segment / 4) }

func sequenceNamed(name string) *sequence {
	for i := range sequences {
		if sequences[i].name == name {
			return &sequences[i]
		}
	}
	return nil
}

// life is one life of a run: what was done between two power cuts.
type life struct {
	claim
	moments []moment
}

// run is a sequence under way with a seed.
type run struct {
	t     *testing.T
	seq   *sequence
	seed  uint64
	no    int // of the life
	rng   *rand.Rand
	m     media // as the power cut before left them
	clock int64 // when the power went, nanoseconds since 1970

	past  []entry // all that has survived
	o     *oracle.FS
	root  sealfs.Ino
	inos  []sealfs.Ino // all that ever were
	files []sealfs.Ino // some of late
	dirs  []sealfs.Ino
	names []string

	// In a life.
	w       *world
	rec     *recorder
	h       *history
	now     view
	refused int
}

func newRun(t *testing.T, seq *sequence, seed uint64) (*run, error) {
	r := &run{t: t, seq: seq, seed: seed, no: -1}
	if seq.kill && !raceEnabled { // which keeps rings in memory
		mine := *seq
		mine.g.dir = t.TempDir()
		r.seq, seq = &mine, &mine
	}
	for i := range 8 {
		r.names = append(r.names, fmt.Sprint("name", i))
	}
	var err error
	synctest.Test(t, func(*testing.T) {
		if r.m, err = seq.g.format(); err != nil {
			return
		}
		var w *world
		if w, err = seq.g.open(r.m, 0); err != nil {
			return
		}
		r.root = w.root
		var rep op.Reply
		// Its times are not known outside.
		req := op.Request{Type: op.Setattr, Ino: r.root, Valid: op.SetAtime | op.SetMtime, Atime: 5, Mtime: 6}
		address(&req)
		mine := req
		err = errors.Join(w.Do(context.Background(), &mine, &rep), w.srv.Close())
		r.clock = time.Now().UnixNano()
		req.Time = mine.Time
		r.past = []entry{{ino: r.root, req: op.Request{Type: op.MakeRoot, Volume: volume, Shard: r.root.Home(shards), Mode: 0o755, Time: 1}}, {req: req}}
	})
	if err == nil {
		r.o, err = rebuild(r.past, seq.g.chunks)
	}
	r.inos, r.dirs, r.files = []sealfs.Ino{r.root}, []sealfs.Ino{r.root}, []sealfs.Ino{r.root}
	for i := range r.m {
		r.m[i] = r.m[i].Reopen()
	}
	return r, err
}

// rngFor returns numbers that depend on the run's seed, the life and the purpose.
func (r *run) rngFor(purpose uint64) *rand.Rand {
	return rand.New(rand.NewPCG(r.seed<<8|uint64(r.no+1), purpose))
}

// live lets the stores live from r.m on, until the power goes.
func (r *run) live() (*life, error) {
	r.no++
	r.rng = r.rngFor(1)
	var l *life
	var err error
	synctest.Test(r.t, func(*testing.T) {
		l, err = r.work()
	})
	if err != nil && r.h != nil {
		for k := max(0, len(r.h.done)-12); k < len(r.h.done); k++ {
			err = fmt.Errorf("%w\n  operation %d: %v", err, k+1, &r.h.done[k])
		}
	}
	return l, err
}

func (r *run) work() (*life, error) {
	g := &r.seq.g
	if err := g.put(nil); err != nil {
		return nil, err
	}
	w, err := g.open(r.m, r.clock)
	if err != nil {
		return nil, err
	}
	defer w.srv.Close()
	r.w = w
	w.settle()
	if r.now, err = look(r.o, g, r.inos); err != nil {
		return nil, err
	}
	r.h = newHistory(r.now.texts)
	if err := r.same(); err != nil {
		return nil, fmt.Errorf("at the beginning of life %d: %w", r.no, err)
	}
	r.rec = &recorder{g: g, rng: r.rngFor(2), synced: make([]int, len(r.now.texts))}
	if r.no == 0 {
		if err := r.fill(); err != nil {
			return nil, err
		}
	}
	r.rec.watch(r.m)
	defer r.rec.stop()
	for range r.seq.steps {
		if err := r.step(); err != nil {
			return nil, fmt.Errorf("operation %d: %w", r.rec.begun, err)
		}
		synctest.Wait()
		<-time.After(turn.Period) // no two operations have the same time, on whatever store
	}
	if len(r.rec.taken()) == 0 {
		for s := range g.stores {
			if err := r.sync(s); err != nil {
				return nil, err
			}
		}
	}
	if err := r.same(); err != nil {
		return nil, fmt.Errorf("at the end of life %d: %w", r.no, err)
	}
	return &life{claim: claim{h: r.h, inos: slices.Clone(r.inos)}, moments: r.rec.taken()}, nil
}

// fill makes files with attributes.
func (r *run) fill() error {
	for i := range r.seq.fill {
		name := fmt.Sprint("filling", i)
		if err := r.change(op.Request{Type: op.Create, Dir: r.root, Name: name, Mode: 0o600}); err != nil {
			return err
		}
		ino := r.inos[len(r.inos)-1]
		if err := r.change(op.Request{Type: op.Setxattr, Ino: ino, Name: "user." + name, Data: bytes.Repeat([]byte{byte(i)}, 2000)}); err != nil {
			return err
		}
	}
	for s := range r.seq.g.stores {
		if err := r.sync(s); err != nil {
			return err
		}
	}
	return nil
}

// same makes sure that the server and the model hold the same.
func (r *run) same() error {
	v, err := look(r.w, &r.seq.g, r.inos)
	if err != nil {
		return err
	}
	for s := range v.texts {
		if v.texts[s] != r.now.texts[s] {
			return fmt.Errorf("store %d and the model differ:\n%v", s, difference(r.now.texts[s], v.texts[s]))
		}
	}
	return nil
}

// next lets the next life begin with what a cut left.
func (r *run) next(l *life, at []position, m media, clock int64) (err error) {
	r.m, r.clock = m, clock
	r.past = append(r.past, l.h.survivors(at)...)
	if r.o, err = rebuild(r.past, r.seq.g.chunks); err != nil {
		return err
	}
	gone := func(ino sealfs.Ino) bool {
		_, there := attr(r.o, ino)
		return !there
	}
	r.inos, r.files, r.dirs = slices.DeleteFunc(r.inos, gone), slices.DeleteFunc(r.files, gone), slices.DeleteFunc(r.dirs, gone)
	return nil
}

func pick[T any](r *run, s []T) T { return s[r.rng.IntN(len(s))] }

// step does one step of the script.
func (r *run) step() error {
	switch {
	case r.rng.IntN(r.seq.sync) == 0:
		return r.sync(r.rng.IntN(r.seq.g.stores))
	case r.rng.IntN(r.seq.wait) == 0:
		<-time.After([]time.Duration{15 * time.Millisecond, 15 * time.Millisecond, 300 * time.Millisecond, 600 * time.Millisecond, 1500 * time.Millisecond}[r.rng.IntN(5)])
		return nil
	}
	sum := 0
	for _, kind := range kinds {
		sum += r.seq.of[kind.name]
	}
	n := r.rng.IntN(sum + r.seq.of["chunk"])
	if len(r.files) < 4 {
		n = 0 // there must be something to work on
	}
	for _, kind := range kinds {
		if n -= r.seq.of[kind.name]; n < 0 {
			return r.change(kind.make(r))
		}
	}
	return r.chunk()
}

// kinds are the kinds of steps that change something.
var kinds = []struct {
	name string
	make func(*run) op.Request
}{
	{"create", func(r *run) op.Request {
		req := op.Request{Type: op.Create, Dir: pick(r, r.dirs), Name: pick(r, r.names), Mode: 0o644, UID: uint32(r.rng.IntN(3))}
		if r.rng.IntN(3) == 0 {
			req.Flags, req.Session = op.OpenIt, session
		}
		return req
	}},
	{"mkdir", func(r *run) op.Request {
		return op.Request{Type: op.Mkdir, Dir: pick(r, r.dirs), Name: pick(r, r.names), Mode: 0o2755, Shard2: sealfs.Shard(r.rng.IntN(shards))}
	}},
	{"symlink", func(r *run) op.Request {
		return op.Request{Type: op.Symlink, Dir: pick(r, r.dirs), Name: pick(r, r.names), Data: bytes.Repeat([]byte("x/"), 1+r.rng.IntN(700))}
	}},
	{"mknod", func(r *run) op.Request {
		return op.Request{Type: op.Mknod, Dir: pick(r, r.dirs), Name: pick(r, r.names), Mode: 0o010600}
	}},
	{"tmpfile", func(r *run) op.Request {
		return op.Request{Type: op.Tmpfile, Dir: pick(r, r.dirs), Mode: 0o600, Flags: op.OpenIt, Session: session}
	}},
	{"link", func(r *run) op.Request {
		return op.Request{Type: op.Link, Dir: pick(r, r.dirs), Name: pick(r, r.names), Ino: pick(r, r.files)}
	}},
	{"unlink", func(r *run) op.Request {
		return op.Request{Type: op.Unlink, Dir: pick(r, r.dirs), Name: pick(r, r.names)}
	}},
	{"rmdir", func(r *run) op.Request {
		return op.Request{Type: op.Rmdir, Dir: pick(r, r.dirs), Name: pick(r, r.names)}
	}},
	{"rename", func(r *run) op.Request {
		return op.Request{Type: op.Rename, Dir: pick(r, r.dirs), Name: pick(r, r.names), Dir2: pick(r, r.dirs), Name2: pick(r, r.names),
			Flags: []op.Flags{0, 0, op.NoReplace, op.Exchange}[r.rng.IntN(4)]}
	}},
	{"truncate", func(r *run) op.Request {
		req := op.Request{Type: op.Setattr, Ino: pick(r, r.files), Valid: op.SetSize, Size: r.offset()}
		if r.seq.g.chunks && r.rng.IntN(2) == 0 {
			req.Size += sealfs.HomeBytes + uint64(r.rng.IntN(2))*sealfs.ChunkBytes
		}
		return req
	}},
	{"setattr", func(r *run) op.Request {
		return op.Request{Type: op.Setattr, Ino: pick(r, r.files), Valid: op.SetMode | op.SetUID | op.SetMtime,
			Mode: uint32(r.rng.IntN(0o1000)), UID: uint32(r.rng.IntN(3)), Mtime: int64(r.rng.IntN(1e9))}
	}},
	{"write", func(r *run) op.Request {
		off, data := r.offset(), r.data()
		if !r.seq.large {
			// One record: a full store refuses all of it or nothing.
			data = data[:min(uint64(len(data)), r.seq.payload()-off%sealfs.BlockSize)]
		}
		return op.Request{Type: op.Write, Ino: pick(r, r.files), Off: off, Data: data}
	}},
	{"append", func(r *run) op.Request {
		return op.Request{Type: op.Write, Ino: pick(r, r.files), Flags: op.Append, Data: r.data()[:1+r.rng.IntN(300)]}
	}},
	{"fallocate", func(r *run) op.Request {
		req := op.Request{Type: op.Fallocate, Ino: pick(r, r.files), Off: r.offset(), Len: 1 + r.offset(), Mode: []uint32{0, 1, 3, 0x10, 0x11}[r.rng.IntN(5)]}
		if req.Mode > 1 {
			// The ends of a hole that lie within blocks are records of their own.
			req.Off, req.Len = req.Off&^(sealfs.BlockSize-1), req.Len&^(sealfs.BlockSize-1)+sealfs.BlockSize
		}
		return req
	}},
	{"setxattr", func(r *run) op.Request {
		return op.Request{Type: op.Setxattr, Ino: pick(r, r.files), Name: "user." + pick(r, r.names), Data: bytes.Repeat([]byte{byte(r.rng.Uint32())}, 1+r.rng.IntN(2500))}
	}},
	{"removexattr", func(r *run) op.Request {
		return op.Request{Type: op.Removexattr, Ino: pick(r, r.files), Name: "user." + pick(r, r.names)}
	}},
	{"lock", func(r *run) op.Request {
		return op.Request{Type: op.SetLock, Ino: pick(r, r.files), Session: session, Lock: op.Lock{Type: op.ReadLock, End: uint64(r.rng.IntN(50)), Owner: 1, PID: 1}}
	}},
	{"open", func(r *run) op.Request {
		return op.Request{Type: op.Open, Ino: pick(r, r.files), Session: session}
	}},
	{"release", func(r *run) op.Request {
		return op.Request{Type: op.Release, Ino: pick(r, r.files), Session: session}
	}},
}

// attr returns the attributes of an inode, if it is there.
func attr(h op.Handler, ino sealfs.Ino) (op.Attr, bool) {
	req := op.Request{Type: op.Getattr, Ino: ino}
	address(&req)
	var rep op.Reply
	err := h.Do(context.Background(), &req, &rep)
	return rep.Attr, err == nil && rep.Code == 0
}

// chunksUsed is how many chunks of a file are written to.
const chunksUsed = 2

// chunk writes to a chunk of a file as a client does: it reserves room, writes, and
// tells the home how long the file is.
func (r *run) chunk() error {
	ino := pick(r, r.files)
	a, there := attr(r.o, ino)
	if !there || a.Mode&typeMask != typeFile || a.Bound == 0 && a.Size > sealfs.HomeBytes {
		return nil // it is no file for chunks
	}
	off := sealfs.HomeBytes + uint64(r.rng.IntN(chunksUsed))*sealfs.ChunkBytes + uint64(r.rng.IntN(3))*sealfs.BlockSize + uint64(r.rng.IntN(2)*r.rng.IntN(300))
	data := r.data()
	data = data[:min(uint64(len(data)), r.seq.payload()-off%sealfs.BlockSize)]
	end := off + uint64(len(data))
	if at, _ := attr(r.w, ino); min(a.Bound, at.Bound) < end {
		if err := r.change(op.Request{Type: op.Extend, Ino: ino, Gen: a.Gen, Off: sealfs.BoundFor(end)}); err != nil {
			return err
		}
	}
	if err := r.change(op.Request{Type: op.Write, Ino: ino, Gen: a.Gen, Off: off, Data: data}); err != nil {
		return err
	}
	if a.Size < end {
		return r.change(op.Request{Type: op.Extend, Ino: ino, Gen: a.Gen, Size: end})
	}
	return nil
}

func (r *run) offset() uint64 {
	if r.seq.blocks > 0 {
		return uint64(r.rng.IntN(r.seq.blocks)) * sealfs.BlockSize
	}
	switch r.rng.IntN(3) {
	case 0:
		return 0
	case 1:
		return uint64(r.rng.IntN(6)) * sealfs.BlockSize
	}
	return uint64(r.rng.IntN(20000))
}

func (r *run) data() []byte {
	b := make([]byte, max(300, 1+r.rng.IntN([]int{600, r.seq.write, r.seq.write}[r.rng.IntN(3)])))
	if r.seq.blocks > 0 && r.rng.IntN(2) == 0 {
		b = make([]byte, sealfs.BlockSize) // of the same size as what it replaces
	}
	for i := range b {
		b[i] = byte(r.rng.Uint32())
	}
	return b
}

// sync makes everything on a store durable.
func (r *run) sync(s int) error {
	req := op.Request{Type: op.Sync, Shard: sealfs.Shard(s), Volume: volume}
	var rep op.Reply
	if err := r.w.Do(context.Background(), &req, &rep); err != nil || rep.Code != 0 {
		return fmt.Errorf("sync: %w", errors.Join(err, rep.Err()))
	}
	r.rec.durable(s)
	return nil
}

// change sends a request to the server and the model.
func (r *run) change(req op.Request) error {
	address(&req)
	r.rec.begin()
	mine := req
	if req.Type == op.Extend || req.Type == op.Write && req.Off >= sealfs.HomeBytes {
		// A cut may leave nothing of what raised the generation but that.
		a, _ := attr(r.w, req.Ino)
		mine.Gen = a.Gen
	}
	var got op.Reply
	if err := r.w.Do(context.Background(), &mine, &got); err != nil {
		return fmt.Errorf("%v: %w", req.Type, err)
	}
	req.Time = mine.Time
	e := entry{req: req}
	if got.Code == sealfs.ErrNoSpace {
		r.refused++
		r.h.add(e, r.now.texts)
		return nil
	}
	switch req.Type {
	case op.Create, op.Mknod, op.Mkdir, op.Symlink, op.Tmpfile:
		if got.Code == 0 {
			e.ino = got.Attr.Ino
			// A create may have found a file that was there.
			if !slices.Contains(r.inos, e.ino) {
				r.o.Expect(e.ino)
			}
			r.learn(e.ino, req.Type == op.Mkdir)
		}
	case op.Write:
		if got.Code == 0 {
			if err := r.pieces(req, &got); err != nil {
				return err
			}
		}
	}
	was, _ := attr(r.o, req.Ino)
	var want op.Reply
	if err := r.o.Do(context.Background(), &req, &want); err != nil {
		return err
	}
	// Of two faults of a link either may be told, as of a rename between stores, and who
	// releases what is not there need not be told.
	forgiven := req.Type == op.Link && got.Code == sealfs.ErrExist || req.Type == op.Release ||
		req.Type == op.Rename && r.seq.g.stores > 1 && got.Code != 0 && want.Code != 0
	if got.Code != want.Code && !forgiven {
		return fmt.Errorf("%+v is answered %v, by the model %v", req, got.Code, want.Code)
	}
	if got.Code == 0 {
		e.parts = 1 << r.seq.g.storeOf(req.Shard)
	}
	var err error
	before := r.now
	if r.now, err = look(r.o, &r.seq.g, r.inos); err != nil {
		return err
	}
	if chunks := r.seq.g.stores; r.seq.g.chunks && req.Type == op.Setattr && req.Size > was.Size {
		// First goes what chunks hold beyond the end.
		r.h.note(chunks, r.now.texts[chunks], position(2*len(r.h.done)+1))
	}
	r.h.add(e, r.now.texts)
	if e := &r.h.done[len(r.h.done)-1]; got.Code == 0 && (e.joint(r.seq.g.stores) || r.seq.g.durable) {
		for s := range r.seq.g.stores {
			if e.parts>>s&1 == 1 {
				r.rec.durable(s)
			}
		}
	}
	if chunks := r.seq.g.stores; r.seq.g.chunks && before.texts[chunks] != r.now.texts[chunks] {
		// What chunks hold depends on several stores: of such changes only one at a time
		// is not durable.
		for s := range r.seq.g.stores {
			if err := r.sync(s); err != nil {
				return err
			}
		}
		r.rec.durable(chunks)
		// A file that is deleted goes when its chunks are gone, in the model at once.
		r.files = slices.DeleteFunc(r.files, func(ino sealfs.Ino) bool { _, there := attr(r.o, ino); return !there })
	}
	return nil
}

// learn notes an inode.
func (r *run) learn(ino sealfs.Ino, dir bool) {
	if !slices.Contains(r.inos, ino) {
		r.inos = append(r.inos, ino)
	}
	if r.files = append(r.files, ino); len(r.files) > r.seq.files {
		r.files = r.files[1:]
	}
	if dir {
		if r.dirs = append(r.dirs, ino); len(r.dirs) > 6 {
			r.dirs = append([]sealfs.Ino{r.root}, r.dirs[len(r.dirs)-4:]...)
		}
	}
}

// pieces tells the model the parts of a write that takes several records: a power
// cut may leave any number of them.
func (r *run) pieces(req op.Request, got *op.Reply) error {
	payload := r.seq.payload()
	var ends []uint64
	for at, end := got.Off, got.Off+uint64(len(req.Data)); at < end; {
		at = min(end, at&^(sealfs.BlockSize-1)+payload)
		ends = append(ends, at)
	}
	from := got.Off
	for _, to := range ends[:len(ends)-1] {
		part := req
		part.Flags &^= op.Append
		part.Off, part.Data = from, req.Data[from-got.Off:to-got.Off]
		var rep op.Reply
		if err := r.o.Do(context.Background(), &part, &rep); err != nil || rep.Code != 0 {
			return errors.Join(err, rep.Err())
		}
		v, err := look(r.o, &r.seq.g, r.inos)
		if err != nil {
			return err
		}
		r.h.within(v.texts, req.Ino)
		from = to
	}
	return nil
}
