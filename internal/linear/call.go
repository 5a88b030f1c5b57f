package linear

import (
	"fmt"
	"slices"
	"strings"
	"syscall"
)

// Kind is what a Call does.
type Kind uint8

// The kinds of calls. Those on files and directories that are open name them by inode number.
const (
	Lookup          Kind = iota // Name in Dir: its inode and type
	Getattr                     // Ino: links, and size of a file
	Readdir                     // Dir: names and inodes
	Create                      // Name in Dir, which may be there; it is open then
	CreateExcl                  // Name in Dir, which must be new; it is open then
	Open                        // the file Name in Dir
	OpenDir                     // the directory Name in Dir
	Mkdir                       // Name in Dir
	Rmdir                       // Name in Dir
	Unlink                      // Name in Dir
	Link                        // Ino to Name in Dir
	Rename                      // Name in Dir to Name2 in Dir2
	RenameNoReplace             // the same, if Name2 is new
	Exchange                    // Name in Dir and Name2 in Dir2
	Read                        // Ino: Len bytes at Off
	Write                       // Ino: Data at Off
	Append                      // Ino: Data
	Truncate                    // Ino to Len bytes
	TryLock                     // Ino, an exclusive lock for Owner, without waiting
	TryShare                    // Ino, a shared lock for Owner, without waiting
	WaitLock                    // Ino, an exclusive lock for Owner
	Unlock                      // Ino, the lock of Owner
	kinds
)

var kindNames = [kinds]string{
	"lookup", "getattr", "readdir", "create", "create-excl", "open", "opendir", "mkdir", "rmdir", "unlink", "link", "rename",
	"rename-noreplace", "exchange", "read", "write", "append", "truncate", "trylock", "tryshare", "waitlock", "unlock",
}

func (k Kind) String() string { return kindNames[k] }

// changes reports whether a call may leave something behind when its answer is lost.
func (k Kind) changes() bool {
	return !slices.Contains([]Kind{Lookup, Getattr, Readdir, Open, OpenDir, Read}, k)
}

// Call is one call of an actor.
type Call struct {
	Kind        Kind
	Birth       int // of the inode that it makes: greater than that of any other
	Dir, Dir2   uint64
	Name, Name2 string
	Ino         uint64
	Off, Len    int
	Data        string
	Owner       int
}

// Entry is a name in a directory.
type Entry struct {
	Name string
	Ino  uint64
}

// Answer is what a call was answered.
type Answer struct {
	Lost    bool // nobody knows
	Errno   syscall.Errno
	Ino     uint64 // 0: not told
	Dir     bool
	Links   int
	Size    int
	Data    string
	Entries []Entry // sorted by name
	// Loose says of a read that the size of the file was asked for first, and then its bytes, as Linux
	// does: while others change the size it may be told bytes of one moment up to the size of
	// another one, with zeros behind the end. And of a rename, that the two names were looked up one after the other:
	// while others change them they may be one inode's, and then Linux does nothing, or one a file and
	// the other a directory, which Linux refuses. And of a link that
	// the file has no name: Linux counts down the links of the file that it found under a name for the
	// one that a rename replaced.
	Loose bool
}

// lost reports whether an error says nothing about what has happened.
func lost(e syscall.Errno) bool {
	return slices.Contains([]syscall.Errno{
		syscall.EIO, syscall.EINTR, syscall.ETIMEDOUT, syscall.EHOSTDOWN, syscall.ESHUTDOWN, syscall.ENOTCONN, syscall.ECONNABORTED, syscall.EBADF,
	}, e)
}

func (c *Call) String() string {
	at := fmt.Sprintf("%v", c.Kind)
	switch c.Kind {
	case Getattr, Readdir:
		return fmt.Sprintf("%s %d", at, c.Ino+c.Dir)
	case Link:
		return fmt.Sprintf("%s %d to %d/%s", at, c.Ino, c.Dir, c.Name)
	case Rename, RenameNoReplace, Exchange:
		return fmt.Sprintf("%s %d/%s to %d/%s", at, c.Dir, c.Name, c.Dir2, c.Name2)
	case Read:
		return fmt.Sprintf("%s %d at %d+%d", at, c.Ino, c.Off, c.Len)
	case Write:
		return fmt.Sprintf("%s %d at %d %q", at, c.Ino, c.Off, c.Data)
	case Append:
		return fmt.Sprintf("%s %d %q", at, c.Ino, c.Data)
	case Truncate:
		return fmt.Sprintf("%s %d to %d", at, c.Ino, c.Len)
	case TryLock, TryShare, WaitLock, Unlock:
		return fmt.Sprintf("%s %d owner %d", at, c.Ino, c.Owner)
	}
	return fmt.Sprintf("%s %d/%s", at, c.Dir, c.Name)
}

func (a *Answer) describe(k Kind) string {
	switch {
	case a.Lost:
		return "lost"
	case a.Errno != 0:
		return a.Errno.Error()
	case k == Read:
		return fmt.Sprintf("%q", a.Data)
	case k == Getattr:
		return fmt.Sprintf("%d links, size %d", a.Links, a.Size)
	case k == Readdir:
		var all []string
		for _, e := range a.Entries {
			all = append(all, fmt.Sprintf("%s=%d", e.Name, e.Ino))
		}
		return "[" + strings.Join(all, " ") + "]"
	case a.Ino != 0:
		return fmt.Sprintf("inode %d", a.Ino)
	}
	return "done"
}
