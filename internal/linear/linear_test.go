package linear

import (
	"context"
	"flag"
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"sealfs"
	"sealfs/op"
)

var campaign = flag.Duration("campaign", 0, "check histories for this long, with mounts that write files, too")

// test is who works together, and what goes wrong meanwhile.
type test struct {
	name    string
	mounts  int
	library int
	loss    int64 // of 1000 messages
	restart bool
	files   bool // also histories of work on a few files
	plain   bool // one name at a time, and no content
}

var tests = []test{
	{"library", 0, 4, 0, false, true, false},
	{"library, losses and restarts", 0, 4, 20, true, true, false},
	{"mounts", 3, 0, 0, false, false, true},
	{"mounts and library, losses and restarts", 2, 2, 10, true, false, true},
}

// run makes histories for a while.
func (c *test) run(t *testing.T, seed uint64, length time.Duration) tally {
	if c.mounts > 0 {
		needFUSE(t)
	}
	p := newPlace(t, seed, 2)
	pl := plan{calls: 40, restart: c.restart, flat: c.mounts > 0, files: c.files, plain: c.plain}
	for i := range c.mounts + c.library {
		k := p.client(nil)
		if pl.first = k; i < c.mounts {
			pl.actors = append(pl.actors, NewMounted(p.mount(k)))
		} else {
			pl.actors = append(pl.actors, NewLibrary(k, 0))
		}
	}
	p.loss.Store(c.loss)
	end := time.Now().Add(length)
	sum, report := p.histories(seed, pl, func(tally) bool { return time.Now().After(end) })
	t.Logf("seed %d: %v; %d lost, %d refused, %d undecided", seed, &sum, sum.lost, sum.refused, sum.undecided)
	if report != "" {
		t.Error(report)
	}
	if sum.undecided > sum.histories/10 {
		t.Errorf("%d histories of %d are undecided", sum.undecided, sum.histories)
	}
	return sum
}

// TestLinear has library clients and mounts work at the same time on several stores, while
// answers get lost and servers are started anew, and wants an order for all that they were answered.
func TestLinear(t *testing.T) {
	for _, c := range tests {
		t.Run(c.name, func(t *testing.T) {
			length := 2 * time.Second
			if testing.Short() {
				length /= 4
			}
			c.run(t, rand.Uint64N(1<<40), length)
		})
	}
}

// TestCampaign is TestLinear for as long as -campaign says.
func TestCampaign(t *testing.T) {
	if *campaign == 0 {
		t.Skip("skipped: it is for make linear")
	}
	var sum tally
	list := append(tests[:len(tests):len(tests)], test{"mounts, all names", 3, 0, 0, false, false, false}, test{"mounts, also of files", 3, 0, 0, false, true, false})
	for end := time.Now().Add(*campaign); time.Now().Before(end); {
		for _, c := range list {
			t.Run(c.name, func(t *testing.T) {
				got := c.run(t, rand.Uint64N(1<<40), 20*time.Second)
				sum.histories, sum.calls, sum.bad = sum.histories+got.histories, sum.calls+got.calls, sum.bad+got.bad
			})
		}
	}
	fmt.Println(&sum)
}

// deaf is a client's way to the servers that drops what is revoked, and says that it was carried out.
type deaf struct {
	op.Handler
	off map[sealfs.Shard]uint64
	mu  chan struct{}
}

func newDeaf(h op.Handler) op.Handler {
	return &deaf{h, map[sealfs.Shard]uint64{}, make(chan struct{}, 1)}
}

func (d *deaf) Do(ctx context.Context, req *op.Request, rep *op.Reply) error {
	if req.Type != op.Watch {
		return d.Handler.Do(ctx, req, rep)
	}
	d.mu <- struct{}{}
	req.Off = max(req.Off, d.off[req.Shard])
	<-d.mu
	err := d.Handler.Do(ctx, req, rep)
	if n := len(rep.Revokes); err == nil && n > 0 {
		d.mu <- struct{}{}
		d.off[req.Shard] = rep.Revokes[n-1].Num
		<-d.mu
		rep.Revokes = nil
	}
	return err
}

// TestFinds plants what must not be, and wants the checker to find it.
func TestFinds(t *testing.T) {
	every := func(n int, kind op.Type, do func(h op.Handler, ctx context.Context, req *op.Request, rep *op.Reply) error) func(op.Handler) op.Handler {
		return func(h op.Handler) op.Handler {
			rng := rand.New(rand.NewPCG(1, uint64(n)))
			mu := make(chan struct{}, 1)
			return handler(func(ctx context.Context, req *op.Request, rep *op.Reply) error {
				mu <- struct{}{}
				hit := req.Type == kind && rng.IntN(n) == 0
				<-mu
				if hit {
					return do(h, ctx, req, rep)
				}
				return h.Do(ctx, req, rep)
			})
		}
	}
	for name, wrap := range map[string]func(op.Handler) op.Handler{
		"a stale read: revocations are dropped": newDeaf,
		"a lost update: a write is answered and not done": every(4, op.Write, func(_ op.Handler, _ context.Context, _ *op.Request, _ *op.Reply) error {
			return nil
		}),
		"a lost update: a name is not removed": every(2, op.Unlink, func(_ op.Handler, _ context.Context, _ *op.Request, _ *op.Reply) error {
			return nil
		}),
		"an update that is done twice: its retry has another number": every(2, op.Write, func(h op.Handler, ctx context.Context, req *op.Request, rep *op.Reply) error {
			twice := *req
			twice.Seq, twice.Session = 0, 0
			if err := h.Do(ctx, &twice, rep); err != nil {
				return err
			}
			rep.Reset()
			return h.Do(ctx, req, rep)
		}),
	} {
		t.Run(name, func(t *testing.T) {
			p := newPlace(t, 1, 1)
			pl := plan{calls: 40, files: true}
			for range 3 {
				k := p.client(wrap)
				pl.actors, pl.first = append(pl.actors, NewLibrary(k, 0)), k
			}
			sum, report := p.histories(1, pl, func(c tally) bool { return c.histories == 400 })
			if report == "" {
				t.Fatalf("%v: nobody notices", &sum)
			}
			t.Logf("found in history %d", sum.histories)
		})
	}
}
