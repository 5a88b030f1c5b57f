package client

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/maphash"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"sealfs"
	"sealfs/op"
)

// kernel is what a mount does where something is not to be believed any more: the
// kernel has caches of its own, and was told for how long to believe them.
//
// Nothing here waits for a lock of the kernel's that a request of ours may hold: that
// request may wait at a server for another client's acknowledgement, and that one for
// ours. So:
//
//   - Attributes: FUSE_NOTIFY_INVAL_INODE without a range takes no such lock.
//   - Names: FUSE_NOTIFY_INVAL_ENTRY waits for the directory's lock. Where a request of ours holds that,
//     or it takes long, FUSE_NOTIFY_INC_EPOCH makes all names invalid, and waits for nothing. Where the
//     kernel lacks that, names are told without validity (kernel.epochs). All
//     names are a lot: those of a directory in which one was revoked are told without
//     validity for a while (hotTime).
//   - Pages: FUSE_NOTIFY_INVAL_INODE with a range waits for pages that are being read or
//     written. But who reads from the page cache asks for attributes first, since they are invalid by
//     then, and where size or time of modification are not those that it knows, the kernel drops
//     the pages itself before it goes on. Only where they are (somebody has set the time back) they are
//     dropped before that question is answered (kernel.refresh).
//
// An answer that grants a belief may still be on its way into the kernel when the belief
// ends. For attributes of inodes that the kernel knows, it notices itself: it
// compares a version from when it asked. An inode that it does not know yet is waited for:
// what was told of it, less what the kernel has forgotten, says that it is on its way. A name
// is looked up under the directory's lock, or its entry is there to be invalidated; and
// under the epoch from before the question.
//
// The kernel that notices throws the whole answer away, and its caller goes on with
// attributes from before the question. So the kernel is not told to forget attributes that
// were told without validity, and after each revocation they are for a while (hotTime).
type kernel struct {
	node   func(sealfs.Ino) uint64
	srv    *fuse.Server
	dev    *os.File        // the mount's device; nil: only what srv offers can be said
	conn   syscall.RawConn // of dev
	epochs bool

	seed  maphash.Seed
	told  [1 << 17]atomic.Uint64 // a bit for each name that was told with validity, by its hash
	bits  atomic.Int64           // set in told, about
	parts [64]kernelPart
	slots chan struct{} // for notifications that may wait: each keeps a thread
}

type kernelPart struct {
	mu     sync.Mutex
	inodes map[sealfs.Ino]*known
}

// known is an inode that the kernel has, or will have in a moment.
type known struct {
	refs    uint64 // answers that named it, less what the kernel has forgotten
	pages   bool   // it was opened, so that there may be pages
	valid   bool   // attributes were told with validity since the last notification
	hot     time.Time
	busy    int    // requests under way that may hold its lock, for a directory
	named   bool   // names of this directory were told with validity
	stale   bool   // pages may be older than what will be told next
	size    uint64 // this and the following: told last
	mtime   int64
	version uint64
	done    chan struct{} // pages are being dropped; closed when that is done
}

const (
	// entryPatience is for how long a revocation of names waits for the directory.
	entryPatience = time.Millisecond
	// hotTime is for how long attributes are told without validity after they were revoked.
	hotTime = time.Second
	// arrivalMax bounds the wait for an inode that is on its way into the kernel.
	arrivalMax = time.Second
	// toldMax is how many bits of told may be set before they are cleared on occasion: a set
	// one only costs a notification.
	toldMax = 1 << 20
	// slotsMax bounds the threads that wait in notifications.
	slotsMax = 64
)

// The kernel's numbers of notifications.
const (
	notifyInode = 2
	notifyEntry = 3
	notifyEpoch = 8
)

func newKernel(node func(sealfs.Ino) uint64) *kernel {
	k := &kernel{node: node, seed: maphash.MakeSeed(), slots: make(chan struct{}, slotsMax)}
	for i := range k.parts {
		k.parts[i].inodes = map[sealfs.Ino]*known{}
	}
	return k
}

// attach says whose kernel it is. dir is the mount point.
func (k *kernel) attach(srv *fuse.Server, dir string) error {
	k.srv = srv
	var err error
	if k.dev, err = deviceOf(dir); err != nil {
		return err
	}
	if k.conn, err = k.dev.SyscallConn(); err != nil {
		return err
	}
	err = k.notify(notifyEpoch)
	k.epochs = err == nil
	return err
}

// close gives the device back.
func (k *kernel) close() {
	if k.dev != nil {
		k.dev.Close()
	}
}

// deviceOf returns the device of the mount at dir, in a file of its own. The kernel
// tells the connection of each open device from 6.16 on.
func deviceOf(dir string) (*os.File, error) {
	at, err := findMount(dir)
	if err != nil || at == nil {
		return nil, errors.Join(err, fmt.Errorf("%s is no mount point: %w", dir, sealfs.ErrNotExist))
	}
	_, minor, _ := strings.Cut(at.dev, ":")
	fds, err := os.ReadDir("/proc/self/fdinfo")
	if err != nil {
		return nil, err
	}
	for _, e := range fds {
		fd, err := strconv.Atoi(e.Name())
		if err != nil || connectionOf("/proc/self/fdinfo/"+e.Name()) != minor {
			continue
		}
		if fd, err = unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0); err != nil {
			return nil, err
		}
		return os.NewFile(uintptr(fd), "/dev/fuse"), nil
	}
	return nil, fmt.Errorf("device of the mount at %s: %w", dir, sealfs.ErrNotExist)
}

// connectionOf returns the number of the FUSE connection that an open file is the device of, or "". The kernel
// says so in a file of /proc, which is given.
func connectionOf(fdinfo string) string {
	f, err := os.Open(fdinfo)
	if err != nil {
		return ""
	}
	defer f.Close()
	for lines := bufio.NewScanner(f); lines.Scan(); {
		if number, ok := strings.CutPrefix(lines.Text(), "fuse_connection:"); ok {
			return strings.TrimSpace(number)
		}
	}
	return ""
}

// notify writes a notification: struct fuse_out_header, with the number where errors are and no
// request, and what belongs to it.
func (k *kernel) notify(what uint32, payload ...byte) error {
	var room [64]byte
	b := binary.NativeEndian.AppendUint32(room[:0], uint32(16+len(payload)))
	b = binary.NativeEndian.AppendUint32(b, what)
	b = binary.NativeEndian.AppendUint64(b, 0)
	b = append(b, payload...)
	// Not os.File's Write, which lets in one at a time: some of them wait.
	var err error
	if cerr := k.conn.Control(func(fd uintptr) { _, err = unix.Write(int(fd), b) }); cerr != nil {
		return cerr
	}
	return err
}

// inodeNotify makes attributes of an inode invalid, and drops its pages if off is not negative. It returns
// sealfs.ErrNotExist if the kernel does not know the inode.
func (k *kernel) inodeNotify(ino sealfs.Ino, off int64) error {
	if k.dev == nil {
		if st := k.srv.InodeNotify(k.node(ino), off, 0); st == fuse.ENOENT {
			return sealfs.ErrNotExist
		} else if st != fuse.OK {
			return fmt.Errorf("notification: %w", unix.Errno(st))
		}
		return nil
	}
	var b [24]byte
	binary.NativeEndian.PutUint64(b[0:], k.node(ino))
	binary.NativeEndian.PutUint64(b[8:], uint64(off))
	err := k.notify(notifyInode, b[:]...)
	if errors.Is(err, unix.ENOENT) {
		return sealfs.ErrNotExist
	}
	return err
}

// entryNotify makes a name invalid.
func (k *kernel) entryNotify(dir sealfs.Ino, name string) {
	b := binary.NativeEndian.AppendUint64(nil, k.node(dir))
	b = binary.NativeEndian.AppendUint32(b, uint32(len(name)))
	b = binary.NativeEndian.AppendUint32(b, 0)
	k.notify(notifyEntry, append(append(b, name...), 0)...)
}

func (k *kernel) part(ino sealfs.Ino) *kernelPart {
	return &k.parts[uint64(ino)*0x9e3779b97f4a7c15>>58]
}

// get returns what is known of ino, nil if nothing. The root is always known. The part is locked.
func (k *kernel) get(p *kernelPart, ino sealfs.Ino) *known {
	n := p.inodes[ino]
	if n == nil && k.node(ino) == fuse.FUSE_ROOT_ID {
		n = &known{refs: 1}
		p.inodes[ino] = n
	}
	return n
}

// tell notes that ino is told to the kernel, with a reference if named, and returns for how long its
// attributes may be believed.
func (k *kernel) tell(c *Client, a *answer, named bool) time.Duration {
	ino := a.Ino
	p := k.part(ino)
	p.mu.Lock()
	defer p.mu.Unlock()
	n := k.get(p, ino)
	if n == nil {
		if !named {
			return 0
		}
		n = &known{}
		p.inodes[ino] = n
	}
	if named && k.node(ino) != fuse.FUSE_ROOT_ID {
		n.refs++
	}
	// The belief is looked at with the part locked, which who ends it takes afterwards.
	if n.size != a.Size || n.mtime != a.Mtime || n.version == a.Version {
		n.stale = false // the kernel will see it, or there is nothing to see
	}
	n.size, n.mtime, n.version = a.Size, a.Mtime, a.Version
	if n.stale || n.done != nil {
		return 0
	}
	if !c.holds(a) {
		n.stale = true // nobody tells when it changes
		return 0
	}
	now := time.Now()
	left := c.believedUntil().Sub(now)
	if left <= 0 || now.Sub(n.hot) < hotTime {
		return 0
	}
	n.valid = true
	return left
}

// opened notes that the kernel may have pages of ino.
func (k *kernel) opened(ino sealfs.Ino) {
	p := k.part(ino)
	p.mu.Lock()
	defer p.mu.Unlock()
	if n := k.get(p, ino); n != nil {
		n.pages = true
	}
}

// forget takes references back. After the last one the lease is of no use any more.
func (k *kernel) forget(c *Client, ino sealfs.Ino, refs uint64) {
	if k.node(ino) == fuse.FUSE_ROOT_ID {
		return
	}
	p := k.part(ino)
	p.mu.Lock()
	defer p.mu.Unlock()
	n := p.inodes[ino]
	if n == nil {
		return
	}
	if n.refs -= min(refs, n.refs); n.refs > 0 {
		return
	}
	if n.done == nil {
		delete(p.inodes, ino)
	}
	c.left(ino) // with the part locked, so that nobody tells it under the lease meanwhile
	for _, part := range c.splits.list(ino) {
		c.left(part)
	}
}

// refresh makes sure that the kernel has no content of an inode that is older than a, which
// is about to be told to somebody who may read that content next. cancel ends the wait.
func (k *kernel) refresh(a *op.Attr, cancel <-chan struct{}) {
	p := k.part(a.Ino)
	for {
		p.mu.Lock()
		n := p.inodes[a.Ino]
		if n == nil || n.done == nil && (!n.stale || !n.pages || n.size != a.Size || n.mtime != a.Mtime || n.version == a.Version) {
			p.mu.Unlock()
			return
		}
		done := n.done
		if done == nil {
			// It is stale again if something is revoked meanwhile.
			n.stale, n.done = false, make(chan struct{})
		}
		p.mu.Unlock()
		if done == nil {
			k.inodeNotify(a.Ino, 0)
			p.mu.Lock()
			close(n.done)
			if n.done = nil; n.refs == 0 {
				delete(p.inodes, a.Ino)
			}
			p.mu.Unlock()
			return
		}
		select {
		case <-done:
		case <-cancel:
			return
		}
	}
}

// fresh reports whether the kernel's content of ino is not older than what was told.
func (k *kernel) fresh(ino sealfs.Ino) bool {
	p := k.part(ino)
	p.mu.Lock()
	defer p.mu.Unlock()
	n := p.inodes[ino]
	return n == nil || !n.stale && n.done == nil
}

// inode makes the kernel forget attributes, and with content take care of its pages.
func (k *kernel) inode(ino sealfs.Ino, content bool) {
	p := k.part(ino)
	p.mu.Lock()
	n := k.get(p, ino)
	if n == nil {
		p.mu.Unlock()
		return
	}
	n.hot = time.Now()
	valid := n.valid
	n.valid = false
	n.stale = n.stale || content
	p.mu.Unlock()
	if valid {
		k.arrive(ino)
	}
}

// hasNames reports whether the kernel may believe names of a directory of which nothing is to be believed any
// more, and forgets that.
func (k *kernel) hasNames(dir sealfs.Ino) bool {
	p := k.part(dir)
	p.mu.Lock()
	defer p.mu.Unlock()
	n := p.inodes[dir]
	if n == nil || !n.named {
		return false
	}
	n.named = false
	return true
}

// arrive makes attributes of ino invalid, although what told them may not have reached
// the kernel yet.
func (k *kernel) arrive(ino sealfs.Ino) {
	if k.inodeNotify(ino, -1) != sealfs.ErrNotExist {
		return
	}
	pause := 20 * time.Microsecond
	for deadline := time.Now().Add(arrivalMax); time.Now().Before(deadline); pause = min(2*pause, 10*time.Millisecond) {
		p := k.part(ino)
		p.mu.Lock()
		n := p.inodes[ino]
		coming := n != nil && n.refs > 0
		p.mu.Unlock()
		if !coming {
			return
		}
		time.Sleep(pause)
		if k.inodeNotify(ino, -1) != sealfs.ErrNotExist {
			return
		}
	}
}

// touched makes attributes invalid that this mount has changed itself, where the kernel would not
// notice that an answer on its way is from before.
func (k *kernel) touched(ino sealfs.Ino) {
	p := k.part(ino)
	p.mu.Lock()
	n := k.get(p, ino)
	valid := n != nil && n.valid
	if valid {
		n.valid = false
	}
	p.mu.Unlock()
	if valid {
		k.inodeNotify(ino, -1)
	}
}

// enter notes that a request is under way for which the kernel holds a directory's lock; leave
// that it is answered.
func (k *kernel) enter(dir sealfs.Ino) { k.busy(dir, 1) }
func (k *kernel) leave(dir sealfs.Ino) { k.busy(dir, -1) }

func (k *kernel) busy(dir sealfs.Ino, by int) (now int) {
	p := k.part(dir)
	p.mu.Lock()
	defer p.mu.Unlock()
	n := k.get(p, dir)
	if n == nil {
		return 0 // never while a request for it is under way
	}
	n.busy += by
	return n.busy
}

// bit returns the place of a name in told.
func (k *kernel) bit(dir sealfs.Ino, name string) (*atomic.Uint64, uint64) {
	h := maphash.String(k.seed, name) ^ uint64(dir)*0x9e3779b97f4a7c15
	h ^= h >> 29
	return &k.told[h>>6%uint64(len(k.told))], 1 << (h & 63)
}

// name returns for how long a name may be believed that is about to be told.
func (k *kernel) name(c *Client, dir sealfs.Ino, name string, a *answer) time.Duration {
	if !k.epochs || a.dir == 0 {
		return 0
	}
	// First the bit, then the belief: who ends it looks for the bit afterwards.
	p := k.part(dir)
	p.mu.Lock()
	n := k.get(p, dir)
	hot := n == nil || time.Since(n.hot) < hotTime
	if !hot {
		n.named = true
	}
	p.mu.Unlock()
	if hot {
		return 0
	}
	if word, bit := k.bit(dir, name); word.Load()&bit == 0 {
		word.Or(bit)
		k.bits.Add(1)
	}
	if !c.leases.holds(a.at, a.dir) {
		return 0
	}
	return max(time.Until(c.believedUntil()), 0)
}

// renamed is for a rename that was answered: the kernel moves its entries, which it may
// believe for as long as it did under their old names. What it had asked of the new
// ones does not count any more.
func (k *kernel) renamed(c *Client, dir sealfs.Ino, name string, dir2 sealfs.Ino, name2 string, exchange bool) {
	if !k.epochs {
		return
	}
	from, fromBit := k.bit(dir, name)
	to, toBit := k.bit(dir2, name2)
	if from.Load()&fromBit == 0 && (!exchange || to.Load()&toBit == 0) {
		return // never told with validity, so they have none under their new names either
	}
	to.Or(toBit)
	if exchange {
		from.Or(fromBit)
	}
	if c.leases.has(c.at(dir2, name2)).serial == 0 || exchange && c.leases.has(c.at(dir, name)).serial == 0 {
		k.allNames()
	}
}

// names makes the kernel forget names.
func (k *kernel) names(list []op.Revoke) {
	over := make(chan struct{}, len(list))
	waiting, blocked := 0, false
	deadline := time.Now().Add(entryPatience)
	for _, v := range list {
		if word, bit := k.bit(v.Ino, v.Name); word.Load()&bit == 0 {
			continue
		}
		// Most requests are answered in a moment; one that is not may wait for us.
		for k.busy(v.Ino, 0) > 0 && time.Now().Before(deadline) {
			time.Sleep(entryPatience / 20)
		}
		if k.busy(v.Ino, 0) > 0 {
			blocked = true
			continue
		}
		select {
		case k.slots <- struct{}{}:
			waiting++
			go func() {
				k.entryNotify(v.Ino, v.Name)
				<-k.slots
				over <- struct{}{}
			}()
		default:
			blocked = true
		}
	}
	if waiting == 0 && !blocked {
		return
	}
	late := time.NewTimer(entryPatience)
	defer late.Stop()
	for waiting > 0 && !blocked {
		select {
		case <-over:
			waiting--
		case <-late.C:
			blocked = true
		}
	}
	if blocked {
		k.allNames()
	}
}

// allNames makes the kernel forget all names.
func (k *kernel) allNames() {
	if !k.epochs {
		return
	}
	if k.bits.Load() > toldMax {
		k.bits.Store(0)
		for i := range k.told {
			k.told[i].Store(0) // before: what is asked for from then on is of the new epoch
		}
	}
	k.notify(notifyEpoch)
}

// everything makes the kernel forget all names, and what it knows of these inodes.
func (k *kernel) everything(list []sealfs.Ino) {
	k.allNames()
	for _, ino := range list {
		k.inode(ino, true)
	}
}
