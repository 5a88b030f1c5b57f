package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"sealfs"
	"sealfs/cluster"
	"sealfs/disk"
	"sealfs/fsck"
	"sealfs/lsfs"
	"sealfs/lsfs/layout"
	"sealfs/pmem"
)

// makeStore formats a store in dir and returns the device's path.
func makeStore(t *testing.T, dir string) string {
	t.Helper()
	return makeStoreOf(t, dir, lsfs.Geometry{})
}

func makeStoreOf(t *testing.T, dir string, g lsfs.Geometry) string {
	t.Helper()
	device := filepath.Join(dir, "device.img")
	if err := errors.Join(os.MkdirAll(dir, 0o755), disk.CreateImage(device, 2<<20)); err != nil {
		t.Fatal(err)
	}
	dev, err := disk.Open(device, disk.OpenOptions{Exclusive: true})
	if err != nil {
		t.Fatal(err)
	}
	region, err := pmem.OpenFile(filepath.Join(dir, fsck.RegionName), true)
	if err != nil {
		t.Fatal(err)
	}
	g.SegmentBytes = layout.SegmentBytesMin
	_, err = lsfs.Format(dev, region, g)
	if err := errors.Join(err, dev.Close(), region.Close()); err != nil {
		t.Fatal(err)
	}
	return device
}

// damage inverts a byte of a file.
func damage(t *testing.T, path string, off int64) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 1)
	_, err = f.ReadAt(b, off)
	b[0] ^= 0xff
	_, err2 := f.WriteAt(b, off)
	if err := errors.Join(err, err2, f.Close()); err != nil {
		t.Fatal(err)
	}
}

// fsckOf runs the command.
func fsckOf(t *testing.T, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	var out, errs bytes.Buffer
	code = run(context.Background(), append([]string{"sealfs-fsck"}, args...), nil, &out, &errs)
	return code, out.String(), errs.String()
}

func TestUsage(t *testing.T) {
	for _, args := range [][]string{
		{}, {"-n", "-y", "d"}, {"-p", "-n", "d"}, {"--wrong", "d"}, {"--data", "x", "d"}, {"--data", "x", "--region", "y"},
		{"--region", "r", "d", "e"}, {"--shards", "12", "d"}, {"--shards", "x", "d"}, {"-t", "sealfs", "d"},
		{"--region", "r", "d,region=q"}, {"--rebuild-region", "-y", "d"}, {"--rebuild-region", "--cut-log", "d"}, {"--cut-log", "-p", "d"}, {"d,region="}, {",region=r"}, {"d,region=a,staging=b,region=c"}, {""},
	} {
		if code, out, errs := fsckOf(t, args...); code != fsck.ExitUsage || out != "" || !strings.HasPrefix(errs, "sealfs-fsck: ") {
			t.Errorf("%q: exit status %d, %q, %q", args, code, out, errs)
		}
	}
	if code, out, _ := fsckOf(t, "--help"); code != 0 || !strings.Contains(out, "--no-data") {
		t.Errorf("--help: exit status %d, %q", code, out)
	}
	if code, out, _ := fsckOf(t, "--list-problems"); code != 0 || strings.Count(out, "\n") != len(fsck.Problems()) {
		t.Errorf("--list-problems: exit status %d, %q", code, out)
	}
}

func TestStatuses(t *testing.T) {
	dir := t.TempDir()
	one, two := makeStore(t, dir+"/stores/1"), makeStore(t, dir+"/stores/2")
	code, out, errs := fsckOf(t, "-f", one)
	if code != fsck.ExitClean || errs != "" || !strings.Contains(out, "\nPass 7: data\n") || !strings.HasSuffix(out, "(0/32 segments in use)\n") || !strings.Contains(out, one+": clean, 0 files, 0 directories, 0 bytes") {
		t.Errorf("clean: exit status %d, %q, %q", code, out, errs)
	}
	damage(t, two, 50)
	if code, out, _ = fsckOf(t, "-n", "--data", dir); code != fsck.ExitUncorrected || !strings.Contains(out, "[102]") || !strings.Contains(out, two+": 1 warning left, ") {
		t.Errorf("one of two damaged: exit status %d, %q", code, out)
	}
	if code, out, _ = fsckOf(t, "-y", "--data", dir); code != fsck.ExitRepaired || !strings.Contains(out, two+": 1 repaired, ") {
		t.Errorf("repair: exit status %d, %q", code, out)
	}
	if code, _, _ = fsckOf(t, "-p", "--data", dir); code != fsck.ExitClean {
		t.Errorf("repaired: exit status %d", code)
	}
	if code, _, errs = fsckOf(t, dir+"/nothing"); code != fsck.ExitOperational || !strings.Contains(errs, dir+"/nothing") {
		t.Errorf("no device: exit status %d, %q", code, errs)
	}
	if code, _, errs = fsckOf(t, "--data", dir+"/stores"); code != fsck.ExitOperational || !strings.Contains(errs, "no stores") {
		t.Errorf("no stores: exit status %d, %q", code, errs)
	}
	damage(t, two, 50)
	damage(t, two, 5000)
	if code, out, _ = fsckOf(t, "-y", two); code != fsck.ExitUncorrected || !strings.Contains(out, "[101]") || !strings.Contains(out, "skipped") {
		t.Errorf("both superblocks: exit status %d, %q", code, out)
	}
}

func TestLive(t *testing.T) {
	device := makeStore(t, t.TempDir())
	dev, err := disk.Open(device, disk.OpenOptions{Exclusive: true})
	if err != nil {
		t.Fatal(err)
	}
	defer dev.Close()
	for _, mode := range []string{"-n", "-y"} {
		if code, _, errs := fsckOf(t, mode, device); code != fsck.ExitOperational || !strings.Contains(errs, "stop it first") {
			t.Errorf("%s on a live store: exit status %d, %q", mode, code, errs)
		}
	}
}

func TestCancelled(t *testing.T) {
	device := makeStore(t, t.TempDir())
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	var out, errs bytes.Buffer
	if code := run(ctx, []string{"sealfs-fsck", device}, nil, &out, &errs); code != fsck.ExitCancelled {
		t.Errorf("exit status %d, %q", code, errs.String())
	}
}

func TestJSON(t *testing.T) {
	device := makeStore(t, t.TempDir())
	damage(t, device, 50)
	code, out, errs := fsckOf(t, "--json", "-C", "0", device)
	var got struct {
		Stores []struct {
			Device, Region, Store string
			Found                 []struct {
				Problem                       int
				Name, Severity, Where, Detail string
			}
			Error string
		}
		Exit *int
	}
	if err := json.Unmarshal([]byte(out), &got); err != nil {
		t.Fatalf("%v: %q", err, out)
	}
	if len(got.Stores) != 1 || got.Exit == nil || *got.Exit != code || code != fsck.ExitUncorrected || !strings.Contains(errs, "pass 1") {
		t.Fatalf("exit status %d, %q, %q", code, out, errs)
	}
	s := got.Stores[0]
	if s.Device != device || len(s.Store) != 36 || len(s.Found) != 1 || s.Found[0].Problem != 102 || s.Found[0].Severity != "warning" || s.Found[0].Detail == "" {
		t.Errorf("%+v", s)
	}
	code, out, _ = fsckOf(t, "--json", device+"x")
	if err := json.Unmarshal([]byte(out), &got); err != nil || code != fsck.ExitOperational || got.Stores[0].Error == "" {
		t.Errorf("exit status %d, %q, %v", code, out, err)
	}
}

// Under the name by which fsck(8) calls it, the program takes what fsck(8) passes.
func TestUnderFsck(t *testing.T) {
	dir := t.TempDir()
	device := makeStore(t, dir)
	call := func(args ...string) (int, string) {
		var out, errs bytes.Buffer
		code := run(context.Background(), append([]string{"/sbin/fsck.sealfs"}, args...), nil, &out, &errs)
		return code, out.String() + errs.String()
	}
	for _, args := range [][]string{
		{device}, {"-a", device}, {"-p", "-f", device}, {"-y", "-v", device}, {"-n", "-C", "0", device}, {"-C0", device}, {"-t", "sealfs", "-a", device},
		{"-p", device + ",region=" + dir + "/region"},
	} {
		if code, out := call(args...); code != fsck.ExitClean || !strings.Contains(out, "clean") {
			t.Errorf("%q: exit status %d, %q", args, code, out)
		}
	}
	if code, out := call("-t", "ext4", device); code != fsck.ExitUsage || !strings.HasPrefix(out, "fsck.sealfs: ") {
		t.Errorf("another type: exit status %d, %q", code, out)
	}
	damage(t, device, 50)
	for i, want := range []int{fsck.ExitUncorrected, fsck.ExitRepaired, fsck.ExitClean} {
		if code, out := call([]string{"-n", "-a", "-a"}[i], device); code != want {
			t.Errorf("damaged, call %d: exit status %d, %q", i, code, out)
		}
	}
}

// Several stores are checked together, and held against the cluster map.
func TestStoresOfACluster(t *testing.T) {
	dir := t.TempDir()
	one, two, other := sealfs.UUID{1}, sealfs.UUID{2}, sealfs.UUID{0xcc}
	a := makeStoreOf(t, dir+"/a", lsfs.Geometry{Cluster: testCluster, Store: one})
	b := makeStoreOf(t, dir+"/b", lsfs.Geometry{Cluster: testCluster, Store: two})
	c := makeStoreOf(t, dir+"/c", lsfs.Geometry{Cluster: other})
	if code, out, _ := fsckOf(t, a, b+",region="+dir+"/b/region"); code != fsck.ExitClean || !strings.Contains(out, "cluster "+testCluster.String()+": 2 stores, clean") {
		t.Errorf("two stores: exit status %d, %q", code, out)
	}
	if code, out, errs := fsckOf(t, a, dir+"/nothing"); code != fsck.ExitOperational || !strings.Contains(out, ": 2 stores, 1 could not be checked") || !strings.Contains(errs, "nothing") {
		t.Errorf("a store that is not there: exit status %d, %q, %q", code, out, errs)
	}
	if code, out, errs := fsckOf(t, a, c); code != fsck.ExitOperational || out != "" || !strings.Contains(errs, testCluster.String()) || !strings.Contains(errs, other.String()) {
		t.Errorf("stores of two clusters: exit status %d, %q, %q", code, out, errs)
	}
	if code, _, errs := fsckOf(t, a, a); code != fsck.ExitOperational || !strings.Contains(errs, a) {
		t.Errorf("a store twice: exit status %d, %q", code, errs)
	}

	path := dir + "/map"
	writeMap(t, path, one, two)
	if code, out, _ := fsckOf(t, "--map", path, a); code != fsck.ExitClean || !strings.Contains(out, "1 store of the cluster missing") {
		t.Errorf("one of two: exit status %d, %q", code, out)
	}
	if code, _, errs := fsckOf(t, "--map", path, c); code != fsck.ExitOperational || !strings.Contains(errs, "map is of cluster") {
		t.Errorf("another cluster's store: exit status %d, %q", code, errs)
	}
	if code, _, errs := fsckOf(t, "--map", a, b); code != fsck.ExitOperational || !strings.Contains(errs, "cluster map "+a) {
		t.Errorf("no map: exit status %d, %q", code, errs)
	}
	code, out, _ := fsckOf(t, "--json", "--map", path, a)
	var got struct {
		Stores   []struct{ Exit int }
		Together struct {
			Cluster string
			Shards  int
			Missing []string `json:"missing_stores"`
		}
		Exit int
	}
	if err := json.Unmarshal([]byte(out), &got); err != nil || code != 0 || got.Together.Cluster != testCluster.String() || got.Together.Shards != 4 || len(got.Together.Missing) != 1 || got.Together.Missing[0] != two.String() {
		t.Errorf("--json: exit status %d, %q, %v", code, out, err)
	}
	if code, out, _ = fsckOf(t, "--json", a, c); code != fsck.ExitOperational || json.Unmarshal([]byte(out), &got) != nil || got.Exit != code || len(got.Stores) != 2 {
		t.Errorf("--json of two clusters: exit status %d, %q", code, out)
	}

	// A data directory knows its map and its stores.
	list := "stores:\n  - {device: a/device.img, region: a/region}\n  - {device: b/device.img, region: b/region}\n"
	if err := os.WriteFile(dir+"/config.yaml", []byte(list), 0o600); err != nil {
		t.Fatal(err)
	}
	if code, out, _ = fsckOf(t, "--data", dir); code != fsck.ExitClean || !strings.HasSuffix(out, ": 2 stores, clean\n") {
		t.Errorf("--data: exit status %d, %q", code, out)
	}
	writeMap(t, path, one, two, sealfs.UUID{3})
	if code, out, _ = fsckOf(t, "--data", dir); code != fsck.ExitClean || !strings.Contains(out, "1 store of the cluster missing") {
		t.Errorf("--data of two stores of three: exit status %d, %q", code, out)
	}
	if err := os.WriteFile(dir+"/server.yaml", []byte("disks:\n- store: x\n  device: b/device.img\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if code, out, _ = fsckOf(t, "--data", dir); code != fsck.ExitClean || !strings.HasPrefix(out, "Pass 1") || !strings.Contains(out, b+": clean") {
		t.Errorf("--data with a server: exit status %d, %q", code, out)
	}
}

var testCluster = sealfs.UUID{0xc1}

// writeMap writes a cluster map of four shards, which lie on the stores in turn.
func writeMap(t *testing.T, path string, stores ...sealfs.UUID) {
	t.Helper()
	m := cluster.Map{Version: 3, Cluster: testCluster, Name: "test", Shards: 4, Replicas: 1, OpVersion: 1, NextVolume: 1}
	for _, id := range stores {
		m.Stores = append(m.Stores, cluster.StoreInfo{ID: id, Weight: 1, State: cluster.StoreUp})
	}
	for s := range 4 {
		m.Table = append(m.Table, cluster.ShardInfo{Replicas: []uint16{uint16(s % len(stores))}, Epoch: 1})
	}
	if err := os.WriteFile(path, m.Encode(), 0o600); err != nil {
		t.Fatal(err)
	}
}

// The plan is shown before it is carried out, and with -n that is all.
func TestPlan(t *testing.T) {
	device := makeStore(t, t.TempDir())
	damage(t, device, 50)
	before, err := os.ReadFile(device)
	if err != nil {
		t.Fatal(err)
	}
	code, out, _ := fsckOf(t, "-n", device)
	if code != fsck.ExitUncorrected || !strings.Contains(out, "1 repair planned\n  1. [102] ") {
		t.Errorf("-n: exit status %d, %q", code, out)
	}
	after, err := os.ReadFile(device)
	if err != nil || !bytes.Equal(before, after) {
		t.Errorf("-n has changed something (%v)", err)
	}
	save := t.TempDir()
	code, out, _ = fsckOf(t, "-y", "--save", save, device)
	plan, done := strings.Index(out, "1 repair planned"), strings.Index(out, "is saved in "+save)
	if code != fsck.ExitRepaired || plan < 0 || done < plan {
		t.Errorf("-y: exit status %d, %q", code, out)
	}
	damage(t, device, 50)
	code, out, _ = fsckOf(t, "--json", "-y", "--save", save, device)
	var got struct {
		Stores []struct {
			Plan []struct {
				Problem           int
				Name, Where, What string
			}
			Saved []string
		}
	}
	if err := json.Unmarshal([]byte(out), &got); err != nil {
		t.Fatal(err)
	}
	if s := got.Stores[0]; code != fsck.ExitRepaired || len(s.Plan) != 1 || s.Plan[0].Problem != 102 || s.Plan[0].What == "" || len(s.Saved) != 1 {
		t.Errorf("--json: exit status %d, %+v", code, s)
	}
}

func TestConfirm(t *testing.T) {
	for answer, want := range map[string]bool{"y\n": true, " YES \n": true, "n\n": false, "\n": false, "": false, "y": false} {
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		_, err = w.WriteString(answer)
		if err := errors.Join(err, w.Close()); err != nil {
			t.Fatal(err)
		}
		var asked bytes.Buffer
		c := command{name: "sealfs-fsck", stdin: r}
		if got := c.confirm(7, &asked); got != want || !strings.Contains(asked.String(), "7 of these repairs") {
			t.Errorf("%q: %v, %q", answer, got, asked.String())
		}
		if isTerminal(r) {
			t.Error("a pipe is a terminal")
		}
		r.Close()
	}
}

// nobody owns nothing.
type nobody struct{}

func (nobody) Live(pmem.Reader, sealfs.Ino, uint64, sealfs.LSN, uint32, func(lsfs.Part)) error {
	return nil
}

func (nobody) Move(*lsfs.Tx, sealfs.Ino, lsfs.Part, sealfs.LSN) (bool, error) { return false, nil }

// Regions that are lost or damaged are made again and checked; the old one is kept.
func TestRebuildRegion(t *testing.T) {
	dir := t.TempDir()
	devices := []string{makeStore(t, dir+"/stores/1"), makeStore(t, dir+"/stores/2")}
	for _, device := range devices {
		dev, err := disk.Open(device, disk.OpenOptions{Exclusive: true})
		if err != nil {
			t.Fatal(err)
		}
		region, err := pmem.OpenFile(filepath.Join(filepath.Dir(device), fsck.RegionName), false)
		if err != nil {
			t.Fatal(err)
		}
		s, err := lsfs.Open(dev, region, nil, nobody{}, lsfs.Options{FarBytes: 1 << 40})
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(s.FarCheckpoint(), s.Close()); err != nil {
			t.Fatal(err)
		}
	}
	lost, bad := dir+"/stores/1/region", dir+"/stores/2/region"
	damage(t, bad, 3*4096+9)
	old, err := os.ReadFile(bad)
	if err := errors.Join(err, os.Remove(lost)); err != nil {
		t.Fatal(err)
	}
	if code, _, errs := fsckOf(t, "-y", "--data", dir); code&fsck.ExitOperational == 0 || !strings.Contains(errs, "--rebuild-region") {
		t.Errorf("exit status %d, %q", code, errs)
	}
	code, out, errs := fsckOf(t, "--rebuild-region", "--data", dir)
	if code != fsck.ExitRepaired || errs != "" || strings.Count(out, "made again, from ") != 2 || strings.Count(out, ": clean, ") < 2 {
		t.Errorf("exit status %d, %q, %q", code, out, errs)
	}
	if kept, err := filepath.Glob(bad + ".old-*"); err != nil || len(kept) != 1 {
		t.Errorf("the old region is kept in %q (%v)", kept, err)
	} else if b, err := os.ReadFile(kept[0]); err != nil || !bytes.Equal(b, old) {
		t.Errorf("the old region is not what was kept (%v)", err)
	}
	if code, out, errs := fsckOf(t, "--rebuild-region", "--json", devices[0]); code != fsck.ExitRepaired || !json.Valid([]byte(out)) || !strings.Contains(errs, "made again") {
		t.Errorf("exit status %d, %q, %q", code, out, errs)
	}
}

// Where there is nothing to make a region from, nothing is touched.
func TestRebuildOfNothing(t *testing.T) {
	dir := t.TempDir()
	device := makeStore(t, dir)
	before, err := os.ReadFile(dir + "/region")
	if err != nil {
		t.Fatal(err)
	}
	code, out, errs := fsckOf(t, "--rebuild-region", device)
	if code != fsck.ExitOperational || out != "" || !strings.Contains(errs, device) || !strings.Contains(errs, "far checkpoint") {
		t.Errorf("exit status %d, %q, %q", code, out, errs)
	}
	if files, _ := os.ReadDir(dir); len(files) != 2 {
		t.Errorf("%d files are left", len(files))
	}
	after, err := os.ReadFile(dir + "/region")
	if err != nil || !bytes.Equal(before, after) {
		t.Errorf("the region was changed (%v)", err)
	}
	if code, _, errs := fsckOf(t, "--rebuild-region", dir+"/nothing"); code != fsck.ExitOperational || !strings.Contains(errs, "nothing") {
		t.Errorf("exit status %d, %q", code, errs)
	}
}
