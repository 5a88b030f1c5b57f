package fsck

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"go.yaml.in/yaml/v4"

	"sealfs"
)

// RegionName is the name of a region's file beside its device image.
const RegionName = "region"

// Place says where a store lies.
type Place struct {
	Device string `yaml:"device"`
	Region string `yaml:"region"` // "": the file "region" beside the device

	// Formatting marks a store whose formatting has not ended: there is nothing to check.
	Formatting bool `yaml:"formatting"`
}

// Stores returns the places of all stores of a data directory: those that
// server.yaml lists, or else config.yaml, or else, for directories that have lost both,
// those of stores/*/device.img that have a region beside them or miss only one of the two.
func Stores(dir string) ([]Place, error) {
	for _, list := range []string{"server.yaml", "config.yaml"} {
		places, err := listed(dir, list)
		if err != nil || len(places) > 0 {
			return places, err
		}
	}
	var devices []string
	for _, name := range []string{"device.img", RegionName} {
		found, err := filepath.Glob(filepath.Join(dir, "stores", "*", name))
		if err != nil {
			return nil, fmt.Errorf("data directory %q: %w", dir, sealfs.ErrInvalid)
		}
		for _, path := range found {
			devices = append(devices, filepath.Join(filepath.Dir(path), "device.img"))
		}
	}
	slices.Sort(devices)
	var places []Place
	for _, d := range slices.Compact(devices) {
		places = append(places, Place{Device: d})
	}
	if len(places) == 0 {
		return nil, fmt.Errorf("no stores under %s (server.yaml, config.yaml, stores/*/device.img): %w", dir, sealfs.ErrNotExist)
	}
	return places, nil
}

// listed reads the list of stores in a file of a data directory. What else the
// file says does not matter here, so that a judge of another version can read it.
func listed(dir, list string) ([]Place, error) {
	path := filepath.Join(dir, list)
	text, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list of stores: %w", err)
	}
	var file struct {
		Formatting bool    `yaml:"formatting"`
		Stores     []Place `yaml:"stores"`
		Disks      []Place `yaml:"disks"`
	}
	if err := yaml.Load(text, &file); err != nil {
		return nil, fmt.Errorf("%s: %v: %w; name the devices themselves", path, err, sealfs.ErrInvalid)
	}
	places := slices.DeleteFunc(append(file.Stores, file.Disks...), func(p Place) bool {
		return p.Formatting || file.Formatting
	})
	for i := range places {
		p := &places[i]
		if p.Device == "" {
			return nil, fmt.Errorf("%s: store %d has no device: %w; name the devices themselves", path, i+1, sealfs.ErrInvalid)
		}
		p.Device = under(dir, p.Device)
		if p.Region != "" {
			p.Region = under(dir, p.Region)
		}
	}
	return places, nil
}

// under makes relative paths count from dir.
func under(dir, path string) string {
	if filepath.IsAbs(path) {
		return path
	}
	return filepath.Join(dir, path)
}
