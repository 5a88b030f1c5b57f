package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"strconv"
	"time"

	"github.com/spf13/pflag"
	"golang.org/x/sys/unix"

	"sealfs/node"
)

// processCommands are those that start and end processes.
func processCommands() []command {
	return []command{
		{
			name: "up", group: "Run", data: true, json: true,
			short: "Start everything on this machine, and mount",
			long: `
Starts manager, server and mount in one process in the background, and returns
when the default volume, "main", is mounted. An empty data directory is
formatted first; its device image and region are sparse files: they take up
space as they fill. With --device the store is on that device, which must be
empty or come fresh from mkfs.sealfs (then with its --region). Mount points that a killed process left behind are cleared.
As root the mount is for all users; as an ordinary user fusermount3 is needed.

The last flags are options: the environment variable SEALFS_NAME, in capitals
and with underscores, sets each of them too, and so does DIR/config.yaml.`,
			examples: []string{
				"sealfs up --data /var/lib/sealfs --mount /mnt/sealfs",
				"sealfs up --data ~/fs --mount ~/mnt --size 100G --durability sync",
				"sealfs up --data /var/lib/sealfs --device /dev/sdb --mount /mnt/sealfs",
				"sealfs up --data /srv/fs --mount /mnt --foreground    # under systemd, or to see what happens",
			},
			setup: setupUp,
		},
		{
			name: "down", group: "Run", data: true, json: true,
			short: "End all processes of a data directory",
			long: `
Unmounts and ends the main process and all further mounts cleanly, and clears
what killed processes left. What still has files open there gets errors. It is
a success if nothing runs.`,
			examples: []string{"sealfs down --data /var/lib/sealfs", "sealfs down --timeout 5s --force"},
			setup:    setupDown,
		},
		{
			name: "destroy", group: "Run", data: true,
			short: "Remove a data directory and all that is in it",
			long: `
Removes what SealFS made in the data directory: all volumes are lost. Files that
SealFS did not make are left. It refuses while a process runs on the directory.`,
			examples: []string{"sealfs destroy --data /var/lib/sealfs --yes", "sealfs down --data /tmp/fs && sealfs destroy --data /tmp/fs --yes"},
			setup: func(f *pflag.FlagSet) func(context.Context, *call) error {
				yes := f.Bool("yes", false, "really do it")
				return func(_ context.Context, c *call) error {
					d, err := c.dir()
					if err != nil {
						return err
					}
					if !*yes {
						return usagef("all data in %s would be lost: add --yes if that is wanted", d)
					}
					if err := d.Destroy(); err != nil {
						return err
					}
					fmt.Fprintf(c.out, "removed %s\n", d)
					return nil
				}
			},
		},
	}
}

// process is what the commands that start one have in common.
type process interface {
	Started() node.Started
	Wait(context.Context) error
	Close() error
}

// serve starts a process, says that it is ready, and lets it run until ctx is
// done or it cannot go on.
func serve(ctx context.Context, c *call, rep *node.Reporter, start func() (process, error)) error {
	// The kernel has applied the caller's umask; ours must not be added to it.
	unix.Umask(0)
	p, err := start()
	if err == nil && ctx.Err() != nil { // told to end before anybody could use it
		err = errors.Join(context.Cause(ctx), p.Close())
	}
	if err != nil {
		return errors.Join(err, rep.Failed(err))
	}
	if rep == nil {
		err = errors.Join(writeStarted(c, p.Started()), node.Notify("READY=1"))
	} else {
		err = rep.Ready(p.Started())
	}
	if err == nil {
		err = p.Wait(ctx)
		node.Notify("STOPPING=1") // it ends whether anybody hears that or not
	}
	return errors.Join(err, p.Close())
}

// background has this command line executed in the background.
func background(ctx context.Context, c *call, args []string) error {
	s, err := node.Background(ctx, args)
	if err != nil {
		return err
	}
	return writeStarted(c, *s)
}

func writeStarted(c *call, s node.Started) error {
	if c.json {
		return writeJSON(c.out, s)
	}
	switch {
	case s.Role == "":
		fmt.Fprintf(c.out, "running: %s (process %d)\n", s.Data, s.PID)
	case s.Addr == "":
		fmt.Fprintf(c.out, "running: %s of %s (process %d)\n", s.Role, s.Data, s.PID)
	default:
		fmt.Fprintf(c.out, "running: %s of %s at %s (process %d)\n", s.Role, s.Data, s.Addr, s.PID)
	}
	for _, st := range s.Stores {
		fmt.Fprintf(c.out, "  device  %s (%s, sparse)\n  region  %s (sparse)\n", st.Device, st.Size, st.Region)
	}
	if s.Mount != "" {
		fmt.Fprintf(c.out, "  mount   %s (volume %s)\n", s.Mount, s.Volume)
	}
	_, err := fmt.Fprintf(c.out, "  log     %s\n", s.Log)
	return err
}

func writeJSON(w io.Writer, v any) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	return e.Encode(v)
}

func setupUp(f *pflag.FlagSet) func(context.Context, *call) error {
	mount := f.String("mount", "", "mount point `directory`, made if it does not exist; without, nothing is mounted")
	var size node.Size
	f.Var(&size, "size", "`size` of the device image, such as 512M or 4G (default "+node.DefaultSize.String()+"); an existing one must have it")
	servers := f.Int("servers", 0, "`number` of stores of a new data directory, each of --size (default 1); an existing one must have it")
	device := f.String("device", "", "block `device` or image outside of DIR for a new data directory")
	region := f.String("region", "", "region `file` outside of DIR for a new data directory")
	foreground := f.Bool("foreground", false, "stay in the foreground until interrupted")
	options := node.Defaults()
	for _, o := range options {
		name, usage := o.Flag(), o.Usage
		short := ""
		if o.Key == "mount_options" {
			short = "o"
		}
		if o.Value != "" {
			usage += " (default " + o.Value + ")"
		}
		f.StringP(name, short, "", usage)
	}
	return func(ctx context.Context, c *call) error {
		d, err := c.dir()
		if err != nil {
			return err
		}
		set := make(map[string]string)
		for _, o := range options {
			if f.Changed(o.Flag()) {
				set[o.Key] = f.Lookup(o.Flag()).Value.String()
			}
		}
		if f.Changed("size") && size == 0 {
			return usagef("--size 0: a store needs some room, such as %s", node.DefaultSize)
		}
		if f.Changed("servers") && (*servers < 1 || *servers > node.ServersMax) {
			return usagef("--servers %d: from 1 to %d are possible", *servers, node.ServersMax)
		}
		for _, path := range []*string{mount, device, region} {
			if *path, err = absolute(*path); err != nil {
				return err
			}
		}
		if *foreground {
			rep := node.NewReporter()
			return serve(ctx, c, rep, func() (process, error) {
				return node.Up(ctx, node.Options{Dir: d, Mount: *mount, Size: size, Device: *device, Region: *region, Servers: *servers, Flags: set, Detached: rep != nil})
			})
		}
		args := []string{"up", "--foreground", "--data=" + d.String(), "--mount=" + *mount, "--device=" + *device, "--region=" + *region}
		if size != 0 {
			args = append(args, "--size="+size.String())
		}
		if *servers != 0 {
			args = append(args, "--servers="+strconv.Itoa(*servers))
		}
		for _, o := range options {
			if v, ok := set[o.Key]; ok {
				args = append(args, "--"+o.Flag()+"="+v)
			}
		}
		return background(ctx, c, args)
	}
}

// absolute makes a path absolute, since processes in the background do not run
// in our working directory; "" stays "".
func absolute(path string) (string, error) {
	if path == "" {
		return "", nil
	}
	return filepath.Abs(path)
}

func joinOptions(a, b string) string {
	if a == "" {
		return b
	}
	return a + "," + b
}

func setupDown(f *pflag.FlagSet) func(context.Context, *call) error {
	timeout := f.Duration("timeout", 60*time.Second, "how long processes may take to end")
	force := f.Bool("force", false, "kill what has not ended by then; nothing that was answered is lost")
	return func(ctx context.Context, c *call) error {
		d, err := c.dir()
		if err != nil {
			return err
		}
		if *timeout <= 0 {
			return usagef("--timeout %v: it must be positive", *timeout)
		}
		ended, err := d.Down(ctx, node.DownOptions{Timeout: *timeout, Force: *force})
		if err != nil {
			return err
		}
		if c.json {
			pids := []int{}
			for _, p := range ended {
				pids = append(pids, p.PID)
			}
			return writeJSON(c.out, map[string]any{"state": node.StateDown, "data": d.String(), "ended": pids})
		}
		if len(ended) == 0 {
			fmt.Fprintf(c.out, "down: %s (nothing was running)\n", d)
			return nil
		}
		fmt.Fprintf(c.out, "down: %s\n", d)
		for _, p := range ended {
			what := p.Role
			if p.Mount != "" {
				what += ", " + p.Mount
			}
			fmt.Fprintf(c.out, "  ended process %d (%s)\n", p.PID, what)
		}
		return nil
	}
}
