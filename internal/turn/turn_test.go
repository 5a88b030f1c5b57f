package turn

import (
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// TestOrder: whom one signal wakes goes on in the order of lanes, after the waker has
// come to rest, and keeps its lane.
func TestOrder(t *testing.T) {
	for range 200 {
		synctest.Test(t, func(t *testing.T) {
			turns := Simulated(0)
			start := make(chan struct{})
			var mu sync.Mutex
			cond := sync.Cond{L: &mu}
			open := false
			var order []int
			var orderMu sync.Mutex // turns are an order in time, which the race detector does not know
			note := func(i int) {
				orderMu.Lock()
				defer orderMu.Unlock()
				order = append(order, i)
			}
			var all sync.WaitGroup
			for _, i := range []int{3, 1, 2} {
				all.Go(func() {
					l := turns.Lane(i)
					l.Take()
					<-start
					l.Take()
					note(i)
					mu.Lock()
					for !open {
						turns.Wait(&cond)
					}
					mu.Unlock()
					note(10 + i)
					if turns.Mine() != l {
						t.Errorf("lane %d goes on in %v", i, turns.Mine())
					}
					var children sync.WaitGroup
					for j := range 2 {
						children.Go(func() {
							l.Child(j).Take()
							note(10*i + j)
						})
					}
					children.Wait()
				})
			}
			mine := turns.Mine()
			<-time.After(Period)
			close(start)
			note(0)
			<-time.After(Period)
			mu.Lock()
			open = true
			cond.Broadcast()
			mu.Unlock()
			note(0)
			all.Wait()
			mine.Take()
			want := []int{0, 1, 2, 3, 0, 11, 12, 13, 10, 20, 30, 11, 21, 31}
			if !slices.Equal(order, want) {
				t.Fatalf("order %v, want %v", order, want)
			}
		})
	}
}

// TestLock: who waits for a mutex does not stop the clock of who holds it.
func TestLock(t *testing.T) {
	for _, turns := range []Turns{{}, Simulated(0)} {
		for _, mu := range []Mutex{&sync.Mutex{}, &sync.RWMutex{}} {
			synctest.Test(t, func(t *testing.T) {
				mu.Lock()
				if turns.on {
					go func() {
						<-time.After(time.Second)
						mu.Unlock()
					}()
				} else {
					mu.Unlock()
				}
				turns.Lock(mu)
				if mu.TryLock() {
					t.Error("it is not locked")
				}
				mu.Unlock()
			})
		}
	}
}

// TestOff: the zero Turns does not wait.
func TestOff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		<-time.After(7)
		began := time.Now()
		var turns Turns
		turns.Lane(3).Take()
		turns.Mine().Take()
		turns.Lane(2).Child(1).Take()
		if d := time.Since(began); d != 0 {
			t.Errorf("it took %v", d)
		}
	})
}
