package client

import (
	"context"
	"errors"
	"syscall"

	"sealfs"
)

// errnos is the one table from our codes to the kernel's.
var errnos = [...]syscall.Errno{
	sealfs.ErrNotExist:        syscall.ENOENT,
	sealfs.ErrExist:           syscall.EEXIST,
	sealfs.ErrNotDir:          syscall.ENOTDIR,
	sealfs.ErrIsDir:           syscall.EISDIR,
	sealfs.ErrNotEmpty:        syscall.ENOTEMPTY,
	sealfs.ErrPerm:            syscall.EPERM,
	sealfs.ErrAccess:          syscall.EACCES,
	sealfs.ErrInvalid:         syscall.EINVAL,
	sealfs.ErrNameTooLong:     syscall.ENAMETOOLONG,
	sealfs.ErrNoSpace:         syscall.ENOSPC,
	sealfs.ErrQuota:           syscall.EDQUOT,
	sealfs.ErrTooManyLinks:    syscall.EMLINK,
	sealfs.ErrTooBig:          syscall.EFBIG,
	sealfs.ErrRange:           syscall.ERANGE,
	sealfs.ErrArgTooBig:       syscall.E2BIG,
	sealfs.ErrNoData:          syscall.ENODATA,
	sealfs.ErrAgain:           syscall.EAGAIN,
	sealfs.ErrDeadlock:        syscall.EDEADLK,
	sealfs.ErrNoLocks:         syscall.ENOLCK,
	sealfs.ErrCrossDevice:     syscall.EXDEV,
	sealfs.ErrNotSupported:    syscall.EOPNOTSUPP,
	sealfs.ErrNoSys:           syscall.ENOSYS,
	sealfs.ErrBusy:            syscall.EBUSY,
	sealfs.ErrReadOnly:        syscall.EROFS,
	sealfs.ErrIO:              syscall.EIO,
	sealfs.ErrCorrupt:         syscall.EIO,
	sealfs.ErrStale:           syscall.ESTALE,
	sealfs.ErrInterrupted:     syscall.EINTR,
	sealfs.ErrTimeout:         syscall.ETIMEDOUT,
	sealfs.ErrUnavailable:     syscall.EHOSTDOWN,
	sealfs.ErrClosed:          syscall.ESHUTDOWN,
	sealfs.ErrWouldLoop:       syscall.EINVAL,
	sealfs.ErrNoDevice:        syscall.ENXIO,
	sealfs.ErrTooManySymlinks: syscall.ELOOP,
	sealfs.ErrVersion:         syscall.EPROTONOSUPPORT,
	sealfs.ErrSession:         syscall.EIO,
}

// Errno returns the system's number for err, 0 for nil. An error that carries
// no code of ours becomes EIO.
func Errno(err error) syscall.Errno {
	if err == nil {
		return 0
	}
	code, ok := err.(sealfs.Code)
	if !ok && !errors.As(err, &code) {
		var errno syscall.Errno
		switch {
		case errors.As(err, &errno):
			return errno
		case errors.Is(err, context.Canceled):
			return syscall.EINTR
		case errors.Is(err, context.DeadlineExceeded):
			return syscall.ETIMEDOUT
		}
		return syscall.EIO
	}
	if int(code) < len(errnos) && errnos[code] != 0 {
		return errnos[code]
	}
	return syscall.EIO
}
