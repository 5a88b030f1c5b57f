package fsck

import (
	"fmt"
	"slices"
	"strings"

	"sealfs"
)

// Exit statuses, as in fsck(8): a bit sum.
const (
	ExitClean       = 0
	ExitRepaired    = 1  // problems were found and repaired
	ExitUncorrected = 4  // problems are left
	ExitOperational = 8  // the check itself failed
	ExitUsage       = 16 // wrong arguments
	ExitCancelled   = 32 // interrupted by the user
)

// Found is a problem that was found.
type Found struct {
	ID       ID       `json:"problem"`
	Name     string   `json:"name"`
	Severity Severity `json:"severity"`
	Where    string   `json:"where"`  // file and place, or the inode
	Detail   string   `json:"detail"` // what exactly
	Repaired bool     `json:"repaired,omitempty"`
}

// String returns the finding in one line.
func (f *Found) String() string {
	p, _ := Lookup(f.ID)
	s := fmt.Sprintf("[%d] %s: %s: %s", f.ID, f.Where, p.Sentence, f.Detail)
	if f.Repaired {
		s += " (repaired)"
	}
	return s
}

// Report is what a check found. Counts of a store whose passes were skipped are
// incomplete.
type Report struct {
	Device  string      `json:"device"`
	Region  string      `json:"region"`
	Staging string      `json:"staging,omitempty"` // "" if no ring of this store, incarnation and boot is there
	Store   sealfs.UUID `json:"store"`
	Cluster sealfs.UUID `json:"cluster"`
	Label   string      `json:"label,omitempty"`

	Records  int        `json:"records"` // that the next recovery replays
	Staged   int        `json:"staged"`  // of them, found only in staging
	LogEnd   sealfs.LSN `json:"log_end"`
	Shards   uint32     `json:"shards"`
	Segments uint32     `json:"segments"`
	InUse    uint32     `json:"segments_in_use"`

	Files       uint64 `json:"files"` // regular ones
	Directories uint64 `json:"directories"`
	Partitions  uint64 `json:"partitions"` // of large directories, which may lie elsewhere
	Symlinks    uint64 `json:"symlinks"`
	Others      uint64 `json:"others"`
	Orphans     uint64 `json:"orphans"` // inodes without a name, freed by the next start; counted above, too
	Entries     uint64 `json:"entries"`
	Keys        uint64 `json:"keys"`
	Pages       uint64 `json:"pages"`      // of the tree
	Parts       uint64 `json:"parts"`      // of large files, whose inodes may lie elsewhere
	Bytes       uint64 `json:"bytes"`      // stored, of all extents
	ReadBytes   uint64 `json:"read_bytes"` // of them, verified by the data pass

	InDoubt      int           `json:"in_doubt"`               // transactions that the store has prepared a part of
	Transactions []Transaction `json:"transactions,omitempty"` // those, at most Options.Keep of them
	NotJudged    uint64        `json:"not_judged"`             // what cannot be judged without stores that were not given

	Found   []Found    `json:"found"`            // at most Options.Keep of each number
	Counts  map[ID]int `json:"counts,omitempty"` // how often each number was found
	Fixed   map[ID]int `json:"fixed,omitempty"`  // and repaired
	Skipped []string   `json:"skipped,omitempty"`

	Plan  []Step   `json:"plan,omitempty"`  // what was planned, whether or not it was done
	Saved []string `json:"saved,omitempty"` // files with what repairs have removed or changed
}

// Clean reports whether nothing was found, or everything was repaired.
func (r *Report) Clean() bool { return r.left(Warning) == 0 }

// Sound reports whether nothing worse than warnings is left: redundancy may be,
// but no data and no consistency is lost. It is what a power cut at any moment
// must leave.
func (r *Report) Sound() bool { return r.left(Error) == 0 }

// left counts the unrepaired problems of at least the given severity.
func (r *Report) left(s Severity) int {
	n := 0
	for id, k := range r.Counts {
		if p, _ := Lookup(id); p.Severity >= s {
			n += k - r.Fixed[id]
		}
	}
	return n
}

// Exit returns the exit status for the report.
func (r *Report) Exit() int {
	e := ExitClean
	if len(r.Fixed) > 0 {
		e |= ExitRepaired
	}
	if !r.Clean() {
		e |= ExitUncorrected
	}
	return e
}

// IDs returns the numbers of the problems that were found, ascending.
func (r *Report) IDs() []ID {
	var ids []ID
	for id := range r.Counts {
		ids = append(ids, id)
	}
	slices.Sort(ids)
	return ids
}

// Summary is the last line for humans.
func (r *Report) Summary() string {
	state := "clean"
	fixed := 0
	for _, n := range r.Fixed {
		fixed += n
	}
	errs := r.left(Error)
	warnings := r.left(Warning) - errs
	var parts []string
	if fixed > 0 {
		parts = append(parts, fmt.Sprintf("%d repaired", fixed))
	}
	if errs > 0 {
		parts = append(parts, count(errs, "error")+" left")
	}
	if warnings > 0 {
		parts = append(parts, count(warnings, "warning")+" left")
	}
	if len(parts) > 0 {
		state = strings.Join(parts, ", ")
	}
	s := fmt.Sprintf("%s: %s, %s, %s, %s", r.Device, state,
		count(r.Files, "file"), plural(r.Directories, "directory", "directories"), count(r.Bytes, "byte"))
	if r.Segments > 0 {
		s += fmt.Sprintf(" (%d/%d segments in use)", r.InUse, r.Segments)
	}
	return s + doubts(r.InDoubt, r.NotJudged)
}

// Summary is the last line for humans.
func (t *Together) Summary() string {
	problems := 0
	for _, r := range t.Stores {
		problems += r.left(Warning)
	}
	failed := 0
	for _, err := range t.Errors {
		if err != nil {
			failed++
		}
	}
	var state []string
	if problems > 0 {
		state = append(state, count(problems, "problem")+" left")
	}
	if failed > 0 {
		state = append(state, fmt.Sprintf("%d could not be checked", failed))
	}
	if len(state) == 0 {
		state = append(state, "clean")
	}
	s := fmt.Sprintf("cluster %v: %s, %s", t.Cluster, count(len(t.Stores), "store"), strings.Join(state, ", "))
	s += doubts(t.InDoubt, t.NotJudged)
	if n := len(t.Missing); n > 0 {
		s += fmt.Sprintf(", %s of the cluster missing", count(n, "store"))
	} else if t.Absent > 0 {
		s += fmt.Sprintf(", %s on none of these stores", count(t.Absent, "shard"))
	}
	return s
}

// doubts says what is no problem and yet not certain.
func doubts(inDoubt int, notJudged uint64) (s string) {
	if inDoubt > 0 {
		s += ", " + count(inDoubt, "transaction") + " in doubt"
	}
	if notJudged > 0 {
		s += fmt.Sprintf(", %d not judged", notJudged)
	}
	return s
}

func count[T int | uint64](n T, noun string) string { return plural(n, noun, noun+"s") }

func plural[T int | uint64](n T, one, many string) string {
	if n == 1 {
		return "1 " + one
	}
	return fmt.Sprintf("%d %s", n, many)
}
