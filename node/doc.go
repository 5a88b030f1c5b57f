// Package node is a process of SealFS on one machine: it puts manager, server,
// client and sockets together over a data directory, starts and ends processes,
// and answers what there is. The commands are thin shells around it.
//
// # The data directory
//
//	DIR/config.yaml      geometry, fixed when the directory is formatted, and options
//	                     that people may edit; see Config
//	DIR/lock             locked by the main process, holds its pid
//	DIR/pids/PID         one per process, locked while it lives: role, volume, mount
//	                     point. What has no lock was killed; its mount is cleared by the
//	                     next up or down
//	DIR/log/             sealfs.log of the main process, mount-PATH.log of each further
//	                     mount; rotated by size to .1, .2, ...
//	DIR/run/admin.sock   HTTP and JSON for the other commands; see admin.go
//	DIR/run/data.sock    wire's protocol for further mounts
//	DIR/manager/         the manager's Raft log and snapshots; see cluster
//	DIR/map              copy of the last cluster map, for those who ask while nothing runs
//	DIR/stores/0/        device.img and region of the store, both sparse: they take up
//	                     space as they fill. With --device they lie elsewhere
//	/dev/shm/sealfs-ID.ring
//	                     staging of store ID: what is not yet on its device. It outlives
//	                     a killed process, and is removed at a clean end. Where there is no
//	                     /dev/shm it lies beside the device
//
// DIR may be longer than the address of a socket. All of it is for the owner only.
// No TCP port is opened.
//
// # Processes
//
//	main   Up: lock → stale mounts → (format) → manager → server → sockets → mount
//	mount  Mount: session from admin.sock → data.sock → mount
//
// Close goes the same way back. A session lasts as long as the connection that
// asked for it; so a killed mount releases its locks at once, and a main process
// that ends takes its mounts along, after they have sent what they had.
//
// A process in the background is the program executed again, detached, with a
// pipe over which it says that it is ready or why not: see Background.
//
// # Locks
//
//	DIR/lock            one main process, or down, or destroy
//	  DIR/pids/PID      one process
//	    ring.lock       one process per store, whatever directory it found it in
//	Node.volumes        changes of volumes and sessions; taken before the manager's and
//	                    the server's own locks
package node
