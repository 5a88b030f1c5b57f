package cluster

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/hashicorp/raft"
	raftboltdb "github.com/hashicorp/raft-boltdb/v2"
	"golang.org/x/sys/unix"

	"sealfs"
	"sealfs/internal/enc"
)

// openFiles takes the directory's lock, opens the log and finds out who we are.
func (m *Manager) openFiles(ctx context.Context) error {
	path := filepath.Join(m.o.Dir, boltFile)
	_, statErr := os.Stat(path)
	fresh := errors.Is(statErr, os.ErrNotExist)
	if fresh {
		if err := m.findCluster(ctx); err != nil {
			return err
		}
	}
	switch {
	case fresh && m.cluster.IsZero():
		return fmt.Errorf("there is no %s, and no cluster to make or to join: %w", boltFile, sealfs.ErrNotExist)
	case fresh:
		if err := os.MkdirAll(filepath.Join(m.o.Dir, "snapshots"), 0o755); err != nil {
			return err
		}
		if err := syncDir(filepath.Dir(filepath.Clean(m.o.Dir))); err != nil {
			return err
		}
	case statErr != nil:
		return statErr
	}
	if err := m.takeLock(); err != nil {
		return err
	}
	if _, err := os.Stat(path); errors.Is(err, os.ErrNotExist) {
		if old, err := filepath.Glob(filepath.Join(m.o.Dir, "snapshots", "*")); err != nil || len(old) > 0 {
			return &sealfs.Corruption{Where: path, Off: -1, What: "the file is missing, but there are snapshots"}
		}
	}
	if err := m.sweep(); err != nil {
		return err
	}
	var err error
	if m.store, err = openLogStore(m.o.Dir, m.latch); err != nil {
		return err
	}
	if m.o.wrap != nil {
		m.store.bolt = m.o.wrap(m.store.bolt)
	}
	if err := m.store.verify(); err != nil {
		return err
	}
	return m.identify(ctx)
}

// takeLock makes sure that no other process has the directory open.
func (m *Manager) takeLock() error {
	f, err := os.OpenFile(filepath.Join(m.o.Dir, "lock"), os.O_RDWR|os.O_CREATE, 0o644)
	if err != nil {
		return err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		pid, _ := io.ReadAll(io.LimitReader(f, 20))
		f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			if len(pid) == 0 { // it is about to write it
				pid = []byte("unknown (it is just starting)")
			}
			return fmt.Errorf("held by pid %s: %w", strings.TrimSpace(string(pid)), sealfs.ErrBusy)
		}
		return fmt.Errorf("lock: %w", err)
	}
	m.lock = f
	if err := f.Truncate(0); err != nil {
		return err
	}
	_, err = fmt.Fprintln(f, os.Getpid())
	return err
}

// sweep removes snapshots that a killed process left unfinished.
func (m *Manager) sweep() error {
	drafts, err := filepath.Glob(filepath.Join(m.o.Dir, "snapshots", "*.tmp"))
	for _, d := range drafts {
		err = errors.Join(err, os.RemoveAll(d))
	}
	return err
}

// findCluster finds out which cluster a new manager is made for. It asks the
// managers that it is to join, before anything is made.
func (m *Manager) findCluster(ctx context.Context) error {
	switch {
	case len(m.o.Join) > 0:
		r := NewRemote(m.o.Join, RemoteOptions{Cluster: m.o.Cluster})
		defer r.Close()
		s, err := r.Status(ctx)
		if err != nil {
			return fmt.Errorf("joining: %w", err)
		}
		if s.Cluster.IsZero() {
			return fmt.Errorf("joining: manager %s does not know its cluster yet: %w", s.Addr, sealfs.ErrUnavailable)
		}
		m.cluster = s.Cluster
	case !m.o.Cluster.IsZero() && (m.o.Addr == "" || m.o.Bootstrap):
		m.cluster = m.o.Cluster
	case m.o.Bootstrap:
		m.cluster = sealfs.NewUUID()
	}
	return nil
}

// identityKey is the variable that says who this manager is: 8 magic
// "SEALFSm1", 2 version, 16 identifier of the manager, and from version 2 on
// 16 identifier of the cluster. removedKey is the one that says that it was
// removed from its cluster: one byte, 1.
const (
	identityKey     = "SealFSManager"
	identityMagic   = "SEALFSm1"
	identityVersion = 2
	removedKey      = "SealFSRemoved"
)

// identify reads the manager's identity, or makes one in an empty log.
func (m *Manager) identify(ctx context.Context) error {
	b, err := m.store.Get([]byte(identityKey))
	switch {
	case err == nil:
		return m.readIdentity(b)
	case !errors.Is(err, raftboltdb.ErrKeyNotFound):
		return err
	}
	if last, err := m.store.LastIndex(); err != nil {
		return err
	} else if last > 0 {
		return &sealfs.Corruption{Where: m.store.path, Off: -1, What: "a Raft log without an identity"}
	}
	if m.cluster.IsZero() { // a crash came between the file and the identity
		if err := m.findCluster(ctx); err != nil {
			return err
		}
		if m.cluster.IsZero() {
			return fmt.Errorf("the manager was never initialised: %w", sealfs.ErrNotExist)
		}
	}
	m.id = sealfs.NewUUID()
	b = append(enc.AppendU16([]byte(identityMagic), identityVersion), m.id[:]...)
	return m.store.Set([]byte(identityKey), append(b, m.cluster[:]...))
}

func (m *Manager) readIdentity(b []byte) error {
	r := enc.Reader{B: b}
	magic, version := r.Bytes(8), r.U16()
	if r.Err || string(magic) != identityMagic {
		return &sealfs.Corruption{Where: m.store.path, Off: -1, What: "identity of the manager"}
	}
	if version < 1 || version > identityVersion {
		return fmt.Errorf("%s is of format version %d, this program knows 1 to %d: %w", m.store.path, version, identityVersion, sealfs.ErrVersion)
	}
	if m.id = readUUID(&r); version >= 2 {
		m.cluster = readUUID(&r)
	}
	if !r.Done() {
		return &sealfs.Corruption{Where: m.store.path, Off: -1, What: "identity of the manager"}
	}
	if version == 1 {
		var err error
		if m.cluster, err = m.clusterInLog(); err != nil {
			return err
		}
	}
	if !m.o.Cluster.IsZero() && !m.cluster.IsZero() && m.cluster != m.o.Cluster {
		return m.otherCluster(m.cluster)
	}
	if removed, err := m.store.Get([]byte(removedKey)); err == nil && len(removed) > 0 && removed[0] == 1 {
		return fmt.Errorf("%w: remove the directory to let it join as a new one", errRemoved)
	} else if err != nil && !errors.Is(err, raftboltdb.ErrKeyNotFound) {
		return err
	}
	return nil
}

var errRemoved = fmt.Errorf("the manager was removed from its cluster: %w", sealfs.ErrNotExist)

// clusterInLog finds the identifier of the cluster in a directory whose
// identity lacks it: in a snapshot, or in the command that made the cluster.
func (m *Manager) clusterInLog() (sealfs.UUID, error) {
	files, err := filepath.Glob(filepath.Join(m.o.Dir, "snapshots", "*", "state.bin"))
	if err != nil {
		return sealfs.UUID{}, err
	}
	for _, f := range files {
		if b, err := os.ReadFile(f); err == nil {
			if mp, _, err := decodeState(b); err == nil {
				return mp.Cluster, nil
			}
		}
	}
	first, err := m.store.FirstIndex()
	if err != nil {
		return sealfs.UUID{}, err
	}
	last, err := m.store.LastIndex()
	for i := first; err == nil && first > 0 && i <= last; i++ {
		var l raft.Log
		if err = m.store.GetLog(i, &l); err == nil && l.Type == raft.LogCommand {
			if c, err := decodeCommand(l.Data); err == nil && c.kind == cmdInit {
				return c.init.Cluster, nil
			}
		}
	}
	return m.o.Cluster, err // nothing was ever committed
}

// checkReach makes sure that snapshots and log make a whole state, before raft
// makes up one that lacks something. It reports whether there is a state.
//
// The log may be empty where there are snapshots: one that came from a leader
// or from Recover stands for all that was before it.
func (m *Manager) checkReach(snaps raft.SnapshotStore) (used bool, err error) {
	first, err := m.store.FirstIndex()
	if err != nil {
		return false, err
	}
	last, err := m.store.LastIndex()
	if err != nil {
		return false, err
	}
	dirs, err := filepath.Glob(filepath.Join(m.o.Dir, "snapshots", "*-*-*"))
	if err != nil {
		return false, err
	}
	var newest, intact uint64 // last entry in the newest snapshot, and in the newest intact one
	for _, d := range dirs {
		var term, index, at uint64
		if n, err := fmt.Sscanf(filepath.Base(d), "%d-%d-%d", &term, &index, &at); n == 3 && err == nil {
			newest = max(newest, index)
		}
	}
	list, err := snaps.List()
	if err != nil {
		return false, err
	}
	for _, s := range list {
		err := checkSnapshot(snaps, s.ID)
		if errors.Is(err, sealfs.ErrVersion) {
			return false, err
		}
		if err == nil {
			intact = s.Index
			break
		}
	}
	switch {
	case first > intact+1:
		return false, &sealfs.Corruption{Where: m.store.path, Off: -1, What: fmt.Sprintf("the Raft log begins at %d, snapshots reach to %d", first, intact)}
	case newest > intact && last < newest:
		return false, &sealfs.Corruption{Where: filepath.Join(m.o.Dir, "snapshots"), Off: -1, What: fmt.Sprintf("snapshot of entry %d, and the Raft log ends at %d", newest, last)}
	}
	if used = last > 0 || intact > 0; used {
		if _, err := m.store.GetUint64([]byte("CurrentTerm")); err != nil {
			return false, fmt.Errorf("Raft's term: %w", err)
		}
	}
	return used, nil
}

// checkSnapshot reads a snapshot as raft would.
func checkSnapshot(snaps raft.SnapshotStore, id string) error {
	_, r, err := snaps.Open(id)
	if err != nil {
		return err
	}
	defer r.Close()
	b, err := io.ReadAll(io.LimitReader(r, 2*StateMax))
	if err == nil {
		_, _, err = decodeState(b)
	}
	return err
}
