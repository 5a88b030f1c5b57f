package bench

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"golang.org/x/sys/unix"
)

// Report is the outcome of Run or RunExternal.
type Report struct {
	Environment Environment `json:"environment"`
	Rows        []Row       `json:"rows"`
	// Warnings say what makes the numbers less than they seem.
	Warnings []string `json:"warnings,omitempty"`
}

// Environment is what somebody else needs to know in order to judge the rows.
type Environment struct {
	Time    time.Time `json:"time"`
	Host    string    `json:"host"`
	Kernel  string    `json:"kernel"`
	CPUs    int       `json:"cpus"`
	FSType  string    `json:"fs_type"` // with subtype, e.g. "fuse.sealfs"; in hex if unknown
	Source  string    `json:"source,omitempty"`
	Mount   string    `json:"mount_options,omitempty"`
	Options *Options  `json:"options,omitempty"`  // of Run
	Command *External `json:"external,omitempty"` // of RunExternal
}

// Row is one phase with one file size. With repetitions, every number is the
// median of its own values in the runs, but Errors, which is their sum.
type Row struct {
	Size      int64         `json:"size"`  // bytes per file
	Phase     string        `json:"phase"` // of RunExternal: "workload/phase"
	Ops       int64         `json:"ops"`   // successful operations
	Seconds   float64       `json:"seconds"`
	OpsPerSec float64       `json:"ops_per_sec"`
	P50       time.Duration `json:"p50_ns"` // 0 where no latencies were taken
	P99       time.Duration `json:"p99_ns"`
	Max       time.Duration `json:"max_ns"`
	Errors    int64         `json:"errors"`
	Bytes     int64         `json:"bytes"`
	Runs      []float64     `json:"runs_ops_per_sec,omitempty"` // each run's, in order
}

// Spread is the quotient of the fastest and the slowest run, 1 for a single
// one and 0 if a run did nothing. Differences between two reports below it are noise.
func (r Row) Spread() float64 {
	if len(r.Runs) == 0 {
		return 1
	}
	low := slices.Min(r.Runs)
	if low <= 0 {
		return 0
	}
	return slices.Max(r.Runs) / low
}

// WriteJSON writes the report as one indented JSON object. Durations are in
// nanoseconds, sizes in bytes.
func (r *Report) WriteJSON(w io.Writer) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	return e.Encode(r)
}

// WriteTable writes the report for human eyes.
func (r *Report) WriteTable(w io.Writer) error {
	b := bufio.NewWriter(w)
	env := &r.Environment
	dir := ""
	if env.Options != nil {
		dir = env.Options.Dir
	} else if env.Command != nil {
		dir = env.Command.Dir
	}
	fmt.Fprintf(b, "%s: %s, %s\n", dir, env.FSType, env.Time.Format(time.RFC3339))
	if env.Mount != "" {
		fmt.Fprintf(b, "mounted from %s with %s\n", env.Source, env.Mount)
	}
	fmt.Fprintf(b, "%s: Linux %s, %d CPUs\n", env.Host, env.Kernel, env.CPUs)
	if env.Options != nil {
		fmt.Fprintln(b, env.Options)
	}
	if env.Command != nil {
		fmt.Fprintln(b, env.Command)
	}
	for _, warning := range r.Warnings {
		fmt.Fprintf(b, "warning: %s\n", warning)
	}
	fmt.Fprintln(b)
	spread := slices.ContainsFunc(r.Rows, func(r Row) bool { return len(r.Runs) > 1 })
	t := tabwriter.NewWriter(b, 0, 0, 2, ' ', tabwriter.AlignRight)
	line := func(cells ...string) {
		if !spread {
			cells = slices.Delete(cells, 5, 6)
		}
		fmt.Fprintln(t, strings.Join(cells, "\t")+"\t")
	}
	line("size", "phase", "ops", "ops/s", "MiB/s", "spread", "p50", "p99", "max", "errors")
	for _, row := range r.Rows {
		mib := "-"
		if row.Bytes > 0 {
			mib = strconv.FormatFloat(rate(float64(row.Bytes)/(1<<20), row.Seconds), 'f', 1, 64)
		}
		line(sizeText(row.Size), row.Phase, strconv.FormatInt(row.Ops, 10), strconv.FormatFloat(row.OpsPerSec, 'f', 0, 64), mib,
			strconv.FormatFloat(row.Spread(), 'f', 2, 64),
			durationText(row.P50), durationText(row.P99), durationText(row.Max), strconv.FormatInt(row.Errors, 10))
	}
	if err := t.Flush(); err != nil {
		return err
	}
	return b.Flush()
}

// sizeText writes a size with a binary unit where that is exact.
func sizeText(n int64) string {
	for _, u := range []struct {
		shift uint
		name  string
	}{{30, "GiB"}, {20, "MiB"}, {10, "KiB"}} {
		if n > 0 && n&(1<<u.shift-1) == 0 {
			return strconv.FormatInt(n>>u.shift, 10) + " " + u.name
		}
	}
	return strconv.FormatInt(n, 10) + " B"
}

// durationText writes a duration with three digits, "-" for none.
func durationText(d time.Duration) string {
	if d <= 0 {
		return "-"
	}
	for _, u := range []struct {
		unit time.Duration
		name string
	}{{time.Second, "s"}, {time.Millisecond, "ms"}, {time.Microsecond, "us"}} {
		if v := float64(d) / float64(u.unit); v >= 1 {
			decimals := 2
			if v >= 99.95 {
				decimals = 0
			} else if v >= 9.995 {
				decimals = 1
			}
			return strconv.FormatFloat(v, 'f', decimals, 64) + u.name
		}
	}
	return strconv.FormatInt(int64(d), 10) + "ns"
}

// newReport looks at the machine and the file system of o.Dir.
func newReport(o Options) *Report {
	r := observe(o.Dir)
	r.Environment.Options = &o
	return r
}

// observe returns a report without rows. What cannot be found out stays empty.
func observe(dir string) *Report {
	r := &Report{Rows: []Row{}, Environment: Environment{Time: time.Now().Truncate(time.Second), CPUs: runtime.NumCPU()}}
	env := &r.Environment
	env.Host, _ = os.Hostname()
	var uts unix.Utsname
	if unix.Uname(&uts) == nil {
		env.Kernel = unix.ByteSliceToString(uts.Release[:])
	}
	var fs unix.Statfs_t
	if unix.Statfs(dir, &fs) == nil {
		env.FSType = fsName(uint32(fs.Type))
	}
	var st unix.Stat_t
	if unix.Stat(dir, &st) != nil {
		return r
	}
	dev := fmt.Sprintf("%d:%d", unix.Major(st.Dev), unix.Minor(st.Dev))
	table, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return r
	}
	if m, ok := findMount(string(table), dev); ok {
		env.FSType, env.Source, env.Mount = m.fsType, m.source, m.options
	}
	if env.FSType == "ext4" && !hasJournal(dev) {
		r.Warnings = append(r.Warnings, "this ext4 has no journal: creating files soon after deleting others is slow there, "+
			"whatever is measured (see the README of package bench)")
	}
	return r
}

type mountInfo struct{ fsType, source, options string }

// findMount looks for the device number in a mountinfo table (see
// proc_pid_mountinfo(5)); of several mounts the last one counts. Some file
// systems (Btrfs) report numbers that the table does not have.
func findMount(table, dev string) (m mountInfo, ok bool) {
	for line := range strings.Lines(table) {
		left, right, found := strings.Cut(strings.TrimSpace(line), " - ")
		l, r := strings.Fields(left), strings.Fields(right)
		if !found || len(l) < 6 || len(r) < 3 || l[2] != dev {
			continue
		}
		m, ok = mountInfo{fsType: r[0], source: r[1], options: l[5] + "," + r[2]}, true
	}
	return m, ok
}

// hasJournal reports whether jbd2 runs for the ext4 on device dev. In doubt it does.
func hasJournal(dev string) bool {
	target, err := os.Readlink("/sys/dev/block/" + dev)
	if err != nil {
		return true
	}
	if _, err := os.Stat("/proc/fs/ext4"); err != nil {
		return true
	}
	found, err := filepath.Glob("/proc/fs/jbd2/" + filepath.Base(target) + "-*")
	return err != nil || len(found) > 0
}

// fsName names the magic number of statfs(2).
func fsName(magic uint32) string {
	switch magic {
	case unix.EXT4_SUPER_MAGIC:
		return "ext4" // or ext2, ext3: they share the number
	case unix.XFS_SUPER_MAGIC:
		return "xfs"
	case unix.BTRFS_SUPER_MAGIC:
		return "btrfs"
	case unix.F2FS_SUPER_MAGIC:
		return "f2fs"
	case unix.TMPFS_MAGIC:
		return "tmpfs"
	case unix.OVERLAYFS_SUPER_MAGIC:
		return "overlay"
	case unix.FUSE_SUPER_MAGIC:
		return "fuse"
	case unix.NFS_SUPER_MAGIC:
		return "nfs"
	case unix.CEPH_SUPER_MAGIC:
		return "ceph"
	case unix.SMB2_SUPER_MAGIC:
		return "smb2"
	case unix.V9FS_MAGIC:
		return "9p"
	case 0x2fc12fc1:
		return "zfs"
	case 0x0bd00bd0:
		return "lustre"
	case 0x47504653:
		return "gpfs"
	}
	return fmt.Sprintf("%#x", magic)
}
