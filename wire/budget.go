package wire

import "sync"

// budget is an amount of memory that requests share. Those who ask for more
// than is free are served in the order in which they came.
type budget struct {
	mu    sync.Mutex
	free  int64
	queue []budgetClaim
}

type budgetClaim struct {
	n       int64
	granted chan struct{}
}

// take takes n bytes; if it must be waited for, it returns a channel that says when.
func (b *budget) take(n int64) <-chan struct{} {
	b.mu.Lock()
	defer b.mu.Unlock()
	if n == 0 || len(b.queue) == 0 && n <= b.free {
		b.free -= n
		return nil
	}
	granted := make(chan struct{})
	b.queue = append(b.queue, budgetClaim{n, granted})
	return granted
}

// give gives n bytes back.
func (b *budget) give(n int64) {
	b.mu.Lock()
	b.free += n
	for len(b.queue) > 0 && b.queue[0].n <= b.free {
		b.free -= b.queue[0].n
		close(b.queue[0].granted)
		b.queue = b.queue[1:]
	}
	b.mu.Unlock()
}

// leave ends the wait for n bytes, or gives them back if they came meanwhile.
func (b *budget) leave(granted <-chan struct{}, n int64) {
	b.mu.Lock()
	for i, q := range b.queue {
		if q.granted == granted {
			b.queue = append(b.queue[:i], b.queue[i+1:]...)
			n = 0
			break
		}
	}
	b.mu.Unlock()
	b.give(n) // with 0, too: the next in the queue may be content with what is free
}
