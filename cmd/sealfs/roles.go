package main

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strings"
	"text/tabwriter"

	"github.com/spf13/pflag"

	"sealfs/node"
)

// roleCommands are those that start the processes of a cluster.
func roleCommands() []command {
	return []command{
		{
			name: "manager", group: "Cluster", args: "[recover]", max: 1, data: true, json: true,
			short: "Run a manager of a cluster",
			long: `
Managers know which servers there are and where everything lies; a cluster has
one, three or five. The first one is started with --bootstrap, the others with
--join; both count only as long as there is no manager in the data directory. It
stays in the foreground unless --background is given, which returns when it is ready.
A data directory that ` + "`sealfs up`" + ` made can be used too, after ` + "`sealfs down`" + `: from then
on it is no longer up's.

recover makes the manager of a directory the only one of its cluster. It is for when
most managers are lost for good; these must never be started again.`,
			examples: []string{
				"sealfs manager --data /srv/m1 --listen 127.0.0.1:8081 --bootstrap --background",
				"sealfs manager --data /srv/m2 --listen 127.0.0.1:8082 --join 127.0.0.1:8081 --background",
				"sealfs manager --data /srv/m1 --config /etc/sealfs/manager.yaml    # under systemd",
				"sealfs manager recover --data /srv/m2 --yes",
			},
			setup: setupManager,
		},
		{
			name: "server", group: "Cluster", data: true, json: true,
			short: "Run a server of a cluster: it serves disks",
			long: `
Serves the files on the disks of this machine. Its identity and its disks are
remembered in the data directory: a disk needs to be named only once. A disk is a
block device or an image file; an image that does not exist is made if size= is
given, a blank device is formatted if format is given, and what belongs to another
cluster is refused. The metadata of a disk lies in a region, a file in the data
directory unless region= says otherwise. It waits for a manager, and stays in the
foreground unless --background is given. A data directory that ` + "`sealfs up`" + ` made can be
used too: its stores are the disks.`,
			examples: []string{
				"sealfs server --data /srv/s1 --manager 127.0.0.1:8081 --disk /srv/s1.img,size=10G --background",
				"sealfs server --data /srv/s1 --manager m1:8081,m2:8081,m3:8081 --disk /dev/sdb,format --disk /dev/sdc,format,weight=2000",
				"sealfs server --data /srv/s1 --config /etc/sealfs/server.yaml    # under systemd",
			},
			setup: func(f *pflag.FlagSet) func(context.Context, *call) error {
				return setupRole(f, node.RoleServer, nil, func(ctx context.Context, c *call, d node.Dir, v *node.Values, detached bool) (process, error) {
					o := node.ServerOptions{Dir: d, Values: v, Detached: detached}
					if !detached {
						o.Say = func(text string) { fmt.Fprintf(c.stderr, "sealfs: server: %s\n", text) }
					}
					return node.StartServer(ctx, o)
				})
			},
		},
		{
			name: "disk", group: "Cluster", args: "list|add|drain|bad|good|remove [DISK]", min: 1, max: 2, data: true, json: true,
			short: "List and change the disks of a server that runs",
			long: `
list shows the disks. add takes DEVICE[,region=FILE][,size=SIZE][,weight=N][,format], as
` + "`sealfs server --disk`" + ` does. bad keeps new data away from a disk, and good
takes that back. remove takes a disk that holds no shard out of the cluster for ever.
drain is refused as long as a disk holds shards: they cannot be moved yet.
DISK is a device, or a store's id.`,
			examples: []string{
				"sealfs disk list --data /srv/s1",
				"sealfs disk add --data /srv/s1 /dev/sdd,format",
				"sealfs disk bad --data /srv/s1 /dev/sdb",
			},
			setup: func(*pflag.FlagSet) func(context.Context, *call) error { return disk },
		},
	}
}

// starter starts the process of a role.
type starter func(ctx context.Context, c *call, d node.Dir, v *node.Values, detached bool) (process, error)

// setupRole declares the options of a role. With dataDir the role has a --data of
// its own, and runs in the background unless told otherwise.
func setupRole(f *pflag.FlagSet, role string, dataDir func(func(string) string) string, start starter) func(context.Context, *call) error {
	config := f.String("config", "", "YAML `file` with options (default: "+role+".yaml in the directory SEALFS_CONFIG_PATH, if there is one)")
	var data *string
	var foreground, back *bool
	if dataDir != nil {
		data = f.String("data", dataDir(os.Getenv), "`directory` for sockets, log and list of mounts; SEALFS_DAEMON sets the default")
		foreground = f.Bool("foreground", false, "stay in the foreground until interrupted")
	} else {
		back = f.Bool("background", false, "run in the background, and return when it is ready")
	}
	options := node.RoleOptions(role)
	for _, o := range options {
		usage := o.Usage
		if o.Default != "" {
			usage += " (default " + o.Default + ")"
		}
		switch o.Kind {
		case node.OptionFlag:
			f.Bool(o.Flag(), false, usage)
		case node.OptionList:
			f.StringArray(o.Flag(), nil, usage)
		default:
			f.String(o.Flag(), "", usage)
		}
	}
	return func(ctx context.Context, c *call) error {
		if data != nil {
			c.data = *data
		}
		d, err := c.dir()
		if err != nil {
			return err
		}
		if *config, err = absolute(*config); err != nil {
			return err
		}
		set, err := roleFlags(f, options)
		if err != nil {
			return err
		}
		v, err := node.Gather(role, *config, set, os.Getenv)
		if err != nil {
			return err
		}
		if data != nil && *foreground || data == nil && !*back {
			rep := node.NewReporter()
			return serve(ctx, c, rep, func() (process, error) { return start(ctx, c, d, v, rep != nil) })
		}
		args := []string{role, "--data=" + d.String(), "--config=" + *config}
		if data != nil {
			args = append(args, "--foreground")
		}
		for _, o := range options {
			for _, text := range set[o.Key] {
				args = append(args, "--"+o.Flag()+"="+text)
			}
		}
		return background(ctx, c, args)
	}
}

// roleFlags returns the options that were set by flags, with absolute paths.
func roleFlags(f *pflag.FlagSet, options []node.RoleOption) (map[string][]string, error) {
	set := make(map[string][]string)
	for _, o := range options {
		if !f.Changed(o.Flag()) {
			continue
		}
		if o.Kind != node.OptionList {
			set[o.Key] = []string{f.Lookup(o.Flag()).Value.String()}
			continue
		}
		list, err := f.GetStringArray(o.Flag())
		if err != nil {
			return nil, err
		}
		for _, text := range list {
			if o.Key == "disk" {
				if text, err = node.AbsDisk(text); err != nil {
					return nil, err
				}
			}
			set[o.Key] = append(set[o.Key], text)
		}
	}
	return set, nil
}

func setupManager(f *pflag.FlagSet) func(context.Context, *call) error {
	yes := f.Bool("yes", false, "with recover: really do it")
	start := setupRole(f, node.RoleManager, nil, func(ctx context.Context, _ *call, d node.Dir, v *node.Values, detached bool) (process, error) {
		return node.StartManager(ctx, node.ManagerOptions{Dir: d, Values: v, Detached: detached})
	})
	return func(ctx context.Context, c *call) error {
		if len(c.args) == 0 {
			return start(ctx, c)
		}
		if c.args[0] != "recover" {
			return usagef("manager %q: only `sealfs manager recover` is known", c.args[0])
		}
		d, err := c.dir()
		if err != nil {
			return err
		}
		if !*yes {
			return usagef("the manager of %s would be the only one of its cluster, and what the others acknowledged last may be missing: add --yes if most of them are lost for good", d)
		}
		config, err := f.GetString("config")
		if err != nil {
			return err
		}
		set, err := roleFlags(f, node.RoleOptions(node.RoleManager))
		if err != nil {
			return err
		}
		v, err := node.Gather(node.RoleManager, config, set, os.Getenv)
		if err != nil {
			return err
		}
		if err := node.RecoverManager(ctx, d, v); err != nil {
			return err
		}
		fmt.Fprintf(c.out, "recovered: the manager of %s is alone now; start it, and join others with new data directories\n", d)
		return nil
	}
}

func disk(ctx context.Context, c *call) error {
	d, err := c.dir()
	if err != nil {
		return err
	}
	a := d.Disks()
	defer a.Close()
	verb := c.args[0]
	if want := verb != "list"; want != (len(c.args) == 2) || !slices.Contains([]string{"list", "add", "drain", "bad", "good", "remove"}, verb) {
		return usagef("usage: sealfs disk list, or sealfs disk add|drain|bad|good|remove DISK; see `sealfs help disk`")
	}
	switch verb {
	case "list":
		list, err := a.List(ctx)
		if err != nil {
			return err
		}
		return writeDisks(c, list)
	case "add":
		text, err := node.AbsDisk(c.args[1])
		if err != nil {
			return err
		}
		k, err := a.Add(ctx, text)
		if err != nil {
			return err
		}
		return writeDisks(c, []node.DiskStatus{k})
	case "drain":
		err = a.Drain(ctx, c.args[1])
	case "remove":
		err = a.Remove(ctx, c.args[1])
	default:
		err = a.SetBad(ctx, c.args[1], verb == "bad")
	}
	if err != nil {
		return err
	}
	word := map[string]string{"drain": "drained", "remove": "removed", "bad": "marked bad", "good": "marked good"}[verb]
	_, err = fmt.Fprintf(c.out, "%s: %s\n", word, c.args[1])
	return err
}

func writeDisks(c *call, list []node.DiskStatus) error {
	if c.json {
		return writeJSON(c.out, list)
	}
	t := tabwriter.NewWriter(c.out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "STORE\tDEVICE\tSTATE\tSIZE\tUSED\tFILES\tSHARDS")
	for _, k := range list {
		state := k.State
		if k.Bad {
			state += ", bad"
		}
		if k.Reason != "" {
			state += ": " + strings.TrimSpace(k.Reason)
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t%d\t%d\n", k.ID, k.Device, state, k.Size, node.Size(k.Used).About(), k.Files, k.Shards)
	}
	return t.Flush()
}
