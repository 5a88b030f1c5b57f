package metrics

import (
	"errors"
	"maps"
	"strings"
	"testing"

	"sealfs"
)

// histogramText is a family that Lint accepts.
const histogramText = `# HELP h Help.
# TYPE h histogram
h_bucket{a="b",le="0.5"} 1
h_bucket{a="b",le="+Inf"} 2
h_sum{a="b"} 1.5
h_count{a="b"} 2
h_bucket{a="c",le="+Inf"} 0
h_sum{a="c"} 0
h_count{a="c"} 0
`

func TestParse(t *testing.T) {
	const text = histogramText + `# HELP x_total Quoted "help", \\ and \n.
# TYPE x_total counter
x_total 1e+20
x_total{z="1",a="}\" ,\\\n"} 5
# HELP y Gauge.
# TYPE y gauge
y{a=""} NaN
y{le="1"} -Inf
`
	// A bound is no label of a gauge.
	if _, err := Parse([]byte(text)); !errors.Is(err, sealfs.ErrInvalid) {
		t.Errorf("a gauge with a bound: %v", err)
	}
	got, err := Parse([]byte(strings.Replace(text, `{le="1"} -Inf`, " -2.5", 1)))
	if err != nil {
		t.Fatal(err)
	}
	if v := got[`y{a=""}`]; v == v {
		t.Errorf("NaN has become %v", v)
	}
	delete(got, `y{a=""}`)
	want := map[string]float64{
		`h_bucket{a="b",le="0.5"}`: 1, `h_bucket{a="b",le="+Inf"}`: 2, `h_sum{a="b"}`: 1.5, `h_count{a="b"}`: 2,
		`h_bucket{a="c",le="+Inf"}`: 0, `h_sum{a="c"}`: 0, `h_count{a="c"}`: 0,
		"x_total": 1e20, `x_total{a="}\" ,\\\n",z="1"}`: 5, "y": -2.5,
	}
	if !maps.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

// TestLintRefuses changes an accepted text in one place.
func TestLintRefuses(t *testing.T) {
	const good = histogramText + "# HELP x_total Help.\n# TYPE x_total counter\nx_total 1\nx_total{a=\"b\",c=\"d\"} 2\n"
	if err := Lint([]byte(good)); err != nil {
		t.Fatal(err)
	}
	for what, c := range map[string][2]string{ // what is replaced, by what
		"nothing":                     {good, ""},
		"only an end of line":         {good, "\n"},
		"no end of the last line":     {"\"d\"} 2\n", "\"d\"} 2"},
		"empty line":                  {"x_total 1\n", "x_total 1\n\n"},
		"carriage return":             {"x_total 1\n", "x_total 1\r\n"},
		"comment":                     {"x_total 1\n", "x_total 1\n# EOF\n"},
		"not UTF-8":                   {`a="b",c`, "a=\"\xff\",c"},
		"time":                        {"x_total 1\n", "x_total 1 1700000000000\n"},
		"two blanks":                  {"x_total 1\n", "x_total  1\n"},
		"no value":                    {"x_total 1\n", "x_total\n"},
		"no blank":                    {`} 2`, `}2`},
		"hexadecimal":                 {"x_total 1\n", "x_total 0x1p-2\n"},
		"word":                        {"x_total 1\n", "x_total Inf\n"},
		"two points":                  {"x_total 1\n", "x_total 1.2.3\n"},
		"too large":                   {"x_total 1\n", "x_total 1e999\n"},
		"negative counter":            {"x_total 1\n", "x_total -1\n"},
		"counter NaN":                 {"x_total 1\n", "x_total NaN\n"},
		"no help":                     {"# HELP x_total Help.\n", ""},
		"empty help":                  {"# HELP x_total Help.\n", "# HELP x_total \n"},
		"help escapes nothing":        {"# HELP x_total Help.\n", "# HELP x_total \\t\n"},
		"help of another":             {"# HELP x_total", "# HELP y_total"},
		"help twice":                  {"# HELP x_total Help.\n", "# HELP x_total Help.\n# HELP x_total Help.\n"},
		"no type":                     {"# TYPE x_total counter\n", ""},
		"type twice":                  {"# TYPE x_total counter\n", "# TYPE x_total counter\n# TYPE x_total counter\n"},
		"type before help":            {"# HELP x_total Help.\n# TYPE x_total counter\n", "# TYPE x_total counter\n# HELP x_total Help.\n"},
		"unknown type":                {"x_total counter", "x_total summary"},
		"type among samples":          {"x_total 1\n", "x_total 1\n# TYPE x_total counter\n"},
		"family without samples":      {"x_total 1\nx_total{a=\"b\",c=\"d\"} 2\n", ""},
		"family in two parts":         {"x_total 1\n", "x_total 1\n# HELP y Y.\n# TYPE y gauge\ny 1\n# HELP x_total Help.\n# TYPE x_total counter\n"},
		"another's sample":            {"x_total 1\n", "y_total 1\n"},
		"sample with a suffix":        {"x_total 1\n", "x_total_count 1\n"},
		"series twice":                {"x_total 1\n", "x_total 1\nx_total 1\n"},
		"series twice in other order": {"x_total 1\n", "x_total{c=\"d\",a=\"b\"} 1\n"},
		"name of a metric":            {"x_total 1\n", "1x_total 1\n"},
		"empty braces":                {"x_total 1\n", "x_total{} 1\n"},
		"comma at the end":            {`c="d"}`, `c="d",}`},
		"no comma":                    {`b",c`, `b"c`},
		"no quote":                    {`c="d"}`, `c=d}`},
		"labels do not end":           {`c="d"} 2`, `c="d"`},
		"value does not end":          {`c="d"} 2`, `c="d\"} 2`},
		"backslash at the end":        {`c="d"} 2`, `c="d\`},
		"label escapes nothing":       {`c="d"}`, `c="\t"}`},
		"name of a label":             {`c="d"}`, `c:c="d"}`},
		"label twice":                 {`c="d"}`, `a="d"}`},
		"bound of a counter":          {`c="d"}`, `le="1"}`},
		"empty bound":                 {`,le="0.5"`, `,le=""`},
		"no bound":                    {`,le="0.5"`, ``},
		"bound NaN":                   {`le="0.5"`, `le="NaN"`},
		"bound is no number":          {`le="0.5"`, `le="x"`},
		"bounds fall":                 {`le="+Inf"} 2`, `le="0.4"} 2`},
		"bound twice":                 {`le="+Inf"} 2`, `le="0.50"} 2`},
		"counts fall":                 {`le="0.5"} 1`, `le="0.5"} 3`},
		"count is a fraction":         {`le="0.5"} 1`, `le="0.5"} 1.5`},
		"negative bucket":             {`le="0.5"} 1`, `le="0.5"} -1`},
		"no +Inf":                     {"h_bucket{a=\"b\",le=\"+Inf\"} 2\n", ""},
		"sum before +Inf":             {"h_bucket{a=\"b\",le=\"+Inf\"} 2\nh_sum{a=\"b\"} 1.5\n", "h_sum{a=\"b\"} 1.5\nh_bucket{a=\"b\",le=\"+Inf\"} 2\n"},
		"no sum":                      {"h_sum{a=\"b\"} 1.5\n", ""},
		"sum NaN":                     {"h_sum{a=\"b\"} 1.5\n", "h_sum{a=\"b\"} NaN\n"},
		"no count":                    {"h_count{a=\"b\"} 2\n", ""},
		"no count at the end":         {"h_count{a=\"c\"} 0\n", ""},
		"count differs":               {"h_count{a=\"b\"} 2\n", "h_count{a=\"b\"} 3\n"},
		"count before sum":            {"h_sum{a=\"c\"} 0\nh_count{a=\"c\"} 0\n", "h_count{a=\"c\"} 0\nh_sum{a=\"c\"} 0\n"},
		"only a count":                {"h_bucket{a=\"c\",le=\"+Inf\"} 0\nh_sum{a=\"c\"} 0\n", ""},
		"number of a histogram":       {"h_sum{a=\"c\"}", "h{a=\"c\"}"},
		"other part of a histogram":   {"h_sum{a=\"c\"}", "h_max{a=\"c\"}"},
		"sum with a bound":            {"h_sum{a=\"c\"}", "h_sum{a=\"c\",le=\"1\"}"},
	} {
		text := strings.Replace(good, c[0], c[1], 1)
		if text == good {
			t.Fatalf("%s changes nothing", what)
		}
		if err := Lint([]byte(text)); !errors.Is(err, sealfs.ErrInvalid) {
			t.Errorf("%s: %v", what, err)
		}
	}
}

// FuzzLint: Lint ends without a panic; what it accepts has no line that could
// stand there twice, and none that could be cut short.
func FuzzLint(f *testing.F) {
	f.Add([]byte(histogramText))
	text, _ := scrape(f, example(f))
	f.Add([]byte(text))
	f.Add([]byte("# HELP x_total \\\\ \\n\n# TYPE x_total counter\nx_total{a=\"\\\"\",b=\"\"} 1e+20\n"))
	f.Fuzz(func(t *testing.T, text []byte) {
		values, err := Parse(text)
		if err != nil {
			if !errors.Is(err, sealfs.ErrInvalid) || values != nil {
				t.Fatal(values, err)
			}
			return
		}
		lines := strings.SplitAfter(string(text), "\n")
		samples := 0
		for _, l := range lines {
			if l != "" && !strings.HasPrefix(l, "#") {
				samples++
			}
		}
		if samples != len(values) {
			t.Fatalf("%d samples gave %d values", samples, len(values))
		}
		for i := range min(len(lines)-1, 50) {
			twice := strings.Join(lines[:i+1], "") + strings.Join(lines[i:], "")
			if Lint([]byte(twice)) == nil {
				t.Fatalf("line %d may stand twice in\n%s", i+1, text)
			}
		}
		if Lint(text[:len(text)-1]) == nil {
			t.Fatalf("the end of the last line may be missing in\n%s", text)
		}
	})
}
