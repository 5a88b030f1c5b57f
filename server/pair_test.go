package server

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"testing"

	"sealfs"
	"sealfs/disk"
	"sealfs/internal/turn"
	"sealfs/lsfs"
	"sealfs/meta"
	"sealfs/op"
	"sealfs/pmem"
)

// pair is a cluster of two servers: each holds every other shard.
type pair struct {
	t    *testing.T
	s    [2]*simServer
	up   [2]sync.RWMutex // held shared by requests
	away [2]atomic.Bool
	root sealfs.Ino
}

func newPair(t *testing.T, deviceBytes int64) *pair {
	p := &pair{t: t}
	for i := range p.s {
		s := &simServer{dev: disk.NewSim(fmt.Sprint("device", i), deviceBytes), region: disk.NewSim(fmt.Sprint("region", i), 16<<20), peers: p, logOptions: lsfs.Options{StagingBytes: 4 << 20}}
		if _, err := lsfs.Format(s.dev, pmem.NewMemory(s.region), lsfs.Geometry{SegmentBytes: 1 << 20}); err != nil {
			t.Fatal(err)
		}
		s.start(t, nil)
		p.s[i] = s
	}
	shard := sealfs.Shard(2)
	rep := p.must(op.Request{Type: op.MakeRoot, Shard: shard, Mode: 0o755})
	p.root = rep.Attr.Ino
	p.sync()
	t.Cleanup(func() {
		p.settle()
		p.check()
		for i := range p.s {
			p.stop(i)
		}
	})
	return p
}

// Do sends a request to the server that holds its shard.
func (p *pair) Do(ctx context.Context, req *op.Request, rep *op.Reply) error {
	i := req.Shard % 2
	if p.away[i].Load() || !p.up[i].TryRLock() {
		return fmt.Errorf("server %d is away: %w", i, sealfs.ErrUnavailable)
	}
	defer p.up[i].RUnlock()
	return p.s[i].Do(ctx, req, rep)
}

func (p *pair) must(req op.Request) *op.Reply {
	p.t.Helper()
	shard := req.Shard
	if address(&req); req.Ino == 0 && req.Dir == 0 {
		req.Shard = shard
	}
	rep := &op.Reply{}
	if err := p.Do(context.Background(), &req, rep); err != nil || rep.Code != 0 {
		p.t.Fatalf("%v: %v, %v", req.Type, err, rep.Code)
	}
	return rep
}

func (p *pair) settle() {
	for _, s := range p.s {
		s.stores[0].reclaim.settle()
	}
}

func (p *pair) sync() {
	for i := range p.s {
		p.must(op.Request{Type: op.Sync, Shard: sealfs.Shard(i)})
	}
}

func (p *pair) check() {
	p.t.Helper()
	var readers []pmem.Reader
	for _, s := range p.s {
		readers = append(readers, s.stores[0].BeginRead())
		defer s.stores[0].EndRead()
	}
	bad := func(problem string) { p.t.Error(problem) }
	if err := meta.CheckAll(readers, p.s[0].cfg, bad); err != nil {
		p.t.Error(err)
	}
}

func (p *pair) stop(i int) *pmem.Staging {
	st := p.s[i].stores[0]
	st.srv.teller.stop(turn.Turns{})
	st.reclaim.stop()
	p.up[i].Lock()
	defer p.up[i].Unlock()
	kept, err := st.Abandon()
	if err != nil {
		p.t.Fatal(err)
	}
	return kept
}

// cut ends a server as a power cut does, and starts it again on what it left: the
// nth of some possible states, of which the first has lost all that was not flushed.
func (p *pair) cut(i int, rng *rand.Rand, nth int) {
	s := p.s[i]
	s.teller.stop(turn.Turns{})
	s.stores[0].reclaim.stop()
	p.up[i].Lock()
	defer p.up[i].Unlock()
	one := func(d *disk.Sim) (state *disk.Sim) {
		n := nth
		for state = range d.CrashStates(rng, 12) {
			if n--; n < 0 {
				break
			}
		}
		return state
	}
	// The two must be of the same moment: nobody writes any more.
	if _, err := s.stores[0].Abandon(); err != nil {
		p.t.Fatal(err)
	}
	s.dev, s.region = one(s.dev.Reopen()), one(s.region.Reopen())
	s.start(p.t, nil)
}

func (p *pair) kill(i int) {
	kept := p.stop(i)
	s := p.s[i]
	p.up[i].Lock()
	defer p.up[i].Unlock()
	s.dev, s.region = s.dev.Reopen(), s.region.Reopen()
	s.start(p.t, kept)
}

// marks is a file whose every block, where it has one, says by which step it was
// written, and what each block may say.
type marks struct {
	*pair
	rng   *rand.Rand
	c     splitter
	ino   sealfs.Ino
	gen   uint64
	sizes []uint64            // the last is the size, the others may be it after a power cut
	may   map[uint64][]uint64 // by block, likewise; without any it says 0
	loose map[uint64]bool     // nobody was told that this block was written: it may say anything of these
	step  uint64
	sent  []op.Request // writes to chunks
	late  []op.Request // those that a truncation has cut off since
	hit   struct{ cuts, kills, late, refused, grown int }
}

func newMarks(t *testing.T, seed uint64) *marks {
	m := &marks{pair: newPair(t, 256<<20), rng: rand.New(rand.NewPCG(seed, 21)), sizes: []uint64{0}, may: map[uint64][]uint64{}, loose: map[uint64]bool{}}
	m.c = splitter{m.pair, context.Background()}
	m.ino = m.must(op.Request{Type: op.Create, Dir: m.root, Name: "f", Mode: 0o644}).Attr.Ino
	m.sync()
	return m
}

// marksChunks is how many chunks matter, and three blocks in each.
const marksChunks = 24

func (m *marks) block() uint64 {
	return sealfs.HomeBytes/sealfs.BlockSize + m.rng.Uint64N(marksChunks)*sealfs.ChunkBytes/sealfs.BlockSize + m.rng.Uint64N(3)*5
}

func marked(step uint64) []byte {
	b := make([]byte, sealfs.BlockSize)
	for i := 0; i < len(b); i += 8 {
		binary.LittleEndian.PutUint64(b[i:], step)
	}
	return b
}

func (m *marks) size() uint64 { return m.sizes[len(m.sizes)-1] }

func (m *marks) attr() op.Attr {
	m.t.Helper()
	a, err := m.c.attr(m.ino)
	if err != nil {
		m.t.Fatalf("step %d: %v", m.step, err)
	}
	if a.Gen < m.gen {
		m.t.Fatalf("step %d: generation %d after %d", m.step, a.Gen, m.gen)
	}
	m.gen = a.Gen
	return a
}

func (m *marks) write() {
	m.t.Helper()
	n, data := m.block(), marked(m.step)
	if err := m.c.write(m.ino, n*sealfs.BlockSize, data); err != nil {
		m.t.Fatalf("step %d: write: %v", m.step, err)
	}
	m.sent = append(m.sent, op.Request{Type: op.Write, Ino: m.ino, Volume: 1, Off: n * sealfs.BlockSize, Data: data, Gen: m.attr().Gen})
	if len(m.may[n]) == 0 {
		m.may[n] = []uint64{0}
	}
	m.may[n] = append(m.may[n], m.step)
	delete(m.loose, n)
	m.sizes = append(m.sizes, max(m.size(), (n+1)*sealfs.BlockSize))
}

// truncate cuts the file off, or makes it longer.
func (m *marks) truncate(size uint64) {
	m.t.Helper()
	before := m.size()
	if err := m.c.truncate(m.ino, size); err != nil {
		m.t.Fatalf("step %d: truncate: %v", m.step, err)
	}
	m.sent = slices.DeleteFunc(m.sent, func(r op.Request) bool {
		if r.Off >= size {
			m.late = append(m.late, r)
		}
		return r.Off >= size
	})
	if size > before {
		m.hit.grown++
	}
	// What is beyond the smaller size is gone for ever.
	for n := range m.may {
		if n*sealfs.BlockSize >= min(size, before) {
			delete(m.may, n)
			delete(m.loose, n)
		}
	}
	m.sizes = append(m.sizes, size)
	m.attr()
}

// again sends a write that was cut off once more.
func (m *marks) again() {
	m.t.Helper()
	if len(m.late) == 0 {
		return
	}
	req := m.late[m.rng.IntN(len(m.late))]
	req.Shard = m.ino.DataShard(req.Off, testShards)
	var rep op.Reply
	if err := m.Do(context.Background(), &req, &rep); err != nil {
		m.t.Fatalf("step %d: late write: %v", m.step, err)
	}
	switch m.hit.late++; rep.Code {
	case 0:
	case sealfs.ErrStale:
		m.hit.refused++
	default:
		m.t.Fatalf("step %d: late write: %v", m.step, rep.Code)
	}
}

// synced makes everything durable.
func (m *marks) synced() {
	m.sync()
	for n, may := range m.may {
		if !m.loose[n] {
			m.may[n] = may[len(may)-1:]
		}
	}
	m.sizes = m.sizes[len(m.sizes)-1:]
}

func (m *marks) says(n uint64) uint64 {
	m.t.Helper()
	data, err := m.c.read(m.ino, n*sealfs.BlockSize, sealfs.BlockSize)
	if err != nil || len(data) != sealfs.BlockSize {
		m.t.Fatalf("step %d: read of block %d of a file of %d bytes: %d bytes, %v", m.step, n, m.size(), len(data), err)
	}
	says := binary.LittleEndian.Uint64(data)
	if !bytes.Equal(data, marked(says)) {
		m.t.Fatalf("step %d: block %d is torn", m.step, n)
	}
	return says
}

// compare reads a block and makes sure that it says what it may. lost says of which
// server the power was cut since, -1 for none.
func (m *marks) compare(n uint64, lost int) {
	m.t.Helper()
	if (n+1)*sealfs.BlockSize > m.size() {
		return
	}
	may := m.may[n]
	if len(may) == 0 {
		may = []uint64{0}
	}
	says := m.says(n)
	hit := int(m.ino.DataShard(n*sealfs.BlockSize, testShards)%2) == lost
	if says != may[len(may)-1] && !((hit || m.loose[n]) && slices.Contains(may, says)) {
		m.t.Fatalf("step %d: block %d says %d, may say %d; generation %d", m.step, n, says, may, m.gen)
	}
	if hit || m.loose[n] {
		m.may[n] = []uint64{says}
		delete(m.loose, n)
	}
}

func (m *marks) compareAll(lost int) {
	m.t.Helper()
	for c := range uint64(marksChunks) {
		for i := range uint64(3) {
			m.compare((sealfs.HomeBytes+c*sealfs.ChunkBytes)/sealfs.BlockSize+5*i, lost)
		}
	}
}

// powerCut cuts the power of a server.
func (m *marks) powerCut(i int) {
	m.t.Helper()
	m.hit.cuts++
	m.cut(i, m.rng, m.rng.IntN(12))
	size := m.attr().Size
	if int(m.ino.Home(testShards)%2) == i {
		if !slices.Contains(m.sizes, size) {
			m.t.Fatalf("step %d: size %d after a power cut, may be %d", m.step, size, m.sizes)
		}
		// Chunks remember writes that the home does not.
		for n, may := range m.may {
			if n*sealfs.BlockSize >= size {
				m.may[n], m.loose[n] = append([]uint64{0}, may...), true
			}
		}
		m.sizes = []uint64{size}
	} else if size != m.size() {
		m.t.Fatalf("step %d: size %d, want %d", m.step, size, m.size())
	}
	m.compareAll(i)
	// What could not be looked at may have lost its last writes, too.
	for n := range m.may {
		if int(m.ino.DataShard(n*sealfs.BlockSize, testShards)%2) == i && (n+1)*sealfs.BlockSize > m.size() {
			m.loose[n] = true
		}
	}
}

// TestLateWrites: on two servers that lose power or are killed at any moment,
// independently, nothing that a truncation has cut off is ever seen again, though
// its writes come once more, and nothing that was synced is lost.
func TestLateWrites(t *testing.T) {
	steps := uint64(4000)
	if testing.Short() {
		steps = 800
	}
	m := newMarks(t, 1)
	for m.step = 1; m.step <= steps; m.step++ {
		switch k := m.rng.IntN(100); {
		case k < 40:
			m.write()
		case k < 50:
			m.truncate(m.block() * sealfs.BlockSize)
		case k < 52:
			m.truncate(m.rng.Uint64N(sealfs.HomeBytes + 1))
		case k < 58:
			// Cut off and grown at once, while late writes come.
			m.truncate(m.block() * sealfs.BlockSize)
			if len(m.late) > 0 {
				m.meanwhile(func() { m.truncate(m.size() + m.rng.Uint64N(40<<20)) })
			}
		case k < 72:
			m.again()
		case k < 76:
			m.synced()
		case k < 78:
			m.hit.kills++
			m.kill(m.rng.IntN(2))
			m.compareAll(-1)
		case k < 82:
			m.powerCut(m.rng.IntN(2))
		default:
			m.compare(m.block(), -1)
		}
	}
	m.compareAll(-1)
	t.Logf("%+v", m.hit)
	if m.hit.refused < int(steps/100) || m.hit.cuts < int(steps/100) || m.hit.grown < int(steps/100) {
		t.Errorf("%+v: the test did not reach its point", m.hit)
	}
	m.settle()
	m.must(op.Request{Type: op.Unlink, Dir: m.root, Name: "f"})
	m.settle()
	for i, s := range m.s {
		if b, _ := s.Usage(1); b != 0 {
			t.Errorf("%d bytes are left on server %d", b, i)
		}
	}
}

// meanwhile runs fn while late writes come.
func (m *marks) meanwhile(fn func()) {
	m.t.Helper()
	var quit atomic.Bool
	var wg sync.WaitGroup
	late := slices.Clone(m.late)
	fail := make(chan error, 1)
	wg.Go(func() {
		for i := 0; !quit.Load(); i++ {
			req := late[i%len(late)]
			req.Shard = m.ino.DataShard(req.Off, testShards)
			var rep op.Reply
			if err := m.Do(context.Background(), &req, &rep); err != nil || rep.Code != 0 && rep.Code != sealfs.ErrStale {
				fail <- errors.Join(err, rep.Err())
				return
			}
		}
	})
	fn()
	quit.Store(true)
	wg.Wait()
	select {
	case err := <-fail:
		m.t.Fatalf("step %d: late write: %v", m.step, err)
	default:
	}
}
