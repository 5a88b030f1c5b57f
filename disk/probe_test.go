package disk

import (
	"encoding/binary"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"sealfs"
)

const probeSize = 2 << 20

var le = binary.LittleEndian

// stamp puts bytes on a device.
type stamp struct {
	off  int64 // from the end if negative
	text string
}

func u16(v uint16) string { return string(le.AppendUint16(nil, v)) }
func u32(v uint32) string { return string(le.AppendUint32(nil, v)) }

const uuid = "\x00\x11\x22\x33\x44\x55\x66\x77\x88\x99\xaa\xbb\xcc\xdd\xee\xff"
const uuidText = "uuid=00112233-4455-6677-8899-aabbccddeeff"

func TestProbe(t *testing.T) {
	extMagic := stamp{1080, "\x53\xef"}
	bootMark := stamp{510, "\x55\xaa"}
	fat := []stamp{bootMark, {11, u16(512)}, {13, "\x04"}, {14, u16(1)}, {16, "\x02"}, {21, "\xf8"}}
	for _, c := range []struct {
		name   string
		stamps []stamp
		kind   string
		detail string // what the detail must contain
	}{
		{"nothing", nil, "", ""},
		{"noise", []stamp{{0, "just some text"}, {1024, "and more of it"}}, "", ""},
		{"sealfs", []stamp{{0, "SEALFSv1"}}, "sealfs", ""},
		{"sealfs before the rest", []stamp{{0, "SEALFSv1"}, extMagic, bootMark, {-512, "EFI PART"}}, "sealfs", ""},
		{"luks", []stamp{{0, "LUKS\xba\xbe\x00\x02"}, {168, "1234-abcd"}}, "luks", "version=2 uuid=1234-abcd"},
		{"lvm2", []stamp{{512, "LABELONE"}, {512 + 24, "LVM2 001"}, {512 + 32, "someuuid"}}, "lvm2", "someuuid"},
		{"lvm2 label alone", []stamp{{512, "LABELONE"}}, "", ""},
		{"md 1.1", []stamp{{0, "\xfc\x4e\x2b\xa9" + u32(1)}, {16, uuid}}, "md", uuidText},
		{"md 1.2", []stamp{{4096, "\xfc\x4e\x2b\xa9" + u32(1)}, {4096 + 32, "host:0"}}, "md", `label="host:0"`},
		{"md 1.0", []stamp{{-8192, "\xfc\x4e\x2b\xa9" + u32(1)}}, "md", ""},
		{"md 0.90", []stamp{{-65536, "\xfc\x4e\x2b\xa9"}}, "md", "0.90"},
		{"md over ext4", []stamp{{-65536, "\xfc\x4e\x2b\xa9"}, extMagic}, "md", ""},
		{"bcache", []stamp{{4096 + 24, "\xc6\x85\x73\xf6\x4e\x1a\x45\xca\x82\x65\xf5\x7f\x48\xba\x6d\x81"}}, "bcache", ""},
		{"bitlocker", []stamp{{3, "-FVE-FS-"}, bootMark}, "bitlocker", ""},
		{"zfs", []stamp{{128<<10 + 5*1024, u32(0x00bab10c) + u32(0)}, {16<<10 + 100,
			"\x00\x00\x00\x04name\x00\x00\x00\x09\x00\x00\x00\x01\x00\x00\x00\x04tank"}}, "zfs", `label="tank"`},
		{"zfs big-endian", []stamp{{128 << 10, "\x00\x00\x00\x00\x00\xba\xb1\x0c"}}, "zfs", ""},
		{"zfs at the end", []stamp{{-128 << 10, u32(0x00bab10c) + u32(0)}}, "zfs", ""},
		{"zfs with a mad name", []stamp{{128 << 10, u32(0x00bab10c) + u32(0)}, {16 << 10,
			"\x00\x00\x00\x04name\x00\x00\x00\x09\x00\x00\x00\x01\xff\xff\xff\xff"}}, "zfs", ""},
		{"xfs", []stamp{{0, "XFSB"}, {32, uuid}, {108, "data"}}, "xfs", `label="data" ` + uuidText},
		{"btrfs", []stamp{{65600, "_BHRfS_M"}, {65536 + 32, uuid}, {65536 + 299, "pool"}}, "btrfs", `label="pool" ` + uuidText},
		{"f2fs", []stamp{{1024, u32(0xf2f52010)}, {1024 + 124, "f\x00l\x00"}}, "f2fs", `label="fl"`},
		{"squashfs", []stamp{{0, "hsqs"}}, "squashfs", ""},
		{"squashfs big-endian", []stamp{{0, "sqsh"}}, "squashfs", ""},
		{"erofs", []stamp{{1024, u32(0xe0f5e1e2)}}, "erofs", ""},
		{"jfs", []stamp{{32768, "JFS1"}}, "jfs", ""},
		{"iso9660", []stamp{{32769, "CD001"}, {32808, "DEBIAN  "}}, "iso9660", `label="DEBIAN"`},
		{"iso9660 with a hybrid partition table", []stamp{{32769, "CD001"}, bootMark, {450, "\x17"}, {458, u32(1)}}, "iso9660", ""},
		{"ext2", []stamp{extMagic, {1024 + 120, "old"}, {1024 + 104, uuid}}, "ext2", `label="old" ` + uuidText},
		{"ext3", []stamp{extMagic, {1024 + 92, u32(4)}, {1024 + 96, u32(2)}}, "ext3", ""},
		{"ext4 by extents", []stamp{extMagic, {1024 + 92, u32(4)}, {1024 + 96, u32(0x42)}}, "ext4", ""},
		{"ext4 by huge files", []stamp{extMagic, {1024 + 100, u32(8)}}, "ext4", ""},
		{"journal device", []stamp{extMagic, {1024 + 96, u32(8)}}, "jbd", ""},
		{"two bytes like ext", []stamp{extMagic, {1024 + 76, u32(77)}}, "", ""},
		{"swap", []stamp{{4086, "SWAPSPACE2"}, {1024 + 12, uuid}, {1024 + 28, "sw"}}, "swap", `label="sw" ` + uuidText},
		{"swap of 64 KiB pages", []stamp{{65526, "SWAPSPACE2"}}, "swap", ""},
		{"suspended", []stamp{{4086, "S1SUSPEND\x00"}}, "swap", "S1SUSPEND"},
		{"ntfs", []stamp{{3, "NTFS    "}, bootMark}, "ntfs", ""},
		{"exfat", []stamp{{3, "EXFAT   "}, bootMark}, "exfat", ""},
		{"fat32", append([]stamp{{71, "BOOT       "}}, fat...), "vfat", `label="BOOT"`},
		{"fat16", append([]stamp{{22, u16(100)}, {43, "STICK      "}}, fat...), "vfat", `label="STICK"`},
		{"gpt", []stamp{{512, "EFI PART"}, {512 + 56, "\x33\x22\x11\x00\x55\x44\x77\x66\x88\x99\xaa\xbb\xcc\xdd\xee\xff"},
			bootMark, {450, "\xee"}, {458, u32(1)}}, "gpt", uuidText},
		{"gpt of 4096-byte sectors", []stamp{{4096, "EFI PART"}}, "gpt", ""},
		{"gpt backup", []stamp{{-512, "EFI PART"}}, "gpt", "backup"},
		{"mbr", []stamp{bootMark, {446, "\x80"}, {450, "\x83"}, {458, u32(2048)}, {466, "\x82"}, {474, u32(4096)}}, "mbr", "partitions=2"},
		{"boot mark alone", []stamp{bootMark}, "", ""},
		{"mbr with a mad entry", []stamp{bootMark, {446, "\x12"}, {450, "\x83"}, {458, u32(1)}}, "", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			d := NewSim("sim", probeSize)
			for _, s := range c.stamps {
				off := s.off
				if off < 0 {
					off += probeSize
				}
				d.Overwrite(off, []byte(s.text))
			}
			got, err := ProbeDevice(d)
			if err != nil {
				t.Fatal(err)
			}
			if got.Kind != c.kind || !strings.Contains(got.Detail, c.detail) {
				t.Errorf("found %q, %q; want %q, %q", got.Kind, got.Detail, c.kind, c.detail)
			}
			if c.kind == "" && got != (Signature{}) {
				t.Errorf("nothing is not the zero value: %+v", got)
			}
		})
	}
}

// TestProbeSmall: no device is too small to be looked at.
func TestProbeSmall(t *testing.T) {
	for size := int64(512); size <= 160<<10; size += 512 {
		d := NewSim("sim", size)
		if s, err := ProbeDevice(d); s.Kind != "" || err != nil {
			t.Fatalf("%d zeros are taken for %v (%v)", size, s, err)
		}
	}
}

func TestProbeReadError(t *testing.T) {
	d := NewSim("sim", probeSize)
	d.Fail(Fault{Kind: ReadError, Match: func(off int64, _, _ int) bool { return off == 0 }})
	_, err := ProbeDevice(d)
	wantError(t, "probe of an unreadable device", err, sealfs.ErrIO)
}

// TestProbeMade probes what the usual tools make.
func TestProbeMade(t *testing.T) {
	for _, c := range []struct{ kind, detail, tool, args string }{
		{"ext2", `label="mine"`, "mkfs.ext4", "-q -F -L mine -O none,filetype,sparse_super"},
		{"ext3", `label="mine"`, "mkfs.ext4", "-q -F -L mine -O none,filetype,sparse_super,has_journal"},
		{"ext4", `label="mine"`, "mkfs.ext4", "-q -F -L mine"},
		{"swap", `label="mine"`, "mkswap", "-q -L mine"},
		{"vfat", `label="MINE"`, "mkfs.vfat", "-n MINE"},
		{"btrfs", `label="mine"`, "mkfs.btrfs", "-q -L mine"},
		{"xfs", `label="mine"`, "mkfs.xfs", "-q -L mine"},
		{"f2fs", `label="mine"`, "mkfs.f2fs", "-q -l mine"},
		{"gpt", "uuid=", "sgdisk", "-n 1:0:0"},
	} {
		t.Run(c.kind, func(t *testing.T) {
			tool, err := exec.LookPath(c.tool)
			if err != nil {
				t.Skip(err)
			}
			path := filepath.Join(t.TempDir(), "image")
			if err := CreateImage(path, 512<<20); err != nil {
				t.Fatal(err)
			}
			cmd := exec.Command(tool, append(strings.Fields(c.args), path)...)
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Fatalf("%v: %v: %s", cmd, err, out)
			}
			got, err := Probe(path)
			if err != nil || got.Kind != c.kind || !strings.Contains(got.Detail, c.detail) {
				t.Errorf("found %v (%v), want %s %s", got, err, c.kind, c.detail)
			}
		})
	}
}

func TestProbePath(t *testing.T) {
	path := filepath.Join(t.TempDir(), "image")
	_, err := Probe(path)
	wantError(t, "probe of nothing", err, sealfs.ErrNotExist)
	if err := os.WriteFile(path, append([]byte("SEALFSv1"), make([]byte, 8192)...), 0o600); err != nil {
		t.Fatal(err)
	}
	// A holder of the lock does not keep Probe from looking.
	mustOpen(t, path, OpenOptions{Exclusive: true})
	if s, err := Probe(path); s.Kind != "sealfs" || err != nil {
		t.Errorf("found %v, %v", s, err)
	}
}

func FuzzProbe(f *testing.F) {
	f.Add([]byte("SEALFSv1"), int64(0))
	f.Add([]byte("LABELONE"), int64(512))
	f.Add([]byte("\x00\x00\x00\x04name\x00\x00\x00\x09\x00\x00\x00\x01\x00\x00\x00\x04tank"), int64(16<<10))
	f.Fuzz(func(t *testing.T, b []byte, off int64) {
		d := NewSim("sim", probeSize)
		if off < 0 || off > probeSize-int64(len(b)) {
			return
		}
		d.Overwrite(128<<10, []byte("\x0c\xb1\xba\x00\x00\x00\x00\x00"))
		d.Overwrite(off, b)
		if s, err := ProbeDevice(d); err != nil || s.Kind == "" && s.Detail != "" {
			t.Errorf("%+v, %v", s, err)
		}
	})
}
