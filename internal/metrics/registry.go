package metrics

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"sync/atomic"

	"sealfs"
)

// Kind says how the values of a family are to be read.
type Kind uint8

// The kinds of families.
const (
	_             Kind = iota
	KindCounter        // grows from 0 at the start of the process; its name ends in _total
	KindGauge          // goes up and down
	KindHistogram      // a distribution: see Histogram
)

// String returns the name of k in the text format.
func (k Kind) String() string {
	switch k {
	case KindCounter:
		return "counter"
	case KindGauge:
		return "gauge"
	case KindHistogram:
		return "histogram"
	}
	return "unknown"
}

// Labels are the names and values that tell one series of a family from
// another. Values may be any bytes; what is not UTF-8 is replaced.
type Labels map[string]string

// Desc describes a family whose series a collector emits.
type Desc struct {
	Name, Help string
	Kind       Kind
	Labels     []string // names; the values come with each sample
}

// A Counter counts up from 0. The zero value is ready for use.
type Counter struct{ n atomic.Uint64 }

// Inc adds one.
func (c *Counter) Inc() { c.n.Add(1) }

// Add adds n.
func (c *Counter) Add(n uint64) { c.n.Add(n) }

// Value returns the count.
func (c *Counter) Value() uint64 { return c.n.Load() }

// A Gauge is a number that goes up and down. The zero value is ready for use.
type Gauge struct{ n atomic.Int64 }

// Set makes the gauge n.
func (g *Gauge) Set(n int64) { g.n.Store(n) }

// Add adds n, which may be negative.
func (g *Gauge) Add(n int64) { g.n.Add(n) }

// Value returns the number.
func (g *Gauge) Value() int64 { return g.n.Load() }

// A Registry holds the families of a process and answers scrapes as an
// http.Handler. Its methods may be called at any time from any goroutine.
type Registry struct {
	mu         sync.Mutex
	families   map[string]*family
	samples    map[string]string // name of a sample → the family it belongs to
	collectors []*collector

	refused Counter // samples that collectors emitted wrongly
}

// family is what all series of a name share, and those that are registered
// one by one. The slice is only ever appended to.
type family struct {
	name, help string
	kind       Kind
	series     []series
	known      map[string]bool // labels of series
}

// series has either read or hist.
type series struct {
	labels string // rendered: a="x",b="y"
	read   func() float64
	hist   *Histogram
}

// collector emits samples of the described families.
type collector struct {
	descs map[string]Desc
	fn    func(*Sink)
}

const refusedName = "sealfs_metrics_refused_samples_total"

// NewRegistry returns a registry that holds the counter of its own refusals.
func NewRegistry() *Registry {
	r := &Registry{families: make(map[string]*family), samples: make(map[string]string)}
	f := &family{
		name: refusedName, help: "Samples that collectors emitted wrongly and that were left out.", kind: KindCounter,
		known: map[string]bool{"": true},
	}
	f.series = []series{{read: func() float64 { return float64(r.refused.Value()) }}}
	r.families[refusedName], r.samples[refusedName] = f, refusedName
	return r
}

// Counter registers a counter. All four ways to register return ErrInvalid for
// a faulty name or for a help or kind that differs from the family's, and
// ErrExist for a series or name that is taken; then nothing is registered.
func (r *Registry) Counter(name, help string, labels Labels) (*Counter, error) {
	c := new(Counter)
	return c, r.add(name, help, KindCounter, labels, series{read: func() float64 { return float64(c.Value()) }})
}

// Gauge registers a gauge.
func (r *Registry) Gauge(name, help string, labels Labels) (*Gauge, error) {
	g := new(Gauge)
	return g, r.add(name, help, KindGauge, labels, series{read: func() float64 { return float64(g.Value()) }})
}

// Histogram registers a histogram of latencies.
func (r *Registry) Histogram(name, help string, labels Labels) (*Histogram, error) {
	h := new(Histogram)
	return h, r.add(name, help, KindHistogram, labels, series{hist: h})
}

// Func registers a series whose value fn returns at each scrape. Scrapes may
// run side by side, so fn must bear that; while it blocks, its scrape does.
func (r *Registry) Func(name, help string, kind Kind, labels Labels, fn func() float64) error {
	if kind == KindHistogram {
		return fmt.Errorf("metric %s: a histogram is not one number: %w", name, sealfs.ErrInvalid)
	}
	return r.add(name, help, kind, labels, series{read: fn})
}

// Collect registers families whose samples fn emits at each scrape: for all
// that there is at that time, with the labels it has then. As with Func, several
// scrapes may call fn at once.
func (r *Registry) Collect(descs []Desc, fn func(*Sink)) error {
	c := &collector{descs: make(map[string]Desc, len(descs)), fn: fn}
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, d := range descs {
		if _, twice := c.descs[d.Name]; twice {
			return fmt.Errorf("metric %s is described twice: %w", d.Name, sealfs.ErrExist)
		}
		for i, name := range d.Labels {
			if slices.Contains(d.Labels[:i], name) {
				return fmt.Errorf("metric %s: label %s stands twice: %w", d.Name, name, sealfs.ErrInvalid)
			}
		}
		if err := r.check(d.Name, d.Help, d.Kind, d.Labels); err != nil {
			return err
		}
		d.Labels = slices.Clone(d.Labels)
		c.descs[d.Name] = d
	}
	// Two new families may be in each other's way: x_count and the histogram x.
	for _, d := range descs {
		for _, s := range sampleNames(d.Name, d.Kind) {
			if _, clash := c.descs[s]; clash && s != d.Name {
				return fmt.Errorf("metric %s is a part of the histogram %s: %w", s, d.Name, sealfs.ErrExist)
			}
		}
	}
	for _, d := range descs {
		r.family(d.Name, d.Help, d.Kind)
	}
	r.collectors = append(r.collectors, c)
	return nil
}

func (r *Registry) add(name, help string, kind Kind, labels Labels, s series) error {
	names := slices.Sorted(maps.Keys(labels))
	values := make([]string, len(names))
	for i, n := range names {
		values[i] = labels[n]
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if err := r.check(name, help, kind, names); err != nil {
		return err
	}
	s.labels = renderLabels(names, values)
	if f := r.families[name]; f != nil && f.known[s.labels] {
		return fmt.Errorf("metric %s{%s} is registered already: %w", name, s.labels, sealfs.ErrExist)
	}
	f := r.family(name, help, kind)
	f.known[s.labels] = true
	f.series = append(f.series, s)
	return nil
}

// check reports what forbids a series of the given names. REQUIRES: mu.
func (r *Registry) check(name, help string, kind Kind, labels []string) error {
	invalid := func(format string, args ...any) error {
		return fmt.Errorf("metric %q: %s: %w", name, fmt.Sprintf(format, args...), sealfs.ErrInvalid)
	}
	switch {
	case !validName(name, true):
		return invalid("the name is not one of the format")
	case help == "":
		return invalid("the help is missing")
	case kind < KindCounter || kind > KindHistogram:
		return invalid("kind %d is not known", kind)
	case (kind == KindCounter) != strings.HasSuffix(name, "_total"):
		return invalid("names of counters, and of nothing else, end in _total")
	}
	for _, l := range labels {
		if !validName(l, false) || strings.HasPrefix(l, "__") || l == "le" {
			return invalid("%q cannot be the name of a label", l)
		}
	}
	if f := r.families[name]; f != nil && (f.help != help || f.kind != kind) {
		return invalid("it is registered with another help or as a %v", f.kind)
	}
	for _, s := range sampleNames(name, kind) {
		if owner, taken := r.samples[s]; taken && owner != name {
			return fmt.Errorf("metric %s: the name %s belongs to %s: %w", name, s, owner, sealfs.ErrExist)
		}
	}
	return nil
}

// family returns the family, which check has found in order. REQUIRES: mu.
func (r *Registry) family(name, help string, kind Kind) *family {
	f := r.families[name]
	if f == nil {
		f = &family{name: name, help: help, kind: kind, known: make(map[string]bool)}
		r.families[name] = f
		for _, s := range sampleNames(name, kind) {
			r.samples[s] = name
		}
	}
	return f
}

// sampleNames returns the names that a family takes, its own among them.
func sampleNames(name string, kind Kind) []string {
	if kind != KindHistogram {
		return []string{name}
	}
	return []string{name, name + "_bucket", name + "_sum", name + "_count"}
}

// validName reports whether s is a name of a metric, or else of a label, where
// no colon may stand.
func validName(s string, metric bool) bool {
	for i := range len(s) {
		c := s[i]
		letter := c|0x20 >= 'a' && c|0x20 <= 'z' || c == '_' || c == ':' && metric
		if !letter && (i == 0 || c < '0' || c > '9') {
			return false
		}
	}
	return s != ""
}
