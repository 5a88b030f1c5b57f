package node

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"sealfs"
	"sealfs/server"
)

func TestParseDisk(t *testing.T) {
	for text, want := range map[string]diskSpec{
		"/dev/x":                             {Device: "/dev/x"},
		"/dev/x,format":                      {Device: "/dev/x", Format: true},
		"/i.img,size=10G,weight=7,region=/r": {Device: "/i.img", Size: 10 << 30, Weight: 7, Region: "/r"},
		"/dev/../dev//x,region=/a/../r,format,size=4K": {Device: "/dev/x", Region: "/r", Format: true, Size: 4096},
	} {
		if s, err := parseDisk(text); err != nil || s != want {
			t.Errorf("%q: %+v, %v", text, s, err)
		}
	}
	for text, want := range map[string]string{
		"":                  "device is missing",
		"x.img":             "begin with a slash",
		"/x,region=":        "begin with a slash",
		"/x,size=1":         "no multiple",
		"/x,size=big":       "not a size",
		"/x,weight=0":       `weight "0"`,
		"/x,weight=1000000": "weight",
		"/x,colour=red":     `"colour=red" is not known`,
	} {
		if _, err := parseDisk(text); !errors.Is(err, sealfs.ErrInvalid) || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want %q", text, err, want)
		}
	}
	wd, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	if got, err := AbsDisk("a,size=4K,region=b,format"); err != nil || got != wd+"/a,size=4K,region="+wd+"/b,format" {
		t.Errorf("%q, %v", got, err)
	}
}

// newInventory returns the inventory of a server that has met its cluster.
func newInventory(t *testing.T, d Dir) *inventory {
	t.Helper()
	inv, err := d.inventory()
	if err != nil {
		t.Fatal(err)
	}
	inv.Cluster = sealfs.NewUUID()
	return inv
}

func TestAdoptDisk(t *testing.T) {
	d := testDir(t)
	inv := newInventory(t, d)
	dir := t.TempDir()
	image := filepath.Join(dir, "a.img")
	refuse := func(s diskSpec, words ...string) {
		t.Helper()
		before := len(inv.Disks)
		_, err := d.adoptDisk(inv, s)
		if err == nil || len(inv.Disks) != before {
			t.Errorf("%+v: %v, %d disks", s, err, len(inv.Disks))
			return
		}
		for _, w := range append(words, s.Device) {
			if !strings.Contains(err.Error(), w) {
				t.Errorf("%+v: %v, want %q", s, err, w)
			}
		}
	}
	refuse(diskSpec{Device: image}, "size=")
	refuse(diskSpec{Device: "/dev/no-such-disk", Size: 64 << 20}, "no device")
	refuse(diskSpec{Device: dir}, "directory")
	k, err := d.adoptDisk(inv, diskSpec{Device: image, Size: 64 << 20, Weight: 3})
	if err != nil {
		t.Fatal(err)
	}
	if k.Region != "regions/"+k.ID.String() || k.Size != 64<<20 || k.Weight != 3 || k.Formatting {
		t.Errorf("a new image: %+v", k)
	}
	id := k.ID
	// The same again is the same disk, whatever is said of what it is.
	if k, err = d.adoptDisk(inv, diskSpec{Device: image, Format: true, Weight: 5}); err != nil || k.ID != id || k.Weight != 5 || len(inv.Disks) != 1 {
		t.Errorf("again: %+v, %v", k, err)
	}
	refuse(diskSpec{Device: image, Size: 128 << 20}, "64M", "size=128M")
	refuse(diskSpec{Device: image, Region: "/elsewhere"}, "/elsewhere")
	read, err := d.inventory()
	if err != nil || read.Server != inv.Server || len(read.Disks) != 1 || read.Disks[0] != inv.Disks[0] {
		t.Errorf("what is remembered: %+v, %v", read, err)
	}
	if err := d.checkDisk(inv, *k); err != nil {
		t.Error(err)
	}
	link := filepath.Join(dir, "same.img")
	if err := os.Link(image, link); err != nil {
		t.Fatal(err)
	}
	refuse(diskSpec{Device: link}, id.String(), "another name")

	// What is blank needs a word, what is not is not touched.
	blank := filepath.Join(dir, "blank")
	if err := os.WriteFile(blank, make([]byte, 64<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	refuse(diskSpec{Device: blank}, "blank", ",format")
	refuse(diskSpec{Device: blank, Size: 1 << 20, Format: true}, "64M")
	if k, err = d.adoptDisk(inv, diskSpec{Device: blank, Format: true}); err != nil || k.Size != 64<<20 {
		t.Errorf("a blank one: %+v, %v", k, err)
	}
	foreign := filepath.Join(dir, "ext4")
	super := make([]byte, 64<<20)
	super[1024+56], super[1024+57] = 0x53, 0xef
	if err := os.WriteFile(foreign, super, 0o600); err != nil {
		t.Fatal(err)
	}
	refuse(diskSpec{Device: foreign, Format: true}, "holds", "wipefs")

	// A store of another cluster, and fresh ones of mkfs.sealfs.
	other, fresh, bound := sealfs.NewUUID(), filepath.Join(dir, "fresh"), filepath.Join(dir, "bound")
	for path, cluster := range map[string]sealfs.UUID{filepath.Join(dir, "other"): other, fresh: {}, bound: inv.Cluster} {
		if _, err := server.Format(server.FormatOptions{Device: path, Region: path + ".region", Store: sealfs.NewUUID(), Cluster: cluster, Size: 64 << 20}); err != nil {
			t.Fatal(err)
		}
	}
	refuse(diskSpec{Device: filepath.Join(dir, "other"), Format: true}, other.String(), inv.Cluster.String())
	for _, path := range []string{fresh, bound} {
		if k, err = d.adoptDisk(inv, diskSpec{Device: path}); err != nil || k.Region != path+".region" {
			t.Errorf("a store of mkfs.sealfs: %+v, %v", k, err)
		}
	}
	if err := os.Rename(bound, bound+"2"); err != nil {
		t.Fatal(err)
	}
	inv.Disks = inv.Disks[:len(inv.Disks)-1]
	refuse(diskSpec{Device: bound + "2"}, "region=FILE")
}

// TestInterruptedFormat: a disk whose formatting was cut off anywhere is
// formatted again, and only that.
func TestInterruptedFormat(t *testing.T) {
	for name, cut := range map[string]func(image, region string) error{
		"before the image": func(image, region string) error { return errors.Join(os.Remove(image), os.Remove(region)) },
		"within it": func(image, region string) error {
			return errors.Join(os.Truncate(image, 0), os.Truncate(image, 64<<20))
		},
		"after it": func(string, string) error { return nil },
	} {
		d := testDir(t)
		inv := newInventory(t, d)
		spec := diskSpec{Device: filepath.Join(t.TempDir(), "a.img"), Size: 64 << 20}
		k, err := d.adoptDisk(inv, spec)
		if err != nil {
			t.Fatal(err)
		}
		k.Formatting = true
		id := k.ID
		if err := errors.Join(d.writeInventory(inv), cut(spec.Device, d.abs(k.Region))); err != nil {
			t.Fatal(err)
		}
		if inv, err = d.inventory(); err != nil {
			t.Fatal(err)
		}
		k, err = d.adoptDisk(inv, spec)
		if err != nil || k.ID != id || k.Formatting || len(inv.Disks) != 1 {
			t.Errorf("%s: %+v, %v", name, k, err)
			continue
		}
		if err := d.checkDisk(inv, *k); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestInventoryFaults(t *testing.T) {
	for text, want := range map[string]string{
		"version: 9\n":                   "version 9",
		"version: 1\n":                   "who the server is",
		"version: 1\ncolour: red\n":      `"colour"`,
		"version: 1\nserver: nonsense\n": "server.yaml",
		"version: 1\nserver: 0b9b55b0-53f3-4e9c-9d7c-1c7d4ab81f4e\ndisks: [{device: /x}]\n": "disk 0",
	} {
		d := testDir(t)
		if err := os.WriteFile(d.join("server.yaml"), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := d.inventory(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want %q", text, err, want)
		}
	}
}

// TestTakeOver: what roles have taken over is no longer up's.
func TestTakeOver(t *testing.T) {
	d := testDir(t)
	if err := d.takeOver(); err != nil {
		t.Errorf("a new directory: %v", err)
	}
	if err := d.format(&Config{Version: 1}, shape{size: 64 << 20, servers: 2}); err != nil {
		t.Fatal(err)
	}
	inv, err := d.inventory()
	if err != nil || len(inv.Disks) != 2 || inv.Cluster.IsZero() || !inv.Inherited {
		t.Errorf("inherited: %+v, %v", inv, err)
	}
	for range 2 {
		if err := d.as(RoleServer).takeOver(); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := d.inspect(shape{}); !errors.Is(err, sealfs.ErrBusy) || !strings.Contains(err.Error(), "sealfs server") {
		t.Errorf("up afterwards: %v", err)
	}
	if s, err := d.Stores(); err != nil || len(s) != 2 || s[0].Device != d.join("stores/0/device.img") {
		t.Errorf("stores: %+v, %v", s, err)
	}
}
