package client

import (
	"errors"
	"runtime"
	"testing"
)

// TestProcessors: each mount adds the processors that its waiting threads keep, go-fuse
// sees none of them, and the last one that goes leaves what was there.
func TestProcessors(t *testing.T) {
	t.Setenv("GOMAXPROCS", "")
	runtime.SetDefaultGOMAXPROCS()
	own := runtime.GOMAXPROCS(0)
	each := min(max(own, 2)+1, readersMax)
	var p Processors
	expect := func(when string, want int) {
		t.Helper()
		if got := runtime.GOMAXPROCS(0); got != want {
			t.Errorf("%s: %d processors, not %d", when, got, want)
		}
	}
	open := func() error {
		expect("while go-fuse looks", own)
		return nil
	}
	for n := 1; n <= 3; n++ {
		if err := p.mount(open); err != nil {
			t.Fatal(err)
		}
		expect("after a mount", own+n*each)
	}
	failure := errors.New("no such luck")
	if err := p.mount(func() error { return failure }); err != failure {
		t.Errorf("a failed mount is %v", err)
	}
	for n := 2; n >= 0; n-- {
		p.unmount()
		expect("after an unmount", own+n*each)
	}
	if err := p.mount(func() error { return failure }); err != failure {
		t.Errorf("a failed mount is %v", err)
	}
	expect("after a failed first mount", own)

	t.Setenv("GOMAXPROCS", "7")
	if err := p.mount(open); err != nil {
		t.Fatal(err)
	}
	expect("when the environment decides", own)
	p.unmount()
	expect("when the environment decides", own)
}
