package fsck

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"sealfs"
	"sealfs/disk"
	"sealfs/internal/enc"
	"sealfs/lsfs"
	"sealfs/lsfs/layout"
	"sealfs/meta"
	"sealfs/op"
	"sealfs/pmem"
)

const (
	testShards  = 16
	testSegment = 32 << 10
	testVolume  = sealfs.Volume(7)
)

var testConfig = meta.Config{Shards: testShards}

// world is a store to be judged: lsfs and meta wired as the server does it.
type world struct {
	t                    testing.TB
	dir                  string // "": in memory
	dev, region, staging string
	s                    *lsfs.Store
	clock                int64
	stamp                uint32
	root                 sealfs.Ino
	files                []file // that churn has made
	local                func(sealfs.Shard) bool
}

func (w *world) config() meta.Config { return meta.Config{Shards: testShards, Local: w.local} }

type owner struct{}

func (owner) Live(r pmem.Reader, ino sealfs.Ino, off uint64, at sealfs.LSN, n uint32, fn func(lsfs.Part)) error {
	return meta.Live(r, testConfig, ino, off, at, n, func(e *meta.Extent) {
		fn(lsfs.Part{Off: e.Off, At: e.Addr, Len: e.Stored()})
	})
}

func (owner) Move(tx *lsfs.Tx, ino sealfs.Ino, p lsfs.Part, to sealfs.LSN) (bool, error) {
	return meta.Move(tx.Tx, account{tx}, testConfig, ino, p.Off, p.Len, p.At, to)
}

type account struct{ *lsfs.Tx }

func (account) Charge(sealfs.Volume, int64, int64) {}

// lazy are options under which nothing is drained but by Sync.
var lazy = lsfs.Options{FarBytes: -1, DrainBytes: 1 << 30, DrainInterval: time.Second, LagMax: time.Second, StagingBytes: 8 << 20}

// newWorld formats and opens a store of the given number of segments in files.
func newWorld(t testing.TB, segments int, o lsfs.Options) *world {
	t.Helper()
	return newWorldOf(t, testSegment, segments, o)
}

func newWorldOf(t testing.TB, segment, segments int, o lsfs.Options) *world {
	t.Helper()
	dir := t.TempDir()
	w := &world{t: t, dir: dir, dev: filepath.Join(dir, "device.img"), region: filepath.Join(dir, RegionName), staging: filepath.Join(dir, "ring"), clock: 1e18}
	w.must(disk.CreateImage(w.dev, layout.DataStart+int64(segments)*int64(segment)))
	dev, err := disk.Open(w.dev, disk.OpenOptions{Exclusive: true})
	w.must(err)
	region, err := pmem.OpenFile(w.region, true)
	w.must(err)
	_, err = lsfs.Format(dev, region, lsfs.Geometry{SegmentBytes: uint32(segment), Label: "test"})
	w.must(errors.Join(err, dev.Close(), region.Close()))
	w.open(o)
	w.makeRoot()
	return w
}

func (w *world) makeRoot() {
	w.root = w.do(&op.Request{Type: op.MakeRoot, Shard: 3, Volume: testVolume, Mode: 0o755}).Attr.Ino
}

// open opens the store in the files.
func (w *world) open(o lsfs.Options) {
	w.t.Helper()
	dev, err := disk.Open(w.dev, disk.OpenOptions{Exclusive: true})
	w.must(err)
	region, err := pmem.OpenFile(w.region, false)
	w.must(err)
	o.StagingPath = w.staging
	w.s, err = lsfs.Open(dev, region, nil, owner{}, o)
	w.must(err)
}

func (w *world) must(err error) {
	w.t.Helper()
	if err != nil {
		w.t.Fatal(err)
	}
}

type testChange struct {
	*lsfs.Tx
	w   *world
	req *op.Request
	rep *op.Reply
}

func (c *testChange) Charge(sealfs.Volume, int64, int64) {}

func (c *testChange) Apply(tx *lsfs.Tx) error {
	c.Tx = tx
	if err := meta.Apply(tx.Tx, c, c.w.config(), c.req, c.rep); err != nil {
		return err
	}
	return c.rep.Err()
}

// try executes a change and returns its refusal or error.
func (w *world) try(req *op.Request) (*op.Reply, error) {
	w.clock++
	req.Time = w.clock
	switch req.Type {
	case op.MakeRoot, op.DropSession, op.Prepare, op.Commit, op.Abort, op.Forget, op.Purge:
	default:
		home := req.Dir
		if home == 0 {
			home = req.Ino
		}
		req.Shard = home.Home(testShards)
		if req.Type == op.Write {
			req.Shard = req.Ino.DataShard(req.Off, testShards)
		}
	}
	in := lsfs.Intent{Ino: req.Ino, Offset: req.Off, Op: req.AppendTo(nil)}
	switch req.Type {
	case op.Write:
		w.stamp++
		req.Stamp = w.stamp
		in.Op = req.AppendTo(nil)
		in.Payload, in.PayloadCRC = req.Data, enc.CRC(0, req.Data)
	case op.Unlink, op.Setattr, op.Reclaim:
		in.Class = lsfs.Freeing
	}
	rep := &op.Reply{}
	_, err := w.s.Update(&in, &testChange{w: w, req: req, rep: rep})
	return rep, err
}

// do executes a change that must succeed.
func (w *world) do(req *op.Request) *op.Reply {
	w.t.Helper()
	rep, err := w.try(req)
	if err != nil {
		w.t.Fatalf("%v %q: %v", req.Type, req.Name, err)
	}
	return rep
}

func (w *world) create(dir sealfs.Ino, name string) sealfs.Ino {
	w.t.Helper()
	return w.do(&op.Request{Type: op.Create, Dir: dir, Name: name, Mode: 0o644}).Attr.Ino
}

func (w *world) mkdir(dir sealfs.Ino, name string, shard sealfs.Shard) sealfs.Ino {
	w.t.Helper()
	return w.do(&op.Request{Type: op.Mkdir, Dir: dir, Name: name, Mode: 0o755, Shard2: shard}).Attr.Ino
}

func (w *world) write(ino sealfs.Ino, off uint64, data []byte) {
	w.t.Helper()
	w.do(&op.Request{Type: op.Write, Ino: ino, Off: off, Size: off + uint64(len(data)), Data: data})
}

// pattern returns n bytes that differ from those of other seeds.
func pattern(seed byte, n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = seed + byte(i*7+i>>8)
	}
	return b
}

// ids are the inodes of the zoo that tests damage.
type ids struct {
	sub, dir2, small, tall, link, hard, held, gone, attr, acl sealfs.Ino
}

// testACL is an ACL: owner rwx, user 9 rw, group r-x, mask rwx, others --x.
var testACL = []byte{
	2, 0, 0, 0, 1, 0, 7, 0, 255, 255, 255, 255, 2, 0, 6, 0, 9, 0, 0, 0, 4, 0, 5, 0, 255, 255, 255, 255,
	16, 0, 7, 0, 255, 255, 255, 255, 32, 0, 1, 0, 255, 255, 255, 255,
}

// zoo fills the store with one of everything.
func (w *world) zoo() (z ids) {
	w.t.Helper()
	z.sub = w.mkdir(w.root, "sub", 5)
	z.dir2 = w.mkdir(z.sub, "deeper", 9)
	z.small = w.create(z.sub, "small")
	w.write(z.small, 0, pattern(1, 100))
	z.tall = w.create(z.sub, "tall")
	for i := range 6 {
		w.write(z.tall, uint64(i)*3*block, pattern(byte(i), 2*block))
	}
	w.do(&op.Request{Type: op.Setattr, Ino: z.tall, Valid: op.SetSize, Size: 15*block + 1000}) // in the middle of a block
	w.do(&op.Request{Type: op.Symlink, Dir: z.sub, Name: "short", Data: []byte("tall")})
	z.link = w.do(&op.Request{Type: op.Symlink, Dir: z.sub, Name: "long", Data: bytes.Repeat([]byte("x/"), 1000)}).Attr.Ino
	z.hard = w.create(w.root, "hard")
	w.do(&op.Request{Type: op.Link, Dir: z.dir2, Name: "hard2", Ino: z.hard})
	w.do(&op.Request{Type: op.Mknod, Dir: z.dir2, Name: "fifo", Mode: 0o010600})
	z.attr = w.create(z.dir2, "attr")
	w.do(&op.Request{Type: op.Setxattr, Ino: z.attr, Name: "user.a", Data: []byte("one")})
	w.do(&op.Request{Type: op.Setxattr, Ino: z.attr, Name: "user.big", Data: pattern(9, 3000)})
	z.acl = w.mkdir(w.root, "acl", 3)
	w.do(&op.Request{Type: op.Setxattr, Ino: z.acl, Name: op.ACLDefault, Data: testACL})
	w.write(w.create(z.acl, "handed down"), 0, pattern(5, 300))
	w.mkdir(z.acl, "handed on", 7)
	z.held = w.create(w.root, "held")
	w.write(z.held, 0, pattern(3, 5000))
	w.do(&op.Request{Type: op.Unlink, Dir: w.root, Name: "held", Flags: op.Held})
	z.gone = w.create(w.root, "gone")
	w.write(z.gone, 0, pattern(4, 8000))
	w.do(&op.Request{Type: op.Unlink, Dir: w.root, Name: "gone"})
	w.do(&op.Request{Type: op.SetLock, Ino: z.small, Session: 11, Lock: op.Lock{Type: op.ReadLock, Start: 0, End: 99, Owner: 1, PID: 4}})
	w.do(&op.Request{Type: op.SetLock, Ino: z.small, Session: 12, Lock: op.Lock{Type: op.ReadLock, Start: 50, End: 149, Owner: 1, PID: 5}})
	w.do(&op.Request{Type: op.Create, Dir: z.dir2, Name: "numbered", Mode: 0o600, Session: 11, Seq: 1})
	w.do(&op.Request{Type: op.Create, Dir: z.dir2, Name: "numbered2", Mode: 0o600, Session: 11, Seq: 2})
	w.do(&op.Request{Type: op.Rename, Dir: z.dir2, Name: "numbered2", Dir2: z.sub, Name2: "moved"})
	return z
}

// check judges the files.
func (w *world) check(o Options) *Report {
	w.t.Helper()
	o.Device, o.Staging = w.dev, w.staging
	return judge(w.t, o)
}

// judge checks and shows what was found when the test fails.
func judge(t testing.TB, o Options) *Report {
	t.Helper()
	var out strings.Builder
	if o.Out == nil {
		o.Out = &out
	}
	rep, err := Check(context.Background(), o)
	if err != nil {
		t.Fatalf("check: %v\n%s", err, out.String())
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Log("\n" + out.String())
		}
	})
	return rep
}

// images are a store in memory.
type images struct {
	dev, region *disk.Sim
	ring        *pmem.Staging
}

// load copies the files of a closed or killed store into memory.
func (w *world) load() images {
	w.t.Helper()
	m := images{dev: load(w.t, w.dev), region: load(w.t, w.region)}
	if ring, err := pmem.OpenStaging(w.staging); err == nil {
		m.ring = ring.Clone()
		w.must(ring.Close(false))
	}
	return m
}

func load(t testing.TB, path string) *disk.Sim {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	d := disk.NewSim(filepath.Base(path), int64(len(b)))
	d.Overwrite(0, b)
	return d
}

func (m images) clone() images {
	c := images{dev: m.dev.Clone(), region: m.region.Clone()}
	if m.ring != nil {
		c.ring = m.ring.Clone()
	}
	return c
}

func (m images) options() Options {
	return Options{Dev: m.dev, Reg: m.region, Ring: m.ring, Shards: testShards}
}

// edit changes the region as a transaction, without a record in the log.
func (m images) edit(t testing.TB, fn func(tx *pmem.Tx) error) {
	t.Helper()
	r, h, err := pmem.Open(pmem.NewMemory(m.region), pmem.Options{})
	if err != nil {
		t.Fatal(err)
	}
	tx := r.Begin()
	if err := fn(tx); err != nil {
		t.Fatal(err)
	}
	tx.Commit()
	ck := r.BeginCheckpoint()
	for more := true; more; {
		more = ck.Copy()
		if err := ck.Write(); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(ck.Finish(h), r.Close()); err != nil {
		t.Fatal(err)
	}
}

// read returns bytes of a simulated device.
func read(t testing.TB, d *disk.Sim, off int64, n int) []byte {
	t.Helper()
	b := make([]byte, n)
	if _, err := d.ReadAt(b, off); err != nil && err != io.EOF {
		t.Fatal(err)
	}
	return b
}

// kill ends the store as SIGKILL does.
func (w *world) kill() {
	w.t.Helper()
	_, err := w.s.Abandon()
	w.must(err)
}

// lives opens a store that was repaired, if it can be, and works with it.
func (h *hurt) lives(t *testing.T) {
	t.Helper()
	if rep, _ := Check(t.Context(), h.options()); !rep.Sound() {
		return
	}
	m := h.clone()
	m.dev.ClearFaults()
	s, err := lsfs.Open(m.dev, pmem.NewMemory(m.region), nil, owner{}, lazy)
	if err != nil {
		t.Errorf("a sound store does not open: %v", err)
		return
	}
	w := &world{t: t, s: s, clock: 2e18, root: h.w.root}
	if _, err := w.try(&op.Request{Type: op.Create, Dir: w.root, Name: "after the repair", Mode: 0o600}); err != nil {
		t.Errorf("create: %v", err)
	}
	if err := meta.Check(s.BeginRead(), testConfig, func(problem string) { t.Errorf("meta: %s", problem) }); err != nil {
		t.Error(err)
	}
	s.EndRead()
	h.must(s.Close())
}
