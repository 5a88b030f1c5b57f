package node

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v4"

	"sealfs"
	"sealfs/disk"
	"sealfs/lsfs"
)

// inventory is the content of DIR/server.yaml: who a server is, and its disks.
type inventory struct {
	Version int         `yaml:"version"`
	Cluster sealfs.UUID `yaml:"cluster"`
	Server  sealfs.UUID `yaml:"server"`
	Disks   []Disk      `yaml:"disks"`
	// Inherited says that the disks are those of `sealfs up`, and have not been
	// opened by a server yet.
	Inherited bool `yaml:"inherited,omitempty"`
}

// Disk is a store that a server remembers. Relative paths count from the data
// directory.
type Disk struct {
	ID     sealfs.UUID `yaml:"id" json:"id"`
	Device string      `yaml:"device" json:"device"`
	Region string      `yaml:"region" json:"region"`
	Size   Size        `yaml:"size" json:"size"` // of the image or device
	Weight uint32      `yaml:"weight,omitempty" json:"weight,omitempty"`
	// Formatting marks a disk whose formatting has begun and not ended.
	Formatting bool `yaml:"formatting,omitempty" json:"-"`
}

const inventoryHead = `# Who this SealFS server is, and its disks, as "sealfs server" and "sealfs disk"
# remember them. Change it with these commands only.
`

// inventory reads DIR/server.yaml. Where there is none, the result is that of
// the data directory that "sealfs up" made, or an empty one; both with a new identity.
func (d Dir) inventory() (*inventory, error) {
	path := d.join("server.yaml")
	text, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return d.inherit()
	}
	if err != nil {
		return nil, fmt.Errorf("inventory: %w", err)
	}
	inv := new(inventory)
	if err := yaml.Load(text, inv, yaml.WithKnownFields()); err != nil {
		return nil, configFault(path, err)
	}
	switch {
	case inv.Version != configVersion:
		return nil, fault(sealfs.ErrVersion, "%s: version %d is not known: this program reads version %d", path, inv.Version, configVersion)
	case inv.Server.IsZero():
		return nil, fault(sealfs.ErrInvalid, "%s does not say who the server is (server: UUID): restore it from a copy", path)
	}
	for i, k := range inv.Disks {
		if k.ID.IsZero() || k.Device == "" || k.Region == "" || slices.IndexFunc(inv.Disks, func(o Disk) bool { return o.ID == k.ID || o.Device == k.Device || o.Region == k.Region }) != i {
			return nil, fault(sealfs.ErrInvalid, "%s: disk %d lacks id, device or region, or has another disk's: restore it from a copy", path, i)
		}
	}
	return inv, nil
}

// inherit makes an inventory of what "sealfs up" made in the directory.
func (d Dir) inherit() (*inventory, error) {
	inv := &inventory{Version: configVersion, Server: sealfs.NewUUID()}
	cfg, err := d.Config()
	if err != nil || !cfg.formatted() {
		return inv, err
	}
	inv.Cluster, inv.Inherited = cfg.Cluster, true
	for _, s := range cfg.Stores {
		inv.Disks = append(inv.Disks, Disk{ID: s.ID, Device: s.Device, Region: s.Region, Size: s.Size})
	}
	return inv, nil
}

// takeOver marks a directory that "sealfs up" made as belonging to processes of
// roles from now on: shards may come to lie elsewhere, so up would not find them.
func (d Dir) takeOver() error {
	l, err := d.as(RoleMain).lock(lockWait) // against the other roles
	if err != nil {
		return err
	}
	defer l.release()
	cfg, err := d.Config()
	if err != nil || !cfg.formatted() || cfg.Apart {
		return err
	}
	cfg.Apart = true
	return d.writeConfig(cfg)
}

func (d Dir) writeInventory(inv *inventory) error {
	text, err := yaml.Dump(inv)
	if err == nil {
		err = replaceFile(d.join("server.yaml"), append([]byte(inventoryHead), text...), 0o600)
	}
	if err != nil {
		return fmt.Errorf("inventory: %w", err)
	}
	return nil
}

// diskSpec is what people say of a disk: DEVICE[,region=FILE][,size=SIZE][,weight=N][,format].
type diskSpec struct {
	Device string `json:"device"` // absolute
	Region string `json:"region"` // absolute, or empty
	Size   Size   `json:"size"`
	Weight uint32 `json:"weight"`
	Format bool   `json:"format"`
}

func parseDisk(text string) (s diskSpec, err error) {
	bad := func(format string, args ...any) (diskSpec, error) {
		return diskSpec{}, fault(sealfs.ErrInvalid, "disk %q: %s; write DEVICE[,region=FILE][,size=SIZE][,weight=N][,format]", text, fmt.Sprintf(format, args...))
	}
	device, rest, more := strings.Cut(text, ",")
	if device == "" {
		return bad("the device is missing")
	}
	if s.Device = filepath.Clean(device); !filepath.IsAbs(s.Device) {
		return bad("the path must begin with a slash")
	}
	for more {
		var word string
		word, rest, more = strings.Cut(rest, ",")
		key, value, _ := strings.Cut(word, "=")
		switch key {
		case "format":
			s.Format = true
		case "region":
			if s.Region = filepath.Clean(value); !filepath.IsAbs(s.Region) {
				return bad("the path of the region's file must begin with a slash")
			}
		case "size":
			s.Size, err = ParseSize(value)
			if err == nil && (s.Size == 0 || s.Size%sealfs.BlockSize != 0) {
				return bad("size %s is no multiple of 4096 bytes", s.Size)
			}
		case "weight":
			n, e := strconv.ParseUint(value, 10, 16)
			if s.Weight = uint32(n); e != nil || n == 0 {
				return bad("weight %q is not a number from 1 to 65535", value)
			}
		default:
			return bad("%q is not known", word)
		}
		if err != nil {
			return bad("%v", err)
		}
	}
	return s, nil
}

// AbsDisk makes the paths in the description of a disk absolute. The rest of it
// is judged by whom it is given to.
func AbsDisk(text string) (string, error) {
	words := strings.Split(text, ",")
	var err error
	if words[0] != "" {
		words[0], err = filepath.Abs(words[0])
	}
	for i, w := range words[1:] {
		if path, ok := strings.CutPrefix(w, "region="); ok && path != "" && err == nil {
			path, err = filepath.Abs(path)
			words[i+1] = "region=" + path
		}
	}
	return strings.Join(words, ","), err
}

// adoptDisk brings a disk that was asked for into the inventory, and formats it
// if that is wanted and needed. The inventory is written before a device is.
func (d Dir) adoptDisk(inv *inventory, s diskSpec) (*Disk, error) {
	i := slices.IndexFunc(inv.Disks, func(k Disk) bool { return d.abs(k.Device) == s.Device })
	if i >= 0 && !inv.Disks[i].Formatting {
		return d.recallDisk(inv, &inv.Disks[i], s)
	}
	k := Disk{ID: sealfs.NewUUID(), Device: s.Device, Size: s.Size, Weight: s.Weight}
	if i >= 0 { // an interrupted formatting: nothing has used it
		k.ID = inv.Disks[i].ID
	}
	blank, err := d.examine(inv, &k, s, i >= 0)
	if err != nil {
		return nil, err
	}
	k.Region = cmp.Or(s.Region, d.findRegion(k, blank))
	if slices.ContainsFunc(inv.Disks, func(o Disk) bool { return o.Device != k.Device && (o.ID == k.ID || o.Region == k.Region) }) {
		return nil, fault(sealfs.ErrExist, "%s holds store %s, with region %s, which this server has under another name: see `sealfs disk list`", s.Device, k.ID, k.Region)
	}
	if _, err := os.Stat(d.abs(k.Region)); err != nil && !blank {
		return nil, fault(sealfs.ErrNotExist, "the region of %s (store %s) is not at %s: say with region=FILE where it is", s.Device, k.ID, d.abs(k.Region))
	}
	inv.Disks = slices.DeleteFunc(inv.Disks, func(o Disk) bool { return o.Device == k.Device })
	inv.Disks = append(inv.Disks, k)
	p := &inv.Disks[len(inv.Disks)-1]
	if !blank {
		return p, d.writeInventory(inv)
	}
	p.Formatting = true
	if err := d.writeInventory(inv); err != nil {
		return nil, err
	}
	store := Store{k.ID, k.Device, k.Region, k.Size}
	if err := d.formatStore(inv.Cluster, store, "", false, i >= 0); err != nil {
		inv.Disks = inv.Disks[:len(inv.Disks)-1] // nothing was made
		return nil, errors.Join(err, d.writeInventory(inv))
	}
	p.Formatting = false
	return p, d.writeInventory(inv)
}

// recallDisk compares a disk that is known with what was said of it.
func (d Dir) recallDisk(inv *inventory, k *Disk, s diskSpec) (*Disk, error) {
	switch {
	case s.Region != "" && s.Region != d.abs(k.Region):
		return nil, fault(sealfs.ErrExist, "disk %s has its region at %s, not %s: leave region= away", s.Device, d.abs(k.Region), s.Region)
	case s.Size != 0 && s.Size != k.Size:
		return nil, fault(sealfs.ErrExist, "disk %s has %s, not size=%s: leave size= away", s.Device, k.Size, s.Size)
	case s.Weight != 0 && s.Weight != k.Weight:
		k.Weight = s.Weight
		return k, d.writeInventory(inv)
	}
	return k, nil
}

// examine looks at a device that the inventory does not know. It completes k, and
// reports whether the device is to be formatted. again says that this was begun
// before, and interrupted.
func (d Dir) examine(inv *inventory, k *Disk, s diskSpec, again bool) (blank bool, err error) {
	st, err := os.Stat(s.Device)
	switch {
	case errors.Is(err, fs.ErrNotExist) && strings.HasPrefix(s.Device, "/dev/"):
		return false, fault(sealfs.ErrNotExist, "there is no device %s", s.Device)
	case errors.Is(err, fs.ErrNotExist) && s.Size == 0:
		return false, fault(sealfs.ErrNotExist, "%s does not exist: add size=SIZE to make an image file", s.Device)
	case errors.Is(err, fs.ErrNotExist):
		return true, os.MkdirAll(filepath.Dir(s.Device), 0o700)
	case err != nil:
		return false, fmt.Errorf("disk: %w", err)
	case st.IsDir():
		return false, fault(sealfs.ErrIsDir, "disk %s is a directory: name a block device, or an image file in it with size=SIZE", s.Device)
	}
	dev, err := disk.Open(s.Device, disk.OpenOptions{ReadOnly: true})
	if err != nil {
		return false, err
	}
	defer dev.Close()
	k.Size = Size(dev.Size() &^ (sealfs.BlockSize - 1))
	if s.Size != 0 && s.Size != k.Size {
		return false, fault(sealfs.ErrExist, "%s exists and has %s, not size=%s: leave size= away", s.Device, k.Size, s.Size)
	}
	sb, err := lsfs.ReadSuper(dev)
	if err == nil {
		resumed := sb.Store == k.ID // what was interrupted had come that far
		k.ID = sb.Store
		switch {
		case sb.Cluster == inv.Cluster:
			return resumed, nil
		case sb.Cluster.IsZero() && sb.Incarnation == 0: // fresh from mkfs.sealfs
			return false, nil
		case sb.Cluster.IsZero():
			return false, fault(sealfs.ErrExist, "%s holds store %s, which is in use by a data directory of `sealfs up`: start `sealfs server` on that directory", s.Device, sb.Store)
		}
		return false, fault(sealfs.ErrExist, "%s holds store %s of cluster %s, and this server belongs to cluster %s: name another disk, or make a new store on this one with `mkfs.sealfs --force %s` if nobody needs it any more", s.Device, sb.Store, sb.Cluster, inv.Cluster, s.Device)
	}
	sig, perr := disk.ProbeDevice(dev)
	switch {
	case perr != nil:
		return false, perr
	case again && (sig.Kind == "" || sig.Kind == "sealfs"):
		return true, nil
	case sig.Kind != "":
		return false, fault(sealfs.ErrExist, "%s holds %s, and is not touched: name another disk, or erase this one with `wipefs -a %s` if nobody needs it any more", s.Device, sig, s.Device)
	case !s.Format:
		return false, fault(sealfs.ErrNotExist, "%s is blank: add ,format behind it to have it formatted", s.Device)
	}
	return true, nil
}

// findRegion returns where the region of a disk is when nobody said so: in
// the data directory, or where mkfs.sealfs put it.
func (d Dir) findRegion(k Disk, blank bool) string {
	own := filepath.Join("regions", k.ID.String())
	beside := k.Device + ".region"
	if _, err := os.Stat(d.join(own)); err != nil && !blank {
		if _, err := os.Stat(beside); err == nil {
			return beside
		}
	}
	return own
}

// checkDisk compares a disk with what the inventory says of it.
func (d Dir) checkDisk(inv *inventory, k Disk) error {
	return d.checkStore(&Config{Cluster: inv.Cluster}, Store{k.ID, k.Device, k.Region, k.Size})
}

// diskStore returns a disk with absolute paths.
func (d Dir) diskStore(k Disk) Store { return Store{k.ID, d.abs(k.Device), d.abs(k.Region), k.Size} }
