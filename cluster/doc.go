// Package cluster is the manager: it knows which stores there are, who is
// alive, where every shard lies, which volumes exist and which sessions live.
// The first four are the cluster map ([Map]), an immutable value with a version;
// no file operation waits for the manager, it reads the latest map.
//
// Map and sessions are the state of a Raft state machine, of one manager
// embedded in another process, or of 1, 3 or 5 in processes of their own. The
// parts, from the bytes upwards:
//
//	map.go        the map and its rules
//	session.go    clients' sessions: rules, and calls
//	state.go      the bytes of a map: snapshots, and what peers are sent
//	command.go    the bytes of a change: entries of the Raft log
//	fsm.go        (state, command) → (state, result): deterministic
//	logstore.go   the Raft log and votes on bbolt, each value with a checksum
//	boltcheck.go  judge of the bbolt file, before bbolt trusts it
//	directory.go  a manager's directory: lock, identity, whole or not
//	consensus.go  Raft itself
//	stream.go     connections between managers
//	guard.go      judge of what peers ask Raft
//	manager.go    all of it as one object
//	changes.go    calls that change the map
//	leader.go     who leads, and what a leader keeps in memory and commits
//	liveness.go   heartbeats → up, suspect, down
//	lease.go      which server may serve which store
//	beat.go       heartbeats of servers
//	members.go    managers join, move and leave
//	recover.go    one manager goes on without the others
//	api.go        the HTTP API
//	serve.go      one port for managers and HTTP
//	remote.go     a client of the API: whom to ask, and how often
//	calls.go      its calls
//
// The directory of a manager holds:
//
//	lock         flock'ed by the process that has it open, contains its pid
//	raft.db      bbolt: Raft log, term, vote, identity of this manager
//	snapshots/   the two latest snapshots of the state
//
// A change is acknowledged when its log entry is synced by a majority. After
// the first failure of the medium, or the first damaged byte, a manager changes
// nothing any more, neither votes nor leads, and says why: see
// [Manager.Failed]. The others go on.
package cluster
