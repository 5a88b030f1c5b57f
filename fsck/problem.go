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
	None Remedy = iota // it is not repaired
	Safe               // -p and -y repair it
	Ask                // -y repairs it
)

var remedyText = [...]string{None: "no", Safe: "-p, -y", Ask: "-y"}

// String returns the options that repair a problem.
func (r Remedy) String() string {
	if int(r) < len(remedyText) {
		return remedyText[r]
	}
	return fmt.Sprintf("remedy %d", uint8(r))
}

// Problem is a row of the table of problems.
type Problem struct {
	ID       ID
	Name     string // stable, for scripts
	Severity Severity
	Remedy   Remedy
	Sentence string // what is wrong; the finding adds where and how
	Mend     string // how it is repaired; with the remedy None, what can be done
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
	LogHeader      ID = 309
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
	EntryApart     ID = 518
	DirSize        ID = 521
	DirLinks       ID = 522
	DirParent      ID = 523
	DirNames       ID = 524
	DirLoop        ID = 525
	LinkCount      ID = 526
	NoName         ID = 527
	PartitionRow   ID = 528
	PartitionWork  ID = 529
	PartitionStray ID = 530
	OrphanRow      ID = 531
	OrphanMissing  ID = 532
	TailRow        ID = 533
	PartitionLost  ID = 534
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
	TotalsWrong    ID = 575
	TotalsPlace    ID = 576
	TotalsQueue    ID = 577
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
	{SuperLost, "super-lost", Fatal, None, "neither copy of the superblock is sound",
		"write the first 8 KiB of the device back from a copy"},
	{SuperCopy, "super-copy", Warning, Safe, "one of the two copies of the superblock is damaged",
		"the copy is written anew from the other one"},
	{SuperDisagree, "super-disagree", Error, Ask, "the two copies of the superblock contradict each other",
		"the older copy is written anew from the newer one, if both are of this store and of the same geometry"},
	{DeviceShort, "device-short", Fatal, None, "the device is shorter than its superblock says: it was truncated or copied in part",
		"copy the device again, wholly; what lies beyond its end is lost otherwise"},

	{RegionLost, "region-lost", Fatal, None, "neither header slot of the region is sound",
		"make the region again with --rebuild-region"},
	{RegionSlot, "region-slot", Warning, Safe, "one of the two header slots of the region is damaged",
		"the slot is written anew from the other one"},
	{RegionForeign, "region-foreign", Fatal, None, "the region belongs to another store",
		"name the region of this store with --region, or make it again with --rebuild-region"},
	{RegionTable, "region-table", Fatal, None, "the region's segment table does not fit the device",
		"name the region of this store with --region, or make it again with --rebuild-region"},
	{RegionStale, "region-stale", Fatal, None, "the region is older than the device's log: it is a stale copy",
		"name the newer region with --region, or make it again with --rebuild-region"},
	{RegionShort, "region-short", Fatal, None, "the region is shorter than its header says: it was truncated or copied in part",
		"copy the region again, wholly, or make it again with --rebuild-region"},
	{DeviceStale, "device-stale", Fatal, None, "the device is older than its region: it is a stale copy",
		"name the newer copy of the device"},
	{RegionDisagree, "region-disagree", Error, Ask, "the two header slots of the region contradict each other",
		"the older slot is written anew from the newer one, if both are of the same region"},
	{RegionIntent, "region-intent", Warning, Safe, "the region's intent page is damaged",
		"the page is written anew: no checkpoint is under way"},
	{RegionRing, "region-ring", Fatal, None, "the region was in use on persistent memory and its ring is missing: it may be newer than the log",
		"put the ring back beside the region, or make the region again with --rebuild-region"},

	{LogStart, "log-start", Fatal, None, "the checkpoint names a place that is not in the log",
		"make the region again with --rebuild-region"},
	{LogStartHeader, "log-start-header", Fatal, None, "the header of the segment where the log starts is not sound",
		"make the region again with --rebuild-region"},
	{LogBefore, "log-before", Error, Ask, "the records before the checkpoint do not lead to it",
		"the store is recovered as it is: its log goes on in a new segment"},
	{LogCut, "log-cut", Error, Ask, "the log breaks off before a place that it is known to have reached durably",
		"with --cut-log, the store is recovered as far as the log goes, and the rest of the segment is saved; what was done later is lost, also what was synced"},
	{LogRedo, "log-redo", Fatal, None, "the redo of a sound record breaks a rule",
		"make the region again with --rebuild-region"},
	{LogStaging, "log-staging", Error, Ask, "staging holds sound records behind the place where the log breaks off",
		"with --cut-log, the store is recovered as far as the log goes, and what staging holds behind is saved; what was done later is lost"},
	{StagingLost, "staging-lost", Warning, Ask, "staging is there and cannot be used: what only it holds is lost",
		"the file of the ring is moved aside"},
	{LogUnreadable, "log-unreadable", Fatal, None, "the log cannot be read",
		"copy the device to another one and try again: it fails to be read"},
	{LogHeader, "log-header", Warning, Safe, "the header of a segment of the log is not sound: the log is followed without it",
		"the store is recovered as it is: its log goes on in a new segment"},
	{TableEntry, "table-entry", Error, Ask, "an entry of the segment table is impossible",
		"the entry is made again from the segment, or freed if there is none"},
	{TableTwice, "table-twice", Error, Ask, "two slots hold the same segment",
		"the slot that does not hold the segment is freed, or made that of the segment it holds"},
	{TableNextSeq, "table-next-seq", Error, Ask, "the next sequence number has been issued already",
		"the next sequence number is set behind those that are there"},
	{TableOpen, "table-open", Error, Ask, "the open hot segments are not just the one in which the log ends",
		"the segment is sealed where its records end, and the one in which the log ends is made the open one"},
	{TableFull, "table-full", Error, Ask, "no segment is free or dead for the next start to begin with",
		"slots without live data are freed; if there are none, nothing is changed: keep device and region as they are"},
	{SegmentHeader, "segment-header", Error, Ask, "the header of a segment with live data is not sound",
		"what verifies is moved to a new segment"},
	{SegmentOther, "segment-other", Error, Ask, "the header of a segment with live data is another segment's",
		"what verifies is moved to a new segment"},

	{RootPage, "root-page", Fatal, None, "the region's root page is damaged",
		"make the region again with --rebuild-region"},
	{TreePage, "tree-page", Error, Ask, "a page of the tree is damaged",
		"the tree is built anew from all sound pages; the damaged one is saved"},
	{TreeOrder, "tree-order", Error, Ask, "keys of the tree are out of order",
		"the tree is built anew from all records in order"},
	{TreeTwice, "tree-twice", Error, Ask, "a page is in the tree twice",
		"the tree is built anew from all sound pages"},
	{TreeChild, "tree-child", Error, Ask, "the tree refers to a page that cannot be its own",
		"the tree is built anew from all sound pages, also those that nothing refers to any more"},
	{PageFree, "page-free", Error, Ask, "a page is in the tree and free",
		"the page is taken in the bitmap"},
	{PageLeaked, "page-leaked", Warning, Safe, "a page is neither in the tree nor free",
		"the page is freed"},
	{TreeCounts, "tree-counts", Error, Safe, "the root page's counts are wrong",
		"they are counted anew"},
	{BitmapReserved, "bitmap-reserved", Error, Ask, "the bitmap takes a page that is not the tree's",
		"the page's bit is cleared"},
	{PageSum, "page-sum", Error, Ask, "a page of the region does not fit its sum: its use is an I/O error",
		"make the region again with --rebuild-region, which loses nothing; or else the tree is built anew from all sound pages and what can be read of this one; of root page, segment table and bitmaps, what they say is judged and corrected"},
	{SumStray, "sum-stray", Warning, Safe, "the region has a sum for a page that has none",
		"the sum is cleared"},

	{KeyUnknown, "key-unknown", Error, Ask, "a key is of no kind that there is",
		"the record is saved and removed"},
	{RecordDamaged, "record-damaged", Error, Ask, "a record of the namespace is damaged",
		"the record is saved and removed; what belonged to it is kept as far as it tells of itself"},
	{ShardWrong, "shard-wrong", Error, Ask, "a record stands in another shard than its inode's home",
		"the record is moved to its place, or saved and removed if there is another one"},
	{InoBeyond, "ino-beyond", Error, Ask, "an inode's number is still to be issued by its shard",
		"the shard's counter is set behind the number; an inode of a number that is never issued is saved and removed"},
	{InoTwice, "ino-twice", Error, Ask, "two inodes have the same number",
		"the one that stands in the wrong shard is saved and removed"},
	{ShardTwice, "shard-twice", Error, None, "two stores have records of the same shard",
		"name the cluster map with --map, and see to which store the shard belongs"},
	{ShardForeign, "shard-foreign", Error, None, "a store has records of a shard that lies elsewhere by the cluster map",
		"the map may be of another time than the store: start the server of the store that has the shard by the map, and look what is missing"},
	{EntryNoDir, "entry-no-dir", Error, Ask, "an entry stands in what is not a directory",
		"a directory that is gone, or has lost its type, is made again; out of what is no directory, the entry is moved to lost+found"},
	{EntryName, "entry-name", Error, Ask, "an entry's name is impossible",
		"the name gets an underscore for each impossible byte"},
	{EntryCookie, "entry-cookie", Error, Ask, "an entry stands under the cookie of another name",
		"the entry is put under its own cookie"},
	{EntryTwice, "entry-twice", Error, Ask, "a directory has two entries of the same name",
		"the second one gets a number after its name, or is saved and removed if both are of one inode"},
	{EntryNoInode, "entry-no-inode", Error, Ask, "an entry refers to an inode that does not exist",
		"the entry is saved and removed"},
	{EntryType, "entry-type", Error, Ask, "an entry and its inode are of different types",
		"the entry gets the type of its inode"},
	{EntryVolume, "entry-volume", Error, Ask, "an entry and its inode are of different volumes",
		"the inode gets the volume of the directory"},
	{EntryApart, "entry-apart", Error, None, "an entry of a directory that is split stands in another part of it than its name says",
		"the entry cannot be reached by its name: move what is in the directory to another one"},
	{DirSize, "dir-size", Error, Safe, "a directory miscounts its entries",
		"the entries are counted anew"},
	{DirLinks, "dir-links", Error, Safe, "a directory miscounts its subdirectories",
		"the subdirectories are counted anew"},
	{DirParent, "dir-parent", Error, Ask, "a directory's parent is not the one where it has its name",
		"the parent becomes the directory in which it has its name"},
	{DirNames, "dir-names", Error, Ask, "a directory has a wrong number of names",
		"names that its parent does not agree with are saved and removed"},
	{DirLoop, "dir-loop", Error, Ask, "a directory is its own ancestor",
		"one directory of the loop is moved to lost+found"},
	{LinkCount, "link-count", Error, Ask, "an inode's link count is not the number of its names",
		"the names are counted anew"},
	{NoName, "no-name", Error, Ask, "an inode has links but no name: nobody can reach it",
		"it gets a name in lost+found: the one it is known to have had, or its number"},
	{PartitionRow, "partition-row", Error, Ask, "a row does not name the partition that it is for",
		"the row names it"},
	{PartitionWork, "partition-work", Error, Ask, "inode and rows disagree whether there is something to do for a directory's partitions",
		"its server looks at its partitions when it starts"},
	{PartitionStray, "partition-stray", Error, None, "a partition belongs to no directory",
		"its entries cannot be reached: restore the store of its directory from a copy"},
	{OrphanRow, "orphan-row", Error, Ask, "the orphan table lists an inode that has a name or does not exist",
		"the row is removed"},
	{OrphanMissing, "orphan-missing", Error, Ask, "an inode without links is missing in the orphan table: it is never freed",
		"with data or entries it gets a name in lost+found; else it is put into the table"},
	{TailRow, "tail-row", Error, Ask, "an inode and the orphan table disagree about its truncated tail",
		"the row becomes what the inode says"},
	{PartitionLost, "partition-lost", Error, None, "a partition of a directory is missing",
		"its entries are lost, those of other partitions are there; restore the store of the partition from a copy"},
	{ExtentNoFile, "extent-no-file", Error, Ask, "an extent belongs to what is not a regular file",
		"a file that is gone is made again; of what is no file, the extent and its data are saved and removed"},
	{ExtentOverlap, "extent-overlap", Error, Ask, "two extents of a file overlap in it",
		"the one whose data does not verify, or else the older one, is saved with its data and removed"},
	{ExtentBeyond, "extent-beyond", Error, Ask, "an extent lies beyond the end of its file",
		"the file is made as long as its data reaches"},
	{BytesWrong, "bytes-wrong", Error, Safe, "a file miscounts its stored bytes",
		"the stored bytes are counted anew"},
	{AttrNoInode, "attr-no-inode", Error, Ask, "an extended attribute belongs to no inode",
		"the attribute is saved and removed"},
	{AttrParts, "attr-parts", Error, Ask, "an extended attribute has wrong parts",
		"the parts that are there are saved and removed"},
	{AttrNames, "attr-names", Error, Safe, "an inode miscounts the names of its extended attributes, or does not know which ACLs are among them",
		"the names are counted anew"},
	{AttrHash, "attr-hash", Error, Ask, "an extended attribute stands under the hash of another name",
		"the attribute is put under its own hash"},
	{TargetParts, "target-parts", Error, Ask, "a symbolic link's target has wrong parts",
		"the parts are saved, and the target becomes one that names the inode; a link that is gone is made again from whole parts"},
	{LockNoInode, "lock-no-inode", Error, Ask, "a lock belongs to no inode",
		"the lock is removed"},
	{LockOverlap, "lock-overlap", Error, Ask, "two locks exclude each other and are both held",
		"the second one is removed"},
	{SessionRows, "session-rows", Error, Safe, "a session miscounts its result rows",
		"the rows are counted anew"},
	{UsageWrong, "usage-wrong", Error, Safe, "a volume's usage in a shard is wrong",
		"it is counted anew"},
	{TotalsWrong, "totals-wrong", Error, Safe, "a directory's totals are not what its tree and the queues add up to",
		"they are counted anew, and passed on by the server"},
	{TotalsPlace, "totals-place", Error, Safe, "files count in another directory than the one where they have names",
		"they are made to count where their names are"},
	{TotalsQueue, "totals-queue", Error, Safe, "an inode and the queue of totals disagree about what is to be told",
		"it is queued; if nothing is to be told, the server finds out"},
	{PreparedWrong, "prepared-wrong", Error, Ask, "a prepared part of a transaction contradicts what it is about",
		"with all stores of the cluster at hand, the part is saved and removed"},
	{DecisionWrong, "decision-wrong", Error, Ask, "the decision of a transaction contradicts its parties",
		"impossible parties are taken out, missing ones are added, an impossible time becomes that of the shard's last change"},
	{ChunkPlace, "chunk-place", Error, Ask, "an extent of a large file stands in another shard than its chunk belongs in",
		"it is moved to its shard if that lies on this store and its data verifies; else it is saved with its data and removed"},
	{ChunkNoPart, "chunk-no-part", Error, Ask, "an extent of a chunk belongs to no part of its file",
		"the part is made again from its extents and its file"},
	{PartNoFile, "part-no-file", Error, Ask, "a part belongs to no file with chunks: it is never freed",
		"the file is made again, or gets chunks"},
	{PartBytes, "part-bytes", Error, Safe, "a part of a file miscounts its stored bytes",
		"the stored bytes are counted anew"},
	{PartVolume, "part-volume", Error, Ask, "a part and its file are of different volumes",
		"the part gets the volume of its file"},
	{PartGen, "part-generation", Error, Ask, "a part is of a generation that its file has not reached",
		"the part gets the generation of its file"},
	{PartBound, "part-bound", Error, Ask, "a part reaches beyond what its file has announced",
		"the bound is raised to what is there"},

	{ExtentNowhere, "extent-nowhere", Error, Ask, "an extent lies in a segment that does not exist",
		"the extent gets a place of its own, where reading it is an I/O error (702)"},
	{ExtentOutside, "extent-outside", Error, Ask, "an extent lies outside the used part of its segment",
		"the extent is moved to a place of its own, with the bytes that are there"},
	{ExtentShared, "extent-shared", Error, Ask, "two extents refer to the same bytes of the log",
		"those that do not verify get a place of their own, where reading them is an I/O error (702)"},
	{LiveWrong, "live-wrong", Error, Safe, "a segment's live bytes are miscounted",
		"they are counted anew"},

	{SegmentRead, "segment-read", Error, None, "a segment with live data cannot be read",
		"copy the device to another one: it fails to be read; what cannot be copied is an I/O error for those who read it"},
	{DataSum, "data-sum", Error, None, "data fails its checksum: reading it is an I/O error",
		"nothing brings the data back: write the file anew, restore it, or delete it; reading it is an I/O error until then"},
	{SegmentRecord, "segment-record", Error, Ask, "a record of a segment with live data is not sound: it cannot be cleaned",
		"what verifies is moved to a new segment"},
	{ExtentOrphan, "extent-orphan", Error, Ask, "an extent is not part of a payload of its file: it cannot be cleaned",
		"the extent is written anew"},
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
