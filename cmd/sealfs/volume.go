package main

import (
	"context"
	"fmt"
	"os"
	"text/tabwriter"

	"github.com/spf13/pflag"

	"sealfs/cluster"
	"sealfs/node"
)

// volumeCommands are those that make, list and delete volumes.
func volumeCommands() []command {
	return []command{
		{
			name: "create-volume", aliases: []string{"create"}, group: "Volumes", args: "NAME [SIZE]", min: 1, max: 2, data: true, cluster: true, json: true,
			short: "Create a volume",
			long: `
Creates a volume, a file tree of its own that is mounted with ` + "`sealfs mount`" + `.
SIZE limits what it may hold; without, only the stores do. Its root directory
belongs to the user who creates it.`,
			examples: []string{"sealfs create-volume photos", "sealfs create-volume --manager 127.0.0.1:8081 mail 20G --inodes 5000000", "sealfs create --data ~/fs scratch 1G --mode 1777"},
			setup:    setupCreate,
		},
		{
			name: "list-volumes", aliases: []string{"list"}, group: "Volumes", data: true, cluster: true, json: true,
			short:    "List the volumes",
			examples: []string{"sealfs list-volumes", "sealfs list-volumes --manager 127.0.0.1:8081 --json"},
			setup: func(*pflag.FlagSet) func(context.Context, *call) error {
				return listVolumes
			},
		},
		{
			name: "set-quota", group: "Volumes", args: "NAME [SIZE|none]", min: 1, max: 2, data: true, cluster: true, json: true,
			short: "Change what a volume may hold",
			long: `
Sets how much a volume may hold, also while it is mounted. What is not named stays as
it is. Where more is used already nothing is lost, but nothing grows (EDQUOT) until
there is less.`,
			examples: []string{"sealfs set-quota mail 40G", "sealfs set-quota --manager 127.0.0.1:8081 mail --inodes 10000000", "sealfs set-quota --data ~/fs mail none --inodes 0"},
			setup:    setupQuota,
		},
		{
			name: "delete-volume", aliases: []string{"delete"}, group: "Volumes", args: "NAME", min: 1, max: 1, data: true, cluster: true,
			short:    "Delete a volume and all files in it",
			long:     "Deletes a volume. It is refused while the volume is mounted. There is no way back.",
			examples: []string{"sealfs delete-volume scratch --yes", "sealfs delete-volume --data ~/fs mail --yes"},
			setup: func(f *pflag.FlagSet) func(context.Context, *call) error {
				yes := f.Bool("yes", false, "really do it")
				return func(ctx context.Context, c *call) error {
					if !*yes {
						return usagef("all files in volume %q would be lost: add --yes if that is wanted", c.args[0])
					}
					return volumes(c, func(a volumeAdmin) error {
						if err := a.DeleteVolume(ctx, c.args[0]); err != nil {
							return err
						}
						fmt.Fprintf(c.out, "deleted volume %s\n", c.args[0])
						return nil
					})
				}
			},
		},
	}
}

// admin runs f with a connection to the main process of the data directory.
func admin(c *call, f func(*node.Admin) error) error {
	d, err := c.dir()
	if err != nil {
		return err
	}
	a := d.Admin()
	defer a.Close()
	return f(a)
}

// volumeAdmin administers volumes, of a data directory or a cluster.
type volumeAdmin interface {
	Volumes(context.Context) ([]node.VolumeStatus, error)
	CreateVolume(context.Context, cluster.VolumeSpec) (node.VolumeStatus, error)
	SetQuota(context.Context, string, node.Quota) (node.VolumeStatus, error)
	DeleteVolume(context.Context, string) error
}

// volumes runs f with whoever administers the volumes that the call is about.
func volumes(c *call, f func(volumeAdmin) error) error {
	addrs, err := c.managers()
	if err != nil {
		return err
	}
	if addrs == nil {
		return admin(c, func(a *node.Admin) error { return f(a) })
	}
	return inCluster(c, func(k *node.Cluster) error { return f(k) })
}

func setupCreate(f *pflag.FlagSet) func(context.Context, *call) error {
	inodes := f.Uint64("inodes", 0, "limit of the number of files and directories, 0 for none")
	mode := f.String("mode", "755", "permissions of the root directory, octal")
	return func(ctx context.Context, c *call) error {
		spec := cluster.VolumeSpec{Name: c.args[0], Inodes: *inodes, UID: uint32(os.Getuid()), GID: uint32(os.Getgid())}
		if err := cluster.CheckName(spec.Name); err != nil {
			return err
		}
		if _, err := fmt.Sscanf(*mode, "%o", &spec.Mode); err != nil || spec.Mode&^cluster.RootModeMask != 0 {
			return usagef("--mode %q: octal permissions are needed, such as 755", *mode)
		}
		if len(c.args) > 1 {
			size, err := node.ParseSize(c.args[1])
			if err != nil {
				return err
			}
			if size == 0 {
				return usagef("size 0: leave it away for a volume without a limit")
			}
			spec.Bytes = uint64(size)
		}
		return volumes(c, func(a volumeAdmin) error {
			v, err := a.CreateVolume(ctx, spec)
			if err != nil {
				return err
			}
			if c.json {
				return writeJSON(c.out, v)
			}
			where := "--data " + c.data
			if _, ok := a.(*node.Cluster); ok {
				where = "--manager " + c.manager
			}
			_, err = fmt.Fprintf(c.out, "created volume %s; mount it with `sealfs mount %s %s DIR`\n", v.Name, where, v.Name)
			return err
		})
	}
}

func setupQuota(f *pflag.FlagSet) func(context.Context, *call) error {
	inodes := f.Uint64("inodes", 0, "limit of the number of files and directories, 0 for none")
	return func(ctx context.Context, c *call) error {
		var q node.Quota
		if f.Changed("inodes") {
			q.Inodes = inodes
		}
		if len(c.args) > 1 {
			var bytes uint64
			if c.args[1] != "none" {
				size, err := node.ParseSize(c.args[1])
				if err != nil {
					return err
				}
				if bytes = uint64(size); bytes == 0 {
					return usagef("size 0: say none for a volume without a limit")
				}
			}
			q.Bytes = &bytes
		}
		if q == (node.Quota{}) {
			return usagef("nothing to change: name a size, or --inodes")
		}
		return volumes(c, func(a volumeAdmin) error {
			v, err := a.SetQuota(ctx, c.args[0], q)
			if err != nil {
				return err
			}
			if c.json {
				return writeJSON(c.out, v)
			}
			size, n := limits(v)
			_, err = fmt.Fprintf(c.out, "volume %s may hold: size %s, inodes %s; it holds %s and %d\n", v.Name, size, n, node.Size(v.UsedBytes).About(), v.UsedInodes)
			return err
		})
	}
}

// limits writes a volume's quota, a minus for none.
func limits(v node.VolumeStatus) (size, inodes string) {
	size, inodes = "-", "-"
	if v.Size > 0 {
		size = v.Size.String()
	}
	if v.Inodes > 0 {
		inodes = fmt.Sprint(v.Inodes)
	}
	return size, inodes
}

func listVolumes(ctx context.Context, c *call) error {
	return volumes(c, func(a volumeAdmin) error {
		list, err := a.Volumes(ctx)
		if err != nil {
			return err
		}
		if c.json {
			return writeJSON(c.out, list)
		}
		t := tabwriter.NewWriter(c.out, 0, 0, 2, ' ', 0)
		fmt.Fprintln(t, "NAME\tID\tSTATE\tUSED\tSIZE\tINODES\tLIMIT")
		for _, v := range list {
			size, inodes := limits(v)
			fmt.Fprintf(t, "%s\t%d\t%s\t%s\t%s\t%d\t%s\n", v.Name, v.ID, v.State, node.Size(v.UsedBytes).About(), size, v.UsedInodes, inodes)
		}
		return t.Flush()
	})
}
