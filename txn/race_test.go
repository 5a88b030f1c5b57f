//go:build race

package txn_test

// slower is by how much the race detector divides the number of seeds.
const slower = 10
