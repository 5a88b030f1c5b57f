// Package router sends each request to the server that answers for its shard.
//
// A Router is an op.Handler. The cluster map says in which store a shard lies
// and at which address that store's server listens. A store of this process is
// called directly; to any other server the router keeps connections (package
// wire), which it makes when they are first needed.
//
// # Servers
//
// A server is an address; several stores may share one. All its connections are
// made together, are used together and end together: a link. Requests are spread over the
// connections of a link by their shard. Since a process that listens at an
// address is one process, everything that goes over one link reaches the same
// life of the server. Options.Register is called for each link before anything
// else goes over it, so that a server which was started anew knows what a
// session holds before it gets the session's next request.
//
// # Failure
//
// What keeps a request from being answered is an error that wraps
// sealfs.ErrUnavailable and names the store and its server: no primary, no address, no
// connection, or a link that broke with the request under way. Such a request
// may have happened or not; who sent it with a session and a sequence may send
// it again with the same ones. Nothing is repeated here, but for a request that the server
// refused as stale.
//
// One goroutine connects to a server while all who need it wait, each bounded
// by its context. After a failure the server is taken to be away for a while
// (back-off), in which requests to it fail at once.
package router
