package disk

import (
	"bytes"
	"errors"
	"fmt"
	"iter"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"

	"sealfs"
)

// TestBarrier is how a crash test looks. A record of two sectors is published by
// a flag in a third. With a flush between the two, no power cut leaves a flag
// without its record; without it, some do, and the enumeration finds them.
func TestBarrier(t *testing.T) {
	const record, flag = 0, 2 * 512
	publish := func(barrier bool) (states, torn int) {
		d := NewSim("sim", 1<<20)
		d.SetHook(func(Op) {
			for c := range d.Crashes() {
				states++
				published := mustRead(t, c, flag, 1)[0] == 1
				if published && !bytes.Equal(mustRead(t, c, record, 1024), fill(1024, 7)) {
					torn++
				}
			}
		})
		mustWrite(t, d, record, fill(1024, 7))
		if barrier {
			mustFlush(t, d)
		}
		mustWrite(t, d, flag, fill(512, 1))
		mustFlush(t, d)
		return states, torn
	}
	if states, torn := publish(true); states != 8 || torn != 0 {
		t.Errorf("with the barrier: %d states, %d torn; want 8, 0", states, torn)
	}
	if states, torn := publish(false); states != 13 || torn != 3 {
		t.Errorf("without the barrier: %d states, %d torn; want 13, 3", states, torn)
	}
}

// letters renders the first byte of each of the first n sectors.
func letters(t *testing.T, d *Sim, n int) string {
	t.Helper()
	b := make([]byte, n)
	for i := range b {
		s := mustRead(t, d, int64(i)*512, 512)
		if !bytes.Equal(s, fill(512, s[0])) {
			t.Fatalf("sector %d is torn", i)
		}
		if b[i] = s[0]; b[i] == 0 {
			b[i] = '.'
		}
	}
	return string(b)
}

func put(t *testing.T, d *Sim, sector int64, text string) {
	t.Helper()
	for i := range text {
		mustWrite(t, d, (sector+int64(i))*512, fill(512, text[i]))
	}
}

func collect(t *testing.T, n int, states iter.Seq[*Sim]) []string {
	t.Helper()
	var all []string
	for c := range states {
		if c.PendingSectors() != 0 {
			t.Fatal("something is pending after a crash")
		}
		all = append(all, letters(t, c, n))
	}
	return all
}

func TestCrashes(t *testing.T) {
	d := NewSim("sim", 1<<20)
	put(t, d, 0, "ab")
	mustFlush(t, d)
	put(t, d, 0, "A")
	put(t, d, 0, "Z")
	put(t, d, 2, "c")
	if err := d.Discard(512, 512); err != nil {
		t.Fatal(err)
	}
	if n := d.PendingSectors(); n != 3 {
		t.Errorf("%d sectors pending, want 3", n)
	}
	states := d.Crashes()
	got := collect(t, 3, states)
	want := []string{
		"ab.", "Ab.", "Zb.", "a..", "A..", "Z..", "abc", "Abc", "Zbc", "a.c", "A.c", "Z.c",
	}
	if !slices.Equal(got, want) {
		t.Errorf("states %q, want %q", got, want)
	}
	// What happens to the device afterwards does not change what could be left.
	put(t, d, 0, "xyz")
	mustFlush(t, d)
	if again := collect(t, 3, states); !slices.Equal(again, got) {
		t.Errorf("second iteration: %q", again)
	}
	if got := collect(t, 3, d.Crashes()); !slices.Equal(got, []string{"xyz"}) {
		t.Errorf("after a flush: %q", got)
	}
	for range d.Crashes() { // must stand being left
		break
	}
}

// TestCut: the choices of a cut are the states that Crashes yields, by name.
func TestCut(t *testing.T) {
	d := NewSim("sim", 1<<20)
	put(t, d, 0, "ab")
	mustFlush(t, d)
	put(t, d, 2, "c")
	put(t, d, 0, "A")
	put(t, d, 0, "Z")
	c := d.Cut()
	put(t, d, 1, "B") // it is of an earlier instant
	if got := c.Sectors(); !slices.Equal(got, []int64{0, 2}) {
		t.Errorf("sectors %v", got)
	}
	if c.Versions(0) != 2 || c.Versions(1) != 1 {
		t.Errorf("versions %d, %d", c.Versions(0), c.Versions(1))
	}
	var order []int
	for i, v := range c.Order() {
		order = append(order, i, v)
	}
	if !slices.Equal(order, []int{1, 1, 0, 1, 0, 2}) {
		t.Errorf("order %v", order)
	}
	for choice, want := range map[string]string{"\x00\x00": "ab.", "\x01\x00": "Ab.", "\x02\x01": "Zbc", "\x00\x01": "abc"} {
		if got := letters(t, c.State([]byte(choice)), 3); got != want {
			t.Errorf("choice %q leaves %q, want %q", choice, got, want)
		}
	}
}

func TestCrashStates(t *testing.T) {
	rng := func() *rand.Rand { return rand.New(rand.NewPCG(1, 1)) }
	d := NewSim("sim", 1<<20)
	put(t, d, 0, "abcdefghijkl")
	exact := collect(t, 12, d.CrashStates(rng(), 5000))
	if set := unique(exact); len(exact) != 4096 || len(set) != 4096 {
		t.Errorf("12 sectors: %d states, %d different; want 4096", len(exact), len(set))
	}

	put(t, d, 12, "mnopqrst") // 20 pending, written in ascending order
	const all = "abcdefghijklmnopqrst"
	must := map[string]bool{all: true, strings.Repeat(".", 20): true}
	for i := range all {
		must[all[:i]+"."+all[i+1:]] = true
		must[strings.Repeat(".", i)+all[i:i+1]+strings.Repeat(".", 19-i)] = true
		must[all[:i]+strings.Repeat(".", 20-i)] = true
	}
	got := collect(t, 20, d.CrashStates(rng(), 200))
	if len(got) != 200 {
		t.Errorf("%d states, want 200", len(got))
	}
	set := unique(got)
	for m := range must {
		if !set[m] {
			t.Errorf("state %q is missing", m)
		}
	}
	if len(set) < 170 {
		t.Errorf("only %d of 200 states differ", len(set))
	}
	if !slices.Equal(got, collect(t, 20, d.CrashStates(rng(), 200))) {
		t.Error("the same seed gives other states")
	}
	for _, limit := range []int{-1, 0, 1, 2, 3, 10, 40} {
		got := collect(t, 20, d.CrashStates(rng(), limit))
		if len(got) != max(limit, 0) {
			t.Errorf("limit %d gives %d states", limit, len(got))
		}
		if limit >= 2 && (got[0] != strings.Repeat(".", 20) || got[1] != all) {
			t.Errorf("limit %d begins with %q", limit, got[:2])
		}
	}
	for range d.CrashStates(rng(), 100) {
		break
	}
}

// TestCrashStatesAreCrashes: whatever CrashStates yields, Crashes does too.
func TestCrashStatesAreCrashes(t *testing.T) {
	rng := rand.New(rand.NewPCG(5, 6))
	for round := range 20 {
		d := NewSim("sim", 1<<20)
		put(t, d, 0, "abcdef")
		mustFlush(t, d)
		for i := range 9 {
			s := rng.Int64N(6)
			if rng.IntN(5) == 0 {
				if err := d.Discard(s*512, 512); err != nil {
					t.Fatal(err)
				}
			} else {
				put(t, d, s, string(rune('A'+i)))
			}
		}
		possible := unique(collect(t, 6, d.Crashes()))
		for _, s := range collect(t, 6, d.CrashStates(rng, 40)) {
			if !possible[s] {
				t.Errorf("round %d: state %q cannot be", round, s)
			}
		}
	}
}

func unique(s []string) map[string]bool {
	set := make(map[string]bool)
	for _, x := range s {
		set[x] = true
	}
	return set
}

func TestCrashClone(t *testing.T) {
	d := NewSim("sim", 1<<20)
	put(t, d, 0, "abcd")
	mustFlush(t, d)
	put(t, d, 0, "ABCD")
	put(t, d, 1, "Z")
	even := func(s int64) bool { return s%2 == 0 }
	if got := letters(t, d.CrashClone(even), 4); got != "AbCd" {
		t.Errorf("even sectors kept: %q", got)
	}
	if got := letters(t, d.CrashClone(nil), 4); got != "abcd" {
		t.Errorf("nothing kept: %q", got)
	}
	if got := letters(t, d, 4); got != "AZCD" {
		t.Errorf("the device itself: %q", got)
	}
}

func TestClone(t *testing.T) {
	d := NewSim("sim", 1<<20)
	put(t, d, 0, "ab")
	mustFlush(t, d)
	put(t, d, 1, "B")
	d.Fail(Fault{Kind: ReadError, Match: func(off int64, _, _ int) bool { return off == 99*512 }})
	c := d.Clone()
	put(t, d, 2, "d")
	put(t, c, 2, "c")
	put(t, c, 3, "c")
	put(t, d, 0, "d")
	for _, x := range []struct {
		d    *Sim
		now  string
		old  string
		pend int
	}{{d, "dBd.", "ab..", 3}, {c, "aBcc", "ab..", 3}} {
		if got := letters(t, x.d, 4); got != x.now {
			t.Errorf("reads %q, want %q", got, x.now)
		}
		if got := letters(t, x.d.CrashClone(nil), 4); got != x.old {
			t.Errorf("durable %q, want %q", got, x.old)
		}
		if n := x.d.PendingSectors(); n != x.pend {
			t.Errorf("%d pending, want %d", n, x.pend)
		}
		states := collect(t, 4, x.d.Crashes())
		if len(states) != 8 || states[7] != x.now {
			t.Errorf("crash states %q", states)
		}
	}
	mustRead(t, c, 99*512, 1) // faults stay behind
}

// TestSimModel runs random operations on a family of clones against a plain
// model of each, which also says what a crash may leave of every sector.
func TestSimModel(t *testing.T) {
	const size, sectors = 64 << 20, 400 // spread over all leaves
	rng := rand.New(rand.NewPCG(3, 4))
	type member struct {
		d       *Sim
		now     map[int64]byte
		durable map[int64]byte
		pending map[int64][]byte
	}
	family := []*member{{NewSim("sim", size), map[int64]byte{}, map[int64]byte{}, map[int64][]byte{}}}
	for step := range 3000 {
		m := family[rng.IntN(len(family))]
		s := rng.Int64N(sectors) * 1021 % (size / 512)
		switch rng.IntN(12) {
		case 0:
			mustFlush(t, m.d)
			m.durable, m.pending = maps.Clone(m.now), map[int64][]byte{}
		case 1:
			if len(family) < 12 {
				p := make(map[int64][]byte)
				for s, v := range m.pending {
					p[s] = slices.Clone(v)
				}
				family = append(family, &member{m.d.Clone(), maps.Clone(m.now), maps.Clone(m.durable), p})
			}
		case 2:
			off := s / 16 * 16
			if err := m.d.Discard(off*512, 16*512); err != nil {
				t.Fatal(err)
			}
			for i := off; i < off+16; i++ {
				m.now[i] = 0
				m.pending[i] = append(m.pending[i], 0)
			}
		default:
			n := 1 + rng.Int64N(20)
			n = min(n, size/512-s)
			v := byte(step)
			mustWrite(t, m.d, s*512, fill(int(n)*512, v))
			for i := s; i < s+n; i++ {
				m.now[i] = v
				m.pending[i] = append(m.pending[i], v)
			}
		}
		if step%50 != 0 {
			continue
		}
		if got := m.d.PendingSectors(); got != len(m.pending) {
			t.Fatalf("step %d: %d pending, want %d", step, got, len(m.pending))
		}
		for s, v := range m.now {
			if got := mustRead(t, m.d, s*512, 512); !bytes.Equal(got, fill(512, v)) {
				t.Fatalf("step %d: sector %d is %d, want %d", step, s, got[0], v)
			}
		}
		for c := range m.d.CrashStates(rng, 8) {
			for s := range m.now {
				got := mustRead(t, c, s*512, 512)
				if !bytes.Equal(got, fill(512, got[0])) || got[0] != m.durable[s] && !bytes.Contains(m.pending[s], got[:1]) {
					t.Fatalf("step %d: after a crash sector %d is %d", step, s, got[0])
				}
			}
		}
	}
}

func TestSimFaults(t *testing.T) {
	const abcd = "abcd"
	for _, c := range []struct {
		fault Fault
		code  sealfs.Code // 0: silent
		n     int         // bytes written
		after string      // what the device then reads
		latch bool
	}{
		{Fault{Kind: WriteError}, sealfs.ErrIO, 0, "......", true},
		{Fault{Kind: NoSpace}, sealfs.ErrNoSpace, 0, "......", true},
		{Fault{Kind: TornWrite}, sealfs.ErrIO, 1024, "xx....", true},
		{Fault{Kind: LostWrite}, 0, 2048, "......", false},
		{Fault{Kind: Misdirect, Shift: 1024}, 0, 2048, "..xxxx", false},
	} {
		t.Run(c.fault.Kind.String(), func(t *testing.T) {
			d := NewSim("sim", 1<<20)
			d.Fail(c.fault)
			n, err := d.WriteAt(fill(2048, 'x'), 0)
			if n != c.n || c.code != 0 && !errors.Is(err, c.code) || c.code == 0 && err != nil {
				t.Errorf("write: %d, %v", n, err)
			}
			if got := letters(t, d, 6); got != c.after {
				t.Errorf("device reads %q, want %q", got, c.after)
			}
			d.ClearFaults()
			err = d.Flush()
			if c.latch {
				wantError(t, "flush of the latched device", err, c.code)
				_, err = d.WriteAt(fill(512, 1), 0)
				wantError(t, "write to the latched device", err, c.code)
				wantError(t, "discard on the latched device", d.Discard(0, 512), c.code)
				wantError(t, "flush of a clone", d.Clone().Flush(), c.code)
				d = d.Reopen()
				err = d.Flush()
			}
			if err != nil {
				t.Error(err)
			}
			if got := letters(t, d.CrashClone(nil), 6); got != c.after {
				t.Errorf("durable %q, want %q", got, c.after)
			}
		})
	}

	t.Run("bit flip", func(t *testing.T) {
		d := NewSim("sim", 1<<20)
		d.Fail(Fault{Kind: BitFlip, Bit: 512*8 + 3})
		p := fill(1024, 0)
		mustWrite(t, d, 0, p)
		if !bytes.Equal(p, make([]byte, 1024)) {
			t.Error("the caller's buffer was changed")
		}
		want := make([]byte, 1024)
		want[512] = 8
		if !bytes.Equal(mustRead(t, d, 0, 1024), want) {
			t.Error("the bit is not the one asked for")
		}
	})

	t.Run("read error", func(t *testing.T) {
		d := NewSim("sim", 1<<20)
		put(t, d, 0, abcd)
		d.Fail(Fault{Kind: ReadError, Match: func(off int64, n, _ int) bool { return off <= 512 && off+int64(n) > 512 }})
		_, err := d.ReadAt(make([]byte, 2048), 0)
		wantError(t, "read", err, sealfs.ErrIO)
		mustRead(t, d, 1024, 512)
		put(t, d, 1, "x") // reads do not latch
		mustFlush(t, d)
	})

	t.Run("flush error", func(t *testing.T) {
		d := NewSim("sim", 1<<20)
		d.Fail(Fault{Kind: FlushError, Once: true})
		put(t, d, 0, "ab")
		wantError(t, "flush", d.Flush(), sealfs.ErrIO)
		wantError(t, "second flush", d.Flush(), sealfs.ErrIO)
		if got := collect(t, 2, d.Crashes()); !slices.Equal(got, []string{"..", "a.", ".b", "ab"}) {
			t.Errorf("after a failed flush: %q", got)
		}
		if s := d.Stats(); s.Flushes != 0 || s.Writes != 2 {
			t.Errorf("stats %+v", s)
		}
	})

	t.Run("nth and once", func(t *testing.T) {
		d := NewSim("sim", 1<<20)
		mustWrite(t, d, 0, fill(512, 1))
		d.Fail(Fault{Kind: LostWrite, Match: func(_ int64, _, nth int) bool { return nth == 1 }})
		d.Fail(Fault{Kind: LostWrite, Match: func(_ int64, _, nth int) bool { return nth >= 3 }, Once: true})
		put(t, d, 0, "abcdefg")
		if got := letters(t, d, 7); got != "a.c.efg" {
			t.Errorf("device reads %q", got)
		}
	})
}

// TestFaultEverywhere shows the loop of an error test: fail write 0, 1, 2, …
// until the job runs through.
func TestFaultEverywhere(t *testing.T) {
	for i := 0; ; i++ {
		d := NewSim("sim", 1<<20)
		d.Fail(Fault{Kind: WriteError, Match: func(_ int64, _, nth int) bool { return nth == i }})
		var err error
		for s := range int64(3) {
			if _, err = d.WriteAt(fill(512, 'x'), s*512); err != nil {
				break
			}
		}
		if got, want := letters(t, d, 3), strings.Repeat("x", min(i, 3))+strings.Repeat(".", 3-min(i, 3)); got != want {
			t.Errorf("failure at %d leaves %q, want %q", i, got, want)
		}
		if err == nil {
			if i != 3 {
				t.Errorf("ran through at %d", i)
			}
			return
		}
	}
}

func TestDamage(t *testing.T) {
	d := NewSim("sim", 1<<20)
	put(t, d, 0, "abcd")
	mustFlush(t, d)
	put(t, d, 1, "BC")
	put(t, d, 1, "X")
	before := d.Clone()
	d.Overwrite(512+10, fill(1024, '!')) // most of sectors 1 and 2, a bit of 3
	d.Zero(0, 3)
	d.FlipBit(3*512+511, 5)
	states := 0
	for c := range d.Crashes() {
		states++
		got := mustRead(t, c, 0, 2048)
		if !bytes.Equal(got[522:522+1024], fill(1024, '!')) || !bytes.Equal(got[:4], []byte{0, 0, 0, 'a'}) || got[2047] != 'd'^32 {
			t.Errorf("state %d is not damaged", states)
		}
		if v := got[512]; v != 'b' && v != 'B' && v != 'X' {
			t.Errorf("state %d has %q before the damage", states, v)
		}
	}
	if states != 6 {
		t.Errorf("%d states, want 6", states)
	}
	if !bytes.Equal(mustRead(t, d, 522, 1024), fill(1024, '!')) {
		t.Error("reads do not show the damage")
	}
	if got := letters(t, before, 4); got != "aXCd" {
		t.Errorf("the clone was damaged too: %q", got)
	}
	for c := range before.Crashes() {
		letters(t, c, 4)
	}
	d.Zero(0, 0)
	defer func() {
		if recover() == nil {
			t.Error("damage outside the device was accepted")
		}
	}()
	d.FlipBit(1<<20, 0)
}

func TestHook(t *testing.T) {
	d := NewSim("sim", 1<<20)
	var seen []string
	d.SetHook(func(op Op) {
		d.Clone() // must not deadlock
		seen = append(seen, fmt.Sprint(op, " ", op.Err != nil))
	})
	d.Fail(Fault{Kind: WriteError, Match: func(_ int64, _, nth int) bool { return nth == 1 }})
	mustWrite(t, d, 512, fill(1024, 1))
	mustRead(t, d, 0, 1)
	mustFlush(t, d)
	if err := d.Discard(0, 512); err != nil {
		t.Fatal(err)
	}
	for range 2 { // the second is refused and does not reach the device
		if _, err := d.WriteAt(fill(512, 1), 0); err == nil {
			t.Error("write succeeded")
		}
	}
	want := []string{
		"op 0: write of [512, +1024) false", "op 1: flush false",
		"op 2: discard of [0, +512) false", "op 3: write of [0, +512) true",
	}
	if !slices.Equal(seen, want) {
		t.Errorf("hook saw %q, want %q", seen, want)
	}
	d.SetHook(nil)
}

// TestSimConcurrent is for the race detector: every method at once.
func TestSimConcurrent(t *testing.T) {
	d := NewSim("sim", 1<<20)
	d.SetHook(func(op Op) {
		if op.Kind == OpFlush {
			for c := range d.CrashStates(rand.New(rand.NewPCG(1, uint64(op.N))), 5) {
				mustWrite(t, c, 0, fill(512, 1))
			}
		}
	})
	var wg sync.WaitGroup
	for w := range 4 {
		wg.Go(func() {
			for i := range int64(50) {
				off := (int64(w)*50 + i) * 1024
				if _, err := d.WriteAt(fill(1024, byte(w)), off); err != nil {
					t.Error(err)
				}
				if _, err := d.ReadAt(make([]byte, 4096), off/2); err != nil {
					t.Error(err)
				}
				switch i % 5 {
				case 0:
					if err := d.Flush(); err != nil {
						t.Error(err)
					}
				case 1:
					c := d.Clone()
					if _, err := c.WriteAt(fill(512, 9), off); err != nil {
						t.Error(err)
					}
				case 2:
					d.FlipBit(off, 1)
				case 3:
					d.Fail(Fault{Kind: ReadError, Match: func(off int64, _, _ int) bool { return off < 0 }})
					d.PendingSectors()
				}
			}
		})
	}
	wg.Wait()
}

// BenchmarkCrashState is the price of one state of a device with 64 MiB of data
// and 64 pending sectors, including a small read and write as recovery does.
func BenchmarkCrashState(b *testing.B) {
	d := NewSim("sim", 1<<30)
	for off := int64(0); off < 64<<20; off += 1 << 20 {
		mustWrite(b, d, off, fill(1<<20, 1))
	}
	mustFlush(b, d)
	for i := range int64(64) {
		mustWrite(b, d, i*512, fill(512, 2))
	}
	rng := rand.New(rand.NewPCG(1, 1))
	buf := make([]byte, 4096)
	b.ReportAllocs()
	n := 0
	for b.Loop() {
		for c := range d.CrashStates(rng, 1000) {
			if _, err := c.ReadAt(buf, 8192); err != nil {
				b.Fatal(err)
			}
			if _, err := c.WriteAt(buf, 32<<20); err != nil {
				b.Fatal(err)
			}
			n++
		}
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(n), "ns/state")
}
