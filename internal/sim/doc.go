// Package sim puts the plain parts of leases (lease.Table), exactly-once calls
// (txn.Calls), two-phase commit (txn.Coordinator) and the ends of sessions
// (fencing.Fences) into one simulated world: a manager whose leader changes, servers, and
// clients, with messages that get lost, doubled, late and out of order, connections that break,
// servers that die and start anew, and processes that stand still. One seed determines
// everything. Packages txn and lease have simulations of their own, which
// go deeper into each; here is what lies between: a restart and what clients believe, an end of a
// session and a late write under its lock, a transaction and the leases in its way.
package sim
