package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/pflag"

	"sealfs/cluster"
	"sealfs/node"
)

// devCluster is a whole cluster on this machine, for trying out and for tests:
// DIR/cluster.json, and a data directory in DIR for each process.
type devCluster struct {
	dir      string
	Managers []string `json:"managers"` // addresses
	Servers  []string `json:"servers"`
	Disks    int      `json:"disks"` // of each server
	Size     string   `json:"size"`  // of each disk
	Mounts   int      `json:"mounts"`
}

func devClusterCommand() command {
	return command{
		name: "dev-cluster", group: "Cluster", args: "up|down|status", min: 1, max: 1, json: true,
		short: "Run a whole cluster on this machine, to try it out",
		long: `
up starts managers, servers and mounts as processes of their own on loopback, with
a data directory for each of them in DIR (manager1, server1, ..., daemon), disks that
are sparse images, and mount points mnt1, mnt2, ... of the volume main. What runs
already is left alone, so up also starts again what was killed. Ports are free ones,
or from --port on, and stay the same. down ends the processes that run on these
directories, and no others.`,
		examples: []string{
			"sealfs dev-cluster up --dir /tmp/sealfs",
			"sealfs dev-cluster up --dir /tmp/sealfs --managers 1 --servers 2 --disks 1 --mounts 1 --size 256M",
			"sealfs dev-cluster down --dir /tmp/sealfs --remove",
		},
		setup: setupDevCluster,
	}
}

func setupDevCluster(f *pflag.FlagSet) func(context.Context, *call) error {
	dir := f.String("dir", "", "`directory` for everything")
	managers := f.Int("managers", 3, "number of managers")
	servers := f.Int("servers", 4, "number of servers")
	disks := f.Int("disks", 2, "number of disks of each server")
	mounts := f.Int("mounts", 2, "number of mounts")
	size := f.String("size", "1G", "`size` of each disk")
	port := f.Int("port", 0, "first `port`, 0 for free ones")
	remove := f.Bool("remove", false, "with down: remove all that is in DIR")
	return func(ctx context.Context, c *call) error {
		if *dir == "" {
			return usagef("where? name a directory with --dir")
		}
		abs, err := filepath.Abs(*dir)
		if err != nil {
			return err
		}
		switch c.args[0] {
		case "up":
			for name, n := range map[string]int{"managers": *managers, "servers": *servers, "disks": *disks, "mounts": *mounts + 1} {
				if n < 1 || n > 16 {
					return usagef("--%s %d: from 1 to 16 are possible", name, n)
				}
			}
			k, err := loadDevCluster(abs)
			if errors.Is(err, fs.ErrNotExist) {
				k, err = newDevCluster(abs, *port, *managers, *servers)
				k.Disks, k.Size, k.Mounts = *disks, *size, *mounts
			} else if err == nil {
				for name, have := range map[string][2]int{"managers": {len(k.Managers), *managers}, "servers": {len(k.Servers), *servers}, "disks": {k.Disks, *disks}, "mounts": {k.Mounts, *mounts}} {
					if f.Changed(name) && have[0] != have[1] {
						return fmt.Errorf("%s was made with --%s %d, not %d: leave --%s away, or take another directory", abs, name, have[0], have[1], name)
					}
				}
			}
			if err != nil {
				return err
			}
			return k.up(ctx, c)
		case "down", "status":
			k, err := loadDevCluster(abs)
			if errors.Is(err, fs.ErrNotExist) && c.args[0] == "down" {
				fmt.Fprintf(c.out, "down: %s (there is no cluster)\n", abs)
				return nil
			}
			if err != nil {
				return err
			}
			if c.args[0] == "status" {
				m := node.OpenCluster(k.Managers)
				defer m.Close()
				return writeClusterStatus(ctx, c, m)
			}
			return k.down(ctx, c, *remove)
		}
		return usagef("dev-cluster %q: there are up, down and status", c.args[0])
	}
}

func loadDevCluster(dir string) (*devCluster, error) {
	k := &devCluster{dir: dir}
	text, err := os.ReadFile(k.path("cluster.json"))
	if err == nil {
		err = json.Unmarshal(text, k)
	}
	return k, err
}

// newDevCluster finds ports. All are held until all are found.
func newDevCluster(dir string, port, managers, servers int) (*devCluster, error) {
	k := &devCluster{dir: dir}
	for i := range managers + servers {
		p := 0
		if port > 0 {
			p = port + i
		}
		l, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", p))
		if err != nil {
			return k, fmt.Errorf("port %d: %w: take another --port", p, err)
		}
		defer l.Close()
		if i < managers {
			k.Managers = append(k.Managers, l.Addr().String())
		} else {
			k.Servers = append(k.Servers, l.Addr().String())
		}
	}
	return k, nil
}

func (k *devCluster) path(elem ...string) string {
	return filepath.Join(append([]string{k.dir}, elem...)...)
}

// devProcess is one of the cluster's processes: its role, directory, and how it is started.
type devProcess struct {
	role, dir string
	args      []string
}

// processes returns all of them in the order of their start.
func (k *devCluster) processes() (list []devProcess) {
	all := strings.Join(k.Managers, ",")
	for i, addr := range k.Managers {
		p := devProcess{node.RoleManager, k.path(fmt.Sprintf("manager%d", i+1)), []string{"--listen=" + addr}}
		if i == 0 {
			p.args = append(p.args, "--bootstrap")
		} else {
			p.args = append(p.args, "--join="+k.Managers[0])
		}
		list = append(list, p)
	}
	for i, addr := range k.Servers {
		name := fmt.Sprintf("server%d", i+1)
		p := devProcess{node.RoleServer, k.path(name), []string{"--manager=" + all, "--listen=" + addr, "--host=" + name}}
		for j := range k.Disks {
			p.args = append(p.args, fmt.Sprintf("--disk=%s,size=%s", k.path(name, "disks", fmt.Sprintf("%d.img", j)), k.Size))
		}
		list = append(list, p)
	}
	return append(list, devProcess{node.RoleDaemon, k.path("daemon"), []string{"--foreground"}})
}

// up starts what does not run.
func (k *devCluster) up(ctx context.Context, c *call) error {
	if err := os.MkdirAll(k.dir, 0o755); err != nil {
		return err
	}
	text, err := json.MarshalIndent(k, "", "  ")
	if err == nil {
		err = os.WriteFile(k.path("cluster.json"), text, 0o644)
	}
	if err != nil {
		return err
	}
	for _, p := range k.processes() {
		d, err := node.OpenDir(p.dir)
		if err != nil {
			return err
		}
		if p.role == node.RoleDaemon && k.Mounts == 0 || d.Runs(p.role) {
			continue
		}
		if _, err := node.Background(ctx, append([]string{p.role, "--data=" + p.dir}, p.args...)); err != nil {
			return fmt.Errorf("%s: %w", filepath.Base(p.dir), err)
		}
	}
	if err := k.volume(ctx); err != nil {
		return err
	}
	daemon, err := node.OpenDir(k.path("daemon"))
	if err != nil {
		return err
	}
	a := daemon.Mounts()
	defer a.Close()
	for i := range k.Mounts {
		spec := node.MountSpec{Managers: k.Managers, Volume: node.DefaultVolume, Mount: k.path(fmt.Sprintf("mnt%d", i+1))}
		if _, err := a.Mount(ctx, spec, func() error { return nil }); err != nil {
			return err
		}
	}
	return k.describe(c)
}

// volume makes the volume that is mounted, if there is none.
func (k *devCluster) volume(ctx context.Context) error {
	m := node.OpenCluster(k.Managers)
	defer m.Close()
	list, err := m.Volumes(ctx)
	if err != nil || slices.ContainsFunc(list, func(v node.VolumeStatus) bool { return v.Name == node.DefaultVolume }) {
		return err
	}
	_, err = m.CreateVolume(ctx, cluster.VolumeSpec{Name: node.DefaultVolume, Mode: 0o755, UID: uint32(os.Getuid()), GID: uint32(os.Getgid())})
	return err
}

func (k *devCluster) describe(c *call) error {
	if c.json {
		return writeJSON(c.out, map[string]any{"dir": k.dir, "managers": k.Managers, "servers": k.Servers, "mounts": k.mountpoints(), "daemon": k.path("daemon")})
	}
	fmt.Fprintf(c.out, "running: cluster in %s\n  managers  %s\n  servers   %s, %d disks of %s each\n", k.dir, strings.Join(k.Managers, ","), strings.Join(k.Servers, ","), k.Disks, k.Size)
	for _, p := range k.mountpoints() {
		fmt.Fprintf(c.out, "  mount     %s\n", p)
	}
	_, err := fmt.Fprintf(c.out, "  to use it: export SEALFS_MANAGER=%s SEALFS_DAEMON=%s\n", strings.Join(k.Managers, ","), k.path("daemon"))
	return err
}

func (k *devCluster) mountpoints() []string {
	list := []string{}
	for i := range k.Mounts {
		list = append(list, k.path(fmt.Sprintf("mnt%d", i+1)))
	}
	return list
}

// down ends all processes, mounts first.
func (k *devCluster) down(ctx context.Context, c *call, remove bool) error {
	n := 0
	list := k.processes()
	for _, p := range slices.Backward(list) {
		d, err := node.OpenDir(p.dir)
		if err != nil {
			return err
		}
		ended, err := d.Down(ctx, node.DownOptions{Timeout: 30 * time.Second, Force: true})
		if err != nil {
			return err
		}
		n += len(ended)
	}
	fmt.Fprintf(c.out, "down: %s (%d processes ended)\n", k.dir, n)
	if !remove {
		return nil
	}
	for _, p := range list {
		d, err := node.OpenDir(p.dir)
		if err == nil {
			_, err = os.Stat(p.dir)
		}
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err = cmp.Or(err, os.RemoveAll(k.path(filepath.Base(p.dir), "disks"))); err == nil {
			err = d.Destroy()
		}
		if err != nil {
			return err
		}
	}
	for _, path := range append(k.mountpoints(), k.path("cluster.json"), k.dir) {
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}
