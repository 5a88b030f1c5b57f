package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"text/tabwriter"

	"github.com/spf13/pflag"

	"sealfs/bench"
	"sealfs/cluster"
	lsfslayout "sealfs/lsfs/layout"
	"sealfs/node"
	pmemlayout "sealfs/pmem/layout"
	"sealfs/wire"
)

// lookCommands are those that show, measure and explain.
func lookCommands() []command {
	return []command{
		{
			name: "status", group: "Look", data: true, cluster: true, json: true,
			short: "Show what runs on a data directory, or how a cluster is",
			long: `
Begins with one word. Of a data directory: running, degraded (runs, but something
failed), busy (starts, stops or hangs), down, or empty (never formatted). Of a
cluster, with --manager: running, degraded, or unavailable (no manager leads: files
stay usable, nothing can be changed).`,
			examples: []string{"sealfs status", "sealfs status --data ~/fs --json", "sealfs status --manager 127.0.0.1:8081", `sealfs status --json | jq -r '.stores[].device'`},
			setup: func(*pflag.FlagSet) func(context.Context, *call) error {
				return func(ctx context.Context, c *call) error {
					if addrs, err := c.managers(); err != nil {
						return err
					} else if addrs != nil {
						return clusterStatus(ctx, c)
					}
					d, err := c.dir()
					if err != nil {
						return err
					}
					s, err := d.Status(ctx)
					if err != nil {
						return err
					}
					if c.json {
						return writeJSON(c.out, s)
					}
					_, err = s.WriteTo(c.out)
					return err
				}
			},
		},
		{
			name: "list-servers", group: "Look", data: true, cluster: true, json: true,
			short:    "List the stores of the cluster",
			examples: []string{"sealfs list-servers", "sealfs list-servers --manager 127.0.0.1:8081 --json"},
			setup: func(*pflag.FlagSet) func(context.Context, *call) error {
				return listServers
			},
		},
		{
			name: "locate", group: "Look", args: "FILE", min: 1, max: 1, data: true, daemon: true, json: true,
			short: "Show which stores hold a file",
			long: `
Takes a file on a mount of the mount daemon, or of the data directory.`,
			examples: []string{"sealfs locate /mnt/sealfs/some/file", "sealfs locate --data ~/fs --json ~/mnt/x"},
			setup: func(*pflag.FlagSet) func(context.Context, *call) error {
				return locate
			},
		},
		{
			name: "bench", group: "Look", args: "DIR", min: 1, max: 1, json: true,
			short: "Measure small files in a directory of any file system",
			long: `
Creates, stats, reads, lists and removes files of several sizes in a new
directory under DIR, with several workers at once, and prints rates and
latencies. With --external it runs mdtest and IOR instead, where installed.`,
			examples: []string{
				"sealfs bench /mnt/sealfs",
				"sealfs bench --workers 8 --processes --files 10000 --sizes 0,4096 /mnt/sealfs",
				"sealfs bench --json /mnt/other > other.json",
			},
			setup: setupBench,
		},
		{
			name: "config", group: "Other", args: "show", min: 1, max: 1, data: true, json: true,
			short:    "Show the options that hold, and what set them",
			examples: []string{"sealfs config show", "SEALFS_CACHE=64M sealfs config show --data ~/fs"},
			setup: func(*pflag.FlagSet) func(context.Context, *call) error {
				return showConfig
			},
		},
		{
			name: "version", group: "Other", json: true,
			short:    "Show the versions of program, protocol and formats",
			examples: []string{"sealfs version", "sealfs version --json"},
			setup: func(*pflag.FlagSet) func(context.Context, *call) error {
				return showVersion
			},
		},
	}
}

// server is one row of list-servers.
type server struct {
	cluster.StoreInfo
	Used   uint64 `json:"used"`
	Files  int64  `json:"files"`
	Shards int    `json:"primary_of"`
}

func clusterStatus(ctx context.Context, c *call) error {
	return inCluster(c, func(k *node.Cluster) error { return writeClusterStatus(ctx, c, k) })
}

func writeClusterStatus(ctx context.Context, c *call, k *node.Cluster) error {
	s, err := k.Status(ctx)
	if err != nil {
		return err
	}
	if c.json {
		return writeJSON(c.out, s)
	}
	_, err = s.WriteTo(c.out)
	return err
}

func listServers(ctx context.Context, c *call) error {
	if addrs, err := c.managers(); err != nil {
		return err
	} else if addrs != nil {
		return listClusterServers(ctx, c)
	}
	return admin(c, func(a *node.Admin) error {
		m, err := a.Map(ctx)
		if err != nil {
			return err
		}
		run, err := a.Running(ctx)
		if err != nil {
			return err
		}
		list := []server{}
		for i, s := range m.Stores {
			row := server{StoreInfo: s}
			for _, shard := range m.Table {
				if len(shard.Replicas) > 0 && int(shard.Replicas[0]) == i {
					row.Shards++
				}
			}
			for _, r := range run.Stores {
				if r.ID == s.ID {
					row.Used, row.Files = uint64(max(r.Stats.Live, 0)), r.Files
				}
			}
			list = append(list, row)
		}
		return writeServers(c, list)
	})
}

// listClusterServers lists the stores as the leading manager knows them.
func listClusterServers(ctx context.Context, c *call) error {
	return inCluster(c, func(k *node.Cluster) error {
		stores, err := k.Stores(ctx)
		if err != nil {
			return err
		}
		list := []server{}
		for _, s := range stores {
			list = append(list, server{s.StoreInfo, s.Used, int64(s.Inodes), s.Primary})
		}
		return writeServers(c, list)
	})
}

func writeServers(c *call, list []server) error {
	if c.json {
		return writeJSON(c.out, list)
	}
	t := tabwriter.NewWriter(c.out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "STORE\tADDRESS\tHOST\tSTATE\tSIZE\tUSED\tFILES\tSHARDS")
	for _, s := range list {
		if s.State == cluster.StoreLeft {
			continue // for ever; scripts see it
		}
		addr, state := cmp.Or(s.Addr, "this process"), s.State.String()
		if s.Bad {
			state += ", bad"
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t%s\t%d\t%d\n", s.ID, addr, cmp.Or(s.Host, "-"), state, node.Size(s.Bytes).About(), node.Size(s.Used).About(), s.Files, s.Shards)
	}
	return t.Flush()
}

func locateFile(ctx context.Context, c *call) (node.Location, error) {
	a, _, err := c.mounts()
	if err != nil {
		return node.Location{}, err
	}
	defer a.Close()
	if l, ok, err := a.Locate(ctx, c.args[0]); ok || err != nil {
		return l, err
	}
	d, err := c.dir()
	if err != nil {
		return node.Location{}, err
	}
	return d.Locate(ctx, c.args[0])
}

func locate(ctx context.Context, c *call) error {
	l, err := locateFile(ctx, c)
	if err != nil {
		return err
	}
	if c.json {
		return writeJSON(c.out, l)
	}
	fmt.Fprintf(c.out, "%s: inode %d of volume %s, shard %d (epoch %d)\n", l.Path, l.Ino, l.Volume, l.Shard, l.Epoch)
	for i, r := range l.Replicas {
		role := "primary"
		if i > 0 {
			role = "replica"
		}
		fmt.Fprintf(c.out, "  %s  store %s (%s) %s\n", role, r.Store, r.State, cmp.Or(r.Device, r.Addr))
	}
	return nil
}

func setupBench(f *pflag.FlagSet) func(context.Context, *call) error {
	o := bench.DefaultOptions("")
	phases := f.StringSlice("phases", o.Phases, "`phases` in order, of mkdir, create, stat, read, readdir, remove, rmdir")
	sizes := f.StringSlice("sizes", []string{"0", "3901", "4K", "64K"}, "file `sizes`")
	f.IntVar(&o.Files, "files", o.Files, "files of each worker")
	f.IntVar(&o.Workers, "workers", o.Workers, "workers at once")
	f.BoolVar(&o.Processes, "processes", false, "workers are processes, not threads")
	f.BoolVar(&o.Shared, "shared", false, "all workers in one directory")
	f.BoolVar(&o.Shuffle, "shuffle", false, "visit files in random order")
	f.BoolVar(&o.Fsync, "fsync", false, "fsync each file that is created")
	f.BoolVar(&o.DropCaches, "drop-caches", false, "drop the kernel's caches before each phase (root)")
	f.IntVar(&o.Repeat, "repeat", o.Repeat, "runs, of which medians are printed")
	noVerify := f.Bool("no-verify", false, "do not compare what is read")
	f.Uint64Var(&o.Seed, "seed", 0, "seed of contents and order")
	external := f.StringSlice("external", nil, "run these `workloads` of IO500 instead: mdtest-easy, mdtest-hard, ior-easy, ior-hard, or all")
	percent := f.Int("percent", 100, "with --external: scale of the workloads")
	return func(ctx context.Context, c *call) error {
		o.Dir, o.Phases, o.Verify, o.Sizes = c.args[0], *phases, !*noVerify, nil
		for _, s := range *sizes {
			n, err := node.ParseSize(strings.TrimSpace(s))
			if err != nil {
				return fmt.Errorf("--sizes: %w", err)
			}
			o.Sizes = append(o.Sizes, int64(n))
		}
		var r *bench.Report
		var err error
		if len(*external) > 0 {
			x := bench.External{Dir: c.args[0], Workloads: *external, Percent: *percent, Processes: o.Workers, DropCaches: o.DropCaches, Progress: c.stderr}
			if slices.Equal(*external, []string{"all"}) {
				x.Workloads = nil
			}
			r, err = bench.RunExternal(ctx, x)
		} else {
			o.Progress = c.stderr
			r, err = bench.Run(ctx, o)
		}
		if r == nil {
			return err
		}
		if c.json {
			return errors.Join(err, r.WriteJSON(c.out))
		}
		return errors.Join(err, r.WriteTable(c.out))
	}
}

func showConfig(_ context.Context, c *call) error {
	if c.args[0] != "show" {
		return usagef("config %q: only `sealfs config show` is known", c.args[0])
	}
	d, err := c.dir()
	if err != nil {
		return err
	}
	cfg, err := d.Config()
	if err != nil {
		return err
	}
	_, options, err := cfg.Effective(nil, os.Getenv)
	if err != nil {
		return err
	}
	stores := []node.Store{}
	if s, err := d.Stores(); err == nil {
		stores = s
	}
	if c.json {
		return writeJSON(c.out, map[string]any{"data": d.String(), "cluster": cfg.Cluster, "shards": cfg.Shards, "stores": stores, "options": options})
	}
	t := tabwriter.NewWriter(c.out, 0, 0, 2, ' ', 0)
	fmt.Fprintf(t, "data\t%s\tset by --data, SEALFS_DATA or default\n", d)
	for _, s := range stores {
		fmt.Fprintf(t, "store\t%s\t%s, fixed since it was formatted\n", s.ID, s.Size)
	}
	if cfg.Shards > 0 {
		fmt.Fprintf(t, "shards\t%d\tfixed since it was formatted\n", cfg.Shards)
	}
	for _, o := range options {
		fmt.Fprintf(t, "%s\t%s\t%s\n", o.Key, o.Value, o.Source)
	}
	return t.Flush()
}

// versions is what version prints.
type versions struct {
	Version  string `json:"version"`
	Revision string `json:"revision,omitempty"`
	Modified bool   `json:"modified,omitempty"`
	Go       string `json:"go"`
	Platform string `json:"platform"`
	Protocol int    `json:"protocol"`
	Device   int    `json:"device_format"`
	Region   int    `json:"region_format"`
}

func showVersion(_ context.Context, c *call) error {
	v := versions{
		Version: "(devel)", Go: runtime.Version(), Platform: runtime.GOOS + "/" + runtime.GOARCH,
		Protocol: wire.ProtocolVersion, Device: lsfslayout.Version, Region: pmemlayout.Version,
	}
	if info, ok := debug.ReadBuildInfo(); ok {
		if info.Main.Version != "" {
			v.Version = info.Main.Version
		}
		for _, s := range info.Settings {
			switch s.Key {
			case "vcs.revision":
				v.Revision = s.Value
			case "vcs.modified":
				v.Modified = s.Value == "true"
			}
		}
	}
	if c.json {
		return writeJSON(c.out, v)
	}
	_, err := fmt.Fprintf(c.out, "sealfs %s (%s, %s)\nprotocol %d, device format %d, region format %d\n", v.Version, v.Go, v.Platform, v.Protocol, v.Device, v.Region)
	return err
}
