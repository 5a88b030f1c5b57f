package node

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"sealfs"
	"sealfs/disk"
	"sealfs/lsfs"
	"sealfs/server"
)

// DefaultSize is the size of the image of a store where nothing else is said.
const DefaultSize Size = 4 << 30

// shape says what the stores shall be made of, or are expected to be. Zero values
// stand for "as it is", or the default.
type shape struct {
	size           Size   // of each store
	device, region string // absolute; of the only store
	servers        int    // number of stores
}

// inspect reads the configuration and says why the directory cannot be used, if
// so. It changes nothing.
func (d Dir) inspect(want shape) (*Config, error) {
	cfg, err := d.Config()
	if err != nil {
		return nil, err
	}
	if cfg.Apart {
		return nil, fault(sealfs.ErrBusy, "%s has been taken over by `sealfs manager` and `sealfs server` processes, which other machines may belong to: start those, with --data %s, instead of `sealfs up`", d, d)
	}
	used, foreign, err := d.survey()
	if err != nil {
		return nil, err
	}
	if cfg.formatted() {
		return cfg, d.compare(d.stores(cfg), want)
	}
	switch {
	case foreign != "":
		return nil, fault(sealfs.ErrExist, "%s holds %q, which SealFS did not make: name an empty or a new data directory", d, foreign)
	case used && !cfg.Formatting:
		return nil, fault(sealfs.ErrCorrupt, "%s has stores or a manager, but its config.yaml does not describe them: restore config.yaml from a copy, name another data directory, or start `sealfs manager` and `sealfs server` if these made them", d)
	}
	return cfg, nil
}

// compare refuses to take stores for other ones.
func (d Dir) compare(have []Store, want shape) error {
	differs := func(flag, have, want string) error {
		return fault(sealfs.ErrExist, "%s was formatted with --%s %s, not %s: leave --%s away, or name another data directory", d, flag, have, want, flag)
	}
	switch {
	case want.servers != 0 && want.servers != len(have):
		return differs("servers", strconv.Itoa(len(have)), strconv.Itoa(want.servers))
	case want.size != 0 && want.size != have[0].Size:
		return differs("size", have[0].Size.String(), want.size.String())
	case want.device != "" && want.device != have[0].Device:
		return differs("device", have[0].Device, want.device)
	case want.region != "" && want.region != have[0].Region:
		return differs("region", have[0].Region, want.region)
	}
	return nil
}

// ServersMax bounds the number of stores in one process.
const ServersMax = 64

// format makes stores and configuration. What an interrupted attempt left is
// thrown away: nothing has ever used it.
func (d Dir) format(cfg *Config, want shape) error {
	count := max(want.servers, 1)
	if count > 1 && (want.device != "" || want.region != "") {
		return fault(sealfs.ErrInvalid, "--servers %d makes images in %s, and does not go with --device or --region: start `sealfs server` processes for devices of your own", count, d)
	}
	var stores []Store
	for i := range count {
		dir := fmt.Sprintf("stores/%d/", i)
		stores = append(stores, Store{ID: sealfs.NewUUID(), Device: cmp.Or(want.device, dir+"device.img"), Region: cmp.Or(want.region, dir+"region"), Size: want.size})
	}
	adopt, again, err := d.adopt(cfg, &stores[0], want)
	if err != nil {
		return err
	}
	for i := range stores {
		st := &stores[i]
		st.Size = cmp.Or(st.Size, DefaultSize)
		// An image is of whole pages.
		if st.Size%sealfs.BlockSize != 0 {
			return fault(sealfs.ErrInvalid, "--size %s is no multiple of 4096 bytes: take %s", st.Size, st.Size&^(sealfs.BlockSize-1))
		}
	}
	if cfg.Formatting {
		if err := errors.Join(os.RemoveAll(d.join("stores")), os.RemoveAll(d.join("manager"))); err != nil {
			return fmt.Errorf("data directory: %w", err)
		}
	}
	if cfg.Shards == 0 {
		cfg.Shards = sealfs.ShardsDefault
	}
	cfg.Cluster, cfg.Formatting, cfg.Stores = sealfs.NewUUID(), true, stores
	if err := d.writeConfig(cfg); err != nil {
		return err
	}
	for i, st := range stores {
		if err := d.formatStore(cfg.Cluster, st, fmt.Sprintf("store %d", i), adopt, again); err != nil {
			// Nothing was made: the directory is as new.
			cfg.Formatting, cfg.Stores, cfg.Cluster = false, nil, sealfs.UUID{}
			return errors.Join(err, os.RemoveAll(d.join("stores")), d.writeConfig(cfg))
		}
	}
	cfg.Formatting = false
	return d.writeConfig(cfg)
}

// adopt looks at a device that exists already. It reports whether that is a store
// which mkfs.sealfs made and nobody has opened since, and whether it is one that
// an interrupted attempt of ours began, and completes the store's description.
func (d Dir) adopt(cfg *Config, st *Store, want shape) (adopt, again bool, err error) {
	dev, err := disk.Open(d.abs(st.Device), disk.OpenOptions{ReadOnly: true})
	if err != nil {
		return false, false, nil // it is yet to be made, or format says what is wrong
	}
	size := Size(dev.Size() &^ (sealfs.BlockSize - 1))
	sb, err := lsfs.ReadSuper(dev)
	dev.Close()
	again = err == nil && cfg.Formatting && sb.Store == cfg.Stores[0].ID
	adopt = err == nil && sb.Cluster.IsZero() && sb.Incarnation == 0
	switch {
	case want.device == "": // the image of an interrupted attempt
	case st.Size != 0 && st.Size != size:
		return false, false, fault(sealfs.ErrExist, "%s exists and has %s, not --size %s: leave --size away", want.device, size, st.Size)
	default:
		st.Size = size
	}
	if adopt {
		st.ID = sb.Store
	}
	return adopt, again, nil
}

// formatStore makes one store durably, or only the places where it lies if it is
// to be adopted.
func (d Dir) formatStore(cluster sealfs.UUID, st Store, label string, adopt, force bool) error {
	device, region := d.abs(st.Device), d.abs(st.Region)
	for _, path := range []string{device, region} {
		if strings.HasPrefix(path, d.path+"/") {
			if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
				return fmt.Errorf("data directory: %w", err)
			}
		}
	}
	if !adopt {
		_, err := server.Format(server.FormatOptions{
			Device: device, Region: region, Store: st.ID, Cluster: cluster, Label: label, Size: int64(st.Size), Force: force,
		})
		if err != nil {
			return err
		}
	}
	for _, path := range []string{device, region} {
		if err := syncDir(filepath.Dir(path)); err != nil {
			return err
		}
	}
	return nil
}

// checkStores compares the stores with the configuration before anything is
// opened for writing.
func (d Dir) checkStores(cfg *Config) error {
	var errs []error
	for _, s := range cfg.Stores {
		errs = append(errs, d.checkStore(cfg, s))
	}
	return errors.Join(errs...)
}

func (d Dir) checkStore(cfg *Config, s Store) error {
	path := d.abs(s.Device)
	for what, path := range map[string]string{"device": path, "region": d.abs(s.Region)} {
		if _, err := os.Stat(path); errors.Is(err, fs.ErrNotExist) {
			return fault(sealfs.ErrNotExist, "%s %s is missing: put it back from where it was moved or copied to; the store cannot be opened without", what, path)
		}
	}
	dev, err := disk.Open(path, disk.OpenOptions{ReadOnly: true})
	if err != nil {
		return err
	}
	defer dev.Close()
	if dev.Size() < int64(s.Size) {
		return fault(sealfs.ErrCorrupt, "device image %s was truncated: it has %d bytes of %d; restore it from a copy (nothing was changed)", path, dev.Size(), int64(s.Size))
	}
	sb, err := lsfs.ReadSuper(dev)
	switch {
	case err != nil:
		return fmt.Errorf("%w; see `sealfs-fsck -n %s` (nothing was changed)", err, path)
	case sb.Store != s.ID:
		return fault(sealfs.ErrInvalid, "%s holds store %s, but config.yaml says %s: it is the image of another data directory; put the right one in its place", path, sb.Store, s.ID)
	case sb.Cluster != cfg.Cluster && !sb.Cluster.IsZero(): // zero is mkfs.sealfs's
		return fault(sealfs.ErrInvalid, "%s belongs to cluster %s, but %s to %s: put the right image in its place", path, sb.Cluster, d, cfg.Cluster)
	}
	return nil
}

// shmDir is where rings lie: memory that outlives a process.
const shmDir = "/dev/shm"

// StagingPath returns where the ring of a store lies: a file in /dev/shm named
// by the store, or one beside the device where there is no /dev/shm.
func StagingPath(store sealfs.UUID, device string) string {
	name := "sealfs-" + store.String() + ".ring"
	if fi, err := os.Stat(shmDir); err == nil && fi.IsDir() {
		return filepath.Join(shmDir, name)
	}
	return filepath.Join(filepath.Dir(device), name)
}

// lockStaging keeps a copy of a data directory from being served beside the
// original: both would use the same ring.
func lockStaging(ring string, store sealfs.UUID) (lock, error) {
	path := ring + ".lock"
	for {
		f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
		if err != nil {
			return lock{}, fmt.Errorf("staging: %w", err)
		}
		ok, err := tryLock(f)
		if err == nil && !ok {
			err = fault(sealfs.ErrBusy, "store %s is served by another process: it is open in a copy of this data directory; stop that one first", store)
		}
		if err != nil {
			f.Close()
			return lock{}, err
		}
		// Whoever ends cleanly removes the file: what is locked must still be it.
		if mine, err := f.Stat(); err == nil {
			if there, err := os.Stat(path); err == nil && os.SameFile(mine, there) {
				return lock{f}, nil
			}
		}
		f.Close()
	}
}

// Stores returns the stores of a data directory with absolute paths: those of its
// server if it has one, else those of `sealfs up`.
func (d Dir) Stores() ([]Store, error) {
	inv, err := d.inventory()
	if err != nil {
		return nil, err
	}
	if len(inv.Disks) == 0 {
		return nil, fault(sealfs.ErrNotExist, "%s is not formatted: `sealfs up --data %s` formats it", d, d)
	}
	var list []Store
	for _, k := range inv.Disks {
		list = append(list, d.diskStore(k))
	}
	return list, nil
}

func (d Dir) stores(cfg *Config) []Store {
	var list []Store
	for _, s := range cfg.Stores {
		s.Device, s.Region = d.abs(s.Device), d.abs(s.Region)
		list = append(list, s)
	}
	return list
}
