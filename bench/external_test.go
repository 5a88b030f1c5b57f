package bench

import (
	"errors"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"sealfs"
)

// The samples have the form of what mdtest and IOR 4.1 print.
const mdtestSample = `-- started at 01/02/2026 10:00:00 --

mdtest-4.1.0+dev was launched with 4 total task(s) on 1 node(s)
WARNING: unable to use realpath() on file system.
4 tasks, 200 files

SUMMARY rate (in ops/sec): (of 1 iterations)
   Operation                     Max            Min           Mean        Std Dev
   ---------                     ---            ---           ----        -------
   File creation               28047.500      28047.500      28047.500          0.000
   File stat                       0.000          0.000          0.000          0.000
   File read                  265210.496     265210.496     265210.496          0.000
   File removal                29873.960      29873.960      29873.960          0.000

SUMMARY time (in ms/op): (of 1 iterations)
   Operation                     Max            Min           Mean        Std Dev
   ---------                     ---            ---           ----        -------
   File read                       0.001          0.001          0.001          0.000
ERROR: verifying the data on read (3 errors)! Take the performance values with care!
-- finished at 01/02/2026 10:00:01 --
`

const iorSample = `IOR-4.1.0+dev: MPI Coordinated Test of Parallel I/O
Options:
access              : single-shared-file

Results:

access    bw(MiB/s)  IOPS       Latency(s)  block(KiB) xfer(KiB)  open(s)    wr/rd(s)   close(s)   total(s)   iter
------    ---------  ----       ----------  ---------- ---------  --------   --------   --------   --------   ----
write     512.00     11786      0.000170    45.91      45.91      0.000155   0.003394   0.000010   0.003571   0

Summary of all tests:
Operation   Max(MiB)   Min(MiB)  Mean(MiB)     StdDev   Max(OPs)   Min(OPs)  Mean(OPs)     StdDev    Mean(s)
write         999.00     999.00     999.00       0.00   11201.24   11201.24   11201.24       0.00    0.00357
`

func TestReadOutput(t *testing.T) {
	row, complaints, err := readOutput("mdtest", "File read", []byte(mdtestSample), Row{Size: 3901, Ops: 200, Bytes: 200 * 3901})
	if err != nil || row.OpsPerSec != 265210.496 || math.Abs(row.Seconds*row.OpsPerSec-200) > 1e-9 || row.Errors != 3 || len(complaints) != 2 {
		t.Errorf("mdtest: %+v, %q, %v", row, complaints, err)
	}
	row, complaints, err = readOutput("ior", "write", []byte(iorSample), Row{Size: 1 << 20, Ops: 256, Bytes: 256 << 20})
	if err != nil || row.Seconds != 0.5 || row.OpsPerSec != 512 || row.Errors != 0 || len(complaints) != 0 {
		t.Errorf("IOR: %+v, %q, %v", row, complaints, err)
	}
	for _, tc := range []struct{ tool, label, output string }{
		{"mdtest", "File stat", mdtestSample}, // a rate of 0: the phase did not run
		{"mdtest", "Tree creation", mdtestSample},
		{"mdtest", "File read", ""},
		{"mdtest", "File read", "SUMMARY rate\n File read 1 2"},
		{"mdtest", "File read", "SUMMARY rate\n File read inf inf inf inf"},
		{"mdtest", "File read", "SUMMARY rate\n File read a b c d"},
		{"ior", "read", iorSample},
		{"ior", "write", "write 1 2 3 4 5 6"},
	} {
		if row, _, err := readOutput(tc.tool, tc.label, []byte(tc.output), Row{Ops: 1, Bytes: 1}); err == nil {
			t.Errorf("%s %q: %+v was read from output without it", tc.tool, tc.label, row)
		}
	}
}

func TestExternalNamesWhatIsMissing(t *testing.T) {
	t.Setenv("PATH", t.TempDir())
	t.Setenv("MDTEST", "")
	t.Setenv("IOR", filepath.Join(t.TempDir(), "no-ior"))
	dir := t.TempDir()
	report, err := RunExternal(t.Context(), External{Dir: dir})
	if !errors.Is(err, sealfs.ErrNotSupported) {
		t.Fatalf("error %v, want %v", err, sealfs.ErrNotSupported)
	}
	for _, part := range []string{"mdtest is not in PATH", "MDTEST", "no-ior"} {
		if !strings.Contains(err.Error(), part) {
			t.Errorf("no word of %q in: %v", part, err)
		}
	}
	if len(report.Warnings) < 4 || len(report.Rows) != 0 {
		t.Errorf("report %+v, want a warning for each workload", report)
	}
	mustBeEmpty(t, dir)
}

// script makes an executable shell script.
func script(t *testing.T, dir, name, text string) string {
	t.Helper()
	path := filepath.Join(dir, name)
	if err := os.WriteFile(path, []byte("#!/bin/sh\n"+text), 0o755); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestExternalRuns(t *testing.T) {
	bin, dir := t.TempDir(), t.TempDir()
	log := filepath.Join(bin, "log")
	if err := os.WriteFile(filepath.Join(bin, "out"), []byte(mdtestSample), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("MDTEST", script(t, bin, "mdtest", `echo "$@" >>`+log+`; exec cat `+filepath.Join(bin, "out")+"\n"))
	t.Setenv("IOR", script(t, bin, "ior", "echo no space here; exit 7\n"))
	t.Setenv("MPIRUN", script(t, bin, "mpirun", `echo mpirun "$1" "$2" "$3" >>`+log+`; shift 3; exec "$@"`+"\n"))
	t.Setenv("MPIRUN_ARGS", "--quiet")
	report, err := RunExternal(t.Context(), External{Dir: dir, Workloads: []string{IORHard, MdtestHard}, Percent: 10, Processes: 2})
	// The sample says that no file was statted, which ends mdtest-hard there.
	if err == nil || !strings.Contains(err.Error(), "exit status 7: no space here") || !strings.Contains(err.Error(), "mdtest-hard stat") {
		t.Errorf("error %v should name both failures", err)
	}
	if len(report.Rows) != 1 || report.Rows[0].Phase != "mdtest-hard/create" || report.Rows[0].Ops != 250 || report.Rows[0].Bytes != 250*3901 {
		t.Errorf("rows are %+v", report.Rows)
	}
	b, err := os.ReadFile(log)
	if err != nil {
		t.Fatal(err)
	}
	for _, part := range []string{"mpirun --quiet -n 2\n", "-n 125 ", " -C -Y\n", " -T\n", "-w 3901 -e 3901"} {
		if !strings.Contains(string(b), part) {
			t.Errorf("no %q in the commands:\n%s", part, b)
		}
	}
	mustBeEmpty(t, dir)
}

func TestExternalValidate(t *testing.T) {
	err := External{Dir: "", Workloads: []string{"dance"}, Processes: -1, Percent: -1}.Validate()
	if !errors.Is(err, sealfs.ErrInvalid) || strings.Count(err.Error(), "\n") != 3 {
		t.Errorf("want four faults, got: %v", err)
	}
}
