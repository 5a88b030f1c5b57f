package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"sealfs/internal/metrics"
	"sealfs/lsfs"
	"sealfs/node"
	stores "sealfs/server"
)

// TestScrub: a flipped byte of a file on the disk is found by a scrub before the
// file is read, and told in all places; reading that file fails, and no other.
func TestScrub(t *testing.T) {
	needFUSE(t)
	s := newSite(t)
	refused(t, []string{"nothing runs"}, "scrub", "status", "--data", s.data)
	s.up(t, "--size", "256M")
	const files = 20
	name := func(i int) string { return filepath.Join(s.mount, fmt.Sprint("file", i)) }
	text := func(i int) string { return strings.Repeat(fmt.Sprintf("<the content of file %d>", i), 400) }
	for i := range files {
		write(t, name(i), text(i))
	}
	// From a clean start on all of it lies on the device only.
	ok(t, "down", "--data", s.data)
	s.up(t)

	scrub := func(args ...string) (list []stores.ScrubReport) {
		t.Helper()
		if err := json.Unmarshal([]byte(ok(t, append([]string{"scrub", "--data", s.data, "--json"}, args...)...)), &list); err != nil || len(list) != 1 {
			t.Fatal(list, err)
		}
		return list
	}
	whole := func() *lsfs.ScrubRound {
		t.Helper()
		rounds := scrub("status")[0].Rounds
		scrub("start")
		eventually(t, "the scrub has ended", func() bool { return scrub("status")[0].Rounds > rounds })
		return scrub("status")[0].Last
	}
	if r := whole(); r.Damages != 0 || r.Segments == 0 || r.Claims < files {
		t.Fatalf("a scrub of a sound store: %+v", r)
	}
	if out := ok(t, "status", "--data", s.data); !strings.Contains(out, "no damage; next ") {
		t.Errorf("status says\n%s", out)
	}

	device := s.status(t).Stores[0].Device
	flip(t, device, text(7))
	var st syscall.Stat_t
	if err := syscall.Stat(name(7), &st); err != nil {
		t.Fatal(err)
	}
	r := whole()
	if r.Damages != 1 || len(r.Findings) != 1 || r.Findings[0].Kind != lsfs.FoundBlock || uint64(r.Findings[0].Ino) != st.Ino || r.Findings[0].Offset < 1<<20 {
		t.Fatalf("after a flip in inode %d: %+v", st.Ino, r)
	}
	for i := range files {
		if i != 7 {
			read(t, name(i), text(i))
		} else if _, err := os.ReadFile(name(i)); !errors.Is(err, syscall.EIO) {
			t.Errorf("reading what is damaged: %v", err)
		}
	}
	told := fmt.Sprintf("inode %d", st.Ino)
	if out := ok(t, "scrub", "status", "--data", s.data); !strings.Contains(out, told) || !strings.Contains(out, "1 damaged place") {
		t.Errorf("scrub status says\n%s", out)
	}
	if out := ok(t, "status", "--data", s.data); !strings.HasPrefix(out, node.StateRunning) || !strings.Contains(out, "1 damaged place") {
		t.Errorf("status says\n%s", out)
	}
	if _, body := ask(t, s.data, "admin", "/metrics"); metrics.Lint(body) != nil || !bytes.Contains(body, []byte(`sealfs_store_damaged_places{store="`+s.status(t).Stores[0].ID.String()+`"} 1`)) {
		t.Errorf("metrics: %v\n%s", metrics.Lint(body), body)
	}
	log, err := os.ReadFile(filepath.Join(s.data, "log", "sealfs.log"))
	if err != nil || !bytes.Contains(log, []byte("damage found")) || !bytes.Contains(log, fmt.Appendf(nil, "ino=%d file_offset=", st.Ino)) || !bytes.Contains(log, []byte("dev="+device)) {
		t.Errorf("the log does not tell of it (%v):\n%s", err, log)
	}

	// A rate, a stop, and what there is not.
	if x := scrub("start", "--rate", "64K", "--store", device); x[0].State != lsfs.ScrubRunning || x[0].Rate != 64<<10 {
		t.Errorf("started: %+v", x[0])
	}
	scrub("stop")
	eventually(t, "it has stopped", func() bool { return scrub("status")[0].State == lsfs.ScrubStopped })
	refused(t, []string{"no store", "/dev/nope"}, "scrub", "status", "--data", s.data, "--store", "/dev/nope")
	refused(t, []string{"start, stop or status"}, "scrub", "begin", "--data", s.data)
	refused(t, []string{"--rate", "1.5"}, "scrub", "start", "--data", s.data, "--rate", "1.5")
}

// flip inverts a bit of an image in the middle of a text, which stands there once.
func flip(t *testing.T, image, text string) {
	t.Helper()
	f, err := os.OpenFile(image, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b, err := os.ReadFile(image)
	if err != nil {
		t.Fatal(err)
	}
	at := bytes.Index(b, []byte(text))
	if at < 0 || bytes.Count(b, []byte(text)) != 1 {
		t.Fatalf("the text stands %d times in the image", bytes.Count(b, []byte(text)))
	}
	at += len(text) / 2
	if _, err := f.WriteAt([]byte{b[at] ^ 4}, int64(at)); err != nil {
		t.Fatal(err)
	}
}
