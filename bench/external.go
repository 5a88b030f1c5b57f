package bench

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"sealfs"
)

// The workloads of RunExternal: IO500's, with fixed counts instead of its five
// minutes per phase.
const (
	MdtestEasy = "mdtest-easy" // empty files, a directory per process
	MdtestHard = "mdtest-hard" // files of 3901 bytes in one shared directory
	IOREasy    = "ior-easy"    // a file per process, transfers of 1 MiB
	IORHard    = "ior-hard"    // interleaved blocks of 47008 bytes in one shared file
)

// External says what RunExternal does. Zero values stand for the defaults.
type External struct {
	// Dir is an existing directory on the file system to measure.
	Dir string `json:"dir"`
	// Workloads to run, in this order. Default: all four.
	Workloads []string `json:"workloads"`
	// Processes is the number of MPI processes on this machine. Default: 4. A
	// single one needs no mpirun.
	Processes int `json:"processes"`
	// Percent scales the counts: at 100, the default, 2500 (easy) and 1250
	// (hard) files, 256 MiB (easy) and 1500 blocks (hard) for each process.
	Percent int `json:"percent"`
	// DropCaches is as in Options.
	DropCaches bool `json:"drop_caches"`
	// Progress, if not nil, receives a line for each phase.
	Progress io.Writer `json:"-"`
}

func (x External) withDefaults() External {
	if x.Workloads == nil {
		x.Workloads = []string{MdtestEasy, MdtestHard, IOREasy, IORHard}
	}
	if x.Processes == 0 {
		x.Processes = 4
	}
	if x.Percent == 0 {
		x.Percent = 100
	}
	return x
}

// Validate reports all faults at once, as Options.Validate does.
func (x External) Validate() error {
	x = x.withDefaults()
	var faults []error
	fault := func(format string, args ...any) {
		faults = append(faults, fmt.Errorf("bench: "+format+": %w", append(args, sealfs.ErrInvalid)...))
	}
	if st, err := os.Stat(x.Dir); err != nil {
		fault("directory: %v", err)
	} else if !st.IsDir() {
		fault("%s is not a directory", x.Dir)
	}
	for _, name := range x.Workloads {
		if !slices.ContainsFunc(workloads, func(w workload) bool { return w.name == name }) {
			fault("workload %q is not known; there are %s, %s, %s and %s", name, MdtestEasy, MdtestHard, IOREasy, IORHard)
		}
	}
	if len(x.Workloads) == 0 {
		fault("no workloads given")
	}
	if x.Processes < 1 || x.Processes > WorkersMax {
		fault("number of processes is %d, want 1 to %d", x.Processes, WorkersMax)
	}
	if x.Percent < 1 || x.Percent > 1_000_000 {
		fault("scale is %d percent, want 1 to 1000000", x.Percent)
	}
	return errors.Join(faults...)
}

// String describes x in the words of the table's head.
func (x External) String() string {
	s := fmt.Sprintf("%d MPI processes, %d %% of the standard counts", x.Processes, x.Percent)
	if x.DropCaches {
		s += ", caches dropped"
	}
	return s
}

// scaled returns Percent of n, at least 1.
func (x External) scaled(n int64) int64 { return max(n*int64(x.Percent)/100, 1) }

// workload is one program with the flags that all its phases share and those
// that select a phase.
type workload struct {
	name, tool string
	size       int64 // of a file (mdtest) or transfer (IOR), in bytes
	count      int64 // files or transfers of a process at 100 percent
	flags      func(n int64, dir string) []string
	phases     []externalPhase
}

// externalPhase has the label that the tool gives the phase in its output.
type externalPhase struct {
	name, label string
	flags       []string
	moves       bool // the files' bytes
}

// mdtestSeed only has to be the same in all phases, or verifying fails.
const mdtestSeed = "271"

// The flags mean, for mdtest: -F files only, -u a directory per process, -L
// leaves only, -t and -P also print times, -G seed of the contents, -N 1 visit
// the files that the neighbour created, -w/-e bytes to write and read, -C -T -E
// -r only create, stat, read, remove, -Y a sync at the end inside the time, -X
// verify. For IOR: -F a file per process, -g barriers, -k keep, -e fsync, -C -Q
// 1 read what the neighbour wrote, -t -b -s sizes of transfer, block and count
// of segments, -w -r only write, read, -R verify.
var workloads = []workload{
	{
		name: MdtestEasy, tool: "mdtest", count: 2500,
		flags: func(n int64, dir string) []string {
			return []string{"-F", "-u", "-L", "-P", "-G", mdtestSeed, "-N", "1", "-n", strconv.FormatInt(n, 10), "-d", dir}
		},
		phases: []externalPhase{
			{PhaseCreate, "File creation", []string{"-C", "-Y"}, true},
			{PhaseStat, "File stat", []string{"-T"}, false},
			{PhaseRemove, "File removal", []string{"-r"}, false},
		},
	},
	{
		name: MdtestHard, tool: "mdtest", size: 3901, count: 1250,
		flags: func(n int64, dir string) []string {
			return []string{"-F", "-t", "-P", "-G", mdtestSeed, "-N", "1", "-w", "3901", "-e", "3901",
				"-n", strconv.FormatInt(n, 10), "-d", dir}
		},
		phases: []externalPhase{
			{PhaseCreate, "File creation", []string{"-C", "-Y"}, true},
			{PhaseStat, "File stat", []string{"-T"}, false},
			{PhaseRead, "File read", []string{"-E", "-X"}, true},
			{PhaseRemove, "File removal", []string{"-r"}, false},
		},
	},
	{
		name: IOREasy, tool: "ior", size: 1 << 20, count: 256,
		flags: func(n int64, dir string) []string {
			return []string{"-F", "-G", mdtestSeed, "-g", "-k", "-e", "-C", "-Q", "1",
				"-t", "1m", "-b", strconv.FormatInt(n, 10) + "m", "-o", filepath.Join(dir, "file")}
		},
		phases: []externalPhase{{"write", "write", []string{"-w"}, true}, {PhaseRead, "read", []string{"-r"}, true}},
	},
	{
		name: IORHard, tool: "ior", size: 47008, count: 1500,
		flags: func(n int64, dir string) []string {
			return []string{"-G", mdtestSeed, "-g", "-k", "-e", "-C", "-Q", "1",
				"-t", "47008", "-b", "47008", "-s", strconv.FormatInt(n, 10), "-o", filepath.Join(dir, "file")}
		},
		phases: []externalPhase{{"write", "write", []string{"-w"}, true}, {PhaseRead, "read", []string{"-r", "-R"}, true}},
	},
}

// RunExternal runs mdtest and IOR (see the IO500 benchmark) under mpirun in a
// new directory below x.Dir and removes it at the end. The programs are those
// that the environment variables MDTEST, IOR and MPIRUN name, else those in
// PATH; MPIRUN_ARGS holds further arguments for mpirun. Rows have no latencies,
// and their seconds are counted back from the rate that the tool printed.
//
// A workload whose program is missing is skipped with a warning; if that leaves
// nothing to run, the error is sealfs.ErrNotSupported and names what is
// missing. A phase that fails ends its workload only; the report then has the
// other rows and the error says what failed.
func RunExternal(ctx context.Context, x External) (*Report, error) {
	if err := x.Validate(); err != nil {
		return nil, err
	}
	x = x.withDefaults()
	dir, err := filepath.Abs(x.Dir)
	if err != nil {
		return nil, fmt.Errorf("bench: %w", err)
	}
	x.Dir = dir
	report := observe(dir)
	report.Environment.Command = &x
	warn := func(w string) {
		report.Warnings = append(report.Warnings, w)
		progress(x.Progress, "warning: %s\n", w)
	}
	commands := map[string][]string{}
	var missing []string
	for _, name := range x.Workloads {
		w := workloadByName(name)
		c, lacks := launcher(w.tool, x.Processes)
		if lacks != "" {
			if !slices.Contains(missing, lacks) {
				missing = append(missing, lacks)
			}
			warn(fmt.Sprintf("%s is skipped: %s", name, lacks))
			continue
		}
		commands[name] = c
	}
	if len(commands) == 0 {
		return report, fmt.Errorf("bench: nothing to run: %s: %w", strings.Join(missing, "; "), sealfs.ErrNotSupported)
	}
	work, err := makeWorkDir(dir)
	if err != nil {
		return report, err
	}
	var errs []error
	for _, name := range x.Workloads {
		if c := commands[name]; c != nil && ctx.Err() == nil {
			if err := x.run(ctx, workloadByName(name), c, filepath.Join(work, name), report, warn); err != nil {
				errs = append(errs, err)
			}
		}
	}
	if ctx.Err() != nil {
		errs = []error{context.Cause(ctx)}
	}
	if err := os.RemoveAll(work); err != nil {
		errs = append(errs, fmt.Errorf("bench: clean up: %w", err))
	}
	return report, errors.Join(errs...)
}

func workloadByName(name string) workload {
	return workloads[slices.IndexFunc(workloads, func(w workload) bool { return w.name == name })]
}

// launcher returns the command that starts n processes of the tool, or else
// what lacks for it.
func launcher(tool string, n int) (command []string, lacks string) {
	path, err := lookTool(strings.ToUpper(tool), tool)
	if err != nil {
		return nil, err.Error()
	}
	if n == 1 {
		return []string{path}, ""
	}
	mpi, err := lookTool("MPIRUN", "mpirun", "mpiexec")
	if err != nil {
		return nil, err.Error()
	}
	command = append([]string{mpi}, strings.Fields(os.Getenv("MPIRUN_ARGS"))...)
	return append(command, "-n", strconv.Itoa(n), path), ""
}

// lookTool finds the program that the variable names, or one of names in PATH.
func lookTool(variable string, names ...string) (string, error) {
	if v := os.Getenv(variable); v != "" {
		path, err := exec.LookPath(v)
		if err != nil {
			return "", fmt.Errorf("the environment variable %s names %s, which cannot be executed", variable, v)
		}
		return path, nil
	}
	for _, name := range names {
		if path, err := exec.LookPath(name); err == nil {
			return path, nil
		}
	}
	return "", fmt.Errorf("%s is not in PATH, and the environment variable %s names no other", strings.Join(names, " or "), variable)
}

// mpiEnvironment lets Open MPI start more processes than there are cores, and
// as root, as a benchmark in a container needs; other MPIs ignore it. Idle
// processes give way to the file system's daemons. What the user set stays.
var mpiEnvironment = []string{
	"LC_ALL=C",
	"OMPI_ALLOW_RUN_AS_ROOT=1",
	"OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1",
	"OMPI_MCA_mpi_yield_when_idle=1",
	"OMPI_MCA_rmaps_base_oversubscribe=1",
	"OMPI_MCA_hwloc_base_binding_policy=none",
	"PRTE_MCA_rmaps_default_mapping_policy=:oversubscribe", // the names of Open MPI 5
	"PRTE_MCA_hwloc_default_binding_policy=none",
}

// run appends the rows of one workload to the report.
func (x External) run(ctx context.Context, w workload, command []string, dir string, report *Report, warn func(string)) error {
	if err := os.Mkdir(dir, 0o755); err != nil {
		return fmt.Errorf("bench: %w", err)
	}
	defer os.RemoveAll(dir) // gives back the room early; RunExternal reports what remains
	n := x.scaled(w.count)
	for _, p := range w.phases {
		if x.DropCaches {
			if err := dropCaches(); err != nil {
				x.DropCaches = false
				warn(fmt.Sprintf("the caches were not dropped: %v", err))
			}
		}
		args := slices.Concat(command[1:], w.flags(n, dir), p.flags)
		output, err := execute(ctx, command[0], args)
		if err != nil {
			return fmt.Errorf("bench: %s %s: %w: %s", w.name, p.name, err, tail(output))
		}
		row := Row{Size: w.size, Phase: w.name + "/" + p.name, Ops: n * int64(x.Processes)}
		if p.moves {
			row.Bytes = row.Ops * w.size
		}
		row, complaints, err := readOutput(w.tool, p.label, output, row)
		if err != nil {
			return fmt.Errorf("bench: %s %s: %w: %s", w.name, p.name, err, tail(output))
		}
		for _, c := range complaints {
			warn(row.Phase + ": " + c)
		}
		report.Rows = append(report.Rows, row)
		progress(x.Progress, "%s: %.0f ops/s, %d errors\n", row.Phase, row.OpsPerSec, row.Errors)
	}
	return nil
}

// execute runs a command to its end and returns all it printed. When ctx ends,
// the command is asked to terminate, so that mpirun can end its processes.
func execute(ctx context.Context, name string, args []string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	var output bytes.Buffer
	cmd.Stdout, cmd.Stderr = &output, &output
	cmd.Env = append(slices.Clone(mpiEnvironment), os.Environ()...) // of equal names the last one counts
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = stopTimeout
	err := cmd.Run()
	return output.Bytes(), err
}

// tail returns the last lines of a program's output for an error message.
func tail(b []byte) string {
	b = bytes.TrimSpace(b)
	if len(b) > complaintMax {
		b = b[len(b)-complaintMax:]
	}
	lines := strings.Split(string(b), "\n")
	return strings.Join(lines[max(0, len(lines)-5):], " | ")
}

// complaintsMax bounds how many of a tool's warnings are passed on.
const complaintsMax = 5

// dataErrors finds the counts in mdtest's "ERROR: verifying the data on read (3
// errors)!" and IOR's "WARNING: Incorrect data on read (3 errors found)."
var dataErrors = regexp.MustCompile(`(?i)(?:verifying the|incorrect) data on .*\((\d+) errors`)

// readOutput completes row from what mdtest or IOR printed, and returns the
// warnings it found there. Ops and Bytes of row have to be set.
func readOutput(tool, label string, output []byte, row Row) (Row, []string, error) {
	var complaints []string
	for line := range strings.Lines(string(output)) {
		line = strings.TrimSpace(line)
		if m := dataErrors.FindStringSubmatch(line); m != nil {
			n, err := strconv.ParseInt(m[1], 10, 64)
			if err != nil {
				n = 1
			}
			row.Errors += n
		}
		if (strings.HasPrefix(line, "WARNING") || strings.HasPrefix(line, "ERROR")) && len(complaints) < complaintsMax {
			complaints = append(complaints, line)
		}
	}
	find := mdtestRate
	if tool == "ior" {
		find = iorBandwidth
	}
	value, ok := find(label, string(output))
	if !ok || !(value > 0) || math.IsInf(value, 0) {
		return row, complaints, fmt.Errorf("no result %q in the output: %w", label, sealfs.ErrInvalid)
	}
	if tool == "ior" {
		row.Seconds = float64(row.Bytes) / (value * (1 << 20))
		row.OpsPerSec = rate(float64(row.Ops), row.Seconds)
	} else {
		row.OpsPerSec = value
		row.Seconds = float64(row.Ops) / value
	}
	return row, complaints, nil
}

// mdtestRate finds the operations per second of all processes in mdtest's
// "SUMMARY rate" table, whose columns are maximum, minimum, mean and standard
// deviation of the iterations, of which there is one here. A table of times in
// the same form may follow.
func mdtestRate(label, output string) (float64, bool) {
	inRates := false
	for line := range strings.Lines(output) {
		line = strings.TrimSpace(line)
		if strings.HasPrefix(line, "SUMMARY") {
			inRates = strings.HasPrefix(line, "SUMMARY rate")
			continue
		}
		rest, found := strings.CutPrefix(line, label)
		if !inRates || !found {
			continue
		}
		f := strings.Fields(strings.TrimPrefix(strings.TrimSpace(rest), ":"))
		if len(f) < 4 {
			return 0, false
		}
		v, err := strconv.ParseFloat(f[len(f)-2], 64)
		return v, err == nil
	}
	return 0, false
}

// iorBandwidth finds the MiB/s in the first row of IOR's result table. A row of
// the same name with other columns stands in the summary below it.
func iorBandwidth(label, output string) (float64, bool) {
	inResults := false
	for line := range strings.Lines(output) {
		f := strings.Fields(line)
		if len(f) > 1 && f[0] == "access" && strings.HasPrefix(f[1], "bw(MiB/s)") {
			inResults = true
		}
		if inResults && len(f) > 5 && f[0] == label {
			v, err := strconv.ParseFloat(f[1], 64)
			return v, err == nil
		}
	}
	return 0, false
}
