package e2e

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
)

// TestBuild compiles and links a real program, sealfs itself, from sources in
// the mount, and wants the same bytes as from a build outside. The sample takes
// what it can from Go's cache outside; all of it has the cache in the mount too.
func TestBuild(t *testing.T) {
	i := newInstance(t)
	i.up()
	module := strings.TrimSpace(must(t, "", "go", "list", "-m", "-f", "{{.Dir}}"))
	src, reference := filepath.Join(i.mnt, "src"), filepath.Join(i.dir, "src")
	list := must(t, module, "go", "list", "-f", `{{$d := .Dir}}{{range .GoFiles}}{{$d}}/{{.}}{{"\n"}}{{end}}{{range .SFiles}}{{$d}}/{{.}}{{"\n"}}{{end}}`, "./...")
	for path := range strings.FieldsSeq(list + module + "/go.mod\n" + module + "/go.sum\n") {
		b, err := os.ReadFile(path)
		for _, dir := range []string{src, reference} {
			to := filepath.Join(dir, strings.TrimPrefix(path, module))
			err = errors.Join(err, os.MkdirAll(filepath.Dir(to), 0o755), os.WriteFile(to, b, 0o644))
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	tmp := filepath.Join(i.mnt, "tmp")
	if err := os.Mkdir(tmp, 0o755); err != nil {
		t.Fatal(err)
	}
	build := func(dir, out string, env ...string) []byte {
		t.Helper()
		p := program{args: []string{"go", "build", "-trimpath", "-buildvcs=false", "-o", out, "./cmd/sealfs"}, dir: dir, env: append(env, "CGO_ENABLED=0")}
		if r := p.run(t, programTime); r.code != 0 {
			t.Fatalf("go build in %s: %v", dir, r)
		}
		b, err := os.ReadFile(out)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	env := []string{"GOTMPDIR=" + tmp}
	if *full {
		env = append(env, "GOCACHE="+filepath.Join(i.mnt, "cache"))
	}
	inside := build(src, filepath.Join(i.mnt, "sealfs"), env...)
	outside := build(reference, filepath.Join(i.dir, "sealfs"))
	if !bytes.Equal(inside, outside) {
		t.Errorf("the program built in the mount: %s", difference(inside, outside))
	}
	must(t, "", filepath.Join(i.mnt, "sealfs"), "version")
	if *full {
		must(t, src, "go", "vet", "./op")
	}
	i.down()
	i.fsck()
}

// TestGit makes a repository of Go's source, packs it, clones it and has git
// check both.
func TestGit(t *testing.T) {
	i := newInstance(t)
	if _, err := exec.LookPath("git"); err != nil {
		t.Skip("skipped: there is no git")
	}
	t.Setenv("GIT_CONFIG_GLOBAL", "/dev/null")
	t.Setenv("GIT_CONFIG_NOSYSTEM", "1")
	for _, who := range []string{"AUTHOR", "COMMITTER"} {
		t.Setenv("GIT_"+who+"_NAME", "Somebody")
		t.Setenv("GIT_"+who+"_EMAIL", "somebody@example.com")
	}
	var names []string
	if !*full {
		names = []string{"go", "net", "os"}
	}
	items := goTree(t, names...)
	i.up()
	repo, clone := filepath.Join(i.mnt, "repo"), filepath.Join(i.mnt, "clone")
	must(t, "", "git", "init", "-q", "-b", "main", repo)
	copyTree(t, repo, items)
	git := func(args ...string) string {
		t.Helper()
		return must(t, repo, append([]string{"git"}, args...)...)
	}
	git("add", "-A")
	git("commit", "-q", "-m", "all of it")
	git("fsck", "--full", "--strict")
	// Another commit, so that there is something to pack against.
	changed := items[len(items)-1]
	if err := os.WriteFile(filepath.Join(repo, changed.name), append(bytes.Clone(changed.data), '\n'), 0o644); err != nil {
		t.Fatal(err)
	}
	git("commit", "-q", "-a", "-m", "a change")
	git("revert", "--no-edit", "HEAD")
	git("gc", "-q", "--prune=now")
	git("fsck", "--full", "--strict")
	if s := git("status", "--porcelain"); s != "" {
		t.Errorf("git status after gc:\n%s", s)
	}
	must(t, "", "git", "clone", "-q", "--no-local", repo, clone)
	i.down()
	i.fsck()
	i.up()
	git("fsck", "--full", "--strict")
	compare(t, repo, withoutEmpty(items, false), false, ".git")
	compare(t, clone, withoutEmpty(items, true), false, ".git")
}

// withoutEmpty leaves out directories that hold no file, if told so: git does
// not keep them.
func withoutEmpty(items []item, really bool) []item {
	if !really {
		return items
	}
	used := make(map[string]bool)
	for _, it := range items {
		for dir := filepath.Dir(it.name); !it.mode.IsDir() && dir != "."; dir = filepath.Dir(dir) {
			used[dir] = true
		}
	}
	var kept []item
	for _, it := range items {
		if !it.mode.IsDir() || used[it.name] {
			kept = append(kept, it)
		}
	}
	return kept
}

// sqlite runs a script on a database.
func sqlite(t testing.TB, db, script string) string {
	t.Helper()
	r := program{args: []string{"sqlite3", "-bail", "-batch", db}, stdin: ".timeout 60000\n" + script}.run(t, programTime)
	if r.code != 0 || r.errOut != "" {
		t.Fatalf("sqlite3 %s: %v", db, r)
	}
	return strings.TrimSpace(r.out)
}

// journals are sqlite's two ways to be safe; the second shares memory by mmap.
var journals = []string{"delete", "wal"}

// needSQLite skips the test without sqlite's shell.
func needSQLite(t testing.TB) {
	t.Helper()
	if _, err := exec.LookPath("sqlite3"); err != nil {
		t.Skip("skipped: there is no sqlite3")
	}
}

// newDatabase makes a database with one counter.
func newDatabase(t testing.TB, db, journal string) {
	t.Helper()
	out := sqlite(t, db, "PRAGMA journal_mode="+journal+"; CREATE TABLE counter (n INTEGER); INSERT INTO counter VALUES (0); CREATE TABLE rows (k INTEGER PRIMARY KEY, v BLOB);")
	if out != journal {
		t.Fatalf("journal_mode=%s: sqlite chose %q", journal, out)
	}
}

// TestSQLite lets several processes count in one database, and fills a table.
func TestSQLite(t *testing.T) {
	i := newInstance(t)
	needSQLite(t)
	i.up()
	writers, each := 2, 40
	if *full {
		writers, each = 4, 250
	}
	for _, journal := range journals {
		t.Run(journal, func(t *testing.T) {
			db := filepath.Join(i.mnt, journal+".db")
			newDatabase(t, db, journal)
			var wg sync.WaitGroup
			outs := make([]result, writers)
			for w := range writers {
				wg.Go(func() {
					script := ".timeout 60000\n" + strings.Repeat("BEGIN IMMEDIATE; UPDATE counter SET n = n + 1; INSERT INTO rows (v) VALUES (randomblob(500)); COMMIT;\n", each)
					outs[w] = program{args: []string{"sqlite3", "-bail", "-batch", db}, stdin: script}.run(t, programTime)
				})
			}
			wg.Wait()
			for _, r := range outs {
				if r.code != 0 || r.errOut != "" {
					t.Fatalf("a writer: %v", r)
				}
			}
			n := writers * each
			if got, want := sqlite(t, db, "SELECT n FROM counter; SELECT count(*) FROM rows; PRAGMA integrity_check;"), fmt.Sprintf("%d\n%d\nok", n, n); got != want {
				t.Errorf("after %d transactions: %q, want %q", n, got, want)
			}
			sqlite(t, db, "DELETE FROM rows WHERE k % 2; VACUUM;")
			if got, want := sqlite(t, db, "SELECT count(*) FROM rows; PRAGMA integrity_check;"), fmt.Sprintf("%d\nok", n/2); got != want {
				t.Errorf("after VACUUM: %q, want %q", got, want)
			}
		})
	}
	i.down()
	i.fsck()
}
