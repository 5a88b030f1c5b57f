package lsfs

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"sealfs"
	"sealfs/disk"
	"sealfs/lsfs/layout"
	"sealfs/pmem"
)

// Rebuilt says what a region was made from.
type Rebuilt struct {
	Generation uint64     `json:"generation"` // of the far checkpoint
	Start      sealfs.LSN `json:"start"`      // where the replay began
	End        sealfs.LSN `json:"end"`        // where the log ends on the device
	Copies     int        `json:"copies"`     // pages that were copied back
	Records    int        `json:"records"`    // that were replayed
}

// rebuildBatch is how many pages of a rebuilt region may wait to be written.
const rebuildBatch = 64 << 20 / pmem.PageSize

// RebuildRegion makes the region of the store on dev anew, from the far
// checkpoint and the log behind it. What region held is lost, also if that fails;
// region is closed in any case. dev is only read, and flushed. Open, or fsck, goes
// on from the result as from a checkpoint; staging that a process left behind is
// still needed.
//
// Errors: ErrNotExist if there is no far checkpoint, ErrCorrupt or ErrIO with the
// place if something of it or of the log is damaged, ErrVersion if it is of
// another format. No half of a region is ever taken for one. It blocks until the
// region is durable, for about as long as it takes to read the far checkpoint and
// to write the region.
func RebuildRegion(dev disk.Device, region pmem.Backing, o Options) (*Rebuilt, error) {
	b, err := newRebuild(dev, o)
	if err != nil {
		return nil, errors.Join(err, region.Close())
	}
	err = pmem.Format(region, pmem.Geometry{
		Store: b.s.store, TableBytes: b.root.TableBytes, NoSums: b.root.RegionIncompat&pmem.FeatureNoSums != 0,
	})
	if err != nil {
		return nil, errors.Join(err, region.Close())
	}
	reg, _, err := pmem.Open(region, pmem.Options{BudgetBytes: b.s.o.BudgetBytes, MaxBytes: max(b.s.o.RegionMaxBytes, int64(b.root.Pages)*pmem.PageSize)})
	if err != nil {
		return nil, errors.Join(err, region.Close())
	}
	b.s.region, b.s.regionName = reg, region.Name()
	if err := errors.Join(b.s.guarded(b.run), reg.Close()); err != nil {
		return nil, err
	}
	return &b.out, nil
}

// RebuildRegionFile is RebuildRegion for a region in a file. The new one takes the
// place of the one at path, if there is one, when it is complete; before that
// nothing has happened to it.
func RebuildRegionFile(dev disk.Device, path string, o Options) (*Rebuilt, error) {
	next := path + ".rebuild"
	if err := os.Remove(next); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("rebuild of region %s: %w: %w", path, err, sealfs.ErrIO)
	}
	region, err := pmem.OpenFile(next, true)
	if err != nil {
		return nil, err
	}
	out, err := RebuildRegion(dev, region, o)
	if err != nil {
		return nil, errors.Join(err, os.Remove(next))
	}
	if err := os.Rename(next, path); err != nil {
		return nil, fmt.Errorf("rebuild of region %s: %w: %w", path, err, sealfs.ErrIO)
	}
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return nil, fmt.Errorf("rebuild of region %s: %w: %w", path, err, sealfs.ErrIO)
	}
	if err := errors.Join(dir.Sync(), dir.Close()); err != nil {
		return nil, fmt.Errorf("rebuild of region %s: %w: %w", path, err, sealfs.ErrIO)
	}
	return out, nil
}

// rebuild is a region being made.
type rebuild struct {
	s     *Store // as much of one as a replay needs
	sb    *layout.Superblock
	index *headers
	from  farReader
	root  layout.FarRoot
	maps  []layout.FarRef
	dirty int // pages that wait to be written
	out   Rebuilt
}

// newRebuild finds the far checkpoint of the store on dev.
func newRebuild(dev disk.Device, o Options) (*rebuild, error) {
	if err := o.Validate(); err != nil {
		return nil, err
	}
	sb, err := ReadSuper(dev)
	if err != nil {
		return nil, err
	}
	if sb.FarRoot == 0 {
		return nil, fmt.Errorf("%s holds no far checkpoint, so that a region cannot be made from it: %w", dev.Name(), sealfs.ErrNotExist)
	}
	o = o.withDefaults(sb.Segments)
	s := &Store{dev: disk.Watch(dev), o: o, log: o.Logger, store: sb.Store, seg: int64(sb.SegmentBytes), segs: make([]segment, sb.Segments)}
	s.super.block = *sb
	b := &rebuild{s: s, sb: sb, index: s.scanHeaders(sb.Incarnation)}
	b.from = farReader{s: s, slotOf: func(seq uint32) (uint32, bool) {
		if h := b.index.slot[seq]; h != nil && h.Kind == layout.Far {
			return h.Slot, true
		}
		return 0, false
	}}
	if b.root, b.maps, err = b.from.root(sb); err != nil {
		return nil, err
	}
	if r := &b.root; r.RegionVersion != pmem.Version || r.RegionIncompat&^pmem.FeaturesOfMedium != 0 {
		return nil, fmt.Errorf("%s: its far checkpoint is of a region of format %d with features %#x, but this program makes only %d: %w",
			dev.Name(), r.RegionVersion, r.RegionIncompat, pmem.Version, sealfs.ErrVersion)
	}
	if want := int64(sb.Segments) * entryBytes; b.root.TableBytes != want {
		return nil, b.from.bad(sb.FarSlot, sb.FarRoot, "the far checkpoint has a segment table of %d bytes, not %d", b.root.TableBytes, want)
	}
	b.out = Rebuilt{Generation: b.root.Generation, Start: b.root.Start}
	return b, nil
}

// run fills the region, which is formatted.
func (b *rebuild) run() error {
	// What is read from the device may stand in its cache only; the region must
	// never know more than the device.
	if err := b.s.dev.Flush(); err != nil {
		return fmt.Errorf("flush of %s: %w", b.s.dev.Name(), err)
	}
	if err := b.copyBack(); err != nil {
		return err
	}
	rp, err := b.replay()
	if err != nil {
		return err
	}
	b.out.End, b.out.Records = rp.rec.end, rp.rec.records
	return b.s.writeRegion(pmem.Header{
		Store: b.s.store, Incarnation: b.sb.Incarnation, Start: rp.rec.end, StartSlot: rp.rec.slot, Chain: rp.rec.chain,
	})
}

// copyBack restores the pages of the far checkpoint, in the order in which their
// copies stand on the device.
func (b *rebuild) copyBack() error {
	reg := b.s.region
	fresh := reg.Counts().Pages // those that Format may have written
	if err := reg.Extend(b.root.Pages); err != nil {
		return err
	}
	type place struct {
		no  pmem.PageNo
		ref layout.FarRef
	}
	var places []place
	has := map[pmem.PageNo]bool{} // of those that are not zeros now
	zeros := make([]byte, pmem.PageSize)
	err := b.from.refs(b.maps, b.root.Pages, func(no pmem.PageNo, ref layout.FarRef) error {
		places = append(places, place{no, ref})
		if uint64(no) >= fresh {
			return nil
		}
		p, err := reg.Page(no)
		if err == nil && !(layout.FarRef{}).Is(p) {
			has[no] = true
		}
		return err
	})
	if err != nil {
		return err
	}
	// A new region is not all zeros: what is there without a copy goes.
	for no := pmem.PageNo(0); uint64(no) < fresh; no++ {
		p, err := reg.Page(no)
		if err != nil {
			return err
		}
		if !has[no] && !(layout.FarRef{}).Is(p) {
			if err := b.restore(no, zeros); err != nil {
				return err
			}
		}
	}
	slices.SortFunc(places, func(x, y place) int {
		if x.ref.At < y.ref.At {
			return -1
		}
		return 1
	})
	for _, p := range places {
		page, err := b.from.page(p.ref, "page", uint64(p.no))
		if err != nil {
			return err
		}
		if err := b.restore(p.no, page); err != nil {
			return err
		}
		b.out.Copies++
	}
	return nil
}

func (b *rebuild) restore(no pmem.PageNo, page []byte) error {
	if err := b.s.region.Restore(no, page); err != nil {
		return err
	}
	if b.dirty++; b.dirty >= rebuildBatch {
		return b.write()
	}
	return nil
}

// write brings what there is of the region to its medium, under a header that
// starts before any log. A store refuses it, as older than its tail; or its tail
// is there, too: then nothing of the log has been given back yet, and all of it
// is replayed.
func (b *rebuild) write() error {
	b.dirty = 0
	if err := b.s.writeRegion(pmem.Header{Store: b.s.store}); err != nil {
		return err
	}
	return b.s.trim()
}

// replay applies the log to the copies.
func (b *rebuild) replay() (*replay, error) {
	r, sb := &b.root, b.sb
	rp := &replay{
		s: b.s, index: b.index, next: layout.NoSlot, last: sb.FirstPrev,
		rec: recovered{end: r.Start, slot: r.StartSlot, chain: r.Chain},
	}
	rp.after = func() error {
		if b.s.region.Counts().PrivateBytes() > b.s.o.BudgetBytes {
			return b.write()
		}
		return nil
	}
	if err := rp.run(); err != nil {
		return nil, err
	}
	if known := max(r.Applied, sb.Tail, sb.FirstPrev); rp.rec.end < known {
		return nil, b.from.bad(rp.rec.slot, rp.rec.end, "the log from the far checkpoint at %v breaks off at %v, but it reached %v", r.Start, rp.rec.end, known)
	}
	return rp, nil
}

// writeRegion brings all changed pages of the region to its medium, and then a
// header. Nobody else may use the region.
func (s *Store) writeRegion(h pmem.Header) error {
	ck := s.region.BeginCheckpoint()
	for more := true; more; {
		for more && !ck.Full() {
			more = ck.Copy()
		}
		if err := ck.Write(); err != nil {
			return err
		}
	}
	return ck.Finish(h)
}
