package lease

import "sealfs"

// Overdue finds sessions that do not give back what they are asked for. Its owner calls
// Look at regular times; it has no clock, so that the owner's own standing still is
// not blamed on anybody. The zero value is ready.
type Overdue struct {
	of map[sealfs.Session]*lag
}

// lag is what was seen of a session, and in how many looks in a row.
type lag struct {
	oldest  []uint64 // by table: the first revocation that is not acknowledged, 0 if there is none
	same    []int    // looks that found that one
	watches uint64   // that came, at all tables together
	quiet   int      // looks that found no more of them
	seen    bool
}

// Look looks at tables, which must be the same each time. It returns the sessions of which in one of
// them the same revocation was not acknowledged for more than looks looks, and which of these
// have not sent a Watch to any table meanwhile: they may have stopped.
func (o *Overdue) Look(tables []*Table, looks int) (late, silent []sealfs.Session) {
	if o.of == nil {
		o.of = map[sealfs.Session]*lag{}
	}
	heard := map[sealfs.Session]uint64{}
	for i, t := range tables {
		t.mu.Lock()
		for id, s := range t.sessions {
			l := o.of[id]
			if l == nil {
				l = &lag{oldest: make([]uint64, len(tables)), same: make([]int, len(tables))}
				o.of[id] = l
			}
			l.seen = true
			heard[id] += s.watch
			oldest := uint64(0)
			if len(s.queue) > 0 {
				oldest = s.queue[0].Num
			}
			if oldest == 0 || oldest != l.oldest[i] {
				l.oldest[i], l.same[i] = oldest, 0
			} else {
				l.same[i]++
			}
		}
		t.mu.Unlock()
	}
	for id, l := range o.of {
		if !l.seen {
			delete(o.of, id)
			continue
		}
		l.seen = false
		if l.watches == heard[id] {
			l.quiet++
		} else {
			l.watches, l.quiet = heard[id], 0
		}
		for _, n := range l.same {
			if n >= looks {
				late = append(late, id)
				if l.quiet >= looks {
					silent = append(silent, id)
				}
				break
			}
		}
	}
	return late, silent
}
