package metrics

import (
	"os"
	"runtime"
	"testing"
	"time"
)

func TestProcess(t *testing.T) {
	r := NewRegistry()
	if err := Process(r); err != nil {
		t.Fatal(err)
	}
	_, values := scrape(t, r)
	now := float64(time.Now().Unix())
	for name, limits := range map[string][2]float64{
		"go_goroutines":                                {1, 1e5},
		"go_sched_gomaxprocs_threads":                  {1, 1e5},
		"go_memstats_heap_alloc_bytes":                 {1e4, 1e11},
		"go_memstats_sys_bytes":                        {1e5, 1e11},
		"go_gc_heap_goal_bytes":                        {1e5, 1e11},
		"go_memstats_alloc_bytes_total":                {1e4, 1e13},
		"go_gc_cycles_total":                           {0, 1e9},
		"process_cpu_seconds_total":                    {1e-6, 1e6},
		"process_open_fds":                             {3, 1e6},
		"process_max_fds":                              {4, 1e20},
		"process_resident_memory_bytes":                {1e6, 1e11},
		"process_virtual_memory_bytes":                 {1e6, 1e14},
		"process_start_time_seconds":                   {now - 3600, now + 60},
		`go_info{version="` + runtime.Version() + `"}`: {1, 1},
		refusedName:                                    {0, 0},
	} {
		if v, ok := values[name]; !ok || v < limits[0] || v > limits[1] {
			t.Errorf("%s is %v (%v), want %v to %v", name, v, ok, limits[0], limits[1])
		}
	}
	// Every name is one that this runtime knows.
	if want := len(processDescs) + len(runtimeNames) + 1; len(values) != want {
		t.Errorf("%d numbers are shown, want %d", len(values), want)
	}
	// Another test's sockets may be closing meanwhile, so many are opened.
	before := values["process_open_fds"]
	for range 40 {
		null := must[*os.File](t)(os.Open(os.DevNull))
		defer null.Close()
	}
	_, values = scrape(t, r)
	if more := values["process_open_fds"] - before; more < 20 || more > 60 {
		t.Errorf("with 40 more files open there are %v more", more)
	}
}

func TestParseStart(t *testing.T) {
	const self = "42 (a) b (c)) S 1 42 42 0 -1 4194304 1 2 3 4 5 6 7 8 20 0 9 0 12345 99 7 18446744073709551615\n"
	const system = "cpu  1 2 3\nbtime 1700000000\nprocesses 5\n"
	if got, ok := parseStart([]byte(self), []byte(system)); !ok || got != 1700000123.45 {
		t.Errorf("the start is %v, %v", got, ok)
	}
	for _, c := range [][2]string{{"", system}, {"42 (a) S 1", system}, {self, ""}, {self, "\nbtime x\n"}, {self[:len(self)-40], system}} {
		if got, ok := parseStart([]byte(c[0]), []byte(c[1])); ok {
			t.Errorf("%q and %q give the start %v", c[0], c[1], got)
		}
	}
}
