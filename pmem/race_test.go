//go:build race

package pmem

const raceEnabled = true

// scale shortens loops that the race detector makes slow.
func scale(n int) int { return n / 4 }
