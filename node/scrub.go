package node

import (
	"context"
	"fmt"
	"net/http"
	"time"

	"sealfs/lsfs"
	"sealfs/server"
)

// What a process with stores adds to its admin socket:
//
//	GET  /v1/scrub    [server.ScrubReport], with all findings
//	POST /v1/scrub    ScrubRequest → [server.ScrubReport]

// ScrubRequest asks for a scrub, or its end.
type ScrubRequest struct {
	Verb    string `json:"verb"`            // start, stop or status
	Store   string `json:"store,omitempty"` // id or device, "" for all stores of the process
	Rate    Size   `json:"rate,omitempty"`  // bytes a second at most, 0: no limit
	Restart bool   `json:"restart,omitempty"`
}

// scrub registers what has to do with scrubs.
func (a *api) scrub(srv *server.Server) {
	a.get("GET /v1/scrub", func(*http.Request) (any, error) { return srv.Scrub(server.ScrubStatus, "", lsfs.ScrubOptions{}) })
	a.get("POST /v1/scrub", func(r *http.Request) (any, error) {
		var q ScrubRequest
		if err := readBody(r, &q); err != nil {
			return nil, err
		}
		return srv.Scrub(q.Verb, q.Store, lsfs.ScrubOptions{Rate: int64(q.Rate), Restart: q.Restart})
	})
}

// Scrub asks the process that serves the directory's stores, whichever role it has.
func (d Dir) Scrub(ctx context.Context, q ScrubRequest) (list []server.ScrubReport, err error) {
	// The main process of `sealfs up` holds the locks of all roles.
	if !d.Runs(RoleMain) && d.Runs(RoleServer) {
		d = d.as(RoleServer)
	}
	a := d.caller()
	defer a.Close()
	err = a.call(ctx, http.MethodPost, "/v1/scrub", q, &list)
	return list, err
}

// DescribeScrub says in words how the scrubs of a store are.
func DescribeScrub(s *lsfs.ScrubStatus) (text string) {
	damages := func(r *lsfs.ScrubRound) string {
		switch r.Damages {
		case 0:
			return "no damage"
		case 1:
			return "1 damaged place"
		}
		return fmt.Sprintf("%d damaged places", r.Damages)
	}
	switch {
	case s.State == lsfs.ScrubRunning:
		text = fmt.Sprintf("running, %.0f %% of %s done", 100*scrubDone(s.Round), Size(s.Round.Total).About())
		if s.Rate > 0 {
			text += fmt.Sprintf(" at up to %s/s", Size(s.Rate).About())
		}
		text += ", " + damages(s.Round)
	case s.State == lsfs.ScrubStopped:
		text = fmt.Sprintf("stopped, %.0f %% of %s done, %s", 100*scrubDone(s.Round), Size(s.Round.Total).About(), damages(s.Round))
	case s.Last == nil:
		text = "none since the start"
	}
	if s.Last != nil {
		if text != "" {
			text += "; "
		}
		text += fmt.Sprintf("last ended %s: %s", s.Last.Ended.Format(time.DateTime), damages(s.Last))
	}
	if s.State == lsfs.ScrubIdle && !s.Next.IsZero() {
		text += "; next " + s.Next.Format(time.DateTime)
	}
	return text
}

// scrubDone returns how much of a round is done, from 0 to 1.
func scrubDone(r *lsfs.ScrubRound) float64 {
	if r == nil || r.Total <= 0 {
		return 0
	}
	return min(1, float64(r.Bytes)/float64(r.Total))
}

func scrubEnded(s *lsfs.ScrubStatus) float64 {
	if s.Last == nil {
		return 0
	}
	return float64(s.Last.Ended.UnixNano()) / 1e9
}
