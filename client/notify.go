package client

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/maphash"
	"os"
	"slices"
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
// were told without validity, and after each revocation they are, and for a while after the first answer (hotTime).
//
// It does not notice with the answers to SETATTR and LINK, which it takes in any case: what is told with them has no
// validity (kernel.touched). And it does not compare what SETATTR is answered with what it had, so that pages which
// were stale before remain so (tellBlind).
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
	owed    bool   // none were told since they were revoked
	hot     time.Time
	changed uint64 // mark: this mount has changed it, and what was asked before may be older
	busy    int    // requests under way that may hold its lock, for a directory
	stale   bool   // pages may be older than what will be told next
	names   *names // that were told with validity, for a directory
	unsound bool   // pages may be wrong, and no attributes will show it
	size    uint64 // this and the following: told last
	mtime   int64
	version uint64
	done    chan struct{} // pages are being dropped; closed when that is done
}

// names is what the kernel was told in a directory. Its lease may be taken as a whole.
type names struct {
	list []string // up to namesMax
	more bool     // there are others
}

const (
	// namesMax bounds the names that are remembered for a directory. Where there are more, and its lease
	// is taken, the kernel has to forget all that it knows.
	namesMax = 16
	// busyPatience is for how long a revocation of names waits for requests that hold the directory.
	busyPatience = time.Millisecond
	// entryPatience is for how long it waits for notifications that it has begun then. While one goes on, it holds the
	// directory's lock, and who looks up elsewhere a directory that was moved away from there hears ESTALE: the kernel,
	// which has it in the old place still, only tries for the lock. Where such a request comes meanwhile, it ends at once.
	entryPatience = 50 * time.Millisecond
	// hotTime is for how long attributes are told without validity after they were revoked, and after they were told
	// for the first time then.
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

// telling is how the kernel takes attributes.
type telling uint8

const (
	tellNamed telling = 1 << iota // with a reference to the inode
	tellBlind                     // it does not compare time and size with what it had, and so keeps its pages
)

// tell notes that attributes are told to the kernel, and returns for how long it may believe them.
func (k *kernel) tell(c *Client, a *answer, how telling) time.Duration {
	ino := a.Ino
	p := k.part(ino)
	p.mu.Lock()
	defer p.mu.Unlock()
	n := k.get(p, ino)
	if n == nil {
		if how&tellNamed == 0 {
			return 0
		}
		n = &known{}
		p.inodes[ino] = n
	}
	if how&tellNamed != 0 && k.node(ino) != fuse.FUSE_ROOT_ID {
		n.refs++
	}
	// The belief is looked at with the part locked, which who ends it takes afterwards.
	if how&tellBlind == 0 && (n.size != a.Size || n.mtime != a.Mtime) || n.version == a.Version {
		n.stale = false // the kernel will see it, or there is nothing to see
	}
	if how&tellBlind == 0 && (n.size != a.Size || n.mtime != a.Mtime) {
		n.unsound = false
	}
	n.size, n.mtime = a.Size, a.Mtime
	if n.stale {
		return 0 // version remains that of the pages: see refresh
	}
	n.version = a.Version
	if n.unsound && n.pages || n.done != nil {
		return 0
	}
	if !c.holds(a) {
		n.stale = true // nobody tells when it changes
		return 0
	}
	now := time.Now()
	if n.owed {
		n.owed, n.hot = false, now
	}
	left := c.heldUntil(a).Sub(now)
	if left <= 0 || now.Sub(n.hot) < hotTime || a.mark <= n.changed {
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

// wrote is for a write, after which the kernel believes no attributes any more. A notification would
// only have it throw away the answer to its next question, and go on with older ones. An append the
// kernel has put where it took the end of the file to be, in its cache, too. If others may have moved
// that, pages are dropped before attributes are told again: a truncation to the size that the kernel
// came to would not show them to be wrong.
func (k *kernel) wrote(ino sealfs.Ino, appended bool) {
	p := k.part(ino)
	p.mu.Lock()
	defer p.mu.Unlock()
	if n := k.get(p, ino); n != nil {
		n.unsound = n.unsound || appended && !n.valid
		n.valid = false
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
		if n == nil || n.done == nil && (!n.pages || n.size != a.Size || n.mtime != a.Mtime ||
			!n.unsound && (!n.stale || n.version == a.Version)) {
			p.mu.Unlock()
			return
		}
		done := n.done
		if done == nil {
			// It is stale again if something is revoked meanwhile.
			n.stale, n.unsound, n.done = false, false, make(chan struct{})
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
	return n == nil || !n.stale && !n.unsound && n.done == nil
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
	n.hot, n.owed = time.Now(), true
	valid := n.valid
	n.valid = false
	n.stale = n.stale || content
	p.mu.Unlock()
	if valid {
		k.arrive(ino)
	}
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

// touched is for an inode that this mount has changed itself, where the kernel would not notice that an answer on
// its way is from before: those that were told are made invalid, and others will not be told with validity.
func (k *kernel) touched(c *Client, ino sealfs.Ino) {
	p := k.part(ino)
	p.mu.Lock()
	n := k.get(p, ino)
	valid := false
	if n != nil {
		n.changed = c.leases.mark()
		valid, n.valid = n.valid, false
	}
	p.mu.Unlock()
	if valid {
		k.inodeNotify(ino, -1)
	}
}

// happened is for a change of this mount's own that the kernel takes for one that has failed. It was sent to partitions,
// of which the kernel knows nothing.
func (k *kernel) happened(client *Client, c *call) {
	if !c.Type.Changes() {
		return
	}
	var names []op.Revoke
	for _, at := range [...]struct {
		dir  sealfs.Ino
		name string
	}{{c.Dir, c.Name}, {c.Dir2, c.Name2}} {
		if at.dir != 0 && at.name != "" {
			names = append(names, op.Revoke{Ino: client.splits.whose(at.dir), Name: at.name})
		}
	}
	k.forgetNames(names, false)
	for _, ino := range [...]sealfs.Ino{c.Dir, c.Dir2, c.Ino, c.rep.Attr.Ino} {
		if ino = client.splits.whose(ino); ino != 0 {
			k.touched(client, ino)
			k.inode(ino, true)
		}
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
	// First it is noted, then comes the belief: who ends that looks for notes afterwards.
	if !k.note(dir, name, false) || !c.leases.holds(a.at, a.dir) {
		return 0
	}
	return max(time.Until(c.believedUntil(a.at)), 0)
}

// note remembers that a name is about to be told with validity, unless it should not be, or already was: moved.
func (k *kernel) note(dir sealfs.Ino, name string, moved bool) bool {
	p := k.part(dir)
	p.mu.Lock()
	defer p.mu.Unlock()
	n := k.get(p, dir)
	if n == nil || !moved && time.Since(n.hot) < hotTime {
		return false
	}
	word, bit := k.bit(dir, name)
	if word.Load()&bit == 0 {
		word.Or(bit)
		k.bits.Add(1)
	}
	if n.names == nil {
		n.names = new(names)
	}
	switch l := n.names; {
	case l.more || slices.Contains(l.list, name):
	case len(l.list) == namesMax:
		l.list, l.more = nil, true
	default:
		l.list = append(l.list, name)
	}
	return true
}

// take returns the names in a directory that are not to be believed any more, or that they are too many.
func (k *kernel) take(dir sealfs.Ino, list []op.Revoke) (_ []op.Revoke, more bool) {
	p := k.part(dir)
	p.mu.Lock()
	defer p.mu.Unlock()
	n := k.get(p, dir)
	if n == nil || n.names == nil {
		return list, false
	}
	l := n.names
	n.names = nil
	for _, name := range l.list {
		list = append(list, op.Revoke{Ino: dir, Name: name})
	}
	return list, l.more
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
	noted := k.note(dir2, name2, true)
	if exchange {
		noted = k.note(dir, name, true) && noted
	}
	if !noted || c.leases.has(c.at(dir2, name2)).serial == 0 || exchange && c.leases.has(c.at(dir, name)).serial == 0 {
		k.allNames()
	}
}

// forgetNames makes the kernel forget names, or all of them.
func (k *kernel) forgetNames(list []op.Revoke, all bool) {
	if all {
		k.allNames()
		return
	}
	over := make(chan struct{}, len(list))
	waiting, blocked := 0, false
	deadline := time.Now().Add(busyPatience)
	for _, v := range list {
		if word, bit := k.bit(v.Ino, v.Name); word.Load()&bit == 0 {
			continue
		}
		// Most requests are answered in a moment; one that is not may wait for us.
		for k.busy(v.Ino, 0) > 0 && time.Now().Before(deadline) {
			time.Sleep(busyPatience / 20)
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
	tick := time.NewTicker(busyPatience)
	defer tick.Stop()
	for deadline := time.Now().Add(entryPatience); waiting > 0; {
		select {
		case <-over:
			waiting--
			continue
		case now := <-tick.C:
			// A request that has come since may have the lock, and wait for us.
			late := now.After(deadline) || slices.ContainsFunc(list, func(v op.Revoke) bool { return k.busy(v.Ino, 0) > 0 })
			blocked = blocked || late
			if !late {
				continue
			}
		}
		break
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
