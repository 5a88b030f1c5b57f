package cluster

import (
	"errors"
	"fmt"
	"slices"
	"time"

	"sealfs"
	"sealfs/cluster/placement"
)

// Bounds of a map. They keep what a damaged or hostile encoding can ask for small.
const (
	StoresMax    = 4096    // stores, including those that have left
	VolumesMax   = 1 << 16 // volumes at one time
	ReplicasMax  = 8       // replicas of a shard
	NameMax      = 64      // bytes of the name of a cluster or volume
	LocationMax  = 255     // bytes of an address, host or rack
	RootModeMask = 0o7777  // what may be set in a volume's Mode
)

// Map is one version of the cluster map. It is immutable: whoever has it may
// read it for as long as it likes, and must not change what it refers to.
type Map struct {
	Version    uint64        `json:"version"` // grows by one with every change, from 1
	Cluster    sealfs.UUID   `json:"cluster"`
	Name       string        `json:"name"`
	Shards     uint32        `json:"shards"`      // a power of two, fixed for ever
	Replicas   int           `json:"replicas"`    // of each shard, wanted
	OpVersion  uint32        `json:"op_version"`  // meaning of logged operations that all servers must know
	NextVolume sealfs.Volume `json:"next_volume"` // volume numbers are never reused
	Stores     []StoreInfo   `json:"stores"`      // only ever appended to
	Volumes    []VolumeInfo  `json:"volumes"`     // in the order of their numbers
	Table      []ShardInfo   `json:"table"`       // one per shard
}

// StoreInfo describes a store.
type StoreInfo struct {
	ID     sealfs.UUID `json:"id"`
	Addr   string      `json:"addr"` // where its server listens; empty in the manager's own process
	Host   string      `json:"host"` // failure domains
	Rack   string      `json:"rack"`
	Weight uint32      `json:"weight"` // share of the shards, by convention GiB
	Bytes  uint64      `json:"bytes"`  // capacity
	State  StoreState  `json:"state"`
	Server sealfs.UUID `json:"server"`        // who serves it; zero: nobody has told by a Beat yet
	Bad    bool        `json:"bad,omitempty"` // the operator says so: it gets no shards that it does not have
}

// VolumeInfo describes a volume.
type VolumeInfo struct {
	ID      sealfs.Volume `json:"id"`
	Name    string        `json:"name"`
	Bytes   uint64        `json:"bytes"`  // quota, 0 for none
	Inodes  uint64        `json:"inodes"` // quota, 0 for none
	Root    sealfs.Ino    `json:"root"`   // root directory, 0 while creating
	State   VolumeState   `json:"state"`
	Created time.Time     `json:"created"` // UTC
	Mode    uint32        `json:"mode"`    // permissions the root directory is created with
	UID     uint32        `json:"uid"`
	GID     uint32        `json:"gid"`
	// Since is the version of the map with which a quota came into force that there had not
	// been before: what stores may use of it was given out since then. BornLimited: it was
	// there from the beginning.
	Since uint64 `json:"since,omitempty"`
}

// BornLimited in VolumeInfo.Since: no store has held anything of the volume without a quota.
const BornLimited = 1

// ShardInfo says where a shard lies.
type ShardInfo struct {
	Replicas []uint16     `json:"replicas"` // indexes in Map.Stores, the primary first
	Epoch    sealfs.Epoch `json:"epoch"`    // grows with every change of Replicas
}

// StoreState is what the manager believes about a store. Values are persistent.
type StoreState uint8

// The states of a store.
const (
	StoreUp      StoreState = 1 + iota // heartbeats arrive
	StoreSuspect                       // some were missed
	StoreDown                          // given up until one arrives
	StoreLeft                          // removed for ever
)

var storeStates = []string{StoreUp: "up", StoreSuspect: "suspect", StoreDown: "down", StoreLeft: "left"}

// String returns the state's name.
func (s StoreState) String() string { return stateName(storeStates, uint8(s)) }

// MarshalText lets the name stand in JSON.
func (s StoreState) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// UnmarshalText reads what MarshalText writes.
func (s *StoreState) UnmarshalText(b []byte) error {
	v, err := parseState(storeStates, "store", b)
	*s = StoreState(v)
	return err
}

// VolumeState is a stage in the life of a volume. Values are persistent.
type VolumeState uint8

// The states of a volume. One that is gone is not in the map.
const (
	VolumeCreating VolumeState = 1 + iota // has a number, but no root directory yet
	VolumeReady
	VolumeDeleting // must not be mounted; its inodes are being freed
)

var volumeStates = []string{VolumeCreating: "creating", VolumeReady: "ready", VolumeDeleting: "deleting"}

// String returns the state's name.
func (s VolumeState) String() string { return stateName(volumeStates, uint8(s)) }

// MarshalText lets the name stand in JSON.
func (s VolumeState) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// UnmarshalText reads what MarshalText writes.
func (s *VolumeState) UnmarshalText(b []byte) error {
	v, err := parseState(volumeStates, "volume", b)
	*s = VolumeState(v)
	return err
}

func stateName(names []string, v uint8) string {
	if v > 0 && int(v) < len(names) {
		return names[v]
	}
	return fmt.Sprintf("state %d", v)
}

func parseState(names []string, kind string, b []byte) (uint8, error) {
	if v := slices.Index(names, string(b)); v > 0 {
		return uint8(v), nil
	}
	return 0, fmt.Errorf("%q is not a %s state: %w", b, kind, sealfs.ErrInvalid)
}

// StoreIndex returns the index of a store in m.Stores, -1 if there is none.
func (m *Map) StoreIndex(id sealfs.UUID) int {
	return slices.IndexFunc(m.Stores, func(s StoreInfo) bool { return s.ID == id })
}

// Volume returns the volume with the given name.
func (m *Map) Volume(name string) (VolumeInfo, bool) {
	for _, v := range m.Volumes {
		if v.Name == name {
			return v, true
		}
	}
	return VolumeInfo{}, false
}

// VolumeByID returns the volume with the given number.
func (m *Map) VolumeByID(id sealfs.Volume) (VolumeInfo, bool) {
	if i := m.volumeIndex(id); i >= 0 {
		return m.Volumes[i], true
	}
	return VolumeInfo{}, false
}

func (m *Map) volumeIndex(id sealfs.Volume) int {
	return slices.IndexFunc(m.Volumes, func(v VolumeInfo) bool { return v.ID == id })
}

// CheckName reports why a name cannot be that of a volume or cluster, or nil:
// 1 to NameMax of A-Z, a-z, 0-9, dot, underscore and minus. A name that starts
// with a dot (hidden, or a relative path) or a minus (a flag) is reserved.
func CheckName(name string) error {
	switch {
	case name == "":
		return fmt.Errorf("a name is needed: %w", sealfs.ErrInvalid)
	case len(name) > NameMax:
		return fmt.Errorf("name of %d bytes is longer than %d: %w", len(name), NameMax, sealfs.ErrNameTooLong)
	case name[0] == '.' || name[0] == '-':
		return fmt.Errorf("name %q: names that start with %q are reserved: %w", name, name[0], sealfs.ErrInvalid)
	}
	for _, c := range []byte(name) {
		switch {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9', c == '.', c == '_', c == '-':
		default:
			return fmt.Errorf("name %q: character %q is not one of A-Z a-z 0-9 . _ -: %w", name, c, sealfs.ErrInvalid)
		}
	}
	return nil
}

// checkLocation reports whether s can be an address, host or rack.
func checkLocation(what, s string) error {
	if len(s) > LocationMax {
		return fmt.Errorf("%s of %d bytes is longer than %d: %w", what, len(s), LocationMax, sealfs.ErrInvalid)
	}
	return nil
}

// checkGeometry reports all faults of what is fixed at the cluster's birth.
func checkGeometry(name string, shards uint32, replicas int) error {
	errs := []error{CheckName(name)}
	if shards == 0 || shards > sealfs.ShardsMax || shards&(shards-1) != 0 {
		errs = append(errs, fmt.Errorf("%d shards: want a power of two from 1 to %d: %w", shards, sealfs.ShardsMax, sealfs.ErrInvalid))
	}
	if replicas < 1 || replicas > ReplicasMax {
		errs = append(errs, fmt.Errorf("%d replicas: want 1 to %d: %w", replicas, ReplicasMax, sealfs.ErrInvalid))
	}
	return errors.Join(errs...)
}

// check reports the first rule of a map that m breaks.
func (m *Map) check() error {
	if err := checkGeometry(m.Name, m.Shards, m.Replicas); err != nil {
		return err
	}
	switch {
	case m.Version == 0 || m.Cluster.IsZero() || m.NextVolume == 0:
		return errors.New("version, cluster or next volume is zero")
	case len(m.Stores) > StoresMax || len(m.Volumes) > VolumesMax:
		return errors.New("too many stores or volumes")
	case len(m.Table) != int(m.Shards):
		return fmt.Errorf("%d rows for %d shards", len(m.Table), m.Shards)
	}
	ids := make(map[sealfs.UUID]bool)
	for i, s := range m.Stores {
		if s.ID.IsZero() || ids[s.ID] || s.State < StoreUp || s.State > StoreLeft {
			return fmt.Errorf("store %d: identifier %s, %s", i, s.ID, s.State)
		}
		ids[s.ID] = true
		if err := errors.Join(checkLocation("address", s.Addr), checkLocation("host", s.Host), checkLocation("rack", s.Rack)); err != nil {
			return err
		}
	}
	names, last := make(map[string]bool), sealfs.Volume(0)
	for _, v := range m.Volumes {
		if err := CheckName(v.Name); err != nil {
			return err
		}
		if v.ID <= last || v.ID >= m.NextVolume || names[v.Name] || v.State < VolumeCreating || v.State > VolumeDeleting ||
			v.Root > sealfs.InoMax || v.State == VolumeReady && v.Root == 0 || v.Mode&^RootModeMask != 0 || v.Since > m.Version {
			return fmt.Errorf("volume %d breaks a rule", v.ID)
		}
		names[v.Name], last = true, v.ID
	}
	for s, row := range m.Table {
		if len(row.Replicas) > ReplicasMax {
			return fmt.Errorf("shard %d has %d replicas", s, len(row.Replicas))
		}
		for k, i := range row.Replicas {
			if int(i) >= len(m.Stores) || slices.Contains(row.Replicas[:k], i) {
				return fmt.Errorf("shard %d names store %d", s, i)
			}
		}
	}
	return nil
}

// place computes the table anew and raises the epochs of rows that change.
func (m *Map) place() {
	stores := make([]placement.Store, len(m.Stores))
	for i, s := range m.Stores {
		stores[i] = placement.Store{ID: s.ID, Host: s.Host, Rack: s.Rack, Weight: s.Weight}
		if s.State == StoreLeft || s.Bad {
			stores[i].Weight = 0
		}
	}
	table := slices.Clone(m.Table)
	for s, row := range placement.Place(stores, m.Shards, m.Replicas) {
		if !slices.Equal(row, table[s].Replicas) {
			table[s] = ShardInfo{Replicas: row, Epoch: table[s].Epoch + 1}
		}
	}
	m.Table = table
}
