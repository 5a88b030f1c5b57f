package wire

import (
	"encoding/binary"
	"errors"
	"io"
	"math/bits"
	"net"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"sealfs"
	"sealfs/internal/enc"
)

// This file holds what both ends share: page buffers, counters, the inbox that
// cuts a byte stream into frames, the outbox that gathers frames into writes,
// and the watch over a peer that went silent or does not read.

// Stats counts what one connection, or all connections of a server, did.
type Stats struct {
	FramesIn, FramesOut uint64
	BytesIn, BytesOut   uint64
	Reads, Writes       uint64 // calls on the socket that moved bytes

	// Wakeups counts goroutines that had to be woken or started for a request:
	// at a client callers whose reply another caller read, at a server requests
	// that did not run on the reader's goroutine.
	Wakeups uint64
	// Handoffs counts how often the role of reader went to another goroutine.
	Handoffs uint64
}

// Add adds what o counted to s.
func (s *Stats) Add(o Stats) {
	s.FramesIn += o.FramesIn
	s.FramesOut += o.FramesOut
	s.BytesIn += o.BytesIn
	s.BytesOut += o.BytesOut
	s.Reads += o.Reads
	s.Writes += o.Writes
	s.Wakeups += o.Wakeups
	s.Handoffs += o.Handoffs
}

// counters is the living form of Stats, one per connection.
type counters struct {
	framesIn, framesOut, bytesIn, bytesOut, reads, writes, wakeups, handoffs atomic.Uint64
}

func (c *counters) stats() Stats {
	return Stats{
		FramesIn: c.framesIn.Load(), FramesOut: c.framesOut.Load(),
		BytesIn: c.bytesIn.Load(), BytesOut: c.bytesOut.Load(),
		Reads: c.reads.Load(), Writes: c.writes.Load(),
		Wakeups: c.wakeups.Load(), Handoffs: c.handoffs.Load(),
	}
}

// A buffer is room for a payload, aligned to pages, from a pool.
type buffer struct {
	b     []byte // of the class's full size
	class int
}

// bufferPools[i] holds buffers of sealfs.BlockSize << i bytes, up to the first
// power of two that holds the largest payload or head.
var bufferPools [10]sync.Pool

// getBuffer returns a buffer with at least n ≤ payloadMax bytes.
func getBuffer(n int) *buffer {
	class := bits.Len(uint(max(n, 1)-1) / sealfs.BlockSize)
	if p, _ := bufferPools[class].Get().(*buffer); p != nil {
		return p
	}
	// Go's allocator aligns powers of two from a page on to a page;
	// TestBufferAlignment would notice if that changed.
	return &buffer{b: make([]byte, sealfs.BlockSize<<class), class: class}
}

// free gives p back; nil is allowed.
func (p *buffer) free() {
	if p != nil {
		bufferPools[p.class].Put(p)
	}
}

// inboxSize is the room for what was read and not yet looked at: some hundred
// small frames, or several with a block of data.
const inboxSize = 32 << 10

// inbox cuts what is read from a connection into frames. It has no lock: it
// belongs to whoever has the connection's role of reader.
//
// A read deadline interrupts only the wait for a frame that is not there. Once
// a frame must be read on, the deadline is lifted.
type inbox struct {
	nc   net.Conn
	n    *counters
	buf  []byte  // inboxSize bytes
	r, w int     // buf[r:w] was read from the connection and is not yet used
	long *buffer // holds a head that is longer than buf
}

// fill reads once from the connection. There must be room behind w.
func (in *inbox) fill() error {
	if in.r == in.w {
		in.r, in.w = 0, 0
	}
	n, err := in.nc.Read(in.buf[in.w:])
	if n > 0 {
		in.n.reads.Add(1)
		in.n.bytesIn.Add(uint64(n))
		in.w += n
		return nil
	}
	if err == nil {
		return io.ErrNoProgress
	}
	return err
}

// need reads until n ≤ inboxSize bytes stand in the buffer.
func (in *inbox) need(n int) error {
	for in.w-in.r < n {
		if in.r > 0 && in.r+n > len(in.buf) {
			in.w = copy(in.buf, in.buf[in.r:in.w])
			in.r = 0
		}
		if err := in.fill(); err != nil {
			if errors.Is(err, io.EOF) && in.w > in.r {
				return io.ErrUnexpectedEOF
			}
			return err
		}
	}
	return nil
}

// ready reports whether a whole frame stands in the buffer, so that reading it
// waits for nobody. It believes the lengths: reading the frame will check them.
func (in *inbox) ready() bool {
	b := in.buf[in.r:in.w]
	return len(b) >= headerSize && uint64(len(b)) >= headerSize+
		uint64(binary.LittleEndian.Uint32(b[16:]))+uint64(binary.LittleEndian.Uint32(b[20:]))
}

// next returns the header and the checked head of the next frame. The caller
// reads its payload next, if it has one. The head is valid until the next call.
// After os.ErrDeadlineExceeded next may be called again.
func (in *inbox) next() (header, []byte, error) {
	in.long.free()
	in.long = nil
	if err := in.need(headerSize); err != nil {
		return header{}, nil, err
	}
	h, err := parseHeader(in.buf[in.r:])
	if err != nil {
		return header{}, nil, err
	}
	var head []byte
	if n := headerSize + int(h.headLen); n <= len(in.buf) {
		if err := in.need(n); err != nil {
			return header{}, nil, err
		}
		head = in.buf[in.r+headerSize : in.r+n]
		in.r += n
	} else {
		in.r += headerSize
		in.long = getBuffer(int(h.headLen))
		head = in.long.b[:h.headLen]
		if err := in.read(head); err != nil {
			return header{}, nil, err
		}
	}
	in.n.framesIn.Add(1)
	if got := enc.CRC(0, head); got != h.headCRC {
		return header{}, nil, damaged("head checksum", h.headCRC, got)
	}
	return h, head, nil
}

// payload reads and checks the payload of the frame that next returned: p is as long as it is.
func (in *inbox) payload(h *header, p []byte) error {
	if err := in.read(p); err != nil {
		return err
	}
	if got := enc.CRC(0, p); got != h.payloadCRC {
		return damaged("payload checksum", h.payloadCRC, got)
	}
	return nil
}

// read fills p, first from the buffer and then straight from the connection.
func (in *inbox) read(p []byte) error {
	n := copy(p, in.buf[in.r:in.w])
	in.r += n
	for n < len(p) {
		m, err := in.nc.Read(p[n:])
		n += m
		switch {
		case m > 0:
			in.n.reads.Add(1)
			in.n.bytesIn.Add(uint64(m))
		case errors.Is(err, os.ErrDeadlineExceeded):
			if err := in.nc.SetReadDeadline(time.Time{}); err != nil {
				return err
			}
		case errors.Is(err, io.EOF):
			return io.ErrUnexpectedEOF
		case err != nil:
			return err
		default:
			return io.ErrNoProgress
		}
	}
	return nil
}

// discard reads n bytes and forgets them.
func (in *inbox) discard(n int) error {
	var scrap [4096]byte
	for n > 0 {
		m := min(n, len(scrap))
		if err := in.read(scrap[:m]); err != nil {
			return err
		}
		n -= m
	}
	return nil
}

const (
	// copyMax is the longest payload that is copied behind its head; for longer
	// ones another element of the gathering write is cheaper.
	copyMax = 512
	// writeMax is the size, in bytes, from which on a batch goes in several
	// writes, so that each of them is progress that the watch can see.
	writeMax = 1 << 20
	// keepMax is the largest frame room that is kept for the next batch.
	keepMax = 256 << 10
	// roundsMax is how many batches one caller writes before another goroutine
	// goes on, so that no caller writes for others forever.
	roundsMax = 16
)

// outbox gathers frames into writes without a goroutine of its own: who adds a
// frame while nobody writes becomes the writer; what others add meanwhile is
// the next batch, and goes in one gathering write.
type outbox struct {
	nc net.Conn
	n  *counters
	// wrote, if set, is told of every batch that left or was dropped.
	wrote func(frames int, charge int64)
	// failed is told, once, of the first failed write. Neither is called with mu held.
	failed func(error)

	mu      sync.Mutex
	changed sync.Cond   // after every batch and at the end of writing
	queue   batch       // being gathered
	spare   batch       // room for the next
	seq     uint64      // of the batch being gathered, from 1
	gone    uint64      // batches up to this one left or were dropped: their payloads are no longer used
	err     error       // nothing is written any more
	writing atomic.Bool // somebody has the role of writer; changes under mu

	vec, part net.Buffers // of the writer
}

// batch is a sequence of frames.
type batch struct {
	text   []byte // headers, heads and short payloads
	cuts   []cut  // where long payloads belong
	frames int
	charge int64 // what the frames hold of the server's memory budget
}

// cut is a payload that stands between text[:at] and text[at:].
type cut struct {
	at      int
	payload []byte
	room    *buffer // to be freed once written; may be nil
}

func (o *outbox) init(nc net.Conn, n *counters) {
	o.nc, o.n, o.seq = nc, n, 1
	o.changed.L = &o.mu
}

// add queues a frame; flush sends it. A payload of more than copyMax bytes is
// not copied: it must stay as it is until released(the returned number), and is
// freed then if room is set. A head that is too long is refused with ErrInvalid and
// nothing is queued or freed. After the end of the connection frames are dropped.
func (o *outbox) add(h header, head appender, payload []byte, room *buffer, charge int64) (uint64, error) {
	if len(payload) > 0 {
		h.payloadLen, h.payloadCRC = uint32(len(payload)), enc.CRC(0, payload)
	}
	o.mu.Lock()
	text, err := appendFrame(o.queue.text, &h, head)
	if err != nil {
		o.mu.Unlock()
		return 0, err
	}
	q := &o.queue
	q.text = text
	q.frames++
	q.charge += charge
	var seq uint64
	if len(payload) <= copyMax {
		q.text = append(q.text, payload...)
		room.free()
	} else {
		q.cuts = append(q.cuts, cut{len(q.text), payload, room})
		seq = o.seq
	}
	if o.err != nil && !o.writing.Load() {
		o.drop()
	}
	o.mu.Unlock()
	return seq, nil
}

// take closes the batch being gathered. Requires mu.
func (o *outbox) take() (b batch, seq uint64) {
	b, o.queue, o.spare = o.queue, o.spare, batch{}
	seq = o.seq
	o.seq++
	return b, seq
}

// drop throws the gathered batch away. Requires mu and that nobody writes;
// releases mu for a moment.
func (o *outbox) drop() {
	b, seq := o.take()
	o.mu.Unlock()
	o.settle(&b)
	o.mu.Lock()
	o.finish(b, seq)
}

// settle frees what a batch held, which left or was dropped.
func (o *outbox) settle(b *batch) {
	for i := range b.cuts {
		b.cuts[i].room.free()
	}
	if o.wrote != nil && b.frames > 0 {
		o.wrote(b.frames, b.charge)
	}
}

// finish notes that batch seq is gone and keeps its room. Requires mu.
func (o *outbox) finish(b batch, seq uint64) {
	o.gone = max(o.gone, seq)
	clear(b.cuts)
	if cap(b.text) <= keepMax {
		o.spare = batch{text: b.text[:0], cuts: b.cuts[:0]}
	}
	o.changed.Broadcast()
}

// flush writes until nothing is queued, unless somebody does so already. With
// crowded set it first lets others run who are about to add frames.
func (o *outbox) flush(crowded bool) {
	o.mu.Lock()
	if o.writing.Load() || o.queue.frames == 0 {
		o.mu.Unlock()
		return
	}
	o.writing.Store(true)
	if crowded {
		o.mu.Unlock()
		runtime.Gosched()
		o.mu.Lock()
	}
	o.write()
}

// write is the role of writer. Requires mu, which it releases, and writing.
func (o *outbox) write() {
	var failure error
	for round := 0; o.queue.frames > 0; round++ {
		if round == roundsMax {
			o.mu.Unlock()
			go func() {
				o.mu.Lock()
				o.write()
			}()
			return
		}
		b, seq := o.take()
		err := o.err
		o.mu.Unlock()
		if err == nil {
			if err = o.send(&b); err == nil {
				o.n.framesOut.Add(uint64(b.frames))
			}
		}
		o.settle(&b)
		o.mu.Lock()
		o.finish(b, seq)
		if err != nil && o.err == nil {
			o.err, failure = err, err
		}
	}
	o.writing.Store(false)
	o.changed.Broadcast()
	o.mu.Unlock()
	if failure != nil {
		o.failed(failure)
	}
}

// send writes a batch to the connection.
func (o *outbox) send(b *batch) error {
	if len(b.cuts) == 0 {
		n, err := o.nc.Write(b.text)
		o.n.writes.Add(1)
		o.n.bytesOut.Add(uint64(n))
		return err
	}
	vec, at := o.vec[:0], 0
	for _, c := range b.cuts {
		vec = append(vec, b.text[at:c.at], c.payload)
		at = c.at
	}
	if at < len(b.text) {
		vec = append(vec, b.text[at:])
	}
	o.vec = vec
	defer clear(vec) // keep no payload alive
	for len(vec) > 0 {
		size, k := 0, 0
		for k < len(vec) && (k == 0 || size+len(vec[k]) <= writeMax) {
			size += len(vec[k])
			k++
		}
		o.part = vec[:k]
		n, err := writeParts(o.nc, &o.part, size)
		o.n.writes.Add(1)
		o.n.bytesOut.Add(uint64(n))
		if err != nil {
			return err
		}
		vec = vec[k:]
	}
	return nil
}

// released waits until the payload that add returned seq for is no longer used.
// It waits for the peer to read, but not beyond the connection's end.
func (o *outbox) released(seq uint64) {
	if seq == 0 {
		return
	}
	o.mu.Lock()
	for o.gone < seq {
		o.changed.Wait()
	}
	o.mu.Unlock()
}

// drain waits until all that was added and flushed left or was dropped.
func (o *outbox) drain() {
	o.mu.Lock()
	for o.writing.Load() {
		o.changed.Wait()
	}
	o.mu.Unlock()
}

// stop ends writing: what is queued is dropped. The connection must be closed
// already, or about to be, for a writer in the middle of a write to come back.
func (o *outbox) stop(err error) {
	o.mu.Lock()
	if o.err == nil {
		o.err = err
	}
	if !o.writing.Load() {
		o.drop()
	}
	o.mu.Unlock()
}

// watch notices a peer that went silent or does not read. It looks at counters
// now and then, so that the hot path sets no deadlines.
type watch struct {
	in, out     uint64
	heard, sent time.Time
}

// look returns how long the count of what comes in has stood still and, if a
// write is under way, how long that has made no progress.
func (w *watch) look(now time.Time, in uint64, o *outbox) (silent, stuck time.Duration) {
	if in != w.in || w.heard.IsZero() {
		w.in, w.heard = in, now
	}
	if out := o.n.writes.Load(); out != w.out || !o.writing.Load() || w.sent.IsZero() {
		w.out, w.sent = out, now
	}
	return now.Sub(w.heard), now.Sub(w.sent)
}
