package pmem

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"

	"sealfs"
	"sealfs/internal/enc"
	"sealfs/pmem/layout"
)

// StagingHeader says whose ring it is, and its shape.
type StagingHeader struct {
	Store        sealfs.UUID
	Incarnation  uint32
	BootID       [16]byte // of the boot in which it was created; zero on persistent memory
	SegmentBytes uint32   // size of a chunk: a multiple of the page size
	Chunks       uint32   // at most layout.StagingChunksMax
}

func (h *StagingHeader) check() error {
	if h.SegmentBytes == 0 || h.SegmentBytes%PageSize != 0 || h.Chunks == 0 || h.Chunks > layout.StagingChunksMax {
		return fmt.Errorf("staging of %d chunks of %d bytes: %w", h.Chunks, h.SegmentBytes, sealfs.ErrInvalid)
	}
	return nil
}

// Lasting reports whether the ring was written as persistent memory, wherever it is
// now: it is of use after every boot, and of the last record any part may be missing.
func (h *StagingHeader) Lasting() bool { return h.BootID == [16]byte{} }

func (h *StagingHeader) bytes() int { return PageSize + int(h.SegmentBytes)*int(h.Chunks) }

// Staging is the memory of the log's ring: a header page with the number of the
// segment that each chunk holds, and the chunks. In a file on tmpfs it survives
// the death of all processes, and nothing more; on persistent memory also power
// cuts. It does not synchronize access to the chunks' bytes.
type Staging struct {
	path          string // "" if it is no file
	header        StagingHeader
	mem           []byte
	pm            *medium      // nil but on persistent memory
	sync, release func() error // nil on the heap
	remove        func() error
}

// StagingChunksMax is the largest number of chunks of a ring.
const StagingChunksMax = layout.StagingChunksMax

// CreateStaging makes a new ring in the file at path (mode 0600), in place of
// one that is there. Its memory is reserved: ErrNoSpace if there is not enough.
func CreateStaging(path string, h StagingHeader) (*Staging, error) {
	return createStaging(path, h, func(f *os.File) error {
		// Without the reservation a full tmpfs would kill the process at a store.
		err := unix.Fallocate(int(f.Fd()), 0, 0, int64(h.bytes()))
		if errors.Is(err, unix.EOPNOTSUPP) {
			err = f.Truncate(int64(h.bytes()))
		}
		return err
	}, mapStaging)
}

// createStaging is CreateStaging with its own way to reserve and map the file.
func createStaging(path string, h StagingHeader, reserve func(*os.File) error, mapping mapStagingFunc) (*Staging, error) {
	if err := h.check(); err != nil {
		return nil, err
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, stagingError("replace", path, err)
	}
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, stagingError("create", path, err)
	}
	defer f.Close()
	if err := reserve(f); err != nil {
		os.Remove(path)
		return nil, stagingError("reserve", path, err)
	}
	s, err := mapping(f, path, h)
	if err != nil {
		os.Remove(path)
		return nil, err
	}
	s.putHeader()
	return s, nil
}

// mapStagingFunc maps all of a ring's file.
type mapStagingFunc func(f *os.File, path string, h StagingHeader) (*Staging, error)

// putHeader stores the header.
func (s *Staging) putHeader() {
	n := copy(s.mem, encodeStaging(s.header))
	if s.pm != nil {
		s.pm.flush(s.mem, 0, n)
		s.pm.fence()
	}
}

// OpenStaging opens a ring that CreateStaging made. Errors: ErrNotExist;
// ErrCorrupt if its header does not verify; ErrVersion.
func OpenStaging(path string) (*Staging, error) { return openStaging(path, mapStaging) }

func openStaging(path string, mapping mapStagingFunc) (*Staging, error) {
	f, err := os.OpenFile(path, os.O_RDWR|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil, stagingError("open", path, err)
	}
	defer f.Close()
	b := make([]byte, layout.StagingSeqOff)
	n, _ := f.ReadAt(b, 0)
	h, err := decodeStaging(path, b[:n])
	if err != nil {
		return nil, err
	}
	st, err := f.Stat()
	if err != nil {
		return nil, stagingError("open", path, err)
	}
	if st.Size() != int64(h.bytes()) {
		return nil, &sealfs.Corruption{Where: path, Off: -1, What: "staging size",
			Want: uint64(h.bytes()), Got: uint64(st.Size())}
	}
	return mapping(f, path, h)
}

func mapStaging(f *os.File, path string, h StagingHeader) (*Staging, error) {
	mem, sync, release, err := mapShared(f, h.bytes())
	if err != nil {
		return nil, stagingError("map", path, err)
	}
	return &Staging{path: path, header: h, mem: mem, sync: sync, release: release, remove: func() error { return os.Remove(path) }}, nil
}

// NewStaging returns a ring on the heap. It panics if h's shape is invalid.
func NewStaging(h StagingHeader) *Staging {
	if err := h.check(); err != nil {
		panic(err)
	}
	s := &Staging{header: h, mem: make([]byte, h.bytes())}
	s.putHeader()
	return s
}

// Find returns which byte of the ring's file stands at an address of the
// process's memory, -1 if none does.
func (s *Staging) Find(addr uintptr) int64 { return offsetIn(s.mem, addr) }

// offsetIn returns where in mem an address lies, -1 for outside.
func offsetIn(mem []byte, addr uintptr) int64 {
	if base := uintptr(unsafe.Pointer(unsafe.SliceData(mem))); addr >= base && addr-base < uintptr(len(mem)) {
		return int64(addr - base)
	}
	return -1
}

// Header returns what the ring was created with.
func (s *Staging) Header() StagingHeader { return s.header }

// Chunk returns the memory of chunk i, SegmentBytes long; in a mapping it starts
// at a page. It must not be used after Close.
func (s *Staging) Chunk(i int) []byte {
	n := int(s.header.SegmentBytes)
	off := PageSize + i*n
	return s.mem[off : off+n : off+n]
}

// seq returns the place of chunk i's sequence number. The mapping and the heap
// both align it.
func (s *Staging) seq(i int) *uint32 {
	off := layout.StagingSeqOff + 4*i
	return (*uint32)(unsafe.Pointer(unsafe.SliceData(s.mem[off : off+4 : PageSize])))
}

// ChunkSeq returns the sequence number of the segment in chunk i, 0 for none.
func (s *Staging) ChunkSeq(i int) uint32 { return atomic.LoadUint32(s.seq(i)) }

// SetChunkSeq notes which segment chunk i holds. Stores to the chunk that follow
// are seen, and on persistent memory durable, after it.
func (s *Staging) SetChunkSeq(i int, seq uint32) {
	atomic.StoreUint32(s.seq(i), seq)
	if s.pm != nil {
		off := layout.StagingSeqOff + 4*i
		s.pm.flush(s.mem, off, off+4)
		s.pm.fence()
	}
}

// Store copies b, whole lines, to byte off of chunk i, which begins a line: on
// persistent memory it is durable after Fence.
func (s *Staging) Store(i, off int, b []byte) {
	at := PageSize + i*int(s.header.SegmentBytes) + off
	if s.pm == nil {
		copy(s.mem[at:], b)
		return
	}
	s.pm.store(s.mem[at:at+len(b)], b)
}

// Fence returns when what Store stored is durable, on persistent memory.
func (s *Staging) Fence() {
	if s.pm != nil {
		s.pm.fence()
	}
}

// Settle makes n bytes at off of chunk i durable, and that the chunk holds its
// segment: bytes that a process has left which may have died before its fence.
// On memory that is not persistent it does nothing.
func (s *Staging) Settle(i, off, n int) {
	if s.pm == nil {
		return
	}
	lo := PageSize + i*int(s.header.SegmentBytes)
	s.pm.flush(s.mem, 0, layout.StagingSeqOff+4*(i+1))
	s.pm.flush(s.mem, lo, lo+PageSize) // the header of the segment
	s.pm.flush(s.mem, lo+off, lo+off+n)
	s.pm.fence()
}

// word returns the place of an aligned 8-byte word of the header page.
func (s *Staging) word(off int) *uint64 {
	return (*uint64)(unsafe.Pointer(unsafe.SliceData(s.mem[off : off+8 : PageSize])))
}

// SetTail notes up to where the log has been written to the ring.
func (s *Staging) SetTail(tail uint64) {
	atomic.StoreUint64(s.word(layout.StagingTailOff), tail)
	atomic.StoreUint64(s.word(layout.StagingTailOff+8), ^tail)
}

// Tail returns what SetTail noted last, 0 if it is not known: it was never
// called, or the process died in it.
func (s *Staging) Tail() uint64 {
	tail := atomic.LoadUint64(s.word(layout.StagingTailOff))
	if atomic.LoadUint64(s.word(layout.StagingTailOff+8)) != ^tail {
		return 0
	}
	return tail
}

// Clone returns a copy on the heap: what another process would find after this
// one's death at this instant.
func (s *Staging) Clone() *Staging {
	return &Staging{header: s.header, mem: append([]byte(nil), s.mem...)}
}

// Close unmaps the ring, and with remove deletes its file.
func (s *Staging) Close(remove bool) error {
	var err error
	if s.release != nil {
		if !remove {
			err = s.sync()
		}
		if e := s.release(); err == nil {
			err = e
		}
	}
	s.mem = nil
	if remove && s.remove != nil {
		if e := s.remove(); err == nil {
			err = e
		}
	}
	if err != nil {
		return stagingError("close", s.path, err)
	}
	return nil
}

func stagingError(what, path string, err error) error {
	return fileError(what+" staging", path, err)
}

func encodeStaging(h StagingHeader) []byte {
	b := make([]byte, 0, layout.StagingSeqOff)
	b = append(b, layout.StagingMagic...)
	b = enc.AppendU32(b, layout.Version)
	b = enc.AppendU32(b, h.Incarnation)
	b = append(b, h.Store[:]...)
	b = append(b, h.BootID[:]...)
	b = enc.AppendU32(b, h.SegmentBytes)
	b = enc.AppendU32(b, h.Chunks)
	b = b[:layout.StagingSeqOff]
	binary.LittleEndian.PutUint32(b[layout.StagingCRCOff:], enc.CRC(0, b[:layout.StagingCRCOff]))
	return b
}

func decodeStaging(path string, b []byte) (StagingHeader, error) {
	bad := func(what string, want, got uint64) (StagingHeader, error) {
		return StagingHeader{}, &sealfs.Corruption{Where: path, Off: 0, What: what, Want: want, Got: got}
	}
	if len(b) < layout.StagingSeqOff || string(b[:8]) != layout.StagingMagic {
		return bad("staging header magic", 0, 0)
	}
	if want, got := enc.CRC(0, b[:layout.StagingCRCOff]), binary.LittleEndian.Uint32(b[layout.StagingCRCOff:]); want != got {
		return bad("staging header checksum", uint64(want), uint64(got))
	}
	var h StagingHeader
	r := enc.Reader{B: b[8:]}
	if v := r.U32(); v != layout.Version {
		return h, fmt.Errorf("staging %s has format version %d, this program knows version %d: %w",
			path, v, layout.Version, sealfs.ErrVersion)
	}
	h.Incarnation = r.U32()
	copy(h.Store[:], r.Bytes(16))
	copy(h.BootID[:], r.Bytes(16))
	h.SegmentBytes = r.U32()
	h.Chunks = r.U32()
	if err := h.check(); err != nil {
		return bad("staging shape", 0, 0)
	}
	return h, nil
}

// BootID returns the kernel's identifier of the present boot.
func BootID() ([16]byte, error) {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return [16]byte{}, fmt.Errorf("boot id: %w (%v)", sealfs.ErrIO, err)
	}
	u, err := sealfs.ParseUUID(strings.TrimSpace(string(b)))
	if err != nil {
		return [16]byte{}, fmt.Errorf("boot id: %w (%v)", sealfs.ErrIO, err)
	}
	return u, nil
}
