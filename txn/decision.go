package txn

import (
	"slices"

	"sealfs"
	"sealfs/op"
)

// Decision is the state machine of a transaction that is decided. It must not be
// forgotten until every party has committed it durably. A party commits first
// and makes it durable later, for many at once; if its power fails between the two,
// its next life finds the part prepared once more, and asks. So a Sync counts only
// if the life answers it that has committed.
//
//	open ── Committed ──► committed ── Synced by the same life ──► durable
//	  ◄──────────────────────┘ Synced by another life
type Decision struct {
	Coord sealfs.Shard
	Tx    op.Tx
	Time  int64 // of the operation, in nanoseconds since 1970

	parties []party
}

type party struct {
	shard   sealfs.Shard
	heard   bool
	life    uint64 // in which it has committed
	durable bool
}

// Decide returns the Decision of a transaction with parties in these shards,
// some of which may come twice. None of them has heard of it.
func Decide(coord sealfs.Shard, tx op.Tx, time int64, parties []sealfs.Shard) *Decision {
	d := &Decision{Coord: coord, Tx: tx, Time: time}
	for _, s := range parties {
		if d.party(s) == nil {
			d.parties = append(d.parties, party{shard: s})
		}
	}
	return d
}

func (d *Decision) party(s sealfs.Shard) *party {
	i := slices.IndexFunc(d.parties, func(p party) bool { return p.shard == s })
	if i < 0 {
		return nil
	}
	return &d.parties[i]
}

// Open returns the parties that are to be sent a Commit.
func (d *Decision) Open() []sealfs.Shard {
	return d.which(func(p *party) bool { return !p.heard })
}

// Lazy returns the parties that have committed and are to be sent a Sync.
func (d *Decision) Lazy() []sealfs.Shard {
	return d.which(func(p *party) bool { return p.heard && !p.durable })
}

func (d *Decision) which(match func(*party) bool) (shards []sealfs.Shard) {
	for i := range d.parties {
		if match(&d.parties[i]) {
			shards = append(shards, d.parties[i].shard)
		}
	}
	return shards
}

// Committed says that a party has answered Commit, in a life of its store: a
// number that no other life of it has.
func (d *Decision) Committed(s sealfs.Shard, life uint64) {
	if p := d.party(s); p != nil && !p.durable {
		p.heard, p.life = true, life
	}
}

// Synced says that a party has answered a Sync that was sent after Committed.
func (d *Decision) Synced(s sealfs.Shard, life uint64) {
	if p := d.party(s); p != nil && p.heard && !p.durable {
		p.durable = p.life == life
		p.heard = p.durable
	}
}

// Done reports whether the decision may be forgotten.
func (d *Decision) Done() bool {
	return !slices.ContainsFunc(d.parties, func(p party) bool { return !p.durable })
}
