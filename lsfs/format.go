package lsfs

import (
	"fmt"
	"time"

	"sealfs"
	"sealfs/disk"
	"sealfs/lsfs/layout"
	"sealfs/pmem"
)

// Geometry is what a store is made with; the superblock keeps it.
type Geometry struct {
	Store        sealfs.UUID // zero: a new one
	Cluster      sealfs.UUID
	Label        string
	SegmentBytes uint32 // default 32 MiB, less on small devices
	NoSums       bool   // no sums of the region's pages, so that it may be used as persistent memory
}

// Format makes an empty store on a device and a region. What they held is lost.
// Both are durable on return.
func Format(dev disk.Device, region pmem.Backing, g Geometry) (*layout.Superblock, error) {
	if g.Store.IsZero() {
		g.Store = sealfs.NewUUID()
	}
	if len(g.Label) > layout.LabelMax {
		return nil, fmt.Errorf("label %q is longer than %d bytes: %w", g.Label, layout.LabelMax, sealfs.ErrInvalid)
	}
	if g.SegmentBytes == 0 {
		g.SegmentBytes = layout.SegmentBytesDefault
		for g.SegmentBytes > 1<<20 && (dev.Size()-layout.DataStart)/int64(g.SegmentBytes) < 64 {
			g.SegmentBytes /= 2
		}
		for g.SegmentBytes < layout.SegmentBytesMax && (dev.Size()-layout.DataStart)/int64(g.SegmentBytes) > layout.SegmentsMax {
			g.SegmentBytes *= 2
		}
	}
	segments := max(dev.Size()-layout.DataStart, 0) / int64(max(g.SegmentBytes, 1))
	if segments < layout.SegmentsMin {
		return nil, fmt.Errorf("%s: %d bytes are too few: a store with segments of %d needs at least %d: %w", dev.Name(), dev.Size(),
			g.SegmentBytes, layout.DataStart+layout.SegmentsMin*int64(g.SegmentBytes), sealfs.ErrInvalid)
	}
	sb := &layout.Superblock{
		Store: g.Store, Cluster: g.Cluster, Update: 1, SegmentBytes: g.SegmentBytes,
		Segments: uint32(min(segments, layout.SegmentsMax)), FirstSlot: layout.NoSlot,
		DeviceBytes: dev.Size(), Created: time.Now().UnixNano(), Label: g.Label,
	}
	if err := layout.CheckGeometry(sb.SegmentBytes, sb.Segments); err != nil {
		return nil, fmt.Errorf("%s: %w", dev.Name(), err)
	}
	// The region first: a device whose superblock is valid has a region.
	if err := pmem.Format(region, pmem.Geometry{Store: g.Store, TableBytes: int64(sb.Segments) * entryBytes, NoSums: g.NoSums}); err != nil {
		return nil, err
	}
	// The headers of the first segments go, too: under the same store id an
	// earlier life's could be taken for this one's.
	for _, off := range []int64{0, layout.BlockSize, sb.SlotOffset(0), sb.SlotOffset(1)} {
		if _, err := dev.WriteAt(make([]byte, layout.BlockSize), off); err != nil {
			return nil, fmt.Errorf("write at byte %d of %s: %w", off, dev.Name(), err)
		}
	}
	if err := putSuper(dev, sb); err != nil {
		return nil, err
	}
	sb.Update++
	return sb, putSuper(dev, sb)
}
