package fsck

import "fmt"

// ID is the number of a problem. Numbers are cited by tests, manuals and
// scripts: they are never reused and never change their meaning. The hundreds
// are the pass that finds the problem.
type ID int

// Severity says what a problem means.
type Severity uint8

// The severities.
const (
	Warning Severity = iota // redundancy or space is lost, nothing else
	Error                   // something is wrong or lost; the rest can be judged
	Fatal                   // the store cannot be used; passes that build on it are skipped
)

var severityText = [...]string{Warning: "warning", Error: "error", Fatal: "fatal"}

// String returns the word for s.
func (s Severity) String() string {
	if int(s) < len(severityText) {
		return severityText[s]
	}
	return fmt.Sprintf("severity %d", uint8(s))
}

// MarshalText makes a severity a word in JSON.
func (s Severity) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// Remedy says what can be done about a problem.
type Remedy uint8

// The remedies.
const (
	NotYet Remedy = iota // repair is not available yet
	Safe                 // -p and -y repair it
	Ask                  // -y repairs it
)

// Problem is a row of the table of problems.
type Problem struct {
	ID       ID
	Name     string // stable, for scripts
	Severity Severity
	Remedy   Remedy
	Sentence string // what is wrong; the finding adds where and how
}

// The problems, by pass.
const (
	SuperLost      ID = 101
	SuperCopy      ID = 102
	SuperDisagree  ID = 103
	DeviceShort    ID = 104
	RegionLost     ID = 201
	RegionSlot     ID = 202
	RegionForeign  ID = 203
	RegionTable    ID = 204
	RegionStale    ID = 205
	RegionShort    ID = 206
	DeviceStale    ID = 207
	RegionDisagree ID = 208
	RegionIntent   ID = 209
	RegionRing     ID = 210
	LogStart       ID = 301
	LogStartHeader ID = 302
	LogBefore      ID = 303
	LogCut         ID = 304
	LogRedo        ID = 305
	LogStaging     ID = 306
	StagingLost    ID = 307
	LogUnreadable  ID = 308
	TableEntry     ID = 311
	TableTwice     ID = 312
	TableNextSeq   ID = 313
	TableOpen      ID = 314
	TableFull      ID = 315
	SegmentHeader  ID = 316
	SegmentOther   ID = 317
	RootPage       ID = 401
	TreePage       ID = 402
	TreeOrder      ID = 403
	TreeTwice      ID = 404
	TreeChild      ID = 405
	PageFree       ID = 406
	PageLeaked     ID = 407
	TreeCounts     ID = 408
	BitmapReserved ID = 409
	PageSum        ID = 410
	SumStray       ID = 411
	KeyUnknown     ID = 501
	RecordDamaged  ID = 502
	ShardWrong     ID = 503
	InoBeyond      ID = 504
	InoTwice       ID = 505
	ShardTwice     ID = 506
	ShardForeign   ID = 507
	EntryNoDir     ID = 511
	EntryName      ID = 512
	EntryCookie    ID = 513
	EntryTwice     ID = 514
	EntryNoInode   ID = 515
	EntryType      ID = 516
	EntryVolume    ID = 517
	DirSize        ID = 521
	DirLinks       ID = 522
	DirParent      ID = 523
	DirNames       ID = 524
	DirLoop        ID = 525
	LinkCount      ID = 526
	NoName         ID = 527
	OrphanRow      ID = 531
	OrphanMissing  ID = 532
	TailRow        ID = 533
	ExtentNoFile   ID = 541
	ExtentOverlap  ID = 542
	ExtentBeyond   ID = 543
	BytesWrong     ID = 544
	AttrNoInode    ID = 551
	AttrParts      ID = 552
	AttrNames      ID = 553
	AttrHash       ID = 554
	TargetParts    ID = 555
	LockNoInode    ID = 561
	LockOverlap    ID = 562
	SessionRows    ID = 563
	UsageWrong     ID = 571
	PreparedWrong  ID = 581
	DecisionWrong  ID = 582
	ChunkPlace     ID = 591
	ChunkNoPart    ID = 592
	PartNoFile     ID = 593
	PartBytes      ID = 594
	PartVolume     ID = 595
	PartGen        ID = 596
	PartBound      ID = 597
	ExtentNowhere  ID = 601
	ExtentOutside  ID = 602
	ExtentShared   ID = 603
	LiveWrong      ID = 604
	SegmentRead    ID = 701
	DataSum        ID = 702
	SegmentRecord  ID = 703
	ExtentOrphan   ID = 704
)

var problems = []Problem{
	{SuperLost, "super-lost", Fatal, NotYet, "neither copy of the superblock is sound"},
	{SuperCopy, "super-copy", Warning, Safe, "one of the two copies of the superblock is damaged"},
	{SuperDisagree, "super-disagree", Error, NotYet, "the two copies of the superblock contradict each other"},
	{DeviceShort, "device-short", Fatal, NotYet, "the device is shorter than its superblock says: it was truncated or copied in part"},

	{RegionLost, "region-lost", Fatal, NotYet, "neither header slot of the region is sound"},
	{RegionSlot, "region-slot", Warning, Safe, "one of the two header slots of the region is damaged"},
	{RegionForeign, "region-foreign", Fatal, NotYet, "the region belongs to another store"},
	{RegionTable, "region-table", Fatal, NotYet, "the region's segment table does not fit the device"},
	{RegionStale, "region-stale", Fatal, NotYet, "the region is older than the device's log: it is a stale copy"},
	{RegionShort, "region-short", Fatal, NotYet, "the region is shorter than its header says: it was truncated or copied in part"},
	{DeviceStale, "device-stale", Fatal, NotYet, "the device is older than its region: it is a stale copy"},
	{RegionDisagree, "region-disagree", Error, NotYet, "the two header slots of the region contradict each other"},
	{RegionIntent, "region-intent", Warning, Safe, "the region's intent page is damaged"},
	{RegionRing, "region-ring", Fatal, NotYet, "the region was in use on persistent memory and its ring is missing: it may be newer than the log"},

	{LogStart, "log-start", Fatal, NotYet, "the checkpoint names a place that is not in the log"},
	{LogStartHeader, "log-start-header", Fatal, NotYet, "the header of the segment where the log starts is not sound"},
	{LogBefore, "log-before", Error, NotYet, "the records before the checkpoint do not lead to it"},
	{LogCut, "log-cut", Error, NotYet, "the log breaks off before a place that it is known to have reached durably"},
	{LogRedo, "log-redo", Fatal, NotYet, "the redo of a sound record breaks a rule"},
	{LogStaging, "log-staging", Error, NotYet, "staging holds sound records behind the place where the log breaks off"},
	{StagingLost, "staging-lost", Warning, NotYet, "staging is there and cannot be used: what only it holds is lost"},
	{LogUnreadable, "log-unreadable", Fatal, NotYet, "the log cannot be read"},
	{TableEntry, "table-entry", Error, NotYet, "an entry of the segment table is impossible"},
	{TableTwice, "table-twice", Error, NotYet, "two slots hold the same segment"},
	{TableNextSeq, "table-next-seq", Error, NotYet, "the next sequence number has been issued already"},
	{TableOpen, "table-open", Error, NotYet, "the open hot segments are not just the one in which the log ends"},
	{TableFull, "table-full", Error, NotYet, "no segment is free or dead for the next start to begin with"},
	{SegmentHeader, "segment-header", Error, NotYet, "the header of a segment with live data is not sound"},
	{SegmentOther, "segment-other", Error, NotYet, "the header of a segment with live data is another segment's"},

	{RootPage, "root-page", Fatal, NotYet, "the region's root page is damaged"},
	{TreePage, "tree-page", Error, NotYet, "a page of the tree is damaged"},
	{TreeOrder, "tree-order", Error, NotYet, "keys of the tree are out of order"},
	{TreeTwice, "tree-twice", Error, NotYet, "a page is in the tree twice"},
	{TreeChild, "tree-child", Error, NotYet, "the tree refers to a page that cannot be its own"},
	{PageFree, "page-free", Error, NotYet, "a page is in the tree and free"},
	{PageLeaked, "page-leaked", Warning, NotYet, "a page is neither in the tree nor free"},
	{TreeCounts, "tree-counts", Error, NotYet, "the root page's counts are wrong"},
	{BitmapReserved, "bitmap-reserved", Error, NotYet, "the bitmap takes a page that is not the tree's"},
	{PageSum, "page-sum", Error, NotYet, "a page of the region does not fit its sum: its use is an I/O error"},
	{SumStray, "sum-stray", Warning, NotYet, "the region has a sum for a page that has none"},

	{KeyUnknown, "key-unknown", Error, NotYet, "a key is of no kind that there is"},
	{RecordDamaged, "record-damaged", Error, NotYet, "a record of the namespace is damaged"},
	{ShardWrong, "shard-wrong", Error, NotYet, "a record stands in another shard than its inode's home"},
	{InoBeyond, "ino-beyond", Error, NotYet, "an inode's number is still to be issued by its shard"},
	{InoTwice, "ino-twice", Error, NotYet, "two inodes have the same number"},
	{ShardTwice, "shard-twice", Error, NotYet, "two stores have records of the same shard"},
	{ShardForeign, "shard-foreign", Error, NotYet, "a store has records of a shard that lies elsewhere by the cluster map"},
	{EntryNoDir, "entry-no-dir", Error, NotYet, "an entry stands in what is not a directory"},
	{EntryName, "entry-name", Error, NotYet, "an entry's name is impossible"},
	{EntryCookie, "entry-cookie", Error, NotYet, "an entry stands under the cookie of another name"},
	{EntryTwice, "entry-twice", Error, NotYet, "a directory has two entries of the same name"},
	{EntryNoInode, "entry-no-inode", Error, NotYet, "an entry refers to an inode that does not exist"},
	{EntryType, "entry-type", Error, NotYet, "an entry and its inode are of different types"},
	{EntryVolume, "entry-volume", Error, NotYet, "an entry and its inode are of different volumes"},
	{DirSize, "dir-size", Error, NotYet, "a directory miscounts its entries"},
	{DirLinks, "dir-links", Error, NotYet, "a directory miscounts its subdirectories"},
	{DirParent, "dir-parent", Error, NotYet, "a directory's parent is not the one where it has its name"},
	{DirNames, "dir-names", Error, NotYet, "a directory has a wrong number of names"},
	{DirLoop, "dir-loop", Error, NotYet, "a directory is its own ancestor"},
	{LinkCount, "link-count", Error, NotYet, "an inode's link count is not the number of its names"},
	{NoName, "no-name", Error, NotYet, "an inode has links but no name: nobody can reach it"},
	{OrphanRow, "orphan-row", Error, NotYet, "the orphan table lists an inode that has a name or does not exist"},
	{OrphanMissing, "orphan-missing", Error, NotYet, "an inode without links is missing in the orphan table: it is never freed"},
	{TailRow, "tail-row", Error, NotYet, "an inode and the orphan table disagree about its truncated tail"},
	{ExtentNoFile, "extent-no-file", Error, NotYet, "an extent belongs to what is not a regular file"},
	{ExtentOverlap, "extent-overlap", Error, NotYet, "two extents of a file overlap in it"},
	{ExtentBeyond, "extent-beyond", Error, NotYet, "an extent lies beyond the end of its file"},
	{BytesWrong, "bytes-wrong", Error, NotYet, "a file miscounts its stored bytes"},
	{AttrNoInode, "attr-no-inode", Error, NotYet, "an extended attribute belongs to no inode"},
	{AttrParts, "attr-parts", Error, NotYet, "an extended attribute has wrong parts"},
	{AttrNames, "attr-names", Error, NotYet, "an inode miscounts the names of its extended attributes"},
	{AttrHash, "attr-hash", Error, NotYet, "an extended attribute stands under the hash of another name"},
	{TargetParts, "target-parts", Error, NotYet, "a symbolic link's target has wrong parts"},
	{LockNoInode, "lock-no-inode", Error, NotYet, "a lock belongs to no inode"},
	{LockOverlap, "lock-overlap", Error, NotYet, "two locks exclude each other and are both held"},
	{SessionRows, "session-rows", Error, NotYet, "a session miscounts its result rows"},
	{UsageWrong, "usage-wrong", Error, NotYet, "a volume's usage in a shard is wrong"},
	{PreparedWrong, "prepared-wrong", Error, NotYet, "a prepared part of a transaction contradicts what it is about"},
	{DecisionWrong, "decision-wrong", Error, NotYet, "the decision of a transaction contradicts its parties"},
	{ChunkPlace, "chunk-place", Error, NotYet, "an extent of a large file stands in another shard than its chunk belongs in"},
	{ChunkNoPart, "chunk-no-part", Error, NotYet, "an extent of a chunk belongs to no part of its file"},
	{PartNoFile, "part-no-file", Error, NotYet, "a part belongs to no file with chunks: it is never freed"},
	{PartBytes, "part-bytes", Error, NotYet, "a part of a file miscounts its stored bytes"},
	{PartVolume, "part-volume", Error, NotYet, "a part and its file are of different volumes"},
	{PartGen, "part-generation", Error, NotYet, "a part is of a generation that its file has not reached"},
	{PartBound, "part-bound", Error, NotYet, "a part reaches beyond what its file has announced"},

	{ExtentNowhere, "extent-nowhere", Error, NotYet, "an extent lies in a segment that does not exist"},
	{ExtentOutside, "extent-outside", Error, NotYet, "an extent lies outside the used part of its segment"},
	{ExtentShared, "extent-shared", Error, NotYet, "two extents refer to the same bytes of the log"},
	{LiveWrong, "live-wrong", Error, NotYet, "a segment's live bytes are miscounted"},

	{SegmentRead, "segment-read", Error, NotYet, "a segment with live data cannot be read"},
	{DataSum, "data-sum", Error, NotYet, "data fails its checksum: reading it is an I/O error"},
	{SegmentRecord, "segment-record", Error, NotYet, "a record of a segment with live data is not sound: it cannot be cleaned"},
	{ExtentOrphan, "extent-orphan", Error, NotYet, "an extent is not part of a payload of its file: it cannot be cleaned"},
}

// Problems returns the table of all problems, by number.
func Problems() []Problem { return append([]Problem(nil), problems...) }

// Lookup returns the row of a problem.
func Lookup(id ID) (Problem, bool) {
	for i := range problems {
		if problems[i].ID == id {
			return problems[i], true
		}
	}
	return Problem{}, false
}
