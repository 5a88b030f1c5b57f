package e2e

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// What becomes of a file that a writer has written.
const (
	planKeep   = iota
	planRename // written under another name, then renamed over
	planRemove
)

// state is how far a writer has come with a file. Each is set before the call it
// is named for, or after its return, so that what the calls have answered is a
// lower bound of what must be found.
type state int

const (
	stateNone    state = iota
	stateOpened        // open was called
	stateClosed        // close has returned
	stateChanged       // rename or unlink was called
	stateDone          // and has returned
)

// target is a file that a writer writes.
type target struct {
	name  string // from the round's directory
	mode  fs.FileMode
	data  []byte
	plan  int
	state state
}

// draft is the name under which the file is written.
func (f *target) draft() string {
	if f.plan == planRename {
		return f.name + ".draft"
	}
	return f.name
}

// writer unpacks a part of a tree below a directory of its own, and keeps account
// outside of the mount of what was answered. It is used by one goroutine, and
// looked at when that has ended.
type writer struct {
	root  string // below the mount point it writes through
	dirs  map[string]bool
	files []*target
	rng   *rand.Rand
	wrote func(n int) // told of each piece
}

func (w *writer) run() error {
	for _, f := range w.files {
		if err := w.file(f); err != nil {
			return err
		}
	}
	return nil
}

func (w *writer) mkdirs(dir string) error {
	if w.dirs[dir] {
		return nil
	}
	if dir != "." {
		if err := w.mkdirs(filepath.Dir(dir)); err != nil {
			return err
		}
	}
	if err := os.Mkdir(filepath.Join(w.root, dir), 0o755); err != nil {
		return err
	}
	w.dirs[dir] = true
	return nil
}

func (w *writer) file(f *target) error {
	if err := w.mkdirs(filepath.Dir(f.name)); err != nil {
		return err
	}
	path := filepath.Join(w.root, f.draft())
	f.state = stateOpened
	file, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, f.mode)
	if err != nil {
		return err
	}
	for rest := f.data; len(rest) > 0; {
		n := min(len(rest), 1+w.rng.IntN(64<<10))
		if _, err := file.Write(rest[:n]); err != nil {
			file.Close()
			return err
		}
		rest = rest[n:]
		w.wrote(n)
	}
	if err := file.Close(); err != nil {
		return err
	}
	f.state = stateClosed
	switch f.plan {
	case planKeep:
		return nil
	case planRename:
		f.state = stateChanged
		err = os.Rename(path, filepath.Join(w.root, f.name))
	case planRemove:
		f.state = stateChanged
		err = os.Remove(path)
	}
	if err == nil {
		f.state = stateDone
	}
	return err
}

// verdict is what a check has found.
type verdict struct {
	whole, short int      // files
	faults       []string // what must not be
}

func (v *verdict) fault(format string, args ...any) {
	v.faults = append(v.faults, fmt.Sprintf(format, args...))
}

// check holds what is found below dir, where the writer's files are seen, against
// what the writer was answered.
func (w *writer) check(t testing.TB, dir string) (v verdict) {
	t.Helper()
	found := make(map[string][]byte)
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) && path == dir {
			return nil // killed before it was made
		}
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		if d.IsDir() {
			found[rel+"/"] = nil
			return nil
		}
		b, err := os.ReadFile(path)
		found[rel] = b
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	for d := range w.dirs {
		if _, ok := found[d+"/"]; !ok {
			v.fault("directory %s was made and is missing", d)
		}
	}
	for _, f := range w.files {
		got, there := found[f.name]
		draft, drafted := found[f.draft()]
		delete(found, f.name)
		delete(found, f.draft())
		if f.plan == planRename && f.state <= stateClosed {
			// Nobody has renamed it yet.
			if there {
				v.fault("%s is there and was never renamed to", f.name)
			}
			got, there = draft, drafted
		}
		must, may := f.state >= stateClosed, f.state >= stateOpened
		switch {
		case f.plan == planRename && f.state >= stateChanged:
			if there && drafted {
				v.fault("%s has both names after rename", f.name)
			}
			if f.state == stateDone && drafted {
				v.fault("%s: the rename was answered, and the old name is there", f.name)
			}
			if !there {
				got, there = draft, drafted
			}
		case f.plan == planRemove && f.state >= stateChanged:
			must, may = false, f.state < stateDone
		}
		switch {
		case there && !may:
			v.fault("%s is there and must not be (state %d)", f.name, f.state)
		case !there && must:
			v.fault("%s was closed and is missing", f.name)
		case there && f.state >= stateClosed && !bytes.Equal(got, f.data):
			v.fault("%s was closed and is not whole: %s", f.name, difference(got, f.data))
		case there && !bytes.HasPrefix(f.data, got):
			v.fault("%s was open and holds what nobody wrote: %s", f.name, difference(got, f.data))
		case there && len(got) < len(f.data):
			v.short++
		case there:
			v.whole++
		}
	}
	for name := range found {
		if !strings.HasSuffix(name, "/") {
			v.fault("%s is there, but nobody made it", name)
		}
	}
	return v
}

// round is one unpacking that a kill interrupts.
type round struct {
	dir     string // from the mount points
	writers []*writer
	total   int64 // bytes of all files
}

// newRound divides the items among writers, which write through the mount points
// in turn, and adds files that take many writes.
func newRound(rng *rand.Rand, dir string, items []item, mounts []string) *round {
	const writers = 4
	r := &round{dir: dir}
	for w := range writers {
		r.writers = append(r.writers, &writer{
			root: filepath.Join(mounts[w%len(mounts)], dir, strconv.Itoa(w)),
			dirs: make(map[string]bool), rng: rand.New(rand.NewPCG(rng.Uint64(), 0)),
		})
	}
	for n, it := range items {
		if it.mode.Type() != 0 {
			continue
		}
		f := &target{name: it.name, mode: it.mode.Perm() | 0o200, data: it.data}
		switch rng.IntN(8) {
		case 0, 1:
			f.plan = planRename
		case 2:
			f.plan = planRemove
		}
		w := r.writers[n%writers]
		w.files = append(w.files, f)
		if rng.IntN(200) == 0 {
			big := make([]byte, 1<<20+rng.IntN(4<<20))
			for i := range big {
				big[i] = byte(i>>12)*31 + byte(i) | 1 // never zero: a hole is nothing that was written
			}
			w.files = append(w.files, &target{name: fmt.Sprintf("big-%d", n), mode: 0o644, data: big})
		}
	}
	for _, w := range r.writers {
		for _, f := range w.files {
			r.total += int64(len(f.data))
		}
	}
	return r
}

// check checks what all writers have left, as seen through a mount point.
func (r *round) check(t testing.TB, mnt string) (whole, short int) {
	t.Helper()
	for _, w := range r.writers {
		dir := filepath.Join(mnt, r.dir, filepath.Base(w.root))
		v := w.check(t, dir)
		for _, f := range v.faults[:min(len(v.faults), 20)] {
			t.Errorf("%s: %s", dir, f)
		}
		whole, short = whole+v.whole, short+v.short
	}
	return whole, short
}

// interrupt lets the writers run, calls kill when they have written at bytes, and
// returns when all have ended.
func (r *round) interrupt(t testing.TB, at int64, kill func()) {
	t.Helper()
	var written atomic.Int64
	var killed atomic.Bool
	now := make(chan struct{})
	for _, w := range r.writers {
		w.wrote = func(n int) {
			if sum := written.Add(int64(n)); sum >= at && sum-int64(n) < at {
				close(now)
			}
		}
	}
	var wg sync.WaitGroup
	for _, w := range r.writers {
		wg.Go(func() {
			if err := w.run(); err != nil && !killed.Load() {
				t.Errorf("writer of %s, before anything was killed: %v", w.root, err)
			}
		})
	}
	ended := make(chan struct{})
	go func() { wg.Wait(); close(ended) }()
	select {
	case <-now:
	case <-ended:
		if written.Load() < at {
			t.Fatal("all writers failed before the kill")
		}
	}
	killed.Store(true)
	kill()
	select {
	case <-ended:
	case <-time.After(commandTime):
		t.Fatalf("writers hang in the mount %v after all processes were killed", commandTime)
	}
}

// choices returns the source of a test's random choices, and says how to repeat them.
func choices(t testing.TB) *rand.Rand {
	t.Helper()
	s := *seed
	if s == 0 {
		s = uint64(time.Now().UnixNano())
	}
	t.Logf("-seed %d repeats the choices (not the moments)", s)
	return rand.New(rand.NewPCG(s, 0))
}

// TestCheck shows that the judge of TestKill notices each kind of damage: it is
// done here to files that nothing has killed.
func TestCheck(t *testing.T) {
	data := bytes.Repeat([]byte("0123456789abcdef"), 1000)
	hole := bytes.Clone(data)
	clear(hole[4096:8192])
	put := func(t *testing.T, path string, b []byte) {
		t.Helper()
		if err := os.WriteFile(path, b, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct {
		name   string
		plan   int
		state  state
		damage func(t *testing.T, path string)
		faults int
	}{
		{"none", planKeep, stateClosed, nil, 0},
		{"open and short", planKeep, stateOpened, func(t *testing.T, p string) { put(t, p, data[:5000]) }, 0},
		{"open and missing", planKeep, stateOpened, func(t *testing.T, p string) { os.Remove(p) }, 0},
		{"open with a hole", planKeep, stateOpened, func(t *testing.T, p string) { put(t, p, hole) }, 1},
		{"open and longer", planKeep, stateOpened, func(t *testing.T, p string) { put(t, p, append(bytes.Clone(data), 0)) }, 1},
		{"closed and short", planKeep, stateClosed, func(t *testing.T, p string) { put(t, p, data[:5000]) }, 1},
		{"closed and missing", planKeep, stateClosed, func(t *testing.T, p string) { os.Remove(p) }, 1},
		{"never opened", planKeep, stateNone, nil, 1},
		{"directory missing", planKeep, stateOpened, func(t *testing.T, p string) { os.RemoveAll(filepath.Dir(p)) }, 1},
		{"made by nobody", planKeep, stateClosed, func(t *testing.T, p string) { put(t, p+"2", nil) }, 1},
		{"renamed", planRename, stateDone, nil, 0},
		{"renamed, both names", planRename, stateDone, func(t *testing.T, p string) { put(t, p+".draft", data) }, 2},
		{"renamed, old name", planRename, stateDone, func(t *testing.T, p string) { os.Rename(p, p+".draft") }, 1},
		{"renaming, old name", planRename, stateChanged, func(t *testing.T, p string) { os.Rename(p, p+".draft") }, 0},
		{"renaming, no name", planRename, stateChanged, func(t *testing.T, p string) { os.Remove(p) }, 1},
		{"not yet renamed", planRename, stateClosed, nil, 2},
		{"removed", planRemove, stateDone, nil, 0},
		{"removed and back", planRemove, stateDone, func(t *testing.T, p string) { put(t, p, data) }, 1},
		{"removing, whole", planRemove, stateChanged, func(t *testing.T, p string) { put(t, p, data) }, 0},
		{"removing, short", planRemove, stateChanged, func(t *testing.T, p string) { put(t, p, data[:9]) }, 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			f := &target{name: "dir/file", mode: 0o644, data: data, plan: c.plan}
			w := &writer{root: t.TempDir(), dirs: map[string]bool{".": true}, files: []*target{f}, rng: rand.New(rand.NewPCG(1, 1)), wrote: func(int) {}}
			if err := w.run(); err != nil {
				t.Fatal(err)
			}
			f.state = c.state
			if c.damage != nil {
				c.damage(t, filepath.Join(w.root, f.name))
			}
			if v := w.check(t, w.root); len(v.faults) != c.faults {
				t.Errorf("faults are %q, want %d", v.faults, c.faults)
			}
		})
	}
}

// TestKill kills all processes with SIGKILL at a random moment while files are
// written, renamed and removed through two mounts and an older tree is deleted.
// Each time the stores are clean, it starts again, and everything that was
// answered is there.
func TestKill(t *testing.T) {
	i := newInstance(t)
	rng := choices(t)
	n, names := 2, []string{"crypto", "go", "net", "os"}
	if *full {
		n, names = 10, nil
	}
	if *rounds > 0 {
		n = *rounds
	}
	items := goTree(t, names...)
	second := filepath.Join(i.dir, "second")
	var past []*round
	for k := range n {
		i.up("--size", "4G")
		sealfs(t, 0, "sealfs", "mount", "--data", i.data, i.status().Volumes[0].Name, second)
		r := newRound(rng, fmt.Sprintf("round-%d", k), items, []string{i.mnt, second})
		if err := os.Mkdir(filepath.Join(i.mnt, r.dir), 0o755); err != nil {
			t.Fatal(err)
		}
		var removal sync.WaitGroup
		if len(past) == 2 {
			// It is cut short by the kill, and ended after it.
			old := past[0]
			past = past[1:]
			removal.Go(func() { os.RemoveAll(filepath.Join(i.mnt, old.dir)) })
			defer os.RemoveAll(filepath.Join(i.mnt, old.dir))
		}
		killer := i.killer()
		at := 1 + rng.Int64N(r.total)
		r.interrupt(t, at, func() { killer.kill(t) })
		removal.Wait()
		if s := i.status(); s.State != "down" || len(s.PIDs) > 0 {
			t.Fatalf("status after SIGKILL: %+v", s)
		}
		i.fsck()
		start := time.Now()
		i.up("--size", "4G")
		took := time.Since(start)
		whole, short := r.check(t, i.mnt)
		t.Logf("kill %d after %.1f of %.1f MB: up again in %v; %d files whole, %d short", k+1, float64(at)/1e6, float64(r.total)/1e6, took.Round(time.Millisecond), whole, short)
		past = append(past, r)
		for _, r := range past {
			r.check(t, i.mnt)
		}
		if t.Failed() {
			return
		}
		i.down()
	}
	i.fsck()
	i.up()
	for _, r := range past {
		r.check(t, i.mnt)
	}
	i.down()
}

// TestKillSQLite kills all processes while sqlite counts: the database is sound,
// and holds every transaction that sqlite has said is committed.
func TestKillSQLite(t *testing.T) {
	i := newInstance(t)
	needSQLite(t)
	rng := choices(t)
	n, most := 1, 100
	if *full {
		n, most = 5, 500
	}
	for k := range n {
		for _, journal := range journals {
			i.up()
			db := filepath.Join(i.mnt, fmt.Sprintf("%s-%d.db", journal, k))
			newDatabase(t, db, journal)
			killer := i.killer()
			cmd := exec.Command("sqlite3", "-bail", "-batch", db)
			cmd.Stdin = strings.NewReader(strings.Repeat("UPDATE counter SET n = n + 1; SELECT n FROM counter;\n", 10*most))
			out, err := cmd.StdoutPipe()
			if err == nil {
				err = cmd.Start()
			}
			if err != nil {
				t.Fatal(err)
			}
			committed, last := 0, 1+rng.IntN(most)
			for lines := bufio.NewScanner(out); lines.Scan(); {
				if committed, err = strconv.Atoi(lines.Text()); err != nil {
					t.Fatalf("sqlite3 says %q", lines.Text())
				}
				if committed == last {
					killer.kill(t)
				}
			}
			if cmd.Wait() == nil || committed < last {
				t.Fatalf("sqlite3 ended after %d transactions, and was to be killed after %d", committed, last)
			}
			i.fsck()
			i.up()
			got := strings.Fields(sqlite(t, db, "PRAGMA integrity_check; SELECT n FROM counter;"))
			if len(got) != 2 || got[0] != "ok" {
				t.Fatalf("%s: integrity_check: %q", db, got)
			}
			// One more may have been committed without an answer.
			if after, err := strconv.Atoi(got[1]); err != nil || after < committed || after > committed+1 {
				t.Errorf("%s: %s transactions after the restart, %d had been answered", db, got[1], committed)
			}
			i.down()
		}
	}
}

// TestKillLocks kills the processes through which files are locked: whoever
// held the locks has lost them, and the next one gets them.
func TestKillLocks(t *testing.T) {
	i := newInstance(t)
	path := filepath.Join(i.mnt, "file")
	lock := func() (errs []error) {
		f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o644)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		posix := unix.Flock_t{Type: unix.F_WRLCK, Len: 100}
		errs = append(errs, unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &posix))
		return append(errs, unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB))
	}
	i.up()
	for k := range 3 {
		if errs := lock(); errs[0] != nil || errs[1] != nil {
			t.Fatalf("after %d kills: range lock %v, flock %v", k, errs[0], errs[1])
		}
		if errs := lock(); errs[0] == nil || errs[1] == nil {
			t.Fatalf("a lock was given twice: range lock %v, flock %v", errs[0], errs[1])
		}
		i.killer().kill(t)
		i.up()
	}
	i.down()
	i.fsck()
}
