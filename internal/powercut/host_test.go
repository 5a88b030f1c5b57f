package powercut

import (
	"bufio"
	"bytes"
	"debug/elf"
	"errors"
	"flag"
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
)

var (
	runDax    = flag.Bool("dax-vm", false, "run the guest with persistent memory")
	runDevice = flag.Bool("crash-device", false, "run the device that logs its writes")
	rounds    = flag.Int("rounds", 3, "how often the guest's power is cut")
	seed      = flag.Uint64("seed", 1, "of the moments at which power is cut")
	kernel    = flag.String("kernel", "", "Debian package of the guest's kernel, linux-image-*-cloud-amd64 (default: fetched with apt-get)")
)

// need returns where a program is, and fails the test with the package that has it.
func need(t *testing.T, program, pkg string) string {
	t.Helper()
	path, err := exec.LookPath(program)
	if err != nil {
		t.Fatalf("%s is missing here: apt-get install --no-install-recommends %s", program, pkg)
	}
	return path
}

// programs returns the directory of the programs under test.
func programs(t *testing.T) string {
	t.Helper()
	dir := os.Getenv("SEALFS_BIN")
	if _, err := os.Stat(filepath.Join(dir, "sealfs")); dir == "" || err != nil {
		t.Fatal("SEALFS_BIN names no directory with the programs: use make")
	}
	return dir
}

// findKernel unpacks the guest's kernel, and returns its image and modules.
func findKernel(t *testing.T) (image, modules string) {
	t.Helper()
	unpack := need(t, "dpkg-deb", "dpkg")
	deb := *kernel
	if deb == "" {
		cache, err := os.UserCacheDir()
		if err != nil {
			t.Fatal(err)
		}
		cache = filepath.Join(cache, "sealfs-dax-vm")
		found, _ := filepath.Glob(filepath.Join(cache, "linux-image-*.deb"))
		if len(found) == 0 {
			need(t, "apt-get", "apt")
			if err := os.MkdirAll(cache, 0o755); err != nil {
				t.Fatal(err)
			}
			out, err := exec.Command("apt-cache", "depends", "linux-image-cloud-amd64").Output()
			_, name, ok := strings.Cut(string(out), "Depends: ")
			if name, _, _ = strings.Cut(name, "\n"); err != nil || !ok {
				t.Fatalf("apt-cache knows no kernel linux-image-cloud-amd64 (%v): name a package with KERNEL=", err)
			}
			get := exec.Command("apt-get", "download", strings.TrimSpace(name))
			get.Dir = cache
			if out, err := get.CombinedOutput(); err != nil {
				t.Fatalf("%v: %v: %s; or name a package with KERNEL=", get, err, out)
			}
			found, _ = filepath.Glob(filepath.Join(cache, "linux-image-*.deb"))
		}
		if len(found) == 0 {
			t.Fatal("no package of a kernel was fetched; name one with KERNEL=")
		}
		deb = found[len(found)-1]
	}
	dir := t.TempDir()
	if out, err := exec.Command(unpack, "-x", deb, dir).CombinedOutput(); err != nil {
		t.Fatalf("%s: %v: %s", deb, err, out)
	}
	images, _ := filepath.Glob(dir + "/boot/vmlinuz-*")
	trees, _ := filepath.Glob(dir + "/lib/modules/*")
	if len(images) != 1 || len(trees) != 1 {
		t.Fatalf("%s holds %d kernels", deb, len(images))
	}
	return images[0], trees[0]
}

// initramfs writes what the guest's root file system is: this test as its first
// process, the programs, and modules in the order in which they are to be loaded.
func initramfs(t *testing.T, path, bin, modules string) {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	if f, err := elf.Open(self); err != nil || slices.ContainsFunc(f.Progs, func(p *elf.Prog) bool { return p.Type == elf.PT_INTERP }) {
		t.Fatalf("this test needs shared libraries (%v): build it with CGO_ENABLED=0", err)
	}
	files := map[string]string{"init": self, "bin/mkfs.ext4": need(t, "mkfs.ext4", "e2fsprogs")}
	for _, p := range []string{"sealfs", "sealfs-fsck"} {
		files["bin/"+p] = filepath.Join(bin, p)
	}
	out, err := exec.Command("ldd", files["bin/mkfs.ext4"]).Output()
	if err != nil {
		t.Fatalf("ldd: %v", err)
	}
	for word := range strings.FieldsSeq(string(out)) {
		if strings.HasPrefix(word, "/") {
			files[word[1:]] = word
		}
	}
	byName := map[string]string{}
	filepath.WalkDir(modules, func(path string, d fs.DirEntry, err error) error {
		if name, ok := strings.CutSuffix(filepath.Base(path), ".ko"); ok {
			byName[strings.ReplaceAll(name, "-", "_")] = path
		}
		return err
	})
	var order []string
	var load func(name string)
	load = func(name string) {
		path := byName[name]
		if path == "" || slices.Contains(order, filepath.Base(path)) {
			return // built in, or there already
		}
		f, err := elf.Open(path)
		if err != nil {
			t.Fatalf("module %s: %v", path, err)
		}
		info, err := f.Section(".modinfo").Data()
		f.Close()
		if err != nil {
			t.Fatalf("module %s: %v", path, err)
		}
		for line := range bytes.SplitSeq(info, []byte{0}) {
			if list, ok := strings.CutPrefix(string(line), "depends="); ok && list != "" {
				for dep := range strings.SplitSeq(list, ",") {
					load(strings.ReplaceAll(dep, "-", "_"))
				}
			}
		}
		order = append(order, filepath.Base(path))
		files["modules/"+filepath.Base(path)] = path
	}
	for _, name := range []string{"virtio_pci", "virtio_blk", "nfit", "nd_pmem", "fuse"} {
		load(name)
	}
	content := map[string][]byte{"modules/list": []byte(strings.Join(order, "\n"))}
	for name, path := range files {
		if content[name], err = os.ReadFile(path); err != nil {
			t.Fatal(err)
		}
	}
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	w := bufio.NewWriter(f)
	err = writeArchive(w, content)
	if err := errors.Join(err, w.Flush(), f.Close()); err != nil {
		t.Fatal(err)
	}
}

// writeArchive writes files, with their directories, in the cpio format of
// initramfs ("newc").
func writeArchive(w *bufio.Writer, content map[string][]byte) error {
	names := map[string]bool{}
	for name := range content {
		names[name] = true
		for dir := filepath.Dir(name); dir != "."; dir = filepath.Dir(dir) {
			names[dir] = true
		}
	}
	list := slices.Sorted(func(yield func(string) bool) {
		for name := range names {
			if !yield(name) {
				return
			}
		}
	})
	ino, written := 0, 0
	put := func(b []byte) {
		n, _ := w.Write(b) // Flush returns the error
		written += n
		for ; written%4 != 0; written++ {
			w.WriteByte(0)
		}
	}
	for _, name := range append(list, "TRAILER!!!") {
		ino++
		mode := 0o100755
		data, file := content[name]
		if !file {
			mode = 0o040755
		}
		head := fmt.Sprintf("070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%s\x00",
			ino, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name)+1, 0, name)
		put([]byte(head))
		put(data)
	}
	return w.Flush()
}

// guestRun is one life of the guest.
type guestRun struct {
	t                   *testing.T
	qemu, image, initrd string
	dir                 string
	rng                 *rand.Rand
}

// boot runs the guest until it has answered so many changes, then cuts its power; 0
// lets it end by itself. It returns the last change that was answered, and the one at
// which the guest began.
func (g *guestRun) boot(acked, more int) (began, last int) {
	t := g.t
	t.Helper()
	device, log := g.dir+"/device.img", g.dir+"/device.log"
	if err := os.WriteFile(log, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	final := ""
	if more == 0 {
		final = " powercut.last=1"
	}
	cmd := exec.Command(g.qemu, "-machine", "q35,nvdimm=on", "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m", "1G,slots=2,maxmem=4G",
		"-object", "memory-backend-file,id=memory,share=on,mem-path="+g.dir+"/pmem.img,size=512M", "-device", "nvdimm,memdev=memory,id=nvdimm",
		"-blockdev", "driver=file,node-name=file,cache.direct=off,filename="+device,
		"-blockdev", "driver=file,node-name=log,cache.direct=off,filename="+log,
		"-blockdev", "driver=blklogwrites,node-name=disk,file=file,log=log,log-sector-size=4096",
		"-device", "virtio-blk-pci,drive=disk,logical_block_size=4096,physical_block_size=4096",
		"-display", "none", "-monitor", "none", "-serial", "stdio", "-nic", "none", "-no-reboot",
		"-kernel", g.image, "-initrd", g.initrd,
		"-append", fmt.Sprintf("console=ttyS0 loglevel=4 panic=-1 powercut.acked=%d%s", acked, final))
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	var errs bytes.Buffer
	cmd.Stderr = &errs
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	silent := time.AfterFunc(guestSilence, func() { cmd.Process.Kill() })
	defer silent.Stop()
	began, last = -2, acked
	done, cut := false, false
	var tail []string
	lines := bufio.NewScanner(out)
	for lines.Scan() {
		silent.Reset(guestSilence)
		line := strings.TrimRight(lines.Text(), "\r")
		if tail = append(tail, line); len(tail) > 40 {
			tail = tail[1:]
		}
		_, said, ok := strings.Cut(line, mark)
		if !ok {
			continue
		}
		word, rest, _ := strings.Cut(said, " ")
		switch word {
		case "verified":
			began, err = strconv.Atoi(rest)
		case "ack":
			last, err = strconv.Atoi(rest)
			if more > 0 && !cut && last >= acked+more {
				cut = true
				cmd.Process.Kill() // nothing is flushed, nothing is told to the guest
			}
		case "done":
			done = true
		case "fail":
			t.Errorf("the guest: %s", rest)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	cmd.Wait() // it was killed, or has turned itself off
	if t.Failed() || more == 0 && !done || more > 0 && !cut {
		t.Fatalf("the guest ended too early: %s\nlast lines of its console:\n%s", errs.Bytes(), strings.Join(tail, "\n"))
	}
	return began, last
}

// guestSilence is how long a guest may say nothing: emulated, on a busy machine.
const guestSilence = 5 * time.Minute

// cut makes the device what a power cut leaves: all up to the last flush, and of
// what was written later each write by chance.
func (g *guestRun) cut(before string) (flushes, kept, lost int) {
	t := g.t
	t.Helper()
	l, err := openBlockLog(g.dir + "/device.log")
	if err != nil {
		t.Fatal(err)
	}
	defer l.f.Close()
	list := l.flushes()
	if len(list) == 0 {
		t.Fatal("the device was never flushed")
	}
	dev, err := os.OpenFile(before, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer dev.Close()
	durable := list[len(list)-1]
	if err := l.replay(dev, 0, durable, nil, 1); err != nil {
		t.Fatal(err)
	}
	if err := l.replay(dev, durable, len(l.entry), g.rng, 0.5); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(before, g.dir+"/device.img"); err != nil {
		t.Fatal(err)
	}
	return len(list), durable, len(l.entry) - durable
}

// TestDaxVM runs the real programs in a guest whose metadata lies on persistent
// memory, and cuts its power: SIGKILL of QEMU, which loses what its device was not
// told to flush and keeps every store to persistent memory that the guest has made.
// What was answered must be there, whether it was synced or not.
func TestDaxVM(t *testing.T) {
	if !*runDax {
		t.Skip("make dax-vm runs it")
	}
	bin := programs(t)
	g := &guestRun{t: t, qemu: need(t, "qemu-system-x86_64", "qemu-system-x86"), dir: t.TempDir(), rng: rand.New(rand.NewPCG(*seed, 0))}
	image, modules := findKernel(t)
	g.image, g.initrd = image, g.dir+"/initrd"
	initramfs(t, g.initrd, bin, modules)
	for name, size := range map[string]int64{"device.img": 512 << 20, "pmem.img": 512 << 20} {
		f, err := os.Create(g.dir + "/" + name)
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(f.Truncate(size), f.Close()); err != nil {
			t.Fatal(err)
		}
	}
	acked, begun := -1, time.Now()
	for round := range *rounds + 1 {
		before := g.dir + "/before.img"
		if out, err := exec.Command("cp", "--sparse=always", g.dir+"/device.img", before).CombinedOutput(); err != nil {
			t.Fatalf("cp: %v: %s", err, out)
		}
		more := 0
		if round < *rounds {
			more = 100 + g.rng.IntN(400)
		}
		start := time.Now()
		began, last := g.boot(acked, more)
		if more == 0 {
			t.Logf("round %d: verified at change %d; SIGKILL of the server, a clean end and a region cut short, %v", round+1, began, time.Since(start).Round(time.Second))
			break
		}
		flushes, kept, lost := g.cut(before)
		t.Logf("round %d: verified at change %d, power cut after change %d; the device kept %d of its writes up to flush %d, and some of %d later ones; %v",
			round+1, began, last, kept, flushes, lost, time.Since(start).Round(time.Second))
		acked = last
	}
	t.Logf("dax-vm: %d power cuts, no change that was answered was lost, %v", *rounds, time.Since(begun).Round(time.Second))
}
