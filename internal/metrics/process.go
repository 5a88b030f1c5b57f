package metrics

import (
	"bytes"
	"os"
	"runtime"
	runtimemetrics "runtime/metrics"
	"strconv"
	"syscall"
	"time"
)

// runtimeNames tells which numbers of Go's runtime are shown, and as what. Those
// that other programs show too have the names by which dashboards know them.
var runtimeNames = []struct {
	from string
	desc Desc
}{
	{"/sched/goroutines:goroutines", Desc{"go_goroutines", "Goroutines that exist.", KindGauge, nil}},
	{"/sched/gomaxprocs:threads", Desc{"go_sched_gomaxprocs_threads", "Threads that may run Go code at once.", KindGauge, nil}},
	{"/memory/classes/heap/objects:bytes", Desc{"go_memstats_heap_alloc_bytes", "Memory of objects on the heap.", KindGauge, nil}},
	{"/memory/classes/heap/free:bytes", Desc{"go_memstats_heap_free_bytes", "Memory of the heap that is free and could be returned.", KindGauge, nil}},
	{"/memory/classes/heap/released:bytes", Desc{"go_memstats_heap_released_bytes", "Memory of the heap that was returned to the system.", KindGauge, nil}},
	{"/memory/classes/heap/stacks:bytes", Desc{"go_memstats_stack_inuse_bytes", "Memory of the stacks of goroutines.", KindGauge, nil}},
	{"/memory/classes/total:bytes", Desc{"go_memstats_sys_bytes", "Memory that the runtime has mapped.", KindGauge, nil}},
	{"/gc/heap/goal:bytes", Desc{"go_gc_heap_goal_bytes", "Size of the heap at which the collection is to end.", KindGauge, nil}},
	{"/gc/heap/allocs:bytes", Desc{"go_memstats_alloc_bytes_total", "Memory allocated on the heap, also if freed since.", KindCounter, nil}},
	{"/gc/heap/allocs:objects", Desc{"go_memstats_mallocs_total", "Objects allocated on the heap.", KindCounter, nil}},
	{"/gc/cycles/total:gc-cycles", Desc{"go_gc_cycles_total", "Collections of garbage that were completed.", KindCounter, nil}},
	{"/cpu/classes/gc/total:cpu-seconds", Desc{"go_gc_cpu_seconds_total", "Processor time for collecting garbage, as the runtime estimates it.", KindCounter, nil}},
	{"/sync/mutex/wait/total:seconds", Desc{"go_sync_mutex_wait_seconds_total", "Time that goroutines have waited for mutexes.", KindCounter, nil}},
}

// processDescs are the numbers that the system keeps of the process.
var processDescs = []Desc{
	{"go_info", "The version of Go that built the program.", KindGauge, []string{"version"}},
	{"process_cpu_seconds_total", "Processor time, of user and system.", KindCounter, nil},
	{"process_open_fds", "File descriptors in use.", KindGauge, nil},
	{"process_max_fds", "File descriptors that may be in use.", KindGauge, nil},
	{"process_resident_memory_bytes", "Memory that is resident, shared mappings included.", KindGauge, nil},
	{"process_virtual_memory_bytes", "Address space.", KindGauge, nil},
	{"process_start_time_seconds", "When the process began, in seconds since 1970.", KindGauge, nil},
}

// Process registers the numbers of the Go runtime and of the process. A number
// that the system does not tell, because /proc is not there, is left out.
// Reading them does not stop the world.
func Process(reg *Registry) error {
	descs := append([]Desc(nil), processDescs...)
	for _, n := range runtimeNames {
		descs = append(descs, n.desc)
	}
	started, known := startTime()
	if !known {
		started = float64(time.Now().UnixMilli()) / 1e3
	}
	return reg.Collect(descs, func(s *Sink) {
		s.Emit("go_info", 1, runtime.Version())
		s.Emit("process_start_time_seconds", started)
		emitRuntime(s)
		emitProcess(s)
	})
}

func emitRuntime(s *Sink) {
	samples := make([]runtimemetrics.Sample, len(runtimeNames))
	for i, n := range runtimeNames {
		samples[i].Name = n.from
	}
	runtimemetrics.Read(samples)
	for i, n := range runtimeNames {
		switch v := samples[i].Value; v.Kind() {
		case runtimemetrics.KindUint64:
			s.Emit(n.desc.Name, float64(v.Uint64()))
		case runtimemetrics.KindFloat64:
			s.Emit(n.desc.Name, v.Float64())
		}
	}
}

func emitProcess(s *Sink) {
	var use syscall.Rusage
	if syscall.Getrusage(syscall.RUSAGE_SELF, &use) == nil {
		s.Emit("process_cpu_seconds_total", float64(use.Utime.Nano()+use.Stime.Nano())/1e9)
	}
	var limit syscall.Rlimit
	if syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit) == nil {
		s.Emit("process_max_fds", float64(limit.Cur))
	}
	if n, ok := openFiles(); ok {
		s.Emit("process_open_fds", float64(n))
	}
	if text, err := os.ReadFile("/proc/self/statm"); err == nil {
		if f := bytes.Fields(text); len(f) > 1 {
			page := float64(os.Getpagesize())
			for i, name := range []string{"process_virtual_memory_bytes", "process_resident_memory_bytes"} {
				if n, err := strconv.ParseUint(string(f[i]), 10, 64); err == nil {
					s.Emit(name, float64(n)*page)
				}
			}
		}
	}
}

// openFiles counts the file descriptors of the process.
func openFiles() (n int64, ok bool) {
	const dir = "/proc/self/fd"
	// Since Linux 6.2 the directory's size is the number; before it is 0.
	if st, err := os.Stat(dir); err == nil && st.Size() > 0 {
		return st.Size(), true
	}
	d, err := os.Open(dir)
	if err != nil {
		return 0, false
	}
	defer d.Close()
	names, err := d.Readdirnames(-1)
	return int64(len(names)) - 1, err == nil // without d itself
}

// startTime returns when the kernel began the process, in seconds since 1970.
func startTime() (seconds float64, ok bool) {
	self, err1 := os.ReadFile("/proc/self/stat")
	system, err2 := os.ReadFile("/proc/stat")
	if err1 != nil || err2 != nil {
		return 0, false
	}
	return parseStart(self, system)
}

// parseStart reads the start from the texts of /proc/self/stat and /proc/stat.
func parseStart(self, system []byte) (seconds float64, ok bool) {
	// The program's name may hold spaces and parentheses; after the last one
	// stand the fields from the third on, and the start is the 22nd.
	fields := bytes.Fields(self[bytes.LastIndexByte(self, ')')+1:])
	const third, start = 3, 22
	if len(fields) <= start-third {
		return 0, false
	}
	_, boot, found := bytes.Cut(system, []byte("\nbtime "))
	boot, _, _ = bytes.Cut(boot, []byte("\n"))
	ticks, err1 := strconv.ParseUint(string(fields[start-third]), 10, 64)
	booted, err2 := strconv.ParseUint(string(boot), 10, 64)
	const ticksPerSecond = 100 // what Linux shows to programs, whatever it ticks by
	return float64(booted) + float64(ticks)/ticksPerSecond, found && err1 == nil && err2 == nil
}
