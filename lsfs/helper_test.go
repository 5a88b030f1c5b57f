package lsfs

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"testing"

	"sealfs"
	"sealfs/disk"
	"sealfs/internal/enc"
	"sealfs/pmem"
)

// A tinyFS is the namespace of these tests: file number → one payload. Its
// values are address, length and a checksum of the content.
type tinyFS struct{}

func tinyKey(ino sealfs.Ino) []byte { return binary.BigEndian.AppendUint64([]byte("f"), uint64(ino)) }

type tinyFile struct {
	at  sealfs.LSN
	n   uint32
	crc uint32
}

func tinyGet(r pmem.Reader, ino sealfs.Ino) (tinyFile, bool, error) {
	v, err := pmem.Get(r, tinyKey(ino))
	if errors.Is(err, sealfs.ErrNotExist) {
		return tinyFile{}, false, nil
	}
	if err != nil {
		return tinyFile{}, false, err
	}
	in := enc.Reader{B: v}
	return tinyFile{sealfs.LSN(in.U64()), in.U32(), in.U32()}, true, nil
}

func tinySet(tx *Tx, ino sealfs.Ino, f tinyFile) error {
	return tx.Set(tinyKey(ino), enc.AppendU32(enc.AppendU32(enc.AppendU64(nil, uint64(f.at)), f.n), f.crc))
}

func (tinyFS) Live(r pmem.Reader, ino sealfs.Ino, off uint64, at sealfs.LSN, n uint32, fn func(Part)) error {
	f, ok, err := tinyGet(r, ino)
	if err == nil && ok && f.at == at && f.n == n {
		fn(Part{Off: off, At: at, Len: n})
	}
	return err
}

func (tinyFS) Move(tx *Tx, ino sealfs.Ino, p Part, to sealfs.LSN) (bool, error) {
	f, ok, err := tinyGet(tx, ino)
	if err != nil || !ok || f.at != p.At {
		return false, err
	}
	if err := errors.Join(tx.Retain(to, p.Len), tx.Release(p.At, p.Len)); err != nil {
		return false, err
	}
	f.at = to
	return true, tinySet(tx, ino, f)
}

// put writes a file, or removes it when data is nil.
type put struct {
	ino  sealfs.Ino
	data []byte
}

func (p put) Apply(tx *Tx) error {
	old, had, err := tinyGet(tx, p.ino)
	if err != nil {
		return err
	}
	if had {
		if err := tx.Release(old.at, old.n); err != nil {
			return err
		}
	}
	if p.data == nil {
		return tx.Delete(tinyKey(p.ino))
	}
	if err := tx.Retain(tx.Payload(), uint32(len(p.data))); err != nil {
		return err
	}
	return tinySet(tx, p.ino, tinyFile{tx.Payload(), uint32(len(p.data)), enc.CRC(0, p.data)})
}

func (s *Store) put(ino sealfs.Ino, data []byte) (sealfs.LSN, error) {
	in := &Intent{Op: binary.AppendUvarint(nil, uint64(ino)), Payload: data, PayloadCRC: enc.CRC(0, data), Ino: ino}
	if data == nil {
		in = &Intent{Op: in.Op, Class: Freeing}
	}
	return s.Update(in, put{ino, data})
}

// get reads a file and verifies it.
func (s *Store) get(ino sealfs.Ino) ([]byte, error) {
	var f tinyFile
	var ft Fetch
	found := false
	err := s.View(func(r pmem.Reader) (err error) {
		if f, found, err = tinyGet(r, ino); err != nil || !found {
			return err
		}
		ft = Fetch{At: f.at, Dst: make([]byte, f.n), Around: f.n < 8192}
		return s.Load(&ft)
	})
	if err != nil || !found {
		return nil, err
	}
	if err := s.Finish(&ft); err != nil {
		return nil, err
	}
	if enc.CRC(0, ft.Dst) != f.crc {
		return nil, fmt.Errorf("file %d at %v: %w", ino, f.at, sealfs.ErrCorrupt)
	}
	return ft.Dst, nil
}

// content is what file ino holds after its n-th write.
func content(ino sealfs.Ino, n, size int) []byte {
	b := bytes.Repeat([]byte(fmt.Sprintf("<%d:%d>", ino, n)), size/4+1)
	return b[:size]
}

// model is what a store must hold.
type model map[sealfs.Ino][]byte

// check compares the store with the model and its own structures with each other.
func (m model) check(s *Store) error {
	for ino, want := range m {
		got, err := s.get(ino)
		if err != nil {
			return err
		}
		if !bytes.Equal(got, want) {
			return fmt.Errorf("file %d holds %.20q, want %.20q", ino, got, want)
		}
	}
	return s.check(len(m))
}

// check verifies the structure of the store: the tree, the number of files,
// and that the live bytes of every segment are those of the files in it.
func (s *Store) check(files int) error {
	s.mu.RLock()
	defer s.mu.RUnlock()
	var errs []error
	if err := s.region.Check(func(p string) { errs = append(errs, errors.New(p)) }); err != nil {
		return err
	}
	live := map[uint32]int64{}
	n := 0
	var c pmem.Cursor
	for ok := c.Seek(s.region, []byte("f")); ok; ok = c.Next() {
		in := enc.Reader{B: c.Value()}
		live[sealfs.LSN(in.U64()).Seq()] += int64(in.U32())
		n++
	}
	errs = append(errs, c.Err())
	if n != files {
		errs = append(errs, fmt.Errorf("%d files, want %d", n, files))
	}
	var sum int64
	for slot, g := range s.segs {
		if int64(g.live) != live[g.seq] {
			errs = append(errs, fmt.Errorf("segment %d in slot %d: %d live bytes, want %d", g.seq, slot, g.live, live[g.seq]))
		}
		sum += int64(g.live)
		delete(live, g.seq)
	}
	if sum != s.live {
		errs = append(errs, fmt.Errorf("%d live bytes in all, want %d", s.live, sum))
	}
	for seq, n := range live {
		errs = append(errs, fmt.Errorf("%d bytes refer to segment %d, which is not there", n, seq))
	}
	return errors.Join(errs...)
}

const (
	testSegment = 64 << 10
	testRegion  = 1 << 20
)

func testDevices(segments int) (dev, region *disk.Sim) {
	return disk.NewSim("device", 1<<20+int64(segments)*testSegment), disk.NewSim("region", testRegion)
}

func testOptions() Options {
	return Options{StagingBytes: 2 * testSegment, CheckpointBytes: 128 << 10, CacheBytes: 1 << 20, manual: true}
}

func format(t testing.TB, dev, region disk.Device) {
	t.Helper()
	if _, err := Format(dev, pmem.NewMemory(region), Geometry{SegmentBytes: testSegment, Label: "test"}); err != nil {
		t.Fatal(err)
	}
}

func open(t testing.TB, dev, region disk.Device, kept *pmem.Staging, o Options) *Store {
	t.Helper()
	s, err := Open(dev, pmem.NewMemory(region), kept, tinyFS{}, o)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// unlessShort returns a test's size, which is less under -short.
func unlessShort(size, short int) int {
	if testing.Short() {
		return short
	}
	return size
}
