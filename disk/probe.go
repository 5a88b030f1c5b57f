package disk

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"unicode/utf16"

	"golang.org/x/sys/unix"
)

// Signature says what stands on a device. The zero value stands for nothing
// that Probe knows, which does not mean that the device is empty.
type Signature struct {
	// Kind is the type as blkid names it where it has a name for it: "ext4",
	// "xfs", "lvm2", "md", "gpt", "sealfs", ….
	Kind string
	// Detail is label and UUID for people, as far as they are easily found.
	Detail string
}

func (s Signature) String() string {
	if s.Kind == "" {
		return "nothing known"
	}
	return strings.TrimSpace(s.Kind + " " + s.Detail)
}

// Probe tells what stands on the device or image file at path. It only reads,
// and claims nothing.
func Probe(path string) (Signature, error) {
	d, err := Open(path, OpenOptions{ReadOnly: true})
	if err != nil {
		return Signature{}, err
	}
	s, err := ProbeDevice(d)
	return s, errors.Join(err, d.Close())
}

// ProbeDevice is Probe for a device that is already open.
func ProbeDevice(d Device) (Signature, error) {
	p := &prober{d: d}
	// One read covers most magics.
	p.head = p.fetch(0, min(d.Size(), 72<<10))
	for _, f := range formats {
		if s := p.test(f); s.Kind != "" {
			return s, nil
		}
	}
	return Signature{}, p.err
}

// format is one thing that Probe knows.
type format struct {
	kind  string
	at    int64  // where the magic stands, from the end of the device if negative
	magic string // "" if find looks for itself
	// find refines what the magic says: it returns the kind, "" if this is not the
	// format after all, and the detail. nil takes the magic's word.
	find func(p *prober, kind string) (string, string)
}

// formats are tried in this order: first our own, then what contains other
// formats, then file systems, and last the partition tables, whose marks file
// systems bear as well.
var formats = []format{
	{kind: "sealfs", magic: "SEALFSv1"},
	{kind: "luks", magic: "LUKS\xba\xbe", find: luks},
	{kind: "lvm2", find: lvm},
	{kind: "md", find: md},
	{kind: "bcache", at: 4096 + 24, magic: "\xc6\x85\x73\xf6\x4e\x1a\x45\xca\x82\x65\xf5\x7f\x48\xba\x6d\x81"},
	{kind: "bitlocker", at: 3, magic: "-FVE-FS-"},
	{kind: "zfs", find: zfs},
	{kind: "xfs", magic: "XFSB", find: labelled(108, 12, 32)},
	{kind: "btrfs", at: 64<<10 + 64, magic: "_BHRfS_M", find: labelled(64<<10+299, 256, 64<<10+32)},
	{kind: "f2fs", at: 1024, magic: "\x10\x20\xf5\xf2", find: f2fs},
	{kind: "squashfs", magic: "hsqs"},
	{kind: "squashfs", magic: "sqsh"},
	{kind: "erofs", at: 1024, magic: "\xe2\xe1\xf5\xe0", find: labelled(1024+64, 16, 1024+48)},
	{kind: "jfs", at: 32 << 10, magic: "JFS1", find: labelled(32<<10+152, 16, 32<<10+136)},
	{kind: "iso9660", at: 32<<10 + 1, magic: "CD001", find: labelled(32<<10+40, 32, 0)},
	{kind: "ext", at: 1024 + 56, magic: "\x53\xef", find: ext},
	{kind: "swap", find: swap},
	{kind: "ntfs", at: 3, magic: "NTFS    "},
	{kind: "exfat", at: 3, magic: "EXFAT   "},
	{kind: "vfat", at: 510, magic: "\x55\xaa", find: vfat},
	{kind: "gpt", at: 512, magic: "EFI PART", find: gpt(512)},
	{kind: "gpt", at: 4096, magic: "EFI PART", find: gpt(4096)},
	{kind: "gpt", at: -512, magic: "EFI PART", find: backup},
	{kind: "gpt", at: -4096, magic: "EFI PART", find: backup},
	{kind: "mbr", at: 510, magic: "\x55\xaa", find: mbr},
}

// prober reads a device for the formats.
type prober struct {
	d    Device
	head []byte
	err  error // first failed read
}

// fetch reads n bytes at off; what lies beyond the device reads as zeros.
func (p *prober) fetch(off, n int64) []byte {
	b := make([]byte, n)
	if off < 0 {
		return b
	}
	if _, err := p.d.ReadAt(b, off); err != nil && err != io.EOF && p.err == nil {
		p.err = err
	}
	return b
}

// at returns n bytes at off, which the caller does not change.
func (p *prober) at(off, n int64) []byte {
	if off >= 0 && off+n <= int64(len(p.head)) {
		return p.head[off : off+n]
	}
	return p.fetch(off, n)
}

func (p *prober) is(off int64, magic string) bool {
	return string(p.at(off, int64(len(magic)))) == magic
}

func (p *prober) le16(off int64) uint16 { return binary.LittleEndian.Uint16(p.at(off, 2)) }
func (p *prober) le32(off int64) uint32 { return binary.LittleEndian.Uint32(p.at(off, 4)) }

func (p *prober) test(f format) Signature {
	if f.magic != "" {
		at := f.at
		if at < 0 {
			at += p.d.Size()
		}
		if !p.is(at, f.magic) {
			return Signature{}
		}
	}
	if f.find == nil {
		return Signature{Kind: f.kind}
	}
	kind, detail := f.find(p, f.kind)
	return Signature{Kind: kind, Detail: detail}
}

// describe renders a label and a UUID, either of which may be missing.
func describe(label, uuid []byte) string {
	var parts []string
	if i := bytes.IndexByte(label, 0); i >= 0 {
		label = label[:i]
	}
	if s := strings.TrimSpace(string(label)); s != "" {
		parts = append(parts, fmt.Sprintf("label=%q", s))
	}
	if u := uuid; len(u) == 16 && !bytes.Equal(u, make([]byte, 16)) {
		parts = append(parts, fmt.Sprintf("uuid=%x-%x-%x-%x-%x", u[:4], u[4:6], u[6:8], u[8:10], u[10:]))
	}
	return strings.Join(parts, " ")
}

// labelled finds a label of n bytes and, unless its offset is 0, a UUID.
func labelled(label, n, uuid int64) func(*prober, string) (string, string) {
	return func(p *prober, kind string) (string, string) {
		var u []byte
		if uuid != 0 {
			u = p.at(uuid, 16)
		}
		return kind, describe(p.at(label, n), u)
	}
}

func luks(p *prober, kind string) (string, string) {
	uuid, _, _ := bytes.Cut(p.at(168, 40), []byte{0})
	return kind, fmt.Sprintf("version=%d uuid=%s", binary.BigEndian.Uint16(p.at(6, 2)),
		strings.ToValidUTF8(string(uuid), "?"))
}

// lvm looks for the label of a physical volume in the first four sectors.
func lvm(p *prober, kind string) (string, string) {
	for off := int64(0); off < 4*512; off += 512 {
		if p.is(off, "LABELONE") && p.is(off+24, "LVM2 001") {
			return kind, fmt.Sprintf("uuid=%q", p.at(off+32, 32))
		}
	}
	return "", ""
}

// md looks for the superblock of a RAID member: versions 1.1, 1.2, 1.0 and 0.90.
func md(p *prober, kind string) (string, string) {
	const magic = "\xfc\x4e\x2b\xa9"
	last := (p.d.Size()/512 - 16) &^ 7 * 512
	for _, off := range []int64{0, 4096, last} {
		if p.is(off, magic) && p.le32(off+4) == 1 {
			return kind, describe(p.at(off+32, 32), p.at(off+16, 16))
		}
	}
	old := p.d.Size()&^(64<<10-1) - 64<<10
	if p.is(old, magic) || p.is(old, "\xa9\x2b\x4e\xfc") {
		return kind, "version=0.90"
	}
	return "", ""
}

// zfs looks for uberblocks in the four labels of a vdev, two at either end. A
// single one is taken as a sign: better to warn too often.
func zfs(p *prober, kind string) (string, string) {
	const label = 256 << 10
	end := p.d.Size() &^ (label - 1)
	for _, off := range []int64{0, label, end - 2*label, end - label} {
		if off < 0 || off+label > p.d.Size() {
			continue
		}
		ring := p.fetch(off+label/2, label/2)
		for i := 0; i < len(ring); i += 1024 {
			m := ring[i : i+8]
			if binary.LittleEndian.Uint64(m) == 0x00bab10c || binary.BigEndian.Uint64(m) == 0x00bab10c {
				return kind, poolName(p.at(off+16<<10, 112<<10))
			}
		}
	}
	return "", ""
}

// poolName finds the pair "name" in the XDR name-value list of a ZFS label:
// length and name, type 9 (string), one element, length and string.
func poolName(list []byte) string {
	_, rest, ok := bytes.Cut(list, []byte("\x00\x00\x00\x04name\x00\x00\x00\x09\x00\x00\x00\x01"))
	if !ok || len(rest) < 4 {
		return ""
	}
	n := binary.BigEndian.Uint32(rest)
	if n > 256 || int(n) > len(rest)-4 {
		return ""
	}
	return describe(rest[4:4+n], nil)
}

func f2fs(p *prober, kind string) (string, string) {
	var label []uint16
	for off := int64(1024 + 124); len(label) < 512; off += 2 {
		c := p.le16(off)
		if c == 0 {
			break
		}
		label = append(label, c)
	}
	return kind, describe([]byte(string(utf16.Decode(label))), p.at(1024+108, 16))
}

// ext tells ext2, ext3 and ext4 apart by their features.
func ext(p *prober, _ string) (string, string) {
	const (
		hasJournal     = 0x4  // compatible features
		journalDevice  = 0x8  // incompatible features
		ext3Incompat   = 0x16 // file types, recovery, meta block groups: all that ext3 knows
		ext3ROCompat   = 0x7  // sparse superblocks, large files, B-tree directories
		compat, incomp = 1024 + 92, 1024 + 96
	)
	// A magic of two bytes is weak: the revision and block size must make sense.
	if p.le32(1024+76) > 1 || p.le32(1024+24) > 6 {
		return "", ""
	}
	kind := "ext2"
	switch {
	case p.le32(incomp)&journalDevice != 0:
		kind = "jbd"
	case p.le32(incomp)&^ext3Incompat != 0 || p.le32(1024+100)&^ext3ROCompat != 0:
		kind = "ext4"
	case p.le32(compat)&hasJournal != 0:
		kind = "ext3"
	}
	return kind, describe(p.at(1024+120, 16), p.at(1024+104, 16))
}

// swap looks for the mark at the end of the first page, whose size depends on
// the architecture.
func swap(p *prober, kind string) (string, string) {
	for page := int64(4096); page <= 64<<10; page *= 2 {
		for _, magic := range []string{"SWAPSPACE2", "SWAP-SPACE", "S1SUSPEND\x00", "S2SUSPEND\x00", "ULSUSPEND\x00", "LINHIB0001"} {
			if p.is(page-10, magic) {
				if magic == "SWAPSPACE2" {
					return kind, describe(p.at(1024+28, 16), p.at(1024+12, 16))
				}
				return kind, strings.TrimRight(magic, "\x00")
			}
		}
	}
	return "", ""
}

// vfat checks a boot sector. Its text fields are only customary, so the numbers
// decide: sector and cluster size, number of FATs and media descriptor.
func vfat(p *prober, kind string) (string, string) {
	sector, cluster := p.le16(11), p.at(13, 1)[0]
	power := func(n int) bool { return n > 0 && n&(n-1) == 0 }
	if !power(int(sector)) || sector < 512 || sector > 4096 || !power(int(cluster)) ||
		p.le16(14) == 0 || p.at(16, 1)[0] == 0 || p.at(16, 1)[0] > 2 || p.at(21, 1)[0] < 0xf0 {
		return "", ""
	}
	if p.le16(22) == 0 { // FAT32: no length of a FAT in the old place
		return kind, describe(p.at(71, 11), nil)
	}
	return kind, describe(p.at(43, 11), nil)
}

func gpt(header int64) func(*prober, string) (string, string) {
	return func(p *prober, kind string) (string, string) {
		u := bytes.Clone(p.at(header+56, 16))
		// The first three fields of a GUID are little-endian.
		binary.BigEndian.PutUint32(u, binary.LittleEndian.Uint32(u))
		binary.BigEndian.PutUint16(u[4:], binary.LittleEndian.Uint16(u[4:]))
		binary.BigEndian.PutUint16(u[6:], binary.LittleEndian.Uint16(u[6:]))
		return kind, describe(nil, u)
	}
}

func backup(_ *prober, kind string) (string, string) { return kind, "backup header" }

// mbr checks the four entries of a partition table: boot code bears the same
// mark, so at least one must be in use and all must be plausible.
func mbr(p *prober, kind string) (string, string) {
	used := 0
	for off := int64(446); off < 510; off += 16 {
		if status := p.at(off, 1)[0]; status&0x7f != 0 {
			return "", ""
		}
		if p.at(off+4, 1)[0] != 0 && p.le32(off+12) != 0 {
			used++
		}
	}
	if used == 0 {
		return "", ""
	}
	return kind, fmt.Sprintf("partitions=%d", used)
}

// Mounted returns where a file system on the block device or image file at path
// is mounted, "" if nowhere: on the device itself, on one of its partitions, on
// what is stacked on these (device mapper, RAID) or on a loop device over path
// itself. It looks into this process's mount namespace only.
func Mounted(path string) (mountpoint string, err error) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return "", failure("stat", path, err)
	}
	devs := make(map[uint64]bool)
	if st.Mode&unix.S_IFMT == unix.S_IFBLK {
		stacked(st.Rdev, devs)
	}
	loops(st, devs)
	if len(devs) == 0 {
		return "", nil
	}
	table, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return "", failure("read", "/proc/self/mountinfo", err)
	}
	for line := range strings.Lines(string(table)) {
		// 36 35 98:0 /root /mnt rw,noatime shared:1 - ext4 /dev/sda1 rw
		before, after, _ := strings.Cut(line, " - ")
		mount, source := strings.Fields(before), strings.Fields(after)
		if len(mount) < 5 || len(source) < 2 {
			continue
		}
		on := devs[parseDev(mount[2])]
		// Where the number is a private one, as with btrfs, the source tells.
		if !on && strings.HasPrefix(source[1], "/") {
			on = unix.Stat(unescape(source[1]), &st) == nil &&
				st.Mode&unix.S_IFMT == unix.S_IFBLK && devs[st.Rdev]
		}
		if on {
			return unescape(mount[4]), nil
		}
	}
	return "", nil
}

// stacked adds dev, its partitions, and all that is built upon them.
func stacked(dev uint64, into map[uint64]bool) {
	if into[dev] {
		return
	}
	into[dev] = true
	dir := fmt.Sprintf("/sys/dev/block/%d:%d", unix.Major(dev), unix.Minor(dev))
	parts, _ := filepath.Glob(dir + "/*/partition")
	holders, _ := filepath.Glob(dir + "/holders/*/dev")
	for _, p := range parts {
		holders = append(holders, filepath.Join(filepath.Dir(p), "dev"))
	}
	for _, name := range holders {
		if text, err := os.ReadFile(name); err == nil {
			if up := parseDev(strings.TrimSpace(string(text))); up != 0 {
				stacked(up, into)
			}
		}
	}
}

// loops adds the loop devices over a file or device and what is stacked on them.
func loops(below unix.Stat_t, into map[uint64]bool) {
	names, _ := filepath.Glob("/sys/block/loop*/loop/backing_file")
	for _, name := range names {
		text, err := os.ReadFile(name)
		if err != nil {
			continue
		}
		var st unix.Stat_t
		if unix.Stat(strings.TrimSuffix(string(text), "\n"), &st) != nil {
			continue
		}
		sameFile := st.Dev == below.Dev && st.Ino == below.Ino
		sameDevice := st.Mode&unix.S_IFMT == unix.S_IFBLK && below.Mode&unix.S_IFMT == unix.S_IFBLK && st.Rdev == below.Rdev
		if !sameFile && !sameDevice {
			continue
		}
		if text, err = os.ReadFile(filepath.Join(filepath.Dir(filepath.Dir(name)), "dev")); err == nil {
			if dev := parseDev(strings.TrimSpace(string(text))); dev != 0 {
				stacked(dev, into)
			}
		}
	}
}

// parseDev reads "major:minor", 0 if it is something else.
func parseDev(s string) uint64 {
	a, b, _ := strings.Cut(s, ":")
	major, err1 := strconv.ParseUint(a, 10, 32)
	minor, err2 := strconv.ParseUint(b, 10, 32)
	if err1 != nil || err2 != nil {
		return 0
	}
	return unix.Mkdev(uint32(major), uint32(minor))
}

// unescape undoes the octal escapes of mountinfo.
func unescape(s string) string {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			if c, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(c))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}
