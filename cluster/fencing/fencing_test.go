package fencing

import (
	"fmt"
	"testing"
	"time"

	"sealfs"
)

// TestFences drives the fences with a clock of their own.
func TestFences(t *testing.T) {
	f := New(10 * time.Second)
	start := time.Unix(1000, 0)
	a, b := sealfs.UUID{1}, sealfs.UUID{2}
	over := f.Add(start, 7)
	f.Add(start.Add(time.Second), 7)
	f.Add(start.Add(time.Second), 3)
	if got := fmt.Sprint(f.List()); got != "[3 7]" || !f.Has(3) || f.Has(4) {
		t.Errorf("list: %s", got)
	}
	due := func(s int, want string, servers ...sealfs.UUID) {
		t.Helper()
		ended, late := f.Due(start.Add(time.Duration(s)*time.Second), servers)
		if got := fmt.Sprint(ended, len(late)); got != want {
			t.Errorf("after %d s: %s, want %s", s, got, want)
		}
	}
	due(2, "[] 0", a, b)
	if !f.Confirm(a, []sealfs.Session{7, 9}) || f.Confirm(a, []sealfs.Session{7}) {
		t.Error("what is news and what is not")
	}
	due(3, "[] 0", a, b)
	due(3, "[7] 0", a)
	due(3, "[3 7] 0")
	f.Confirm(b, []sealfs.Session{7})
	due(3, "[7] 0", a, b)
	due(10, "[7] 0", a, b)
	due(11, "[3 7] 2", a, b) // both are late with 3
	f.Over([]sealfs.Session{7, 8})
	select {
	case <-over:
	default:
		t.Error("nobody is told of the end")
	}
	if got := fmt.Sprint(f.List()); got != "[3]" {
		t.Errorf("list: %s", got)
	}
}
