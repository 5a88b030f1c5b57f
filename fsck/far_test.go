package fsck

import (
	"errors"
	"testing"

	"sealfs/disk"
	"sealfs/lsfs"
)

// TestFarIsClean: far checkpoints are no problem, whatever state a process leaves
// them in, and neither is a region that was made from one.
func TestFarIsClean(t *testing.T) {
	far := lazy
	far.FarBytes = 1 << 40
	w := newWorld(t, 120, far)
	w.must(w.s.FarCheckpoint())
	w.zoo()
	for i := range 8 {
		ino := w.create(w.root, string(rune('a'+i)))
		w.write(ino, 0, pattern(byte(i), 7000))
		w.must(w.s.FarCheckpoint())
	}
	w.must(w.s.Checkpoint())
	if st := w.s.Stats(); st.FarSegments < 2 || st.FarReason != "" {
		t.Fatalf("%d far segments, %q", st.FarSegments, st.FarReason)
	}
	w.must(w.s.Sync())
	w.kill()
	killed := w.clean("killed", Options{})
	w.open(far)
	w.must(w.s.Close())
	w.clean("closed", Options{})

	dev, err := disk.Open(w.dev, disk.OpenOptions{Exclusive: true})
	w.must(err)
	_, err = lsfs.RebuildRegionFile(dev, w.region, lsfs.Options{})
	w.must(errors.Join(err, dev.Close()))
	rep := w.clean("rebuilt", Options{})
	if rep.Keys != killed.Keys || rep.Bytes != killed.Bytes || rep.Files != killed.Files {
		t.Errorf("%d keys, %d files, %d bytes; they were %d, %d, %d", rep.Keys, rep.Files, rep.Bytes, killed.Keys, killed.Files, killed.Bytes)
	}
	w.open(far)
	w.must(w.s.FarCheckpoint())
	w.must(w.s.Close())
	w.clean("opened after the rebuild", Options{})
}
