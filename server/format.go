package server

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"sealfs"
	"sealfs/disk"
	"sealfs/lsfs"
	"sealfs/lsfs/layout"
	"sealfs/pmem"
)

// FormatOptions says what store to make.
type FormatOptions struct {
	Device       string // image file or block device
	Region       string // region file; made
	Store        sealfs.UUID
	Cluster      sealfs.UUID
	Label        string
	SegmentBytes uint32
	Size         int64 // of a sparse image that is made when Device does not exist
	Force        bool  // also over what stands there
	// RegionMode is how the store is to be used. With pmem.ModeDax a region file
	// is refused that cannot be mapped as persistent memory; with pmem.ModeFile it
	// has page sums there, too, and will never be used as such.
	RegionMode string
}

// Format makes an empty store. It refuses a device that holds something it
// knows or that is mounted, and a region file that exists, unless Force is set.
func Format(o FormatOptions) (*layout.Superblock, error) {
	if o.Region == "" {
		return nil, fmt.Errorf("no region file is named for %s: %w", o.Device, sealfs.ErrInvalid)
	}
	if o.RegionMode == pmem.ModeDax {
		if err := pmem.CheckDax(o.Region); err != nil {
			return nil, err
		}
	}
	_, err := os.Stat(o.Device)
	made := false
	switch {
	case errors.Is(err, os.ErrNotExist) && o.Size > 0:
		if err := disk.CreateImage(o.Device, o.Size); err != nil {
			return nil, err
		}
		made = true
	case errors.Is(err, os.ErrNotExist):
		return nil, fmt.Errorf("%s does not exist; give a size to make an image file: %w", o.Device, sealfs.ErrNotExist)
	case err != nil:
		return nil, err
	}
	sb, err := format(o)
	if err != nil && made {
		err = errors.Join(err, os.Remove(o.Device))
	}
	return sb, err
}

func format(o FormatOptions) (*layout.Superblock, error) {
	if !o.Force {
		if err := vacant(o.Device, o.Region); err != nil {
			return nil, err
		}
	}
	dev, err := disk.Open(o.Device, disk.OpenOptions{Direct: true, Exclusive: true})
	if err != nil {
		return nil, err
	}
	defer dev.Close()
	if err := os.Remove(o.Region); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	region, err := pmem.OpenFile(o.Region, true)
	if err != nil {
		return nil, err
	}
	defer region.Close()
	// A ring on persistent memory that an earlier region had is nobody's now.
	if rings, ok := region.(pmem.Rings); ok {
		if err := rings.RemoveRing(); err != nil {
			return nil, err
		}
	}
	sb, err := lsfs.Format(dev, region, lsfs.Geometry{
		Store: o.Store, Cluster: o.Cluster, Label: o.Label, SegmentBytes: o.SegmentBytes,
		NoSums: o.RegionMode != pmem.ModeFile && pmem.CheckDax(o.Region) == nil,
	})
	if err != nil {
		return nil, errors.Join(err, os.Remove(o.Region))
	}
	return sb, syncDir(filepath.Dir(o.Region))
}

// vacant refuses what is in use or holds something.
func vacant(device, region string) error {
	at, err := disk.Mounted(device)
	if err != nil {
		return err
	}
	if at != "" {
		return fmt.Errorf("%s is mounted on %s; unmount it first: %w", device, at, sealfs.ErrBusy)
	}
	sig, err := disk.Probe(device)
	if err != nil {
		return err
	}
	if sig.Kind != "" {
		what := sig.Kind
		if sig.Detail != "" {
			what += " (" + sig.Detail + ")"
		}
		return fmt.Errorf("%s holds %s; use -f to overwrite it: %w", device, what, sealfs.ErrExist)
	}
	if _, err := os.Stat(region); err == nil {
		return fmt.Errorf("the region file %s exists; use -f to overwrite it: %w", region, sealfs.ErrExist)
	}
	return nil
}

func syncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
