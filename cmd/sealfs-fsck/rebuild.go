package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"sealfs"
	"sealfs/disk"
	"sealfs/fsck"
	"sealfs/lsfs"
)

// rebuildRegions makes the regions of all stores again, each from its device, and
// returns the exit status. What could not be made is as it was.
func (c *command) rebuildRegions(ctx context.Context, stdout, stderr io.Writer) int {
	if c.json { // the reports of the check alone
		stdout = stderr
	}
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
		fmt.Fprintf(stdout, "%s: the region %s is made again, %s\n", place.Device, place.Region, what)
		exit |= fsck.ExitRepaired
	}
	return exit
}

// rebuildRegion makes the region of one store again, and says in words from what.
// The old one stays under another name; until the new one is complete, nothing has happened to it.
func rebuildRegion(place fsck.Place) (what string, err error) {
	dev, err := disk.Open(place.Device, disk.OpenOptions{Exclusive: true})
	if errors.Is(err, sealfs.ErrBusy) {
		return "", fmt.Errorf("%w: stop the store first", err)
	}
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, dev.Close()) }()
	aside := fmt.Sprintf("%s.old-%s", place.Region, time.Now().UTC().Format("20060102-150405.000"))
	switch err := os.Link(place.Region, aside); {
	case errors.Is(err, fs.ErrNotExist):
		aside = ""
	case err != nil:
		return "", fmt.Errorf("the old region cannot be kept (%w); move it away first: %w", err, sealfs.ErrIO)
	}
	out, err := lsfs.RebuildRegionFile(dev, place.Region, lsfs.Options{})
	if err != nil && aside != "" {
		err = errors.Join(err, os.Remove(aside))
	}
	if errors.Is(err, sealfs.ErrNotExist) {
		return "", fmt.Errorf("%w; copy the region back from where it was saved", err)
	}
	if err != nil {
		return "", err
	}
	what = fmt.Sprintf("from %d pages of far checkpoint %d and %d records of the log, from %v to %v", out.Copies, out.Generation, out.Records, out.Start, out.End)
	if aside != "" {
		what += "; the old one is " + aside
	}
	return what, nil
}
