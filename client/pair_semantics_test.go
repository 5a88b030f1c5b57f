package client

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestAppendersOfTwoMounts has many writers append records of all lengths to one file, in both
// mounts, through handles of their own and shared ones. Each record must be there once, whole, and
// after the earlier ones of its writer.
func TestAppendersOfTwoMounts(t *testing.T) {
	p := startPair(t)
	const writers, records = 8, 120
	var wg sync.WaitGroup
	var shared [2]*os.File
	for i, dir := range p.dirs {
		f, err := os.OpenFile(filepath.Join(dir, "log"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		shared[i] = f
	}
	record := func(w, i int) []byte {
		b := fmt.Appendf(nil, "%d:%d:", w, i)
		return append(append(b, bytes.Repeat([]byte{byte('a' + w)}, (w*37+i*i*11)%9000+i/40%2*i%7/6*200_000)...), '\n')
	}
	for w := range writers {
		wg.Go(func() {
			f := shared[w%2]
			if w >= 2 {
				flags := os.O_WRONLY | os.O_APPEND
				if w >= 6 {
					flags = os.O_RDWR | os.O_APPEND // by way of the kernel's page cache
				}
				var err error
				if f, err = os.OpenFile(filepath.Join(p.dirs[w%2], "log"), flags, 0); err != nil {
					t.Error(err)
					return
				}
				defer f.Close()
			}
			for i := range records {
				if _, err := f.Write(record(w, i)); err != nil {
					t.Errorf("writer %d: %v", w, err)
					return
				}
			}
		})
	}
	wg.Wait()
	for m, dir := range p.dirs {
		all, err := os.ReadFile(filepath.Join(dir, "log"))
		if err != nil {
			t.Fatal(err)
		}
		var next [writers]int
		for n, line := range bytes.SplitAfter(all, []byte("\n")) {
			if len(line) == 0 {
				continue
			}
			var w, i int
			if k, _ := fmt.Sscanf(string(line[:min(len(line), 20)]), "%d:%d:", &w, &i); k != 2 || w >= writers || !bytes.Equal(line, record(w, i)) {
				t.Fatalf("mount %d: record %d is torn: %.40q, %d bytes", m, n, line, len(line))
			}
			if i != next[w] {
				t.Fatalf("mount %d: of writer %d comes record %d after %d", m, w, i, next[w]-1)
			}
			next[w]++
		}
		for w, n := range next {
			if n != records {
				t.Errorf("mount %d: %d of %d records of writer %d", m, n, records, w)
			}
		}
	}
}

// racers is how many make the same call at the same time.
const racers = 6

// oneEach makes a file for each racer.
func oneEach(dir string) error {
	for who := range racers {
		if err := os.WriteFile(filepath.Join(dir, fmt.Sprint("of", who)), fmt.Append(nil, who), 0o644); err != nil {
			return err
		}
	}
	return nil
}

// TestOneWins lets both mounts race for the same thing: of all calls exactly one may succeed, and
// both mounts must see whose.
func TestOneWins(t *testing.T) {
	p := startPair(t)
	rounds := 60
	if testing.Short() {
		rounds = 15
	}
	for _, race := range []struct {
		name string
		// prepare makes what the race is about, try is what all do at once; who differs.
		prepare func(dir string) error
		try     func(dir string, who int) error
		want    error // of those who lose
	}{
		{"O_EXCL", nil, func(dir string, who int) error {
			f, err := os.OpenFile(filepath.Join(dir, "f"), os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o644)
			if err != nil {
				return err
			}
			_, err = fmt.Fprint(f, who)
			return errors.Join(err, f.Close())
		}, unix.EEXIST},
		{"mkdir", nil, func(dir string, _ int) error { return os.Mkdir(filepath.Join(dir, "f"), 0o755) }, unix.EEXIST},
		{"symlink", nil, func(dir string, who int) error { return os.Symlink(fmt.Sprint(who), filepath.Join(dir, "f")) }, unix.EEXIST},
		{"link", oneEach, func(dir string, who int) error {
			return os.Link(filepath.Join(dir, fmt.Sprint("of", who)), filepath.Join(dir, "f"))
		}, unix.EEXIST},
		{"rename without replacing", oneEach, func(dir string, who int) error {
			return unix.Renameat2(unix.AT_FDCWD, filepath.Join(dir, fmt.Sprint("of", who)), unix.AT_FDCWD, filepath.Join(dir, "f"), unix.RENAME_NOREPLACE)
		}, unix.EEXIST},
		{"unlink", func(dir string) error { return os.WriteFile(filepath.Join(dir, "f"), nil, 0o644) },
			func(dir string, _ int) error { return os.Remove(filepath.Join(dir, "f")) }, unix.ENOENT},
		{"rename away", func(dir string) error { return os.WriteFile(filepath.Join(dir, "f"), nil, 0o644) },
			func(dir string, who int) error {
				return os.Rename(filepath.Join(dir, "f"), filepath.Join(dir, fmt.Sprint("to", who)))
			}, unix.ENOENT},
		{"a name for a file without one", nil, func(dir string, who int) error {
			fd, err := unix.Open(dir, unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o644)
			if err != nil {
				return err
			}
			defer unix.Close(fd)
			if _, err := unix.Write(fd, fmt.Append(nil, who)); err != nil {
				return err
			}
			return unix.Linkat(unix.AT_FDCWD, fmt.Sprintf("/proc/self/fd/%d", fd), unix.AT_FDCWD, filepath.Join(dir, "f"), unix.AT_SYMLINK_FOLLOW)
		}, unix.EEXIST},
	} {
		t.Run(race.name, func(t *testing.T) {
			for round := range rounds {
				sub := fmt.Sprintf("%s-%d", strings.ReplaceAll(race.name, " ", "-"), round)
				if err := os.Mkdir(filepath.Join(p.dirs[round%2], sub), 0o755); err != nil {
					t.Fatal(err)
				}
				if race.prepare != nil {
					if err := race.prepare(filepath.Join(p.dirs[round%2], sub)); err != nil {
						t.Fatal(err)
					}
				}
				var start, done sync.WaitGroup
				var won atomic.Int32
				winner := atomic.Int32{}
				start.Add(1)
				for who := range racers {
					done.Go(func() {
						start.Wait()
						switch err := race.try(filepath.Join(p.dirs[who%2], sub), who); {
						case err == nil:
							won.Add(1)
							winner.Store(int32(who))
						case !errors.Is(err, race.want):
							t.Errorf("round %d: %v", round, err)
						}
					})
				}
				start.Done()
				done.Wait()
				if n := won.Load(); n != 1 {
					t.Fatalf("round %d: %d have won", round, n)
				}
				for m, dir := range p.dirs {
					f, who := filepath.Join(dir, sub, "f"), fmt.Sprint(winner.Load())
					var got string
					switch race.name {
					case "mkdir":
						continue
					case "symlink":
						got, _ = os.Readlink(f)
					case "unlink", "rename away":
						if _, err := os.Lstat(f); !errors.Is(err, unix.ENOENT) {
							t.Errorf("round %d: mount %d: %v", round, m, err)
						}
						continue
					default:
						b, err := os.ReadFile(f)
						if err != nil {
							t.Error(err)
						}
						got = string(b)
					}
					if got != who {
						t.Fatalf("round %d: mount %d sees %q, but %s has won", round, m, got, who)
					}
				}
			}
		})
	}
}

// TestUnlinkedElsewhere works on files whose last name goes on the other mount: they stay readable
// and writable for who has them open, on both.
func TestUnlinkedElsewhere(t *testing.T) {
	p := startPair(t)
	for _, test := range []struct {
		name   string
		remove func(dir string) error
	}{
		{"unlinked", func(dir string) error { return os.Remove(filepath.Join(dir, "f")) }},
		{"replaced", func(dir string) error {
			if err := os.WriteFile(filepath.Join(dir, "g"), []byte("another"), 0o600); err != nil {
				return err
			}
			return os.Rename(filepath.Join(dir, "g"), filepath.Join(dir, "f"))
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			var files [2]*os.File
			for i, dir := range p.dirs {
				f, err := os.OpenFile(filepath.Join(dir, "f"), os.O_CREATE|os.O_RDWR, 0o644)
				if err != nil {
					t.Fatal(err)
				}
				defer f.Close()
				files[i] = f
			}
			if _, err := files[0].WriteString("before, "); err != nil {
				t.Fatal(err)
			}
			if err := test.remove(p.dirs[1]); err != nil {
				t.Fatal(err)
			}
			if _, err := files[0].WriteString("by the first"); err != nil {
				t.Fatal(err)
			}
			if _, err := files[1].WriteAt([]byte("BEFORE"), 0); err != nil {
				t.Fatal(err)
			}
			if err := files[1].Truncate(13); err != nil {
				t.Fatal(err)
			}
			for i, f := range files {
				b := make([]byte, 40)
				n, _ := f.ReadAt(b, 0)
				var st unix.Stat_t
				if err := unix.Fstat(int(f.Fd()), &st); err != nil || string(b[:n]) != "BEFORE, by th" || st.Nlink != 0 || st.Size != 13 {
					t.Errorf("mount %d: %q, %d links, %d bytes, %v", i, b[:n], st.Nlink, st.Size, err)
				}
				if err := f.Chmod(0o600); err != nil {
					t.Error(err)
				}
				if err := f.Sync(); err != nil {
					t.Error(err)
				}
			}
			// What the one lets go, the other one keeps.
			files[0].Close()
			if _, err := files[1].WriteAt([]byte("still"), 0); err != nil {
				t.Error(err)
			}
			b := make([]byte, 5)
			if _, err := files[1].ReadAt(b, 0); err != nil || string(b) != "still" {
				t.Errorf("%q, %v", b, err)
			}
			files[1].Close()
			os.Remove(filepath.Join(p.dirs[0], "f"))
		})
	}
}

// TestTmpfileLinkedElsewhere gives a file without a name one, which the other mount sees with all
// that was written before, and removes there.
func TestTmpfileLinkedElsewhere(t *testing.T) {
	p := startPair(t)
	for i := range 20 {
		fd, err := unix.Open(p.dirs[i%2], unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o640)
		if err != nil {
			t.Fatal(err)
		}
		want := strings.Repeat(fmt.Sprint(i), 5000)
		if _, err := unix.Write(fd, []byte(want)); err != nil {
			t.Fatal(err)
		}
		there := filepath.Join(p.dirs[1-i%2], "f")
		if _, err := os.Stat(there); !errors.Is(err, os.ErrNotExist) {
			t.Fatal(err)
		}
		if err := unix.Linkat(unix.AT_FDCWD, fmt.Sprintf("/proc/self/fd/%d", fd), unix.AT_FDCWD, filepath.Join(p.dirs[i%2], "f"), unix.AT_SYMLINK_FOLLOW); err != nil {
			t.Fatal(err)
		}
		if b, err := os.ReadFile(there); err != nil || string(b) != want {
			t.Fatalf("round %d: %d bytes, %v", i, len(b), err)
		}
		if err := os.Remove(there); err != nil {
			t.Fatal(err)
		}
		var st unix.Stat_t
		if err := unix.Fstat(fd, &st); err != nil || st.Nlink != 0 || st.Size != int64(len(want)) {
			t.Fatalf("round %d: %d links, %d bytes, %v", i, st.Nlink, st.Size, err)
		}
		unix.Close(fd)
	}
}

// TestListDuringChangesElsewhere lists a directory through one mount, going back to remembered
// places at times, while the other mount creates, renames and removes in it. What is there
// all along is seen exactly once.
func TestListDuringChangesElsewhere(t *testing.T) {
	p := startPair(t)
	const stable = 1500
	for i := range stable {
		if err := os.WriteFile(filepath.Join(p.dirs[0], fmt.Sprintf("stable-%d", i)), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	var over atomic.Bool
	var wg sync.WaitGroup
	for g := range 2 {
		wg.Go(func() {
			for i := 0; !over.Load(); i++ {
				name := filepath.Join(p.dirs[1], fmt.Sprintf("coming-%d-%d", g, i%40))
				os.WriteFile(name, nil, 0o600)
				os.Rename(name, name+"x")
				os.Remove(name + "x")
			}
		})
	}
	defer func() { over.Store(true); wg.Wait() }()
	for round := range 4 {
		d, err := unix.Open(p.dirs[0], unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		seen := map[string]int{}
		b := make([]byte, 2048)
		for n := 0; ; n++ {
			k, err := unix.Getdents(d, b)
			if err != nil {
				t.Fatal(err)
			}
			if k == 0 {
				break
			}
			list := parseDirents(b[:k])
			if n%3 == 2 {
				// Back to an entry in between, as telldir and seekdir do.
				at := rand.IntN(len(list))
				if _, err := unix.Seek(d, list[at].off, unix.SEEK_SET); err != nil {
					t.Fatal(err)
				}
				list = list[:at+1]
			}
			for _, e := range list {
				seen[e.name]++
			}
		}
		unix.Close(d)
		for i := range stable {
			if n := seen[fmt.Sprintf("stable-%d", i)]; n != 1 {
				t.Errorf("round %d: stable-%d was seen %d times", round, i, n)
			}
		}
	}
}

// TestAccessTimesReachOthers reads on one mount and looks on the other one.
func TestAccessTimesReachOthers(t *testing.T) {
	p := startPair(t)
	stat := func(m int) (st unix.Stat_t) {
		t.Helper()
		if err := unix.Stat(filepath.Join(p.dirs[m], "f"), &st); err != nil {
			t.Fatal(err)
		}
		return st
	}
	if err := os.WriteFile(filepath.Join(p.dirs[0], "f"), []byte("content"), 0o644); err != nil {
		t.Fatal(err)
	}
	before := stat(0)
	if now := stat(1); now.Atim != before.Atim {
		t.Errorf("%v, %v", before.Atim, now.Atim)
	}
	if _, err := os.ReadFile(filepath.Join(p.dirs[1], "f")); err != nil {
		t.Fatal(err)
	}
	read := stat(1)
	if read.Atim.Nano() <= before.Atim.Nano() || read.Ctim != before.Ctim || read.Mtim != before.Mtim {
		t.Errorf("before %+v, then %+v", before, read)
	}
	await(t, "the other mount does not see the time of access", func() bool { return stat(0).Atim == read.Atim })
	// Nobody but the first reader after a change counts.
	tick()
	for _, dir := range p.dirs {
		if _, err := os.ReadFile(filepath.Join(dir, "f")); err != nil {
			t.Fatal(err)
		}
	}
	<-time.After(accessDelay + accessDelay/2)
	for m := range p.dirs {
		if now := stat(m); now.Atim != read.Atim {
			t.Errorf("mount %d: %v, was %v", m, now.Atim, read.Atim)
		}
	}
}

// TestStatfsTellsTheTruth writes, creates and removes, and looks at what is said to be free.
func TestStatfsTellsTheTruth(t *testing.T) {
	p := startPair(t)
	look := func() (st unix.Statfs_t) {
		t.Helper()
		var other unix.Statfs_t
		if err := unix.Statfs(p.dirs[0], &st); err != nil {
			t.Fatal(err)
		}
		if err := unix.Statfs(p.dirs[1], &other); err != nil {
			t.Fatal(err)
		}
		if st.Bavail != st.Bfree || st.Bfree > st.Blocks || st.Ffree > st.Files {
			t.Errorf("%+v", st)
		}
		if st.Blocks != other.Blocks || st.Files-st.Ffree != other.Files-other.Ffree {
			t.Errorf("one mount says %+v, the other %+v", st, other)
		}
		return st
	}
	start := look()
	const blocks, files = 4096, 500
	f, err := os.Create(filepath.Join(p.dirs[0], "large"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for i := range blocks / 64 {
		if _, err := f.Write(bytes.Repeat([]byte{byte(i), 7}, 64*4096/2)); err != nil {
			t.Fatal(err)
		}
	}
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
	large := look()
	if d := int64(start.Bavail) - int64(large.Bavail); d < blocks || d > blocks*5/4+64 {
		t.Errorf("%d blocks were written, and %d less are free", blocks, d)
	}
	for i := range files {
		if err := os.WriteFile(filepath.Join(p.dirs[1], fmt.Sprint(i)), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	many := look()
	if used := (many.Files - many.Ffree) - (large.Files - large.Ffree); used != files {
		t.Errorf("%d files were made, %d more are used", files, used)
	}
	if many.Ffree >= large.Ffree {
		t.Errorf("%d inodes are free, before %d files were made %d", many.Ffree, files, large.Ffree)
	}
	if err := os.Remove(f.Name()); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	for i := range files {
		if err := os.Remove(filepath.Join(p.dirs[0], fmt.Sprint(i))); err != nil {
			t.Fatal(err)
		}
	}
	await(t, "what was removed does not come back", func() bool {
		now := look()
		return now.Files-now.Ffree == start.Files-start.Ffree && now.Bavail+blocks/2 >= start.Bavail
	})
}

// TestMappedElsewhere maps a file in one mount and changes it in the other: who maps it anew sees that.
func TestMappedElsewhere(t *testing.T) {
	p := startPair(t)
	var files [2]*os.File
	for i, dir := range p.dirs {
		f, err := os.OpenFile(filepath.Join(dir, "f"), os.O_CREATE|os.O_RDWR, 0o644)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		files[i] = f
	}
	if err := files[0].Truncate(8192); err != nil {
		t.Fatal(err)
	}
	for i := range 40 {
		who, off := i%2, i*97
		want := fmt.Sprintf("%08d", i)
		m, err := unix.Mmap(int(files[who].Fd()), 0, 8192, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
		if err != nil {
			t.Fatal(err)
		}
		copy(m[off:], want)
		if err := errors.Join(unix.Msync(m, unix.MS_SYNC), unix.Munmap(m)); err != nil {
			t.Fatal(err)
		}
		b := make([]byte, 8)
		if _, err := files[1-who].ReadAt(b, int64(off)); err != nil || string(b) != want {
			t.Fatalf("round %d: read %q, %v", i, b, err)
		}
		// Whoever has read the other's attributes, as read does, maps what they say.
		m, err = unix.Mmap(int(files[1-who].Fd()), 0, 8192, unix.PROT_READ, unix.MAP_SHARED)
		if err != nil {
			t.Fatal(err)
		}
		if got := string(m[off : off+8]); got != want {
			t.Errorf("round %d: mapped %q", i, got)
		}
		unix.Munmap(m)
	}
}

// TestLargestFiles goes to the end of what an offset can be.
func TestLargestFiles(t *testing.T) {
	p := startPair(t)
	const most = 1<<63 - 1
	for i, dir := range p.dirs {
		f, err := os.Create(filepath.Join(dir, "f"))
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		fd := int(f.Fd())
		if err := unix.Ftruncate(fd, most); err != nil {
			t.Fatal(err)
		}
		for _, off := range []int64{1 << 33, 1 << 53, most - 4096 - 7} {
			if n, err := unix.Pwrite(fd, []byte("there"), off); n != 5 || err != nil {
				t.Errorf("%d: %d, %v", off, n, err)
			}
		}
		var st unix.Stat_t
		if err := unix.Stat(filepath.Join(p.dirs[1-i], "f"), &st); err != nil || st.Size != most {
			t.Errorf("%d bytes, %v", st.Size, err)
		}
		g, err := os.Open(filepath.Join(p.dirs[1-i], "f"))
		if err != nil {
			t.Fatal(err)
		}
		defer g.Close()
		b := make([]byte, 10)
		if n, err := g.ReadAt(b, most-4096-9); n != 10 || err != nil || string(b) != "\x00\x00there\x00\x00\x00" {
			t.Errorf("%q, %d, %v", b, n, err)
		}
		at := int64(0)
		for _, want := range []int64{1 << 33, 1 << 53, (most - 4096 - 7) &^ 4095} {
			if at, err = unix.Seek(int(g.Fd()), at, unix.SEEK_DATA); at != want || err != nil {
				t.Errorf("data at %d, %v, want %d", at, err, want)
			}
			if at, err = unix.Seek(int(g.Fd()), at, unix.SEEK_HOLE); err != nil {
				t.Error(err)
			}
		}
		if err := os.Remove(filepath.Join(p.dirs[1-i], "f")); err != nil {
			t.Error(err)
		}
	}
}
