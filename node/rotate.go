package node

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"

	"golang.org/x/sys/unix"
)

// logFile is a log that is rotated by size: PATH becomes PATH.1, that PATH.2,
// and so on. A line is never torn apart between two files.
type logFile struct {
	path string
	max  int64 // bytes
	keep int   // rotated files
	// standard makes the log the process's standard output and error too, so
	// that the last words of a crash stand in it.
	standard bool

	mu   sync.Mutex
	f    *os.File
	size int64
}

// openLog opens the log for appending.
func openLog(path string, max int64, keep int, standard bool) (*logFile, error) {
	l := &logFile{path: path, max: max, keep: keep, standard: standard}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, fmt.Errorf("log: %w", err)
	}
	if err := l.open(); err != nil {
		return nil, fmt.Errorf("log: %w", err)
	}
	return l, nil
}

func (l *logFile) open() error {
	f, err := os.OpenFile(l.path, os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	st, err := f.Stat()
	if err == nil && l.standard {
		err = errors.Join(unix.Dup3(int(f.Fd()), 1, 0), unix.Dup3(int(f.Fd()), 2, 0))
	}
	if err != nil {
		f.Close()
		return err
	}
	if l.f != nil {
		l.f.Close()
	}
	l.f, l.size = f, st.Size()
	return nil
}

// Write appends one line. If the log cannot be rotated it grows: words that
// are lost would be worse.
func (l *logFile) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.size > 0 && l.size+int64(len(p)) > l.max {
		if err := l.rotate(); err != nil {
			l.size = 0 // not again before as much has been written
			fmt.Fprintf(l.f, "log: rotation failed: %v\n", err)
		}
	}
	n, err := l.f.Write(p)
	l.size += int64(n)
	return n, err
}

// rotate renames the files and begins a new one.
func (l *logFile) rotate() error {
	name := func(i int) string {
		if i == 0 {
			return l.path
		}
		return fmt.Sprintf("%s.%d", l.path, i)
	}
	if err := os.Remove(name(l.keep)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	for i := l.keep - 1; i >= 0; i-- {
		if err := os.Rename(name(i), name(i+1)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return l.open()
}

// Close ends logging; standard output and error stay with the file.
func (l *logFile) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.f.Close()
}
