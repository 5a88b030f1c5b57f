package node

import (
	"fmt"
	"math"
	"strconv"

	"sealfs"
)

// Size is a number of bytes as people write it: 512, 64K, 4G or 4GiB. Units are
// powers of 1024. "4GB" is refused, since half of the world reads it as 10^9.
type Size int64

var units = "KMGTPE"

// ParseSize reads a size. It is strict: no sign, no fraction, no blank.
func ParseSize(s string) (Size, error) {
	digits := 0
	for digits < len(s) && '0' <= s[digits] && s[digits] <= '9' {
		digits++
	}
	unit, shift := s[digits:], 0
	if unit != "" {
		for i := range len(units) {
			letter := units[i : i+1]
			if unit == letter || unit == letter+"iB" || i < 5 && unit == string(letter[0]|0x20) {
				shift = 10 * (i + 1)
			}
		}
	}
	n, err := strconv.ParseUint(s[:digits], 10, 63)
	switch {
	case digits == 0 || err == nil && shift == 0 && unit != "":
		return 0, fault(sealfs.ErrInvalid, "%q is not a size: write a whole number of bytes, or one with K, M, G, T or P behind it, such as 512M or 4G", s)
	case err != nil || n > math.MaxInt64>>shift:
		return 0, fault(sealfs.ErrInvalid, "size %q is larger than 8 EiB", s)
	}
	return Size(n << shift), nil
}

// String returns the shortest text that ParseSize reads as exactly n.
func (n Size) String() string {
	v, i := int64(n), -1
	for v != 0 && v&1023 == 0 && i < len(units)-1 {
		v >>= 10
		i++
	}
	if i < 0 {
		return strconv.FormatInt(v, 10)
	}
	return strconv.FormatInt(v, 10) + units[i:i+1]
}

// About returns n for a table: three digits at least, rounded to nearest.
func (n Size) About() string {
	v, i := float64(n), -1
	for v >= 1024 && i < len(units)-1 {
		v /= 1024
		i++
	}
	if i < 0 {
		return strconv.FormatInt(int64(n), 10)
	}
	if v < 10 {
		return fmt.Sprintf("%.2f%c", v, units[i])
	}
	return fmt.Sprintf("%.1f%c", v, units[i])
}

// MarshalText lets a size stand in YAML.
func (n Size) MarshalText() ([]byte, error) { return []byte(n.String()), nil }

// UnmarshalText reads the forms that ParseSize knows.
func (n *Size) UnmarshalText(b []byte) (err error) {
	*n, err = ParseSize(string(b))
	return err
}

// MarshalJSON makes a size a number of bytes in JSON.
func (n Size) MarshalJSON() ([]byte, error) { return strconv.AppendInt(nil, int64(n), 10), nil }

// UnmarshalJSON reads what MarshalJSON writes.
func (n *Size) UnmarshalJSON(b []byte) error {
	v, err := strconv.ParseInt(string(b), 10, 64)
	*n = Size(v)
	return err
}

// Set and Type make a Size a command-line flag.
func (n *Size) Set(s string) error { return n.UnmarshalText([]byte(s)) }

// Type implements pflag.Value.
func (n *Size) Type() string { return "size" }
