package main

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"

	"github.com/spf13/pflag"
)

// groups are the headings of the list of commands, in order.
var groups = []string{"Run", "Mounts", "Cluster", "Volumes", "Trees", "Look", "Other"}

func (cmd *command) usage() string {
	s := cmd.name + " [flags]"
	if cmd.args != "" {
		s += " " + cmd.args
	}
	return s
}

// writeOverview lists all commands.
func writeOverview(w io.Writer) {
	fmt.Fprint(w, "SealFS is a file system for very many small files.\n\nUsage: sealfs COMMAND [flags] [arguments]\n")
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	for _, g := range groups {
		fmt.Fprintf(t, "\n%s:\n", g)
		for _, c := range table() {
			if c.group == g {
				fmt.Fprintf(t, "  %s\t%s\n", c.name, c.short)
			}
		}
	}
	t.Flush()
	fmt.Fprint(w, "\n`sealfs help COMMAND` describes a command, with examples.\n")
}

// writeHelp describes one command.
func (cmd *command) writeHelp(w io.Writer) {
	fmt.Fprintf(w, "%s\n\nUsage: sealfs %s\n", cmd.short, cmd.usage())
	if len(cmd.aliases) > 0 {
		fmt.Fprintf(w, "Also called: %s\n", strings.Join(cmd.aliases, ", "))
	}
	if cmd.long != "" {
		fmt.Fprintf(w, "\n%s\n", strings.TrimSpace(cmd.long))
	}
	f := pflag.NewFlagSet(cmd.name, pflag.ContinueOnError)
	f.SortFlags = false
	cmd.setup(f)
	cmd.common(f, new(call))
	if usages := f.FlagUsages(); usages != "" {
		fmt.Fprintf(w, "\nFlags:\n%s", usages)
	}
	fmt.Fprint(w, "\nExamples:\n")
	for _, e := range cmd.examples {
		fmt.Fprintf(w, "  %s\n", e)
	}
}

func helpCommand() command {
	return command{
		name: "help", group: "Other", args: "[COMMAND]", max: 1,
		short:    "Describe a command",
		examples: []string{"sealfs help", "sealfs help up"},
		setup: func(*pflag.FlagSet) func(context.Context, *call) error {
			return func(_ context.Context, c *call) error {
				if len(c.args) == 0 {
					writeOverview(c.out)
					return nil
				}
				cmd, err := find(c.args[0])
				if err == nil {
					cmd.writeHelp(c.out)
				}
				return err
			}
		},
	}
}

// table returns all commands.
func table() []command {
	return slices.Concat(processCommands(), mountCommands(), roleCommands(), clusterCommands(), volumeCommands(), treeCommands(), lookCommands(), []command{scrubCommand(), helpCommand()})
}
