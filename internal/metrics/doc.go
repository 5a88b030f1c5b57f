// Package metrics counts what a process does and tells it in the text format of
// Prometheus, version 0.0.4.
//
// A Registry holds families: a name, a help text and a kind, each with series
// that differ in their labels. The labels of a series are resolved when it is
// registered, so counting is one atomic addition on a Counter, Gauge or
// Histogram that the caller holds. Numbers that somebody else counts already
// are read when they are asked for: one by Func, many, or as many as there
// happen to be (of each store, of each volume), by Collect.
//
// Whoever registers a faulty name learns it as an error then. What a collector
// emits wrongly, during a scrape, is left out of the answer and counted in
// sealfs_metrics_refused_samples_total, so that an answer is always well
// formed; tests hold that counter to zero and the answer to Lint.
//
// Counters and histograms are single atomics and not divided among cores: what
// is counted takes microseconds, so additions seldom meet. Alone, an observation
// takes 4.5 ns; it takes 8 when one of several copies is chosen at random, and
// 13 when the copy comes from a pool of the core's own.
package metrics
