package powercut

import (
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// site is a data directory of the programs under test, its device and its region.
type site struct {
	t                                   *testing.T
	bin, dir                            string
	data, device, region, mount, staged string
}

func (s *site) try(program string, args ...string) (string, error) {
	out, err := exec.Command(filepath.Join(s.bin, program), args...).CombinedOutput()
	if err != nil {
		err = fmt.Errorf("%s %s: %w: %s", program, strings.Join(args, " "), err, out)
	}
	return string(out), err
}

func (s *site) must(err error) {
	s.t.Helper()
	if err != nil {
		s.t.Fatal(err)
	}
}

func (s *site) up() error {
	_, err := s.try("sealfs", "up", "--data", s.data, "--device", s.device, "--region", s.region, "--mount", s.mount, "--region-mode", "file", "--staging", "16M")
	return err
}

// kill ends the processes of this directory, and them only, by SIGKILL.
func (s *site) kill() {
	s.t.Helper()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		alive := 0
		files, err := filepath.Glob("/proc/[0-9]*/cmdline")
		s.must(err)
		for _, file := range files {
			line, err := os.ReadFile(file)
			if err != nil || !strings.HasPrefix(string(line), filepath.Join(s.bin, "sealfs")+"\x00") || !strings.Contains(string(line), "\x00--data="+s.data+"\x00") {
				continue
			}
			pid, err := strconv.Atoi(strings.Split(file, "/")[2])
			s.must(err)
			alive++
			unix.Kill(pid, unix.SIGKILL)
		}
		if alive == 0 {
			break
		}
		<-tick.C
	}
	unix.Unmount(s.mount, unix.MNT_DETACH) // it may be gone already
}

func (s *site) copy(from, to string) {
	s.t.Helper()
	s.must(os.RemoveAll(to))
	out, err := exec.Command("cp", "-a", "--sparse=always", from, to).CombinedOutput()
	if err != nil {
		s.t.Fatalf("cp: %v: %s", err, out)
	}
}

// counted returns how many entries a log of writes has up to its last flush.
func (s *site) counted(log string) int {
	s.t.Helper()
	l, err := openBlockLog(log)
	s.must(err)
	defer l.f.Close()
	flushes := l.flushes()
	if len(flushes) == 0 {
		return 0
	}
	return flushes[len(flushes)-1]
}

// TestCrashDevice gives the real programs a device that notes every write and flush,
// works on the mount, kills them, and then makes the device as it was after each
// flush, and as a power cut somewhere before the next one might have left it. What
// was synced by then must be there, and fsck must find nothing wrong.
func TestCrashDevice(t *testing.T) {
	if !*runDevice {
		t.Skip("make crash-device runs it")
	}
	daemon := need(t, "qemu-storage-daemon", "qemu-system-common")
	if f, err := os.OpenFile("/dev/fuse", os.O_RDWR, 0); err != nil {
		t.Fatalf("this test mounts: %v", err)
	} else {
		f.Close()
	}
	dir := t.TempDir()
	s := &site{t: t, bin: programs(t), dir: dir, data: dir + "/data", device: dir + "/disk", region: dir + "/region", mount: dir + "/mnt"}
	s.must(os.Mkdir(s.mount, 0o755))
	image, log := dir+"/image", dir+"/log"
	const size = 128 << 20
	for _, path := range []string{image, log, s.device} {
		s.must(os.WriteFile(path, nil, 0o600))
	}
	s.must(os.Truncate(image, size))
	s.copy(image, dir+"/replayed")
	qsd := exec.Command(daemon, "--blockdev", "driver=file,node-name=file,filename="+image, "--blockdev", "driver=file,node-name=log,filename="+log,
		"--blockdev", "driver=blklogwrites,node-name=disk,file=file,log=log,log-sector-size=512",
		"--export", "type=fuse,id=export,node-name=disk,mountpoint="+s.device+",writable=on")
	s.must(qsd.Start())
	t.Cleanup(func() {
		s.kill()
		qsd.Process.Kill()
		qsd.Wait()
		unix.Unmount(s.device, unix.MNT_DETACH)
		if s.staged != "" {
			os.Remove(s.staged)
			os.Remove(s.staged + ".lock")
		}
	})
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for st, err := os.Stat(s.device); err != nil || st.Size() != size; st, err = os.Stat(s.device) {
		<-tick.C
	}

	// Formatted and ended cleanly; what belongs to the cluster is as it will be found.
	s.must(s.up())
	_, err := s.try("sealfs", "down", "--data", s.data)
	s.must(err)
	s.copy(s.data, dir+"/data0")
	s.must(s.up())
	out, err := s.try("sealfs", "status", "--data", s.data, "--json")
	s.must(err)
	var status struct {
		Stores []struct {
			Staging string `json:"staging"`
		} `json:"stores"`
	}
	s.must(json.Unmarshal([]byte(out), &status))
	s.staged = status.Stores[0].Staging
	s.copy(s.region, dir+"/region0")
	first := s.counted(log)

	const changes = 200
	synced := make([]int, changes) // entries of the log when the change was known to be safe; 0: not
	for i := range changes {
		s.must(workload(i).do(s.mount))
		if i%3 == 0 {
			f, err := os.Open(s.mount)
			s.must(err)
			s.must(errors.Join(f.Sync(), f.Close()))
			synced[i] = s.counted(log)
		}
	}
	s.kill()
	qsd.Process.Kill()
	qsd.Wait()
	unix.Unmount(s.device, unix.MNT_DETACH)
	if a, b := s.header(s.region), s.header(dir+"/region0"); a != b {
		t.Fatal("the region was checkpointed meanwhile: its states are not known")
	}
	s.replay(log, dir+"/replayed", first, synced)
}

// header returns both header slots of a region.
func (s *site) header(path string) string {
	s.t.Helper()
	f, err := os.Open(path)
	s.must(err)
	defer f.Close()
	b := make([]byte, 8192)
	_, err = f.ReadAt(b, 0)
	s.must(err)
	return string(b)
}

// replay makes every state of the device from entry first of the log on and judges
// it: after each flush, and with a part of what was written before the next.
func (s *site) replay(log, image string, first int, synced []int) {
	t := s.t
	l, err := openBlockLog(log)
	s.must(err)
	defer l.f.Close()
	dev, err := os.OpenFile(image, os.O_RDWR, 0)
	s.must(err)
	defer dev.Close()
	rng := rand.New(rand.NewPCG(*seed, 0))
	flushes := append(l.flushes(), len(l.entry))
	done, states, began := 0, 0, time.Now()
	for k, end := range flushes {
		s.must(l.replay(dev, done, end, nil, 1))
		if done = end; end < first {
			continue
		}
		safe := -1
		for i, at := range synced {
			if at > 0 && at <= end {
				safe = i
			}
		}
		s.judge(image, fmt.Sprintf("flush %d", k+1), safe)
		states++
		if k+1 < len(flushes) {
			s.copy(image, s.dir+"/torn")
			torn, err := os.OpenFile(s.dir+"/torn", os.O_RDWR, 0)
			s.must(err)
			s.must(errors.Join(l.replay(torn, end, flushes[k+1], rng, rng.Float64()), torn.Close()))
			s.judge(s.dir+"/torn", fmt.Sprintf("in part between flushes %d and %d", k+1, k+2), safe)
			states++
		}
	}
	if states < 50 {
		t.Errorf("only %d states of the device", states)
	}
	t.Logf("crash-device: %d entries, %d flushes, %d states, violations 0, %v", len(l.entry), len(flushes)-1, states, time.Since(began).Round(time.Second))
}

// judge starts the programs on a state of the device.
func (s *site) judge(image, when string, safe int) {
	s.t.Helper()
	s.copy(image, s.device)
	s.copy(s.dir+"/data0", s.data)
	s.copy(s.dir+"/region0", s.region)
	for _, path := range []string{s.staged, s.staged + ".lock"} { // a power cut takes it
		if err := os.Remove(path); err != nil && !os.IsNotExist(err) {
			s.t.Fatal(err)
		}
	}
	if _, err := s.try("sealfs-fsck", "--data", s.data); err != nil {
		s.t.Fatalf("%s: %v", when, err)
	}
	if err := s.up(); err != nil {
		s.t.Fatalf("%s: %v", when, err)
	}
	if _, err := verify(s.mount, safe); err != nil {
		s.t.Fatalf("%s, change %d was synced: %v", when, safe, err)
	}
	s.kill()
}
