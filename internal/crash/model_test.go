package crash

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"hash/crc64"
	"slices"
	"strings"

	"sealfs"
	"sealfs/internal/oracle"
	"sealfs/op"
)

// A position is a place in a history: 2k after operation k, 2k-1 within it, when
// it is one that takes several records.
type position int

// history is what the stores went through in one life: what each holds after each
// operation, as text, from operation 0, the state at the life's begin.
type history struct {
	stores int                     // and one more if files have chunks; see look
	at     []map[string][]position // by store
	last   []string
	done   []entry             // of operation k: done[k-1]
	torn   map[sealfs.Ino]bool // files with writes of several records
}

// entry is an operation that was answered.
type entry struct {
	req   op.Request // as resolved by the server
	ino   sealfs.Ino // of the inode that it made or found
	parts uint       // bit s: it is about store s
}

func (e *entry) String() string {
	r := &e.req
	return fmt.Sprintf("%v ino %d dir %d %q dir2 %d %q shard2 %d off %d len %d data %d size %d flags %#x time %d: made %d, stores %b",
		r.Type, r.Ino, r.Dir, r.Name, r.Dir2, r.Name2, r.Shard2, r.Off, r.Len, len(r.Data), r.Size, r.Flags, r.Time, e.ino, e.parts)
}

// joint reports whether the operation happened on several of so many stores.
func (e *entry) joint(stores int) bool {
	parts := e.parts & (1<<stores - 1)
	return parts&(parts-1) != 0
}

func newHistory(begin []string) *history {
	h := &history{stores: len(begin), last: begin, torn: map[sealfs.Ino]bool{}}
	for _, text := range begin {
		h.at = append(h.at, map[string][]position{text: {0}})
	}
	return h
}

// within notes states between the records of the write that begins now. When each
// of its records was made is not known.
func (h *history) within(texts []string, ino sealfs.Ino) {
	h.torn[ino] = true
	for s, text := range texts {
		if text != h.last[s] {
			h.note(s, timeless(text, ino), position(2*len(h.done)+1))
		}
	}
}

// timeless takes the times out of an inode's line.
func timeless(text string, ino sealfs.Ino) string {
	lines := strings.SplitAfter(text, "\n")
	for i, line := range lines {
		if strings.HasPrefix(line, fmt.Sprint(uint64(ino), " ")) {
			from, to := strings.Index(line, " mtime "), strings.Index(line, " data ")
			lines[i] = line[:from] + line[max(from, to):]
		}
	}
	return strings.Join(lines, "")
}

// add notes what the stores hold after an operation.
func (h *history) add(e entry, texts []string) {
	for s, text := range texts {
		if text != h.last[s] {
			e.parts |= 1 << s
		}
	}
	h.done = append(h.done, e)
	h.last = texts
	for s, text := range texts {
		h.note(s, text, position(2*len(h.done)))
	}
}

func (h *history) note(s int, text string, p position) {
	if list := h.at[s][text]; len(list) == 0 || list[len(list)-1] != p {
		h.at[s][text] = append(list, p)
	}
}

// find returns which positions the stores are in: for each, one between what was
// synced and what had begun, and no operation on several stores between them.
func (h *history) find(texts []string, synced []int, begun int) ([]position, error) {
	may := make([][]position, h.stores)
	for s, text := range texts {
		places := h.at[s][text]
		for ino := range h.torn {
			places = slices.Concat(places, h.at[s][timeless(text, ino)])
		}
		for _, p := range places {
			if p <= position(2*begun) && p >= position(2*synced[s]) {
				may[s] = append(may[s], p)
			}
		}
		if len(may[s]) == 0 {
			return nil, fmt.Errorf("store %d is in no state from operation %d, which was synced, to %d: %s", s, synced[s], begun, h.explain(s, text))
		}
	}
	best := h.latest(nil, may)
	if best == nil {
		return nil, fmt.Errorf("the stores are at %v: an operation on several has happened on some of them only", may)
	}
	return best, nil
}

// latest returns of all positions that the stores may be in together, when the first
// are in those given, the ones that lie furthest; nil if there are none.
func (h *history) latest(first []position, may [][]position) (best []position) {
	s := len(first)
	if s == len(may) {
		return slices.Clone(first)
	}
	sum := func(list []position) (n position) {
		for _, p := range list {
			n += p
		}
		return n
	}
	for _, p := range may[s] {
		fits := true
		for other, q := range first {
			fits = fits && h.consistent(1<<s|1<<other, p, q)
		}
		if !fits {
			continue
		}
		if list := h.latest(append(first[:s:s], p), may); list != nil && (best == nil || sum(list) > sum(best)) {
			best = list
		}
	}
	return best
}

// consistent reports whether no operation on both of two stores lies between their
// positions.
func (h *history) consistent(both uint, a, b position) bool {
	lo, hi := min(a, b), max(a, b)
	for k := int(lo)/2 + 1; position(2*k) <= hi; k++ {
		if h.done[k-1].parts&both == both {
			return false
		}
	}
	return true
}

// explain tells what is known of a state that must not be.
func (h *history) explain(s int, text string) string {
	if at := h.at[s][text]; len(at) > 0 {
		return fmt.Sprintf("it is that after operation %d", (at[len(at)-1]+1)/2)
	}
	// The nearest is the one with the fewest lines that differ.
	var nearest string
	least := 1 << 30
	where := position(0)
	for other, at := range h.at[s] {
		if n := len(difference(other, text)); n < least || n == least && at[0] < where {
			nearest, least, where = other, n, at[0]
		}
	}
	return fmt.Sprintf("it never was so; from what was after operation %d it differs in\n%s", where/2, strings.Join(difference(nearest, text), "\n"))
}

// difference returns the lines that two texts do not share.
func difference(want, got string) []string {
	a, b := strings.Split(want, "\n"), strings.Split(got, "\n")
	var d []string
	for _, line := range a {
		if !slices.Contains(b, line) {
			d = append(d, "  - "+line)
		}
	}
	for _, line := range b {
		if !slices.Contains(a, line) {
			d = append(d, "  + "+line)
		}
	}
	return d
}

// survivors returns the operations that are left when the stores are in the given
// positions, and the end of the session at the restart.
func (h *history) survivors(at []position) []entry {
	var left []entry
	for k := range h.done {
		e := &h.done[k]
		lost := e.parts == 0
		for s, p := range at {
			lost = lost || e.parts>>s&1 == 1 && position(2*k+2) > p
		}
		if !lost {
			left = append(left, *e)
		}
	}
	for s := range sealfs.Shard(shards) {
		left = append(left, entry{req: op.Request{Type: op.DropSession, Shard: s, Lock: op.Lock{Owner: uint64(session)}}})
	}
	return left
}

// rebuild makes a model by repeating operations.
func rebuild(past []entry, chunks bool) (*oracle.FS, error) {
	o := oracle.New(shards)
	if !chunks {
		o.Whole()
	}
	for i := range past {
		e := &past[i]
		if e.ino != 0 {
			o.Expect(e.ino)
		}
		req := e.req
		var rep op.Reply
		if err := o.Do(context.Background(), &req, &rep); err != nil || rep.Code != 0 {
			return nil, fmt.Errorf("the model does not repeat %v %q: %w", e.req.Type, e.req.Name, errors.Join(err, rep.Err()))
		}
	}
	return o, nil
}

// session holds files open.
const session = sealfs.Session(5)

// view is what a file system holds, as seen through its handler: a text for each
// store, with a line for each inode that has a name, and how many these are.
type view struct {
	texts  []string
	inodes []int64
}

var table = crc64.MakeTable(crc64.ECMA)

// chunkWindow is how much at the begin of home and chunks of a file is written to.
const chunkWindow = 64 << 10

// look asks for everything about all inodes that ever were. If files have chunks, what
// these hold is told apart, as if by one more store: it depends on the file's home, too.
func look(h op.Handler, g *geometry, inos []sealfs.Ino) (view, error) {
	text := make([][]byte, g.stores, g.stores+1)
	if g.chunks {
		text = text[:g.stores+1]
	}
	v := view{inodes: make([]int64, g.stores)}
	var rep op.Reply
	ask := func(req op.Request) error {
		address(&req)
		rep.Reset()
		if err := h.Do(context.Background(), &req, &rep); err != nil {
			return fmt.Errorf("%v of inode %d: %w", req.Type, max(req.Ino, req.Dir), err)
		}
		return nil
	}
	for _, ino := range inos {
		if err := ask(op.Request{Type: op.Getattr, Ino: ino}); err != nil {
			return v, err
		}
		if rep.Code == sealfs.ErrNotExist || rep.Code == 0 && rep.Attr.Nlink == 0 {
			continue
		}
		if rep.Code != 0 {
			return v, fmt.Errorf("getattr of inode %d: %w", ino, rep.Code)
		}
		a := rep.Attr
		s := g.storeOf(ino.Home(shards))
		v.inodes[s]++
		b := text[s]
		size := a.Size
		if a.Mode&typeMask == typeDir {
			size = 0
		}
		b = fmt.Append(b, uint64(ino), " mode ", a.Mode, " links ", a.Nlink, " owner ", a.UID, ":", a.GID, " rdev ", a.Rdev,
			" size ", size, " atime ", a.Atime, " mtime ", a.Mtime, " ctime ", a.Ctime)
		var err error
		switch a.Mode & typeMask {
		case typeDir:
			err = ask(op.Request{Type: op.Readdir, Dir: ino, Len: 1 << 20})
			slices.SortFunc(rep.Entries, func(x, y op.Dirent) int { return cmp.Compare(x.Name, y.Name) })
			for _, e := range rep.Entries {
				b = fmt.Append(b, " ", e.Name, "=", uint64(e.Ino), "/", e.Type)
			}
		case typeFile:
			if a.Size > 0 {
				n := a.Size
				if g.chunks {
					n = min(n, chunkWindow)
				}
				err = ask(op.Request{Type: op.Read, Ino: ino, Len: n})
				b = fmt.Append(b, " data ", len(rep.Data), " ", crc64.Checksum(rep.Data, table))
			}
			for off := uint64(sealfs.HomeBytes); off < min(a.Bound, sealfs.HomeBytes+chunksUsed*sealfs.ChunkBytes) && err == nil && rep.Code == 0; off += sealfs.ChunkBytes {
				err = ask(op.Request{Type: op.Read, Ino: ino, Off: off, Len: chunkWindow, Gen: a.Gen})
				text[g.stores] = fmt.Append(text[g.stores], uint64(ino), " at ", off, " data ", crc64.Checksum(bytes.TrimRight(rep.Data, "\x00"), table), "\n")
			}
		case typeLink:
			err = ask(op.Request{Type: op.Readlink, Ino: ino})
			b = fmt.Append(b, " target ", len(rep.Data), " ", crc64.Checksum(rep.Data, table))
		}
		if err == nil {
			err = rep.Err()
		}
		if err == nil {
			b, err = attributes(b, ask, &rep, ino)
		}
		if err != nil {
			return v, fmt.Errorf("inode %d: %w", ino, err)
		}
		text[s] = append(b, '\n')
	}
	for _, b := range text {
		v.texts = append(v.texts, string(b))
	}
	return v, nil
}

// attributes appends the extended attributes of an inode.
func attributes(b []byte, ask func(op.Request) error, rep *op.Reply, ino sealfs.Ino) ([]byte, error) {
	if err := ask(op.Request{Type: op.Listxattr, Ino: ino}); err != nil || rep.Code != 0 || len(rep.Data) == 0 {
		return b, errors.Join(err, rep.Err())
	}
	names := strings.Split(strings.TrimSuffix(string(rep.Data), "\x00"), "\x00")
	slices.Sort(names)
	for _, name := range names {
		if err := ask(op.Request{Type: op.Getxattr, Ino: ino, Name: name, Len: 1 << 16}); err != nil || rep.Code != 0 {
			return b, errors.Join(err, rep.Err())
		}
		b = fmt.Append(b, " ", name, "=", crc64.Checksum(rep.Data, table))
	}
	return b, nil
}

// The parts of a mode.
const (
	typeMask = 0o170000
	typeDir  = 0o040000
	typeFile = 0o100000
	typeLink = 0o120000
)
