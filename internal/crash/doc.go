// Package crash cuts the power of stores at every write and flush, in every way in
// which the media could survive it, and judges what comes back. It is a package
// of tests:
//
//	world     stores of one server on simulated media, with a clock and latencies of
//	          their own: the same seed gives the same run (world_test.go)
//	script    sequences of operations, in lives that end with a power cut (script_test.go)
//	model     what may be found after a cut: the states that internal/oracle went
//	          through, from what was synced to what had begun (model_test.go)
//	cut       the moments of a life, and the subsets of what was pending (cut_test.go)
//	verdict   fsck before recovery, recovery, comparison, fsck afterwards, and a second
//	          cut within the recovery (verdict_test.go)
//	region    the same when the regions are lost with the power (region_test.go)
//	campaign  runs sequences over seeds and processes, replays one state (campaign_test.go)
//	mutants   one-line sabotages of the source, each of which must be found (mutants_test.go)
//
// `go test ./internal/crash` judges a sample; `make crash` everything and the mutants.
package crash
