package node

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"slices"
	"sync"

	"sealfs/client"
)

// life is what every long-lived process of SealFS has in common: its directory,
// its log, its goroutines, and what is to be undone at its end.
type life struct {
	dir    Dir
	log    *slog.Logger // nil until openLog
	meters *meters

	processors client.Processors // for the mounts, if it has any

	ctx     context.Context // ends early in Close
	stop    context.CancelFunc
	work    sync.WaitGroup // goroutines that end with ctx
	undo    []func() error // what Close does, last first
	failed  chan error     // what ends the process by itself
	closing sync.Once
	closed  error
}

// begin makes l ready for use. Its context keeps ctx's values, not its end.
func (l *life) begin(ctx context.Context, d Dir) {
	l.dir, l.failed, l.meters = d, make(chan error, 1), newMeters()
	l.ctx, l.stop = context.WithCancel(context.WithoutCancel(ctx))
	l.onClose(func() error { l.stop(); return nil })
}

// abort ends what has begun when a start has failed with err, and returns all
// that went wrong.
func (l *life) abort(err error) error {
	if l.log != nil {
		l.log.Error("start failed", "err", err)
	}
	return errors.Join(err, l.Close())
}

// onClose adds to what Close does; it is done in reverse order.
func (l *life) onClose(f func() error) { l.undo = append(l.undo, f) }

// Close ends everything cleanly, in the reverse order of its beginning. It may
// be called repeatedly, and returns the same again.
func (l *life) Close() error {
	l.closing.Do(func() {
		var errs []error
		for _, f := range slices.Backward(l.undo) {
			errs = append(errs, f())
		}
		l.closed = errors.Join(errs...)
	})
	return l.closed
}

// Wait returns when ctx is done (nil), or with an error when the process cannot
// go on.
func (l *life) Wait(ctx context.Context) error {
	select {
	case <-ctx.Done():
		l.log.Info("told to end", "cause", context.Cause(ctx))
		return nil
	case err := <-l.failed:
		l.log.Error("cannot go on", "err", err)
		return err
	}
}

// fail ends Wait with err.
func (l *life) fail(err error) {
	select {
	case l.failed <- err:
	default:
	}
}

// lock takes the directory's lock for this process.
func (l *life) lock() error {
	k, err := l.dir.lock(lockWait)
	if err == nil {
		l.onClose(k.release)
	}
	return err
}

// openLog opens the process's log.
func (l *life) openLog(s Settings, detached bool) error {
	f, err := openLog(l.dir.LogPath(), int64(s.LogSize), s.LogKeep, detached)
	if err != nil {
		return err
	}
	l.onClose(f.Close)
	log := slog.New(slog.NewTextHandler(f, &slog.HandlerOptions{Level: s.LogLevel}))
	l.onClose(func() error { log.Info("ended", "pid", os.Getpid()); return nil })
	l.log = log
	return nil
}

// register enters this process into DIR/pids.
func (l *life) register(p Process) error {
	r, err := l.dir.register(p)
	if err == nil {
		l.onClose(r.end)
	}
	return err
}

// run runs a service until Close comes to it; if it ends by itself, so does
// the process.
func (l *life) run(name string, f func(context.Context) error) {
	ctx, stop := context.WithCancel(l.ctx)
	var done sync.WaitGroup
	done.Go(func() {
		if err := f(ctx); err != nil {
			l.fail(fmt.Errorf("%s: %w", name, err))
		}
	})
	l.onClose(func() error { stop(); done.Wait(); return nil })
}

// serveAdmin opens the admin socket.
func (l *life) serveAdmin(a *api) error {
	if l.meters.err != nil {
		return l.meters.err
	}
	listener, err := l.dir.listenAdmin()
	if err != nil {
		return err
	}
	l.run("admin socket", func(ctx context.Context) error { return a.serve(ctx, listener) })
	return nil
}

// closeListener closes a listener that its server may have closed already.
func closeListener(l net.Listener) error {
	if err := l.Close(); err != nil && !errors.Is(err, net.ErrClosed) {
		return err
	}
	return nil
}
