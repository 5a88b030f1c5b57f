package main

import (
	"context"
	"fmt"
	"slices"
	"text/tabwriter"
	"time"

	"github.com/spf13/pflag"

	"sealfs/node"
	stores "sealfs/server"
)

// scrubCommand verifies disks while they are in use.
func scrubCommand() command {
	return command{
		name: "scrub", group: "Look", args: "start|stop|status", min: 1, max: 1, data: true, json: true,
		short: "Verify all that the disks hold, while they are in use",
		long: `
start begins to read everything that lives on the disks of the process that runs on
the data directory, and to compare it with its checksums; it goes on where a scrub
was stopped, unless --restart is given. It lets other work go first. While one runs,
start changes its rate. What is damaged stands in the log, in the metrics and in
status, with the file whose it is, as an inode and an offset; reading it gives an
input/output error, and nothing else is harmed. A scrub also begins by itself: see
scrub_interval and scrub_rate in ` + "`sealfs config show`" + `.`,
		examples: []string{
			"sealfs scrub start",
			"sealfs scrub start --data /srv/s1 --store /dev/sdb --rate 64M",
			"sealfs scrub status --json | jq '.[].last.findings'",
			"sealfs scrub stop",
		},
		setup: setupScrub,
	}
}

func setupScrub(f *pflag.FlagSet) func(context.Context, *call) error {
	store := f.String("store", "", "a store's `id or device` (default: all)")
	rate := f.String("rate", "0", "`bytes` a second at most, such as 64M (0: as fast as the disk reads)")
	restart := f.Bool("restart", false, "begin anew, not where the last one was stopped")
	return func(ctx context.Context, c *call) error {
		if !slices.Contains([]string{stores.ScrubStart, stores.ScrubStop, stores.ScrubStatus}, c.args[0]) {
			return usagef("scrub %q: it is start, stop or status; see `sealfs help scrub`", c.args[0])
		}
		n, err := node.ParseSize(*rate)
		if err != nil {
			return usagef("--rate: %v", err)
		}
		d, err := c.dir()
		if err != nil {
			return err
		}
		list, err := d.Scrub(ctx, node.ScrubRequest{Verb: c.args[0], Store: *store, Rate: n, Restart: *restart})
		if err != nil {
			return err
		}
		if c.json {
			return writeJSON(c.out, list)
		}
		return writeScrubs(c, list)
	}
}

func writeScrubs(c *call, list []stores.ScrubReport) error {
	t := tabwriter.NewWriter(c.out, 0, 0, 2, ' ', 0)
	for i := range list {
		r := &list[i]
		fmt.Fprintf(t, "store\t%s\n  device\t%s\n  scrub\t%s\n", r.ID, r.Device, node.DescribeScrub(&r.ScrubStatus))
		round := r.Round
		if round == nil {
			round = r.Last
		}
		if round == nil {
			continue
		}
		fmt.Fprintf(t, "  read\t%s in %v (%v given way), %d segments, %d extents\n", node.Size(round.Bytes).About(),
			round.Busy.Round(time.Millisecond), round.Yielded.Round(time.Millisecond), round.Segments, round.Claims)
		for _, x := range round.Findings {
			fmt.Fprintf(t, "  damage\t%s", x.Kind)
			if x.Offset >= 0 {
				fmt.Fprintf(t, " at byte %d, %d bytes", x.Offset, x.Len)
			}
			if x.Ino != 0 {
				fmt.Fprintf(t, ", inode %d at %d", x.Ino, x.At)
			}
			fmt.Fprintf(t, ": %s", x.What)
			if x.Healed {
				fmt.Fprint(t, "; it was written again")
			}
			fmt.Fprintln(t)
		}
		if n := round.Damages - uint64(len(round.Findings)); n > 0 {
			fmt.Fprintf(t, "  damage\t%d more places\n", n)
		}
	}
	return t.Flush()
}
