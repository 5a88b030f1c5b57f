// Package cluster is the manager: it knows which stores there are, who is
// alive, where every shard lies and which volumes exist. This knowledge is the
// cluster map ([Map]), an immutable value with a version; no file operation
// waits for the manager, it reads the latest map.
//
// The map is the state of a Raft state machine. The parts:
//
//	map.go       the map and its rules
//	state.go     the bytes of a map: snapshots, and what peers are sent
//	command.go   the bytes of a change: entries of the Raft log
//	fsm.go       (map, command) → (map, result): deterministic
//	logstore.go  the Raft log and votes on bbolt, each value with a checksum
//	boltcheck.go judge of the bbolt file, before bbolt trusts it
//	liveness.go  heartbeats → up, suspect, down
//	manager.go   all of it as one object, with one voter in this process
//
// The directory of a manager holds:
//
//	lock         flock'ed by the process that has it open, contains its pid
//	raft.db      bbolt: Raft log, term, vote, identity of this manager
//	snapshots/   the two latest snapshots of the map
//
// A change is acknowledged when its log entry is synced. After the first
// failure of the medium, or the first damaged byte, a manager changes nothing
// any more, neither votes nor leads, and says why: see [Manager.Failed].
package cluster
