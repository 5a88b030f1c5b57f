package meta

import (
	"encoding/binary"
	"strconv"
	"strings"

	"sealfs"
	"sealfs/internal/enc"
	"sealfs/op"
	"sealfs/pmem"
)

// attrPart is how many bytes one row of an extended attribute holds at most.
const attrPart = 900

// Attribute is the first row of an extended attribute: the name (varint length,
// bytes), the length of the value (varint) and its beginning, up to attrPart
// bytes in all. The rest of the value stands in further rows as it is.
type Attribute struct {
	Name  []byte // aliases the page
	Total int    // bytes of the whole value
	Value []byte // beginning of the value; aliases the page
}

// attrHead returns how many bytes precede the value.
func attrHead(name, total int) int {
	n := 1 + name + 1
	for _, v := range [...]int{name, total} {
		for ; v >= 0x80; v >>= 7 {
			n++
		}
	}
	return n
}

// attrLength returns how long the rows of an attribute are together: what it
// counts in its volume's usage.
func attrLength(name, total int) int64 { return int64(attrHead(name, total) + total) }

// attrRows returns in how many rows an attribute stands.
func attrRows(name, total int) int {
	rest := max(total-(attrPart-attrHead(name, total)), 0)
	return 1 + (rest+attrPart-1)/attrPart
}

// DecodeAttribute reads the first row of an attribute, or returns a *sealfs.Corruption.
func DecodeAttribute(b []byte, a *Attribute) error {
	in := enc.Reader{B: b}
	a.Name = in.VarBytes(sealfs.XattrNameMax)
	total := in.Uvarint()
	if in.Err || len(a.Name) == 0 || total > sealfs.XattrValueMax {
		return damaged("attribute record %x", b)
	}
	a.Total, a.Value = int(total), in.B
	if len(a.Value) != min(a.Total, attrPart-attrHead(len(a.Name), a.Total)) {
		return damaged("attribute record %x", b)
	}
	return nil
}

// Append appends the record of a to b.
func (a *Attribute) Append(b []byte) []byte {
	b = enc.AppendVarBytes(b, a.Name)
	b = binary.AppendUvarint(b, uint64(a.Total))
	return append(b, a.Value...)
}

// attrPlace says where an attribute stands or may be put.
type attrPlace struct {
	hash    uint32
	ordinal int // 256: all are taken
}

// findAttr looks for the attribute name of in; without a match, at is where to put it.
func findAttr(r pmem.Reader, c Config, in *Inode, name string, a *Attribute) (at attrPlace, found bool, err error) {
	at.hash = uint32(op.SipHash(uint64(in.Ino)^0x5345414c46534174, uint64(in.Volume)^0x7472696275746573, name)) &^ uint32(c.hashMask)
	if in.Names == 0 {
		return at, false, nil
	}
	var cur pmem.Cursor
	for ordinal := 0; ordinal < ordinals; ordinal++ {
		k := AttributeKey(c.Shards, in.Ino, at.hash, uint8(ordinal), 0)
		if !cur.Seek(r, k[:]) || !inRange(&cur, k[:15]) {
			return at, false, cur.Err()
		}
		key, err := DecodeKey(cur.Key())
		if err != nil {
			return at, false, err
		}
		if key.Part != 0 {
			return at, false, damaged("attribute %x of inode %d begins with part %d", key.Hash, key.Ino, key.Part)
		}
		if err := DecodeAttribute(cur.Value(), a); err != nil {
			return at, false, err
		}
		ordinal = int(key.Ordinal)
		if string(a.Name) == name {
			at.ordinal = ordinal
			return at, true, nil
		}
		if ordinal == at.ordinal {
			at.ordinal++
		}
	}
	return at, false, nil
}

// checkAttr refuses what cannot be an attribute's name.
func checkAttr(name string) error {
	if len(name) > sealfs.XattrNameMax {
		return refusal(sealfs.ErrRange)
	}
	if name == "" || strings.IndexByte(name, 0) >= 0 {
		return refusal(sealfs.ErrInvalid)
	}
	return nil
}

// setxattr sets the attribute Name of Ino to Data.
func (ch *change) setxattr() error {
	name, value := ch.req.Name, ch.req.Data
	if err := checkAttr(name); err != nil {
		return err
	}
	if strings.HasPrefix(name, op.AttrTotals) {
		return refusal(sealfs.ErrNotSupported)
	}
	if len(value) > sealfs.XattrValueMax {
		return refusal(sealfs.ErrArgTooBig)
	}
	var in Inode
	if err := ch.load(ch.req.Ino, &in); err != nil {
		return err
	}
	if flag := aclFlag(name); flag != 0 {
		return ch.setACL(&in, flag)
	}
	if err := ch.putAttr(&in, name, value, ch.req.Flags); err != nil {
		return err
	}
	return ch.attrChanged(&in)
}

// putAttr sets an attribute of in, whose record the caller writes. flags are those of Setxattr.
func (ch *change) putAttr(in *Inode, name string, value []byte, flags op.Flags) error {
	var old Attribute
	at, found, err := findAttr(ch.tx, ch.c, in, name, &old)
	if err != nil {
		return err
	}
	total, rows := len(value), 0
	grown := attrLength(len(name), total)
	switch {
	case found && flags&op.XCreate != 0:
		return refusal(sealfs.ErrExist)
	case !found && flags&op.XReplace != 0:
		return refusal(sealfs.ErrNoData)
	case found:
		rows = attrRows(len(name), old.Total)
		grown -= attrLength(len(name), old.Total)
	case at.ordinal >= ordinals:
		return refusal(sealfs.ErrNoSpace)
	case int(in.Names)+len(name)+1 > sealfs.XattrListMax:
		return refusal(sealfs.ErrArgTooBig)
	default:
		in.Names += uint32(len(name) + 1)
	}
	var b [attrPart]byte
	head := enc.AppendVarBytes(b[:0], name)
	head = binary.AppendUvarint(head, uint64(len(value)))
	n := min(len(value), attrPart-len(head))
	row := append(head, value[:n]...)
	for part := 0; ; part++ {
		k := AttributeKey(ch.c.Shards, in.Ino, at.hash, uint8(at.ordinal), uint16(part))
		if err := ch.tx.Set(k[:], row); err != nil {
			return err
		}
		value = value[n:]
		if len(value) == 0 {
			break
		}
		n = min(len(value), attrPart)
		row = value[:n]
	}
	if err := ch.dropAttrRows(in, at, attrRows(len(name), total), rows); err != nil {
		return err
	}
	return ch.charge(in, grown, 0)
}

// removexattr removes the attribute Name of Ino.
func (ch *change) removexattr() error {
	if err := checkAttr(ch.req.Name); err != nil {
		return err
	}
	var in Inode
	if err := ch.load(ch.req.Ino, &in); err != nil {
		return err
	}
	if flag := aclFlag(ch.req.Name); flag != 0 {
		return ch.removeACL(&in, flag)
	}
	if err := ch.dropAttr(&in, ch.req.Name); err != nil {
		return err
	}
	return ch.attrChanged(&in)
}

// dropAttr removes an attribute of in, whose record the caller writes.
func (ch *change) dropAttr(in *Inode, name string) error {
	var old Attribute
	at, found, err := findAttr(ch.tx, ch.c, in, name, &old)
	if err != nil {
		return err
	}
	if !found {
		return refusal(sealfs.ErrNoData)
	}
	n := uint32(len(name) + 1)
	if in.Names < n {
		return damaged("inode %d counts %d bytes of attribute names and has more", in.Ino, in.Names)
	}
	in.Names -= n
	if err := ch.dropAttrRows(in, at, 0, attrRows(len(name), old.Total)); err != nil {
		return err
	}
	return ch.charge(in, -attrLength(len(name), old.Total), 0)
}

// dropAttrRows deletes the rows [from, to) of an attribute.
func (ch *change) dropAttrRows(in *Inode, at attrPlace, from, to int) error {
	for part := from; part < to; part++ {
		k := AttributeKey(ch.c.Shards, in.Ino, at.hash, uint8(at.ordinal), uint16(part))
		if err := ch.tx.Delete(k[:]); err == sealfs.ErrNotExist {
			return damaged("part %d of attribute %x of inode %d is missing", part, at.hash, in.Ino)
		} else if err != nil {
			return err
		}
	}
	return nil
}

func (ch *change) attrChanged(in *Inode) error {
	in.change(ch.req.Time)
	in.Attr(&ch.rep.Attr)
	return ch.put(in)
}

// getxattr answers Getxattr: the value in Data and its length in Off.
func getxattr(r pmem.Reader, c Config, req *op.Request, rep *op.Reply) error {
	if err := checkAttr(req.Name); err != nil {
		return err
	}
	var in Inode
	if err := getInode(r, c, req.Ino, &in); err != nil {
		return err
	}
	var a Attribute
	at, found, err := findAttr(r, c, &in, req.Name, &a)
	if v, ok := in.totalsAttr(req.Name); ok {
		var digits [20]byte
		a, found, err = Attribute{Value: strconv.AppendUint(digits[:0], v, 10)}, true, nil
		a.Total = len(a.Value)
	}
	if err != nil {
		return err
	}
	if !found {
		return refusal(sealfs.ErrNoData)
	}
	rep.Off = uint64(a.Total)
	if req.Len == 0 {
		return nil
	}
	if uint64(a.Total) > req.Len {
		return refusal(sealfs.ErrRange)
	}
	rep.Data, err = appendAttr(rep.Data, r, c, &in, at, &a)
	return err
}

// appendAttr appends the value of the attribute a, which stands at at, to b.
func appendAttr(b []byte, r pmem.Reader, c Config, in *Inode, at attrPlace, a *Attribute) ([]byte, error) {
	rest := a.Total - len(a.Value)
	b = append(b, a.Value...)
	for part := 1; rest > 0; part++ {
		k := AttributeKey(c.Shards, in.Ino, at.hash, uint8(at.ordinal), uint16(part))
		row, err := pmem.Get(r, k[:])
		if err == sealfs.ErrNotExist || err == nil && len(row) != min(rest, attrPart) {
			return b, damaged("part %d of attribute %x of inode %d is missing or has another length", part, at.hash, in.Ino)
		}
		if err != nil {
			return b, err
		}
		b = append(b, row...)
		rest -= len(row)
	}
	return b, nil
}

// listxattr answers Listxattr: the names, each ended by NUL, in Data and their
// length in Off. A Len of 0 asks for the length only.
func listxattr(r pmem.Reader, c Config, req *op.Request, rep *op.Reply) error {
	var in Inode
	if err := getInode(r, c, req.Ino, &in); err != nil {
		return err
	}
	rep.Off = uint64(in.Names)
	if req.Len == 0 || in.Names == 0 {
		return nil
	}
	if uint64(in.Names) > req.Len {
		return refusal(sealfs.ErrRange)
	}
	var prefix [11]byte
	putIno(prefix[:], c.Shards, KindAttribute, in.Ino)
	before := len(rep.Data)
	var cur pmem.Cursor
	for ok := cur.Seek(r, prefix[:]); ok && inRange(&cur, prefix[:]); ok = cur.Next() {
		key, err := DecodeKey(cur.Key())
		if err != nil {
			return err
		}
		if key.Part != 0 {
			continue
		}
		var a Attribute
		if err := DecodeAttribute(cur.Value(), &a); err != nil {
			return err
		}
		rep.Data = append(append(rep.Data, a.Name...), 0)
	}
	if err := cur.Err(); err != nil {
		return err
	}
	if got := len(rep.Data) - before; got != int(in.Names) {
		return damaged("inode %d counts %d bytes of attribute names and has %d", in.Ino, in.Names, got)
	}
	return nil
}
