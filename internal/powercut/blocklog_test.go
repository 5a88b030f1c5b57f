package powercut

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"testing"
)

// A blockLog is what QEMU's blklogwrites notes of a device: every write and flush
// in order, in the format of Linux's dm-log-writes.
//
//	superblock, one sector  8 magic, 8 version 1, 8 number of entries, 4 sector size
//	entry, one sector       8 sector, 8 sectors, 8 flags, 8 unused; then its data
type blockLog struct {
	f      *os.File
	sector int64
	entry  []logEntry
}

type logEntry struct {
	off, n int64 // bytes of the device
	flags  uint64
	data   int64 // where they stand in the log
}

const (
	logMagic   = 0x6a736677736872
	logFlush   = 1
	logFUA     = 2
	logDiscard = 4
	logMark    = 8
)

func openBlockLog(path string) (*blockLog, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	b := make([]byte, 32)
	if _, err := f.ReadAt(b[:28], 0); err != nil {
		return nil, fmt.Errorf("log of writes %s: %w", path, err)
	}
	le := binary.LittleEndian
	if le.Uint64(b) != logMagic || le.Uint64(b[8:]) != 1 {
		return nil, fmt.Errorf("%s is no log of writes", path)
	}
	l := &blockLog{f: f, sector: int64(le.Uint32(b[24:]))}
	at, counted := l.sector, int(le.Uint64(b[16:]))
	for {
		// The superblock is written with each flush; later entries end with the file,
		// or where QEMU died before it wrote one.
		_, err := f.ReadAt(b, at)
		if len(l.entry) < counted && err != nil {
			return nil, fmt.Errorf("log of writes %s: %w", path, err)
		}
		if len(l.entry) >= counted && (err != nil || bytes.Equal(b, make([]byte, len(b)))) {
			return l, nil
		}
		e := logEntry{off: int64(le.Uint64(b)) * l.sector, n: int64(le.Uint64(b[8:])) * l.sector, flags: le.Uint64(b[16:]), data: at + l.sector}
		at = e.data
		if e.flags&logDiscard == 0 {
			at += e.n
		}
		l.entry = append(l.entry, e)
	}
}

// flushes returns the number of entries up to and with each flush.
func (l *blockLog) flushes() []int {
	var list []int
	for i, e := range l.entry {
		if e.flags&logFlush != 0 {
			list = append(list, i+1)
		}
	}
	return list
}

// replay executes entries [from, to) on dev, each with the chance of kept.
func (l *blockLog) replay(dev *os.File, from, to int, rng *rand.Rand, kept float64) error {
	for _, e := range l.entry[from:to] {
		if e.flags&(logDiscard|logMark) != 0 || e.n == 0 || kept < 1 && rng.Float64() >= kept {
			continue
		}
		b := make([]byte, e.n)
		if _, err := l.f.ReadAt(b, e.data); err != nil && err != io.EOF {
			return err
		}
		if _, err := dev.WriteAt(b, e.off); err != nil {
			return err
		}
	}
	return nil
}

// TestBlockLog reads a log made by hand.
func TestBlockLog(t *testing.T) {
	dir := t.TempDir()
	le := binary.LittleEndian
	b := make([]byte, 512)
	le.PutUint64(b, logMagic)
	le.PutUint64(b[8:], 1)
	le.PutUint64(b[16:], 2) // the last one comes after the last flush
	le.PutUint32(b[24:], 512)
	add := func(sector, n, flags uint64, data byte) {
		e := make([]byte, 512)
		le.PutUint64(e, sector)
		le.PutUint64(e[8:], n)
		le.PutUint64(e[16:], flags)
		b = append(append(b, e...), bytes.Repeat([]byte{data}, int(n)*512)...)
	}
	add(2, 2, 0, 'a')
	add(0, 0, logFlush, 0)
	add(3, 1, 0, 'b')
	if err := os.WriteFile(dir+"/log", b, 0o600); err != nil {
		t.Fatal(err)
	}
	l, err := openBlockLog(dir + "/log")
	if err != nil {
		t.Fatal(err)
	}
	if got := l.flushes(); len(got) != 1 || got[0] != 2 {
		t.Errorf("flushes %v", got)
	}
	for to, want := range []string{"\x00\x00\x00\x00", "\x00\x00aa", "\x00\x00aa", "\x00\x00ab"} {
		dev, err := os.Create(dir + "/dev")
		if err != nil {
			t.Fatal(err)
		}
		if err := dev.Truncate(4 * 512); err != nil {
			t.Fatal(err)
		}
		if err := l.replay(dev, 0, to, nil, 1); err != nil {
			t.Fatal(err)
		}
		got := make([]byte, 4)
		for i := range got {
			if _, err := dev.ReadAt(got[i:i+1], int64(i)*512); err != nil {
				t.Fatal(err)
			}
		}
		if string(got) != want {
			t.Errorf("after %d entries %q, want %q", to, got, want)
		}
		dev.Close()
	}
}
