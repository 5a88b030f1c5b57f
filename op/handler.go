package op

import "context"

// A Handler answers requests: a server does, and so does a transport to one.
//
// Do fills rep, which the caller has reset; the outcome of the operation is
// rep.Code. The error is for what kept the request from being answered at all
// (ErrUnavailable, ErrTimeout, ErrInterrupted, ErrClosed). Do must not keep req,
// its Data or rep after it returned. For Read and the other answers with Data,
// Do appends to rep.Data and uses its room, so a caller that wants no copy gives
// a buffer of length 0 and sufficient capacity.
//
// Cancelling ctx gives up waiting; whether a change happened is then unknown.
type Handler interface {
	Do(ctx context.Context, req *Request, rep *Reply) error
}
