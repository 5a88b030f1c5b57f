package node

import (
	"errors"
	"math"
	"testing"

	"sealfs"
)

func TestParseSize(t *testing.T) {
	for s, want := range map[string]Size{
		"0": 0, "1": 1, "512": 512, "4K": 4096, "4k": 4096, "64KiB": 65536, "512M": 512 << 20, "4G": 4 << 30, "4g": 4 << 30,
		"1TiB": 1 << 40, "2P": 2 << 50, "7E": 7 << 60, "9223372036854775807": math.MaxInt64,
	} {
		got, err := ParseSize(s)
		if err != nil || got != want {
			t.Errorf("ParseSize(%q) = %d, %v, want %d", s, got, err, want)
		}
	}
	for _, s := range []string{"", "G", "-1", "+1", "1.5G", "4GB", "4 G", " 4G", "4G ", "4iB", "4Kib", "0x10", "8E", "9223372036854775808", "1e9", "4GG"} {
		if got, err := ParseSize(s); !errors.Is(err, sealfs.ErrInvalid) {
			t.Errorf("ParseSize(%q) = %d, %v, want ErrInvalid", s, got, err)
		}
	}
}

func TestSizeString(t *testing.T) {
	for n, want := range map[Size]string{0: "0", 1: "1", 1000: "1000", 1024: "1K", 1536: "1536", 4 << 30: "4G", 5 << 60: "5E", 1<<40 + 1: "1099511627777"} {
		if got := n.String(); got != want {
			t.Errorf("Size(%d).String() = %q, want %q", int64(n), got, want)
		}
		if back, err := ParseSize(n.String()); err != nil || back != n {
			t.Errorf("%d became %d, %v", int64(n), int64(back), err)
		}
	}
	for n, want := range map[Size]string{0: "0", 1023: "1023", 1536: "1.50K", 4 << 30: "4.00G", 100 << 20: "100.0M"} {
		if got := n.About(); got != want {
			t.Errorf("Size(%d).About() = %q, want %q", int64(n), got, want)
		}
	}
}
