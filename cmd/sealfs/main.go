// Command sealfs runs SealFS on a machine and administers it. See `sealfs help`.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/spf13/pflag"

	"sealfs/bench"
	"sealfs/node"
)

// Exit codes.
const (
	exitFailure = 1 // what was asked for was not done
	exitUsage   = 2 // the command line makes no sense
)

func main() {
	if len(os.Args) > 1 && os.Args[1] == bench.WorkerCommand {
		os.Exit(bench.WorkerMain(os.Args[2:]))
	}
	signals := []os.Signal{syscall.SIGINT, syscall.SIGTERM}
	if !signal.Ignored(syscall.SIGHUP) { // nohup
		signals = append(signals, syscall.SIGHUP)
	}
	ctx, stop := signal.NotifyContext(context.Background(), signals...)
	defer stop()
	if args, ok := helperArgs(os.Args); ok {
		os.Exit(runMountHelper(ctx, args, os.Stdout, os.Stderr))
	}
	os.Exit(run(ctx, os.Args[1:], os.Stdout, os.Stderr))
}

// command is one row of the table of commands.
type command struct {
	name     string
	aliases  []string
	group    string
	args     string // for the usage line
	min, max int    // number of arguments
	short    string // a line for the list
	long     string // sentences for the help
	examples []string
	data     bool // has --data
	cluster  bool // has --manager: works on a cluster too
	daemon   bool // has --daemon: asks the mount daemon
	json     bool // has --json
	// setup declares the flags and returns what runs the command.
	setup func(f *pflag.FlagSet) func(context.Context, *call) error
}

// call is one invocation of a command.
type call struct {
	args   []string
	data   string
	json   bool
	daemon string
	// manager lists the addresses of managers: of --manager or SEALFS_MANAGER.
	manager string
	out     io.Writer
	flags   *pflag.FlagSet
	stderr  io.Writer
}

// dir returns the data directory that the call is about.
func (c *call) dir() (node.Dir, error) { return node.OpenDir(c.data) }

// managers returns the addresses of the managers, nil if the call is about a data
// directory of this machine. Flags go before the environment, and of the
// environment SEALFS_MANAGER before SEALFS_DATA.
func (c *call) managers() ([]string, error) {
	if c.manager == "" || c.flags.Changed("data") && !c.flags.Changed("manager") {
		return nil, nil
	}
	return node.ParseAddrs("--manager", c.manager)
}

// mounts returns a client of the mount daemon.
func (c *call) mounts() (*node.MountAdmin, node.Dir, error) {
	d, err := node.OpenDir(c.daemon)
	if err != nil {
		return nil, d, err
	}
	return d.Mounts(), d, nil
}

// usageError is a command line that makes no sense.
type usageError struct{ text string }

func (e *usageError) Error() string { return e.text }

func usagef(format string, args ...any) error { return &usageError{fmt.Sprintf(format, args...)} }

// run executes a command line and returns the exit code.
func run(ctx context.Context, args []string, out, stderr io.Writer) int {
	err := dispatch(ctx, args, out, stderr)
	if err == nil {
		return 0
	}
	for line := range strings.Lines(err.Error()) {
		fmt.Fprintf(stderr, "sealfs: %s\n", strings.TrimRight(line, "\n"))
	}
	if _, ok := errors.AsType[*usageError](err); ok {
		return exitUsage
	}
	return exitFailure
}

func dispatch(ctx context.Context, args []string, out, stderr io.Writer) error {
	if len(args) == 0 {
		writeOverview(stderr)
		return usagef("a command is needed")
	}
	switch args[0] {
	case "-h", "--help":
		args = append([]string{"help"}, args[1:]...)
	case "-V", "--version":
		args[0] = "version"
	}
	cmd, err := find(args[0])
	if err != nil {
		return err
	}
	f := pflag.NewFlagSet(cmd.name, pflag.ContinueOnError)
	f.SetOutput(io.Discard)
	f.SortFlags = false
	c := &call{out: out, stderr: stderr, flags: f}
	exec := cmd.setup(f)
	cmd.common(f, c)
	if err := f.Parse(args[1:]); errors.Is(err, pflag.ErrHelp) {
		cmd.writeHelp(out)
		return nil
	} else if err != nil {
		return usagef("%s: %v; see `sealfs help %s`", cmd.name, err, cmd.name)
	}
	c.args = f.Args()
	if n := len(c.args); n < cmd.min || n > cmd.max {
		return usagef("usage: sealfs %s; see `sealfs help %s`", cmd.usage(), cmd.name)
	}
	if err := exec(ctx, c); err != nil {
		return fmt.Errorf("%s: %w", cmd.name, err)
	}
	return nil
}

// common declares the flags that many commands have.
func (cmd *command) common(f *pflag.FlagSet, c *call) {
	if cmd.data {
		def := node.DefaultDir
		if env := os.Getenv("SEALFS_DATA"); env != "" {
			def = env
		}
		f.StringVar(&c.data, "data", def, "data `directory`; SEALFS_DATA sets the default")
	}
	if cmd.cluster {
		f.StringVar(&c.manager, "manager", os.Getenv("SEALFS_MANAGER"), "addresses of a cluster's `managers`, HOST:PORT separated by commas; SEALFS_MANAGER sets the default")
	}
	if cmd.daemon {
		f.StringVar(&c.daemon, "daemon", node.DefaultDaemonDir(os.Getenv), "`directory` of the mount daemon; SEALFS_DAEMON sets the default")
	}
	if cmd.json {
		f.BoolVar(&c.json, "json", false, "print JSON, for scripts")
	}
}

// find returns the command of a name or alias.
func find(name string) (*command, error) {
	list := table()
	best, distance := "", len(name)/2+1
	for i, c := range list {
		for _, n := range append([]string{c.name}, c.aliases...) {
			if n == name {
				return &list[i], nil
			}
			if d := editDistance(n, name); d < distance || strings.HasPrefix(n, name) && best == "" {
				best, distance = n, d
			}
		}
	}
	if best != "" {
		return nil, usagef("there is no command %q: did you mean %q? `sealfs help` lists all", name, best)
	}
	return nil, usagef("there is no command %q: `sealfs help` lists all", name)
}

// editDistance is the number of insertions, deletions and replacements that
// make b of a.
func editDistance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := 1
			if a[i] == b[j] {
				cost = 0
			}
			diagonal, row[j+1] = row[j+1], min(row[j+1]+1, row[j]+1, diagonal+cost)
		}
	}
	return row[len(b)]
}
