package disk

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"sealfs"
)

func TestAlignedBuffer(t *testing.T) {
	for _, n := range []int{0, 1, 511, 512, 513, 4095, 4096, 4097, 5000, 8192, 12288, 20000, 32768, 40000, 1 << 20, 3 << 20} {
		for range 20 {
			b := AlignedBuffer(n)
			if len(b) != n || cap(b) != n {
				t.Fatalf("AlignedBuffer(%d) has length %d and capacity %d", n, len(b), cap(b))
			}
			if n > 0 && misaligned(b) != 0 {
				t.Fatalf("AlignedBuffer(%d) is %d bytes off", n, misaligned(b))
			}
		}
	}
}

func TestCreateImage(t *testing.T) {
	path := filepath.Join(t.TempDir(), "image")
	for _, size := range []int64{-4096, 0, 512, 4097} {
		wantError(t, fmt.Sprintf("size %d", size), CreateImage(path, size), sealfs.ErrInvalid)
	}
	if err := CreateImage(path, 8<<30); err != nil {
		t.Fatal(err)
	}
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	if st.Size != 8<<30 || st.Blocks*512 > 1<<20 {
		t.Errorf("image of %d bytes occupies %d", st.Size, st.Blocks*512)
	}
	wantError(t, "a second time", CreateImage(path, 4096), sealfs.ErrExist)
	wantError(t, "no directory", CreateImage(filepath.Join(path+"x", "image"), 4096), sealfs.ErrNotExist)
}

func TestOpenRefuses(t *testing.T) {
	dir := t.TempDir()
	fifo := filepath.Join(dir, "fifo")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		path string
		code sealfs.Code
	}{
		{filepath.Join(dir, "none"), sealfs.ErrNotExist},
		{filepath.Join(fifo, "none"), sealfs.ErrNotDir},
		{dir, sealfs.ErrIsDir},
		{fifo, sealfs.ErrInvalid},
		{"/dev/null", sealfs.ErrInvalid},
	} {
		_, err := Open(c.path, OpenOptions{})
		wantError(t, c.path, err, c.code)
		if err != nil && !strings.Contains(err.Error(), c.path) {
			t.Errorf("error does not name the path: %v", err)
		}
	}
}

func TestReadOnly(t *testing.T) {
	path := filepath.Join(t.TempDir(), "image")
	if err := CreateImage(path, testSize); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, 0o400); err != nil {
		t.Fatal(err)
	}
	d := mustOpen(t, path, OpenOptions{ReadOnly: true, Direct: true})
	_, err := d.WriteAt(AlignedBuffer(4096), 0)
	wantError(t, "write", err, sealfs.ErrReadOnly)
	wantError(t, "flush", d.Flush(), sealfs.ErrReadOnly)
	wantError(t, "discard", d.Discard(0, 4096), sealfs.ErrReadOnly)
	mustRead(t, d, 3, 10)
}

// TestOddSize: an image whose length is not whole sectors loses the rest.
func TestOddSize(t *testing.T) {
	path := filepath.Join(t.TempDir(), "image")
	if err := os.WriteFile(path, make([]byte, 3*4096+100), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, direct := range []bool{false, true} {
		d := mustOpen(t, path, OpenOptions{Direct: direct})
		if d.Size() != 3*4096 {
			t.Errorf("direct %v: size %d", direct, d.Size())
		}
		if n, err := d.ReadAt(make([]byte, 200), 3*4096-50); n != 50 || err != io.EOF {
			t.Errorf("direct %v: read across the end: %d, %v", direct, n, err)
		}
	}
}

// TestShrunk: bytes that an image has lost since it was opened are an error, not
// its end.
func TestShrunk(t *testing.T) {
	for _, direct := range []bool{false, true} {
		d := openImage(t, OpenOptions{Direct: direct})
		if err := os.Truncate(d.Name(), 8192); err != nil {
			t.Fatal(err)
		}
		for _, off := range []int64{4096, 8192, 16384, 4097} {
			_, err := d.ReadAt(AlignedBuffer(8192), off)
			wantError(t, fmt.Sprintf("read at %d", off), err, sealfs.ErrIO)
		}
	}
}

// TestDirectFallsBack: tmpfs has no direct I/O, and File says so.
func TestDirectFallsBack(t *testing.T) {
	var fs unix.Statfs_t
	if err := unix.Statfs("/dev/shm", &fs); err != nil || fs.Type != unix.TMPFS_MAGIC {
		t.Skip("no tmpfs at /dev/shm")
	}
	dir, err := os.MkdirTemp("/dev/shm", "disktest")
	if err != nil {
		t.Skip(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	path := filepath.Join(dir, "image")
	if err := CreateImage(path, testSize); err != nil {
		t.Fatal(err)
	}
	d := mustOpen(t, path, OpenOptions{Direct: true})
	if d.Direct() {
		t.Error("direct I/O claimed on tmpfs")
	}
	testModel(t, d)
}

func TestDirect(t *testing.T) {
	d := openImage(t, OpenOptions{Direct: true})
	if !d.Direct() {
		t.Skipf("the file system of %s has no direct I/O", d.Name())
	}
	flags, err := unix.FcntlInt(d.f.Fd(), unix.F_GETFL, 0)
	if err != nil || flags&unix.O_DIRECT == 0 {
		t.Errorf("flags %#x lack O_DIRECT (%v)", flags, err)
	}
	// Aligned requests go straight, the others do not.
	seen := &witness{readerWriterAt: d.f}
	d.io = seen
	p := AlignedBuffer(8192)
	mustWrite(t, d, 4096, p)
	if seen.last != &p[0] {
		t.Error("an aligned write was copied")
	}
	if _, err := d.ReadAt(p, 4096); err != nil || seen.last != &p[0] {
		t.Errorf("an aligned read was copied (%v)", err)
	}
	if _, err := d.ReadAt(p[:100], 4096); err != nil || seen.last == &p[0] {
		t.Errorf("an unaligned read went straight (%v)", err)
	}
}

// witness notes the memory of the last request.
type witness struct {
	readerWriterAt
	last *byte
}

func (w *witness) ReadAt(p []byte, off int64) (int, error) {
	w.last = &p[0]
	return w.readerWriterAt.ReadAt(p, off)
}

func (w *witness) WriteAt(p []byte, off int64) (int, error) {
	w.last = &p[0]
	return w.readerWriterAt.WriteAt(p, off)
}

func TestLock(t *testing.T) {
	path := filepath.Join(t.TempDir(), "image")
	if err := CreateImage(path, testSize); err != nil {
		t.Fatal(err)
	}
	alone, shared := OpenOptions{Exclusive: true}, OpenOptions{Exclusive: true, ReadOnly: true}
	refused := func(o OpenOptions) {
		t.Helper()
		_, err := Open(path, o)
		wantError(t, "open of a locked image", err, sealfs.ErrBusy)
		for _, want := range []string{path, fmt.Sprintf("process %d", os.Getpid())} {
			if err != nil && !strings.Contains(err.Error(), want) {
				t.Errorf("error %q does not say %q", err, want)
			}
		}
	}
	d := mustOpen(t, path, alone)
	refused(alone)
	refused(shared)
	mustOpen(t, path, OpenOptions{}) // does not ask for the lock
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	r1, r2 := mustOpen(t, path, shared), mustOpen(t, path, shared)
	refused(alone)
	if err := errors.Join(r1.Close(), r2.Close()); err != nil {
		t.Fatal(err)
	}
	mustOpen(t, path, alone)
}

// breaking fails the next write with an error of the system after some bytes.
type breaking struct {
	readerWriterAt
	errno unix.Errno
}

func (b *breaking) WriteAt(p []byte, off int64) (int, error) {
	if b.errno == 0 {
		return b.readerWriterAt.WriteAt(p, off)
	}
	err := &os.PathError{Op: "write", Err: b.errno}
	b.errno = 0
	return 512, err
}

func TestFileLatch(t *testing.T) {
	for _, o := range []OpenOptions{{}, {Direct: true}} {
		d := openImage(t, o)
		mustWrite(t, d, 0, fill(4096, 1))
		d.io = &breaking{d.f, unix.ENOSPC}
		n, err := d.WriteAt(fill(8192, 2), 0)
		wantError(t, "write", err, sealfs.ErrNoSpace)
		if n != 512 {
			t.Errorf("%d bytes written, want 512", n)
		}
		_, err = d.WriteAt(AlignedBuffer(4096), 0)
		wantError(t, "write after a failure", err, sealfs.ErrNoSpace)
		wantError(t, "flush after a failure", d.Flush(), sealfs.ErrNoSpace)
		wantError(t, "discard after a failure", d.Discard(0, 4096), sealfs.ErrNoSpace)
		mustRead(t, d, 0, 4096)
		if s := d.Stats(); s.Writes != 1 || s.Flushes != 0 || s.Discards != 0 {
			t.Errorf("failures were counted: %+v", s)
		}
		d = mustOpen(t, d.Name(), o)
		mustWrite(t, d, 0, fill(4096, 3))
		mustFlush(t, d)
	}
}

// TestFlushLatch flushes a descriptor that cannot be flushed, from many sides at
// once: none may be told that it worked.
func TestFlushLatch(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	d := openImage(t, OpenOptions{})
	mustWrite(t, d, 0, AlignedBuffer(4096))
	image := d.f
	d.f = w
	defer image.Close()
	var wg sync.WaitGroup
	for range 16 {
		wg.Go(func() {
			if err := d.Flush(); !errors.Is(err, sealfs.ErrIO) {
				t.Errorf("flush: %v, want %v", err, sealfs.ErrIO)
			}
		})
	}
	wg.Wait()
	_, err = d.WriteAt(AlignedBuffer(4096), 0)
	wantError(t, "write after a failed flush", err, sealfs.ErrIO)
}

// TestLoop runs the contract on a real block device.
func TestLoop(t *testing.T) {
	path := loopDevice(t, testSize)
	for _, o := range []OpenOptions{{Exclusive: true}, {Exclusive: true, Direct: true}} {
		d := mustOpen(t, path, o)
		if !d.Block() || d.Direct() != o.Direct {
			t.Errorf("block %v, direct %v; asked for %+v", d.Block(), d.Direct(), o)
		}
		_, err := Open(path, OpenOptions{Exclusive: true})
		wantError(t, "second exclusive open", err, sealfs.ErrBusy)
		if who := fmt.Sprintf("process %d", os.Getpid()); err != nil && !strings.Contains(err.Error(), who) {
			t.Errorf("error %q does not say %q", err, who)
		}
		mustWrite(t, d, 0, make([]byte, testSize))
		testModel(t, d)
		testRange(t, d)
		testDiscard(t, d)
		testConcurrentFresh(t, d)
		testClose(t, d)
	}
}

// testConcurrentFresh is testConcurrent on a device opened anew, for its counts.
func testConcurrentFresh(t *testing.T, d *File) {
	testConcurrent(t, mustOpen(t, d.Name(), OpenOptions{Direct: d.Direct()}))
}

// TestMountedLoop: a mounted device and the image below it are seen as such.
func TestMountedLoop(t *testing.T) {
	loop := loopDevice(t, 8<<20)
	if at, err := Mounted(loop); at != "" || err != nil {
		t.Fatalf("Mounted = %q, %v before the mount", at, err)
	}
	if out, err := exec.Command("mkfs.ext4", "-q", loop).CombinedOutput(); err != nil {
		t.Skipf("mkfs.ext4: %v: %s", err, out)
	}
	dir := filepath.Join(t.TempDir(), "mount point")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount(loop, dir, "ext4", 0, ""); err != nil {
		t.Skipf("mount: %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	backing, err := os.ReadFile(filepath.Join("/sys/block", filepath.Base(loop), "loop/backing_file"))
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{loop, strings.TrimSpace(string(backing))} {
		if at, err := Mounted(path); at != dir || err != nil {
			t.Errorf("Mounted(%s) = %q, %v; want %q", path, at, err, dir)
		}
	}
	_, err = Open(loop, OpenOptions{Exclusive: true})
	wantError(t, "exclusive open of a mounted device", err, sealfs.ErrBusy)
	if err != nil && !strings.Contains(err.Error(), dir) {
		t.Errorf("error %q does not name the mount point", err)
	}
}

// loopDevice returns a loop device over a fresh image.
func loopDevice(t *testing.T, size int64) string {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("loop devices need root")
	}
	image := filepath.Join(t.TempDir(), "image")
	if err := CreateImage(image, size); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("losetup", "--find", "--show", image).Output()
	if err != nil {
		t.Skipf("losetup: %v", err)
	}
	loop := strings.TrimSpace(string(out))
	t.Cleanup(func() {
		if out, err := exec.Command("losetup", "--detach", loop).CombinedOutput(); err != nil {
			t.Errorf("losetup --detach: %v: %s", err, out)
		}
	})
	return loop
}

func TestMountedNot(t *testing.T) {
	path := filepath.Join(t.TempDir(), "image")
	if err := os.WriteFile(path, bytes.Repeat([]byte{1}, 4096), 0o600); err != nil {
		t.Fatal(err)
	}
	if at, err := Mounted(path); at != "" || err != nil {
		t.Errorf("Mounted of a plain file = %q, %v", at, err)
	}
	_, err := Mounted(path + "x")
	wantError(t, "Mounted of nothing", err, sealfs.ErrNotExist)
	if got := unescape(`/a\040b\134c\0`); got != `/a b\c\0` {
		t.Errorf("unescaped to %q", got)
	}
}
