package metrics

import (
	"bytes"
	"errors"
	"math"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
	"unicode/utf8"

	"sealfs"
)

// must returns v; an error ends the test.
func must[T any](t testing.TB) func(v T, err error) T {
	return func(v T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

// scrape returns the exposition and its values, which Lint has to accept.
func scrape(t testing.TB, r *Registry) (string, map[string]float64) {
	t.Helper()
	text, err := r.AppendText(nil)
	if err != nil {
		t.Fatal(err)
	}
	values, err := Parse(text)
	if err != nil {
		t.Fatalf("%v\n%s", err, text)
	}
	return string(text), values
}

// sample returns a registry with a series of each sort.
func example(t testing.TB) *Registry {
	r := NewRegistry()
	must[*Gauge](t)(r.Gauge("b_gauge", "Goes up\nand \\ down.", nil)).Set(-7)
	c := must[*Counter](t)(r.Counter("b_things_total", "Things.", Labels{"z": "last", "a": "first"}))
	c.Inc()
	c.Add(1 << 40)
	must[*Counter](t)(r.Counter("b_things_total", "Things.", nil)).Inc()
	must[*Counter](t)(r.Counter("b_things_total", "Things.", Labels{"a": "quote \" slash \\ line \n bad \xff"})).Add(2)
	h := must[*Histogram](t)(r.Histogram("c_seconds", "Latency.", Labels{"op": "x"}))
	h.Observe(1500 * time.Nanosecond)
	h.Observe(time.Hour)
	if err := r.Func("a_ratio", "A share.", KindGauge, nil, func() float64 { return 0.1 }); err != nil {
		t.Fatal(err)
	}
	err := r.Collect([]Desc{
		{"d_free_bytes", "Free.", KindGauge, []string{"store"}},
		{"d_written_bytes_total", "Written.", KindCounter, []string{"store", "kind"}},
		{"d_never", "Has no samples.", KindGauge, nil},
	}, func(s *Sink) {
		s.Emit("d_free_bytes", math.Inf(1), "s2")
		s.Emit("d_free_bytes", math.NaN(), "s1")
		s.Emit("d_written_bytes_total", 1e20, "s1", "k")
		s.Emit("d_written_bytes_total", 3, "s1", "a")
	})
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// TestGolden holds the exposition to its bytes; of the 54 buckets those that
// repeat the count before are cut out.
func TestGolden(t *testing.T) {
	text, _ := scrape(t, example(t))
	var kept strings.Builder
	last := ""
	for line := range strings.Lines(text) {
		count := line[strings.LastIndexByte(line, ' '):]
		if !strings.Contains(line, "_bucket") || count != last {
			kept.WriteString(line)
		}
		last = count
	}
	const want = `# HELP a_ratio A share.
# TYPE a_ratio gauge
a_ratio 0.1
# HELP b_gauge Goes up\nand \\ down.
# TYPE b_gauge gauge
b_gauge -7
# HELP b_things_total Things.
# TYPE b_things_total counter
b_things_total 1
b_things_total{a="first",z="last"} 1099511627777
b_things_total{a="quote \" slash \\ line \n bad ` + "\uFFFD" + `"} 2
# HELP c_seconds Latency.
# TYPE c_seconds histogram
c_seconds_bucket{op="x",le="1e-06"} 0
c_seconds_bucket{op="x",le="1.5e-06"} 1
c_seconds_bucket{op="x",le="+Inf"} 2
c_seconds_sum{op="x"} 3600.0000015
c_seconds_count{op="x"} 2
# HELP d_free_bytes Free.
# TYPE d_free_bytes gauge
d_free_bytes{store="s1"} NaN
d_free_bytes{store="s2"} +Inf
# HELP d_written_bytes_total Written.
# TYPE d_written_bytes_total counter
d_written_bytes_total{kind="a",store="s1"} 3
d_written_bytes_total{kind="k",store="s1"} 1e+20
# HELP sealfs_metrics_refused_samples_total Samples that collectors emitted wrongly and that were left out.
# TYPE sealfs_metrics_refused_samples_total counter
sealfs_metrics_refused_samples_total 0
`
	if kept.String() != want {
		t.Errorf("got\n%s\nwant\n%s", kept.String(), want)
	}
}

// TestRegisterRefused registers what a registry cannot take.
func TestRegisterRefused(t *testing.T) {
	value := func() float64 { return 1 }
	collect := func(descs ...Desc) func(*Registry) error {
		return func(r *Registry) error { return r.Collect(descs, func(*Sink) {}) }
	}
	gauge := func(name, help string, labels Labels) func(*Registry) error {
		return func(r *Registry) error { _, err := r.Gauge(name, help, labels); return err }
	}
	for what, c := range map[string]struct {
		do   func(*Registry) error
		want error
	}{
		"empty name":         {gauge("", "h", nil), sealfs.ErrInvalid},
		"name with a dash":   {gauge("a-b", "h", nil), sealfs.ErrInvalid},
		"name with a digit":  {gauge("1a", "h", nil), sealfs.ErrInvalid},
		"name not ASCII":     {gauge("größe", "h", nil), sealfs.ErrInvalid},
		"no help":            {gauge("a", "", nil), sealfs.ErrInvalid},
		"gauge with _total":  {gauge("a_total", "h", nil), sealfs.ErrInvalid},
		"label with a colon": {gauge("a", "h", Labels{"b:c": "d"}), sealfs.ErrInvalid},
		"reserved label":     {gauge("a", "h", Labels{"__b": "d"}), sealfs.ErrInvalid},
		"label le":           {gauge("a", "h", Labels{"le": "1"}), sealfs.ErrInvalid},
		"empty label":        {gauge("a", "h", Labels{"": "1"}), sealfs.ErrInvalid},
		"series again":       {gauge("b_gauge", "Goes up\nand \\ down.", Labels{}), sealfs.ErrExist},
		"another help":       {gauge("b_gauge", "Other.", Labels{"x": "y"}), sealfs.ErrInvalid},
		"part of a histogram": {
			gauge("c_seconds_count", "h", nil), sealfs.ErrExist},
		"histogram over a gauge": {func(r *Registry) error {
			if err := gauge("x_sum", "h", nil)(r); err != nil {
				return nil
			}
			_, err := r.Histogram("x", "h", nil)
			return err
		}, sealfs.ErrExist},
		"counter without _total": {func(r *Registry) error { _, err := r.Counter("a", "h", nil); return err }, sealfs.ErrInvalid},
		"another kind":           {func(r *Registry) error { return r.Func("c_seconds", "Latency.", KindGauge, nil, value) }, sealfs.ErrInvalid},
		"func of a histogram":    {func(r *Registry) error { return r.Func("a", "h", KindHistogram, nil, value) }, sealfs.ErrInvalid},
		"unknown kind":           {func(r *Registry) error { return r.Func("a", "h", 9, nil, value) }, sealfs.ErrInvalid},
		"described twice":        {collect(Desc{"a", "h", KindGauge, nil}, Desc{"a", "h", KindGauge, nil}), sealfs.ErrExist},
		"label twice":            {collect(Desc{"a", "h", KindGauge, []string{"x", "x"}}), sealfs.ErrInvalid},
		"second is faulty":       {collect(Desc{"a", "h", KindGauge, nil}, Desc{"b b", "h", KindGauge, nil}), sealfs.ErrInvalid},
		"in each other's way":    {collect(Desc{"a_count", "h", KindGauge, nil}, Desc{"a", "h", KindHistogram, nil}), sealfs.ErrExist},
	} {
		r := example(t)
		families := len(r.families)
		if err := c.do(r); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", what, err, c.want)
		}
		if what != "histogram over a gauge" && len(r.families) != families {
			t.Errorf("%s: a family was registered all the same", what)
		}
		scrape(t, r)
	}
}

// TestEmitRefused emits what no exposition may hold: it is left out and counted.
func TestEmitRefused(t *testing.T) {
	var h Histogram
	for what, c := range map[string]struct {
		emit func(*Sink)
		want float64
	}{
		"good":                 {func(s *Sink) { s.Emit("g", 1, "x"); s.Emit("n_total", 1); s.EmitHistogram("h", &h) }, 0},
		"unknown name":         {func(s *Sink) { s.Emit("other", 1) }, 1},
		"unknown histogram":    {func(s *Sink) { s.EmitHistogram("other", &h) }, 1},
		"too few labels":       {func(s *Sink) { s.Emit("g", 1) }, 1},
		"too many labels":      {func(s *Sink) { s.Emit("g", 1, "x", "y") }, 1},
		"negative counter":     {func(s *Sink) { s.Emit("n_total", -1) }, 1},
		"counter NaN":          {func(s *Sink) { s.Emit("n_total", math.NaN()) }, 1},
		"number for histogram": {func(s *Sink) { s.Emit("h", 1) }, 1},
		"histogram for gauge":  {func(s *Sink) { s.EmitHistogram("g", &h, "x") }, 1},
		"no histogram":         {func(s *Sink) { s.EmitHistogram("h", nil) }, 1},
		"one series thrice":    {func(s *Sink) { s.Emit("g", 5, "x"); s.Emit("g", 6, "x"); s.Emit("g", 7, "x") }, 2},
		"same when replaced":   {func(s *Sink) { s.Emit("g", 5, "\xff"); s.Emit("g", 6, "\xfe") }, 1},
	} {
		r := NewRegistry()
		err := r.Collect([]Desc{
			{"g", "h", KindGauge, []string{"l"}}, {"n_total", "h", KindCounter, nil}, {"h", "h", KindHistogram, nil},
		}, c.emit)
		if err != nil {
			t.Fatal(err)
		}
		for round := 1.0; round <= 2; round++ {
			_, values := scrape(t, r)
			if got := values[refusedName]; got != c.want*round {
				t.Errorf("%s: %v samples were refused in %v scrapes, want %v in each", what, got, round, c.want)
			}
			if v, ok := values[`g{l="x"}`]; ok && what == "one series thrice" && v != 5 {
				t.Errorf("%s: %v was shown, want the first", what, v)
			}
		}
	}
	r := NewRegistry()
	if err := r.Func("n_total", "h", KindCounter, nil, func() float64 { return -1 }); err != nil {
		t.Fatal(err)
	}
	if text, values := scrape(t, r); values[refusedName] != 1 || strings.Contains(text, "n_total -1") {
		t.Errorf("a function's negative counter is shown:\n%s", text)
	}
}

// TestFamilyOfMany lets two collectors and a series share a family.
func TestFamilyOfMany(t *testing.T) {
	r := NewRegistry()
	must[*Gauge](t)(r.Gauge("g", "h", Labels{"l": "b"})).Set(2)
	for _, v := range []string{"c", "a"} {
		if err := r.Collect([]Desc{{"g", "h", KindGauge, []string{"l"}}}, func(s *Sink) { s.Emit("g", 1, v) }); err != nil {
			t.Fatal(err)
		}
	}
	text, _ := scrape(t, r)
	if want := "# TYPE g gauge\ng{l=\"a\"} 1\ng{l=\"b\"} 2\ng{l=\"c\"} 1\n"; !strings.Contains(text, want) {
		t.Errorf("got\n%s", text)
	}
}

func TestServe(t *testing.T) {
	s := httptest.NewServer(example(t))
	defer s.Close()
	for _, method := range []string{http.MethodGet, http.MethodHead, http.MethodPost} {
		req := must[*http.Request](t)(http.NewRequest(method, s.URL, nil))
		resp := must[*http.Response](t)(s.Client().Do(req))
		var body bytes.Buffer
		if _, err := body.ReadFrom(resp.Body); err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		switch method {
		case http.MethodPost:
			if resp.StatusCode != http.StatusMethodNotAllowed || resp.Header.Get("Allow") != "GET, HEAD" {
				t.Errorf("%s: %v, %v", method, resp.Status, resp.Header)
			}
			continue
		case http.MethodGet:
			if err := Lint(body.Bytes()); err != nil {
				t.Error(err)
			}
			if strconv.Itoa(body.Len()) != resp.Header.Get("Content-Length") {
				t.Errorf("%d bytes came, the header says %s", body.Len(), resp.Header.Get("Content-Length"))
			}
		case http.MethodHead:
			if body.Len() != 0 || resp.ContentLength <= 0 {
				t.Errorf("HEAD: %d bytes came, the header says %d", body.Len(), resp.ContentLength)
			}
		}
		if resp.StatusCode != http.StatusOK || resp.Header.Get("Content-Type") != "text/plain; version=0.0.4; charset=utf-8" {
			t.Errorf("%s: %v, %v", method, resp.Status, resp.Header)
		}
	}
}

// TestConcurrent scrapes, counts and registers at once; the race detector and
// Lint judge. Counters never fall from one scrape to the next.
func TestConcurrent(t *testing.T) {
	r := NewRegistry()
	c := must[*Counter](t)(r.Counter("c_total", "h", nil))
	g := must[*Gauge](t)(r.Gauge("g", "h", nil))
	h := must[*Histogram](t)(r.Histogram("h_seconds", "h", nil))
	if err := r.Collect([]Desc{{"e", "h", KindGauge, []string{"l"}}}, func(s *Sink) { s.Emit("e", float64(g.Value()), "x") }); err != nil {
		t.Fatal(err)
	}
	var counting, scraping sync.WaitGroup
	const n = 5000
	for i := range 3 {
		counting.Go(func() {
			for j := range n {
				c.Inc()
				g.Add(1)
				h.Observe(time.Duration(j) * time.Microsecond)
				if j%500 == 0 {
					if _, err := r.Gauge("later", "h", Labels{"i": strconv.Itoa(i), "j": strconv.Itoa(j)}); err != nil {
						t.Error(err)
					}
				}
			}
		})
	}
	ended := make(chan struct{})
	for range 2 {
		scraping.Go(func() {
			last := 0.0
			for more := true; more; {
				select {
				case <-ended:
					more = false
				default:
				}
				text, _ := r.AppendText(nil)
				values, err := Parse(text)
				if err != nil {
					t.Error(err)
					return
				}
				if values["c_total"] < last {
					t.Errorf("the counter fell from %v to %v", last, values["c_total"])
				}
				last = values["c_total"]
			}
		})
	}
	counting.Wait()
	close(ended)
	scraping.Wait()
	_, values := scrape(t, r)
	if values["c_total"] != 3*n || values["g"] != 3*n || values["h_seconds_count"] != 3*n || values[`later{i="2",j="4500"}`] != 0 {
		t.Errorf("at the end: %v, %v, %v", values["c_total"], values["g"], values["h_seconds_count"])
	}
	if _, ok := values[`later{i="2",j="4500"}`]; !ok || values[refusedName] != 0 {
		t.Errorf("what was registered late is missing, or %v samples were refused", values[refusedName])
	}
}

// FuzzLabels: whatever stands in help and labels, the exposition is well formed
// and its reader gets the same labels.
func FuzzLabels(f *testing.F) {
	f.Add("help", "a", "value", "other")
	f.Add("\n\\", "_9", "\"}\n\\", "\xff{")
	f.Add(" ", "le", "", "=\"")
	f.Fuzz(func(t *testing.T, help, label, one, two string) {
		r := NewRegistry()
		if _, err := r.Gauge("g", help, Labels{label: one, "z": two}); err != nil {
			if !errors.Is(err, sealfs.ErrInvalid) {
				t.Fatal(err)
			}
			return
		}
		if err := r.Collect([]Desc{{"h", help, KindGauge, []string{"y"}}}, func(s *Sink) { s.Emit("h", 1, one); s.Emit("h", 2, two) }); err != nil {
			t.Fatal(err)
		}
		text, values := scrape(t, r)
		want := 3.0
		if one := strings.ToValidUTF8(one, "\uFFFD"); one != strings.ToValidUTF8(two, "\uFFFD") {
			want = 4
		}
		if float64(len(values)) != want || !utf8.ValidString(text) {
			t.Fatalf("%d series, want %v:\n%s", len(values), want, text)
		}
		if label == "z" {
			return
		}
		if key := "g{" + renderLabels([]string{label, "z"}, []string{one, two}) + "}"; !contains(values, key) {
			t.Fatalf("%s is not in\n%s", key, text)
		}
	})
}

func contains(values map[string]float64, series string) bool {
	_, ok := values[series]
	return ok
}

func BenchmarkCounter(b *testing.B) {
	c := must[*Counter](b)(NewRegistry().Counter("c_total", "h", nil))
	b.ReportAllocs()
	for b.Loop() {
		c.Inc()
	}
}

func BenchmarkScrape(b *testing.B) {
	r := example(b)
	if err := Process(r); err != nil {
		b.Fatal(err)
	}
	var text []byte
	b.ReportAllocs()
	for b.Loop() {
		text, _ = r.AppendText(text[:0])
	}
	b.SetBytes(int64(len(text)))
}
