package server

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"slices"
	"sort"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"sealfs"
	"sealfs/disk"
	"sealfs/lsfs"
	"sealfs/op"
	"sealfs/pmem"
)

// A ram is a device in memory. With a bandwidth it is as slow as a disk, whose
// reads and writes do not share it: else its copies are most of what the
// processor does, and the highest rate is not a disk's.
type ram struct {
	read, write                     channel
	name                            string
	b                               []byte
	reads, readBytes, writes, bytes atomic.Uint64
	flushes                         atomic.Uint64
}

// channel is one direction of a device: one transfer after the other.
type channel struct {
	bytesPerSecond int64 // 0: no limit
	next           atomic.Int64
}

// pass waits until n bytes have passed.
func (c *channel) pass(n int) {
	if c.bytesPerSecond == 0 {
		return
	}
	now := time.Now().UnixNano()
	for {
		next := c.next.Load()
		end := max(now, next) + int64(n)*1e9/c.bytesPerSecond
		if c.next.CompareAndSwap(next, end) {
			nap(time.Duration(end - now))
			return
		}
	}
}

// nap sleeps; Go's own timers may be a millisecond late.
func nap(d time.Duration) {
	ts := syscall.NsecToTimespec(int64(d))
	syscall.Nanosleep(&ts, nil) // woken early: so much the better
}

func newRAM(name string, size int64) *ram {
	d := &ram{name: name, b: disk.AlignedBuffer(int(size))}
	for i := 0; i < len(d.b); i += 4096 {
		d.b[i] = 0 // fetched now, not while it is measured
	}
	return d
}

func (d *ram) ReadAt(p []byte, off int64) (int, error) {
	n := copy(p, d.b[off:])
	d.reads.Add(1)
	d.readBytes.Add(uint64(n))
	d.read.pass(n)
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

func (d *ram) WriteAt(p []byte, off int64) (int, error) {
	d.writes.Add(1)
	d.bytes.Add(uint64(len(p)))
	d.write.pass(len(p))
	return copy(d.b[off:off+int64(len(p))], p), nil
}

func (d *ram) Flush() error               { d.flushes.Add(1); return nil }
func (d *ram) Discard(off, n int64) error { return nil }
func (d *ram) Size() int64                { return int64(len(d.b)) }
func (d *ram) SectorSize() int            { return 4096 }
func (d *ram) Name() string               { return d.name }
func (d *ram) Close() error               { return nil }
func (d *ram) Stats() disk.Stats {
	return disk.Stats{Reads: d.reads.Load(), ReadBytes: d.readBytes.Load(), Writes: d.writes.Load(), WriteBytes: d.bytes.Load(), Flushes: d.flushes.Load()}
}

// A rig is a store that is filled and overwritten. It has hundreds of segments,
// and ring and checkpoints are small beside the device, as on a real disk.
type rig struct {
	*Server
	dev, region *ram
	segment     int64
	dirs        []sealfs.Ino
	files       []rigFile
	size        int
}

type rigFile struct {
	ino  sealfs.Ino
	name uint64 // number in its name; grows when it is replaced
	seq  uint64 // of its content
}

const rigShards = 64

func newRig(t testing.TB, deviceBytes, segment int64) *rig {
	t.Helper()
	r := &rig{segment: segment, dev: newRAM("device", deviceBytes), region: newRAM("region", 128<<20)}
	if _, err := lsfs.Format(r.dev, pmem.NewMemory(r.region), lsfs.Geometry{SegmentBytes: uint32(segment)}); err != nil {
		t.Fatal(err)
	}
	r.start(t, nil)
	t.Cleanup(func() {
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	})
	return r
}

// A lane is one client of a rig: it owns the files whose index is first modulo lanes.
type lane struct {
	r    *rig
	t    testing.TB
	rng  *rand.Rand
	data []byte
	req  op.Request
	rep  op.Reply
	user uint64 // bytes written
}

func (r *rig) lane(t testing.TB, seed uint64) *lane {
	l := &lane{r: r, t: t, rng: rand.New(rand.NewPCG(seed, 1)), data: make([]byte, r.size)}
	for i := range l.data {
		l.data[i] = byte(l.rng.Uint32())
	}
	return l
}

// do executes a request and returns its code.
func (l *lane) do(req op.Request) sealfs.Code {
	at := req.Dir
	if at == 0 {
		at = req.Ino
	}
	l.req = req
	l.req.Volume, l.req.Shard = 1, at.Home(rigShards)
	l.rep.Reset()
	if err := l.r.Do(context.Background(), &l.req, &l.rep); err != nil {
		l.t.Errorf("%v: %v", req.Type, err)
		return sealfs.ErrIO
	}
	return l.rep.Code
}

func (l *lane) must(req op.Request) {
	if code := l.do(req); code != 0 {
		l.t.Errorf("%v: %v", req.Type, code)
	}
}

func rigName(n uint64) string { return fmt.Sprintf("file.%016d", n) }

// stamp makes the content differ in each block.
func (l *lane) stamp(f *rigFile) []byte {
	for i := 0; i+16 <= len(l.data); i += sealfs.BlockSize {
		binary.LittleEndian.PutUint64(l.data[i:], uint64(f.ino))
		binary.LittleEndian.PutUint64(l.data[i+8:], f.seq)
	}
	return l.data
}

// overwrite writes all of file i.
func (l *lane) overwrite(i int) sealfs.Code {
	f := &l.r.files[i]
	f.seq++
	code := l.do(op.Request{Type: op.Write, Ino: f.ino, Data: l.stamp(f)})
	if code == 0 {
		l.user += uint64(len(l.data))
	}
	return code
}

func (l *lane) dir(i int) sealfs.Ino { return l.r.dirs[i%len(l.r.dirs)] }

// create makes file i under its present name, empty.
func (l *lane) create(i int) {
	f := &l.r.files[i]
	l.must(op.Request{Type: op.Create, Dir: l.dir(i), Name: rigName(f.name), Mode: 0o644})
	f.ino, f.seq = l.rep.Attr.Ino, 0
}

// remove unlinks file i and gives its index a new name.
func (l *lane) remove(i int) {
	f := &l.r.files[i]
	l.must(op.Request{Type: op.Unlink, Dir: l.dir(i), Name: rigName(f.name)})
	f.name += uint64(len(l.r.files))
}

// read reads file i and verifies its stamps.
func (l *lane) read(i int) {
	f := &l.r.files[i]
	l.must(op.Request{Type: op.Read, Ino: f.ino, Len: uint64(len(l.data))})
	b := l.rep.Data
	if f.seq == 0 && len(b) == 0 {
		return
	}
	if len(b) != len(l.data) {
		l.t.Errorf("file %d has %d bytes, want %d", i, len(b), len(l.data))
		return
	}
	for at := 0; at+16 <= len(b); at += sealfs.BlockSize {
		if ino, seq := binary.LittleEndian.Uint64(b[at:]), binary.LittleEndian.Uint64(b[at+8:]); ino != uint64(f.ino) || seq != f.seq {
			l.t.Errorf("file %d at %d: content %d of inode %d, want %d of %d", i, at, seq, ino, f.seq, f.ino)
			return
		}
	}
}

// fill makes files until live bytes are the fraction u of the raw device.
func (r *rig) fill(t testing.TB, u float64, size int) {
	t.Helper()
	r.size = size
	r.files = make([]rigFile, int(u*float64(r.dev.Size())/float64(size)))
	root, err := r.MakeRoot(context.Background(), 1, 0o755, 0, 0)
	if err != nil {
		t.Fatal(err)
	}
	l := r.lane(t, 1)
	for i := 0; i < max(len(r.files)/1000, 1); i++ {
		l.must(op.Request{Type: op.Mkdir, Dir: root, Shard2: sealfs.Shard(i * 7919 % rigShards), Name: fmt.Sprintf("d%d", i), Mode: 0o755})
		r.dirs = append(r.dirs, l.rep.Attr.Ino)
	}
	for i := range r.files {
		r.files[i].name = uint64(i)
		l.create(i)
		if code := l.overwrite(i); code != 0 {
			t.Fatalf("filling: file %d of %d: %v", i, len(r.files), code)
		}
	}
}

// zipf draws numbers below n with probabilities like 1/rank^theta, the ranks
// spread over the numbers.
type zipf struct {
	sum  []float64
	perm []int
}

func newZipf(n int, theta float64) *zipf {
	z := &zipf{sum: make([]float64, n), perm: rand.New(rand.NewPCG(7, 7)).Perm(n)}
	total := 0.0
	for i := range n {
		total += math.Pow(float64(i+1), -theta)
		z.sum[i] = total
	}
	return z
}

func (z *zipf) draw(rng *rand.Rand) int {
	return z.perm[min(sort.SearchFloat64s(z.sum, rng.Float64()*z.sum[len(z.sum)-1]), len(z.perm)-1)]
}

// A load is one step of work on a lane.
type load func(l *lane)

// rigLoad returns the named load over all files.
func (r *rig) load(name string) load {
	n := len(r.files)
	switch name {
	case "zipf":
		z := newZipf(n, 0.99)
		return func(l *lane) { l.overwriteMust(z.draw(l.rng)) }
	case "churn": // files are deleted and made anew, at random
		return func(l *lane) {
			i := l.rng.IntN(n)
			l.remove(i)
			l.create(i)
			l.overwriteMust(i)
		}
	}
	return func(l *lane) { l.overwriteMust(l.rng.IntN(n)) }
}

func (l *lane) overwriteMust(i int) {
	if code := l.overwrite(i); code != 0 {
		l.t.Errorf("write of file %d: %v", i, code)
	}
}

// amplification is what a load cost.
type amplification struct {
	user, log, cleaning, region uint64
	st                          lsfs.Stats
}

// space is what lives of the log, with its records' headers, and the metadata,
// over the bytes of the user.
func (a amplification) space() float64 {
	live := float64(a.st.Live)
	return (live*float64(a.log)/float64(a.user) + float64(a.st.Region.Used)*sealfs.BlockSize) / live
}

// total is what was written per byte of the user.
func (a amplification) total() float64 { return float64(a.log+a.cleaning+a.region) / float64(a.user) }

// measure runs a load for so many bytes and returns what they cost.
func (r *rig) measure(t testing.TB, w load, bytes uint64) amplification {
	l := r.lane(t, 2)
	before, region := r.stores[0].Stats(), r.region.bytes.Load()
	for l.user < bytes && !t.Failed() {
		w(l)
	}
	after := r.stores[0].Stats()
	a := amplification{user: l.user, st: after, log: after.DrainBytes - before.DrainBytes, region: r.region.bytes.Load() - region}
	a.cleaning = after.Device.WriteBytes - before.Device.WriteBytes - a.log
	a.st.Cleaned -= before.Cleaned
	a.st.SpaceWaits -= before.SpaceWaits
	a.st.Checkpoints -= before.Checkpoints
	return a
}

func quantile(d []float64, q float64) float64 {
	if len(d) == 0 {
		return 0
	}
	slices.Sort(d)
	return d[min(int(q*float64(len(d))), len(d)-1)]
}

func getattr(ino sealfs.Ino) op.Request { return op.Request{Type: op.Getattr, Ino: ino} }
