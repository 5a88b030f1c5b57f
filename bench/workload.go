package bench

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"strconv"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"sealfs"
)

// chunk is the largest single read or write; larger files take several.
const chunk = 1 << 20

// listBuffer is the size of the buffer for getdents64, glibc's choice for readdir.
const listBuffer = 32 << 10

// task is one worker's part of one phase.
type task struct {
	Phase   string `json:"phase"`
	Dir     string `json:"dir"`
	Worker  int    `json:"worker"`
	Workers int    `json:"workers"`
	Files   int    `json:"files"`
	Size    int64  `json:"size"`
	Seed    uint64 `json:"seed"`
	Shared  bool   `json:"shared"`
	Shuffle bool   `json:"shuffle"`
	Fsync   bool   `json:"fsync"`
	Verify  bool   `json:"verify"`
	// HaveFiles and HaveDirs tell a listing what to expect.
	HaveFiles bool `json:"have_files"`
	HaveDirs  bool `json:"have_dirs"`
}

// result is what one worker saw in one phase. Begin and End are readings of
// CLOCK_MONOTONIC in ns. Latencies are those of the successful operations.
type result struct {
	Begin      int64         `json:"begin"`
	End        int64         `json:"end"`
	Ops        int64         `json:"ops"`
	Bytes      int64         `json:"bytes"`
	Errors     int64         `json:"errors"`
	FirstError string        `json:"first_error,omitempty"`
	Errno      syscall.Errno `json:"errno,omitempty"`
	Corrupt    bool          `json:"corrupt,omitempty"`
	Latency    histogram     `json:"latency"`
}

func (r *result) fail(err error) {
	r.Errors++
	if errors.Is(err, sealfs.ErrCorrupt) {
		if !r.Corrupt { // damage outranks an earlier failure of another kind
			r.Corrupt, r.FirstError, r.Errno = true, err.Error(), 0
		}
		return
	}
	if r.FirstError == "" {
		r.FirstError = err.Error()
		errors.As(err, &r.Errno)
	}
}

// job is a task made ready to run: everything that is not the file system's
// work is done before the start.
//
// It uses bare system calls, because package os adds some of its own to each
// open (fstat, and a try to poll the descriptor), which a network or FUSE file
// system would have to answer.
type job struct {
	task
	order []int32 // nil: ascending
	pool  []byte  // see content
	buf   []byte
	name  []byte // scratch
	seen  []bool // of a listing
}

// op does the operation on file i and returns its duration and bytes moved.
type op func(j *job, i int) (time.Duration, int64, error)

var ops = map[string]op{
	PhaseMkdir: func(j *job, i int) (time.Duration, int64, error) {
		path := j.path('d', i)
		return timed("mkdir", path, func() error { return syscall.Mkdir(path, 0o755) })
	},
	PhaseCreate: (*job).create,
	PhaseStat:   (*job).stat,
	PhaseRead:   (*job).read,
	PhaseRemove: func(j *job, i int) (time.Duration, int64, error) {
		path := j.path('f', i)
		return timed("unlink", path, func() error { return syscall.Unlink(path) })
	},
	PhaseRmdir: func(j *job, i int) (time.Duration, int64, error) {
		path := j.path('d', i)
		return timed("rmdir", path, func() error { return syscall.Rmdir(path) })
	},
}

// poolSeedStream keeps the contents' random stream apart from the order's.
const poolSeedStream = 0x9e3779b97f4a7c15

// spread is the number of different offsets at which contents start in the
// pool. It is small enough for the pool of small files to stay in the L2 cache,
// where an application's data would be too.
const spread = 64 << 10

// prepare makes t ready to run. pool is what newPool(t.Seed) returned.
func prepare(t task, pool []byte) (*job, error) {
	if _, ok := ops[t.Phase]; !ok && t.Phase != PhaseReaddir {
		return nil, fmt.Errorf("no phase %q: %w", t.Phase, sealfs.ErrInvalid)
	}
	if t.Workers < 1 || t.Workers > WorkersMax || t.Worker < 0 || t.Worker >= t.Workers ||
		t.Files < 0 || t.Files > FilesMax/t.Workers || t.Size < 0 || t.Size > SizeMax {
		return nil, fmt.Errorf("task out of range: %w", sealfs.ErrInvalid)
	}
	j := &job{task: t, pool: pool}
	switch {
	case t.Phase == PhaseReaddir:
		j.buf = make([]byte, listBuffer)
		if t.Verify {
			j.seen = make([]bool, 2*j.listers()*t.Files)
		}
	case t.Phase == PhaseRead:
		j.buf = make([]byte, min(t.Size, chunk))
	}
	if t.Shuffle && t.Phase != PhaseCreate && t.Phase != PhaseMkdir {
		j.order = make([]int32, t.Files)
		for i := range j.order {
			j.order[i] = int32(i)
		}
		r := rand.New(rand.NewPCG(t.Seed, uint64(t.Worker)))
		r.Shuffle(len(j.order), func(a, b int) { j.order[a], j.order[b] = j.order[b], j.order[a] })
	}
	return j, nil
}

// newPool returns the random bytes from which all contents are cut.
func newPool(seed uint64) []byte {
	b := make([]byte, chunk+spread)
	r := rand.New(rand.NewPCG(seed, poolSeedStream))
	for i := 0; i < len(b); i += 8 {
		binary.LittleEndian.PutUint64(b[i:], r.Uint64())
	}
	return b
}

// content returns what chunk c of the named file holds: n bytes of the pool,
// from an offset that depends on name and chunk. So no byte is computed or
// copied, and another file's data, or another chunk's, does not pass for it.
func (j *job) content(name []byte, c int64, n int64) []byte {
	h := uint64(14695981039346656037) // FNV-1a
	for _, b := range name {
		h = (h ^ uint64(b)) * 1099511628211
	}
	h ^= uint64(c) * poolSeedStream
	h ^= h >> 32 // the low bits of FNV alone are weak
	h *= 0xd6e8feb86659fd93
	h ^= h >> 32
	off := int64(h % spread)
	return j.pool[off : off+n]
}

// baseName returns the name of file or directory i of this worker, valid until
// the next call: "f.WORKER.I" or "d.WORKER.I".
func (j *job) baseName(kind byte, i int) []byte {
	j.name = append(j.name[:0], kind, '.')
	j.name = strconv.AppendInt(j.name, int64(j.Worker), 10)
	j.name = append(j.name, '.')
	j.name = strconv.AppendInt(j.name, int64(i), 10)
	return j.name
}

func (j *job) path(kind byte, i int) string {
	return j.Dir + "/" + string(j.baseName(kind, i))
}

// run does the whole task. It ends early, without an error, once stop is set.
func (j *job) run(stop *atomic.Bool) *result {
	r := new(result)
	r.Begin = monotonic()
	if j.Phase == PhaseReaddir {
		j.list(r, stop)
	} else {
		do := ops[j.Phase]
		for k := 0; k < j.Files && !stop.Load(); k++ {
			i := k
			if j.order != nil {
				i = int(j.order[k])
			}
			d, n, err := do(j, i)
			if err != nil {
				r.fail(err)
				continue
			}
			r.Ops++
			r.Bytes += n
			r.Latency.add(d)
		}
	}
	r.End = monotonic()
	return r
}

// timed runs f, again whenever a signal interrupted it, and names it in its error.
func timed(what, path string, f func() error) (time.Duration, int64, error) {
	start := time.Now()
	err := retry(f)
	d := time.Since(start)
	if err != nil {
		err = fmt.Errorf("%s %s: %w", what, path, err)
	}
	return d, 0, err
}

// retry repeats f while it fails with EINTR.
func retry(f func() error) error {
	for {
		if err := f(); err != syscall.EINTR {
			return err
		}
	}
}

func open(path string, flags int) (fd int, err error) {
	err = retry(func() (e error) {
		fd, e = syscall.Open(path, flags|syscall.O_CLOEXEC, 0o644)
		return e
	})
	if err != nil {
		return -1, fmt.Errorf("open %s: %w", path, err)
	}
	return fd, nil
}

func (j *job) create(i int) (time.Duration, int64, error) {
	path := j.path('f', i)
	name := j.baseName('f', i)
	start := time.Now()
	fd, err := open(path, syscall.O_WRONLY|syscall.O_CREAT|syscall.O_EXCL)
	if err != nil {
		return 0, 0, err
	}
	for off := int64(0); off < j.Size && err == nil; off += chunk {
		err = writeAll(fd, j.content(name, off/chunk, min(chunk, j.Size-off)))
	}
	if err == nil && j.Fsync {
		err = retry(func() error { return syscall.Fsync(fd) })
	}
	// Close is never repeated: Linux has released the descriptor even if it
	// reports EINTR. It counts, because network file systems flush there.
	if e := syscall.Close(fd); err == nil {
		err = e
	}
	if err != nil {
		return 0, 0, fmt.Errorf("write %s: %w", path, err)
	}
	return time.Since(start), j.Size, nil
}

func writeAll(fd int, p []byte) error {
	for len(p) > 0 {
		var n int
		err := retry(func() (e error) {
			n, e = syscall.Write(fd, p)
			return e
		})
		if err != nil {
			return err
		}
		p = p[n:]
	}
	return nil
}

func (j *job) stat(i int) (time.Duration, int64, error) {
	path := j.path('f', i)
	var st syscall.Stat_t
	d, _, err := timed("stat", path, func() error { return syscall.Stat(path, &st) })
	if err == nil && j.Verify {
		switch {
		case st.Mode&syscall.S_IFMT != syscall.S_IFREG:
			err = &sealfs.Corruption{Where: path, Off: -1, What: "not a regular file"}
		case st.Size != j.Size:
			err = &sealfs.Corruption{Where: path, Off: -1, What: "file size", Want: uint64(j.Size), Got: uint64(st.Size)}
		}
	}
	return d, 0, err
}

func (j *job) read(i int) (time.Duration, int64, error) {
	path := j.path('f', i)
	name := j.baseName('f', i)
	start := time.Now()
	fd, err := open(path, syscall.O_RDONLY)
	if err != nil {
		return 0, 0, err
	}
	var comparing time.Duration
	for off := int64(0); off < j.Size && err == nil; off += chunk {
		p := j.buf[:min(chunk, j.Size-off)]
		var n int
		if n, err = readFull(fd, p); err != nil {
			err = fmt.Errorf("read %s: %w", path, err)
		} else if n < len(p) {
			err = &sealfs.Corruption{Where: path, Off: off + int64(n), What: "file ends early", Want: uint64(j.Size), Got: uint64(off) + uint64(n)}
		} else if j.Verify {
			t := time.Now()
			err = j.compare(path, name, off, p)
			comparing += time.Since(t)
		}
	}
	if e := syscall.Close(fd); err == nil && e != nil {
		err = fmt.Errorf("close %s: %w", path, e)
	}
	return time.Since(start) - comparing, j.Size, err
}

// compare reports the first byte of p, read at off, that is not what create wrote.
func (j *job) compare(path string, name []byte, off int64, p []byte) error {
	want := j.content(name, off/chunk, int64(len(p)))
	if bytes.Equal(p, want) {
		return nil
	}
	k := 0
	for p[k] == want[k] {
		k++
	}
	return &sealfs.Corruption{Where: path, Off: off + int64(k), What: "file content", Want: uint64(want[k]), Got: uint64(p[k])}
}

// readFull reads until p is full or the file ends.
func readFull(fd int, p []byte) (n int, err error) {
	for n < len(p) {
		var m int
		err = retry(func() (e error) {
			m, e = syscall.Read(fd, p[n:])
			return e
		})
		if err != nil || m == 0 {
			return n, err
		}
		n += m
	}
	return n, nil
}

// listers is the number of workers whose files stand in this worker's directory.
func (j *job) listers() int {
	if j.Shared {
		return j.Workers
	}
	return 1
}

// list reads the directory once. An operation is an entry, a latency that of
// one getdents64 call that returned entries (the first includes the open).
func (j *job) list(r *result, stop *atomic.Bool) {
	start := time.Now()
	fd, err := open(j.Dir, syscall.O_RDONLY|syscall.O_DIRECTORY)
	if err != nil {
		r.fail(err)
		return
	}
	defer syscall.Close(fd)
	for !stop.Load() {
		var n int
		err := retry(func() (e error) {
			n, e = syscall.ReadDirent(fd, j.buf)
			return e
		})
		d := time.Since(start)
		if err != nil {
			r.fail(fmt.Errorf("list %s: %w", j.Dir, err))
			return
		}
		if n <= 0 {
			break
		}
		r.Latency.add(d)
		if err := j.entries(r, j.buf[:n]); err != nil {
			r.fail(err)
			return
		}
		start = time.Now()
	}
	if j.Verify && !stop.Load() {
		j.missing(r)
	}
}

// direntHead is the size of the fixed part of Linux's struct linux_dirent64:
// d_ino (8 bytes), d_off (8), d_reclen (2), d_type (1), then the name and a NUL.
const direntHead = 19

// entries counts the entries in b, all but "." and "..".
func (j *job) entries(r *result, b []byte) error {
	for len(b) > 0 {
		if len(b) < direntHead {
			return &sealfs.Corruption{Where: j.Dir, Off: -1, What: "directory entry is cut off"}
		}
		n := int(binary.NativeEndian.Uint16(b[16:]))
		if n < direntHead || n > len(b) {
			return &sealfs.Corruption{Where: j.Dir, Off: -1, What: "length of a directory entry"}
		}
		name, _, _ := bytes.Cut(b[direntHead:n], []byte{0})
		b = b[n:]
		if string(name) == "." || string(name) == ".." {
			continue
		}
		r.Ops++
		if j.Verify {
			if err := j.tick(name); err != nil {
				r.fail(err)
			}
		}
	}
	return nil
}

// tick notes that name was listed. Names that nobody made, or that come twice,
// are errors.
func (j *job) tick(name []byte) error {
	kind, rest, ok := bytes.Cut(name, []byte{'.'})
	worker, number, ok2 := bytes.Cut(rest, []byte{'.'})
	w, err1 := strconv.Atoi(string(worker))
	i, err2 := strconv.Atoi(string(number))
	if !j.Shared {
		w -= j.Worker
	}
	known := ok && ok2 && err1 == nil && err2 == nil &&
		(string(kind) == "f" && j.HaveFiles || string(kind) == "d" && j.HaveDirs) &&
		w >= 0 && w < j.listers() && i >= 0 && i < j.Files
	if !known {
		return &sealfs.Corruption{Where: j.Dir, Off: -1, What: fmt.Sprintf("entry %q was never made", name)}
	}
	k := w*j.Files + i
	if kind[0] == 'd' {
		k += j.listers() * j.Files
	}
	if j.seen[k] {
		return &sealfs.Corruption{Where: j.Dir, Off: -1, What: fmt.Sprintf("entry %q is listed twice", name)}
	}
	j.seen[k] = true
	return nil
}

// missing counts the entries that ought to have been listed.
func (j *job) missing(r *result) {
	half := len(j.seen) / 2
	for k, seen := range j.seen {
		if !seen && (k < half && j.HaveFiles || k >= half && j.HaveDirs) {
			r.fail(&sealfs.Corruption{Where: j.Dir, Off: -1, What: "an entry is missing from the listing"})
		}
	}
}

// monotonic reads CLOCK_MONOTONIC in ns: unlike time.Now, its readings can be
// compared between processes.
func monotonic() int64 {
	var ts unix.Timespec
	if unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts) != nil {
		return 0 // cannot happen: the clock exists on every Linux
	}
	return ts.Nano()
}

// sleepUntil blocks the thread until CLOCK_MONOTONIC reads t. It does not go
// through Go's timers, whose wake-ups differ more between threads.
func sleepUntil(t int64) {
	ts := unix.NsecToTimespec(t)
	for unix.ClockNanosleep(unix.CLOCK_MONOTONIC, unix.TIMER_ABSTIME, &ts, nil) == unix.EINTR {
	}
}
