// Package mend makes changes to a store that package fsck has planned. It knows
// nothing of what is right: it recovers the store as its server would, makes the
// changes as transactions of the store's own log, so that a crash at any point
// leaves some of them whole and none in part, and closes it.
//
// The exceptions are entries of the segment table that keep the store from being
// opened: they are set before the recovery looks at them, and become durable
// with its checkpoint.
package mend

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"

	"sealfs"
	"sealfs/disk"
	"sealfs/internal/enc"
	"sealfs/lsfs"
	"sealfs/lsfs/layout"
	"sealfs/meta"
	"sealfs/pmem"
	pmlayout "sealfs/pmem/layout"
)

// Job is what is to be done to one store. It may be carried out once.
type Job struct {
	// Dev and Region are the store's; they are closed in any case. Ring is what a
	// process left in memory, or else Staging is where it may have left it in a file, and
	// where this one has its own.
	Dev     disk.Device
	Region  pmem.Backing
	Ring    *pmem.Staging
	Staging string
	CutLog  bool // the log goes on where it breaks off, whatever was behind

	Entries map[uint32][]byte // of the segment table, by slot, as they shall be
	NextSeq uint32            // the next sequence number is at least this
	Least   map[uint32]uint32 // live bytes, by slot, that the recovery must not believe to be fewer

	Bits   map[uint64]bool // pages that are to be taken or free
	Counts *Counts         // of the tree, before Batches
	Tree   *Tree           // to be built anew; then there are no Batches

	Batches []Batch
	Moves   []Move
	Live    map[uint32]uint32 // live bytes, by sequence number, with the moves that are counted where they were
}

// Counts are what the root page says of the tree.
type Counts struct{ Pages, Keys uint64 }

// Tree is a tree to be built from records.
type Tree struct {
	Rows func(add func(key, val []byte) error) error // in order of the keys; it is called twice
	Free []uint64                                    // pages that may be used for it; the region grows if they are too few
	Old  []uint64                                    // pages that are to be freed afterwards
}

// Batch is a change of records that is one transaction, if it fits a record of the log.
type Batch struct{ Rows []Row }

// Row is a record as it is and as it shall be; nil: there is none.
type Row struct{ Key, Old, New []byte }

// Move is an extent that is to be written anew, because where it lies it cannot stay.
type Move struct {
	Key  []byte     // of its record, or of its inode's
	Ino  sealfs.Ino // whose it is
	Off  uint64     // in the file
	From sealfs.LSN // where it lies
	// Blind: also if its bytes do not verify or cannot be read, so that reading it
	// is an error at its new place. Otherwise such an extent is left where it is.
	Blind bool
	// Counted: the segment at From counts it as live, and is not to do so afterwards.
	Counted bool
}

// Result says what became of the moves.
type Result struct{ Moved, Left int }

// Run carries out a job, and closes device and region. It blocks until all of it is durable; after an error some of
// it may have been done. A cancelled context ends it between two changes.
func Run(ctx context.Context, j *Job) (Result, error) {
	var res Result
	var pages []uint64
	if j.Tree != nil {
		var err error
		if pages, err = j.room(); err != nil {
			return res, errors.Join(err, j.Region.Close(), j.Dev.Close())
		}
	}
	s, err := lsfs.Open(j.Dev, j.Region, j.Ring, nobody{}, lsfs.Options{StagingPath: j.Staging, CutLog: j.CutLog, Mend: j.prepare})
	if err != nil {
		return res, err
	}
	m := &mender{ctx, s, j}
	err = m.pages()
	switch {
	case err != nil:
	case j.Tree != nil:
		err = m.tree(pages)
	default:
		err = m.batches()
	}
	if err == nil {
		res, err = m.moves()
	}
	if err == nil {
		err = m.live()
	}
	if err == nil {
		err = s.Sync()
	}
	return res, errors.Join(err, s.Close())
}

// nobody owns nothing, so that nothing is cleaned: whose data is whose is being repaired.
type nobody struct{}

var errMending = fmt.Errorf("the store is being repaired: %w", sealfs.ErrCorrupt)

func (nobody) Live(pmem.Reader, sealfs.Ino, uint64, sealfs.LSN, uint32, func(lsfs.Part)) error {
	return errMending
}

func (nobody) Move(*lsfs.Tx, sealfs.Ino, lsfs.Part, sealfs.LSN) (bool, error) {
	return false, errMending
}

const entryBytes = 32

// prepare makes the recovered region one that can be opened.
func (j *Job) prepare(tx *pmem.Tx) error {
	for slot, b := range j.Entries {
		if err := tx.PutTable(int(slot)*entryBytes, b); err != nil {
			return err
		}
	}
	for slot, n := range j.Least {
		const liveOff = 8
		b, err := tx.Table(int(slot)*entryBytes, entryBytes)
		if err != nil {
			return err
		}
		if binary.LittleEndian.Uint32(b[liveOff:]) < n {
			if err := tx.PutTable(int(slot)*entryBytes+liveOff, binary.LittleEndian.AppendUint32(nil, n)); err != nil {
				return err
			}
		}
	}
	if binary.LittleEndian.Uint32(tx.State()) < j.NextSeq {
		return tx.PutState(0, binary.LittleEndian.AppendUint32(nil, j.NextSeq))
	}
	return nil
}

// mender carries out a job on an open store.
type mender struct {
	ctx context.Context
	s   *lsfs.Store
	j   *Job
}

// change is a function that is a lsfs.Change.
type change func(tx *lsfs.Tx) error

// Apply calls f.
func (f change) Apply(tx *lsfs.Tx) error { return f(tx) }

// update makes a change. Repairs may use what is kept for deletes.
func (m *mender) update(in lsfs.Intent, f change) error {
	if m.ctx.Err() != nil {
		return fmt.Errorf("repair: %w", sealfs.ErrInterrupted)
	}
	in.Class = lsfs.Freeing
	_, err := m.s.Update(&in, f)
	return err
}

// pages sets bits of the bitmaps, and the counts.
func (m *mender) pages() error {
	if len(m.j.Bits) == 0 && m.j.Counts == nil {
		return nil
	}
	table := m.tablePages()
	todo := m.j.Bits
	for len(todo) > 0 {
		const most = 512
		some := map[uint64]bool{}
		for n, taken := range todo {
			if len(some) == most {
				break
			}
			some[n] = taken
		}
		err := m.update(lsfs.Intent{}, func(tx *lsfs.Tx) error {
			for n, taken := range some {
				if err := setBit(tx, table, n, taken); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			return err
		}
		for n := range some {
			delete(todo, n)
		}
	}
	if m.j.Counts == nil {
		return nil
	}
	return m.update(lsfs.Intent{}, func(tx *lsfs.Tx) error {
		b := binary.LittleEndian.AppendUint64(nil, m.j.Counts.Pages)
		b = binary.LittleEndian.AppendUint64(b, m.j.Counts.Keys)
		return tx.Patch(pmlayout.RootPage, pmlayout.RootPagesOff, b)
	})
}

// tablePages returns how many pages the segment table takes.
func (m *mender) tablePages() uint64 {
	h := pmlayout.Header{TableBytes: int64(m.s.Superblock().Segments) * entryBytes}
	return h.TablePages()
}

// setBit says in the bitmap that a page is taken or free.
func setBit(tx *lsfs.Tx, table, n uint64, taken bool) error {
	g, i := n/pmlayout.GroupPages, n%pmlayout.GroupPages
	at := pmem.PageNo(pmlayout.BitmapPage(g, table))
	p, err := tx.Page(at)
	if err != nil {
		return err
	}
	b := p[i/8] &^ (1 << (i % 8))
	if taken {
		b |= 1 << (i % 8)
	}
	return tx.Patch(at, int(i/8), []byte{b})
}

// batches changes records.
func (m *mender) batches() error {
	for _, b := range m.j.Batches {
		if err := m.rows(b.Rows); err != nil {
			return err
		}
	}
	return nil
}

// rows changes records in one transaction, or in several if they do not fit one.
func (m *mender) rows(rows []Row) error {
	err := m.update(lsfs.Intent{}, func(tx *lsfs.Tx) error {
		for i := range rows {
			if err := rows[i].apply(tx); err != nil {
				return err
			}
		}
		return nil
	})
	if n := len(rows) / 2; n > 0 && errors.Is(err, sealfs.ErrNoSpace) {
		if err := m.rows(rows[:n]); err != nil {
			return err
		}
		return m.rows(rows[n:])
	}
	return err
}

// apply makes the record what it shall be, if it is what it was.
func (r *Row) apply(tx *lsfs.Tx) error {
	now, err := pmem.Get(tx, r.Key)
	if err != nil && err != sealfs.ErrNotExist {
		return err
	}
	if (err == nil) != (r.Old != nil) || !bytes.Equal(now, r.Old) {
		return &sealfs.Corruption{Off: -1, What: fmt.Sprintf("the record under key %x is not the one that was judged", r.Key)}
	}
	if r.New != nil {
		return tx.Set(r.Key, r.New)
	}
	return tx.Delete(r.Key)
}

// live corrects what segments count as live.
func (m *mender) live() error {
	for seq, n := range m.j.Live {
		err := m.update(lsfs.Intent{}, func(tx *lsfs.Tx) error {
			for slot := range m.s.Superblock().Segments {
				b, err := tx.Table(int(slot)*entryBytes, entryBytes)
				if err != nil {
					return err
				}
				if binary.LittleEndian.Uint32(b) != seq || b[4] == 0 {
					continue
				}
				if is := binary.LittleEndian.Uint32(b[8:]); is > n {
					return tx.Release(sealfs.MakeLSN(seq, 0), is-n)
				} else if is < n {
					return tx.Retain(sealfs.MakeLSN(seq, 0), n-is)
				}
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// moves writes extents anew.
func (m *mender) moves() (res Result, err error) {
	for i := range m.j.Moves {
		moved, err := m.move(&m.j.Moves[i])
		if err != nil {
			return res, err
		}
		if moved {
			res.Moved++
		} else {
			res.Left++
		}
	}
	return res, nil
}

// extent reads the extent that a move is about.
func (v *Move) extent(r pmem.Reader, in *meta.Inode) (e meta.Extent, ok bool) {
	b, err := pmem.Get(r, v.Key)
	if err != nil {
		return e, false
	}
	k, err := meta.DecodeKey(v.Key)
	switch {
	case err != nil:
		return e, false
	case k.Kind == meta.KindInode:
		err = meta.DecodeInode(b, v.Ino, in)
		e = in.First
	default:
		err = meta.DecodeExtent(b, k.Pos, &e)
	}
	return e, err == nil && e.Len != 0 && e.Addr == v.From && e.Off == v.Off
}

// move writes one extent anew and reports whether it did.
func (m *mender) move(v *Move) (bool, error) {
	var in meta.Inode
	r := m.s.BeginRead()
	e, ok := v.extent(r, &in)
	f := &lsfs.Fetch{At: v.From, Dst: make([]byte, e.Stored())}
	e.Sums = bytes.Clone(e.Sums)
	var err error
	if ok && len(f.Dst) <= m.s.PayloadMax() {
		err = m.s.Load(f)
	} else {
		ok = false
	}
	m.s.EndRead()
	if !ok {
		return false, nil
	}
	if err == nil {
		err = m.s.Finish(f)
	}
	if err != nil {
		clear(f.Dst)
	}
	if !v.Blind && (err != nil || !verifies(v.Ino, &e, f.Dst)) {
		return false, nil
	}
	intent := lsfs.Intent{Payload: f.Dst, PayloadCRC: enc.CRC(0, f.Dst), Ino: v.Ino, Offset: v.Off}
	err = m.update(intent, func(tx *lsfs.Tx) error {
		var in meta.Inode
		e, ok := v.extent(tx, &in)
		if !ok {
			return nil
		}
		e.Addr, in.First.Addr = tx.Payload(), tx.Payload()
		b := e.Append(nil)
		if in.Ino != 0 {
			b = in.Append(nil)
		}
		if err := tx.Set(v.Key, b); err != nil {
			return err
		}
		if err := tx.Retain(e.Addr, e.Stored()); err != nil || !v.Counted {
			return err
		}
		return tx.Release(v.From, e.Stored())
	})
	if live, ok := m.j.Live[v.From.Seq()]; ok && err == nil && v.Counted {
		m.j.Live[v.From.Seq()] = live - min(live, e.Stored())
	}
	return err == nil, err
}

// verifies reports whether all blocks of an extent have their sums.
func verifies(ino sealfs.Ino, e *meta.Extent, data []byte) bool {
	for i := range e.Blocks() {
		b := data[i*layout.BlockSize:][:e.Covered(i)]
		if meta.BlockSum(ino, e.Off/layout.BlockSize+uint64(i), e.Stamp, b) != e.Sum(i) {
			return false
		}
	}
	return true
}
