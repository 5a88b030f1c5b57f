package node

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
)

func TestLogRotates(t *testing.T) {
	for keep := range 4 {
		path := filepath.Join(t.TempDir(), "log", "x.log")
		var want []string // all lines, in order
		l, err := openLog(path, 100, keep, false)
		if err != nil {
			t.Fatal(err)
		}
		for i := range 100 {
			if i == 50 { // a restart goes on where the last process ended
				if err := l.Close(); err != nil {
					t.Fatal(err)
				}
				if l, err = openLog(path, 100, keep, false); err != nil {
					t.Fatal(err)
				}
			}
			line := fmt.Sprintf("line %03d %s\n", i, bytes.Repeat([]byte("x"), i%30))
			want = append(want, line)
			if n, err := l.Write([]byte(line)); n != len(line) || err != nil {
				t.Fatal(n, err)
			}
		}
		var all []byte
		for i := keep; i >= 0; i-- {
			name := path
			if i > 0 {
				name = fmt.Sprintf("%s.%d", path, i)
			}
			b, err := os.ReadFile(name)
			if err != nil {
				t.Fatal(err)
			}
			if len(b) > 100 || len(b) == 0 || b[len(b)-1] != '\n' {
				t.Errorf("keep %d: %s holds %d bytes", keep, name, len(b))
			}
			all = append(all, b...)
		}
		if _, err := os.Stat(fmt.Sprintf("%s.%d", path, keep+1)); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("keep %d: a file too many", keep)
		}
		if !bytes.HasSuffix(joined(want), all) {
			t.Errorf("keep %d: the files are not the end of what was written", keep)
		}
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

func joined(lines []string) []byte {
	var b []byte
	for _, l := range lines {
		b = append(b, l...)
	}
	return b
}

func TestLogLongLine(t *testing.T) {
	path := filepath.Join(t.TempDir(), "x.log")
	l, err := openLog(path, 10, 1, false)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	long := bytes.Repeat([]byte("y"), 50)
	for range 3 {
		if n, err := l.Write(long); n != 50 || err != nil {
			t.Fatal(n, err)
		}
	}
	for _, name := range []string{path, path + ".1"} {
		if b, err := os.ReadFile(name); err != nil || !bytes.Equal(b, long) {
			t.Errorf("%s: %q, %v", name, b, err)
		}
	}
}
