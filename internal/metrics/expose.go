package metrics

import (
	"cmp"
	"math"
	"net/http"
	"slices"
	"strconv"
	"strings"
)

// ContentType is that of an answer.
const ContentType = "text/plain; version=0.0.4; charset=utf-8"

// A Sink takes the samples of a collector during one scrape. It must not be
// kept, nor used by several goroutines at once.
type Sink struct {
	descs   map[string]Desc
	found   map[string][]sample // family → samples
	refused uint64
}

// sample is one series at the time of a scrape.
type sample struct {
	labels string
	value  float64
	hist   *Histogram // in place of value
}

// Emit gives the value of a series of the counter or gauge name, with the values
// of its labels in the order of its Desc. A counter's value is not negative.
func (s *Sink) Emit(name string, value float64, labels ...string) {
	d := s.descs[name]
	if d.Kind != KindCounter && d.Kind != KindGauge || d.Kind == KindCounter && !(value >= 0) {
		s.refused++
		return
	}
	s.put(d, sample{value: value}, labels)
}

// EmitHistogram gives a series of the histogram name, as Emit does.
func (s *Sink) EmitHistogram(name string, h *Histogram, labels ...string) {
	d := s.descs[name]
	if d.Kind != KindHistogram || h == nil {
		s.refused++
		return
	}
	s.put(d, sample{hist: h}, labels)
}

func (s *Sink) put(d Desc, x sample, labels []string) {
	if len(labels) != len(d.Labels) {
		s.refused++
		return
	}
	x.labels = renderLabels(d.Labels, labels)
	s.found[d.Name] = append(s.found[d.Name], x)
}

// AppendText appends the exposition of all families to b: those without a
// series are left out, families stand in the order of their names and series in
// that of their labels. It calls the functions of Func and Collect; the error is
// always nil (see encoding.TextAppender).
func (r *Registry) AppendText(b []byte) ([]byte, error) {
	r.mu.Lock()
	families := make([]family, 0, len(r.families))
	for _, f := range r.families {
		families = append(families, *f)
	}
	collectors := r.collectors
	r.mu.Unlock()
	slices.SortFunc(families, func(x, y family) int { return cmp.Compare(x.name, y.name) })

	sink := Sink{found: make(map[string][]sample, len(families))}
	for _, f := range families {
		if f.name == refusedName {
			continue // known when everything else has been emitted
		}
		for _, s := range f.series {
			x := sample{labels: s.labels, hist: s.hist}
			if s.read != nil {
				x.value = s.read()
				if f.kind == KindCounter && !(x.value >= 0) {
					sink.refused++
					continue
				}
			}
			sink.found[f.name] = append(sink.found[f.name], x)
		}
	}
	for _, c := range collectors {
		sink.descs = c.descs
		c.fn(&sink)
	}
	for name, samples := range sink.found {
		// Stable, so that of equals the first emitted is the one that stays.
		slices.SortStableFunc(samples, func(x, y sample) int { return cmp.Compare(x.labels, y.labels) })
		once := slices.CompactFunc(samples, func(x, y sample) bool { return x.labels == y.labels })
		sink.refused += uint64(len(samples) - len(once))
		sink.found[name] = once
	}
	r.refused.Add(sink.refused)
	sink.found[refusedName] = []sample{{value: float64(r.refused.Value())}}

	for _, f := range families {
		samples := sink.found[f.name]
		if len(samples) == 0 {
			continue
		}
		b = append(append(append(b, "# HELP "...), f.name...), ' ')
		b = appendEscaped(b, f.help, false)
		b = append(append(append(b, "\n# TYPE "...), f.name...), ' ')
		b = append(append(b, f.kind.String()...), '\n')
		for _, x := range samples {
			if x.hist != nil {
				b = x.hist.append(b, f.name, x.labels)
			} else {
				b = appendSample(b, f.name, "", x.labels, "", x.value)
			}
		}
	}
	return b, nil
}

// ServeHTTP answers GET with the exposition and HEAD with its header.
func (r *Registry) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	if req.Method != http.MethodGet && req.Method != http.MethodHead {
		w.Header().Set("Allow", "GET, HEAD")
		http.Error(w, "only GET and HEAD are answered here", http.StatusMethodNotAllowed)
		return
	}
	text, _ := r.AppendText(nil)
	w.Header().Set("Content-Type", ContentType)
	w.Header().Set("Content-Length", strconv.Itoa(len(text)))
	if req.Method == http.MethodGet {
		w.Write(text) // an error means that the asker has gone
	}
}

// appendSample appends one line; le, if any, is a bucket's bound.
func appendSample(b []byte, name, suffix, labels, le string, v float64) []byte {
	b = append(append(b, name...), suffix...)
	if labels != "" || le != "" {
		b = append(append(b, '{'), labels...)
		if le != "" {
			if labels != "" {
				b = append(b, ',')
			}
			b = append(append(append(b, `le="`...), le...), '"')
		}
		b = append(b, '}')
	}
	b = append(b, ' ')
	// Whole numbers that a float holds exactly are easier to read in full.
	if v == math.Trunc(v) && math.Abs(v) < 1<<53 {
		b = strconv.AppendInt(b, int64(v), 10)
	} else {
		b = strconv.AppendFloat(b, v, 'g', -1, 64)
	}
	return append(b, '\n')
}

// renderLabels renders pairs of names and values, in the order of the names. It
// leaves its arguments as they are.
func renderLabels(names, values []string) string {
	if len(names) == 0 {
		return ""
	}
	order := make([]int, len(names))
	for i := range order {
		order[i] = i
	}
	slices.SortFunc(order, func(x, y int) int { return cmp.Compare(names[x], names[y]) })
	var b []byte
	for i, j := range order {
		if i > 0 {
			b = append(b, ',')
		}
		b = append(append(b, names[j]...), `="`...)
		b = append(appendEscaped(b, values[j], true), '"')
	}
	return string(b)
}

// appendEscaped appends a help or, quoted, the value of a label.
func appendEscaped(b []byte, s string, quoted bool) []byte {
	s = strings.ToValidUTF8(s, "\uFFFD")
	for i := range len(s) {
		switch c := s[i]; {
		case c == '\\':
			b = append(b, `\\`...)
		case c == '\n':
			b = append(b, `\n`...)
		case c == '"' && quoted:
			b = append(b, `\"`...)
		default:
			b = append(b, c)
		}
	}
	return b
}
