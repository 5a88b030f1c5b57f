package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"sealfs"
	"sealfs/cluster"
	"sealfs/fsck"
)

// layout reads the cluster map that the command line names, or that of the data
// directory, if there is one that is kept up to date. It returns nil if there is none.
func (c *command) layout() (*fsck.Layout, error) {
	path := c.cluster
	if path == "" && c.data != "" {
		// A server of its own keeps no copy: one beside server.yaml is of an earlier life.
		if _, err := os.Stat(filepath.Join(c.data, "server.yaml")); errors.Is(err, fs.ErrNotExist) {
			path = filepath.Join(c.data, "map")
		}
	}
	if path == "" {
		return nil, nil
	}
	text, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) && c.cluster == "" {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("cluster map: %w", err)
	}
	m, err := cluster.Decode(text)
	if err != nil {
		return nil, fmt.Errorf("cluster map %s: %w; name the devices themselves to check without it", path, err)
	}
	l := &fsck.Layout{Cluster: m.Cluster}
	for _, s := range m.Table {
		var id sealfs.UUID
		if len(s.Replicas) > 0 {
			id = m.Stores[s.Replicas[0]].ID
		}
		l.Store = append(l.Store, id)
	}
	return l, nil
}
