package meta

import (
	"bytes"
	"slices"

	"sealfs"
	"sealfs/op"
	"sealfs/pmem"
)

// Plan is how an operation becomes a transaction.
type Plan struct {
	Parts []op.Request // a Prepare each, but for the transaction itself
	Walks []Walk       // to be done when all have voted
	Src   sealfs.Ino   // Rename: for what Name stands, and
	Ino   sealfs.Ino   // Name2; both go into the decision, as Off and Ino
	Same  sealfs.Ino   // Rename: both names are this inode's, so nothing is to be done
}

// Equal reports whether two plans of one request ask for the same.
func (p *Plan) Equal(o *Plan) bool {
	if p.Src != o.Src || p.Ino != o.Ino || p.Same != o.Same || !slices.Equal(p.Walks, o.Walks) {
		return false
	}
	return slices.EqualFunc(p.Parts, o.Parts, func(a, b op.Request) bool {
		return samePart(&a, &b) && a.Shard == b.Shard && a.Dir2 == b.Dir2 && a.Mode == b.Mode && a.GID == b.GID && a.Off == b.Off && bytes.Equal(a.Data, b.Data)
	})
}

// Walk is a search: Not must not be found from From on upwards, or a directory
// would come to lie below itself.
type Walk struct{ From, Not sealfs.Ino }

// Target is what a name stands for; Ino 0 for nothing.
type Target struct {
	Ino  sealfs.Ino
	Type uint8      // upper four bits of the mode
	Of   sealfs.Ino // the directory whose partition Dir2 is, 0 if it is none
}

// MakePlan says what parts other stores have in the operation req, which Apply
// has found to be foreign. target is what Name2 of a Rename stands for, if Dir2 lies
// elsewhere. root returns the root directory of a volume, 0 if it is unknown. A refusal
// is a sealfs.Code; other errors are Guard's, or mean damage.
func MakePlan(r pmem.Reader, c Config, req *op.Request, target Target, root func(sealfs.Volume) sealfs.Ino) (Plan, error) {
	p := planner{r: r, c: c, req: req}
	err := p.make(target, root)
	if code, ok := err.(refusal); ok {
		err = sealfs.Code(code)
	}
	return p.plan, err
}

type planner struct {
	r    pmem.Reader
	c    Config
	req  *op.Request
	dir  Inode // of Name
	plan Plan
}

func (p *planner) make(target Target, root func(sealfs.Volume) sealfs.Ino) error {
	req := p.req
	if err := getDir(p.r, p.c, req.Dir, &p.dir); err != nil {
		return p.c.absent(req, req.Dir, err)
	}
	switch req.Type {
	case op.Mkdir:
		a, err := handedDown(p.r, p.c, &p.dir)
		if err != nil {
			return err
		}
		if !a.travels() {
			return nil // nothing of it is foreign
		}
		in := Inode{Mode: typeDir | req.Mode&permMask, GID: req.GID}
		in.inherit(&p.dir, a, req.Valid)
		part := op.Request{Part: op.PartNew, Shard: req.Shard2, Dir: p.dir.self(), Mode: in.Mode, UID: req.UID, GID: in.GID, Data: a}
		if p.dir.Counted {
			part.Flags = op.Counted
		}
		p.add(part)
		return nil
	case op.Link:
		p.part(op.PartLink, req.Ino, p.dir.self(), 0)
		return nil
	case op.Unlink, op.Rmdir:
		t, err := p.find(&p.dir, req.Name)
		isDir := t.Type == typeDir>>12
		switch {
		case err != nil:
			return err
		case t.Ino == 0:
			return refusal(sealfs.ErrNotExist)
		case isDir && req.Type == op.Unlink:
			return refusal(sealfs.ErrIsDir)
		case !isDir && req.Type == op.Rmdir:
			return refusal(sealfs.ErrNotDir)
		}
		p.part(op.PartDrop, t.Ino, p.dir.self(), 0)
		return nil
	case op.Rename:
		return p.rename(target, root)
	}
	return refusal(sealfs.ErrNotSupported)
}

// find returns what a name stands for.
func (p *planner) find(dir *Inode, name string) (Target, error) {
	if err := checkName(name, sealfs.NameMax); err != nil {
		return Target{}, err
	}
	if err := p.c.touch(p.req, TouchName, dir.Ino, name); err != nil {
		return Target{}, err
	}
	var e Entry
	found, err := findEntry(p.r, p.c, dir, name, &e)
	if err != nil || !found {
		return Target{}, err
	}
	return Target{Ino: e.Ino, Type: e.Type}, nil
}

func (p *planner) add(part op.Request) {
	part.Type, part.Volume, part.Coord = op.Prepare, p.dir.Volume, p.req.Shard
	part.Lock.Owner = uint64(p.req.Session)
	p.plan.Parts = append(p.plan.Parts, part)
}

// part adds a part of an inode, if it lies on another store.
func (p *planner) part(kind op.Part, ino, dir, dir2 sealfs.Ino) {
	if ino == 0 || ino > sealfs.InoMax || p.c.local(ino) {
		return
	}
	p.add(op.Request{Part: kind, Shard: ino.Home(p.c.Shards), Ino: ino, Dir: dir, Dir2: dir2})
}

func (p *planner) rename(target Target, root func(sealfs.Volume) sealfs.Ino) error {
	req := p.req
	src, err := p.find(&p.dir, req.Name)
	if err == nil && src.Ino == 0 {
		err = refusal(sealfs.ErrNotExist)
	}
	if err != nil {
		return err
	}
	if p.c.local(req.Dir2) {
		var to Inode
		if err := getDir(p.r, p.c, req.Dir2, &to); err != nil {
			return p.c.absent(req, req.Dir2, err)
		}
		if target, err = p.find(&to, req.Name2); err != nil {
			return err
		}
		target.Of = to.self()
	}
	// The parents of directories, which are the directories themselves and not partitions.
	from, into := p.dir.self(), req.Dir2
	if target.Of != 0 {
		into = target.Of
	}
	exchange := req.Flags&op.Exchange != 0
	isDir, otherDir := src.Type == typeDir>>12, target.Ino != 0 && target.Type == typeDir>>12
	switch {
	case target.Ino != 0 && req.Flags&op.NoReplace != 0:
		return refusal(sealfs.ErrExist)
	case target.Ino == 0 && exchange:
		return refusal(sealfs.ErrNotExist)
	case target.Ino == 0 || exchange:
	case isDir && !otherDir:
		return refusal(sealfs.ErrNotDir)
	case !isDir && otherDir:
		return refusal(sealfs.ErrIsDir)
	}
	p.plan.Src = src.Ino
	// What another store has said may be old by now: there, the decision tells.
	if p.plan.Ino = target.Ino; target.Ino == src.Ino && p.c.local(req.Dir2) {
		p.plan.Same = src.Ino
		return nil
	}
	if !p.c.local(req.Dir2) {
		p.add(op.Request{
			Part: op.PartName, Shard: req.Dir2.Home(p.c.Shards), Dir: req.Dir2, Name: req.Name2,
			Ino: src.Ino, Mode: uint32(src.Type) << 12, Off: uint64(target.Ino),
		})
	}
	p.part(op.PartMove, src.Ino, into, from)
	if target.Ino == src.Ino {
		return nil
	}
	if exchange {
		p.part(op.PartMove, target.Ino, from, into)
	} else {
		p.part(op.PartDrop, target.Ino, into, 0)
	}
	if from == into {
		return nil
	}
	if isDir {
		p.plan.Walks = append(p.plan.Walks, Walk{req.Dir2, src.Ino})
	}
	if exchange && otherDir {
		p.plan.Walks = append(p.plan.Walks, Walk{req.Dir, target.Ino})
	}
	if len(p.plan.Walks) == 0 {
		return nil
	}
	// Whoever moves directories does so alone in the volume.
	top := root(p.dir.Volume)
	if top == 0 {
		return refusal(sealfs.ErrUnavailable)
	}
	p.add(op.Request{Part: op.PartVolume, Shard: top.Home(p.c.Shards), Ino: top})
	return nil
}
