package main

import (
	"context"
	"fmt"
	"text/tabwriter"

	"github.com/spf13/pflag"

	"sealfs/node"
)

// clusterCommands are those that administer the managers.
func clusterCommands() []command {
	return []command{
		{
			name: "list-managers", group: "Cluster", cluster: true, json: true,
			short:    "List the managers of a cluster, and who leads",
			examples: []string{"sealfs list-managers --manager 127.0.0.1:8081", "sealfs list-managers --json"},
			setup: func(*pflag.FlagSet) func(context.Context, *call) error {
				return func(ctx context.Context, c *call) error {
					return inCluster(c, func(k *node.Cluster) error { return listManagers(ctx, c, k) })
				}
			},
		},
		{
			name: "remove-manager", group: "Cluster", args: "ID|ADDRESS", min: 1, max: 1, cluster: true,
			short: "Take a manager out of a cluster for ever",
			long: `
Takes a manager out, be it running or lost. To replace a lost one, remove it, and
start another with an empty data directory and --join.`,
			examples: []string{
				"sealfs remove-manager --manager 127.0.0.1:8081 127.0.0.1:8083",
				"sealfs remove-manager --manager m1:8081,m2:8081 0b9b55b0-53f3-4e9c-9d7c-1c7d4ab81f4e",
			},
			setup: func(*pflag.FlagSet) func(context.Context, *call) error {
				return func(ctx context.Context, c *call) error {
					return inCluster(c, func(k *node.Cluster) error { return removeManager(ctx, c, k) })
				}
			},
		},
		devClusterCommand(),
	}
}

// inCluster runs f with a client of the cluster that the call names.
func inCluster(c *call, f func(*node.Cluster) error) error {
	addrs, err := c.managers()
	if err != nil {
		return err
	}
	if addrs == nil {
		return usagef("which cluster? name its managers with --manager HOST:PORT,HOST:PORT, or SEALFS_MANAGER")
	}
	k := node.OpenCluster(addrs)
	defer k.Close()
	return f(k)
}

func listManagers(ctx context.Context, c *call, k *node.Cluster) error {
	list, err := k.Managers(ctx)
	if err != nil {
		return err
	}
	if c.json {
		return writeJSON(c.out, list)
	}
	t := tabwriter.NewWriter(c.out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "MANAGER\tADDRESS\tROLE")
	for _, m := range list {
		role := "follower"
		switch {
		case m.Leader:
			role = "leader"
		case !m.Voter:
			role = "catching up"
		}
		fmt.Fprintf(t, "%s\t%s\t%s\n", m.ID, m.Addr, role)
	}
	return t.Flush()
}

func removeManager(ctx context.Context, c *call, k *node.Cluster) error {
	m, err := k.FindManager(ctx, c.args[0])
	if err == nil {
		err = k.RemoveManager(ctx, m.ID)
	}
	if err == nil {
		_, err = fmt.Fprintf(c.out, "removed manager %s at %s\n", m.ID, m.Addr)
	}
	return err
}
