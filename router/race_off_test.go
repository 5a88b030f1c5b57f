//go:build !race

package router

// raceEnabled is false: see the other file.
const raceEnabled = false
