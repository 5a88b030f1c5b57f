package node

import (
	"errors"
	"fmt"

	"sealfs"
)

// failure is a sentence for people, complete as it stands, that programs can
// still classify: it unwraps to its code.
type failure struct {
	text string
	code sealfs.Code
}

func (f *failure) Error() string { return f.text }
func (f *failure) Unwrap() error { return f.code }

// fault returns an error that reads as the sentence given and nothing else. The
// sentence names the thing and the way out.
func fault(code sealfs.Code, format string, args ...any) error {
	return &failure{fmt.Sprintf(format, args...), code}
}

// codeOf returns the code of an error, ErrIO if it has none.
func codeOf(err error) sealfs.Code {
	if c, ok := errors.AsType[sealfs.Code](err); ok {
		return c
	}
	return sealfs.ErrIO
}
