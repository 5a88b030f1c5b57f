//go:build !race

package txn_test

const slower = 1
