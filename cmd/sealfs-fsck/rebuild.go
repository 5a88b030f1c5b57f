package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"path/filepath"

	"sealfs"
	"sealfs/disk"
	"sealfs/fsck"
)

// rebuildRegions makes the regions of all stores again, each from its device, and
// returns the exit status: what was made is to be checked afterwards.
func (c *command) rebuildRegions(ctx context.Context, stdout, stderr io.Writer) int {
	exit := fsck.ExitClean
	for _, place := range c.stores {
		if ctx.Err() != nil {
			return exit | fsck.ExitCancelled
		}
		if place.Region == "" {
			place.Region = filepath.Join(filepath.Dir(place.Device), fsck.RegionName)
		}
		what, err := rebuildRegion(place)
		if err != nil {
			fmt.Fprintf(stderr, "%s: the region of %s is not made again: %v\n", c.name, place.Device, err)
			exit |= fsck.ExitOperational
			continue
		}
		fmt.Fprintf(stdout, "%s: the region %s is made again: %s\n", place.Device, place.Region, what)
		exit |= fsck.ExitRepaired
	}
	return exit
}

// errNoFar is why no region can be made again.
var errNoFar = fmt.Errorf("this version writes nothing to the device that a region could be made from; copy the region back from where it was saved: %w", sealfs.ErrNoSys)

// rebuildRegion makes the region of one store again, and says in words from what.
func rebuildRegion(place fsck.Place) (what string, err error) {
	dev, err := disk.Open(place.Device, disk.OpenOptions{Exclusive: true})
	if err != nil {
		return "", err
	}
	return "", errors.Join(errNoFar, dev.Close())
}
