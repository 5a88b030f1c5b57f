package server

import (
	"flag"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"sealfs/internal/turn"
	"sealfs/lsfs"
	"sealfs/meta"
	"sealfs/pmem"
)

var (
	soak     = flag.Duration("soak", 2*time.Second, "how long TestSoakClean works on a nearly full store")
	soakSeed = flag.Uint64("soak-seed", 0, "what TestSoakClean draws from; 0: another one each time")
	cleanMB  = flag.Int64("clean-mb", 320, "size of TestCleanAmplification's device in MiB")
)

// TestCleanAmplification holds the store to what overwriting 64 KiB files costs,
// by how much of the raw device they fill: bytes written to the device and to the
// region's medium, over those of the user. On few segments, which serve for
// a short test, what is kept free or is open weighs more than on a disk; the
// bounds of -clean-mb 2048 are those of a disk (`make soak-clean`).
func TestCleanAmplification(t *testing.T) {
	if testing.Short() {
		t.Skip("writes gigabytes")
	}
	for _, c := range []struct {
		load string
		u    float64
		most float64 // on few segments; 0: not worth the time
		disk float64
	}{
		{"uniform", 0.6, 2.1, 2.2}, {"uniform", 0.8, 4.3, 3.5}, {"zipf", 0.8, 0, 2.9},
	} {
		size := *cleanMB << 20
		if c.most == 0 && size < 1<<30 {
			continue
		}
		segment := int64(2 << 20)
		if size >= 1<<30 {
			segment, c.most = size/512, c.disk
		}
		r := newRig(t, size, segment)
		r.fill(t, c.u, 64<<10)
		w := r.load(c.load)
		r.measure(t, w, uint64(size)*3/2)
		a := r.measure(t, w, uint64(size))
		user := float64(a.user)
		t.Logf("%-8s %.0f%% full: %.2f bytes are written for each: log %.2f, cleaning %.2f, region %.2f; live log and metadata %.3f",
			c.load, 100*c.u, a.total(), float64(a.log)/user, float64(a.cleaning)/user, float64(a.region)/user, a.space())
		if a.total() > c.most {
			t.Errorf("%s, %.0f%% full: %.2f bytes are written for each of the user, want at most %.2f", c.load, 100*c.u, a.total(), c.most)
		}
		if a.space() > 1.15 {
			t.Errorf("%s, %.0f%% full: live log and metadata are %.3f of the user's bytes, want at most 1.15", c.load, 100*c.u, a.space())
		}
	}
}

// TestSoakClean works for -soak on a store that is 90 % full by df: several
// clients overwrite, delete, make and read files, uniformly or with a hot
// part, and verify what they read; now and then the store is killed and recovered
// from its ring, and everything is read. `make soak-clean` lets it work for long.
func TestSoakClean(t *testing.T) {
	size, lanes := int64(128<<20), 3
	if testing.Short() {
		size /= 2
	}
	seed := *soakSeed
	if seed == 0 {
		seed = rand.Uint64()
	}
	t.Logf("seed %d (-soak-seed)", seed)
	r := newRig(t, size, 256<<10)
	r.fill(t, 0.9*float64(r.stores[0].Stats().Usable)/float64(size), 16<<10)
	var cleaned, brakes uint64
	kills := 0
	// On a slow machine it takes longer to come to the point.
	for end := time.Now().Add(*soak); (time.Now().Before(end) || cleaned < 50 && kills < 100) && !t.Failed(); kills++ {
		until := time.Now().Add(time.Duration(200+seed%1000+uint64(kills)%7*300) * time.Millisecond)
		var wg sync.WaitGroup
		for i := range lanes {
			l := r.lane(t, seed+uint64(kills*lanes+i))
			wg.Add(1)
			go func() {
				defer wg.Done()
				l.soak(i, lanes, until)
			}()
		}
		wg.Wait()
		st := r.stores[0].Stats()
		cleaned, brakes = cleaned+st.Cleaned, brakes+st.SpaceBrakes
		if want := int64(len(r.files)) * int64(r.size); st.Live != want {
			t.Errorf("%d bytes live, the files have %d", st.Live, want)
		}
		r.kill(t)
		l := r.lane(t, 0)
		for i := range r.files {
			l.read(i)
		}
		r.check(t)
	}
	t.Logf("%d kills, %d segments cleaned, %d changes slowed down", kills, cleaned, brakes)
	if cleaned < 50 {
		t.Errorf("%d segments were cleaned: the test did not reach its point", cleaned)
	}
}

// soak works on the lane's files until the time has come.
func (l *lane) soak(lane, lanes int, until time.Time) {
	n := len(l.r.files) / lanes
	hot := l.rng.IntN(2) == 0
	for time.Now().Before(until) && !l.t.Failed() {
		i := l.rng.IntN(n)
		if hot && l.rng.IntN(10) > 0 {
			i = l.rng.IntN(max(n/10, 1))
		}
		i = i*lanes + lane
		switch l.rng.IntN(10) {
		case 0:
			l.remove(i)
			l.create(i)
			l.overwriteMust(i)
		case 1, 2:
			l.read(i)
		default:
			l.overwriteMust(i)
		}
	}
}

// kill ends the store as SIGKILL would and opens it again.
func (r *rig) kill(t *testing.T) {
	t.Helper()
	st := r.stores[0]
	st.srv.teller.stop(turn.Turns{})
	st.parties.stop()
	st.reclaim.stop()
	kept, err := st.Abandon()
	if err != nil {
		t.Fatal(err)
	}
	r.start(t, kept)
}

// check verifies the namespace and the tree under it.
func (r *rig) check(t *testing.T) {
	t.Helper()
	v := r.stores[0].BeginRead()
	defer r.stores[0].EndRead()
	if err := meta.Check(v, r.cfg, func(p string) { t.Error(p) }); err != nil {
		t.Error(err)
	}
	if err := v.(*pmem.Region).Check(func(p string) { t.Error(p) }); err != nil {
		t.Error(err)
	}
}

// start opens the store.
func (r *rig) start(t testing.TB, kept *pmem.Staging) {
	t.Helper()
	r.Server = &Server{o: Options{Shards: rigShards}, cfg: meta.Config{Shards: rigShards}, log: testLog(t), pace: usualPace}
	o := lsfs.Options{StagingBytes: 4 * r.segment, CheckpointBytes: 4 * r.segment, Logger: testLog(t)}
	st, err := r.attach(r.dev, pmem.NewMemory(r.region), kept, StoreOptions{Device: "device", Region: "region", Log: o})
	if err != nil {
		t.Fatal(err)
	}
	r.stores = []*store{st}
	st.run()
}
