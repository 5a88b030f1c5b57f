// Command mkfs.sealfs makes an empty store on a device or image file, with its
// metadata region in a file elsewhere. `sealfs up` formats a data directory by
// itself; this command is for stores on devices of one's own choosing.
package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/pflag"

	"sealfs"
	"sealfs/disk"
	"sealfs/lsfs/layout"
	"sealfs/node"
	"sealfs/pmem"
	pmemlayout "sealfs/pmem/layout"
	"sealfs/server"
)

// Exit codes, as of sealfs.
const (
	exitFailure = 1
	exitUsage   = 2
)

func main() { os.Exit(run(os.Args[1:], os.Stdout, os.Stderr)) }

const help = `Make an empty SealFS store.

Usage: mkfs.sealfs [flags] DEVICE

DEVICE is a block device or an image file; with --size an image that does not
exist is made, sparse. The metadata region is a file, best on the fastest medium
there is. A device that holds something already, or is mounted, is refused.

Flags:
%s
Examples:
  mkfs.sealfs --region /fast/sdb.region /dev/sdb
  mkfs.sealfs -s 100G -L archive /srv/sealfs.img    # the region is /srv/sealfs.img.region
  mkfs.sealfs -n -s 4G /srv/sealfs.img              # only show what would be made
`

type options struct {
	region, mode, label, uuid, cluster string
	size, segment                      node.Size
	force, dry, quiet                  bool
}

func run(args []string, out, stderr io.Writer) int {
	var o options
	f := pflag.NewFlagSet("mkfs.sealfs", pflag.ContinueOnError)
	f.SetOutput(io.Discard)
	f.SortFlags = false
	f.StringVar(&o.region, "region", "", "region `file` (default: DEVICE.region; needed for a block device)")
	f.StringVar(&o.mode, "region-mode", pmem.ModeAuto, "`mode` in which the region is to be used: dax refuses a file that is not on persistent memory; auto and file do not")
	f.StringVarP(&o.label, "label", "L", "", "`label` of the store")
	f.StringVarP(&o.uuid, "uuid", "U", "", "identity of the store, a `UUID` (default: a new one)")
	f.StringVarP(&o.cluster, "cluster", "C", "", "identity of the cluster that alone may use the store, a `UUID` (default: the first that does)")
	f.VarP(&o.size, "size", "s", "`size` of the image to make")
	f.Var(&o.segment, "segment", "segment `size`, a power of two (default: 32M, less on small devices)")
	f.BoolVarP(&o.force, "force", "f", false, "overwrite what DEVICE and region hold")
	f.BoolVarP(&o.dry, "dry-run", "n", false, "show what would be made, and make nothing")
	f.BoolVarP(&o.quiet, "quiet", "q", false, "print nothing but errors")
	version := f.BoolP("version", "V", false, "print the format versions")
	err := f.Parse(args)
	switch {
	case errors.Is(err, pflag.ErrHelp):
		fmt.Fprintf(out, help, f.FlagUsages())
		return 0
	case err == nil && *version:
		fmt.Fprintf(out, "mkfs.sealfs: device format %d, region format %d\n", layout.Version, pmemlayout.Version)
		return 0
	case err == nil && f.NArg() != 1:
		err = errors.New("one DEVICE is needed")
	}
	if err != nil {
		fmt.Fprintf(stderr, "mkfs.sealfs: %v; see `mkfs.sealfs --help`\n", err)
		return exitUsage
	}
	if err := format(f.Arg(0), o, out); err != nil {
		for line := range strings.Lines(err.Error()) {
			fmt.Fprintf(stderr, "mkfs.sealfs: %s\n", strings.TrimRight(line, "\n"))
		}
		return exitFailure
	}
	return 0
}

// format makes the store, or says what it would be.
func format(device string, o options, out io.Writer) error {
	fo := server.FormatOptions{Device: device, Region: o.region, RegionMode: o.mode, Label: o.label, SegmentBytes: uint32(o.segment), Size: int64(o.size), Force: o.force}
	if node.Size(fo.SegmentBytes) != o.segment {
		return fmt.Errorf("--segment %s: the largest is %s", o.segment, node.Size(layout.SegmentBytesMax))
	}
	if o.mode != pmem.ModeAuto && o.mode != pmem.ModeFile && o.mode != pmem.ModeDax {
		return fmt.Errorf("--region-mode %s: it is none of %s, %s and %s", o.mode, pmem.ModeAuto, pmem.ModeFile, pmem.ModeDax)
	}
	if o.uuid != "" {
		var err error
		if fo.Store, err = sealfs.ParseUUID(o.uuid); err != nil {
			return fmt.Errorf("--uuid: %w", err)
		}
	}
	if o.cluster != "" {
		var err error
		if fo.Cluster, err = sealfs.ParseUUID(o.cluster); err != nil {
			return fmt.Errorf("--cluster: %w", err)
		}
	}
	st, err := os.Stat(device)
	switch {
	case err == nil && o.size != 0:
		return fmt.Errorf("--size %s: %s exists, and keeps its size; leave --size away", o.size, device)
	case errors.Is(err, os.ErrNotExist) && o.size == 0:
		return fmt.Errorf("%s does not exist: give --size to make an image file", device)
	case errors.Is(err, os.ErrNotExist) && strings.HasPrefix(filepath.Clean(device), "/dev/"):
		return fmt.Errorf("%s does not exist, and an image file in /dev is hardly meant", device)
	case err != nil && !errors.Is(err, os.ErrNotExist):
		return err
	}
	if fo.Region == "" {
		if err == nil && st.Mode()&os.ModeDevice != 0 {
			return fmt.Errorf("--region FILE is needed for a block device: name a file on another device")
		}
		fo.Region = device + ".region"
	}
	var sb *layout.Superblock
	if o.dry {
		sb, err = plan(fo, err == nil)
	} else {
		sb, err = server.Format(fo)
	}
	if err != nil || o.quiet {
		return err
	}
	return describe(out, device, fo.Region, sb)
}

// plan formats a sparse image of the device's size elsewhere, which is thrown
// away: so the numbers shown are those that would be.
func plan(fo server.FormatOptions, exists bool) (*layout.Superblock, error) {
	if exists {
		dev, err := disk.Open(fo.Device, disk.OpenOptions{ReadOnly: true})
		if err != nil {
			return nil, err
		}
		fo.Size = dev.Size() &^ (sealfs.BlockSize - 1)
		sig, err := disk.ProbeDevice(dev)
		if err := errors.Join(err, dev.Close()); err != nil {
			return nil, err
		}
		if sig.Kind != "" && !fo.Force {
			return nil, fmt.Errorf("%s holds %s; use -f to overwrite it", fo.Device, sig)
		}
	}
	if fo.RegionMode == pmem.ModeDax {
		if err := pmem.CheckDax(fo.Region); err != nil {
			return nil, err
		}
		fo.RegionMode = pmem.ModeAuto
	}
	dir, err := os.MkdirTemp("", "mkfs.sealfs-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	fo.Device, fo.Region, fo.Force = filepath.Join(dir, "device"), filepath.Join(dir, "region"), false
	return server.Format(fo)
}

// describe prints what was made, in the manner of mkfs.xfs.
func describe(out io.Writer, device, region string, sb *layout.Superblock) error {
	st, err := os.Stat(device)
	sparse := "image, sparse"
	if err == nil && st.Mode()&os.ModeDevice != 0 {
		sparse = "block device"
	}
	_, err = fmt.Fprintf(out, `store    =%-30s uuid=%s
         =%-30s format=%d, %s
data     =                              bsize=%d, size=%s
log      =internal                      segments=%d, segsize=%s
region   =%-30s bsize=%d, format=%d, sparse
label    =%q
`, device, sb.Store, "", layout.Version, sparse, layout.BlockSize, node.Size(sb.DeviceBytes),
		sb.Segments, node.Size(sb.SegmentBytes), region, sealfs.BlockSize, pmemlayout.Version, sb.Label)
	return err
}
