package e2e

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"io/fs"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// load is what works on the mounts of a cluster while that is disturbed. It is a
// process of its own: whoever forks while it has a file open on a server that is
// away waits for that server, because exec closes the file. So the test, which has
// to start that server, holds no file open. A nil load is one that has not begun.
type load struct {
	s     *site
	cmd   *exec.Cmd
	to    *os.File
	from  *bufio.Reader
	pipe  *os.File
	ended chan struct{}
}

// orders is what a load is told at its start.
type orders struct {
	Dir      string   `json:"dir"` // for the journal, and whatever else is outside of the mounts
	Mounts   []string `json:"mounts"`
	Seed     uint64   `json:"seed"`
	Programs bool     `json:"programs"` // other people's programs, too
}

// account is what a load leaves in a file when it ends.
type account struct {
	Scribes []*scribe  `json:"scribes"`
	Large   *largeFile `json:"large"`
}

// news is how far a load has come: the steps of each writer, and the rounds of programs.
type news struct {
	Steps  []int64 `json:"steps"`
	Rounds int64   `json:"rounds"`
}

const ordersVariable = "SEALFS_E2E_LOAD"

// startLoad starts the load.
func (s *site) startLoad(rng *rand.Rand, programs bool) {
	t := s.t
	t.Helper()
	o := orders{Dir: s.dir, Seed: rng.Uint64(), Programs: programs}
	for _, m := range s.mounts {
		o.Mounts = append(o.Mounts, m.path)
	}
	b, err := json.Marshal(o)
	if err != nil {
		t.Fatal(err)
	}
	l := &load{s: s, ended: make(chan struct{})}
	theirs, to, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	from, answers, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer theirs.Close()
	defer answers.Close()
	out, err := os.Create(filepath.Join(s.dir, "load.out"))
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	l.to, l.pipe, l.from = to, from, bufio.NewReader(from)
	l.cmd = exec.Command(os.Args[0], "-test.run", "^TestClusterLoad$", "-test.timeout", "0")
	l.cmd.Env = append(os.Environ(), ordersVariable+"="+string(b))
	l.cmd.Stdout, l.cmd.Stderr = out, out
	l.cmd.ExtraFiles = []*os.File{theirs, answers}
	l.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // with the programs that it runs
	if err := l.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		l.cmd.Wait() // its status is in ProcessState
		close(l.ended)
	}()
	s.load = l
}

// broken is closed when the load has failed, or ended.
func (l *load) broken() <-chan struct{} {
	if l == nil {
		return nil
	}
	return l.ended
}

// ask gives the load a command and returns the answer.
func (l *load) ask(t testing.TB, command string) (answer string) {
	t.Helper()
	err := timely(programTime, func() (err error) {
		if _, err = fmt.Fprintln(l.to, command); err == nil {
			answer, err = l.from.ReadString('\n')
		}
		return err
	})
	if err != nil {
		t.Fatalf("the load was told %q: %v", command, err)
	}
	return strings.TrimSpace(answer)
}

func (l *load) news(t testing.TB) (n news) {
	t.Helper()
	if err := json.Unmarshal([]byte(l.ask(t, "news")), &n); err != nil {
		t.Fatal(err)
	}
	return n
}

// advances waits until every writer has done something more.
func (l *load) advances(t testing.TB) {
	t.Helper()
	before := l.news(t).Steps
	l.s.eventually(t, backTime, "all writers go on", func() bool {
		for i, n := range l.news(t).Steps {
			if n < before[i]+2 { // the first step may have begun long ago
				return false
			}
		}
		return true
	})
}

// end ends the load and returns its account.
func (l *load) end(t testing.TB) (a account) {
	t.Helper()
	l.s.t.Logf("the load has done %d rounds of programs", l.news(t).Rounds)
	l.ask(t, "end")
	<-l.ended
	l.s.load = nil
	l.to.Close()
	l.pipe.Close()
	b, err := os.ReadFile(filepath.Join(l.s.dir, "account"))
	if err == nil {
		err = json.Unmarshal(b, &a)
	}
	if err != nil || !l.cmd.ProcessState.Success() {
		t.Fatalf("the load ended with %v, %v", l.cmd.ProcessState, err)
	}
	return a
}

// kill ends the load and its programs when nobody wants to know how far it came.
// The daemons must have ended.
func (l *load) kill() {
	if l == nil {
		return
	}
	select {
	case <-l.ended:
	default:
		unix.Kill(-l.cmd.Process.Pid, unix.SIGKILL)
		<-l.ended
	}
	l.to.Close()
	l.pipe.Close()
}

// crew is the load in its own process.
type crew struct {
	account
	mounts   []*mountpoint
	quit     chan struct{} // closed: all end after what they are at
	programs chan struct{} // closed: other people's programs end
	failed   chan struct{} // closed when somebody has failed
	failing  sync.Once
	own      sync.WaitGroup
	others   sync.WaitGroup // other people's programs
	rounds   atomic.Int64   // of them
}

// actor is the testing.TB of a goroutine of the load. What it finds wrong ends
// the goroutine, and has the load end.
type actor struct {
	testing.TB
	c *crew
}

func (a *actor) Errorf(format string, args ...any) {
	a.TB.Helper()
	fmt.Fprintf(os.Stderr, "%s "+format+"\n", append([]any{time.Now().Format("15:04:05.000")}, args...)...)
	a.TB.Errorf(format, args...)
	a.c.failing.Do(func() { close(a.c.failed) })
}

func (a *actor) Fatalf(format string, args ...any) {
	a.TB.Helper()
	a.Errorf(format, args...)
	runtime.Goexit()
}

func (a *actor) Fatal(args ...any) {
	a.TB.Helper()
	a.Fatalf("%s", fmt.Sprint(args...))
}

// TestClusterLoad is the load of the other tests, in the process that they start for it.
func TestClusterLoad(t *testing.T) {
	text := os.Getenv(ordersVariable)
	if text == "" {
		t.Skip("skipped: it is a part of TestCluster")
	}
	var o orders
	if err := json.Unmarshal([]byte(text), &o); err != nil {
		t.Fatal(err)
	}
	in, out := os.NewFile(3, "commands"), os.NewFile(4, "answers")
	c := newCrew(t, o)
	commands := make(chan string)
	go func() {
		for lines := bufio.NewScanner(in); lines.Scan(); {
			commands <- lines.Text()
		}
		close(commands)
	}()
	for {
		select {
		case <-c.failed:
			return // what still works may hang in the mount: it ends with the process
		case command, ok := <-commands:
			if !ok {
				return // nobody wants it any more
			}
			answer, last := c.obey(t, command)
			if t.Failed() {
				return
			}
			fmt.Fprintln(out, answer)
			if last {
				b, err := json.Marshal(c.account)
				if err == nil {
					err = os.WriteFile(filepath.Join(o.Dir, "account"), b, 0o644)
				}
				if err != nil {
					t.Error(err)
				}
				return
			}
		}
	}
}

// obey does what the test says, and returns the answer.
func (c *crew) obey(t *testing.T, command string) (answer string, last bool) {
	ended := func(g *sync.WaitGroup) {
		done := make(chan struct{})
		go func() { g.Wait(); close(done) }()
		select {
		case <-done:
		case <-c.failed:
		}
	}
	switch word, rest, _ := strings.Cut(command, " "); word {
	case "news":
		n := news{Rounds: c.rounds.Load()}
		for _, w := range c.Scribes {
			n.Steps = append(n.Steps, w.steps.Load())
		}
		b, err := json.Marshal(append(n.Steps, c.Large.steps.Load()))
		if err != nil {
			t.Error(err)
		}
		return fmt.Sprintf(`{"steps": %s, "rounds": %d}`, b, n.Rounds), false
	case "broken": // the daemon of a mount is about to be killed, or is back
		i, err := strconv.Atoi(rest)
		if err != nil {
			t.Error(err)
			return "", false
		}
		c.mounts[i].broken.Add(1)
	case "end-programs":
		close(c.programs)
		ended(&c.others)
	case "end":
		close(c.quit)
		ended(&c.own)
		return "ended", true
	}
	return "done", false
}

// newCrew starts the load: writers that keep account, two on each mount; one of
// a large file; and, if wanted, other people's programs.
func newCrew(t *testing.T, o orders) *crew {
	c := &crew{quit: make(chan struct{}), programs: make(chan struct{}), failed: make(chan struct{})}
	rng := rand.New(rand.NewPCG(o.Seed, 0))
	journal, err := os.Create(filepath.Join(o.Dir, "journal"))
	if err != nil {
		t.Fatal(err)
	}
	a := &actor{t, c}
	run := func(g *sync.WaitGroup, end <-chan struct{}, step func()) {
		g.Go(func() {
			for {
				select {
				case <-end:
					return
				case <-c.failed:
					return
				default:
					step()
				}
			}
		})
	}
	for _, path := range o.Mounts {
		c.mounts = append(c.mounts, &mountpoint{path: path})
	}
	for i := range 2 * len(o.Mounts) {
		w := newScribe(a, c.mounts[i%len(c.mounts)], fmt.Sprintf("scribe%d", i), journal, rng)
		c.Scribes = append(c.Scribes, w)
		run(&c.own, c.quit, w.step)
	}
	c.Large = newLargeFile(a, c.mounts[0], rng)
	run(&c.own, c.quit, c.Large.step)
	if !o.Programs {
		return c
	}
	items := append(goTree(t, "go", "os"), oddities()...)
	archive := filepath.Join(o.Dir, "tree.tar")
	writeTar(t, archive, items)
	others := func(step func()) { run(&c.others, c.programs, func() { step(); c.rounds.Add(1) }) }
	for i, m := range c.mounts {
		dir := filepath.Join(m.path, fmt.Sprintf("programs%d", i))
		other := filepath.Join(c.mounts[(i+1)%len(c.mounts)].path, filepath.Base(dir))
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		others((&treeRounds{a, dir, other, archive, items, 0}).step)
		if _, err := exec.LookPath("git"); err == nil {
			others((&gitRounds{a, dir, items, 0}).step)
		}
		if _, err := exec.LookPath("sqlite3"); err == nil {
			db := &sqliteRounds{a, filepath.Join(dir, "db"), 0}
			newDatabase(a, db.path, journals[i%len(journals)])
			others(db.step)
		}
	}
	return c
}

// book is a file that a scribe writes, with what is known of it.
type book struct {
	ID     string
	Low    int         // it holds at least so many bytes of its text,
	Top    int         // and at most so many
	Names  []string    // from the scribe's directory, that it must have
	Unsure []string    // names that it may have
	Either [][2]string // of which one must be
	lost   bool        // a call failed: it is left alone from then on
}

// text returns the first n bytes of what the file with an id holds.
func text(id string, n int) []byte {
	var key [32]byte
	copy(key[:], id)
	b := make([]byte, n)
	rand.NewChaCha8(key).Read(b) // it never fails
	return b
}

// scribe writes files in directories of its own, appends to them, renames, links
// and deletes them, and keeps account outside of the mount of what it was answered.
// It is used by one goroutine, and looked at when that has ended.
type scribe struct {
	Name  string           `json:"name"`
	Files map[string]*book `json:"files"`

	t       testing.TB
	m       *mountpoint
	journal io.Writer
	rng     *rand.Rand
	open    []*book // that can be changed
	next    int
	steps   atomic.Int64
}

const scribeDirs = 8

// path returns where a name is, as seen through a mount point.
func (w *scribe) path(mnt, name string) string { return filepath.Join(mnt, w.Name, name) }

func newScribe(t testing.TB, m *mountpoint, name string, journal io.Writer, rng *rand.Rand) *scribe {
	w := &scribe{t: t, m: m, Name: name, journal: journal, rng: rand.New(rand.NewPCG(rng.Uint64(), 0)), Files: make(map[string]*book)}
	for i := range scribeDirs {
		if err := os.MkdirAll(w.path(m.path, fmt.Sprint("d", i)), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return w
}

// call makes a call, and reports whether it was answered. It may fail only while
// the daemon of the mount is killed.
func (w *scribe) call(what string, f func() error) bool {
	old := w.m.broken.Load()
	err := f()
	if err == nil {
		fmt.Fprintf(w.journal, "%s %s\n", time.Now().Format("15:04:05.000"), what)
		return true
	}
	if !w.m.excused(old) {
		w.t.Errorf("%s: %s: %v", w.Name, what, err)
		return false
	}
	fmt.Fprintf(w.journal, "%s %s FAILED: %v\n", time.Now().Format("15:04:05.000"), what, err)
	return false
}

func (w *scribe) spot(id string) string { return fmt.Sprintf("d%d/%s", w.rng.IntN(scribeDirs), id) }

// step makes one change.
func (w *scribe) step() {
	w.m.await()
	defer w.steps.Add(1)
	choice := w.rng.IntN(10)
	switch {
	case len(w.open) > 500: // so that disks do not fill
		choice = 9
	case len(w.open) < 20 || choice < 4:
		w.create()
		return
	}
	k := w.rng.IntN(len(w.open))
	b := w.open[k]
	switch {
	case choice < 6:
		w.extend(b)
	case choice < 8:
		w.rename(b)
	case choice < 9 && len(b.Names) < 4:
		w.link(b)
	default:
		w.remove(b)
	}
	if b.lost || len(b.Names) == 0 {
		w.open = slices.Delete(w.open, k, k+1)
	}
}

// write writes the bytes from b.Low to n through f, and closes it.
func (w *scribe) write(f *os.File, b *book, n int) error {
	b.Top = max(b.Top, n)
	all := text(b.ID, n)
	for rest := all[b.Low:]; len(rest) > 0; {
		k := min(len(rest), 1+w.rng.IntN(48<<10))
		if _, err := f.Write(rest[:k]); err != nil {
			f.Close()
			return err
		}
		rest = rest[k:]
	}
	if w.rng.IntN(3) == 0 {
		if err := f.Sync(); err != nil {
			f.Close()
			return err
		}
	}
	return f.Close()
}

func (w *scribe) size() int {
	if w.rng.IntN(20) == 0 {
		return w.rng.IntN(1 << 20)
	}
	return w.rng.IntN(24 << 10)
}

func (w *scribe) create() {
	b := &book{ID: fmt.Sprintf("%s-%d", w.Name, w.next)}
	w.next++
	name, n := w.spot(b.ID), w.size()
	w.Files[b.ID] = b
	if !w.call(fmt.Sprintf("create %s %d", name, n), func() error {
		f, err := os.OpenFile(w.path(w.m.path, name), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
		if err != nil {
			return err
		}
		return w.write(f, b, n)
	}) {
		b.Unsure, b.lost = []string{name}, true
		b.Top = n
		return
	}
	b.Low, b.Top, b.Names = n, n, []string{name}
	w.open = append(w.open, b)
}

func (w *scribe) extend(b *book) {
	name, n := b.Names[w.rng.IntN(len(b.Names))], b.Low+1+w.size()
	if !w.call(fmt.Sprintf("append %s %d", name, n), func() error {
		f, err := os.OpenFile(w.path(w.m.path, name), os.O_WRONLY|os.O_APPEND, 0)
		if err != nil {
			return err
		}
		return w.write(f, b, n)
	}) {
		b.lost = true
		return
	}
	b.Low, b.Top = n, n
}

func (w *scribe) rename(b *book) {
	k := w.rng.IntN(len(b.Names))
	from, to := b.Names[k], w.spot(fmt.Sprintf("%s-%d", b.ID, w.next))
	w.next++
	if w.call(fmt.Sprintf("rename %s %s", from, to), func() error { return os.Rename(w.path(w.m.path, from), w.path(w.m.path, to)) }) {
		b.Names[k] = to
		return
	}
	b.Names = slices.Delete(b.Names, k, k+1)
	b.Unsure, b.Either, b.lost = append(b.Unsure, from, to), append(b.Either, [2]string{from, to}), true
}

func (w *scribe) link(b *book) {
	to := w.spot(fmt.Sprintf("%s-%d", b.ID, w.next))
	w.next++
	if w.call(fmt.Sprintf("link %s %s", b.Names[0], to), func() error { return os.Link(w.path(w.m.path, b.Names[0]), w.path(w.m.path, to)) }) {
		b.Names = append(b.Names, to)
		return
	}
	b.Unsure, b.lost = append(b.Unsure, to), true
}

func (w *scribe) remove(b *book) {
	k := w.rng.IntN(len(b.Names))
	name := b.Names[k]
	done := w.call("remove "+name, func() error { return os.Remove(w.path(w.m.path, name)) })
	b.Names = slices.Delete(b.Names, k, k+1)
	if !done {
		b.Unsure, b.lost = append(b.Unsure, name), true
	}
}

// check holds what is seen through a mount point against what was answered. It
// returns the number of files, and what must not be.
func (w *scribe) check(mnt string) (files int, faults []string) {
	fault := func(format string, args ...any) {
		faults = append(faults, w.Name+": "+fmt.Sprintf(format, args...))
	}
	found := make(map[string]fs.FileInfo)
	for i := range scribeDirs {
		dir := fmt.Sprint("d", i)
		entries, err := os.ReadDir(w.path(mnt, dir))
		if err != nil {
			fault("%v", err)
		}
		for _, e := range entries {
			fi, err := os.Lstat(w.path(mnt, dir+"/"+e.Name()))
			if err != nil {
				fault("%s is listed: %v", e.Name(), err)
				continue
			}
			if found[dir+"/"+e.Name()] != nil {
				fault("%s is listed twice", e.Name())
			}
			found[dir+"/"+e.Name()] = fi
		}
	}
	for _, id := range slices.Sorted(maps.Keys(w.Files)) {
		b := w.Files[id]
		var first fs.FileInfo
		links := 0
		look := func(name string, must bool) bool {
			fi := found[name]
			delete(found, name)
			if fi == nil {
				if must {
					fault("%s was answered and is missing", name)
				}
				return false
			}
			links++
			if first != nil && !os.SameFile(first, fi) {
				fault("%s is not the same file as %s any more", name, first.Name())
			}
			first = fi
			got, err := os.ReadFile(w.path(mnt, name))
			switch {
			case err != nil:
				fault("%v", err)
			case len(got) < b.Low || len(got) > b.Top:
				fault("%s has %d bytes, want from %d to %d", name, len(got), b.Low, b.Top)
			case !bytes.Equal(got, text(id, len(got))):
				fault("%s is not whole: %s", name, difference(got, text(id, len(got))))
			case int64(len(got)) != fi.Size():
				fault("%s has %d bytes, and stat says %d", name, len(got), fi.Size())
			}
			return true
		}
		there := make(map[string]bool)
		for _, name := range b.Names {
			there[name] = look(name, true)
		}
		for _, name := range b.Unsure {
			there[name] = look(name, false)
		}
		for _, pair := range b.Either {
			if there[pair[0]] == there[pair[1]] {
				fault("%s was being renamed to %s: there are (%v, %v)", pair[0], pair[1], there[pair[0]], there[pair[1]])
			}
		}
		if first == nil {
			continue
		}
		files++
		if n := nlink(first); n != links {
			fault("%s has %d links and %d names", id, n, links)
		}
	}
	for name := range found {
		fault("%s is there and must not be", name)
	}
	return files, faults
}

// largeFile is a sparse file that reaches beyond what lies in one place, and is
// written in pieces, most of them around the borders of its chunks.
type largeFile struct {
	Round uint32           `json:"round"`
	Block map[int64]uint32 `json:"block"` // the round in which a block was written last

	t     testing.TB
	m     *mountpoint
	rng   *rand.Rand
	steps atomic.Int64
}

const (
	largeName  = "large"
	largeSize  = 200 << 20
	largeBlock = 4096
)

func newLargeFile(t testing.TB, m *mountpoint, rng *rand.Rand) *largeFile {
	t.Helper()
	l := &largeFile{t: t, m: m, rng: rand.New(rand.NewPCG(rng.Uint64(), 0)), Block: make(map[int64]uint32)}
	f, err := os.Create(filepath.Join(m.path, largeName))
	if err == nil {
		err = errors.Join(f.Truncate(largeSize), f.Close())
	}
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// fill fills a block as it was written in a round.
func (l *largeFile) fill(b []byte, block int64, round uint32) {
	h := fnv.New64a()
	fmt.Fprint(h, block, round)
	rand.NewChaCha8([32]byte(fmt.Appendf(nil, "%032x", h.Sum64()))).Read(b)
}

// step writes a few pieces and closes the file.
func (l *largeFile) step() {
	f, err := os.OpenFile(filepath.Join(l.m.path, largeName), os.O_RDWR, 0)
	if err != nil {
		l.t.Fatal(err)
	}
	l.Round++
	for range 1 + l.rng.IntN(6) {
		n := 1 + l.rng.Int64N(64)
		var at int64
		switch l.rng.IntN(4) {
		case 0: // where the first chunk begins
			at = 64<<20/largeBlock - l.rng.Int64N(n+1)
		case 1: // where another one does
			at = (64+4*l.rng.Int64N(34))<<20/largeBlock - l.rng.Int64N(n+1)
		default:
			at = l.rng.Int64N(largeSize/largeBlock - n)
		}
		b := make([]byte, n*largeBlock)
		for i := range n {
			l.fill(b[i*largeBlock:(i+1)*largeBlock], at+i, l.Round)
			l.Block[at+i] = l.Round
		}
		if _, err := f.WriteAt(b, at*largeBlock); err != nil {
			l.t.Fatal(err)
		}
	}
	if l.rng.IntN(2) == 0 {
		if err := f.Sync(); err != nil {
			l.t.Fatal(err)
		}
	}
	if err := f.Close(); err != nil {
		l.t.Fatal(err)
	}
	l.steps.Add(1)
}

// check wants every block to be as it was written last, and all else to be zeros.
func (l *largeFile) check(mnt string) (faults []string) {
	f, err := os.Open(filepath.Join(mnt, largeName))
	if err != nil {
		return []string{err.Error()}
	}
	defer f.Close()
	const step = 1 << 20
	b, want := make([]byte, step+1), make([]byte, largeBlock)
	for at := int64(0); at < largeSize; at += step {
		n, err := f.ReadAt(b[:step], at)
		if err != nil || n != step {
			return append(faults, fmt.Sprintf("%s at %d: %d bytes, %v", largeName, at, n, err))
		}
		for i := int64(0); i < step; i += largeBlock {
			block := (at + i) / largeBlock
			clear(want)
			round := l.Block[block]
			if round != 0 {
				l.fill(want, block, round)
			}
			if got := b[i : i+largeBlock]; !bytes.Equal(got, want) {
				faults = append(faults, fmt.Sprintf("%s, block %d (byte %d), written in round %d of %d: %s", largeName, block, at+i, round, l.Round, difference(got, want)))
			}
		}
	}
	if n, err := f.ReadAt(b, largeSize-1); n != 1 || err != io.EOF {
		faults = append(faults, fmt.Sprintf("%s at its end: %d bytes, %v", largeName, n, err))
	}
	return faults
}

// treeRounds unpacks an archive, compares, copies, moves and removes it, again and again.
type treeRounds struct {
	t          testing.TB
	dir, other string // the same directory by two mounts
	archive    string
	items      []item
	n          int
}

func (r *treeRounds) step() {
	r.n++
	tree, away := fmt.Sprint("tree", r.n), fmt.Sprintf("away%d/copy", r.n)
	for _, name := range []string{tree, filepath.Dir(away)} {
		if err := os.Mkdir(filepath.Join(r.dir, name), 0o755); err != nil {
			r.t.Fatal(err)
		}
	}
	must(r.t, r.dir, "tar", "--no-same-owner", "-xpf", r.archive, "-C", tree)
	compare(r.t, filepath.Join(r.other, tree), r.items, true)
	must(r.t, r.dir, "cp", "-a", tree, "copy")
	must(r.t, r.dir, "mv", "copy", away)
	must(r.t, r.dir, "rm", "-r", tree)
	compare(r.t, filepath.Join(r.other, away), r.items, true)
	must(r.t, r.dir, "rm", "-r", filepath.Dir(away))
	if _, err := os.Lstat(filepath.Join(r.dir, tree)); !errors.Is(err, fs.ErrNotExist) {
		r.t.Fatalf("%s after rm -r: %v", tree, err)
	}
}

// gitRounds makes, clones and removes repositories.
type gitRounds struct {
	t     testing.TB
	dir   string
	items []item
	n     int
}

func (r *gitRounds) step() {
	r.n++
	repo, clone := filepath.Join(r.dir, fmt.Sprint("repo", r.n)), filepath.Join(r.dir, fmt.Sprint("clone", r.n))
	git := func(dir string, args ...string) string {
		r.t.Helper()
		return must(r.t, dir, append([]string{
			"env", "GIT_CONFIG_GLOBAL=/dev/null", "GIT_CONFIG_NOSYSTEM=1",
			"git", "-c", "user.name=Somebody", "-c", "user.email=somebody@example.com",
		}, args...)...)
	}
	var few []item
	for _, it := range r.items {
		if strings.HasPrefix(it.name, "go/ast") || it.name == "go" {
			few = append(few, it)
		}
	}
	git(r.dir, "init", "-q", "-b", "main", repo)
	copyTree(r.t, repo, few)
	git(repo, "add", "-A")
	git(repo, "commit", "-q", "-m", "all of it")
	git(r.dir, "clone", "-q", "--no-local", repo, clone)
	git(clone, "fsck", "--full", "--strict")
	compare(r.t, clone, withoutEmpty(few, true), false, ".git")
	if s := git(repo, "status", "--porcelain"); s != "" {
		r.t.Fatalf("git status:\n%s", s)
	}
	must(r.t, r.dir, "rm", "-rf", repo, clone)
}

// sqliteRounds counts in a database.
type sqliteRounds struct {
	t    testing.TB
	path string
	n    int
}

func (r *sqliteRounds) step() {
	const each = 5
	r.n += each
	got := sqlite(r.t, r.path, strings.Repeat("BEGIN IMMEDIATE; UPDATE counter SET n = n + 1; INSERT INTO rows (v) VALUES (randomblob(500)); COMMIT;\n", each)+
		"SELECT n FROM counter; SELECT count(*) FROM rows; PRAGMA quick_check;")
	if want := fmt.Sprintf("%d\n%d\nok", r.n, r.n); got != want {
		r.t.Fatalf("%s: %q, want %q", r.path, got, want)
	}
}

// nlink returns the link count of a file.
func nlink(fi fs.FileInfo) int { return int(fi.Sys().(*syscall.Stat_t).Nlink) }
