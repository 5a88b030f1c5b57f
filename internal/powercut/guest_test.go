package powercut

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestMain is the guest's first process when this binary is what the kernel starts.
func TestMain(m *testing.M) {
	if os.Getpid() == 1 {
		guest()
	}
	os.Exit(m.Run())
}

// What the guest says to the host begins with mark, one line each.
const mark = "@@ "

type console struct{ *os.File }

func (c console) say(format string, args ...any) { fmt.Fprintf(c, "\n"+mark+format+"\n", args...) }

// guest runs the guest's half of a round and turns the machine off.
func guest() {
	must := func(err error) {
		if err != nil {
			os.Stdout.WriteString(err.Error())
			unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
		}
	}
	for _, dir := range []string{"/proc", "/sys", "/dev", "/pm", "/mnt", "/tmp"} {
		os.MkdirAll(dir, 0o755)
	}
	must(unix.Mount("proc", "/proc", "proc", 0, ""))
	must(unix.Mount("sys", "/sys", "sysfs", 0, ""))
	must(unix.Mount("dev", "/dev", "devtmpfs", 0, ""))
	must(os.MkdirAll("/dev/shm", 0o755))
	must(unix.Mount("shm", "/dev/shm", "tmpfs", 0, ""))
	f, err := os.OpenFile("/dev/ttyS0", os.O_RDWR, 0)
	must(err)
	c := console{f}
	if err := (&machine{console: c}).run(); err != nil {
		c.say("fail %s", strings.ReplaceAll(err.Error(), "\n", " | "))
	} else {
		c.say("done")
	}
	unix.Sync()
	unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
}

// machine is the guest in one round.
type machine struct {
	console
	args map[string]string // of the kernel's command line
}

func (g *machine) run() error {
	line, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return err
	}
	g.args = map[string]string{}
	for word := range strings.FieldsSeq(string(line)) {
		if key, value, ok := strings.Cut(word, "="); ok {
			g.args[key] = value
		}
	}
	if err := g.prepare(); err != nil {
		return fmt.Errorf("guest: %w", err)
	}
	acked, err := strconv.Atoi(g.args["powercut.acked"])
	if err != nil {
		return err
	}
	if acked >= 0 {
		if err := g.check(); err != nil {
			return err
		}
	}
	if err := g.up(); err != nil {
		return err
	}
	at, err := g.verify(acked)
	if err != nil {
		return err
	}
	g.say("verified %d", at)
	if g.args["powercut.last"] != "" {
		return g.last(at)
	}
	for i := at + 1; ; i++ {
		if err := workload(i).do("/mnt"); err != nil {
			return err
		}
		g.say("ack %d", i)
	}
}

// prepare loads modules and mounts the persistent memory, in the first round after
// making its file system.
func (g *machine) prepare() error {
	list, err := os.ReadFile("/modules/list")
	if err != nil {
		return err
	}
	for name := range strings.FieldsSeq(string(list)) {
		f, err := os.Open("/modules/" + name)
		if err != nil {
			return err
		}
		err = unix.FinitModule(int(f.Fd()), "", 0)
		f.Close()
		if err != nil && err != unix.EEXIST && err != unix.ENODEV {
			return fmt.Errorf("module %s: %w", name, err)
		}
	}
	if err := appears("/dev/vda", "/dev/pmem0"); err != nil {
		return err
	}
	if g.args["powercut.acked"] == "-1" {
		if err := fsdax(); err != nil {
			return err
		}
		if err := command("mkfs.ext4", "-q", "-b", "4096", "/dev/pmem0"); err != nil {
			return err
		}
	}
	return unix.Mount("/dev/pmem0", "/pm", "ext4", 0, "dax=always")
}

// fsdax gives the raw namespace a place for its struct pages, without which no file
// system maps it; what ndctl create-namespace -m fsdax -M mem does.
func fsdax() error {
	const devices, driver = "/sys/bus/nd/devices/", "/sys/bus/nd/drivers/nd_pmem/"
	seed, err := os.ReadFile(devices + "region0/pfn_seed")
	if err != nil {
		return err
	}
	pfn := strings.TrimSpace(string(seed))
	for _, w := range [][2]string{
		{driver + "unbind", "namespace0.0"},
		{devices + pfn + "/uuid", "5ea1f500-0000-4000-8000-000000000001"},
		{devices + pfn + "/mode", "ram"},
		{devices + pfn + "/align", "2097152"},
		{devices + pfn + "/namespace", "namespace0.0"},
		{driver + "bind", pfn},
	} {
		if err := os.WriteFile(w[0], []byte(w[1]), 0); err != nil {
			return err
		}
	}
	return appears("/dev/pmem0")
}

// appears waits for files.
func appears(paths ...string) error {
	tick, end := time.NewTicker(20*time.Millisecond), time.After(time.Minute)
	defer tick.Stop()
	for _, path := range paths {
		for _, err := os.Stat(path); err != nil; _, err = os.Stat(path) {
			select {
			case <-tick.C:
			case <-end:
				return err
			}
		}
	}
	return nil
}

func command(name string, args ...string) error {
	out, err := exec.Command("/bin/"+name, args...).CombinedOutput()
	if err != nil {
		err = fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, bytes.TrimSpace(out))
	}
	return err
}

func (g *machine) up() error {
	err := command("sealfs", "up", "--data", "/pm/data", "--device", "/dev/vda", "--region", "/pm/region", "--mount", "/mnt",
		"--region-mode", "dax", "--staging", "16M", "--log-level", "debug")
	if err != nil {
		if log, e := os.ReadFile("/pm/data/log/sealfs.log"); e == nil {
			err = fmt.Errorf("%w: %s", err, log[max(0, len(log)-2000):])
		}
	}
	return err
}

// status returns what sealfs says of its only store.
func (g *machine) status() (mode, state string, err error) {
	out, err := exec.Command("/bin/sealfs", "status", "--data", "/pm/data", "--json").Output()
	if err != nil {
		return "", "", fmt.Errorf("status: %w: %s", err, out)
	}
	var s struct {
		Stores []struct {
			State string `json:"state"`
			Stats struct {
				Mode string `json:"region_mode"`
			} `json:"stats"`
		} `json:"stores"`
	}
	if err := json.Unmarshal(out, &s); err != nil || len(s.Stores) != 1 {
		return "", "", fmt.Errorf("status: %v: %s", err, out)
	}
	return s.Stores[0].Stats.Mode, s.Stores[0].State, nil
}

func (g *machine) check() error { return command("sealfs-fsck", "--data", "/pm/data") }

// verify finds which change the tree is at: acked or a later one, of which the next
// may be half done. It returns that change.
func (g *machine) verify(acked int) (int, error) {
	if mode, _, err := g.status(); err != nil || mode != "dax" {
		return 0, fmt.Errorf("the region's mode is %q: %v", mode, err)
	}
	return verify("/mnt", acked)
}

// last ends the last round: a SIGKILL of the server, a clean end, and a region that
// is cut short under a server that runs.
func (g *machine) last(at int) error {
	for i := range 200 {
		if err := workload(at + 1 + i).do("/mnt"); err != nil {
			return err
		}
	}
	at += 200
	if err := killAll("/bin/sealfs"); err != nil {
		return err
	}
	if err := g.up(); err != nil {
		return fmt.Errorf("after SIGKILL: %w", err)
	}
	if got, err := g.verify(at); err != nil || got != at {
		return fmt.Errorf("after SIGKILL: change %d, want %d: %v", got, at, err)
	}
	if err := command("sealfs", "down", "--data", "/pm/data"); err != nil {
		return err
	}
	if err := g.check(); err != nil {
		return fmt.Errorf("after a clean end: %w", err)
	}
	if _, err := os.Stat("/pm/region.ring"); !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("the ring after a clean end: %v", err)
	}
	if err := g.up(); err != nil {
		return err
	}
	if err := os.Truncate("/pm/region", 8192); err != nil {
		return err
	}
	// Whoever touches the region now gets a signal, which must become an error.
	for i := range 50 {
		if err := os.WriteFile(fmt.Sprintf("/mnt/more%d", i), []byte("x"), 0o644); err == nil {
			return errors.New("a change without a region")
		}
	}
	_, state, err := g.status()
	if err != nil || state != "read-only" {
		return fmt.Errorf("a region that was cut short: state %q: %v", state, err)
	}
	return killAll("/bin/sealfs")
}

// killAll sends SIGKILL to all processes of a program, and waits until they are gone.
func killAll(exe string) error {
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for range 500 {
		links, err := filepath.Glob("/proc/[0-9]*/exe")
		if err != nil {
			return err
		}
		found := false
		for _, link := range links {
			if at, err := os.Readlink(link); err != nil || at != exe {
				continue
			}
			pid, err := strconv.Atoi(strings.Split(link, "/")[2])
			if err != nil {
				return err
			}
			found = true
			unix.Kill(pid, unix.SIGKILL)
			unix.Wait4(pid, nil, unix.WNOHANG, nil)
		}
		if !found {
			return nil
		}
		<-tick.C
	}
	return fmt.Errorf("%s does not die", exe)
}

// workload i is the i-th change of an endless sequence.
type workload int

func (w workload) dir(i workload) string { return fmt.Sprintf("d%d", i/64) }
func (w workload) name(i workload) string {
	return fmt.Sprintf("%s/f%d", w.dir(i), i)
}

// content of the i-th file: up to 40 KiB.
func (w workload) content(i workload) []byte {
	rng := rand.New(rand.NewPCG(uint64(i), 1))
	b := make([]byte, rng.IntN(rng.IntN(40<<10)+1))
	for j := range b {
		b[j] = byte(rng.Uint32())
	}
	return b
}

// do executes the change under root. When it returns nil, the change has been
// answered. Done twice it is as done once.
func (w workload) do(root string) error {
	at := func(name string) string { return filepath.Join(root, name) }
	switch {
	case w%64 == 0:
		if err := os.Mkdir(at(w.dir(w)), 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
	case w%8 == 3:
		err := os.Rename(at(w.name(w-1)), at(w.name(w-1)+"r"))
		if _, e := os.Stat(at(w.name(w-1) + "r")); errors.Is(err, fs.ErrNotExist) && e == nil {
			return nil
		}
		return err
	case w%8 == 6:
		if err := os.Remove(at(w.name(w - 2))); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	default:
		return os.WriteFile(at(w.name(w)), w.content(w), 0o644)
	}
	return nil
}

// apply executes the change on a map: "" stands for a directory.
func (w workload) apply(m map[string]string) {
	switch {
	case w%64 == 0:
		m[w.dir(w)] = "directory"
	case w%8 == 3:
		m[w.name(w-1)+"r"] = m[w.name(w-1)]
		delete(m, w.name(w-1))
	case w%8 == 6:
		delete(m, w.name(w-2))
	default:
		m[w.name(w)] = "file " + string(w.content(w))
	}
}

// verify compares the tree at root with what it must be after change acked, or a
// later one, and returns which it is. A file that was just being written may have a
// part of its content.
func verify(root string, acked int) (int, error) {
	got := map[string]string{}
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil || path == root {
			return err
		}
		name, _ := filepath.Rel(root, path)
		if d.IsDir() {
			got[name] = "directory"
			return nil
		}
		b, err := os.ReadFile(path)
		got[name] = "file " + string(b)
		return err
	})
	if err != nil {
		return 0, err
	}
	m := map[string]string{}
	for i := range acked + 1 {
		workload(i).apply(m)
	}
	const ahead = 64 // changes that the host may not have heard of
	first := difference(got, m)
	for at := acked; at <= acked+ahead; at++ {
		if difference(got, m) == "" {
			return at, nil
		}
		// The next one, half done.
		next := workload(at + 1)
		name := next.name(next)
		part, there := got[name]
		_, was := m[name]
		next.apply(m)
		if whole, is := m[name]; is && !was && there && strings.HasPrefix(whole, part) && strings.HasPrefix(part, "file ") {
			m[name] = part
			if difference(got, m) == "" {
				return at, nil
			}
			m[name] = whole
		}
	}
	return 0, fmt.Errorf("the tree is at no change from %d on: %s", acked, first)
}

// difference names something in which two trees differ, "" if there is nothing.
func difference(got, want map[string]string) string {
	var names []string
	for name := range want {
		if got[name] != want[name] {
			names = append(names, name)
		}
	}
	for name := range got {
		if _, ok := want[name]; !ok {
			names = append(names, name)
		}
	}
	if len(names) == 0 {
		return ""
	}
	name := slices.Min(names)
	g, there := got[name]
	w, wanted := want[name]
	return fmt.Sprintf("%d names differ; %s: there %v with %d bytes, wanted %v with %d", len(names), name, there, len(g), wanted, len(w))
}
