//go:build !race

package wire

// raceEnabled is false: see the other file.
const raceEnabled = false
