package server

import (
	"fmt"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// envInt returns a number from the environment.
func envInt(name string, def int) int {
	if v, err := strconv.Atoi(os.Getenv(name)); err == nil {
		return v
	}
	return def
}

// BenchmarkCleanAmplification fills a store with 64 KiB files up to a part of
// its raw device and overwrites, or deletes and makes, files at random, until the device
// was written several times over. Then it reports what the next bytes cost, per
// byte of the user: on the device for the log and for cleaning, and on the region's medium.
// SEALFS_CLEAN_MB is the device's size (default 2048).
func BenchmarkCleanAmplification(b *testing.B) {
	size := int64(envInt("SEALFS_CLEAN_MB", 2048)) << 20
	for _, name := range []string{"uniform", "zipf", "churn"} {
		for _, u := range []int{60, 80} {
			b.Run(fmt.Sprintf("%s/u=%d", name, u), func(b *testing.B) { benchAmplification(b, size, name, float64(u)/100) })
		}
		b.Run(name+"/full=90", func(b *testing.B) { benchAmplification(b, size, name, 0) })
	}
}

func benchAmplification(b *testing.B, size int64, name string, u float64) {
	r := newRig(b, size, size/512)
	st := r.stores[0].Stats()
	if u == 0 { // 90 % of what df shows
		u = 0.9 * float64(st.Usable) / float64(size)
	}
	r.fill(b, u, 64<<10)
	w := r.load(name)
	r.measure(b, w, uint64(size)*3/2)
	var a amplification
	for range b.N {
		began := time.Now()
		a = r.measure(b, w, uint64(size))
		b.ReportMetric(float64(a.user)/1e6/time.Since(began).Seconds(), "user-MB/s")
	}
	user := float64(a.user)
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(a.total(), "WA")
	b.ReportMetric(float64(a.log)/user, "WA-log")
	b.ReportMetric(float64(a.cleaning)/user, "WA-clean")
	b.ReportMetric(float64(a.region)/user, "WA-region")
	b.ReportMetric(a.space(), "SA")
	b.ReportMetric(float64(a.st.Free), "free-segs")
	b.ReportMetric(float64(a.st.SpaceWaits), "space-waits")
	b.ReportMetric(float64(a.st.Checkpoints), "checkpoints")
	b.ReportMetric(100*u, "raw-%")
}

// A slice is what one interval of a paced load measured, in microseconds.
type slice struct{ write, read, meta, all []float64 }

func (s *slice) add(o *slice) {
	s.write, s.read, s.meta, s.all = append(s.write, o.write...), append(s.read, o.read...), append(s.meta, o.meta...), append(s.all, o.all...)
}

// mixed runs the mix of foreground operations on lanes for a while: half
// overwrites, a quarter reads, the rest is deleted, made and written. With a
// rate (operations a second, of all lanes) each lane keeps a timetable: what was
// late because the store was slow counts from when it should have begun.
func (r *rig) mixed(b *testing.B, w *mix, lanes int, rate float64, d time.Duration) (sum slice, ops int) {
	var wg sync.WaitGroup
	out := make([]slice, lanes)
	begin := time.Now()
	for i := range lanes {
		wg.Add(1)
		go func() {
			defer wg.Done()
			out[i] = w.run(r, i, lanes, rate, begin, d)
		}()
	}
	wg.Wait()
	for i := range out {
		sum.add(&out[i])
	}
	return sum, len(sum.all)
}

// mix is a mixed load and its clients.
type mix struct {
	lanes []*lane
	draw  func(l *lane) int
}

func (r *rig) mix(b *testing.B, name string, lanes int) *mix {
	m := &mix{}
	n := len(r.files)
	m.draw = func(l *lane) int { return l.rng.IntN(n) }
	if name == "zipf" {
		z := newZipf(n, 0.99)
		m.draw = func(l *lane) int { return z.draw(l.rng) }
	}
	for i := range lanes {
		m.lanes = append(m.lanes, r.lane(b, uint64(100+i)))
	}
	return m
}

func (m *mix) run(r *rig, lane, lanes int, rate float64, begin time.Time, d time.Duration) slice {
	l := m.lanes[lane]
	var s slice
	due, step := begin, time.Duration(0)
	if rate > 0 {
		step = time.Duration(float64(time.Second) * float64(lanes) / rate)
		due = due.Add(step * time.Duration(lane) / time.Duration(lanes))
	}
	var woke time.Time
	measured := func(list *[]float64, fn func()) {
		from := time.Now()
		if rate > 0 {
			if wait := due.Sub(from); wait > 0 {
				nap(wait)
				woke = time.Now()
			}
			// That the lane overslept is not the store's fault.
			if from = due; from.Before(woke) {
				from = woke
			}
			due = due.Add(step)
		}
		fn()
		us := float64(time.Since(from).Nanoseconds()) / 1e3
		*list, s.all = append(*list, us), append(s.all, us)
	}
	for time.Since(begin) < d && !l.t.Failed() {
		i := m.draw(l)
		i = min(i-i%lanes+lane, len(r.files)-1)
		if i%lanes != lane {
			continue
		}
		switch k := l.rng.IntN(8); {
		case k < 4:
			measured(&s.write, func() { l.overwriteMust(i) })
		case k < 6:
			measured(&s.read, func() { l.read(i) })
		case k < 7:
			measured(&s.meta, func() { l.remove(i) })
			measured(&s.meta, func() { l.create(i) })
			measured(&s.write, func() { l.overwriteMust(i) })
		default:
			measured(&s.meta, func() { l.must(getattr(r.files[i].ino)) })
		}
	}
	return s
}

// BenchmarkCleanLatency runs the same mixed load, at a quarter of the highest
// rate of an idle store (20 % full), on that store and on one that is nearly full,
// by turns in one process, and reports medians over the turns. The device writes
// SEALFS_CLEAN_DEVICE_MBS megabytes a second (default 800) and reads twice as fast.
func BenchmarkCleanLatency(b *testing.B) {
	size := int64(envInt("SEALFS_CLEAN_MB", 2048)) << 20
	for _, name := range []string{"uniform", "zipf"} {
		b.Run(name, func(b *testing.B) { benchLatency(b, size, name) })
	}
}

func benchLatency(b *testing.B, size int64, name string) {
	// A processor whose goroutine waits for a device serves nobody for a while, and
	// few of them stand all still: a matter of the runtime, not of the store.
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(max(8, runtime.NumCPU())))
	lanes := 2
	turn := time.Duration(envInt("SEALFS_CLEAN_TURN_MS", 2000)) * time.Millisecond
	turns := envInt("SEALFS_CLEAN_TURNS", 9)
	idle, busy := newRig(b, size, size/512), newRig(b, size, size/512)
	u := 0.9 * float64(busy.stores[0].Stats().Usable) / float64(size)
	idle.fill(b, 0.2, 64<<10)
	busy.fill(b, u, 64<<10)
	busy.measure(b, busy.load(name), uint64(size))
	for _, r := range []*rig{idle, busy} {
		r.dev.write.bytesPerSecond = int64(envInt("SEALFS_CLEAN_DEVICE_MBS", 800)) * 1e6
		r.dev.read.bytesPerSecond = 2 * r.dev.write.bytesPerSecond
	}
	mi, mb := idle.mix(b, name, lanes), busy.mix(b, name, lanes)
	for range b.N {
		_, n := idle.mixed(b, mi, lanes, 0, 2*turn)
		rate := float64(n) / (2 * turn.Seconds()) / 4
		b.ReportMetric(4*rate, "idle-max-ops/s")
		var ratios [4][]float64
		var p99 [2][]float64
		var p50 [2][]float64
		before := busy.stores[0].Stats()
		for range turns {
			runtime.GC()
			x, _ := idle.mixed(b, mi, lanes, rate, turn)
			y, done := busy.mixed(b, mb, lanes, rate, turn)
			for k, pair := range [][2][]float64{{x.all, y.all}, {x.write, y.write}, {x.read, y.read}, {x.meta, y.meta}} {
				ratios[k] = append(ratios[k], quantile(pair[1], 0.99)/quantile(pair[0], 0.99))
			}
			p99[0], p99[1] = append(p99[0], quantile(x.all, 0.99)), append(p99[1], quantile(y.all, 0.99))
			p50[0], p50[1] = append(p50[0], quantile(x.all, 0.5)), append(p50[1], quantile(y.all, 0.5))
			if os.Getenv("SEALFS_CLEAN_VERBOSE") != "" {
				st := busy.stores[0].Stats()
				b.Logf("done %.0f%% p50 %.0f/%.0f p90 %.0f/%.0f p99 %.0f/%.0f p99.9 %.0f/%.0f max %.0f/%.0f  write p99 %.0f/%.0f free %d waits %d brakes %d cleaned %d", 100*float64(done)/turn.Seconds()/rate,
					quantile(x.all, .5), quantile(y.all, .5), quantile(x.all, .9), quantile(y.all, .9), quantile(x.all, .99), quantile(y.all, .99),
					quantile(x.all, .999), quantile(y.all, .999), slices.Max(x.all), slices.Max(y.all), quantile(x.write, .99), quantile(y.write, .99),
					st.Free, st.SpaceWaits-before.SpaceWaits, st.SpaceBrakes-before.SpaceBrakes, st.Cleaned-before.Cleaned)
			}
		}
		for k, kind := range strings.Fields("all write read meta") {
			b.ReportMetric(quantile(ratios[k], 0.5), "p99-ratio-"+kind)
		}
		b.ReportMetric(quantile(p99[0], 0.5), "p99-idle-us")
		b.ReportMetric(quantile(p99[1], 0.5), "p99-busy-us")
		b.ReportMetric(quantile(p50[0], 0.5), "p50-idle-us")
		b.ReportMetric(quantile(p50[1], 0.5), "p50-busy-us")
		b.ReportMetric(0, "ns/op")
	}
}
