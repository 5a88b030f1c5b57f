package client

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sealfs"
)

// lockerEnv makes the test binary a process that opens, locks and closes files as it is told.
const lockerEnv = "SEALFS_TEST_LOCKER"

// lockerMain reads a call a line, and writes a line when one has ended: its number and
// the error. Calls that may wait have a thread each, whose number is written before.
//
//	N open NAME PATH         N close NAME          N dup NAME NEW
//	N lock NAME posix|ofd TYPE START LEN [wait]    TYPE: 0 read, 1 write, 2 unlock
//	N test NAME posix|ofd TYPE START LEN           whether something is in the way
//	N flock NAME HOW                               HOW as flock(2) has it
//	N write NAME
func lockerMain() {
	var mu sync.Mutex
	say := func(words ...any) {
		mu.Lock()
		defer mu.Unlock()
		fmt.Println(words...)
	}
	files := map[string]int{}
	in := bufio.NewScanner(os.Stdin)
	for in.Scan() {
		w := strings.Fields(in.Text())
		num := func(i int) int64 {
			v, _ := strconv.ParseInt(w[i], 10, 64)
			return v
		}
		var err error
		switch fd := files[w[2]]; w[1] {
		case "open":
			files[w[2]], err = unix.Open(w[3], unix.O_RDWR|unix.O_CREAT|unix.O_CLOEXEC, 0o600)
		case "close":
			err = unix.Close(fd)
		case "dup":
			files[w[3]], err = unix.Dup(fd)
		case "write":
			_, err = unix.Pwrite(fd, []byte("x"), 0)
		case "lock", "test":
			l := unix.Flock_t{Type: int16(num(4)), Start: num(5), Len: num(6)}
			cmd := map[string]int{"posix": unix.F_SETLK, "ofd": unix.F_OFD_SETLK}[w[3]]
			if w[1] == "test" {
				if err = unix.FcntlFlock(uintptr(fd), map[string]int{"posix": unix.F_GETLK, "ofd": unix.F_OFD_GETLK}[w[3]], &l); err == nil {
					// Which one, of several, is up to the file system.
					err = map[bool]error{false: errors.New("in the way"), true: errors.New("free")}[l.Type == unix.F_UNLCK]
				}
				break
			}
			if len(w) > 7 {
				go func() {
					runtime.LockOSThread()
					say(w[0], "thread", unix.Gettid())
					say(w[0], unix.FcntlFlock(uintptr(fd), cmd+1, &l))
				}()
				continue
			}
			err = unix.FcntlFlock(uintptr(fd), cmd, &l)
		case "flock":
			how := int(num(3))
			if how&unix.LOCK_NB == 0 {
				go func() {
					runtime.LockOSThread()
					say(w[0], "thread", unix.Gettid())
					say(w[0], unix.Flock(fd, how))
				}()
				continue
			}
			err = unix.Flock(fd, how)
		}
		say(w[0], err)
	}
}

// locker is such a process.
type locker struct {
	t     *testing.T
	cmd   *exec.Cmd
	in    io.WriteCloser
	mu    sync.Mutex
	n     int
	calls map[int]*lockCall
}

// lockCall is a call under way.
type lockCall struct {
	what   string
	thread chan int    // its thread, once
	done   chan string // the error, once
}

func startLocker(t *testing.T) *locker {
	t.Helper()
	l := &locker{t: t, cmd: exec.Command(os.Args[0]), calls: map[int]*lockCall{}}
	l.cmd.Env = append(os.Environ(), lockerEnv+"=1")
	l.cmd.Stderr = os.Stderr
	var err error
	if l.in, err = l.cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	out, err := l.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := l.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		lines := bufio.NewScanner(out)
		for lines.Scan() {
			number, rest, _ := strings.Cut(lines.Text(), " ")
			n, _ := strconv.Atoi(number)
			l.mu.Lock()
			c := l.calls[n]
			l.mu.Unlock()
			if tid, ok := strings.CutPrefix(rest, "thread "); ok {
				id, _ := strconv.Atoi(tid)
				c.thread <- id
			} else {
				c.done <- rest
			}
		}
	}()
	t.Cleanup(func() {
		l.cmd.Process.Kill()
		<-ended
		l.cmd.Wait()
	})
	return l
}

// begin has a call made.
func (l *locker) begin(call string) *lockCall {
	l.t.Helper()
	c := &lockCall{what: call, thread: make(chan int, 1), done: make(chan string, 1)}
	l.mu.Lock()
	l.n++
	n := l.n
	l.calls[n] = c
	l.mu.Unlock()
	if _, err := fmt.Fprintln(l.in, n, call); err != nil {
		l.t.Fatal(err)
	}
	return c
}

// wait returns how a call ends.
func (c *lockCall) wait(t *testing.T) string {
	t.Helper()
	select {
	case err := <-c.done:
		return err
	case <-time.After(30 * time.Second):
		t.Fatalf("%q does not end", c.what)
		return ""
	}
}

// do makes a call that does not wait.
func (l *locker) do(call string) string {
	l.t.Helper()
	return l.begin(call).wait(l.t)
}

func (l *locker) must(calls ...string) {
	l.t.Helper()
	for _, call := range calls {
		if err := l.do(call); err != "<nil>" {
			l.t.Fatalf("%s: %s", call, err)
		}
	}
}

// waits returns "" as soon as the call waits in the kernel, or how it has ended.
func (l *locker) waits(c *lockCall) string {
	l.t.Helper()
	var tid int
	select {
	case tid = <-c.thread:
		c.thread <- tid
	case <-time.After(30 * time.Second):
		l.t.Fatalf("%q does not begin", c.what)
	}
	waits := 0
	for limit := time.Now().Add(30 * time.Second); waits < 3; {
		select {
		case err := <-c.done:
			return err
		case <-time.After(2 * time.Millisecond):
		}
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/syscall", l.cmd.Process.Pid, tid))
		number, _, _ := strings.Cut(string(b), " ")
		if call, nerr := strconv.Atoi(number); err == nil && nerr == nil && (call == unix.SYS_FCNTL || call == unix.SYS_FLOCK) {
			waits++
		} else if waits = 0; time.Now().After(limit) {
			l.t.Fatalf("%q neither waits nor ends: %q, %v", c.what, b, err)
		}
	}
	return ""
}

// startTwin mounts one real server twice.
func startTwin(t *testing.T) (*server, [2]string) {
	t.Helper()
	needFUSE(t)
	dirs := [2]string{mountDir(t), mountDir(t)}
	return startServerAt(t, dirs[0], serveEnv+"_STORE="+t.TempDir(), serveEnv+"_SECOND="+dirs[1]), dirs
}

const (
	again    = "resource temporarily unavailable"
	deadlock = "resource deadlock avoided"
)

// TestLocksLikeLocal makes the same random calls of several processes on a local file system and
// on two mounts of one server, and wants every one to end, or to wait, on both alike.
func TestLocksLikeLocal(t *testing.T) {
	if testing.Short() {
		t.Skip("takes its time")
	}
	_, dirs := startTwin(t)
	local := t.TempDir()
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	sum := map[string]int{}
	for round := range 3 {
		w := &lockTwin{t: t, rng: rand.New(rand.NewPCG(seed, uint64(round))), sum: sum}
		for i := range 4 {
			w.ps = append(w.ps, &twinLocker{
				local: startLocker(t), ours: startLocker(t),
				roots: [2]string{filepath.Join(local, fmt.Sprint(round)), filepath.Join(dirs[i%2], fmt.Sprint(round))},
			})
		}
		for range 80 {
			if !w.step() {
				break
			}
		}
		for _, p := range w.ps {
			p.local.cmd.Process.Kill()
			p.ours.cmd.Process.Kill()
		}
	}
	t.Log(sum)
	if sum["waits"] == 0 || sum["granted later"] == 0 || sum[deadlock] == 0 || sum[again] == 0 {
		t.Error("not everything was tested")
	}
}

// lockTwin are processes that exist twice.
type lockTwin struct {
	t    *testing.T
	rng  *rand.Rand
	ps   []*twinLocker
	n    int
	sum  map[string]int
	busy [lockFiles]*twinLocker // who waits on a file, if anybody: at most one, so that it is known who is next
}

const lockFiles = 3

type twinLocker struct {
	local, ours *locker
	roots       [2]string
	open        []string // names of descriptors: file number, a dash, and a number
	file        int      // on which it waits
	waits       *lockCall
	waitsThere  *lockCall
}

// step makes one call, and reports whether the two are still alike.
func (w *lockTwin) step() bool {
	w.t.Helper()
	w.n++
	if w.rng.IntN(10) == 0 && !slices.ContainsFunc(w.ps, func(p *twinLocker) bool { return p.waits != nil }) {
		return w.circle(2 + w.rng.IntN(lockFiles-1))
	}
	p := w.ps[w.rng.IntN(len(w.ps))]
	if len(p.open) < 2 || len(p.open) < 6 && w.rng.IntN(8) == 0 {
		file := w.rng.IntN(lockFiles)
		name := fmt.Sprintf("%d-%d", file, w.n)
		p.open = append(p.open, name)
		return w.both(p, "open "+name+" "+p.roots[0]+fmt.Sprint("-", file), "open "+name+" "+p.roots[1]+fmt.Sprint("-", file), -1)
	}
	at := w.rng.IntN(len(p.open))
	name := p.open[at]
	file := int(name[0] - '0')
	kind := []string{"posix", "posix", "ofd"}[w.rng.IntN(3)]
	call, waits := "", -1
	switch k := w.rng.IntN(18); {
	case k == 0 && p.waits == nil:
		p.open = slices.Delete(p.open, at, at+1)
		call = "close " + name
	case k == 1:
		dup := fmt.Sprintf("%d-%d", file, w.n)
		p.open = append(p.open, dup)
		call = "dup " + name + " " + dup
	case k < 9:
		// Ranges that nobody waits for.
		from := 100 + w.rng.IntN(12)
		call = fmt.Sprintf("lock %s %s %d %d %d", name, kind, w.rng.IntN(3), from, w.rng.IntN(6))
	case k < 11:
		call = fmt.Sprintf("test %s %s %d %d %d", name, kind, w.rng.IntN(2), 100+w.rng.IntN(12), 1+w.rng.IntN(6))
	case k < 13:
		call = fmt.Sprintf("flock %s %d", name, []int{unix.LOCK_SH, unix.LOCK_EX, unix.LOCK_UN}[w.rng.IntN(3)]|unix.LOCK_NB)
	case k < 15:
		call = fmt.Sprintf("lock %s %s 2 %d 2", name, kind, w.rng.IntN(3)) // unlock
	default:
		if p.waits != nil || w.busy[file] != nil {
			return true
		}
		at := w.rng.IntN(3)
		if w.rng.IntN(4) > 0 {
			kind = "posix"
		}
		waits, call = file, fmt.Sprintf("lock %s %s 1 %d 1 wait", name, kind, at)
	}
	return w.both(p, call, call, waits)
}

// circle lets processes that hold a byte of one file each wait for the next one's, as POSIX or as OFD
// locks, the last for the first. It reports as step does.
func (w *lockTwin) circle(n int) bool {
	w.t.Helper()
	ps := slices.Clone(w.ps)
	w.rng.Shuffle(len(ps), func(i, j int) { ps[i], ps[j] = ps[j], ps[i] })
	ps = ps[:n]
	kind := func() string { return []string{"posix", "posix", "posix", "posix", "ofd"}[w.rng.IntN(5)] }
	names := make([][]string, n) // of each, for each file
	for i, p := range ps {
		for file := range n {
			w.n++
			name := fmt.Sprintf("%d-%d", file, w.n)
			names[i] = append(names[i], name)
			if !w.both(p, "open "+name+" "+p.roots[0]+fmt.Sprint("-", file), "open "+name+" "+p.roots[1]+fmt.Sprint("-", file), -1) {
				return false
			}
		}
	}
	for i, p := range ps {
		call := fmt.Sprintf("lock %s %s 1 60 1", names[i][i], kind())
		if !w.both(p, call, call, -1) {
			return false
		}
	}
	for i, p := range ps {
		next := (i + 1) % n
		call := fmt.Sprintf("lock %s %s 1 60 1 wait", names[i][next], kind())
		if !w.both(p, call, call, next) {
			return false
		}
	}
	for range n { // what one waited for it gives up then
		for i, p := range ps {
			for _, name := range names[i] {
				for _, kind := range []string{"posix", "ofd"} {
					call := fmt.Sprintf("lock %s %s 2 60 1", name, kind)
					if !w.both(p, call, call, -1) {
						return false
					}
				}
			}
		}
	}
	for i, p := range ps {
		for _, name := range names[i] {
			if !w.both(p, "close "+name, "close "+name, -1) {
				return false
			}
		}
	}
	return true
}

// both makes a call twice.
func (w *lockTwin) both(p *twinLocker, local, ours string, file int) bool {
	w.t.Helper()
	here, there := p.local.begin(local), p.ours.begin(ours)
	if file < 0 {
		a, b := here.wait(w.t), there.wait(w.t)
		if a != b {
			w.t.Fatalf("step %d: %s: %s, local %s", w.n, ours, b, a)
		}
		w.sum[strings.Split(a, " of ")[0]]++
		return w.settle()
	}
	a := p.local.waits(here)
	if a == "" {
		p.waits, p.waitsThere, p.file, w.busy[file] = here, there, file, p
		w.sum["waits"]++
		if b := p.ours.waits(there); b != "" {
			w.t.Fatalf("step %d: %s: %s, local it waits", w.n, ours, b)
		}
		<-time.After(120 * time.Millisecond) // until the wait is known, as it is at once on the local file system
		return w.settle()
	}
	b := ""
	select {
	case b = <-there.done:
	case <-time.After(5 * time.Second):
	}
	if a == deadlock && b == "" {
		for _, o := range w.ps {
			if o.waits != nil && len(o.waitsThere.done) > 0 && <-o.waitsThere.done == deadlock {
				w.sum["another one was refused"]++ // the machine was slow, and this wait was told first
				return false
			}
		}
	}
	if a != b {
		w.t.Fatalf("step %d: %s: %q, local %q", w.n, ours, b, a)
	}
	w.sum[a]++
	return w.settle()
}

// settle compares the waits that are under way.
func (w *lockTwin) settle() bool {
	w.t.Helper()
	for again := true; again; {
		again = false
		for _, p := range w.ps {
			if p.waits == nil {
				continue
			}
			a := p.local.waits(p.waits)
			if a == "" {
				if len(p.waitsThere.done) > 0 {
					w.t.Fatalf("step %d: %s: %s, local it waits", w.n, p.waitsThere.what, <-p.waitsThere.done)
				}
				continue
			}
			if b := p.waitsThere.wait(w.t); a != b {
				w.t.Fatalf("step %d: %s: %s, local %s", w.n, p.waitsThere.what, b, a)
			}
			w.sum["granted later"]++
			p.waits, p.waitsThere, w.busy[p.file] = nil, nil, nil
			again = true
		}
	}
	return true
}

// TestLockInterrupted kills processes that wait for a lock, just when it comes free. Nothing must
// be left over of them.
func TestLockInterrupted(t *testing.T) {
	_, dirs := startTwin(t)
	holder, next := startLocker(t), startLocker(t)
	holder.must("open f " + dirs[0] + "/f")
	next.must("open f " + dirs[1] + "/f")
	rounds := 20
	if testing.Short() {
		rounds = 4
	}
	for i := range rounds {
		for _, kind := range []string{"lock f posix 1 0 0", "lock f ofd 1 0 0", "flock f"} {
			off := kind[:len(kind)-5] + "2 0 0"
			if kind == "flock f" {
				kind, off = "flock f 2", "flock f 8"
			} else {
				kind += " wait"
			}
			// The last victim's may be on its way out.
			if err := holder.begin(kind).wait(t); err != "<nil>" {
				t.Fatal(err)
			}
			victim := startLocker(t)
			victim.must("open f " + dirs[(i+1)%2] + "/f")
			call := victim.begin(kind)
			if err := victim.waits(call); err != "" {
				t.Fatalf("%s: %s while it is held", kind, err)
			}
			switch i % 3 {
			case 0:
				victim.cmd.Process.Kill()
				victim.cmd.Wait()
				holder.must(off)
			case 1:
				go victim.cmd.Process.Kill()
				holder.must(off)
			case 2:
				free := holder.begin(off)
				victim.cmd.Process.Kill()
				free.wait(t)
			}
			if err := next.begin(kind).wait(t); err != "<nil>" {
				t.Fatalf("round %d: %s after the death of one who waited: %s", i, kind, err)
			}
			next.must(off)
			victim.cmd.Process.Kill()
		}
	}
}

// TestLockGoesWithOpenFile: an OFD lock is kept by a duplicate, and by another process's opening
// and closing, and goes with the last close; a POSIX lock goes with the first close of any descriptor.
func TestLockGoesWithOpenFile(t *testing.T) {
	_, dirs := startTwin(t)
	for i, dir := range append(dirs[:], t.TempDir()) { // the last is a local file system
		a, b := startLocker(t), startLocker(t)
		other := dir
		if dir == dirs[0] {
			other = dirs[1]
		}
		expect := func(want, what string, calls ...string) {
			t.Helper()
			if err := b.do(what); err != want {
				t.Fatalf("%s: %s: %s, want %s", dir, what, err, want)
			}
		}
		a.must(fmt.Sprint("open f ", dir, "/g", i), fmt.Sprint("open g ", dir, "/g", i), "dup f h")
		b.must(fmt.Sprint("open f ", other, "/g", i))
		a.must("lock f ofd 1 0 10", "lock g posix 1 20 10")
		expect(again, "lock f ofd 1 5 1")
		expect(again, "lock f posix 1 25 1")
		a.must("close f")
		expect(again, "lock f ofd 1 5 1")
		expect("<nil>", "lock f posix 1 25 1")
		a.must("close g")
		expect(again, "lock f ofd 1 5 1")
		a.must("close h")
		// RELEASE comes after close(2) has returned.
		deadline := time.Now().Add(10 * time.Second)
		for b.do("lock f ofd 1 5 1") != "<nil>" {
			if time.Now().After(deadline) {
				t.Fatalf("%s: an OFD lock stays after the last close", dir)
			}
		}
		// OFD locks of two descriptions may wait in a circle; POSIX ones must not.
		b.must(fmt.Sprint("open p ", other, "/p", i), fmt.Sprint("open q ", other, "/q", i))
		a.must(fmt.Sprint("open p ", dir, "/p", i), fmt.Sprint("open q ", dir, "/q", i))
		a.must("lock p ofd 1 0 1")
		b.must("lock q ofd 1 0 1")
		first, second := a.begin("lock q ofd 1 0 1 wait"), b.begin("lock p ofd 1 0 1 wait")
		if e1, e2 := a.waits(first), b.waits(second); e1 != "" || e2 != "" {
			t.Fatalf("%s: OFD locks in a circle: %q, %q", dir, e1, e2)
		}
		select {
		case err := <-first.done:
			t.Fatalf("%s: OFD locks in a circle: %s", dir, err)
		case err := <-second.done:
			t.Fatalf("%s: OFD locks in a circle: %s", dir, err)
		case <-time.After(300 * time.Millisecond):
		}
		a.must("lock p ofd 2 0 1")
		if err := second.wait(t); err != "<nil>" {
			t.Fatal(err)
		}
		b.must("lock q ofd 2 0 1")
		if err := first.wait(t); err != "<nil>" {
			t.Fatal(err)
		}
		if _, err := os.Stat(filepath.Join(dir, "nothing")); !errors.Is(err, os.ErrNotExist) {
			t.Error(err)
		}
	}
}

// TestLocksBeyondLimit: a file has so many locks and no more.
func TestLocksBeyondLimit(t *testing.T) {
	s := startEngine(t)
	f, err := os.Create(filepath.Join(s.dir, "f"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	lock := func(kind int16, at int64) error {
		return unix.FcntlFlock(f.Fd(), unix.F_SETLK, &unix.Flock_t{Type: kind, Start: at, Len: 1})
	}
	for i := range int64(sealfs.LocksPerFile) {
		if err := lock(unix.F_WRLCK, 2*i); err != nil {
			t.Fatalf("lock %d: %v", i, err)
		}
	}
	if err := lock(unix.F_WRLCK, 1<<40); err != unix.ENOLCK {
		t.Errorf("one more: %v", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		t.Errorf("a flock beside: %v", err)
	}
	if err := lock(unix.F_UNLCK, 0); err != nil {
		t.Error(err)
	}
	if err := lock(unix.F_WRLCK, 1<<40); err != nil {
		t.Errorf("in the place of another: %v", err)
	}
}
