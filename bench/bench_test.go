package bench

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"sealfs"
)

// dieEnv makes a worker process of the tests end at once with a complaint.
const dieEnv = "SEALFS_BENCH_TEST_DIE"

func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == WorkerCommand {
		if os.Getenv(dieEnv) != "" {
			fmt.Fprintln(os.Stderr, "this worker is unwell")
			os.Exit(3)
		}
		os.Exit(WorkerMain(os.Args[2:]))
	}
	os.Exit(m.Run())
}

// hook is a Progress writer that does something between two phases.
type hook func(line string)

func (h hook) Write(p []byte) (int, error) {
	h(string(p))
	return len(p), nil
}

// tiny returns options for a run of milliseconds.
func tiny(t *testing.T) Options {
	o := DefaultOptions(t.TempDir())
	o.Files, o.Workers, o.Sizes = 8, 3, []int64{0, 3901}
	return o
}

func mustBeEmpty(t *testing.T, dir string) {
	t.Helper()
	left, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	if len(left) > 0 {
		t.Errorf("%d entries are left, the first: %s", len(left), left[0].Name())
	}
}

// files returns the paths of the benchmark's files, sorted.
func files(t *testing.T, dir string) []string {
	t.Helper()
	paths, err := filepath.Glob(filepath.Join(dir, "sealfs-bench.*", "*", "*", "f.*"))
	if err != nil {
		t.Fatal(err)
	}
	return paths
}

func TestRun(t *testing.T) {
	for _, processes := range []bool{false, true} {
		for _, shared := range []bool{false, true} {
			t.Run(fmt.Sprintf("processes=%v/shared=%v", processes, shared), func(t *testing.T) {
				o := tiny(t)
				o.Processes, o.Shared, o.Repeat, o.Shuffle, o.Fsync = processes, shared, 2, true, true
				o.Sizes = []int64{0, 3901, chunk + 5}
				o.Phases = []string{PhaseMkdir, PhaseCreate, PhaseStat, PhaseRead, PhaseReaddir, PhaseRemove, PhaseReaddir, PhaseRmdir}
				lines := 0
				o.Progress = hook(func(line string) {
					if strings.HasPrefix(line, "run ") {
						lines++
					}
				})
				// Without directories there is nothing for the last listing
				// of the later sizes to find: 0 entries are right.
				report, err := Run(t.Context(), o)
				if err != nil {
					t.Fatal(err)
				}
				mustBeEmpty(t, o.Dir)
				if want := 8 + 2*6; len(report.Rows) != want || lines != 2*want {
					t.Fatalf("%d rows and %d lines of progress, want %d and %d", len(report.Rows), lines, want, 2*want)
				}
				all := int64(o.Files * o.Workers)
				listers := int64(1)
				if shared {
					listers = int64(o.Workers)
				}
				for i, row := range report.Rows {
					ops, moved := all, int64(0)
					switch {
					case row.Phase == PhaseReaddir && i == 4:
						ops = 2 * all * listers // files and directories
					case row.Phase == PhaseReaddir && i == 6:
						ops = all * listers // directories
					case row.Phase == PhaseReaddir && report.Rows[i-1].Phase == PhaseRemove:
						ops = 0
					case row.Phase == PhaseReaddir:
						ops = all * listers
					case row.Phase == PhaseCreate || row.Phase == PhaseRead:
						moved = all * row.Size
					}
					if row.Ops != ops || row.Errors != 0 || row.Bytes != moved || len(row.Runs) != 2 {
						t.Errorf("row %d: %+v, want %d operations and %d bytes", i, row, ops, moved)
					}
					if row.Seconds <= 0 || row.P50 > row.P99 || ops > 0 && (row.P50 <= 0 || row.OpsPerSec <= 0) {
						t.Errorf("row %d is impossible: %+v", i, row)
					}
				}
			})
		}
	}
}

func TestRunWithDefaults(t *testing.T) {
	o := DefaultOptions("somewhere")
	if len(o.Phases) != 5 || len(o.Sizes) != 4 || o.Files != 1000 || o.Workers != 4 || o.Repeat != 1 || !o.Verify {
		t.Errorf("defaults are %+v", o)
	}
	report, err := Run(t.Context(), Options{Dir: t.TempDir(), Files: 2, Workers: 1, Phases: []string{PhaseCreate}})
	if err != nil {
		t.Fatal(err)
	}
	if len(report.Rows) != 4 || report.Environment.Options.Repeat != 1 {
		t.Errorf("zero values did not become the defaults: %+v", report)
	}
}

func TestRunKeepsForeignFiles(t *testing.T) {
	o := tiny(t)
	taken := filepath.Join(o.Dir, fmt.Sprintf("sealfs-bench.%d", os.Getpid()))
	if err := os.WriteFile(taken, []byte("mine"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Run(t.Context(), o); err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(taken); err != nil || string(b) != "mine" {
		t.Errorf("the file that has the directory's name is now %q, %v", b, err)
	}
	if left, _ := os.ReadDir(o.Dir); len(left) != 1 {
		t.Errorf("%d entries are left, want 1", len(left))
	}
}

func TestCancelBetweenPhases(t *testing.T) {
	for _, processes := range []bool{false, true} {
		t.Run(fmt.Sprintf("processes=%v", processes), func(t *testing.T) {
			ctx, cancel := context.WithCancelCause(t.Context())
			why := errors.New("had enough")
			o := tiny(t)
			o.Processes = processes
			o.Progress = hook(func(line string) {
				if strings.Contains(line, "stat:") {
					cancel(why)
				}
			})
			report, err := Run(ctx, o)
			if !errors.Is(err, why) {
				t.Errorf("error %v, want %v", err, why)
			}
			if report == nil || len(report.Rows) != 2 {
				t.Errorf("report %+v, want the two complete phases", report)
			}
			mustBeEmpty(t, o.Dir)
		})
	}
}

func TestCancelInsidePhase(t *testing.T) {
	for _, processes := range []bool{false, true} {
		t.Run(fmt.Sprintf("processes=%v", processes), func(t *testing.T) {
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			o := tiny(t)
			o.Processes, o.Workers, o.Files = processes, 2, 500_000 // minutes of work
			go func() {
				for ctx.Err() == nil {
					if found, _ := filepath.Glob(filepath.Join(o.Dir, "*", "*", "w1", "f.1.9")); len(found) > 0 {
						cancel()
					}
					runtime.Gosched()
				}
			}()
			report, err := Run(ctx, o)
			if !errors.Is(err, context.Canceled) {
				t.Errorf("error %v, want %v", err, context.Canceled)
			}
			if report == nil || len(report.Rows) != 0 {
				t.Errorf("report %+v, want one without rows", report)
			}
			mustBeEmpty(t, o.Dir)
		})
	}
}

func TestCancelledBeforehand(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	o := tiny(t)
	if _, err := Run(ctx, o); !errors.Is(err, context.Canceled) {
		t.Errorf("error %v, want %v", err, context.Canceled)
	}
	mustBeEmpty(t, o.Dir)
}

func TestVerify(t *testing.T) {
	must := func(t *testing.T, err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	flip := func(t *testing.T, path string) {
		b, err := os.ReadFile(path)
		must(t, err)
		b[len(b)/2] ^= 1
		must(t, os.WriteFile(path, b, 0o600))
	}
	for _, tc := range []struct {
		name                string
		harm                func(t *testing.T, files []string)
		stat, read, readdir int64 // errors
		unverifiedRead      int64
	}{
		{"nothing", func(*testing.T, []string) {}, 0, 0, 0, 0},
		{"flipped bit", func(t *testing.T, f []string) { flip(t, f[5]) }, 0, 1, 0, 0},
		{"swapped files", func(t *testing.T, f []string) {
			must(t, os.Rename(f[0], f[0]+"~"))
			must(t, os.Rename(f[1], f[0]))
			must(t, os.Rename(f[0]+"~", f[1]))
		}, 0, 2, 0, 0},
		{"truncated", func(t *testing.T, f []string) { must(t, os.Truncate(f[2], 100)) }, 1, 1, 0, 1},
		{"longer", func(t *testing.T, f []string) { must(t, os.Truncate(f[2], 5000)) }, 1, 0, 0, 0},
		{"foreign name", func(t *testing.T, f []string) { must(t, os.WriteFile(f[0]+"x", nil, 0o600)) }, 0, 0, 1, 0},
		{"replaced by a directory", func(t *testing.T, f []string) {
			must(t, os.Remove(f[0]))
			must(t, os.Mkdir(f[0], 0o700))
		}, 1, 1, 0, 1},
	} {
		for _, verify := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s/verify=%v", tc.name, verify), func(t *testing.T) {
				o := tiny(t)
				o.Sizes, o.Verify = []int64{3901}, verify
				o.Phases = []string{PhaseCreate, PhaseStat, PhaseRead, PhaseReaddir}
				o.Progress = hook(func(line string) {
					if strings.Contains(line, "create:") {
						tc.harm(t, files(t, o.Dir))
					}
				})
				report, err := Run(t.Context(), o)
				want := map[string]int64{PhaseStat: tc.stat, PhaseRead: tc.read, PhaseReaddir: tc.readdir}
				if !verify {
					want = map[string]int64{PhaseRead: tc.unverifiedRead}
				}
				var sum int64
				for _, row := range report.Rows {
					sum += row.Errors
					if row.Errors != want[row.Phase] {
						t.Errorf("%s: %d errors, want %d (%v)", row.Phase, row.Errors, want[row.Phase], err)
					}
				}
				if (err != nil) != (sum > 0) {
					t.Errorf("%d errors were counted, but Run says %v", sum, err)
				}
				if verify && sum > 0 && !errors.Is(err, sealfs.ErrCorrupt) {
					t.Errorf("error %v is not ErrCorrupt", err)
				}
				mustBeEmpty(t, o.Dir)
			})
		}
	}
}

// TestFailedOperation checks that a failure is counted and named, in both kinds
// of workers, and that the other operations go on.
func TestFailedOperation(t *testing.T) {
	for _, processes := range []bool{false, true} {
		t.Run(fmt.Sprintf("processes=%v", processes), func(t *testing.T) {
			o := tiny(t)
			o.Processes, o.Sizes = processes, []int64{10}
			o.Progress = hook(func(line string) {
				if strings.Contains(line, "read:") {
					if err := os.Remove(files(t, o.Dir)[0]); err != nil {
						t.Error(err)
					}
				}
			})
			o.Phases = []string{PhaseCreate, PhaseRead, PhaseRemove}
			report, err := Run(t.Context(), o)
			if !errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), "f.0.0") {
				t.Errorf("error %v should be ErrNotExist and name the file", err)
			}
			row := report.Rows[2]
			if all := int64(o.Files * o.Workers); row.Errors != 1 || row.Ops != all-1 {
				t.Errorf("remove: %d done and %d errors, want %d and 1", row.Ops, row.Errors, all-1)
			}
		})
	}
}

func TestReaddirFindsMissingAndDouble(t *testing.T) {
	dir := t.TempDir()
	j, err := prepare(task{Phase: PhaseReaddir, Dir: dir, Workers: 2, Worker: 1, Files: 3, Verify: true, HaveFiles: true}, nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name string
		ok   bool
	}{{"f.1.0", true}, {"f.1.0", false}, {"f.1.2", true}, {"f.1.3", false}, {"f.0.1", false}, {"d.1.1", false}, {"f.1", false},
		{"f.1.-1", false}, {"", false}} {
		if err := j.tick([]byte(tc.name)); (err == nil) != tc.ok {
			t.Errorf("entry %q: %v", tc.name, err)
		}
	}
	r := new(result)
	j.missing(r)
	if r.Errors != 1 || !r.Corrupt {
		t.Errorf("result %+v, want one missing entry", r)
	}
}

func TestNoRoom(t *testing.T) {
	o := tiny(t)
	o.Sizes, o.Files, o.Workers = []int64{SizeMax}, 100_000, 1000 // 10^20 bytes
	if _, err := Run(t.Context(), o); !errors.Is(err, sealfs.ErrNoSpace) {
		t.Errorf("error %v, want %v", err, sealfs.ErrNoSpace)
	}
	mustBeEmpty(t, o.Dir)
}

func TestDyingWorker(t *testing.T) {
	t.Setenv(dieEnv, "1")
	o := tiny(t)
	o.Processes = true
	_, err := Run(t.Context(), o)
	if err == nil || !strings.Contains(err.Error(), "this worker is unwell") {
		t.Errorf("error %v should quote the worker's complaint", err)
	}
	mustBeEmpty(t, o.Dir)
}

func TestWorkerRefusesNonsense(t *testing.T) {
	for _, tc := range []struct{ name, in, want string }{
		{"nothing", "", ""},
		{"no JSON", "hello", ""},
		{"start without a task", `{"start_at":1}`, "without a task"},
		{"unknown phase", `{"task":{"phase":"dance","workers":1}}`, "dance"},
		{"too many files", `{"task":{"phase":"read","workers":1,"files":999999999999}}`, "out of range"},
		{"negative size", `{"task":{"phase":"read","workers":1,"size":-1}}`, "out of range"},
		{"no such worker", `{"task":{"phase":"read","workers":1,"worker":1}}`, "out of range"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var out bytes.Buffer
			if err := serve(strings.NewReader(tc.in), &out); err != nil {
				t.Fatal(err)
			}
			dec := json.NewDecoder(&out)
			var first, second answer
			if err := dec.Decode(&first); err != nil || first.Hello != hello {
				t.Fatalf("first answer is %+v, %v", first, err)
			}
			dec.Decode(&second)
			if second.Ready || second.Result != nil || (second.Fault != "") != (tc.want != "") || !strings.Contains(second.Fault, tc.want) {
				t.Errorf("answer %+v, want a fault about %q", second, tc.want)
			}
		})
	}
	if code := WorkerMain([]string{"x"}); code != 2 {
		t.Errorf("WorkerMain with an argument returns %d, want 2", code)
	}
}

func TestValidateReportsAllFaults(t *testing.T) {
	t.Setenv(workerEnv, "1")
	o := Options{
		Dir: filepath.Join(t.TempDir(), "absent"), Files: -1, Workers: WorkersMax + 1, Repeat: -5, Processes: true,
		Sizes: []int64{4096, -1, 4096}, Phases: []string{PhaseRead, PhaseCreate, PhaseCreate, PhaseRemove, PhaseStat, PhaseRmdir, "dance"},
	}
	err := o.Validate()
	if !errors.Is(err, sealfs.ErrInvalid) {
		t.Fatalf("error %v is not ErrInvalid", err)
	}
	for _, part := range []string{"absent", "files of a worker is -1", "workers is 1025", "repetitions is -5", "size is -1", "4096 is given twice",
		`"read" comes before`, `"create" comes while`, `"stat" comes before`, `"rmdir" comes before`, `"dance" is not known`, "worker process cannot"} {
		if !strings.Contains(err.Error(), part) {
			t.Errorf("no word of %q in:\n%v", part, err)
		}
	}
	if n := strings.Count(err.Error(), "\n") + 1; n != 12 {
		t.Errorf("%d faults, want 12:\n%v", n, err)
	}
	if report, err := Run(t.Context(), o); report != nil || err == nil {
		t.Errorf("Run accepts what Validate does not: %v, %v", report, err)
	}
	if err := (Options{Dir: t.TempDir(), Phases: []string{PhaseMkdir, PhaseReaddir, PhaseRmdir, PhaseCreate, PhaseRemove, PhaseCreate}}).Validate(); err != nil {
		t.Errorf("a sound order of phases is refused: %v", err)
	}
}

func sampleReport() *Report {
	o := DefaultOptions("/mnt/x")
	o.Repeat, o.Processes, o.Shared = 3, true, true
	return &Report{
		Environment: Environment{
			Time: time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC), Host: "h", Kernel: "6.18.0", CPUs: 2,
			FSType: "fuse.sealfs", Source: "sealfs", Mount: "rw,noatime", Options: &o,
		},
		Warnings: []string{"it rained"},
		Rows: []Row{
			{Size: 0, Phase: PhaseCreate, Ops: 4000, Seconds: 0.25, OpsPerSec: 16000, P50: 98 * time.Microsecond, P99: 1234567, Max: 2 * time.Second,
				Runs: []float64{15000, 16000, 18000}},
			{Size: 65536, Phase: PhaseRead, Ops: 3999, Seconds: 1.5, OpsPerSec: 2666, P50: 350, P99: 999_960, Max: 12_340_000, Errors: 3, Bytes: 3999 << 16,
				Runs: []float64{2666, 2666, 2666}},
			{Size: 3901, Phase: PhaseStat, Runs: []float64{0, 0, 1}},
		},
	}
}

const sampleTable = `/mnt/x: fuse.sealfs, 2026-03-01T12:00:00Z
mounted from sealfs with rw,noatime
h: Linux 6.18.0, 2 CPUs
4 processes, 1000 files each, one shared directory, medians of 3 runs
warning: it rained

    size   phase   ops  ops/s  MiB/s  spread     p50     p99     max  errors
     0 B  create  4000  16000      -    1.20  98.0us  1.23ms   2.00s       0
  64 KiB    read  3999   2666  166.6    1.00   350ns  1000us  12.3ms       3
  3901 B    stat     0      0      -    0.00       -       -       -       0
`

func TestTable(t *testing.T) {
	var b strings.Builder
	if err := sampleReport().WriteTable(&b); err != nil {
		t.Fatal(err)
	}
	if b.String() != sampleTable {
		t.Errorf("the table is\n%s\nwant\n%s", b.String(), sampleTable)
	}
	single := sampleReport()
	for i := range single.Rows {
		single.Rows[i].Runs = single.Rows[i].Runs[:1]
	}
	b.Reset()
	if err := single.WriteTable(&b); err != nil {
		t.Fatal(err)
	}
	if strings.Contains(b.String(), "spread") {
		t.Errorf("a single run has no spread:\n%s", b.String())
	}
}

func TestJSON(t *testing.T) {
	var b bytes.Buffer
	if err := sampleReport().WriteJSON(&b); err != nil {
		t.Fatal(err)
	}
	var back map[string]any
	if err := json.Unmarshal(b.Bytes(), &back); err != nil {
		t.Fatal(err)
	}
	row := back["rows"].([]any)[0].(map[string]any)
	for key, want := range map[string]any{"size": 0.0, "phase": "create", "ops": 4000.0, "seconds": 0.25, "ops_per_sec": 16000.0,
		"p50_ns": 98000.0, "p99_ns": 1234567.0, "max_ns": 2e9, "errors": 0.0, "bytes": 0.0} {
		if row[key] != want {
			t.Errorf("%s is %v, want %v", key, row[key], want)
		}
	}
	env := back["environment"].(map[string]any)
	if env["fs_type"] != "fuse.sealfs" || env["options"].(map[string]any)["drop_caches"] != false {
		t.Errorf("environment is %v", env)
	}
}

func TestObserve(t *testing.T) {
	r := observe(t.TempDir())
	if r.Environment.Kernel == "" || r.Environment.CPUs < 1 || r.Environment.FSType == "" || r.Environment.Time.IsZero() {
		t.Errorf("environment is %+v", r.Environment)
	}
	const table = `36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue
37 35 0:48 / /mnt/x rw,nosuid - fuse.sealfs sealfs rw,user_id=0
nonsense
38 35 0:49 / /mnt/y rw`
	m, ok := findMount(table, "0:48")
	if want := (mountInfo{"fuse.sealfs", "sealfs", "rw,nosuid,rw,user_id=0"}); !ok || m != want {
		t.Errorf("found %+v, %v; want %+v", m, ok, want)
	}
	if m, ok := findMount(table, "0:49"); ok {
		t.Errorf("an incomplete line passes for %+v", m)
	}
}
