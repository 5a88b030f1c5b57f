// Package node is a process of SealFS on one machine: it puts manager, server,
// client and sockets together over a data directory, starts and ends processes,
// and answers what there is. The commands are thin shells around it.
//
// # Roles
//
//	main     Up: manager, server and the first mount in one process
//	mount    Mount: a further mount of such a one, over its sockets
//	manager  StartManager: one of a cluster's managers; the leading one also makes
//	         and frees volumes
//	server   StartServer: the disks of one machine
//	daemon   StartDaemon: all mounts of one machine from clusters
//
// A process in the background is the program executed again, detached, with a
// pipe over which it says that it is ready or why it is not: see Background. What processes have in
// common is life; options of the roles are gathered by Gather, from flags, environment
// and YAML. Cluster administers a cluster by way of its managers.
//
// # The data directory
//
//	DIR/config.yaml      of up: geometry, fixed when the directory is formatted, and
//	                     options that people may edit; see Config
//	DIR/server.yaml      of a server: its identity and its disks
//	DIR/mounts.yaml      of a daemon: its mounts, and their sessions
//	DIR/lock             locked by the main process, holds its pid
//	DIR/run/ROLE.lock    the same of manager, server and daemon. The main process holds
//	                     those of manager and server too, for it is both
//	DIR/pids/PID         one per process, locked while it lives: role, volume, mount
//	                     point. What has no lock was killed; its mount is cleared by the
//	                     next up or down
//	DIR/log/             sealfs.log of the main process, ROLE.log of the others, mount-PATH.log
//	                     of each further mount; rotated by size to .1, .2, ...
//	DIR/run/admin.sock   HTTP and JSON for the other commands; ROLE.sock of manager,
//	                     server and daemon. See api.go
//	DIR/run/data.sock    wire's protocol for further mounts
//	DIR/manager/         the manager's Raft log and snapshots; see cluster
//	DIR/map              copy of the last cluster map, for those who ask while nothing runs
//	DIR/stores/N/        of up: device.img and region of each store, both sparse: they take
//	                     up space as they fill. With --device they lie elsewhere
//	DIR/regions/STORE    of a server: region of a disk, where nothing else was said
//	/dev/shm/sealfs-ID.ring
//	                     staging of store ID: what is not yet on its device. It outlives
//	                     a killed process, and is removed at a clean end. Where there is no
//	                     /dev/shm it lies beside the device
//
// DIR may be longer than the address of a socket. All of it is for the owner only.
// Up opens no TCP port. Managers and servers listen on loopback, unless they are
// told that everybody who reaches them may do everything.
//
// # Beginning and end
//
//	main     lock → stale mounts → (format) → manager → server → sockets → mount
//	mount    session from admin.sock → data.sock → mount
//	manager  lock → listen → manager (make, join or open) → volumes → admin socket
//	server   lock → listen → wait for a map → find disks → claim them by a heartbeat → open
//	         them → answer → a heartbeat each second
//	daemon   lock → for each mount that is remembered: clear it, end its session, mount it
//
// Close goes the same way back. A session of a further mount lasts as long as the
// connection that asked for it; so a killed mount releases its locks at once, and a main
// process that ends takes its mounts along, after they have sent what they had. A
// session of a daemon's mount is the managers': renewed while the daemon lives, and replaced
// when it has ended.
//
// A server waits for managers only when it starts. A disk is claimed before it is
// opened, so that of two processes with one identity only one writes to it; if it is
// refused later, the process ends.
//
// # Locks
//
//	DIR/lock            one main process, or down, or destroy
//	DIR/run/ROLE.lock   one process of the role
//	  DIR/pids/PID      one process
//	    ring.lock       one process per store, whatever directory it found it in
//	Node.volumes        changes of volumes and sessions; taken before the manager's and
//	                    the server's own locks
//	StoreServer.changing → StoreServer.mu
//	Daemon.writing → Daemon.mu → clusterMount.mu
//	clusterMount.work   begin and end of a mount → all of the daemon's
package node
