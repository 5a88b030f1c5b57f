// Sealfs-fsck checks stores that are not in use: device and region of each are
// cross-checked, the log is replayed in memory as the next start will do it, and
// the stores of a cluster are checked against each other. As fsck.sealfs it is
// what fsck(8) runs.
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
	"path/filepath"
	"strings"
	"syscall"

	"github.com/spf13/pflag"
	"golang.org/x/sys/unix"

	"sealfs"
	"sealfs/fsck"
)

const usage = `Usage: sealfs-fsck [-n|-p|-y] [flags] DEVICE[,region=PATH][,staging=PATH]...
       sealfs-fsck [-n|-p|-y] [flags] --data DIR
       sealfs-fsck --rebuild-region [flags] DEVICE[,region=PATH]...
       sealfs-fsck --rebuild-region [flags] --data DIR

Checks the store on each DEVICE (block device or image) and its region, or all
stores of a data directory, each for itself and all together: they must be of
one cluster. A store that is in use is refused. What cannot be judged without
stores that were not given is counted, and is no problem.

What can be repaired is shown as a plan before anything is changed. Without -n,
-p and -y you are asked on a terminal, and elsewhere nothing is changed. What a
repair removes or changes is saved in a file, whose name is printed; what has
lost its name comes to lost+found in the root of its volume. Repairs of stores
that belong together need all of them.

A region that is lost or damaged can be made again from the device as long as
"sealfs status" does not say otherwise; that loses nothing, so try it before -y.

`

const exits = `
Exit status: 0 clean; sum of 1 problems repaired, 4 problems left, 8 the check
failed, 16 usage, 32 cancelled.
`

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := run(ctx, os.Args, os.Stdin, os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

// command is a parsed command line.
type command struct {
	name       string // by which it was called
	data       string
	cluster    string // a copy of the cluster map
	rebuild    bool   // make regions again
	ask        bool   // before repairs
	stdin      *os.File
	json, help bool
	progress   int
	problems   bool
	stores     []fsck.Place
	staging    []string // of the stores, "" for the usual place
	o          fsck.Options
}

// underFsck is the name under which fsck(8) calls.
const underFsck = "fsck.sealfs"

// parse reads the command line; the error is a sentence for the user.
func parse(name string, args []string, stdin *os.File, stderr io.Writer) (*command, *pflag.FlagSet, error) {
	c := &command{name: name, stdin: stdin}
	var no, preen, auto, yes, force bool
	typ := "sealfs"
	fs := pflag.NewFlagSet(name, pflag.ContinueOnError)
	fs.SetOutput(stderr)
	fs.SortFlags = false
	fs.Usage = func() {}
	fs.BoolVarP(&no, "no", "n", false, "change nothing, not a byte, and print what -y would do")
	fs.BoolVarP(&preen, "preen", "p", false, "repair, if nothing is to be done but what cannot make anything worse")
	fs.BoolVarP(&auto, "auto", "a", false, "the same as -p")
	fs.BoolVarP(&yes, "yes", "y", false, "repair all that can be repaired, without asking")
	fs.BoolVar(&c.rebuild, "rebuild-region", false, "make the region again from the data device, then check it; one that is there is kept under another name")
	fs.BoolVar(&c.o.CutLog, "cut-log", false, "with -y or when you are asked: go on where the log breaks off, although it reached further; what was done later is lost, also what was synced")
	fs.BoolVarP(&force, "force", "f", false, "accepted; every check is a full one")
	fs.BoolVarP(&c.o.Verbose, "verbose", "v", false, "say more")
	fs.IntVarP(&c.progress, "progress", "C", -1, "write \"pass done total\" lines to this file descriptor; 0: a line for people on standard error")
	fs.BoolVar(&c.json, "json", false, "print the reports as JSON")
	fs.StringVar(&c.data, "data", "", "check all stores of this data directory")
	fs.StringVar(&c.cluster, "map", "", "a copy of the cluster map, to know which shard lies on which store (default: DIR/map, if \"sealfs up\" wrote it)")
	fs.StringVar(&c.o.Region, "region", "", "the region, if it is not the file \"region\" beside the device")
	fs.StringVar(&c.o.Staging, "staging", "", "the staging ring, if it is not /dev/shm/sealfs-STORE.ring")
	fs.Uint32Var(&c.o.Shards, "shards", 0, "shard count of the cluster (default: found out)")
	fs.BoolVar(&c.o.NoData, "no-data", false, "do not read the files' data")
	fs.StringVar(&c.o.SaveDir, "save", "", "the directory for the files with what repairs remove or change (default: that of the region)")
	fs.BoolVar(&c.problems, "list-problems", false, "print the table of problems, with what repairs them, and exit")
	fs.BoolVarP(&c.help, "help", "h", false, "print this and exit")
	if name == underFsck {
		fs.StringVarP(&typ, "type", "t", typ, "accepted, if it is sealfs")
	}
	if err := fs.Parse(args); err != nil {
		return nil, fs, err
	}
	devices := fs.Args()
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
	case typ != "sealfs":
		return nil, fs, fmt.Errorf("file system type %q: only sealfs is checked here", typ)
	case c.data == "" && len(devices) == 0:
		return nil, fs, errors.New("name a device, or a data directory with --data")
	case c.data != "" && (len(devices) > 0 || c.o.Region != "" || c.o.Staging != ""):
		return nil, fs, errors.New("--data goes without devices, --region and --staging")
	case len(devices) > 1 && (c.o.Region != "" || c.o.Staging != ""):
		return nil, fs, errors.New("--region and --staging go with one device; with several, write DEVICE,region=PATH")
	case c.rebuild && (modes > 0 || c.o.CutLog):
		return nil, fs, errors.New("--rebuild-region goes without -n, -p, -y and --cut-log: check the store afterwards")
	case c.o.CutLog && (no || preen || auto):
		return nil, fs, errors.New("--cut-log goes with -y only, or where you are asked")
	case c.o.Shards > sealfs.ShardsMax || c.o.Shards&(c.o.Shards-1) != 0:
		return nil, fs, fmt.Errorf("%d shards: not a power of two up to %d", c.o.Shards, sealfs.ShardsMax)
	case preen || auto:
		c.o.Repair = fsck.RepairSafe
	case yes:
		c.o.Repair = fsck.RepairAll
	case !no && !c.json && !c.rebuild && isTerminal(stdin):
		c.o.Repair, c.ask = fsck.RepairAll, true
	}
	for _, arg := range devices {
		if err := c.device(arg); err != nil {
			return nil, fs, err
		}
	}
	return c, fs, nil
}

// device reads DEVICE[,region=PATH][,staging=PATH].
func (c *command) device(arg string) error {
	p := fsck.Place{Region: c.o.Region}
	staging := c.o.Staging
	for {
		i := max(strings.LastIndex(arg, ",region="), strings.LastIndex(arg, ",staging="))
		if i < 0 {
			break
		}
		key, path, _ := strings.Cut(arg[i+1:], "=")
		into := &p.Region
		if key == "staging" {
			into = &staging
		}
		if *into != "" || path == "" {
			return fmt.Errorf("%s: one %s is needed, no more and no less", arg, key)
		}
		*into, arg = path, arg[:i]
	}
	if arg == "" {
		return errors.New("the name of a device is empty")
	}
	p.Device = arg
	c.stores, c.staging = append(c.stores, p), append(c.staging, staging)
	return nil
}

// run is the program with all its arguments, the first being its name.
func run(ctx context.Context, args []string, stdin *os.File, stdout, stderr io.Writer) int {
	name := "sealfs-fsck"
	if filepath.Base(args[0]) == underFsck {
		name = underFsck
	}
	c, fs, err := parse(name, args[1:], stdin, stderr)
	if err != nil {
		fmt.Fprintf(stderr, "%s: %v\nTry '%s --help'.\n", name, err, name)
		return fsck.ExitUsage
	}
	switch {
	case c.help:
		fmt.Fprint(stdout, usage, fs.FlagUsages(), exits)
		return fsck.ExitClean
	case c.problems:
		for _, p := range fsck.Problems() {
			fmt.Fprintf(stdout, "%d\t%-16s\t%v\trepair: %v\t%s: %s\n", p.ID, p.Name, p.Severity, p.Remedy, p.Sentence, p.Mend)
		}
		return fsck.ExitClean
	}
	if c.data != "" {
		if c.stores, err = fsck.Stores(c.data); err != nil {
			fmt.Fprintf(stderr, "%s: %v\n", name, err)
			return fsck.ExitOperational
		}
		c.staging = make([]string, len(c.stores))
	}
	exit := fsck.ExitClean
	if c.rebuild {
		if exit = c.rebuildRegions(ctx, stdout, stderr); exit&^fsck.ExitRepaired != 0 {
			return exit
		}
	}
	l, err := c.layout()
	if err != nil {
		fmt.Fprintf(stderr, "%s: %v\n", name, err)
		return exit | fsck.ExitOperational
	}
	return exit | c.check(ctx, l, stdout, stderr)
}

// result is what --json says of a store.
type result struct {
	*fsck.Report
	Error string `json:"error,omitempty"`
	Exit  int    `json:"exit"`
}

// check checks all stores and returns the sum of their exit statuses.
func (c *command) check(ctx context.Context, l *fsck.Layout, stdout, stderr io.Writer) int {
	out := bufio.NewWriter(stdout)
	defer out.Flush()
	progress, end := c.progressTo(stderr)
	defer end()
	var stores []fsck.Options
	for i, place := range c.stores {
		o := c.o
		o.Device, o.Region, o.Staging = place.Device, place.Region, c.staging[i]
		o.Progress = progress
		if !c.json {
			o.Out = &flusher{out}
		}
		if c.ask {
			o.Confirm = func(plan []fsck.Step) bool { return c.confirm(len(plan), stderr) }
		}
		stores = append(stores, o)
	}
	t, refused := fsck.CheckAll(ctx, stores, l)
	out.Flush()
	exit := exitOf(refused)
	if refused != nil && !c.json {
		fmt.Fprintf(stderr, "%s: %v\n", c.name, refused)
	}
	results := []result{}
	for i, rep := range t.Stores {
		r := result{Report: rep, Exit: rep.Exit() | exitOf(t.Errors[i])}
		if err := t.Errors[i]; err != nil {
			r.Error = err.Error()
			if !c.json {
				fmt.Fprintf(stderr, "%s: %v\n", c.name, err)
			}
		} else if !c.json && refused == nil {
			fmt.Fprintln(out, rep.Summary())
		}
		exit |= r.Exit
		results = append(results, r)
	}
	if !c.json {
		if refused == nil && (len(results) > 1 || l != nil) {
			fmt.Fprintln(out, t.Summary())
		}
		return exit
	}
	whole := struct {
		Stores   []result       `json:"stores"`
		Together *fsck.Together `json:"together"`
		Error    string         `json:"error,omitempty"`
		Exit     int            `json:"exit"`
	}{Stores: results, Together: t, Exit: exit}
	if refused != nil {
		whole.Error = refused.Error()
	}
	e := json.NewEncoder(out)
	e.SetIndent("", "  ")
	if err := e.Encode(whole); err != nil {
		fmt.Fprintf(stderr, "%s: %v\n", c.name, err)
		exit |= fsck.ExitOperational
	}
	return exit
}

// confirm asks whether a plan of n steps shall be carried out.
func (c *command) confirm(n int, stderr io.Writer) bool {
	fmt.Fprintf(stderr, "%s: carry out %d of these repairs? [y/N] ", c.name, n)
	answer, err := bufio.NewReader(c.stdin).ReadString('\n')
	answer = strings.ToLower(strings.TrimSpace(answer))
	return err == nil && (answer == "y" || answer == "yes")
}

// isTerminal reports whether somebody can be asked.
func isTerminal(f *os.File) bool {
	if f == nil {
		return false
	}
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}

// exitOf returns the exit status for an error of the check itself.
func exitOf(err error) int {
	switch {
	case err == nil:
		return fsck.ExitClean
	case errors.Is(err, sealfs.ErrInterrupted):
		return fsck.ExitCancelled
	}
	return fsck.ExitOperational
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
