package crash

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// mutant is a sabotage of the source: in file, the text old, which must stand there
// exactly once, becomes new. The campaign has to find it.
type mutant struct {
	name  string
	file  string
	old   string
	new   string
	first string // sequences that are likely to find it
}

// mutants are all sabotages. Each breaks a rule of recovery that DESIGN.md states.
var mutants = []mutant{
	// The log and its sync.
	{"sync: the device is not flushed", "lsfs/sync.go",
		"if err := s.dev.Flush(); err != nil {\n\t\treturn fmt.Errorf(\"flush of %s", "if err := error(nil); err != nil {\n\t\treturn fmt.Errorf(\"flush of %s", "names"},
	{"sync: the last block is not padded", "lsfs/sync.go", "\t\ts.pad()\n", "", "names"},
	{"sync: the leader announces before it writes", "lsfs/sync.go",
		"\t\tend = s.tail()\n\t\tfor _, h", "\t\tend = s.tail()\n\t\tif flush {\n\t\t\ts.sync.durable.Store(uint64(end))\n\t\t}\n\t\tfor _, h", "durable"},
	{"drain: the last block of a sealed segment stays behind", "lsfs/sync.go", "\t\t\tif h.sealed {\n\t\t\t\tto =", "\t\t\tif h.sealed && h == nil {\n\t\t\t\tto =", "names"},
	{"durability=sync: answers before the log is durable", "server/change.go",
		"\tif err != nil || !st.srv.o.Durable || rep.Code != 0 {\n\t\treturn err\n\t}\n\treturn st.SyncTo(end)\n}\n\n// execute",
		"\t_ = end\n\treturn err\n}\n\n// execute", "durable"},
	{"log: a record is followed by one that does not name it", "lsfs/update.go", "s.chain = rec.Put(", "_ = rec.Put(", "names"},
	{"log: a segment's header does not name its predecessor's end", "lsfs/update.go", "Chain: s.chain, Prev: s.tail(), Created: now,", "Chain: s.chain, Created: now,", "churn"},

	// The checkpoint.
	{"checkpoint: pages before the log that changed them", "lsfs/checkpoint.go",
		"err = s.flushTo(applied)", "_ = applied", "trim"},
	{"checkpoint: the header before its pages are durable", "pmem/checkpoint.go",
		"pages := r.pages.Load()\n\tif err := r.order(); err != nil {", "pages := r.pages.Load()\n\tif err := error(nil); err != nil {", "trim"},
	{"checkpoint: the header is not flushed", "pmem/checkpoint.go",
		"\tif err := r.order(); err != nil {\n\t\treturn err\n\t}\n\told.Update, old", "\told.Update, old", "trim"},
	{"checkpoint: the header over the newest one", "pmem/checkpoint.go", "PageNo(layout.Slot(update))", "PageNo(layout.Slot(update+1))", "trim"},
	{"checkpoint: it starts where the log ends when it is over", "lsfs/checkpoint.go", "return ck.Finish(h)", "_ = h; return ck.Finish(s.header())", "trim,churn"},
	{"checkpoint: the superblock's tail before the region's header", "lsfs/checkpoint.go",
		"\tif err == nil {\n\t\terr = s.guarded(func() error { return ck.Finish", "\tif err == nil {\n\t\ts.writeSuper(func(sb *layout.Superblock) { sb.Tail = start })\n\t\terr = s.guarded(func() error { return ck.Finish", "trim"},
	{"checkpoint: a page that changes while it is copied is forgotten", "pmem/checkpoint.go", "r.set, r.dirty = 1-r.set, 0", "r.dirty = 0", "trim,churn"},
	{"trim: drops pages that changed since the checkpoint", "pmem/region.go", "!w.dirty[r.set].Get(i) && ", "", "trim"},
	{"superblock: not flushed", "lsfs/store.go", "if err := dev.Flush(); err != nil {", "if err := error(nil); err != nil {", "trim"},
	{"superblock: always the same copy", "lsfs/store.go", "int64(sb.Update%2)*layout.BlockSize", "0*int64(sb.Update)", "trim"},

	// Redo and recovery.
	{"redo: the last range of a page is forgotten", "pmem/tx.go", "\t\tif len(t.spans) > 0 {\n", "\t\tif len(t.spans) > 1 {\n\t\t\tt.spans = t.spans[:len(t.spans)-1]\n\t\t}\n\t\tif len(t.spans) > 0 {\n", "names"},
	{"redo: the segment table is forgotten", "pmem/tx.go", "\tfor _, o := range t.sorted() {\n", "\tfor _, o := range t.sorted() {\n\t\tif o.no == layout.TablePage {\n\t\t\tcontinue\n\t\t}\n", "names"},
	{"recovery: pages that redo changed are not written back", "pmem/redo.go", "\t\tr.markDirty(n)\n", "", "names"},
	{"recovery: a record's sum is not looked at", "lsfs/layout/record.go", "redo) != crc {", "redo) != crc && crc == 0 {", "names"},
	{"recovery: a payload's sum is not looked at", "lsfs/recover.go", "if rec.PayloadOK(payload) {", "if _ = payload; true {", "names"},
	{"recovery: the incarnation is not raised", "lsfs/recover.go", "s.incarnation = sb.Incarnation + 1", "s.incarnation = max(1, sb.Incarnation)", "names"},
	{"recovery: the end of the log is not in the superblock", "lsfs/recover.go",
		"sb.Incarnation, sb.FirstSlot, sb.FirstPrev, sb.Tail = s.incarnation, s.nextSlot, rec.end, rec.end",
		"sb.Incarnation, sb.FirstSlot, sb.Tail = s.incarnation, s.nextSlot, rec.end", "names"},
	{"recovery: the superblock before the region's checkpoint", "lsfs/recover.go",
		"\t// Under the old incarnation: the region's",
		"\ts.writeSuper(func(sb *layout.Superblock) { sb.Tail = rec.end })\n\t// Under the old incarnation: the region's", "names"},

	// The death of a process, and what it leaves in the ring.
	{"staging: a ring of another boot is believed", "lsfs/recover.go", " || h.BootID != boot", " || boot != boot", "kill"},
	{"staging: what only it held is not written to the device", "lsfs/recover.go",
		"if staged < 0 || ring == nil || rp.rec.slot != slot {", "if staged < 0 || ring == nil || rp.rec.slot != slot || staged > 0 {", "kill"},
	{"staging: what came from it is not flushed before the region knows it", "lsfs/recover.go",
		"more than the device.\n\tif err := s.dev.Flush(); err != nil {", "more than the device.\n\tif err := error(nil); err != nil {", "kill"},

	// Space.
	{"space: a dead segment is used again before a checkpoint", "lsfs/segments.go", "\tif len(s.free) <= keep {\n", `	for slot := range s.segs {
		if g := &s.segs[slot]; len(s.hot) > 0 && g.state == segSealed && g.live == 0 && g.seq < s.hot[0].seq && s.pins[slot].Load() == 0 {
			s.giveBack([]uint32{uint32(slot)})
			s.free = s.free[:len(s.free)-1]
			return uint32(slot), true
		}
	}
	if len(s.free) <= keep {
`, "churn,trim"},
	{"space: segments are given back when the checkpoint begins", "lsfs/checkpoint.go",
		"\ts.dying -= dying\n\ts.mu.Unlock()\n", "\ts.dying -= dying\n\ts.giveBack(dead)\n\ts.free = append(append([]uint32(nil), dead...), s.free[:len(s.free)-len(dead)]...)\n\tdead = nil\n\ts.mu.Unlock()\n", "spin,churn"},
	{"cleaner: refers to copies that are not durable", "lsfs/clean.go", "if err := s.dev.Flush(); err != nil {\n\t\t\treturn s.fail(fmt.Errorf(\"flush of a cold", "if err := error(nil); err != nil {\n\t\t\treturn s.fail(fmt.Errorf(\"flush of a cold", "clean,churn"},
	{"cleaner: refers to copies before it writes them", "lsfs/clean.go",
		"\tif err := s.writeCold(cold, true); err != nil {\n\t\treturn false, err\n\t}\n\tall, err := s.move(cold.moves)\n",
		"\tall, err := s.move(cold.moves)\n\tif err := s.writeCold(cold, true); err != nil {\n\t\treturn false, err\n\t}\n", "clean,churn"},
	{"cleaner: moves what has changed meanwhile", "meta/data.go", "e.Len == 0 || e.Addr != from || e.Stored() != n {", "e.Len == 0 || e.Stored() != n {", "clean,churn"},
	{"namespace: what loses its last name while it is open is not remembered", "meta/remove.go",
		"\tif err := ch.setOrphan(in.Ino, orphanNameless); err != nil {", "\tif err := error(nil); err != nil {", "names"},

	// The far checkpoint, from which a lost region is made again.
	{"far: the root is named before it and its pages are durable", "lsfs/far.go",
		"\tif err := s.flushLog(); err != nil {\n\t\treturn err\n\t}\n\tif err := s.dev.Flush(); err != nil {\n\t\treturn s.fail(fmt.Errorf(\"flush of a far",
		"\tif err := error(nil); err != nil {\n\t\treturn s.fail(fmt.Errorf(\"flush of a far", "far"},
	{"far: copies are ahead of the log", "lsfs/far.go",
		"\tif err := s.flushLog(); err != nil {\n\t\treturn err\n\t}\n\tif err := s.dev.Flush(); err", "\tif err := s.dev.Flush(); err", "far"},
	{"far: it starts where the log ends when it is over", "lsfs/far.go",
		"\tr := f.run\n\tif err := s.farMaps()", "\tr := f.run\n\tr.start, r.slot, r.chain = s.tail(), s.open().slot, s.chain\n\tif err := s.farMaps()", "far"},
	{"far: after a start only what changes from then on is copied", "lsfs/far.go", "s.region.BeginFar(!f.whole)", "s.region.BeginFar(false)", "far"},

	// Two stores.
	{"transaction: a vote before its row is durable", "server/transact.go", "\tst.parties.noted(req.Tx)\n\treturn st.SyncTo(end)", "\tst.parties.noted(req.Tx)\n\t_ = end\n\treturn nil", "pair"},
	{"transaction: an answer before the decision is durable", "server/transact.go", "if err := st.SyncTo(end); err != nil {\n\t\treturn err\n\t}\n\tc.Decided()", "_ = end\n\tc.Decided()", "pair"},
	{"transaction: a decision is forgotten before its parties are durable", "txn/decision.go", "p.heard, p.life = true, life", "p.heard, p.life, p.durable = true, life, true", "pair"},
	{"transaction: prepared parts are forgotten at a start", "server/parties.go",
		"func(part *op.Request) { st.parties.locks.Add(part) }", "func(part *op.Request) {}", "pair"},
	{"transaction: decisions are forgotten at a start", "server/parties.go",
		"st.unfinished = append(st.unfinished, txn.Decide(shard, tx, d.Time, d.Parties))", "_ = txn.Decide", "pair"},
	{"transaction: a party that asks hears that it is aborted", "server/parties.go", "if fate.Off == op.FateCommitted {", "if fate.Off == op.FateCommitted && t == 0 {", "pair"},

	// Totals of directories.
	{"totals: a letter is sent before it is durable", "server/totals.go", "if err := st.Sync(); err == nil && t.ctx.Err() == nil {", "if t.ctx.Err() == nil {", "pair"},
	{"totals: a letter is taken twice", "meta/totals.go", "if err != nil || last >= req.Gen {", "if err != nil || last > req.Gen {", "pair"},
	{"totals: a letter is forgotten before its receiver has it durably", "server/totals.go", "y.life, answered = t.ask(st, op.Request{Type: op.Sync, Shard: y.shard})",
		"for _, l := range letters {\n\t\t\tif l.to.Home(st.srv.cfg.Shards) == y.shard {\n\t\t\t\ty.life = l.life\n\t\t\t}\n\t\t}", "pair"},

	// Chunks.
	{"purge: chunks go before the end of their file is durable", "server/purge.go", "if err = st.Sync(); err == nil {", "if err = error(nil); err == nil {", "chunks"},
}

// moduleRoot returns the directory of go.mod.
func moduleRoot() (string, error) {
	dir, err := os.Getwd()
	for ; err == nil; dir = filepath.Dir(dir) {
		if _, e := os.Stat(filepath.Join(dir, "go.mod")); e == nil {
			return dir, nil
		}
		if dir == filepath.Dir(dir) {
			return "", fmt.Errorf("no go.mod above the working directory: %w", os.ErrNotExist)
		}
	}
	return "", err
}

// apply returns the text of the file with the sabotage.
func (m *mutant) apply(root string) ([]byte, error) {
	src, err := os.ReadFile(filepath.Join(root, m.file))
	if err != nil {
		return nil, err
	}
	if n := strings.Count(string(src), m.old); n != 1 {
		return nil, fmt.Errorf("the text that it replaces stands %d times in %s", n, m.file)
	}
	return []byte(strings.Replace(string(src), m.old, m.new, 1)), nil
}

// A mutant has survived when so many states have been judged, or after this time.
const (
	mutantStates = 25_000
	mutantLimit  = 10 * time.Minute
)

// run builds the campaign with the sabotage and runs it until it is caught. It
// returns by what.
func (m *mutant) run(ctx context.Context, root, dir string) (by string, err error) {
	src, err := m.apply(root)
	if err != nil {
		return "", err
	}
	file := filepath.Join(dir, "mutated.go")
	overlay, err := json.Marshal(map[string]map[string]string{"Replace": {filepath.Join(root, m.file): file}})
	if err != nil {
		return "", err
	}
	for name, b := range map[string][]byte{file: src, filepath.Join(dir, "overlay.json"): overlay} {
		if err := os.WriteFile(name, b, 0o600); err != nil {
			return "", err
		}
	}
	binary := filepath.Join(dir, "mutant.test")
	build := exec.CommandContext(ctx, "go", "test", "-c", "-vet=off", "-ldflags=-s -w", "-overlay", filepath.Join(dir, "overlay.json"), "-o", binary, "./internal/crash")
	build.Dir = root
	if out, err := build.CombinedOutput(); err != nil {
		return "", fmt.Errorf("it does not build: %w\n%s", err, out)
	}
	defer os.Remove(binary)
	ctx, stop := context.WithTimeout(ctx, mutantLimit+30*time.Second)
	defer stop()
	run := exec.CommandContext(ctx, binary, "-test.run=^TestWorker$", fmt.Sprint("-share=", mutantStates), "-sample", "-stop", "-limit="+mutantLimit.String(), "-first="+m.first)
	out, err := run.CombinedOutput()
	if err == nil {
		return "", nil
	}
	for line := range strings.Lines(string(out)) {
		if strings.HasPrefix(line, "crash: VIOLATION") || strings.HasPrefix(line, "panic:") || strings.HasPrefix(line, "fatal error:") {
			return strings.TrimSpace(line), nil
		}
	}
	if ctx.Err() != nil {
		return "it never ends", nil
	}
	return "", fmt.Errorf("%w\n%s", err, out)
}

// TestMutantsApply: every sabotage finds its text. One that does not would be
// counted as caught by nothing.
func TestMutantsApply(t *testing.T) {
	root, err := moduleRoot()
	if err != nil {
		t.Fatal(err)
	}
	names := map[string]bool{}
	for i := range mutants {
		m := &mutants[i]
		if _, err := m.apply(root); err != nil {
			t.Errorf("mutant %q: %v", m.name, err)
		}
		if names[m.name] {
			t.Errorf("two mutants are called %q", m.name)
		}
		names[m.name] = true
		for name := range strings.SplitSeq(m.first, ",") {
			if sequenceNamed(name) == nil {
				t.Errorf("mutant %q begins with sequence %q, which is not there", m.name, name)
			}
		}
	}
	if len(mutants) < 20 {
		t.Errorf("%d mutants are too few", len(mutants))
	}
}
