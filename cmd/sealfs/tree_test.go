package main

import (
	"encoding/json"
	"fmt"
	"os"
	"testing"
)

func TestRemoveTree(t *testing.T) {
	needFUSE(t)
	s := newSite(t)
	s.up(t, "--size", "256M")
	refused(t, []string{s.data, "not on SealFS", "--anywhere"}, "rmr", s.data)
	refused(t, []string{s.mount, "root of a mount"}, "rmr", s.mount)
	refused(t, []string{s.mount + "/none", "no such file"}, "rmr", s.mount+"/none")
	refused(t, []string{"--jobs"}, "rmr", "--jobs", "0", s.mount)
	ok(t, "rmr", "--force", s.mount+"/none")
	write(t, s.mount+"/kept", "kept")
	for i := range 5 {
		dir := fmt.Sprintf("%s/tree/d%d/e", s.mount, i)
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		for j := range 20 {
			write(t, fmt.Sprintf("%s/f%d", dir, j), "text")
		}
		if err := os.Symlink(s.mount+"/kept", dir+"/link"); err != nil {
			t.Fatal(err)
		}
	}
	var r removal
	if err := json.Unmarshal([]byte(ok(t, "rmr", "--json", "--jobs", "4", s.mount+"/tree/")), &r); err != nil || r.Files != 105 || r.Dirs != 11 || r.Failed != 0 {
		t.Errorf("rmr: %+v, %v", r, err)
	}
	if names, err := os.ReadDir(s.mount); err != nil || len(names) != 1 {
		t.Errorf("after rmr %v are left, %v", names, err)
	}
	read(t, s.mount+"/kept", "kept")
	ok(t, "rmr", "--anywhere", s.data+"/log/none", "--force")
}
