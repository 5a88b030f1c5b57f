package cluster

import (
	"fmt"
	"testing"
	"time"
)

func TestLiveness(t *testing.T) {
	const period = time.Second
	l := newLiveness(3*time.Second, 10*time.Second)
	start := time.Unix(1000, 0)
	stores := []StoreInfo{
		{ID: testID(1), State: StoreUp}, {ID: testID(2), State: StoreUp}, {ID: testID(3), State: StoreDown}, {ID: testID(4), State: StoreLeft},
	}
	at := func(seconds int, want string) {
		t.Helper()
		got := ""
		for _, v := range l.due(start.Add(time.Duration(seconds)*time.Second), period, stores) {
			for i := range stores {
				if stores[i].ID == v.id {
					stores[i].State = v.to
					got += fmt.Sprintf("%d%s ", i+1, v.to)
				}
			}
		}
		if got != want {
			t.Errorf("after %d s: got %q, want %q", seconds, got, want)
		}
	}
	beat := func(n byte, seconds int) {
		l.beat(testID(n), start.Add(time.Duration(seconds)*time.Second), StoreStats{})
	}

	at(0, "") // the grace of a new leader is not a heartbeat: store 3 stays down
	at(1, "")
	beat(1, 1)
	beat(4, 1)
	at(2, "")
	at(3, "2suspect ")
	beat(1, 3)
	at(4, "")
	beat(2, 4)
	at(5, "2up ")
	at(6, "1suspect ")
	beat(3, 6)
	at(7, "2suspect 3up ")
	for s := 8; s < 13; s++ {
		beat(3, s)
		at(s, "")
	}
	beat(3, 13)
	at(13, "1down ")
	beat(3, 14)
	at(14, "2down ")
	// The manager stands still for an hour: nobody is blamed for it.
	at(3614, "")
	at(3615, "")
	at(3616, "3suspect ")
	at(3617, "")
	beat(1, 3618)
	at(3618, "1up ")
	if _, _, ok := l.last(testID(4)); ok {
		t.Error("a store that has left is remembered")
	}
}
