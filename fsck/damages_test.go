package fsck

import (
	"bytes"
	"encoding/binary"

	"sealfs"
	"sealfs/disk"
	"sealfs/lsfs/layout"
	"sealfs/meta"
	"sealfs/op"
	"sealfs/pmem"
	pmlayout "sealfs/pmem/layout"
)

// damage breaks one thing; the judge must find just these numbers.
type damage struct {
	name string
	want []ID
	do   func(h *hurt)
}

var damages = []damage{
	{"no superblock", []ID{SuperLost}, func(h *hurt) { h.dev.Zero(0, 2*layout.BlockSize) }},
	{"first superblock", []ID{SuperCopy}, func(h *hurt) { h.dev.FlipBit(100, 3) }},
	{"second superblock", []ID{SuperCopy}, func(h *hurt) { h.dev.Zero(layout.BlockSize, 512) }},
	{"superblocks disagree", []ID{SuperDisagree}, func(h *hurt) {
		h.supers(func(sb *layout.Superblock) { sb.Created += int64(sb.Update) })
	}},
	{"superblock updates", []ID{SuperDisagree}, func(h *hurt) {
		h.supers(func(sb *layout.Superblock) { sb.Update += 4 * (sb.Update % 2) })
	}},
	{"short device", []ID{DeviceShort}, func(h *hurt) {
		d := disk.NewSim("short", h.dev.Size()-testSegment)
		d.Overwrite(0, read(h.t, h.dev, 0, int(d.Size())))
		h.o.Dev = d
	}},
	{"no region header", []ID{RegionLost}, func(h *hurt) { h.region.Zero(0, 2*pageSize) }},
	{"older header slot", []ID{RegionSlot}, func(h *hurt) {
		h.region.FlipBit(int64(pmlayout.Slot(h.header().Update+1))*pageSize+60, 0)
	}},
	{"newer header slot", []ID{RegionSlot, RegionStale}, func(h *hurt) {
		h.region.FlipBit(int64(pmlayout.Slot(h.header().Update))*pageSize+2000, 7)
	}},
	{"newest superblock", []ID{SuperCopy, DeviceStale}, func(h *hurt) {
		n := h.super().Update
		h.supers(func(sb *layout.Superblock) {
			if sb.Update != n { // the one before the last recovery
				sb.Incarnation--
				sb.FirstSlot, sb.FirstPrev = layout.NoSlot, 0
			}
		})
		h.dev.FlipBit(int64(n%2)*layout.BlockSize+100, 3)
	}},
	{"other store's region", []ID{RegionForeign}, func(h *hurt) {
		h.headers(func(hd *pmlayout.Header) { hd.Store[3]++ })
	}},
	{"table size", []ID{RegionTable}, func(h *hurt) {
		h.headers(func(hd *pmlayout.Header) { hd.TableBytes += entryBytes })
	}},
	{"stale region", []ID{RegionStale}, func(h *hurt) {
		start := h.header().Start
		h.supers(func(sb *layout.Superblock) { sb.Tail = start + 64 })
	}},
	{"short region", []ID{RegionShort}, func(h *hurt) {
		h.headers(func(hd *pmlayout.Header) { hd.Pages = uint64(h.region.Size())/pageSize + 1 })
	}},
	{"stale device", []ID{DeviceStale}, func(h *hurt) {
		h.headers(func(hd *pmlayout.Header) { hd.Incarnation += 7 })
	}},
	{"header slots disagree", []ID{RegionDisagree}, func(h *hurt) {
		newest := h.header().Update
		h.headers(func(hd *pmlayout.Header) {
			if hd.Update == newest {
				hd.Update += 4
			}
		})
	}},
	{"checkpoint outside", []ID{LogStart}, func(h *hurt) {
		h.headers(func(hd *pmlayout.Header) { hd.StartSlot = 1 << 20 })
	}},
	{"checkpoint's segment", []ID{LogStartHeader}, func(h *hurt) {
		h.dev.Zero(h.super().SlotOffset(h.header().StartSlot), 512)
	}},
	{"checkpoint's chain", []ID{LogBefore}, func(h *hurt) {
		h.headers(func(hd *pmlayout.Header) { hd.Chain ^= 1 })
	}},
	{"log cut", []ID{LogCut}, func(h *hurt) {
		start := h.header().Start
		h.supers(func(sb *layout.Superblock) { sb.FirstPrev = start + layout.BlockSize })
	}},
	{"bad redo", []ID{LogRedo}, func(h *hurt) {
		// A sound record at the end of the log.
		hd, sb := h.header(), h.super()
		c := newChecker(h.t.Context(), h.options())
		c.dev, c.reg, c.sb, c.hdr, c.alone = h.dev, h.region, sb, hd, true
		h.must(c.intent())
		h.must(c.log())
		redo := []byte{200, 1, 255, 255, 3}
		rec := layout.Record{LSN: c.end.lsn, Prev: c.end.chain, Kind: layout.KindOp, RedoLen: uint32(len(redo))}
		b := make([]byte, rec.Bytes())
		rec.Put(b, layout.ChainSeed(sb.Store, sb.Incarnation), nil, redo)
		h.dev.Overwrite(sb.SlotOffset(c.end.slot)+int64(c.end.lsn.Off()), b)
	}},
	{"unreadable log", []ID{LogUnreadable}, func(h *hurt) {
		off := h.super().SlotOffset(h.header().StartSlot)
		h.dev.Fail(unreadable(off))
	}},
	{"table entry", []ID{TableEntry}, func(h *hurt) {
		h.entries(func(_ uint32, b []byte) {
			if b[4] == slotFree {
				b[30] = 1
			}
		})
	}},
	{"segment twice", []ID{TableTwice}, func(h *hurt) {
		var kept []byte
		h.entries(func(_ uint32, b []byte) {
			if b[4] == slotSealed && kept == nil {
				kept = bytes.Clone(b)
			} else if b[4] == slotFree && kept != nil {
				copy(b, kept)
			}
		})
	}},
	{"sequence number", []ID{TableNextSeq}, func(h *hurt) {
		h.tx(func(tx *pmem.Tx) error { return tx.PutState(0, []byte{2, 0, 0, 0}) })
	}},
	{"open segment", []ID{TableOpen}, func(h *hurt) {
		slot, _ := h.livingSlot()
		h.entries(func(s uint32, b []byte) {
			if s == slot {
				b[4] = slotOpen
			}
		})
	}},
	{"no free segment", []ID{TableFull}, func(h *hurt) {
		seq := h.header().Start.Seq() + 1000
		h.entries(func(_ uint32, b []byte) {
			if g, _ := decodeEntry(b, testSegment); g.live == 0 && g.state != slotOpen {
				seq++
				clear(b)
				binary.LittleEndian.PutUint32(b, seq)
				b[4], b[5] = slotSealed, byte(layout.Hot)
				binary.LittleEndian.PutUint32(b[12:], layout.BlockSize)
			}
		})
		h.tx(func(tx *pmem.Tx) error { return tx.PutState(0, binary.LittleEndian.AppendUint32(nil, seq+1)) })
	}},
	{"segment header", []ID{SegmentHeader}, func(h *hurt) {
		slot, _ := h.livingSlot()
		h.dev.FlipBit(h.super().SlotOffset(slot)+20, 1)
	}},
	{"other segment's header", []ID{SegmentOther}, func(h *hurt) {
		slot, seq := h.livingSlot()
		b := make([]byte, layout.BlockSize)
		sh := layout.SegmentHeader{Incarnation: 1, Seq: seq + 1, Kind: layout.Hot, Slot: slot}
		sh.Put(b, h.super().Store)
		h.dev.Overwrite(h.super().SlotOffset(slot), b)
	}},
	{"intent page", []ID{RegionIntent}, func(h *hurt) { h.region.FlipBit(pmlayout.IntentPage*pageSize+30, 1) }},
	{"bit of a leaf", []ID{PageSum}, func(h *hurt) { h.region.FlipBit(int64(h.leafPage())*pageSize+4000, 1) }},
	{"bit of an inner page", []ID{PageSum}, func(h *hurt) { h.region.FlipBit(int64(h.root().Tree)*pageSize+4000, 1) }},
	{"bit of the root page", []ID{PageSum}, func(h *hurt) { h.region.FlipBit(pmlayout.RootPage*pageSize+17, 1) }},
	{"bit of the root page's tree", []ID{RootPage, PageSum}, func(h *hurt) { h.region.FlipBit(pmlayout.RootPage*pageSize+pmlayout.RootTreeOff+5, 1) }},
	{"bit of the table", []ID{PageSum}, func(h *hurt) { h.region.FlipBit(pmlayout.TablePage*pageSize+17, 1) }},
	{"bit of a bitmap", []ID{BitmapReserved, PageSum}, func(h *hurt) { h.region.FlipBit(int64(h.bitmapPage())*pageSize+4000, 1) }},
	{"bit of a free page", []ID{PageSum}, func(h *hurt) { h.region.FlipBit(h.region.Size()-100, 1) }},
	{"bit of a sum", []ID{PageSum}, func(h *hurt) { h.sum(h.leafPage(), 77) }},
	{"no sum", []ID{PageSum}, func(h *hurt) { h.sum(h.leafPage(), pmlayout.SumNone) }},
	{"page given up", []ID{PageSum}, func(h *hurt) {
		h.sum(h.leafPage(), pmlayout.SumLost)
		// Also when a checkpoint was writing.
		h.region.Overwrite(pmlayout.IntentPage*pageSize, pmlayout.EncodeIntent(h.super().Store, h.header().Update+1))
	}},
	{"sum of a header", []ID{SumStray}, func(h *hurt) { h.sum(1, 77) }},
	{"sum of a sum page", []ID{SumStray}, func(h *hurt) { h.sum(h.bitmapPage()+32, 77) }},
	{"sum beyond the region", []ID{SumStray}, func(h *hurt) { h.sum(uint64(h.region.Size())/pageSize+2000, 77) }},
	{"root page", []ID{RootPage}, func(h *hurt) { h.page(pmlayout.RootPage, func(b []byte) { b[0]++ }) }},
	{"root of the tree", []ID{RootPage}, func(h *hurt) {
		h.page(pmlayout.RootPage, func(b []byte) { b[pmlayout.RootTreeOff+5] = 1 })
	}},
	{"leaf's magic", []ID{TreePage}, func(h *hurt) { h.page(h.leafPage(), func(b []byte) { b[0]++ }) }},
	{"leaf's level", []ID{TreePage}, func(h *hurt) { h.page(h.leafPage(), func(b []byte) { b[pmlayout.TreeLevelOff] = 1 }) }},
	{"leaf's count", []ID{TreePage}, func(h *hurt) { h.page(h.leafPage(), func(b []byte) { b[pmlayout.TreeCountOff+1] = 0x40 }) }},
	{"leaf's dead bytes", []ID{TreePage}, func(h *hurt) { h.page(h.leafPage(), func(b []byte) { b[pmlayout.TreeDeadOff] ^= 1 }) }},
	{"leaf's hint", []ID{TreePage}, func(h *hurt) { h.page(h.leafPage(), func(b []byte) { b[pmlayout.TreeLastOff+1] = 2 }) }},
	{"leaf's cell", []ID{TreePage}, func(h *hurt) {
		h.page(h.leafPage(), func(b []byte) { copy(b[pmlayout.TreeHeader:], b[pmlayout.TreeHeader+2:pmlayout.TreeHeader+4]) })
	}},
	{"order of keys", []ID{TreeOrder}, func(h *hurt) {
		h.page(h.leafPage(), func(b []byte) {
			s := b[pmlayout.TreeHeader:]
			s[0], s[1], s[2], s[3] = s[2], s[3], s[0], s[1]
		})
	}},
	{"page twice", []ID{TreeTwice}, func(h *hurt) {
		h.page(h.root().Tree, func(b []byte) {
			_, v0 := cell((*[pageSize]byte)(b), 0)
			_, v1 := cell((*[pageSize]byte)(b), 1)
			copy(v1, v0)
		})
	}},
	{"child beyond", []ID{TreeChild}, func(h *hurt) {
		h.page(h.root().Tree, func(b []byte) {
			_, v := cell((*[pageSize]byte)(b), 1)
			v[5] = 1
		})
	}},
	{"page free", []ID{PageFree}, func(h *hurt) {
		leaf := h.leafPage()
		h.page(h.bitmapPage(), func(b []byte) { b[leaf/8] &^= 1 << (leaf % 8) })
	}},
	{"page leaked", []ID{PageLeaked}, func(h *hurt) {
		h.page(h.bitmapPage(), func(b []byte) {
			last := uint64(h.region.Size())/pageSize - 1
			b[last/8] |= 1 << (last % 8)
		})
	}},
	{"key count", []ID{TreeCounts}, func(h *hurt) { h.page(pmlayout.RootPage, func(b []byte) { b[pmlayout.RootKeysOff]++ }) }},
	{"page count", []ID{TreeCounts}, func(h *hurt) { h.page(pmlayout.RootPage, func(b []byte) { b[pmlayout.RootPagesOff]++ }) }},
	{"bit of a header", []ID{BitmapReserved}, func(h *hurt) { h.page(h.bitmapPage(), func(b []byte) { b[0] |= 1 }) }},
	{"bit beyond the region", []ID{BitmapReserved}, func(h *hurt) { h.page(h.bitmapPage(), func(b []byte) { b[4095] |= 0x80 }) }},
	{"unknown key", []ID{KeyUnknown}, func(h *hurt) { h.set([]byte{0, 1, 0x99, 4}, []byte("x")) }},
	{"inode record", []ID{RecordDamaged}, func(h *hurt) {
		k := meta.InodeKey(testShards, h.z.small)
		h.set(k[:], []byte("nonsense"))
	}},
	{"entry record", []ID{RecordDamaged}, func(h *hurt) {
		k := meta.EntryKey(testShards, h.z.sub, firstCookie(h.z.sub, testVolume, []byte("small")))
		h.set(k[:], []byte{0xff})
	}},
	{"extent record", []ID{RecordDamaged}, func(h *hurt) {
		k := meta.ExtentKey(testShards, h.z.tall, 4)
		h.get(k[:])
		h.set(k[:], []byte("short"))
	}},
	{"shard record", []ID{RecordDamaged, InoBeyond}, func(h *hurt) {
		k := meta.ShardKey(h.z.sub.Home(testShards))
		h.set(k[:], []byte("short"))
	}},
	{"grant record", []ID{RecordDamaged}, func(h *hurt) {
		k := meta.GrantKey(h.z.sub.Home(testShards), testVolume, sealfs.UUID{1})
		h.set(k[:], make([]byte, 32))
		k = meta.GrantKey(h.z.sub.Home(testShards), testVolume, sealfs.UUID{2})
		h.set(k[:], (&meta.Grant{Version: 1}).Append(nil))
	}},
	{"shard", []ID{ShardWrong}, func(h *hurt) {
		k := meta.SymlinkKey(testShards, h.z.link, 0)
		k[1] ^= 1
		h.set(k[:], []byte("x"))
	}},
	{"inode counter", []ID{InoBeyond}, func(h *hurt) {
		k := meta.ShardKey(h.z.sub.Home(testShards))
		s, err := meta.DecodeShardState(h.get(k[:]))
		h.must(err)
		s.Counter = sealfs.InoCounterMin
		h.set(k[:], s.Append(nil))
	}},
	{"inode twice", []ID{ShardWrong, InoTwice, ExtentShared}, func(h *hurt) {
		k := meta.InodeKey(testShards, h.z.small)
		b := h.get(k[:])
		k[1] ^= 1
		h.set(k[:], b)
	}},
	{"entry in a file", []ID{EntryNoDir}, func(h *hurt) { h.link(h.z.small, "in", h.z.hard, typeFile, 0) }},
	{"entry in nothing", []ID{EntryNoDir}, func(h *hurt) { h.link(h.z.gone, "in", h.z.hard, typeFile, 0) }},
	{"name", []ID{EntryName}, func(h *hurt) {
		h.unlink(h.z.sub, "small")
		h.link(h.z.sub, "sm/ll", h.z.small, typeFile, 0)
	}},
	{"cookie", []ID{EntryCookie}, func(h *hurt) {
		h.unlink(h.z.sub, "small")
		h.link(h.z.sub, "small", h.z.small, typeFile, ordinals)
	}},
	{"name twice", []ID{EntryTwice}, func(h *hurt) {
		h.unlink(h.w.root, "hard")
		h.link(h.w.root, "sub", h.z.hard, typeFile, 1)
	}},
	{"entry of nothing", []ID{EntryNoInode}, func(h *hurt) {
		h.link(h.z.sub, "ghost", h.z.gone, typeFile, 0)
		h.inode(h.z.sub, func(in *meta.Inode) { in.Size++ })
	}},
	{"entry's type", []ID{EntryType}, func(h *hurt) { h.link(h.z.sub, "small", h.z.small, typeLink, 0) }},
	{"volume", []ID{EntryVolume}, func(h *hurt) {
		h.inode(h.z.small, func(in *meta.Inode) { in.Volume++ })
		h.usage(h.z.small, testVolume, -100, -1)
		h.usage(h.z.small, testVolume+1, 100, 1)
	}},
	{"directory's size", []ID{DirSize}, func(h *hurt) { h.inode(h.z.sub, func(in *meta.Inode) { in.Size++ }) }},
	{"directory's links", []ID{DirLinks}, func(h *hurt) { h.inode(h.z.sub, func(in *meta.Inode) { in.Nlink++ }) }},
	{"parent", []ID{DirParent}, func(h *hurt) { h.inode(h.z.dir2, func(in *meta.Inode) { in.Parent = h.w.root }) }},
	{"directory of two names", []ID{DirNames}, func(h *hurt) {
		h.link(h.z.sub, "deeper too", h.z.dir2, typeDir, 0)
		h.inode(h.z.sub, func(in *meta.Inode) { in.Size++; in.Nlink++ })
	}},
	{"loop", []ID{DirLoop}, func(h *hurt) {
		h.unlink(h.w.root, "sub")
		h.inode(h.w.root, func(in *meta.Inode) { in.Size--; in.Nlink-- })
		h.link(h.z.dir2, "sub", h.z.sub, typeDir, 0)
		h.inode(h.z.dir2, func(in *meta.Inode) { in.Size++; in.Nlink++ })
		h.inode(h.z.sub, func(in *meta.Inode) { in.Parent = h.z.dir2 })
	}},
	{"partition that is none", []ID{PartitionLost}, func(h *hurt) {
		h.split()
		k := meta.PartitionKey(h.z.sub.Home(testShards), h.z.sub, 0)
		h.set(k[:], binary.AppendUvarint(nil, uint64(h.z.small)))
	}},
	{"partition's row", []ID{PartitionRow}, func(h *hurt) {
		h.split()
		k := meta.PartitionKey(h.z.gone.Home(testShards), h.z.sub, 0)
		h.del(k[:])
	}},
	{"work on partitions", []ID{PartitionWork}, func(h *hurt) {
		h.split()
		k := meta.PartitionKey(h.z.sub.Home(testShards), h.z.sub, workRow)
		h.del(k[:])
	}},
	{"stray partition", []ID{PartitionStray}, func(h *hurt) {
		h.split()
		k := meta.PartitionKey(h.z.sub.Home(testShards), h.z.sub, 0)
		h.del(k[:])
		k = meta.PartitionKey(h.z.sub.Home(testShards), h.z.sub, workRow)
		h.del(k[:])
		h.inode(h.z.sub, func(in *meta.Inode) { in.Gen, in.Bound = 0, 0 })
	}},
	{"entry in another partition", []ID{EntryApart}, func(h *hurt) {
		h.split()
		k := meta.EntryKey(testShards, h.z.gone, op.PartitionStart(3)+ordinals)
		e := meta.Entry{Ino: h.z.small, Type: typeFile, Name: []byte("apart")}
		h.set(k[:], e.Append(nil))
	}},
	{"link count", []ID{LinkCount}, func(h *hurt) { h.inode(h.z.small, func(in *meta.Inode) { in.Nlink = 2 }) }},
	{"lost name", []ID{NoName}, func(h *hurt) {
		h.unlink(h.z.sub, "small")
		h.inode(h.z.sub, func(in *meta.Inode) { in.Size-- })
	}},
	{"orphan with a name", []ID{OrphanRow}, func(h *hurt) {
		k := meta.OrphanKey(testShards, h.z.small)
		h.set(k[:], []byte{1})
	}},
	{"orphan that is not there", []ID{OrphanRow}, func(h *hurt) {
		k := meta.OrphanKey(testShards, h.z.gone)
		h.set(k[:], []byte{1})
	}},
	{"orphan missing", []ID{OrphanMissing}, func(h *hurt) {
		k := meta.OrphanKey(testShards, h.z.held)
		h.del(k[:])
	}},
	{"tail", []ID{TailRow}, func(h *hurt) {
		k := meta.OrphanKey(testShards, h.z.held)
		h.set(k[:], []byte{3})
	}},
	{"extent of a directory", []ID{ExtentNoFile}, func(h *hurt) {
		from, to := meta.ExtentKey(testShards, h.z.tall, 4), meta.ExtentKey(testShards, h.z.dir2, 4)
		h.set(to[:], h.get(from[:]))
	}},
	{"extents overlap", []ID{ExtentOverlap}, func(h *hurt) {
		h.o.NoData = true
		from, to := meta.ExtentKey(testShards, h.z.tall, 4), meta.ExtentKey(testShards, h.z.tall, 2)
		h.set(to[:], h.get(from[:]))
		h.del(from[:])
	}},
	{"extent beyond the end", []ID{ExtentBeyond}, func(h *hurt) {
		h.inode(h.z.tall, func(in *meta.Inode) { in.Size = 10 * block })
	}},
	{"bytes", []ID{BytesWrong}, func(h *hurt) {
		h.inode(h.z.tall, func(in *meta.Inode) { in.Bytes++ })
		h.usage(h.z.tall, testVolume, 1, 0)
	}},
	{"attribute of nothing", []ID{AttrNoInode}, func(h *hurt) {
		k := meta.AttributeKey(testShards, h.z.gone, attrHash(h.z.gone, testVolume, []byte("user.x")), 0, 0)
		a := meta.Attribute{Name: []byte("user.x")}
		h.set(k[:], a.Append(nil))
	}},
	{"attribute's part", []ID{AttrParts, UsageWrong}, func(h *hurt) {
		k := meta.AttributeKey(testShards, h.z.attr, attrHash(h.z.attr, testVolume, []byte("user.big")), 0, 3)
		h.del(k[:])
	}},
	{"attribute's names", []ID{AttrNames}, func(h *hurt) { h.inode(h.z.attr, func(in *meta.Inode) { in.Names++ }) }},
	{"ACL of which the inode knows nothing", []ID{AttrNames}, func(h *hurt) { h.inode(h.z.acl, func(in *meta.Inode) { in.Flags = 0 }) }},
	{"ACL that is not there", []ID{AttrNames}, func(h *hurt) { h.inode(h.z.attr, func(in *meta.Inode) { in.Flags |= aclAccess }) }},
	{"ACL of an inode without attributes", []ID{AttrNames}, func(h *hurt) { h.inode(h.z.small, func(in *meta.Inode) { in.Flags |= aclAccess }) }},
	{"ACL without its beginning", []ID{AttrNames, UsageWrong}, func(h *hurt) {
		k := meta.AttributeKey(testShards, h.z.acl, attrHash(h.z.acl, testVolume, []byte(op.ACLDefault)), 0, 0)
		h.del(k[:])
	}},
	{"attribute's hash", []ID{AttrHash}, func(h *hurt) {
		k := meta.AttributeKey(testShards, h.z.attr, attrHash(h.z.attr, testVolume, []byte("user.a")), 0, 0)
		b := h.get(k[:])
		h.del(k[:])
		k[11]++
		h.set(k[:], b)
	}},
	{"target's part", []ID{TargetParts}, func(h *hurt) {
		k := meta.SymlinkKey(testShards, h.z.link, 2)
		h.del(k[:])
	}},
	{"lock of nothing", []ID{LockNoInode}, func(h *hurt) {
		k := meta.LockKey(testShards, h.z.gone, 0, 5, 1, 1)
		l := meta.LockRow{Lock: op.Lock{Type: op.ReadLock, Start: 5, End: 6}}
		h.set(k[:], l.Append(nil))
	}},
	{"locks exclude each other", []ID{LockOverlap}, func(h *hurt) {
		k := meta.LockKey(testShards, h.z.small, 0, 50, 12, 1)
		b := h.get(k[:])
		b[0] = byte(op.WriteLock)
		h.set(k[:], b)
	}},
	{"session", []ID{SessionRows}, func(h *hurt) {
		k := meta.SessionKey(h.z.dir2.Home(testShards), 11, 0)
		s, err := meta.DecodeSession(h.get(k[:]))
		h.must(err)
		s.Rows++
		h.set(k[:], s.Append(nil))
	}},
	{"totals", []ID{TotalsWrong}, func(h *hurt) { h.inode(h.z.dir2, func(in *meta.Inode) { in.Total.Bytes-- }) }},
	{"totals of the root", []ID{TotalsWrong}, func(h *hurt) { h.inode(h.w.root, func(in *meta.Inode) { in.Total.Dirs += 2 }) }},
	{"told totals", []ID{TotalsWrong}, func(h *hurt) {
		h.inode(h.z.dir2, func(in *meta.Inode) { in.Told.Files += 3 })
		h.queue(h.z.dir2)
	}},
	{"no totals", []ID{TotalsWrong}, func(h *hurt) {
		h.inode(h.z.dir2, func(in *meta.Inode) { in.Counted, in.Total, in.Told = false, meta.Totals{}, meta.Totals{} })
	}},
	{"file that counts nowhere", []ID{TotalsWrong, TotalsPlace}, func(h *hurt) { h.inode(h.z.small, func(in *meta.Inode) { in.Parent = 0 }) }},
	{"file that counts elsewhere", []ID{TotalsWrong, TotalsPlace}, func(h *hurt) {
		h.inode(h.z.small, func(in *meta.Inode) { in.Parent = h.z.dir2 })
	}},
	{"place that is lost", []ID{TotalsPlace}, func(h *hurt) {
		k := meta.PlaceKey(testShards, h.z.hard, h.z.dir2)
		h.del(k[:])
	}},
	{"place of another size", []ID{TotalsWrong, TotalsQueue}, func(h *hurt) {
		k := meta.PlaceKey(testShards, h.z.hard, h.z.dir2)
		p := meta.Place{Names: 1, Told: 1 << 30}
		h.set(k[:], p.Append(nil))
	}},
	{"places of what has none", []ID{TotalsPlace}, func(h *hurt) {
		k := meta.PlaceKey(testShards, h.z.small, h.z.dir2)
		p := meta.Place{Names: 1}
		h.set(k[:], p.Append(nil))
	}},
	{"outbox", []ID{TotalsWrong}, func(h *hurt) {
		k := meta.OutboxKey(3, h.z.dir2)
		o := meta.Outbox{Waiting: meta.Totals{Bytes: 5}, Number: 7, Letter: meta.Totals{Files: 1}}
		h.set(k[:], o.Append(nil))
	}},
	{"queue without an inode", []ID{TotalsQueue}, func(h *hurt) {
		k := meta.QueuedKey(testShards, h.z.gone)
		h.set(k[:], meta.QueuedValue())
	}},
	{"queued without a row", []ID{TotalsQueue}, func(h *hurt) { h.inode(h.z.small, func(in *meta.Inode) { in.SetQueued(true) }) }},
	{"not queued", []ID{TotalsQueue}, func(h *hurt) {
		k := meta.QueuedKey(testShards, h.z.sub)
		h.del(k[:])
		h.inode(h.z.sub, func(in *meta.Inode) {
			in.Told.Bytes++
			in.SetQueued(false)
		})
		h.inode(h.w.root, func(in *meta.Inode) { in.Total.Bytes++ })
	}},
	{"usage", []ID{UsageWrong}, func(h *hurt) { h.usage(h.z.small, testVolume, 0, 1) }},
	{"extent nowhere", []ID{ExtentNowhere}, func(h *hurt) {
		at, n := h.first(h.z.small)
		h.inode(h.z.small, func(in *meta.Inode) { in.First.Addr = sealfs.MakeLSN(1<<30, at.Off()) })
		h.addLive(at.Seq(), -int32(n))
	}},
	{"extent outside", []ID{ExtentOutside}, func(h *hurt) {
		h.o.NoData = true
		h.inode(h.z.small, func(in *meta.Inode) { in.First.Addr = sealfs.MakeLSN(in.First.Addr.Seq(), 64) })
	}},
	{"extents share", []ID{ExtentShared}, func(h *hurt) {
		h.o.NoData = true
		at, n := h.first(h.z.small)
		other, _ := h.first(h.z.held)
		h.inode(h.z.small, func(in *meta.Inode) { in.First.Addr = other + 200 })
		h.addLive(at.Seq(), -int32(n))
		h.addLive(other.Seq(), int32(n))
	}},
	{"live bytes", []ID{LiveWrong}, func(h *hurt) {
		at, _ := h.first(h.z.small)
		h.addLive(at.Seq(), 1)
	}},
	{"unreadable block", []ID{SegmentRead, DataSum, SegmentRecord}, func(h *hurt) {
		at, _ := h.first(h.z.small)
		off := h.place(at) &^ (layout.BlockSize - 1)
		h.dev.Fail(unreadable(off))
	}},
	{"rotten data", []ID{DataSum}, func(h *hurt) {
		at, _ := h.first(h.z.small)
		h.dev.FlipBit(h.place(at)+99, 5)
	}},
	{"sum", []ID{DataSum}, func(h *hurt) { h.inode(h.z.small, func(in *meta.Inode) { in.First.Stamp++ }) }},
	{"rotten record", []ID{SegmentRecord}, func(h *hurt) {
		slot, _ := h.livingSlot()
		h.dev.FlipBit(h.super().SlotOffset(slot)+layout.BlockSize+9, 0)
	}},
	{"another's payload", []ID{ExtentOrphan}, func(h *hurt) {
		at, n := h.first(h.z.small)
		data := read(h.t, h.dev, h.place(at), int(n))
		// The middle of what was written to "held" is given to "small", with the data.
		other, size := h.first(h.z.held)
		h.inode(h.z.held, func(in *meta.Inode) {
			in.First.Len, in.Size, in.Bytes = block, block, block
			in.First.Sums = in.First.Sums[:4]
		})
		h.dev.Overwrite(h.place(other)+block, data)
		h.inode(h.z.small, func(in *meta.Inode) { in.First.Addr = other + block })
		h.usage(h.z.held, testVolume, int64(block)-int64(size), 0)
		h.addLive(at.Seq(), -int32(n))
		h.addLive(other.Seq(), int32(n)+block-int32(size))
	}},
}
