package main

import (
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/spf13/pflag"

	"sealfs/node"
)

// TestMain makes this test program the command itself when the variable says so:
// the processes that the tests start, and those that these start, are real ones.
func TestMain(m *testing.M) {
	if os.Getenv("SEALFS_TEST_MAIN") == "1" {
		main()
		return
	}
	os.Exit(m.Run())
}

// result is what a command printed, and how it ended.
type result struct {
	out, err string
	code     int
}

// sealfs runs the command in a process of its own.
func sealfs(t *testing.T, args ...string) result {
	t.Helper()
	cmd := exec.Command(os.Args[0], args...)
	cmd.Env = environment()
	var out, err bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &err
	if e := cmd.Run(); e != nil && cmd.ProcessState == nil {
		t.Fatal(e)
	}
	return result{out.String(), err.String(), cmd.ProcessState.ExitCode()}
}

func environment() []string {
	env := slices.DeleteFunc(os.Environ(), func(v string) bool { return strings.HasPrefix(v, "SEALFS_") })
	return append(env, "SEALFS_TEST_MAIN=1")
}

// ok runs the command, which must succeed, and returns its output.
func ok(t *testing.T, args ...string) string {
	t.Helper()
	r := sealfs(t, args...)
	if r.code != 0 {
		t.Fatalf("sealfs %q: exit code %d\n%s%s", args, r.code, r.out, r.err)
	}
	return r.out
}

// refused runs the command, which must fail with one line that holds all words.
func refused(t *testing.T, words []string, args ...string) {
	t.Helper()
	r := sealfs(t, args...)
	if r.code == 0 || strings.Count(r.err, "\n") != 1 || !strings.HasPrefix(r.err, "sealfs: ") {
		t.Errorf("sealfs %q: exit code %d, want a failure in one line:\n%s%s", args, r.code, r.out, r.err)
	}
	for _, w := range words {
		if !strings.Contains(r.err, w) {
			t.Errorf("sealfs %q does not say %q:\n%s", args, w, r.err)
		}
	}
}

func TestHelp(t *testing.T) {
	overview := ok(t, "help")
	for _, c := range table() {
		if !strings.Contains(overview, "\n  "+c.name+" ") || !slices.Contains(groups, c.group) {
			t.Errorf("the overview lacks %s", c.name)
		}
		if n := len(c.examples); n < 2 || n > 4 {
			t.Errorf("%s has %d examples, want 2 to 4", c.name, n)
		}
		for _, e := range c.examples {
			if !strings.Contains(e, "sealfs "+c.name) && !slices.ContainsFunc(c.aliases, func(a string) bool { return strings.Contains(e, "sealfs "+a) }) {
				t.Errorf("example of %s: %s", c.name, e)
			}
			checkFlags(t, c, e)
		}
		var b bytes.Buffer
		c.writeHelp(&b)
		if !strings.Contains(b.String(), c.short) || !strings.HasSuffix(b.String(), c.examples[len(c.examples)-1]+"\n") {
			t.Errorf("help of %s:\n%s", c.name, b.String())
		}
	}
	for _, args := range [][]string{{"up", "--help"}, {"help", "up"}, {"up", "-h"}} {
		if got := ok(t, args...); !strings.Contains(got, "--mount directory") || !strings.Contains(got, "Examples:") {
			t.Errorf("%q prints\n%s", args, got)
		}
	}
	for _, o := range node.Defaults() {
		if got := ok(t, "help", "up"); !strings.Contains(got, "--"+o.Flag()+" ") {
			t.Errorf("`help up` does not mention --%s", o.Flag())
		}
	}
}

// checkFlags parses the flags of an example.
func checkFlags(t *testing.T, c command, example string) {
	t.Helper()
	_, line, _ := strings.Cut(example, "sealfs ")
	_, line, _ = strings.Cut(line, " ")
	line, _, _ = strings.Cut(line, " | ")
	line, _, _ = strings.Cut(line, " && ")
	line, _, _ = strings.Cut(line, " > ")
	line, _, _ = strings.Cut(line, "    #")
	f := pflag.NewFlagSet(c.name, pflag.ContinueOnError)
	c.setup(f)
	c.common(f, new(call))
	if err := f.Parse(strings.Fields(line)); err != nil {
		t.Errorf("example %q: %v", example, err)
	} else if n := f.NArg(); n < c.min || n > c.max {
		t.Errorf("example %q has %d arguments", example, n)
	}
}

func TestUsageErrors(t *testing.T) {
	for _, c := range []struct {
		args  []string
		words []string
	}{
		{[]string{"statsu"}, []string{`did you mean "status"`}},
		{[]string{"upp"}, []string{`did you mean "up"`}},
		{[]string{"creat"}, []string{`did you mean "create`}},
		{[]string{"frobnicate"}, []string{`no command "frobnicate"`, "sealfs help"}},
		{[]string{"help", "list-volums"}, []string{`did you mean "list-volumes"`}},
		{[]string{"up", "--siez", "1G"}, []string{"--siez", "sealfs help up"}},
		{[]string{"up", "--size", "4GB"}, []string{`"4GB" is not a size`}},
		{[]string{"up", "--size", "0"}, []string{"--size 0"}},
		{[]string{"up", "here"}, []string{"usage: sealfs up"}},
		{[]string{"mount", "main"}, []string{"usage: sealfs mount [flags] VOLUME MOUNTPOINT"}},
		{[]string{"destroy", "--data", "/nowhere"}, []string{"/nowhere", "--yes"}},
		{[]string{"delete-volume", "main"}, []string{"--yes"}},
		{[]string{"config", "get"}, []string{"sealfs config show"}},
		{[]string{"create-volume", "x", "--mode", "999"}, []string{"octal"}},
	} {
		refused(t, c.words, c.args...)
		if r := sealfs(t, c.args...); r.code != exitUsage {
			t.Errorf("%q: exit code %d, want %d", c.args, r.code, exitUsage)
		}
	}
	if r := sealfs(t); r.code != exitUsage || !strings.Contains(r.err, "list-volumes") {
		t.Errorf("without a command: %+v", r)
	}
}

func TestEditDistance(t *testing.T) {
	for _, c := range []struct {
		a, b string
		want int
	}{{"", "", 0}, {"a", "", 1}, {"", "abc", 3}, {"up", "up", 0}, {"status", "statsu", 2}, {"kitten", "sitting", 3}} {
		if got := editDistance(c.a, c.b); got != c.want {
			t.Errorf("editDistance(%q, %q) = %d, want %d", c.a, c.b, got, c.want)
		}
	}
}

func TestVersion(t *testing.T) {
	var v versions
	if err := json.Unmarshal([]byte(ok(t, "version", "--json")), &v); err != nil || v.Protocol < 1 || v.Device < 1 || v.Region < 1 || v.Go == "" {
		t.Errorf("%+v, %v", v, err)
	}
	if text := ok(t, "--version"); !regexp.MustCompile(`^sealfs \S+ .*\nprotocol \d+, device format \d+, region format \d+\n$`).MatchString(text) {
		t.Errorf("version prints %q", text)
	}
}

// TestNothingRuns: commands that need the main process say how to start it.
func TestNothingRuns(t *testing.T) {
	dir := t.TempDir() + "/none"
	for _, args := range [][]string{{"list-volumes"}, {"list-servers"}, {"create-volume", "x"}, {"delete-volume", "x", "--yes"}, {"mount", "main", dir + "-mnt"}, {"locate", "."}} {
		refused(t, []string{dir, "sealfs up --data " + dir}, append(args, "--data", dir)...)
	}
	if out := ok(t, "status", "--data", dir); !strings.HasPrefix(out, "empty\n") {
		t.Errorf("status of nothing: %q", out)
	}
	if out := ok(t, "down", "--data", dir); !strings.Contains(out, "nothing was running") {
		t.Errorf("down of nothing: %q", out)
	}
	refused(t, []string{"no data directory"}, "destroy", "--data", dir, "--yes")
	if _, err := os.Stat(dir); !os.IsNotExist(err) {
		t.Error("looking made the directory")
	}
}

func TestBenchCommand(t *testing.T) {
	out := ok(t, "bench", "--files", "3", "--workers", "2", "--sizes", "0,1K", "--processes", "--json", t.TempDir())
	var r struct {
		Rows []struct {
			Size, Ops int64
			Phase     string
		}
	}
	if err := json.Unmarshal([]byte(out), &r); err != nil || len(r.Rows) != 10 || r.Rows[0].Ops != 6 || r.Rows[9].Size != 1024 {
		t.Errorf("%+v, %v", r, err)
	}
	refused(t, []string{"is not a size"}, "bench", "--sizes", "big", t.TempDir())
	refused(t, []string{"/nowhere"}, "bench", "/nowhere")
}

func TestConfigShow(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(dir+"/config.yaml", []byte("options: {cache: 8M}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if out := ok(t, "config", "show", "--data", dir); !regexp.MustCompile(`(?m)^cache +8M +file$`).MatchString(out) || !regexp.MustCompile(`(?m)^staging +128M +default$`).MatchString(out) {
		t.Errorf("config show prints\n%s", out)
	}
	if err := os.WriteFile(dir+"/config.yaml", []byte("options:\n  cash: 8M\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	refused(t, []string{dir + "/config.yaml", "line 2", `"cash"`}, "config", "show", "--data", dir)
}
