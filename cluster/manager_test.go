package cluster

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"sealfs"
)

// TestMain lets the test binary be the manager that TestKill kills.
func TestMain(m *testing.M) {
	if dir := os.Getenv("SEALFS_TEST_MANAGER"); dir != "" {
		if err := child(dir); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func testOptions(dir string) Options {
	return Options{Dir: dir, Cluster: testID(1), Name: "lab", Shards: 64}
}

func open(t *testing.T, o Options) *Manager {
	t.Helper()
	m, err := Open(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := m.Close(); err != nil {
			t.Error(err)
		}
	})
	return m
}

func store(n byte) StoreInfo { return StoreInfo{ID: testID(n), Host: fmt.Sprint("h", n), Weight: 10} }

func TestOpenTwice(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "manager")
	began := time.Now()
	m := open(t, testOptions(dir))
	t.Logf("made in %s", time.Since(began))
	mp := m.Map()
	if mp.Cluster != testID(1) || mp.Name != "lab" || mp.Shards != 64 || mp.Replicas != 1 || mp.Version != 1 {
		t.Errorf("new map: %+v", mp)
	}
	if err := m.AddStore(t.Context(), store(2)); err != nil {
		t.Fatal(err)
	}
	v, err := m.CreateVolume(t.Context(), VolumeSpec{Name: "home", Bytes: 1 << 30, Mode: 0o755, UID: 5})
	if err != nil {
		t.Fatal(err)
	}
	if v, err = m.VolumeReady(t.Context(), v.ID, 64); err != nil {
		t.Fatal(err)
	}
	if got, ok := m.Map().Volume("home"); !ok || got != v || v.State != VolumeReady || time.Since(v.Created).Abs() > time.Minute {
		t.Errorf("volume: %+v, %v", got, ok)
	}
	want := m.Map().Encode()
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := m.CreateVolume(t.Context(), VolumeSpec{Name: "late"}); !errors.Is(err, sealfs.ErrClosed) {
		t.Errorf("after Close: %v", err)
	}
	if err := m.Beat(testID(2), StoreStats{}); !errors.Is(err, sealfs.ErrClosed) {
		t.Errorf("after Close: %v", err)
	}

	began = time.Now()
	again := open(t, Options{Dir: dir})
	t.Logf("opened in %s", time.Since(began))
	if string(again.Map().Encode()) != string(want) {
		t.Errorf("opened again: %+v", again.Map())
	}
	version := again.Map().Version
	if err := again.AddStore(t.Context(), store(2)); err != nil || again.Map().Version != version {
		t.Errorf("a store that is known: %v, version %d", err, again.Map().Version)
	}
}

func TestOpenRefuses(t *testing.T) {
	dir := t.TempDir()
	if _, err := Open(t.Context(), Options{Dir: dir}); !errors.Is(err, sealfs.ErrNotExist) {
		t.Errorf("nothing there: %v", err)
	}
	if left, _ := filepath.Glob(filepath.Join(dir, "*")); len(left) > 0 {
		t.Errorf("a failed Open made %v", left)
	}
	m := open(t, testOptions(dir))
	_, err := Open(t.Context(), testOptions(dir))
	if !errors.Is(err, sealfs.ErrBusy) || !strings.Contains(err.Error(), fmt.Sprint("held by pid ", os.Getpid())) {
		t.Errorf("open twice: %v", err)
	}
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	o := testOptions(dir)
	o.Cluster = testID(7)
	if _, err := Open(t.Context(), o); !errors.Is(err, sealfs.ErrInvalid) || !strings.Contains(err.Error(), testID(7).String()) {
		t.Errorf("another cluster: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := Open(ctx, testOptions(dir)); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	open(t, testOptions(dir)) // all of them left it usable
}

func TestOptionsValidate(t *testing.T) {
	if err := (Options{Dir: "x"}).Validate(); err != nil {
		t.Errorf("defaults: %v", err)
	}
	if err := (Options{Dir: "x", SuspectAfter: time.Minute}).Validate(); err != nil {
		t.Errorf("a long patience: %v", err)
	}
	err := Options{Name: "a b", Shards: 100, Replicas: 99, SuspectAfter: time.Second, DownAfter: time.Millisecond}.Validate()
	if !errors.Is(err, sealfs.ErrInvalid) {
		t.Fatal(err)
	}
	for _, fault := range []string{"directory", `"a b"`, "100 shards", "99 replicas", "down after 1ms"} {
		if !strings.Contains(err.Error(), fault) {
			t.Errorf("%q is not in %q", fault, err)
		}
	}
	if _, err := Open(t.Context(), Options{}); !errors.Is(err, sealfs.ErrInvalid) {
		t.Errorf("Open: %v", err)
	}
}

func TestVolumes(t *testing.T) {
	m := open(t, testOptions(t.TempDir()))
	ctx := t.Context()
	if _, err := m.CreateVolume(ctx, VolumeSpec{Name: "early"}); !errors.Is(err, sealfs.ErrUnavailable) {
		t.Errorf("without a store: %v", err)
	}
	if err := m.AddStore(ctx, StoreInfo{ID: testID(2), Bytes: 10 << 30}); err != nil {
		t.Fatal(err)
	}
	if w := m.Map().Stores[0].Weight; w != 10 {
		t.Errorf("weight of 10 GiB is %d", w)
	}
	changed := m.Changed()
	v, err := m.CreateVolume(ctx, VolumeSpec{Name: "home"})
	if err != nil {
		t.Fatal(err)
	}
	select {
	case <-changed:
	default:
		t.Error("the change is not told")
	}
	for name, want := range map[string]error{"home": sealfs.ErrExist, "..": sealfs.ErrInvalid, strings.Repeat("x", 500): sealfs.ErrNameTooLong} {
		if _, err := m.CreateVolume(ctx, VolumeSpec{Name: name}); !errors.Is(err, want) {
			t.Errorf("CreateVolume(%q) = %v, want %v", name, err, want)
		}
	}
	long := store(3)
	long.Addr = strings.Repeat("x", 1000)
	if err := m.AddStore(ctx, long); !errors.Is(err, sealfs.ErrInvalid) || m.Err() != nil {
		t.Errorf("an address that is too long: %v, %v", err, m.Err())
	}
	if v, err = m.ResizeVolume(ctx, v.ID, 7, 8); err != nil || v.Bytes != 7 || v.Inodes != 8 {
		t.Errorf("resized: %+v, %v", v, err)
	}
	if v, err = m.DeleteVolume(ctx, v.ID); err != nil || v.State != VolumeDeleting {
		t.Errorf("deleting: %+v, %v", v, err)
	}
	if err := m.VolumeDeleted(ctx, v.ID); err != nil {
		t.Error(err)
	}
	if _, ok := m.Map().VolumeByID(v.ID); ok {
		t.Error("a deleted volume is in the map")
	}
	if err := m.RemoveStore(ctx, testID(9)); !errors.Is(err, sealfs.ErrNotExist) {
		t.Errorf("removing a stranger: %v", err)
	}
	cancelled, cancel := context.WithCancel(ctx)
	cancel()
	if _, err := m.CreateVolume(cancelled, VolumeSpec{Name: "no"}); !errors.Is(err, sealfs.ErrInterrupted) || !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}

// TestConcurrent has many propose at once; numbers are unique and the map has all.
func TestConcurrent(t *testing.T) {
	o := testOptions(t.TempDir())
	o.snapshotAfter = 8
	m := open(t, o)
	if err := m.AddStore(t.Context(), store(2)); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	var mu sync.Mutex
	got := make(map[sealfs.Volume]string)
	for g := range 8 {
		wg.Go(func() {
			for i := range 10 {
				name := fmt.Sprint("v", g, "-", i)
				v, err := m.CreateVolume(t.Context(), VolumeSpec{Name: name})
				if err != nil {
					t.Error(err)
					return
				}
				mu.Lock()
				got[v.ID] = name
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	if len(got) != 80 || len(m.Map().Volumes) != 80 {
		t.Fatalf("%d numbers, %d volumes", len(got), len(m.Map().Volumes))
	}
	for _, v := range m.Map().Volumes {
		if got[v.ID] != v.Name {
			t.Errorf("volume %d is %q, was %q", v.ID, v.Name, got[v.ID])
		}
	}
}

// TestFailedSync: a manager whose medium fails changes nothing any more, says
// so, and takes no other part of the process with it.
func TestFailedSync(t *testing.T) {
	for writes := range 12 {
		dir := t.TempDir()
		o := testOptions(dir)
		o.wrap = func(b boltStore) boltStore { return &failing{boltStore: b, left: writes} }
		m, err := Open(t.Context(), o)
		if err != nil {
			if !errors.Is(err, errMedium) || !errors.Is(err, sealfs.ErrIO) {
				t.Errorf("%d writes: Open = %v", writes, err)
			}
		} else {
			err := m.AddStore(t.Context(), store(2))
			for i := 0; err == nil && i < 100; i++ {
				_, err = m.CreateVolume(t.Context(), VolumeSpec{Name: fmt.Sprint("v", i)})
			}
			if !errors.Is(err, errMedium) {
				t.Errorf("%d writes: %v", writes, err)
			}
			<-m.Failed()
			if err := m.AddStore(t.Context(), store(3)); !errors.Is(err, errMedium) {
				t.Errorf("%d writes: after the failure: %v", writes, err)
			}
			if err := m.Beat(testID(2), StoreStats{}); !errors.Is(err, errMedium) {
				t.Errorf("%d writes: a heartbeat after the failure: %v", writes, err)
			}
			if err := m.Close(); err != nil {
				t.Error(err)
			}
		}
		open(t, testOptions(dir)) // what is durable is sound
	}
}

// TestDamagedSnapshot: the one before and the log make up for it.
func TestDamagedSnapshot(t *testing.T) {
	dir := t.TempDir()
	o := testOptions(dir)
	o.snapshotAfter = 4
	m := open(t, o)
	if err := m.AddStore(t.Context(), store(2)); err != nil {
		t.Fatal(err)
	}
	snaps := func() []string {
		s, err := filepath.Glob(filepath.Join(dir, "snapshots", "*", "state.bin"))
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	for i := 0; len(snaps()) < snapshotsKept; i++ {
		if _, err := m.CreateVolume(t.Context(), VolumeSpec{Name: fmt.Sprint("v", i)}); err != nil {
			t.Fatal(err)
		}
		if i%5 == 4 {
			if err := m.raft.Snapshot().Error(); err != nil {
				t.Fatal(err)
			}
		}
	}
	want := m.Map().Encode()
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	files := snaps() // the names begin with term and index; equal terms here
	newest := files[len(files)-1]
	if info, err := os.Stat(files[0]); err != nil {
		t.Fatal(err)
	} else if info2, err := os.Stat(newest); err != nil || info2.ModTime().Before(info.ModTime()) {
		newest = files[0]
	}
	b, err := os.ReadFile(newest)
	if err != nil {
		t.Fatal(err)
	}
	b[len(b)/2] ^= 4
	if err := os.WriteFile(newest, b, 0o644); err != nil {
		t.Fatal(err)
	}
	m = open(t, Options{Dir: dir})
	if string(m.Map().Encode()) != string(want) {
		t.Errorf("opened with a damaged snapshot: %+v", m.Map())
	}
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(filepath.Join(dir, boltFile)); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(t.Context(), testOptions(dir)); !errors.Is(err, sealfs.ErrCorrupt) {
		t.Errorf("without its log: %v", err)
	}
}

// TestLostSnapshots: a log that does not reach back to a snapshot is no state.
func TestLostSnapshots(t *testing.T) {
	dir := t.TempDir()
	o := testOptions(dir)
	o.snapshotAfter = 1
	m := open(t, o)
	if err := m.AddStore(t.Context(), store(2)); err != nil {
		t.Fatal(err)
	}
	for i := range 3 * trailing {
		if _, err := m.CreateVolume(t.Context(), VolumeSpec{Name: fmt.Sprint("v", i)}); err != nil {
			t.Fatal(err)
		}
	}
	if err := m.raft.Snapshot().Error(); err != nil {
		t.Fatal(err)
	}
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(filepath.Join(dir, "snapshots")); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(t.Context(), testOptions(dir)); !errors.Is(err, sealfs.ErrCorrupt) {
		t.Errorf("got %v", err)
	}
}

// TestHeartbeats runs a manager on a clock of its own.
func TestHeartbeats(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		m := open(t, testOptions(dir))
		if err := errors.Join(m.AddStore(t.Context(), store(2)), m.AddStore(t.Context(), store(3))); err != nil {
			t.Fatal(err)
		}
		until := func(n byte, s StoreState) {
			t.Helper()
			for deadline := time.Now().Add(time.Minute); ; {
				changed := m.Changed()
				if mp := m.Map(); mp.Stores[mp.StoreIndex(testID(n))].State == s {
					return
				}
				select {
				case <-changed:
				case <-time.After(time.Until(deadline)):
					t.Fatalf("store %d does not become %s", n, s)
				}
			}
		}
		ctx, stop := context.WithCancel(t.Context())
		defer stop()
		var beating sync.WaitGroup
		defer beating.Wait()
		defer stop()
		beating.Go(func() {
			for ctx.Err() == nil {
				if err := m.Beat(testID(2), StoreStats{Used: 5}); err != nil {
					t.Error(err)
				}
				select {
				case <-ctx.Done():
				case <-time.After(time.Second):
				}
			}
		})
		began := time.Now()
		until(3, StoreSuspect)
		if d := time.Since(began); d < 3*time.Second || d > 5*time.Second {
			t.Errorf("suspected after %s", d)
		}
		until(3, StoreDown)
		if d := time.Since(began); d < 10*time.Second || d > 12*time.Second {
			t.Errorf("down after %s", d)
		}
		version := m.Map().Version
		if err := m.Beat(testID(3), StoreStats{Free: 9}); err != nil {
			t.Error(err)
		}
		until(3, StoreUp)
		if mp := m.Map(); mp.Version != version+1 || mp.Stores[0].State != StoreUp {
			t.Errorf("heartbeats changed the map: %+v", mp)
		}
		if s, _, ok := m.LastBeat(testID(3)); !ok || s.Free != 9 {
			t.Errorf("last heartbeat: %+v, %v", s, ok)
		}
		if err := m.Beat(testID(8), StoreStats{}); !errors.Is(err, sealfs.ErrNotExist) {
			t.Errorf("a stranger's heartbeat: %v", err)
		}
	})
}

// child is a manager that makes volumes until it is killed, and says so after
// each.
func child(dir string) error {
	o := testOptions(dir)
	o.snapshotAfter = 5
	ctx := context.Background()
	m, err := Open(ctx, o)
	if err != nil {
		return err
	}
	if err := m.AddStore(ctx, store(2)); err != nil {
		return err
	}
	for {
		v, err := m.CreateVolume(ctx, VolumeSpec{Name: fmt.Sprint("v", m.Map().NextVolume)})
		if err != nil {
			return err
		}
		fmt.Println(v.ID, v.Name)
	}
}

// TestKill kills a manager at any time. It must open again with every volume
// that it acknowledged.
func TestKill(t *testing.T) {
	dir := t.TempDir()
	acked := make(map[string]sealfs.Volume)
	r := rand.New(rand.NewPCG(rand.Uint64(), 1))
	for round := range 12 {
		cmd := exec.CommandContext(t.Context(), os.Args[0])
		cmd.Env = append(os.Environ(), "SEALFS_TEST_MANAGER="+dir)
		var stderr strings.Builder
		cmd.Stderr = &stderr
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		kill := func() { cmd.Process.Kill() }
		acks, timer := 1+r.IntN(30), (*time.Timer)(nil)
		if round < 5 {
			timer = time.AfterFunc(time.Duration(r.IntN(120))*time.Millisecond, kill) // in the middle of the start
		}
		lines := bufio.NewScanner(out)
		for n := 0; lines.Scan(); {
			var id sealfs.Volume
			var name string
			if _, err := fmt.Sscan(lines.Text(), &id, &name); err != nil {
				continue // cut short by the kill
			}
			acked[name] = id
			if n++; n == acks {
				kill()
			}
		}
		if err := cmd.Wait(); err == nil || err.Error() != "signal: killed" {
			t.Fatalf("round %d: the child ended by itself: %v\n%s", round, err, stderr.String())
		}
		if timer != nil {
			timer.Stop()
		}
	}
	m := open(t, testOptions(dir))
	for name, id := range acked {
		if v, ok := m.Map().Volume(name); !ok || v.ID != id {
			t.Errorf("volume %q of number %d was acknowledged; found %+v, %v", name, id, v, ok)
		}
	}
	if len(acked) == 0 {
		t.Error("nothing was ever acknowledged")
	}
	t.Logf("%d acknowledged, %d in the map", len(acked), len(m.Map().Volumes))
}

// TestHeldByOther opens a directory that another process has open.
func TestHeldByOther(t *testing.T) {
	dir := t.TempDir()
	cmd := exec.CommandContext(t.Context(), os.Args[0])
	cmd.Env = append(os.Environ(), "SEALFS_TEST_MANAGER="+dir)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		cmd.Process.Kill()
		io.Copy(io.Discard, out)
		cmd.Wait()
	}()
	in := bufio.NewReader(out)
	if _, err := in.ReadString('\n'); err != nil {
		t.Fatal(err)
	}
	_, err = Open(t.Context(), testOptions(dir))
	if !errors.Is(err, sealfs.ErrBusy) || !strings.Contains(err.Error(), fmt.Sprint("held by pid ", cmd.Process.Pid)) {
		t.Errorf("got %v", err)
	}
}

// TestLogs: what is business as usual does not trouble an operator.
func TestLogs(t *testing.T) {
	var b strings.Builder
	o := testOptions(t.TempDir())
	o.Logger = slog.New(slog.NewTextHandler(&b, &slog.HandlerOptions{Level: slog.LevelWarn}))
	m := open(t, o)
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	if b.Len() > 0 {
		t.Errorf("opening and closing says\n%s", b.String())
	}
}

func BenchmarkCreateVolume(b *testing.B) {
	m, err := Open(b.Context(), testOptions(b.TempDir()))
	if err != nil {
		b.Fatal(err)
	}
	defer m.Close()
	if err := m.AddStore(b.Context(), store(2)); err != nil {
		b.Fatal(err)
	}
	for i := 0; b.Loop(); i++ {
		if _, err := m.CreateVolume(b.Context(), VolumeSpec{Name: fmt.Sprint("v", i)}); err != nil {
			b.Fatal(err)
		}
	}
}
