package bench

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"sealfs"
)

// WorkerCommand is the first argument with which Run executes this program
// again when Options.Processes is set.
const WorkerCommand = "bench-worker"

const (
	// hello opens the conversation. It changes with the messages.
	hello = "sealfs-bench-worker 1"
	// helloTimeout bounds the wait for hello: a program that does something
	// else with WorkerCommand must not hang the run.
	helloTimeout = 20 * time.Second
	// stopTimeout is the time a cancelled worker process has for its current
	// operation before it is killed.
	stopTimeout = 10 * time.Second
	// workerEnv marks the environment of worker processes.
	workerEnv = "SEALFS_BENCH_WORKER"
	// complaintMax bounds what is kept of a worker's standard error, in bytes.
	complaintMax = 2048
)

// order is a message to a worker: a task to prepare, or the time of
// CLOCK_MONOTONIC at which to start the prepared one.
type order struct {
	Task    *task `json:"task,omitempty"`
	StartAt int64 `json:"start_at,omitempty"`
}

// answer is a message from a worker: first hello, then for each task ready (or
// the fault for which it cannot be run) and the result.
type answer struct {
	Hello  string  `json:"hello,omitempty"`
	Ready  bool    `json:"ready,omitempty"`
	Fault  string  `json:"fault,omitempty"`
	Result *result `json:"result,omitempty"`
}

// WorkerMain is the main function of a worker process: a program that uses
// Options.Processes calls it when its first argument is WorkerCommand, with the
// arguments after that, and exits with its result. It speaks over standard
// input and output and returns when the input ends.
func WorkerMain(args []string) int {
	if len(args) > 0 {
		fmt.Fprintf(os.Stderr, "%s takes no arguments: sealfs bench starts it itself\n", WorkerCommand)
		return 2
	}
	// An interrupt from the terminal goes to all processes; the parent decides.
	signal.Ignore(syscall.SIGINT)
	if err := serve(os.Stdin, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// serve works off the orders from in until it ends, and then returns nil. The
// end of in also stops a task that is running. The caller's goroutine stays on
// its OS thread.
func serve(in io.Reader, out io.Writer) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	var stop atomic.Bool
	orders, done := make(chan order), make(chan struct{})
	defer close(done)
	go func() {
		defer close(orders)
		defer stop.Store(true)
		for dec := json.NewDecoder(in); ; {
			var o order
			if dec.Decode(&o) != nil {
				return
			}
			select {
			case orders <- o:
			case <-done:
				return
			}
		}
	}()
	enc := json.NewEncoder(out)
	if err := enc.Encode(answer{Hello: hello}); err != nil {
		return err
	}
	var pool []byte
	var poolSeed uint64
	var ready *job
	for o := range orders {
		var a answer
		switch {
		case o.Task != nil:
			if pool == nil || poolSeed != o.Task.Seed {
				pool, poolSeed = newPool(o.Task.Seed), o.Task.Seed
			}
			var err error
			if ready, err = prepare(*o.Task, pool); err != nil {
				a.Fault = err.Error()
			} else {
				a.Ready = true
			}
		case ready != nil:
			sleepUntil(o.StartAt)
			a.Result = ready.run(&stop)
			ready = nil
		default:
			a.Fault = "told to start without a task"
		}
		if err := enc.Encode(a); err != nil {
			return err
		}
	}
	return nil
}

// crew is the workers as Run sees them.
type crew struct {
	members []*member
}

// member is one worker: its two pipes, and end, which waits for it after in was
// closed, and can be called again.
type member struct {
	in  io.WriteCloser
	out io.ReadCloser
	enc *json.Encoder
	dec *json.Decoder
	end func() error
}

// hire starts n workers. Cancelling ctx later does not end them: close does.
func hire(ctx context.Context, n int, processes bool) (*crew, error) {
	c := new(crew)
	start := startThread
	if processes {
		start = startProcess
	}
	for i := range n {
		m, err := start()
		if err != nil {
			c.close()
			return nil, fmt.Errorf("bench: start worker %d: %w", i, err)
		}
		m.enc, m.dec = json.NewEncoder(m.in), json.NewDecoder(m.out)
		c.members = append(c.members, m)
	}
	ctx, cancel := context.WithTimeoutCause(ctx, helloTimeout,
		fmt.Errorf("bench: no worker process answers: does the program dispatch %q to WorkerMain? %w", WorkerCommand, sealfs.ErrTimeout))
	defer cancel()
	err := c.converse(ctx, nil, func(i int, a answer) error {
		if a.Hello != hello {
			return fmt.Errorf("bench: worker %d says %q, want %q: %w", i, a.Hello, hello, sealfs.ErrVersion)
		}
		return nil
	})
	if err != nil {
		c.close() // what the others say when they are cut off is no news
		return nil, err
	}
	return c, nil
}

func startThread() (*member, error) {
	inRead, inWrite := io.Pipe()
	outRead, outWrite := io.Pipe()
	ended := make(chan error, 1)
	go func() {
		err := serve(inRead, outWrite)
		inRead.Close()
		outWrite.Close()
		ended <- err
	}()
	return &member{in: inWrite, out: outRead, end: sync.OnceValue(func() error {
		outRead.Close() // what it still wants to say must not block it
		<-ended         // its error is that nobody listened
		return nil
	})}, nil
}

func startProcess() (*member, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	cmd := exec.Command(self, WorkerCommand)
	cmd.Env = append(os.Environ(), workerEnv+"=1")
	complaint := new(head)
	cmd.Stderr = complaint
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	return &member{in: in, out: out, end: sync.OnceValue(func() error {
		defer time.AfterFunc(stopTimeout, func() { cmd.Process.Kill() }).Stop()
		out.Close()
		err := cmd.Wait()
		if err != nil && len(complaint.b) > 0 {
			err = fmt.Errorf("%w: %s", err, bytes.TrimSpace(complaint.b))
		}
		return err
	})}, nil
}

// head keeps the first complaintMax bytes written to it.
type head struct{ b []byte }

func (h *head) Write(p []byte) (int, error) {
	h.b = append(h.b, p[:min(len(p), complaintMax-len(h.b))]...)
	return len(p), nil
}

// converse sends each worker what say returns (nothing if say is nil) and hands
// each one's answer to hear. When ctx ends it closes all inputs, so that the
// workers stop, and returns the cause; the crew is then good for nothing but close.
func (c *crew) converse(ctx context.Context, say func(i int) order, hear func(i int, a answer) error) error {
	unwatch := context.AfterFunc(ctx, func() {
		for _, m := range c.members {
			m.in.Close()
			m.out.Close()
		}
	})
	defer unwatch()
	failed := func(i int, err error) error {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		m := c.members[i]
		m.in.Close()
		if e := m.end(); e != nil {
			err = e // how it ended says more than that its pipe did
		}
		return fmt.Errorf("bench: worker %d ended early: %w", i, err)
	}
	if say != nil {
		for i, m := range c.members {
			if err := m.enc.Encode(say(i)); err != nil {
				return failed(i, err)
			}
		}
	}
	for i, m := range c.members {
		var a answer
		if err := m.dec.Decode(&a); err != nil {
			return failed(i, err)
		}
		if a.Fault != "" {
			return fmt.Errorf("bench: worker %d: %s", i, a.Fault)
		}
		if err := hear(i, a); err != nil {
			return err
		}
	}
	return context.Cause(ctx)
}

// phase runs one phase: tasks(i) is the part of worker i. All workers are ready
// before one starts.
func (c *crew) phase(ctx context.Context, tasks func(i int) task) ([]*result, error) {
	prepare := func(i int) order { t := tasks(i); return order{Task: &t} }
	err := c.converse(ctx, prepare, func(i int, a answer) error {
		if !a.Ready {
			return fmt.Errorf("bench: worker %d is not ready: %w", i, sealfs.ErrInvalid)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	// The start lies far enough ahead for the word to reach everybody: 2 ms,
	// and 50 us (a wake-up of an idle CPU) for each worker.
	at := monotonic() + (2*time.Millisecond + time.Duration(len(c.members))*50*time.Microsecond).Nanoseconds()
	results := make([]*result, len(c.members))
	err = c.converse(ctx, func(int) order { return order{StartAt: at} }, func(i int, a answer) error {
		if a.Result == nil {
			return fmt.Errorf("bench: worker %d has no result: %w", i, sealfs.ErrInvalid)
		}
		results[i] = a.Result
		return nil
	})
	return results, err
}

// close tells the workers to stop, and returns when all have ended, which can
// take as long as the file system takes for an operation.
func (c *crew) close() error {
	for _, m := range c.members {
		m.in.Close()
	}
	var errs []error
	for i, m := range c.members {
		if err := m.end(); err != nil {
			errs = append(errs, fmt.Errorf("bench: worker %d: %w", i, err))
		}
	}
	return errors.Join(errs...)
}
