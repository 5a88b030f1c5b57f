package metrics

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"sealfs"
)

// Lint checks an exposition, more strictly than a scraper would: that every
// family has its help, its type and its samples together and in this order;
// that no series comes twice; that counters are not negative; that each series
// of a histogram has its buckets in ascending order, counts that do not fall, a
// last bucket +Inf, then its sum, then a count that equals that of +Inf. It
// refuses what a Registry never writes: times, other comments, empty lines, an
// exposition without samples. The error wraps ErrInvalid and names the line.
func Lint(text []byte) error {
	_, err := Parse(text)
	return err
}

// Parse checks an exposition as Lint does and returns its values by series. A
// series is written as Registry does: its name and, if there are labels, these
// in braces in the order of their names, such as x{a="b",c="d"}; a bucket's le
// comes last.
func Parse(text []byte) (map[string]float64, error) {
	p := parser{values: make(map[string]float64), families: make(map[string]bool)}
	number := 0
	for len(text) > 0 {
		number++
		line, rest, ended := bytes.Cut(text, []byte("\n"))
		text = rest
		err := errors.New("the line has no end")
		if ended {
			err = p.line(string(line))
		}
		if err != nil {
			return nil, fmt.Errorf("line %d of the metrics: %w: %w", number, err, sealfs.ErrInvalid)
		}
	}
	if err := p.endFamily(); err != nil {
		return nil, fmt.Errorf("end of the metrics: %w: %w", err, sealfs.ErrInvalid)
	}
	if len(p.values) == 0 {
		return nil, fmt.Errorf("there are no metrics: %w", sealfs.ErrInvalid)
	}
	return p.values, nil
}

// parser reads an exposition line by line.
type parser struct {
	values   map[string]float64 // series → value
	families map[string]bool    // those that have begun

	// The family that is being read.
	name    string
	kind    Kind // 0 before its type is known
	samples int
	hist    partial
}

// partial is a series of a histogram that is being read; without labels and
// buckets it is none.
type partial struct {
	labels  string
	buckets int
	le      float64 // of the last bucket
	n       float64 // in it
	summed  bool
}

func (p *parser) line(s string) error {
	if !utf8.ValidString(s) {
		return errors.New("it is not UTF-8")
	}
	if help, ok := strings.CutPrefix(s, "# HELP "); ok {
		return p.help(help)
	}
	if kind, ok := strings.CutPrefix(s, "# TYPE "); ok {
		return p.types(kind)
	}
	return p.sample(s)
}

func (p *parser) help(s string) error {
	if err := p.endFamily(); err != nil {
		return err
	}
	name, help, _ := strings.Cut(s, " ")
	if !validName(name, true) || help == "" {
		return fmt.Errorf("%q is not a name and a help", s)
	}
	if _, err := unescape(help, false); err != nil {
		return err
	}
	if p.families[name] {
		return fmt.Errorf("the family %s comes again", name)
	}
	p.families[name] = true
	p.name, p.kind, p.samples = name, 0, 0
	return nil
}

func (p *parser) types(s string) error {
	name, kind, _ := strings.Cut(s, " ")
	if name != p.name || p.kind != 0 {
		return fmt.Errorf("the type of %q does not follow its help", name)
	}
	for k := KindCounter; k <= KindHistogram; k++ {
		if kind == k.String() {
			p.kind = k
			return nil
		}
	}
	return fmt.Errorf("%q is not a type", kind)
}

// endFamily checks that the family that is being read, if any, is whole.
func (p *parser) endFamily() error {
	if p.name != "" && p.samples == 0 {
		return fmt.Errorf("the family %s has no samples", p.name)
	}
	if p.hist.buckets > 0 {
		return fmt.Errorf("the histogram %s{%s} ends before its count", p.name, p.hist.labels)
	}
	return nil
}

func (p *parser) sample(s string) error {
	name, labels, le, rest, err := parseSeries(s)
	if err != nil {
		return err
	}
	v, err := parseValue(rest)
	if err != nil {
		return err
	}
	if p.kind == 0 {
		return fmt.Errorf("the sample of %s stands before a type", name)
	}
	series := name
	if labels != "" || le != "" {
		series = string(appendSample(nil, name, "", labels, le, 0))
		series = strings.TrimSuffix(series, " 0\n")
	}
	if _, twice := p.values[series]; twice {
		return fmt.Errorf("%s comes again", series)
	}
	p.values[series] = v
	p.samples++
	suffix, ours := strings.CutPrefix(name, p.name)
	switch {
	case !ours, (suffix != "") != (p.kind == KindHistogram):
		return fmt.Errorf("%s stands among the samples of the %v %s", name, p.kind, p.name)
	case le != "" && suffix != "_bucket":
		return fmt.Errorf("%s is no bucket but has a bound", name)
	case p.kind == KindCounter && !(v >= 0):
		return fmt.Errorf("the counter %s is %v", series, v)
	case p.kind == KindHistogram:
		return p.histogram(suffix, labels, le, v)
	}
	return nil
}

// histogram takes a sample of a histogram: the buckets of one series, its sum,
// its count.
func (p *parser) histogram(suffix, labels, le string, v float64) error {
	h := &p.hist
	what := fmt.Sprintf("%s%s{%s}", p.name, suffix, labels)
	if h.buckets > 0 && h.labels != labels || h.buckets == 0 && suffix != "_bucket" {
		return fmt.Errorf("%s stands where the histogram %s{%s} should go on", what, p.name, h.labels)
	}
	if suffix != "_sum" && !(v >= 0 && v == math.Trunc(v) && !math.IsInf(v, 0)) {
		return fmt.Errorf("%s counts %v", what, v)
	}
	switch suffix {
	case "_bucket":
		bound, err := parseValue(le)
		if err != nil || math.IsNaN(bound) {
			return fmt.Errorf("%s has the bound %q", what, le)
		}
		if h.buckets > 0 && (bound <= h.le || v < h.n || h.summed) {
			return fmt.Errorf("%s: %v up to %v follows %v up to %v", what, v, bound, h.n, h.le)
		}
		h.labels, h.le, h.n = labels, bound, v
		h.buckets++
	case "_sum":
		if h.summed || !math.IsInf(h.le, 1) || math.IsNaN(v) {
			return fmt.Errorf("%s is %v and follows the bucket up to %v", what, v, h.le)
		}
		h.summed = true
	case "_count":
		if !h.summed || v != h.n {
			return fmt.Errorf("%s is %v, of %v in all buckets, or comes before the sum", what, v, h.n)
		}
		*h = partial{}
	default:
		return fmt.Errorf("%s is no part of a histogram", what)
	}
	return nil
}

// parseSeries reads a name and, in braces, labels. It returns those but le in
// the form of Registry, and what follows the blank.
func parseSeries(s string) (name, labels, le, rest string, err error) {
	end := strings.IndexAny(s, "{ ")
	if end < 0 || !validName(s[:end], true) {
		return "", "", "", "", fmt.Errorf("%q does not begin with a name", s)
	}
	name, rest = s[:end], s[end:]
	var pairs [][2]string
	if rest[0] == '{' {
		if pairs, rest, err = parseLabels(rest[1:]); err != nil {
			return "", "", "", "", err
		}
	}
	rest, blank := strings.CutPrefix(rest, " ")
	if !blank {
		return "", "", "", "", fmt.Errorf("no blank stands between %s and its value", name)
	}
	slices.SortFunc(pairs, func(x, y [2]string) int { return cmp.Compare(x[0], y[0]) })
	var names, values []string
	for i, p := range pairs {
		switch {
		case i > 0 && p[0] == pairs[i-1][0]:
			return "", "", "", "", fmt.Errorf("%s has the label %s twice", name, p[0])
		case p[0] == "le" && p[1] == "":
			return "", "", "", "", fmt.Errorf("%s has an empty bound", name)
		case p[0] == "le":
			le = p[1]
		default:
			names, values = append(names, p[0]), append(values, p[1])
		}
	}
	return name, renderLabels(names, values), le, rest, nil
}

// parseLabels reads pairs up to the closing brace; there is at least one.
func parseLabels(s string) (pairs [][2]string, rest string, err error) {
	for {
		name, after, found := strings.Cut(s, `="`)
		if !found || !validName(name, false) {
			return nil, "", fmt.Errorf("%q does not begin with a label", s)
		}
		end := 0
		for end < len(after) && after[end] != '"' {
			if after[end] == '\\' {
				end++
			}
			end++
		}
		if end >= len(after) {
			return nil, "", fmt.Errorf("the value of %s does not end", name)
		}
		value, err := unescape(after[:end], true)
		if err != nil {
			return nil, "", err
		}
		pairs = append(pairs, [2]string{name, value})
		s = after[end+1:]
		if rest, closed := strings.CutPrefix(s, "}"); closed {
			return pairs, rest, nil
		}
		if s, found = strings.CutPrefix(s, ","); !found {
			return nil, "", fmt.Errorf("no comma follows the label %s", name)
		}
	}
}

// unescape undoes appendEscaped.
func unescape(s string, quoted bool) (string, error) {
	var b []byte
	for i := 0; i < len(s); i++ {
		if s[i] != '\\' {
			b = append(b, s[i])
			continue
		}
		i++
		switch {
		case i < len(s) && s[i] == '\\':
			b = append(b, '\\')
		case i < len(s) && s[i] == 'n':
			b = append(b, '\n')
		case i < len(s) && s[i] == '"' && quoted:
			b = append(b, '"')
		default:
			return "", fmt.Errorf("%q has a backslash that escapes nothing", s)
		}
	}
	return string(b), nil
}

// parseValue reads a decimal number, NaN, +Inf or -Inf.
func parseValue(s string) (float64, error) {
	switch s {
	case "NaN", "+Inf", "-Inf":
	default:
		// Go reads more than that: hexadecimals, underscores, words.
		if strings.Trim(s, "0123456789+-.e") != "" {
			return 0, fmt.Errorf("%q is not a number", s)
		}
	}
	v, err := strconv.ParseFloat(s, 64)
	if err != nil {
		return 0, fmt.Errorf("%q is not a number", s)
	}
	return v, nil
}
