package fsck

import (
	"fmt"
	"maps"
	"slices"

	"sealfs"
	"sealfs/meta"
	"sealfs/op"
)

// Fate is what becomes of a transaction when its stores start again.
type Fate string

// The fates.
const (
	Committed   Fate = "committed"
	Aborted     Fate = "aborted"
	UnknownFate Fate = "unknown" // its coordinator is not on the stores that were given
)

// Transaction is one in doubt: a store has prepared its part, and does not
// know of the outcome. That is no problem: it will ask.
type Transaction struct {
	Tx          string       `json:"tx"` // age and nonce
	Coordinator sealfs.Shard `json:"coordinator"`
	Fate        Fate         `json:"fate"`
}

// txKey names a transaction: those of different coordinators are different.
type txKey struct {
	coord sealfs.Shard
	tx    op.Tx
}

// part is what a store has prepared.
type part struct {
	*op.Request
	key  meta.Key
	fate Fate
	met  bool // the name that it changes was there already
}

// object returns the inode to whose home the part is addressed.
func (p *part) object() sealfs.Ino {
	if p.Request.Part == op.PartName {
		return p.Dir
	}
	return p.Ino
}

func (p *part) where() string {
	return fmt.Sprintf("%v, part %d", txKey{p.key.Shard, p.key.Tx}, p.key.Ordinal)
}

func (k txKey) String() string { return fmt.Sprintf("shard %d, transaction %s", k.coord, txName(k.tx)) }

func txName(tx op.Tx) string { return fmt.Sprintf("%d-%016x", tx.Age, tx.Nonce) }

// prepare takes note of a prepared part. A new inode is counted from then on.
func (r *reader) prepare(k *meta.Key, req *op.Request) {
	r.prepared = append(r.prepared, &part{Request: req, key: *k})
	if req.Part == op.PartNew {
		r.charge(k.Shard, req.Volume, meta.PaidAhead(req), 1)
	}
}

// settle makes of the namespaces what they will be when the transactions in
// doubt have ended.
func (w *whole) settle() {
	w.inDoubt = map[txKey]bool{}
	for _, n := range w.stores {
		w.decided(n)
		w.prepared = w.prepared || len(n.prepared) > 0
	}
	for _, n := range w.stores {
		mine := map[txKey]bool{}
		var made []inode
		for _, p := range n.prepared {
			if uint32(p.key.Shard) >= w.shards {
				continue // said of its key
			}
			w.resolve(n, p)
			if key := (txKey{p.Coord, p.key.Tx}); !mine[key] {
				mine[key], w.inDoubt[key] = true, true
				n.report(p)
			}
			fault := n.contradiction(p)
			if fault != "" {
				n.c.problem(PreparedWrong, p.where(), "%s", fault)
				n.mendPrepared(p)
				p.fate = UnknownFate
			} else if p.Request.Part == op.PartNew {
				if fault := n.unissued(p.Ino); fault != "" {
					n.c.problem(InoBeyond, name(p.Ino), "%s", fault)
					n.c.mendBy(InoBeyond, name(p.Ino), counterFix(p.Ino))
				}
			}
			switch {
			case p.fate == UnknownFate:
				w.doubt(p)
				n.c.rep.NotJudged++
			case p.fate == Committed && p.Request.Part == op.PartNew:
				made = append(made, n.directoryOf(p))
			case p.fate == Committed:
				n.commit(p)
			}
		}
		n.c.rep.InDoubt = len(mine)
		n.add(made)
	}
}

// decided judges the rows of a store's decisions.
func (w *whole) decided(n *namespace) {
	for at, d := range n.decisions {
		if d.Time <= 0 {
			n.c.problem(DecisionWrong, at.String(), "time %d", d.Time)
			n.mendDecision(at, func(d *meta.Decision) string {
				d.Time = n.c.editor.lastTime(at.coord)
				return "its time is that of the shard's last change"
			})
		}
		for _, s := range d.Parties {
			if uint32(s) >= w.shards {
				n.c.problem(DecisionWrong, at.String(), "shard %d of %d", s, w.shards)
				n.mendDecision(at, func(d *meta.Decision) string {
					d.Parties = slices.DeleteFunc(d.Parties, func(s sealfs.Shard) bool { return uint32(s) >= w.shards })
					return "impossible parties are taken out"
				})
			} else {
				w.at(s)
			}
		}
	}
}

// resolve finds out what becomes of a part: it is committed if its coordinator
// has a decision, and aborted if it has none.
func (w *whole) resolve(n *namespace, p *part) {
	p.fate = UnknownFate
	if uint32(p.Coord) >= w.shards {
		return
	}
	coord := w.at(p.Coord)
	if coord == nil {
		return
	}
	at := txKey{p.Coord, p.key.Tx}
	d, ok := coord.decisions[at]
	if ok {
		p.fate = Committed
		if !slices.Contains(d.Parties, p.key.Shard) {
			coord.c.problem(DecisionWrong, at.String(), "it does not name shard %d, which has prepared", p.key.Shard)
			coord.mendDecision(at, func(d *meta.Decision) string {
				if slices.Contains(d.Parties, p.key.Shard) {
					return ""
				}
				d.Parties = append(d.Parties, p.key.Shard)
				return fmt.Sprintf("shard %d is a party", p.key.Shard)
			})
		}
	} else if !coord.c.holes {
		p.fate = Aborted
	}
}

// report tells of the transaction of a part.
func (n *namespace) report(p *part) {
	rep := n.c.rep
	if len(rep.Transactions) == n.c.o.Keep {
		return
	}
	t := Transaction{txName(p.key.Tx), p.Coord, p.fate}
	rep.Transactions = append(rep.Transactions, t)
	n.c.say("transaction %s of coordinator shard %d is in doubt: %s", t.Tx, t.Coordinator, t.Fate)
}

// contradiction returns what a prepared part is wrong in, or "".
func (n *namespace) contradiction(p *part) string {
	shards := n.w.shards
	switch home := p.object().Home(shards); {
	case p.Tx != p.key.Tx || p.Shard != p.key.Shard:
		return fmt.Sprintf("it says shard %d, transaction %s", p.Shard, txName(p.Tx))
	case uint32(p.Coord) >= shards:
		return fmt.Sprintf("the coordinator's shard is %d of %d", p.Coord, shards)
	case p.object() == 0 || home != p.Shard:
		return fmt.Sprintf("inode %d lies in shard %d", p.object(), home)
	case p.fate == Aborted:
		return ""
	}
	i := n.lookup(p.object())
	if p.Request.Part == op.PartNew {
		if i != nil {
			return fmt.Sprintf("inode %d exists", p.Ino)
		}
		if p.Mode>>12 != typeDir || p.Dir == 0 {
			return fmt.Sprintf("mode %#o, parent %d", p.Mode, p.Dir)
		}
		if len(p.Data) > 0 && !meta.CheckACL(p.Data) {
			return fmt.Sprintf("the ACL that is handed down is %x", p.Data)
		}
		return ""
	}
	if i == nil {
		return "" // its volume was deleted meanwhile
	}
	var d detail
	dir := i.typ == typeDir
	if dir {
		d = n.more[i.more]
	}
	if v := n.volumes[i.volume]; v != p.Volume {
		return fmt.Sprintf("volume %d, inode %d is in %d", p.Volume, i.ino, v)
	}
	ok := true
	switch p.Request.Part {
	case op.PartDrop:
		ok = i.nlink > 0 && (!dir || d.parent == p.Dir && d.size == 0)
	case op.PartMove:
		ok = i.nlink > 0 && (!dir || d.parent == p.Dir2)
	case op.PartLink:
		ok = !dir && (i.nlink > 0 || i.flags&linkable != 0)
	case op.PartName:
		ok = dir && p.Ino != 0 && p.Ino <= sealfs.InoMax && p.Off <= sealfs.InoMax
	case op.PartVolume:
		ok = dir && d.parent == i.ino
	}
	if !ok {
		return fmt.Sprintf("inode %d is not such that it can be done", i.ino)
	}
	return ""
}

// directoryOf returns the directory that a part makes.
func (n *namespace) directoryOf(p *part) inode {
	i := inode{ino: p.Ino, nlink: 2, typ: typeDir, volume: n.volumeIndex(p.Volume), more: uint32(len(n.more))}
	n.more = append(n.more, detail{ino: p.Ino, parent: p.Dir})
	return i
}

// commit does a part, in memory.
func (n *namespace) commit(p *part) {
	i := n.lookup(p.object())
	if i == nil {
		return
	}
	switch p.Request.Part {
	case op.PartDrop:
		if i.nlink--; i.typ == typeDir {
			i.nlink = 0
		}
		if i.nlink == 0 {
			i.flags |= rowNameless // or it is freed at once
		}
	case op.PartLink:
		i.nlink++
		i.flags = i.flags&^linkable | renamed
	case op.PartMove:
		if i.typ == typeDir {
			n.more[i.more].parent = p.Dir
		}
	case op.PartName:
		n.inDoubt[p.Dir] = append(n.inDoubt[p.Dir], p)
	}
}

// doubt marks what a part of unknown fate may change.
func (w *whole) doubt(p *part) {
	switch p.Request.Part {
	case op.PartNew:
		w.maybe[p.Ino] = true
	case op.PartName:
		w.mark(p.Dir)
		w.mark(sealfs.Ino(p.Off))
	}
	w.mark(p.Ino)
}

func (w *whole) mark(ino sealfs.Ino) {
	if ino == 0 || ino > sealfs.InoMax {
		return
	}
	if _, i := w.lookup(ino); i != nil {
		i.flags |= doubtful
	}
}

// after returns the entry e of dir as it will be when all transactions have ended.
func (n *namespace) after(dir *inode, e *meta.Entry) *meta.Entry {
	for _, p := range n.inDoubt[dir.ino] {
		if p.Name != string(e.Name) {
			continue
		}
		p.met = true
		if uint64(e.Ino) != p.Off {
			n.wrongName(p, e.Ino)
			return e
		}
		to := p.entry()
		if e.Type == typeDir {
			dir.nlink--
		}
		if to.Type == typeDir {
			dir.nlink++
		}
		return to
	}
	return e
}

func (p *part) entry() *meta.Entry {
	return &meta.Entry{Dir: p.Dir, Ino: p.Ino, Type: uint8(p.Mode >> 12), Name: []byte(p.Name)}
}

func (n *namespace) wrongName(p *part, ino sealfs.Ino) {
	n.c.problem(PreparedWrong, p.where(), "%q in directory %d should stand for inode %d, it stands for %d", p.Name, p.Dir, p.Off, ino)
	n.mendPrepared(p)
	n.w.doubt(p)
	n.w.mark(ino)
}

// endParts adds the new names that transactions give.
func (n *namespace) endParts() {
	r := n.c.newReader(n, &sink{c: n.c})
	defer func() {
		r.out.flush()
		r.hand()
	}()
	for _, ino := range slices.Sorted(maps.Keys(n.inDoubt)) {
		dir := n.lookup(ino)
		for _, p := range n.inDoubt[ino] {
			switch {
			case p.met:
			case p.Off != 0:
				n.wrongName(p, 0)
			default:
				n.more[dir.more].size++
				n.more[dir.more].found++
				if p.Mode>>12 == typeDir {
					dir.nlink++
				}
				r.refer(dir, p.entry())
			}
		}
	}
}
