package fsck

import (
	"context"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"sealfs"
	"sealfs/disk"
	"sealfs/lsfs/layout"
	"sealfs/pmem"
	pmlayout "sealfs/pmem/layout"
)

// What is no store, or not this one, is refused by name and not touched, whatever
// was asked for.
func TestBadInputIsRefused(t *testing.T) {
	w := newWorld(t, 40, lazy)
	w.zoo()
	w.must(w.s.Close())
	device, region := load(t, w.dev), load(t, w.region)
	all := func(d *disk.Sim) []byte { return read(t, d, 0, int(d.Size())) }
	other := newWorld(t, 40, lazy)
	other.must(other.s.Close())
	otherRegion := all(load(t, other.region))
	newer := func(b []byte, slots int64, reseal func(b []byte, slot int64)) []byte {
		for slot := range slots {
			p := b[slot*4096:][:4096]
			p[8] = 77
			reseal(p, slot)
		}
		return b
	}
	feature := func(b []byte, reseal func(b []byte, slot int64)) []byte {
		for slot := range int64(2) {
			p := b[slot*4096:][:4096]
			p[16+7] = 0x80 // bit 63 of the incompatible ones
			reseal(p, slot)
		}
		return b
	}
	super := func(p []byte, _ int64) { resealSuper(p) }
	header := func(p []byte, slot int64) {
		table := crc32.MakeTable(crc32.Castagnoli)
		crc := crc32.Update(crc32.Checksum(binary.LittleEndian.AppendUint64(nil, uint64(slot)), table), table, p[:pageSize-4])
		binary.LittleEndian.PutUint32(p[pageSize-4:], crc)
	}
	for _, x := range []struct {
		name           string
		device, region []byte // nil: the store's own
		code           error  // of the check, or
		id             ID     // the fatal problem
		says           string
	}{
		{name: "empty device", device: []byte{}, id: SuperLost, says: "device.img"},
		{name: "short device", device: all(device)[:5000], id: DeviceShort, says: "4608 bytes"},
		{name: "half a device", device: all(device)[:len(all(device))/2], id: DeviceShort, says: "formatted"},
		{name: "another file system", device: ext4(), id: SuperLost, says: "ext4"},
		{name: "device and region exchanged", device: all(region), region: all(device), id: SuperLost, says: "magic"},
		{name: "newer device", device: newer(all(device), 2, super), code: sealfs.ErrVersion, says: "77"},
		{name: "device half way to a newer version", device: newer(all(device), 1, super), code: sealfs.ErrVersion, says: "77"},
		{name: "device with another feature", device: feature(all(device), super), code: sealfs.ErrVersion, says: "0x8000000000000000"},
		{name: "empty region", region: []byte{}, id: RegionLost, says: "region"},
		{name: "odd region", region: all(region)[:3*4096+77], id: RegionShort, says: "needed"},
		{name: "half a region", region: all(region)[:len(all(region))/2], id: RegionShort, says: "needed"},
		{name: "another store's region", region: otherRegion, id: RegionForeign, says: "it is of store"},
		{name: "newer region", region: newer(all(region), 2, header), code: sealfs.ErrVersion, says: "77"},
		{name: "region with another feature", region: feature(all(region), header), code: sealfs.ErrVersion, says: "63"},
		{name: "a device for a region", region: all(device), id: RegionLost, says: "magic"},
	} {
		t.Run(x.name, func(t *testing.T) {
			b := &world{t: t, dir: t.TempDir()}
			b.dev, b.region, b.staging = filepath.Join(b.dir, "device.img"), filepath.Join(b.dir, RegionName), filepath.Join(b.dir, "ring")
			if x.device == nil {
				x.device = all(device)
			}
			if x.region == nil {
				x.region = all(region)
			}
			b.must(errors.Join(os.WriteFile(b.dev, x.device, 0o600), os.WriteFile(b.region, x.region, 0o600)))
			before := b.sums()
			for _, mode := range []Repair{RepairNone, RepairSafe, RepairAll} {
				var out strings.Builder
				rep, err := Check(t.Context(), Options{Device: b.dev, Staging: b.staging, Repair: mode, Out: &out})
				text := out.String()
				if err != nil {
					text += err.Error()
				}
				if !errors.Is(err, x.code) || x.id != 0 && rep.Counts[x.id] == 0 || rep.Clean() && err == nil || len(rep.Fixed) != 0 {
					t.Errorf("mode %d: %v, %v", mode, err, rep.Found)
				}
				if !strings.Contains(text, x.says) || !strings.Contains(text, b.dir) {
					t.Errorf("it is not refused by name: %s", text)
				}
			}
			if b.sums() != before {
				t.Error("something was changed")
			}
			if files, _ := os.ReadDir(b.dir); len(files) != 2 {
				t.Errorf("%d files", len(files))
			}
		})
	}
}

// ext4 returns the beginning of an ext4 file system.
func ext4() []byte {
	b := make([]byte, 1<<20)
	binary.LittleEndian.PutUint16(b[1024+56:], 0xef53)
	binary.LittleEndian.PutUint32(b[1024+96:], 0x40) // extents
	return b
}

// Media that are no devices, that others use, or whose blocks are too large.
func TestBadMediaAreRefused(t *testing.T) {
	w := newWorld(t, 40, lazy)
	dir := t.TempDir()
	w.must(syscall.Mkfifo(dir+"/fifo", 0o600))
	check := func(what string, code error, o Options) {
		t.Helper()
		for _, mode := range []Repair{RepairNone, RepairAll} {
			o.Repair = mode
			if rep, err := Check(context.Background(), o); !errors.Is(err, code) || len(rep.Fixed) != 0 {
				t.Errorf("%s: %v", what, err)
			}
		}
	}
	check("a live store", sealfs.ErrBusy, Options{Device: w.dev, Staging: w.staging})
	w.must(w.s.Close())
	for _, path := range []string{dir + "/fifo", "/dev/null", "/dev/zero"} {
		check(path, sealfs.ErrInvalid, Options{Device: path})
		check(path+" as the region", sealfs.ErrInvalid, Options{Device: w.dev, Region: path, Staging: w.staging})
	}
	check("a directory", sealfs.ErrIsDir, Options{Device: dir})
	check("no region", sealfs.ErrNotExist, Options{Device: w.dev, Region: dir + "/none"})
	locked, err := pmem.OpenFile(w.region, false)
	w.must(err)
	check("a region in use", sealfs.ErrBusy, Options{Device: w.dev, Staging: w.staging})
	w.must(locked.Close())

	m := w.load()
	check("large sectors", sealfs.ErrInvalid, Options{Dev: sectors{m.dev, 8192}, Reg: m.region})
	if rep := judge(t, Options{Dev: sectors{m.dev, 4096}, Reg: m.region}); !rep.Clean() {
		t.Errorf("sectors of 4096 bytes: %v", rep.Found)
	}

	// A device that only a newer program may write is read, and not repaired.
	h := &hurt{images: w.load(), t: t}
	h.supers(func(sb *layout.Superblock) { sb.ROCompat = 1 << 5 })
	h.region.FlipBit(int64(pmlayout.Slot(h.header().Update+1))*pageSize+60, 0)
	o := h.options()
	o.Repair, o.SaveDir = RepairAll, dir
	before := h.clone()
	if rep := judge(t, o); len(rep.Fixed) != 0 || !h.same(before) {
		t.Errorf("written without knowing how: %v", rep.Fixed)
	}
	w.clean("after all that", Options{})
}

// sectors is a device whose sectors have another size.
type sectors struct {
	*disk.Sim
	bytes int
}

func (s sectors) SectorSize() int { return s.bytes }
