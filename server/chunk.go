package server

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"sealfs"
	"sealfs/internal/turn"
	"sealfs/meta"
	"sealfs/op"
	"sealfs/pmem"
)

// purgeWait bounds how long a request waits for chunks to be purged that an
// earlier truncation cut off.
const purgeWait = 5 * time.Second

// chunks is what a store keeps in memory for files that have chunks.
type chunks struct {
	cuts     waiters // who must look again when something was purged
	settling settling
	purges   atomic.Uint64 // counts changes by Purge
	durable  atomic.Uint64 // so many of them survive a power cut
}

// settling knows the files whose generation or bound is changing and not yet
// safe from a power cut. What other stores are told of them must be: they would
// hold chunks of a generation, or beyond a bound, that never was.
type settling struct {
	mu sync.Mutex
	of map[sealfs.Ino]*settlingFile
}

type settlingFile struct {
	changes int
	done    chan struct{}
}

func (s *settling) begin(ino sealfs.Ino) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.of == nil {
		s.of = map[sealfs.Ino]*settlingFile{}
	}
	f := s.of[ino]
	if f == nil {
		f = &settlingFile{done: make(chan struct{})}
		s.of[ino] = f
	}
	f.changes++
}

func (s *settling) end(ino sealfs.Ino) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f := s.of[ino]
	if f.changes--; f.changes == 0 {
		delete(s.of, ino)
		close(f.done)
	}
}

// wait returns when what was seen of ino before survives a power cut.
func (s *settling) wait(ino sealfs.Ino, turns turn.Turns) {
	s.mu.Lock()
	f := s.of[ino]
	s.mu.Unlock()
	if f != nil {
		mine := turns.Mine()
		<-f.done
		mine.Take()
	}
}

// settledChange executes a change of a file's size. One that changes the file's
// generation or bound is durable when it returns, and nobody is told before.
func (st *store) settledChange(cl *claim, req *op.Request, rep *op.Reply) error {
	var in meta.Inode
	if err := st.inode(req.Ino, &in); err != nil {
		return err
	}
	raises := in.Chunked()
	if req.Type == op.Extend {
		raises = req.Off > in.Bound || req.Flags&op.Append != 0 && req.Len > in.Bound-min(in.Size, in.Bound)
	}
	if !raises {
		return st.changeFor(cl, req, rep, nil)
	}
	st.chunks.settling.begin(req.Ino)
	defer st.chunks.settling.end(req.Ino)
	if err := st.changeFor(cl, req, rep, nil); err != nil || rep.Code != 0 || rep.Attr.Gen == in.Gen && rep.Attr.Bound <= max(in.Bound, sealfs.HomeBytes) {
		return err
	}
	return st.Sync()
}

// inode reads an inode; what aliases its record must not be looked at.
func (st *store) inode(ino sealfs.Ino, in *meta.Inode) error {
	return st.View(func(r pmem.Reader) error { return meta.GetInode(r, st.srv.cfg, ino, in) })
}

// getattr answers Getattr.
func (st *store) getattr(ctx context.Context, req *op.Request, rep *op.Reply) error {
	err := st.query(ctx, req, rep)
	if err == nil && rep.Attr.Bound != 0 {
		st.chunks.settling.wait(req.Ino, st.turns())
	}
	return err
}

// ask sends a request to whoever holds its shard.
func (s *Server) ask(ctx context.Context, req *op.Request, rep *op.Reply) error {
	return s.peers().Do(ctx, req, rep)
}

// writePart answers a Write of a part of one chunk.
func (st *store) writePart(ctx context.Context, cl *claim, req *op.Request, rep *op.Reply, d place) error {
	end := req.Off + uint64(len(req.Data))
	if req.Off%sealfs.ChunkBytes+uint64(len(req.Data)) > sealfs.ChunkBytes {
		return fmt.Errorf("write of %d bytes at %d goes beyond a chunk: %w", len(req.Data), req.Off, sealfs.ErrInvalid)
	}
	cl.part = true
	w := st.writing(d, cl)
	defer w.free()
	defer st.lockStripe(req.Ino).Unlock()
	var err error
	if w.bound, err = st.admit(ctx, req, d, end); err != nil {
		return err
	}
	return st.writePieces(w, req, rep, req.Off, 0)
}

// punchPart answers a Fallocate that makes holes in a chunk.
func (st *store) punchPart(ctx context.Context, req *op.Request, rep *op.Reply, d place) error {
	defer st.lockStripe(req.Ino).Unlock()
	execute := func(step *op.Request) error {
		rep.Reset()
		return st.change(step, rep, nil)
	}
	if req.Len == 0 || req.Off%sealfs.ChunkBytes > sealfs.ChunkBytes-min(req.Len, sealfs.ChunkBytes) || req.Len > sealfs.ChunkBytes {
		return fmt.Errorf("hole of %d bytes at %d goes beyond a chunk: %w", req.Len, req.Off, sealfs.ErrInvalid)
	}
	if _, err := st.part(d); errors.Is(err, sealfs.ErrNotExist) {
		return execute(req) // nothing is there
	} else if err != nil {
		return err
	}
	w := st.writing(d, nil)
	defer w.free()
	var err error
	// The bound does not matter: nothing beyond it is written.
	if w.bound, err = st.admit(ctx, req, d, 0); err != nil {
		return err
	}
	return st.punch(w, req, rep, sealfs.FileSizeMax, execute)
}

func (st *store) part(d place) (p meta.Part, err error) {
	err = st.View(func(r pmem.Reader) (err error) {
		p, err = meta.GetPart(r, d.shard, d.ino)
		return err
	})
	return p, err
}

// admit makes sure that a change of a part up to end belongs to the file as it is,
// and returns the file's bound if its home had to be asked for it. The inode's stripe must
// be held; it is given up while the home is asked, or while what an earlier truncation
// cut off is still to be purged.
func (st *store) admit(ctx context.Context, req *op.Request, d place, end uint64) (bound uint64, err error) {
	if known, err := st.known(req, d, end); known || err != nil {
		return 0, err
	}
	// A purge that comes while the home is asked says that its answer may be old.
	purged := st.chunks.cuts.enter(d.ino)
	if purged == nil {
		return 0, fmt.Errorf("server: %w", sealfs.ErrClosed)
	}
	defer st.chunks.cuts.leave(d.ino, purged)
	waiting, cancel := context.WithTimeout(ctx, purgeWait)
	defer cancel()
	mu := st.stripe(d.ino)
	for {
		mu.Unlock()
		attr, err := st.askHome(ctx, req)
		st.turns().Lock(mu)
		if err != nil {
			return 0, err
		}
		select {
		case <-purged:
			if waiting.Err() == nil {
				continue
			}
			return 0, fmt.Errorf("inode %d is purged again and again: %w", d.ino, sealfs.ErrUnavailable)
		default:
		}
		if attr.Gen != req.Gen || attr.Bound < max(end, 1) {
			return 0, fmt.Errorf("inode %d has generation %d and bound %d, the request for %d to %d has generation %d: %w",
				d.ino, attr.Gen, attr.Bound, req.Off, end, req.Gen, sealfs.ErrStale)
		}
		if known, err := st.known(req, d, 0); known || err != nil {
			return attr.Bound, err
		}
		old, err := st.holdsFrom(d, attr.Size)
		if err != nil || !old {
			return attr.Bound, err
		}
		mu.Unlock()
		err = st.awaitPurge(waiting, d.ino, purged)
		st.turns().Lock(mu)
		if err != nil {
			return 0, err
		}
	}
}

// known reports whether the part knows that the file reaches up to end in the
// request's generation.
func (st *store) known(req *op.Request, d place, end uint64) (bool, error) {
	p, err := st.part(d)
	switch {
	case errors.Is(err, sealfs.ErrNotExist):
		return false, nil
	case err != nil:
		return false, err
	case p.Gen > req.Gen:
		return false, fmt.Errorf("part of inode %d has generation %d, the request %d: %w", d.ino, p.Gen, req.Gen, sealfs.ErrStale)
	}
	return p.Gen == req.Gen && end <= p.Bound, nil
}

// askHome returns the attributes of the request's file as its home knows them.
func (st *store) askHome(ctx context.Context, req *op.Request) (op.Attr, error) {
	q := op.Request{Type: op.Getattr, Session: internalSession, Ino: req.Ino, Shard: req.Ino.Home(st.srv.cfg.Shards), Volume: req.Volume}
	var rep op.Reply
	err := st.srv.ask(ctx, &q, &rep)
	if err == nil && rep.Code != 0 {
		err = fmt.Errorf("home of inode %d: %w", req.Ino, rep.Code)
	}
	return rep.Attr, err
}

// holdsFrom reports whether a part has data at or beyond off.
func (st *store) holdsFrom(d place, off uint64) (data bool, err error) {
	err = st.View(func(r pmem.Reader) error {
		_, _, err := st.extents(r, d, off, sealfs.FileSizeMax, func(*meta.Extent) bool {
			data = true
			return false
		})
		return err
	})
	return data, err
}

// awaitPurge returns when something of ino was purged. It waits at most as long as ctx
// lives, and then says ErrUnavailable, unless ctx was ended.
func (st *store) awaitPurge(ctx context.Context, ino sealfs.Ino, purged chan struct{}) error {
	mine := st.turns().Mine()
	defer mine.Take()
	select {
	case <-purged:
	case <-ctx.Done():
		if errors.Is(ctx.Err(), context.Canceled) {
			return fmt.Errorf("wait for a purge of inode %d: %w: %w", ino, context.Cause(ctx), sealfs.ErrInterrupted)
		}
		return fmt.Errorf("chunks that were cut off of inode %d are not purged yet: %w", ino, sealfs.ErrUnavailable)
	}
	if st.srv.closed.Load() {
		return fmt.Errorf("server: %w", sealfs.ErrClosed)
	}
	return nil
}

// partEnd returns where the extent ends that holds the block of a part in which end
// lies, 0 if that is a hole: a chunk knows no file size up to which to merge.
func (st *store) partEnd(d place, end uint64) (at uint64, err error) {
	if end%sealfs.BlockSize == 0 {
		return 0, nil
	}
	from := end &^ (sealfs.BlockSize - 1)
	err = st.View(func(r pmem.Reader) error {
		_, _, err := st.extents(r, d, from, sealfs.BlockSize, func(e *meta.Extent) bool {
			at = e.Off + uint64(e.Len)
			return false
		})
		return err
	})
	return at, err
}

// purge answers Purge. When nothing is left, that survives a power cut.
func (st *store) purge(req *op.Request, rep *op.Reply) error {
	if err := st.purgeStep(req, rep); err != nil || rep.Code != 0 || !rep.Eof {
		return err
	}
	// A Purge that changes nothing may repeat one that did.
	if n := st.chunks.purges.Load(); st.chunks.durable.Load() < n {
		if err := st.Sync(); err != nil {
			return err
		}
		for old := st.chunks.durable.Load(); old < n && !st.chunks.durable.CompareAndSwap(old, n); {
			old = st.chunks.durable.Load()
		}
	}
	return nil
}

func (st *store) purgeStep(req *op.Request, rep *op.Reply) error {
	defer st.lockStripe(req.Ino).Unlock()
	// Most shards that are asked hold nothing: that takes no record.
	p, err := st.part(place{req.Ino, req.Shard, true})
	if err != nil && !errors.Is(err, sealfs.ErrNotExist) {
		return err
	}
	if rep.Eof = err != nil || p.Gen >= req.Gen; !rep.Eof {
		if err := st.change(req, rep, nil); err != nil || rep.Code != 0 {
			return err
		}
		st.chunks.purges.Add(1)
	}
	st.chunks.cuts.wake(req.Ino)
	return nil
}

// clearChunks gets rid of what chunks may hold beyond the end of a file that is to
// grow. The inode's stripe must be held; it is given up meanwhile.
func (st *store) clearChunks(ctx context.Context, in *meta.Inode) error {
	ino := in.Ino
	if in.Cut == 0 {
		// Nobody cut anything off, but writers may have left what they never told of.
		req := op.Request{Type: op.Reclaim, Ino: ino, Shard: ino.Home(st.srv.cfg.Shards), Valid: op.SetSize}
		if err := st.settledChange(nil, &req, new(op.Reply)); err != nil {
			return err
		}
	}
	cleared := st.chunks.cuts.enter(ino)
	if cleared == nil {
		return fmt.Errorf("server: %w", sealfs.ErrClosed)
	}
	defer st.chunks.cuts.leave(ino, cleared)
	st.reclaim.add(ino)
	ctx, cancel := context.WithTimeout(ctx, purgeWait)
	defer cancel()
	mu := st.stripe(ino)
	mu.Unlock()
	defer st.turns().Lock(mu)
	for {
		var now meta.Inode
		if err := st.inode(ino, &now); err != nil || now.Cut == 0 {
			return err
		}
		if err := st.awaitPurge(ctx, ino, cleared); err != nil {
			return err
		}
	}
}
