package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/pflag"

	"sealfs/node"
)

// mountCommands are those that mount volumes and look after mounts.
func mountCommands() []command {
	return []command{
		{
			name: "mount", group: "Mounts", args: "VOLUME MOUNTPOINT", min: 2, max: 2, data: true, cluster: true, daemon: true, json: true,
			short: "Mount a volume, from a cluster or of a data directory",
			long: `
With --manager: mounts a volume of a cluster. The mount daemon of this machine
does it; it is started if it does not run. Without: mounts a volume of a data
directory on which ` + "`sealfs up`" + ` runs, in a process of its own. Returns when the
volume is mounted.

Options after -o, separated by commas: ro, allow_other, noallow_other, suid, dev,
debug; from a cluster also timeout=SECONDS (how long a call waits for a server that
is away before it fails with EIO; default 0, for ever) and conns=N (connections to each server; default 2).
In /etc/fstab: A,B,C:/VOLUME MOUNTPOINT sealfs _netdev,nofail 0 0`,
			examples: []string{
				"sealfs mount --manager 127.0.0.1:8081 main /mnt/sealfs",
				"sealfs mount --manager m1:8081,m2:8081,m3:8081 -o timeout=30,conns=4 photos /mnt/photos",
				"sealfs mount --data ~/fs -o ro photos ~/photos",
				"sealfs mount --foreground main /mnt/again",
			},
			setup: setupMount,
		},
		{
			name: "umount", group: "Mounts", args: "MOUNTPOINT", min: 1, max: 1, daemon: true,
			aliases: []string{"unmount"},
			short:   "Unmount",
			long: `
Unmounts SealFS from a mount point, whatever serves it. A mount of the daemon is
not mounted again by the next daemon; the process of a further mount ends.`,
			examples: []string{"sealfs umount /mnt/again", "sealfs umount --lazy /mnt/again    # although files are open"},
			setup: func(f *pflag.FlagSet) func(context.Context, *call) error {
				lazy := f.BoolP("lazy", "l", false, "detach now, although it is in use")
				return func(ctx context.Context, c *call) error { return umount(ctx, c, *lazy) }
			},
		},
		{
			name: "list-mountpoints", group: "Mounts", daemon: true, json: true,
			short:    "List the mounts of the mount daemon",
			examples: []string{"sealfs list-mountpoints", "sealfs list-mountpoints --json"},
			setup: func(*pflag.FlagSet) func(context.Context, *call) error {
				return listMounts
			},
		},
		{
			name: "probe", group: "Mounts", args: "MOUNTPOINT", min: 1, max: 1, daemon: true, json: true,
			short: "Find out whether a mount is alive",
			long: `
Asks the mount itself for its free space, for at most --timeout, and the daemon
which servers it reaches. Exits with 0 if the mount answers.`,
			examples: []string{"sealfs probe /mnt/sealfs", "sealfs probe --timeout 2s --json /mnt/sealfs"},
			setup: func(f *pflag.FlagSet) func(context.Context, *call) error {
				timeout := f.Duration("timeout", 5*time.Second, "how long the mount may take to answer")
				return func(ctx context.Context, c *call) error { return probe(ctx, c, *timeout) }
			},
		},
		{
			name: "daemon", group: "Mounts", json: true,
			short: "Start the mount daemon of this machine",
			long: `
Serves all mounts from clusters, in one process, in the background unless told
otherwise. ` + "`sealfs mount`" + ` starts it when it is needed. It remembers its mounts: a
daemon that is started after another has ended, killed or not, mounts them again.`,
			examples: []string{"sealfs daemon", "sealfs daemon --data /run/sealfs --foreground    # under systemd"},
			setup: func(f *pflag.FlagSet) func(context.Context, *call) error {
				return setupRole(f, node.RoleDaemon, node.DefaultDaemonDir, func(ctx context.Context, _ *call, d node.Dir, v *node.Values, detached bool) (process, error) {
					return node.StartDaemon(ctx, node.DaemonOptions{Dir: d, Values: v, Detached: detached})
				})
			},
		},
	}
}

func setupMount(f *pflag.FlagSet) func(context.Context, *call) error {
	options := f.StringP("options", "o", "", "mount options, separated by commas")
	readOnly := f.Bool("read-only", false, "the same as -o ro")
	foreground := f.Bool("foreground", false, "stay in the foreground until interrupted (of a data directory only)")
	return func(ctx context.Context, c *call) error {
		if *readOnly {
			*options = joinOptions(*options, "ro")
		}
		point, err := absolute(c.args[1])
		if err != nil {
			return err
		}
		if point == "" {
			return usagef("the name of the mount point is empty")
		}
		managers, err := c.managers()
		if err != nil {
			return err
		}
		if managers != nil {
			if *foreground {
				return usagef("--foreground: mounts from a cluster are served by the daemon: `sealfs daemon --foreground`")
			}
			return mountCluster(ctx, c, node.MountSpec{Managers: managers, Volume: c.args[0], Mount: point, Options: *options})
		}
		return mountData(ctx, c, point, *options, *foreground)
	}
}

// mountData mounts a volume of a data directory in a process of its own.
func mountData(ctx context.Context, c *call, point, options string, foreground bool) error {
	d, err := c.dir()
	if err != nil {
		return err
	}
	if foreground {
		rep := node.NewReporter()
		return serve(ctx, c, rep, func() (process, error) {
			return node.Mount(ctx, node.MountOptions{Dir: d, Volume: c.args[0], Mount: point, Options: options, Detached: rep != nil})
		})
	}
	return background(ctx, c, []string{"mount", "--foreground", "--data=" + d.String(), "--options=" + options, "--", c.args[0], point})
}

// mountCluster has the daemon mount a volume, and starts one if none runs.
func mountCluster(ctx context.Context, c *call, spec node.MountSpec) error {
	a, d, err := c.mounts()
	if err != nil {
		return err
	}
	defer a.Close()
	m, err := a.Mount(ctx, spec, func() error {
		_, err := node.Background(ctx, []string{"daemon", "--foreground", "--data=" + d.String()})
		return err
	})
	if err != nil {
		return err
	}
	if c.json {
		return writeJSON(c.out, m)
	}
	_, err = fmt.Fprintf(c.out, "mounted: %s (volume %s, session %d, daemon %d)\n", m.Mount, m.Volume, m.Session, m.PID)
	return err
}

// umount asks the daemon if it is its mount, and else unmounts itself.
func umount(ctx context.Context, c *call, lazy bool) error {
	a, _, err := c.mounts()
	if err != nil {
		return err
	}
	defer a.Close()
	m, ok, err := a.Find(ctx, c.args[0])
	if err == nil && ok {
		return a.Unmount(ctx, m.Mount, lazy)
	}
	return node.Unmount(c.args[0], lazy)
}

func listMounts(ctx context.Context, c *call) error {
	a, _, err := c.mounts()
	if err != nil {
		return err
	}
	defer a.Close()
	list := []node.MountStatus{}
	if a.Running() {
		if list, err = a.List(ctx); err != nil {
			return err
		}
	}
	if c.json {
		return writeJSON(c.out, list)
	}
	t := tabwriter.NewWriter(c.out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "MOUNTPOINT\tVOLUME\tMANAGERS\tSESSION\tSTATE\tOPTIONS")
	for _, m := range list {
		state := m.State
		if m.Reason != "" {
			state += ": " + m.Reason
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%d\t%s\t%s\n", m.Mount, m.Volume, strings.Join(m.Managers, ","), m.Session, state, cmp.Or(m.Options, "-"))
	}
	return t.Flush()
}

func probe(ctx context.Context, c *call, timeout time.Duration) error {
	a, _, err := c.mounts()
	if err != nil {
		return err
	}
	defer a.Close()
	p, err := a.Probe(ctx, c.args[0], timeout)
	if err != nil {
		return err
	}
	if c.json {
		if err := writeJSON(c.out, p); err != nil {
			return err
		}
	} else {
		word := "alive"
		if !p.Alive {
			word = "dead"
		}
		fmt.Fprintf(c.out, "%s\n  mount    %s\n", word, p.Mount)
		if p.Daemon != nil {
			fmt.Fprintf(c.out, "  daemon   process %d, session %d, %s\n", p.Daemon.PID, p.Daemon.Session, p.Daemon.State)
			for _, s := range p.Daemon.Servers {
				fmt.Fprintf(c.out, "  server   %s is %s\n", s.Addr, s.State)
			}
		}
	}
	if !p.Alive {
		return fmt.Errorf("%s: %s", p.Mount, p.Reason)
	}
	return nil
}

// Exit statuses of mount helpers, as mount(8) has them.
const (
	mountUsage  = 1
	mountFailed = 32
)

// helperArgs reports whether mount(8) calls: as mount.sealfs SPEC DIR [flags], or, by way
// of mount.fuse, as sealfs SPEC DIR -o OPTIONS.
func helperArgs(argv []string) (args []string, ok bool) {
	if name := filepath.Base(argv[0]); name == "mount.sealfs" || name == "mount.fuse.sealfs" {
		return argv[1:], true
	}
	if len(argv) > 2 && strings.Contains(argv[1], ":/") {
		return argv[1:], true
	}
	return nil, false
}

const mountHelp = `Mount a SealFS volume, for mount(8).

Usage: mount.sealfs SPEC MOUNTPOINT [-sfnv] [-N NAMESPACE] [-t TYPE] [-o OPTIONS]

SPEC is MANAGER[,MANAGER...]:/VOLUME, with managers as HOST:PORT, or DIR:/VOLUME
with the data directory of ` + "`sealfs up`" + `. For options see ` + "`sealfs help mount`" + `.
`

// runMountHelper mounts as mount(8) wants it.
func runMountHelper(ctx context.Context, args []string, out, stderr io.Writer) int {
	f := pflag.NewFlagSet("mount.sealfs", pflag.ContinueOnError)
	f.SetOutput(io.Discard)
	options := f.StringArrayP("options", "o", nil, "")
	fake := f.BoolP("fake", "f", false, "")
	f.BoolP("sloppy", "s", false, "")
	f.BoolP("no-mtab", "n", false, "")
	f.BoolP("verbose", "v", false, "")
	f.StringP("namespace", "N", "", "")
	f.StringP("type", "t", "", "")
	err := f.Parse(args)
	if errors.Is(err, pflag.ErrHelp) {
		fmt.Fprint(out, mountHelp)
		return 0
	}
	if err == nil && f.NArg() != 2 {
		err = errors.New("SPEC and MOUNTPOINT are needed")
	}
	if err != nil {
		fmt.Fprintf(stderr, "mount.sealfs: %v; see `mount.sealfs --help`\n", err)
		return mountUsage
	}
	place, volume, ok := cutSpec(f.Arg(0))
	if !ok {
		fmt.Fprintf(stderr, "mount.sealfs: %q is not MANAGER[,MANAGER...]:/VOLUME, such as 127.0.0.1:8081:/main\n", f.Arg(0))
		return mountUsage
	}
	if *fake {
		return 0
	}
	line := []string{"mount", "--manager=" + place}
	if filepath.IsAbs(place) {
		line = []string{"mount", "--data=" + place}
	}
	line = append(line, "--options="+strings.Join(*options, ","), "--", volume, f.Arg(1))
	if run(ctx, line, io.Discard, stderr) != 0 {
		return mountFailed
	}
	return 0
}

// cutSpec divides PLACE:/VOLUME.
func cutSpec(spec string) (place, volume string, ok bool) {
	i := strings.LastIndex(spec, ":/")
	if i <= 0 {
		return "", "", false
	}
	place, volume = spec[:i], spec[i+2:]
	return place, volume, volume != "" && !strings.Contains(volume, "/")
}
