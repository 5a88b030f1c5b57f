// Sealfs-fsck checks a store that is not in use: device and region are
// cross-checked, the log is replayed in memory as the next start will do it.
package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/spf13/pflag"

	"sealfs"
	"sealfs/fsck"
)

const usage = `Usage: sealfs-fsck [-n|-p|-y] [flags] DEVICE...
       sealfs-fsck [-n|-p|-y] [flags] --data DIR

Checks the store on each DEVICE (block device or image) and its region, or all
stores of a data directory. A store that is in use is refused. Without -p or -y
nothing is changed.

`

const exits = `
Exit status: 0 clean; sum of 1 problems repaired, 4 problems left, 8 the check
failed, 16 usage, 32 cancelled.
`

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

// command is a parsed command line.
type command struct {
	data       string
	json, help bool
	progress   int
	problems   bool
	devices    []string
	o          fsck.Options
}

// parse reads the command line; the error is a sentence for the user.
func parse(args []string, stderr io.Writer) (*command, *pflag.FlagSet, error) {
	c := &command{}
	var no, preen, auto, yes, force bool
	fs := pflag.NewFlagSet("sealfs-fsck", pflag.ContinueOnError)
	fs.SetOutput(stderr)
	fs.SortFlags = false
	fs.Usage = func() {}
	fs.BoolVarP(&no, "no", "n", false, "change nothing, not a byte (the default)")
	fs.BoolVarP(&preen, "preen", "p", false, "repair what is safe to repair")
	fs.BoolVarP(&auto, "auto", "a", false, "the same as -p")
	fs.BoolVarP(&yes, "yes", "y", false, "repair all that can be repaired")
	fs.BoolVarP(&force, "force", "f", false, "accepted; every check is a full one")
	fs.BoolVarP(&c.o.Verbose, "verbose", "v", false, "say more")
	fs.IntVarP(&c.progress, "progress", "C", -1, "write \"pass done total\" lines to this file descriptor; 0: a line for people on standard error")
	fs.BoolVar(&c.json, "json", false, "print the reports as JSON")
	fs.StringVar(&c.data, "data", "", "check all stores under this data directory")
	fs.StringVar(&c.o.Region, "region", "", "the region, if it is not the file \"region\" beside the device")
	fs.StringVar(&c.o.Staging, "staging", "", "the staging ring, if it is not /dev/shm/sealfs-STORE.ring")
	fs.Uint32Var(&c.o.Shards, "shards", 0, "shard count of the cluster (default: found out)")
	fs.BoolVar(&c.o.NoData, "no-data", false, "do not read the files' data")
	fs.BoolVar(&c.problems, "list-problems", false, "print the table of problems and exit")
	fs.BoolVarP(&c.help, "help", "h", false, "print this and exit")
	if err := fs.Parse(args); err != nil {
		return nil, fs, err
	}
	c.devices = fs.Args()
	if c.help || c.problems {
		return c, fs, nil
	}
	modes := 0
	for _, set := range []bool{no, preen || auto, yes} {
		if set {
			modes++
		}
	}
	switch {
	case modes > 1:
		return nil, fs, errors.New("only one of -n, -p (-a) and -y can be given")
	case c.data == "" && len(c.devices) == 0:
		return nil, fs, errors.New("name a device, or a data directory with --data")
	case c.data != "" && (len(c.devices) > 0 || c.o.Region != "" || c.o.Staging != ""):
		return nil, fs, errors.New("--data goes without devices, --region and --staging")
	case len(c.devices) > 1 && (c.o.Region != "" || c.o.Staging != ""):
		return nil, fs, errors.New("--region and --staging go with one device")
	case c.o.Shards > sealfs.ShardsMax || c.o.Shards&(c.o.Shards-1) != 0:
		return nil, fs, fmt.Errorf("%d shards: not a power of two up to %d", c.o.Shards, sealfs.ShardsMax)
	case preen || auto:
		c.o.Repair = fsck.RepairSafe
	case yes:
		c.o.Repair = fsck.RepairAll
	}
	return c, fs, nil
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	c, fs, err := parse(args, stderr)
	if err != nil {
		fmt.Fprintf(stderr, "sealfs-fsck: %v\nTry 'sealfs-fsck --help'.\n", err)
		return fsck.ExitUsage
	}
	switch {
	case c.help:
		fmt.Fprint(stdout, usage, fs.FlagUsages(), exits)
		return fsck.ExitClean
	case c.problems:
		for _, p := range fsck.Problems() {
			fmt.Fprintf(stdout, "%d\t%-16s\t%v\t%s\n", p.ID, p.Name, p.Severity, p.Sentence)
		}
		return fsck.ExitClean
	}
	if c.data != "" {
		if c.devices, err = fsck.Stores(c.data); err != nil {
			fmt.Fprintf(stderr, "sealfs-fsck: %v\n", err)
			return fsck.ExitOperational
		}
	}
	return c.check(ctx, stdout, stderr)
}

// check checks all devices and returns the sum of their exit statuses.
func (c *command) check(ctx context.Context, stdout, stderr io.Writer) int {
	out := bufio.NewWriter(stdout)
	defer out.Flush()
	progress, end := c.progressTo(stderr)
	defer end()
	type result struct {
		*fsck.Report
		Error string `json:"error,omitempty"`
	}
	results, exit := []result{}, 0
	for _, device := range c.devices {
		o := c.o
		o.Device = device
		o.Progress = progress
		if !c.json {
			o.Out = &flusher{out}
		}
		rep, err := fsck.Check(ctx, o)
		r := result{Report: rep}
		status := rep.Exit()
		if err != nil {
			r.Error = err.Error()
			status |= fsck.ExitOperational
			if errors.Is(err, sealfs.ErrInterrupted) {
				status = status&^fsck.ExitOperational | fsck.ExitCancelled
			}
			if !c.json {
				out.Flush()
				fmt.Fprintf(stderr, "sealfs-fsck: %v\n", err)
			}
		} else if !c.json {
			fmt.Fprintln(out, rep.Summary())
		}
		exit |= status
		results = append(results, r)
		if ctx.Err() != nil {
			break
		}
	}
	if c.json {
		e := json.NewEncoder(out)
		e.SetIndent("", "  ")
		if err := e.Encode(struct {
			Stores []result `json:"stores"`
			Exit   int      `json:"exit"`
		}{results, exit}); err != nil {
			fmt.Fprintf(stderr, "sealfs-fsck: %v\n", err)
			exit |= fsck.ExitOperational
		}
	}
	return exit
}

// flusher shows every line at once: a check can take hours.
type flusher struct{ w *bufio.Writer }

func (f *flusher) Write(p []byte) (int, error) {
	n, err := f.w.Write(p)
	if err == nil && strings.HasSuffix(string(p), "\n") {
		err = f.w.Flush()
	}
	return n, err
}

// progressTo returns what shows progress, nil if nobody asked, and what ends it.
func (c *command) progressTo(stderr io.Writer) (show func(pass int, done, total int64), end func()) {
	switch {
	case c.progress < 0:
		return nil, func() {}
	case c.progress == 0:
		last := ""
		return func(pass int, done, total int64) {
				s := fmt.Sprintf("\rpass %d: %d", pass, done)
				if total > 0 {
					s = fmt.Sprintf("\rpass %d: %3d %%", pass, min(done, total)*100/total)
				}
				if s != last {
					last = s
					fmt.Fprintf(stderr, "%-24s", s)
				}
			}, func() {
				fmt.Fprintln(stderr)
			}
	}
	f := os.NewFile(uintptr(c.progress), "progress")
	return func(pass int, done, total int64) {
		fmt.Fprintf(f, "%d %d %d\n", pass, done, total)
	}, func() {}
}
