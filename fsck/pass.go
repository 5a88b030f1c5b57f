package fsck

import (
	"fmt"
	"io"
)

// pass is a step of the check. Passes run in the order of the table.
type pass struct {
	number int
	name   string
	after  []int // passes without a fatal problem, or this one is skipped
	run    func(*checker) error
}

var passes = []pass{
	{1, "superblocks", nil, (*checker).superblocks},
	{2, "region header", []int{1}, (*checker).regionHeader},
	{3, "log and segment table", []int{1, 2}, (*checker).log},
	{4, "pages of the region", []int{2, 3}, (*checker).tree},
	{5, "namespace", []int{4}, (*checker).records},
	{6, "extents against segments", []int{3, 5}, (*checker).segments},
	{7, "data", []int{6}, (*checker).data},
}

// run makes the passes from first to last, as far as their ground is firm.
func (c *checker) run(first, last int) error {
	out := c.o.Out
	if c.quiet {
		out = io.Discard
	}
	c.heading(out)
	for _, p := range passes[first-1 : last] {
		if p.number == 7 && c.o.NoData {
			continue
		}
		skip := 0
		for _, n := range p.after {
			if c.failed[n] {
				skip = n
			}
		}
		if skip != 0 {
			c.failed[p.number] = true
			c.rep.Skipped = append(c.rep.Skipped, p.name)
			fmt.Fprintf(out, "Pass %d: %s: skipped, since pass %d failed\n", p.number, p.name, skip)
			continue
		}
		fmt.Fprintf(out, "Pass %d: %s\n", p.number, p.name)
		if err := c.tick(p.number, 0, 0); err != nil {
			return err
		}
		before := c.fatal
		if err := p.run(c); err != nil {
			return err
		}
		c.failed[p.number] = c.fatal > before
	}
	return nil
}

// heading says which store is being judged, when there are several.
func (c *checker) heading(out io.Writer) {
	if !c.alone {
		fmt.Fprintf(out, "Store %s\n", c.rep.Device)
	}
}
