package wire

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"sync/atomic"
	"testing"
	"time"

	"sealfs"
	"sealfs/internal/enc"
	"sealfs/op"
)

// Peers that break the protocol, on purpose or because they are ill.

// peer is the raw side of a test: it reads and writes frames without rules.
type peer struct {
	t  testing.TB
	nc net.Conn
	in *inbox
}

func newPeer(t testing.TB, nc net.Conn) *peer {
	if err := nc.SetDeadline(time.Now().Add(patience)); err != nil {
		t.Error(err)
	}
	return &peer{t, nc, &inbox{nc: nc, n: new(counters), buf: make([]byte, inboxSize)}}
}

// next reads a frame with its payload; ok is false at the end of the connection.
func (p *peer) next() (h header, head, payload []byte, ok bool) {
	h, head, err := p.in.next()
	if err == nil {
		head = bytes.Clone(head)
		payload = make([]byte, h.payloadLen)
		err = p.in.payload(&h, payload)
	}
	return h, head, payload, err == nil
}

// write sends bytes; that the other side has hung up is no failure.
func (p *peer) write(b ...[]byte) { _, _ = p.nc.Write(bytes.Join(b, nil)) }

// wantGoaway reads until a goaway of the code comes.
func (p *peer) wantGoaway(code sealfs.Code) {
	p.t.Helper()
	for {
		h, head, _, ok := p.next()
		if !ok {
			p.t.Errorf("the connection ended without a goaway of code %q", code)
			return
		}
		if h.typ == typeGoaway {
			r, err := parseRefusal("server", head)
			if err != nil || r.code != code || r.text == "" {
				p.t.Errorf("goaway %v, %v, want code %q", r, err, code)
			}
			return
		}
	}
}

// hostileServer accepts connections, greets and then follows the script.
func hostileServer(t testing.TB, script func(p *peer)) (address string) {
	l := listen(t, "unix")
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			nc, err := l.Accept()
			if err != nil {
				return
			}
			p := newPeer(t, nc)
			if h, _, _, ok := p.next(); ok && h.typ == typeHello {
				p.write(frame(t, header{typ: typeHello}, &testHello, nil))
				script(p)
			}
			nc.Close()
		}
	}()
	t.Cleanup(func() {
		l.Close()
		<-done
	})
	return l.Addr().String()
}

// reply is the frame of a reply.
func reply(t testing.TB, id uint64, rep *op.Reply) []byte {
	return frame(t, header{typ: typeReply, id: id}, rep, rep.Data)
}

// TestHostileServer: whatever comes instead of the reply, the caller gets
// ErrUnavailable, soon, and without a crash.
func TestHostileServer(t *testing.T) {
	bad := func(change func(b []byte) []byte) func(p *peer, id uint64) {
		return func(p *peer, id uint64) {
			p.write(change(reply(p.t, id, &op.Reply{Data: []byte("0123456789")})))
		}
	}
	for name, answer := range map[string]func(p *peer, id uint64){
		"hangs up":        func(p *peer, id uint64) {},
		"cuts the header": bad(func(b []byte) []byte { return b[:20] }),
		"cuts the head":   bad(func(b []byte) []byte { return b[:headerSize+1] }),
		"cuts the data":   bad(func(b []byte) []byte { return b[:len(b)-1] }),
		"cuts long data": func(p *peer, id uint64) {
			p.write(reply(p.t, id, &op.Reply{Data: make([]byte, 200000)})[:150000])
		},
		"breaks the head":   bad(func(b []byte) []byte { b[headerSize] ^= 1; return b }),
		"breaks the data":   bad(func(b []byte) []byte { b[len(b)-1] ^= 1; return b }),
		"sends garbage":     func(p *peer, id uint64) { p.write(bytes.Repeat([]byte("garbage!"), 1000)) },
		"is a later layout": bad(func(b []byte) []byte { b[4] = 2; copy(b[44:], enc.AppendU32(nil, enc.CRC(0, b[:44]))); return b }),
		"declares huge lengths": func(p *peer, id uint64) {
			b := make([]byte, headerSize)
			(&header{typ: typeReply, id: id, headLen: 1<<32 - 1, payloadLen: 1<<32 - 1}).put(b)
			p.write(b)
		},
		"answers another id":  func(p *peer, id uint64) { p.write(reply(p.t, id+1000, new(op.Reply))) },
		"answers with a pong": func(p *peer, id uint64) { p.write(frame(p.t, header{typ: typePong, id: id}, nil, nil)) },
		"asks a request": func(p *peer, id uint64) {
			p.write(frame(p.t, header{typ: typeRequest, id: id}, &op.Request{Type: op.Sync}, nil))
		},
		"says hello again":     func(p *peer, id uint64) { p.write(frame(p.t, header{typ: typeHello}, &testHello, nil)) },
		"sends more than room": func(p *peer, id uint64) { p.write(reply(p.t, id, &op.Reply{Data: make([]byte, 101)})) },
		"sends no op.Reply":    func(p *peer, id uint64) { p.write(frame(p.t, header{typ: typeReply, id: id}, rawHead("x"), nil)) },
		"fails without a code": func(p *peer, id uint64) {
			p.write(frame(p.t, header{typ: typeReply, id: id, flags: flagFailed}, &refusal{text: "?"}, nil))
		},
		"fails with data": func(p *peer, id uint64) {
			p.write(frame(p.t, header{typ: typeReply, id: id, flags: flagFailed}, &refusal{code: sealfs.ErrIO}, []byte("x")))
		},
		"malformed goaway": func(p *peer, id uint64) { p.write(frame(p.t, header{typ: typeGoaway}, rawHead("x"), nil)) },
		"goaway": func(p *peer, id uint64) {
			p.write(frame(p.t, header{typ: typeGoaway}, &refusal{code: sealfs.ErrBusy, text: "no"}, nil))
		},
	} {
		t.Run(name, func(t *testing.T) {
			address := hostileServer(t, func(p *peer) {
				h, _, _, ok := p.next()
				if !ok {
					return
				}
				// A second caller waits while the first one's reply goes wrong.
				if _, _, _, ok = p.next(); ok {
					answer(p, h.id)
				}
			})
			c := dial(t, "unix", address, Options{})
			first := start(context.Background(), c, &op.Request{Type: op.Read, Len: 100}, &op.Reply{Data: make([]byte, 0, 100)})
			second := start(context.Background(), c, &op.Request{Type: op.Read, Len: 100}, new(op.Reply))
			wantCode(t, within(t, "the first call", first), sealfs.ErrUnavailable, address)
			wantCode(t, within(t, "the second call", second), sealfs.ErrUnavailable, address)
			wantCode(t, c.Ping(t.Context()), sealfs.ErrUnavailable)
		})
	}
}

// TestDoubledFrames: a frame that comes twice ends the connection, whoever
// waits meanwhile, and nobody gets the answer of another.
func TestDoubledFrames(t *testing.T) {
	answer := func(p *peer, h *header, req *op.Request) []byte {
		switch {
		case h.typ == typePing:
			return frame(p.t, header{typ: typePong, id: h.id}, nil, nil)
		case req.Type == op.Statfs:
			return frame(p.t, header{typ: typeReply, id: h.id, flags: flagFailed}, &refusal{code: sealfs.ErrIO, text: "no"}, nil)
		}
		return reply(p.t, h.id, &op.Reply{Off: req.Off, Data: pattern(make([]byte, req.Len), req.Off)})
	}
	for name, c := range map[string]struct {
		req    op.Request // zero: a ping
		double func(p *peer, h *header, frame []byte)
		says   string
	}{
		"reply":         {op.Request{Type: op.Getattr}, func(p *peer, h *header, b []byte) { p.write(b, b) }, "not asked for"},
		"failed reply":  {op.Request{Type: op.Statfs}, func(p *peer, h *header, b []byte) { p.write(b, b) }, "not asked for"},
		"pong":          {op.Request{}, func(p *peer, h *header, b []byte) { p.write(b, b) }, "not asked for"},
		"hello":         {op.Request{Type: op.Getattr}, func(p *peer, h *header, b []byte) { p.write(b, frame(p.t, header{typ: typeHello}, &testHello, nil)) }, "hello"},
		"long reply":    {op.Request{Type: op.Read, Len: 100000}, func(p *peer, h *header, b []byte) { p.write(b); p.write(b) }, "not asked for"},
		"header alone":  {op.Request{Type: op.Getattr}, func(p *peer, h *header, b []byte) { p.write(b, b[:headerSize]) }, "unavailable"},
		"pong as reply": {op.Request{}, func(p *peer, h *header, b []byte) { p.write(reply(p.t, h.id, new(op.Reply))) }, "not asked for"},
	} {
		t.Run(name, func(t *testing.T) {
			address := hostileServer(t, func(p *peer) {
				for first := true; ; first = false {
					h, head, _, ok := p.next()
					var req op.Request
					if !ok || h.typ == typeRequest && op.DecodeRequest(&req, head) != nil {
						return
					}
					if req.Type == op.WaitLock {
						continue // it waits all the time
					}
					if b := answer(p, &h, &req); first {
						p.write(b)
					} else {
						c.double(p, &h, b)
					}
				}
			})
			conn := dial(t, "unix", address, Options{})
			if err := conn.Do(t.Context(), &op.Request{Type: op.Read, Off: 7, Len: 9}, new(op.Reply)); err != nil {
				t.Fatal(err)
			}
			waits := start(context.Background(), conn, &op.Request{Type: op.WaitLock}, new(op.Reply))
			eventually(t, "the one that waits", func() bool { return conn.Stats().FramesOut == 3 })
			var err error
			for off := range uint64(3) {
				if c.req.Type == 0 {
					err = conn.Ping(t.Context())
				} else {
					req, rep := c.req, op.Reply{}
					req.Off = off
					if err = conn.Do(t.Context(), &req, &rep); err == nil && (rep.Off != off || len(rep.Data) != int(req.Len)) {
						t.Errorf("request %d got another one's answer: %+v", off, rep)
					}
				}
				if errors.Is(err, sealfs.ErrUnavailable) {
					break
				}
			}
			wantCode(t, within(t, "the one that waits", waits), sealfs.ErrUnavailable, c.says, address)
			wantCode(t, conn.Ping(t.Context()), sealfs.ErrUnavailable, c.says)
		})
	}
}

// TestReorderedReplies: answers may come in any order and in any cut of bytes.
func TestReorderedReplies(t *testing.T) {
	const n = 50
	address := hostileServer(t, func(p *peer) {
		var all [][]byte
		for range n {
			h, head, _, ok := p.next()
			var req op.Request
			if !ok || op.DecodeRequest(&req, head) != nil {
				t.Error("a request did not come")
				return
			}
			all = append(all, reply(t, h.id, &op.Reply{Off: req.Off, Data: pattern(make([]byte, req.Len), req.Off)}))
		}
		rng := rand.New(rand.NewPCG(3, 4))
		rng.Shuffle(n, func(i, j int) { all[i], all[j] = all[j], all[i] })
		for stream := bytes.Join(all, frame(t, header{typ: typePong}, nil, nil)); len(stream) > 0; {
			k := min(len(stream), 1+rng.IntN(9000))
			p.write(stream[:k])
			stream = stream[k:]
		}
		p.next() // until the client hangs up
	})
	c := dial(t, "unix", address, Options{})
	var answers [n]<-chan error
	var replies [n]op.Reply
	for i := range n {
		answers[i] = start(context.Background(), c, &op.Request{Type: op.Read, Off: uint64(i + 1), Len: uint64(i * i * 10)}, &replies[i])
	}
	for i := range n {
		if err := within(t, "an answer", answers[i]); err != nil {
			t.Fatal(err)
		}
		if r := &replies[i]; r.Off != uint64(i+1) || !bytes.Equal(r.Data, pattern(make([]byte, i*i*10), r.Off)) {
			t.Errorf("request %d got another one's answer", i)
		}
	}
}

// TestEarlyAnswer: a server that answers before it has read the payload does not
// make the call return while the payload is being sent.
func TestEarlyAnswer(t *testing.T) {
	begun, both, hold := make(chan struct{}), make(chan struct{}), make(chan struct{})
	address := hostileServer(t, func(p *peer) {
		h, _, err := p.in.next() // not its payload
		if err != nil {
			return
		}
		close(begun)
		<-both
		p.write(reply(t, h.id, new(op.Reply)))
		<-hold
		_, _ = io.Copy(io.Discard, p.nc)
	})
	c := dial(t, "unix", address, Options{})
	// Another caller reads the early answer while the writer is stuck.
	reading := start(context.Background(), c, &op.Request{Type: op.Write, Data: make([]byte, sealfs.IOMax)}, new(op.Reply))
	within(t, "the write to begin", begun)
	other := start(context.Background(), c, &op.Request{Type: op.Getattr}, new(op.Reply))
	close(both)
	eventually(t, "the early answer to be read", func() bool { return c.Stats().FramesIn == 2 })
	select {
	case err := <-reading:
		t.Errorf("the call returned (%v) although its payload is in use", err)
	default:
	}
	close(hold)
	if err := within(t, "the call", reading); err != nil {
		t.Error(err)
	}
	c.Close()
	wantCode(t, within(t, "the other call", other), sealfs.ErrClosed)
}

// TestNoHandshake: what answers like no SealFS server is named as such, in time.
func TestNoHandshake(t *testing.T) {
	for name, c := range map[string]struct {
		greeting []byte
		code     sealfs.Code
	}{
		"silence":       {nil, sealfs.ErrUnavailable},
		"http":          {[]byte("HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain\r\nConnection: close\r\n\r\n"), sealfs.ErrCorrupt},
		"pong":          {frame(t, header{typ: typePong}, nil, nil), sealfs.ErrInvalid},
		"bad hello":     {frame(t, header{typ: typeHello}, rawHead("hello"), nil), sealfs.ErrInvalid},
		"other cluster": {frame(t, header{typ: typeHello}, &hello{2, 2, 0, 0, sealfs.UUID{3}, "x"}, nil), sealfs.ErrInvalid},
		"later version": {frame(t, header{typ: typeHello}, &hello{3, 7, 0, 0, testCluster, "x"}, nil), sealfs.ErrVersion},
		"feature":       {frame(t, header{typ: typeHello}, &hello{2, 2, 1 << 40, 1 << 40, testCluster, "x"}, nil), sealfs.ErrVersion},
	} {
		t.Run(name, func(t *testing.T) {
			l := listen(t, "unix")
			end := make(chan struct{})
			go func() {
				defer close(end)
				nc, err := l.Accept()
				if err != nil {
					return
				}
				defer nc.Close()
				p := newPeer(t, nc)
				p.next()
				p.write(c.greeting)
				_, _ = io.Copy(io.Discard, nc)
			}()
			timeout := 50 * time.Millisecond
			if c.greeting != nil {
				timeout = patience
			}
			_, err := Dial(t.Context(), "unix", l.Addr().String(), Options{Cluster: testCluster, HandshakeTimeout: timeout})
			wantCode(t, err, c.code, l.Addr().String())
			within(t, "the client to hang up", end)
		})
	}
}

// TestDeadServer: a server that says nothing, and one that reads nothing, are
// given up, however idle or busy the client is.
func TestDeadServer(t *testing.T) {
	o := Options{Keepalive: 20 * time.Millisecond, Timeout: 60 * time.Millisecond}
	t.Run("silent and idle", func(t *testing.T) {
		address := hostileServer(t, func(p *peer) { _, _ = io.Copy(io.Discard, p.nc) })
		c := dial(t, "unix", address, o)
		within(t, "the connection to be given up", c.Done())
		wantCode(t, c.Err(), sealfs.ErrUnavailable, "said nothing", address)
	})
	t.Run("silent and waited for", func(t *testing.T) {
		address := hostileServer(t, func(p *peer) { _, _ = io.Copy(io.Discard, p.nc) })
		c := dial(t, "unix", address, o)
		answer := start(context.Background(), c, &op.Request{Type: op.WaitLock}, new(op.Reply))
		wantCode(t, within(t, "the call", answer), sealfs.ErrUnavailable, "said nothing")
	})
	t.Run("never reads", func(t *testing.T) {
		over := make(chan struct{})
		address := hostileServer(t, func(p *peer) {
			// It says that it lives all the time, but it does not read.
			for {
				select {
				case <-over:
					return
				case <-time.After(o.Keepalive / 4):
					p.write(frame(t, header{typ: typePong}, nil, nil))
				}
			}
		})
		c := dial(t, "unix", address, o)
		var answers []<-chan error
		for range 4 {
			answers = append(answers, start(context.Background(), c, &op.Request{Type: op.Write, Data: make([]byte, sealfs.IOMax)}, new(op.Reply)))
		}
		for _, answer := range answers {
			wantCode(t, within(t, "the call", answer), sealfs.ErrUnavailable, "read nothing")
		}
		close(over)
	})
	t.Run("alive", func(t *testing.T) {
		s := serve(t, "unix", echo, ServerOptions{})
		c := s.dial(t, Options{Keepalive: 4 * time.Millisecond, Timeout: patience})
		ctx, cancel := context.WithCancel(context.Background())
		answer := start(ctx, c, &op.Request{Type: op.WaitLock}, new(op.Reply))
		eventually(t, "many pings", func() bool { return s.Stats().FramesIn > 10 })
		if err := c.Err(); err != nil {
			t.Error(err)
		}
		cancel()
		wantCode(t, within(t, "the call", answer), sealfs.ErrInterrupted)
	})
}

// hostileClient connects to s and greets.
func hostileClient(t testing.TB, s *testServer) *peer {
	nc, err := net.Dial(s.network, s.address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { nc.Close() })
	p := newPeer(t, nc)
	p.write(frame(t, header{typ: typeHello}, &testHello, nil))
	if h, _, _, ok := p.next(); !ok || h.typ != typeHello {
		t.Fatalf("no hello but %v", h.typ)
	}
	return p
}

// TestHostileClient: what breaks the protocol is dismissed with a sentence, and
// nobody else suffers.
func TestHostileClient(t *testing.T) {
	s := serve(t, "unix", echo, ServerOptions{})
	good := s.dial(t, Options{})
	request := func(id uint64, typ op.Type, data []byte) []byte {
		return frame(t, header{typ: typeRequest, id: id}, &op.Request{Type: typ, Ino: 5}, data)
	}
	for name, c := range map[string]struct {
		bytes []byte
		code  sealfs.Code
	}{
		"garbage":                    {bytes.Repeat([]byte("GET / HTTP/1.1\r\n"), 10), sealfs.ErrCorrupt},
		"broken head":                {append(request(1, op.Getattr, nil)[:headerSize], make([]byte, 100)...), sealfs.ErrCorrupt},
		"reply":                      {reply(t, 1, new(op.Reply)), sealfs.ErrInvalid},
		"second hello":               {frame(t, header{typ: typeHello}, &testHello, nil), sealfs.ErrInvalid},
		"payload of a getattr":       {request(1, op.Getattr, []byte("x")), sealfs.ErrInvalid},
		"broken payload":             {append(request(1, op.Write, []byte("xy"))[:headerSize+7], "zzzz"...), sealfs.ErrCorrupt},
		"two waiters of the same id": {bytes.Repeat(request(1, op.WaitLock, nil), 2), sealfs.ErrInvalid},
		"later layout": {func() []byte {
			b := frame(t, header{typ: typePing, id: 1}, nil, nil)
			b[4] = 9
			copy(b[44:], enc.AppendU32(nil, enc.CRC(0, b[:44])))
			return b
		}(), sealfs.ErrVersion},
		"huge head": {func() []byte {
			b := make([]byte, headerSize)
			(&header{typ: typeRequest, id: 1, headLen: 1<<32 - 1}).put(b)
			return b
		}(), sealfs.ErrInvalid},
	} {
		t.Run(name, func(t *testing.T) {
			p := hostileClient(t, s)
			p.write(c.bytes)
			p.wantGoaway(c.code)
			check(t, good)
		})
	}
	t.Run("malformed request", func(t *testing.T) { // but a whole frame: only it is refused
		p := hostileClient(t, s)
		p.write(frame(t, header{typ: typeRequest, id: 1}, rawHead("\xffxxxx"), make([]byte, 10000)), request(2, op.Getattr, nil))
		for range 2 {
			h, head, _, ok := p.next()
			if !ok {
				t.Fatal("the connection ended")
			}
			if h.id == 1 {
				if r, err := parseRefusal("", head); h.flags != flagFailed || err != nil || r.code != sealfs.ErrInvalid {
					t.Errorf("%+v: %v, %v", h, r, err)
				}
			} else if h.id != 2 || h.flags != 0 {
				t.Errorf("%+v", h)
			}
		}
	})
	t.Run("doubled requests", func(t *testing.T) { // are the client's own trouble
		p := hostileClient(t, s)
		p.write(bytes.Repeat(request(1, op.Getattr, nil), 5))
		for range 5 {
			if h, _, _, ok := p.next(); !ok || h.id != 1 || h.typ != typeReply {
				t.Fatalf("%+v", h)
			}
		}
	})
	t.Run("cancels early and twice", func(t *testing.T) { // as if the frames had changed places
		p := hostileClient(t, s)
		cancel := frame(t, header{typ: typeCancel, id: 1}, nil, nil)
		p.write(cancel, request(1, op.WaitLock, nil), cancel, cancel, cancel, request(1, op.Getattr, nil), cancel)
		for range 2 {
			if h, _, _, ok := p.next(); !ok || h.id != 1 || h.typ != typeReply {
				t.Fatalf("%+v", h)
			}
		}
		check(t, good)
	})
	t.Run("request before hello", func(t *testing.T) {
		nc, err := net.Dial(s.network, s.address)
		if err != nil {
			t.Fatal(err)
		}
		defer nc.Close()
		p := newPeer(t, nc)
		p.write(request(1, op.Getattr, nil), frame(t, header{typ: typeHello}, &testHello, nil))
		p.wantGoaway(sealfs.ErrInvalid)
		check(t, good)
	})
	t.Run("cut anywhere", func(t *testing.T) {
		whole := bytes.Join([][]byte{request(1, op.Getattr, nil), request(2, op.Write, make([]byte, 600)), request(3, op.WaitLock, nil)}, nil)
		for n := 0; n < len(whole); n += 1 + n/16 {
			p := hostileClient(t, s)
			p.write(whole[:n])
			p.nc.Close()
		}
		check(t, good)
	})
	t.Run("byte by byte", func(t *testing.T) {
		p := hostileClient(t, s)
		for _, b := range request(9, op.Write, make([]byte, 100)) {
			p.write([]byte{b})
		}
		if h, _, _, ok := p.next(); !ok || h.id != 9 || h.typ != typeReply {
			t.Errorf("%+v", h)
		}
	})
	t.Run("goaway", func(t *testing.T) {
		p := hostileClient(t, s)
		p.write(frame(t, header{typ: typeGoaway}, &refusal{code: sealfs.ErrClosed, text: "bye"}, nil))
		if _, _, _, ok := p.next(); ok {
			t.Error("something came after the client's goaway")
		}
	})
	t.Run("cancel of nothing", func(t *testing.T) {
		p := hostileClient(t, s)
		p.write(frame(t, header{typ: typeCancel, id: 77}, nil, nil), frame(t, header{typ: typePing, id: 78}, nil, nil))
		if h, _, _, ok := p.next(); !ok || h.typ != typePong || h.id != 78 {
			t.Errorf("%+v", h)
		}
	})
}

// TestLostClient: when a client goes, its handlers hear of it.
func TestLostClient(t *testing.T) {
	begun, ended := make(chan struct{}), make(chan struct{})
	s := serve(t, "unix", func(ctx context.Context, req *op.Request, rep *op.Reply) error {
		begun <- struct{}{}
		<-ctx.Done()
		ended <- struct{}{}
		return ctx.Err()
	}, ServerOptions{})
	for _, typ := range []op.Type{op.WaitLock, op.Sync, op.Getattr} {
		p := hostileClient(t, s)
		p.write(frame(t, header{typ: typeRequest, id: 1}, &op.Request{Type: typ}, nil))
		within(t, "the request", begun)
		p.nc.Close()
		within(t, "its end", ended)
	}
}

// TestDeadClient: clients that say nothing, speak without ever finishing, or do
// not read, are dropped, and what they held is free again.
func TestDeadClient(t *testing.T) {
	var calls atomic.Int64
	s := serve(t, "unix", func(ctx context.Context, req *op.Request, rep *op.Reply) error {
		calls.Add(1)
		return echo(ctx, req, rep)
	}, ServerOptions{Timeout: 100 * time.Millisecond, HandshakeTimeout: 100 * time.Millisecond, MaxInflightPerConn: 8, MaxInflightBytes: 32 << 20})
	gone := func(p *peer) {
		t.Helper()
		for {
			if _, _, _, ok := p.next(); !ok {
				break
			}
		}
		eventually(t, "the connection to be forgotten", func() bool {
			s.Server.mu.Lock()
			defer s.Server.mu.Unlock()
			return len(s.conns) == 0
		})
	}
	t.Run("no hello", func(t *testing.T) {
		nc, err := net.Dial("unix", s.address)
		if err != nil {
			t.Fatal(err)
		}
		defer nc.Close()
		gone(newPeer(t, nc))
	})
	t.Run("silent", func(t *testing.T) { gone(hostileClient(t, s)) })
	t.Run("half a payload", func(t *testing.T) {
		p := hostileClient(t, s)
		p.write(frame(t, header{typ: typeRequest, id: 1}, &op.Request{Type: op.Write, Ino: 1}, make([]byte, sealfs.IOMax))[:500000])
		gone(p)
	})
	t.Run("never reads", func(t *testing.T) {
		p := hostileClient(t, s)
		calls.Store(0)
		want := frame(t, header{typ: typeRequest, id: 1}, &op.Request{Type: op.Read, Ino: 1, Len: 1 << 20}, nil)
		sent := make(chan error, 1)
		go func() {
			for {
				if _, err := p.nc.Write(want); err != nil {
					sent <- err
					return
				}
			}
		}()
		err := within(t, "the server to hang up", sent)
		if ne, ok := errors.AsType[net.Error](err); ok && ne.Timeout() {
			t.Error("the server kept the connection")
		}
		if n := calls.Load(); n > 40 {
			t.Errorf("%d requests were run for a client that does not read", n)
		}
		p.nc.Close()
		gone(p)
	})
}

// FuzzServer sends any bytes to a server; it must live on and end clean.
func FuzzServer(f *testing.F) {
	f.Add(frame(f, header{typ: typeRequest, id: 1}, &op.Request{Type: op.Write, Ino: 5}, []byte("data")))
	f.Add(frame(f, header{typ: typeRequest, id: 1}, &op.Request{Type: op.WaitLock, Ino: 5}, nil))
	f.Add([]byte("garbage"))
	s := serve(f, "unix", func(ctx context.Context, req *op.Request, rep *op.Reply) error {
		req.Len = min(req.Len, 1000)
		return echo(ctx, req, rep)
	}, ServerOptions{})
	f.Fuzz(func(t *testing.T, b []byte) {
		// Checksums are put right, or nothing would ever get past them.
		for at := 0; len(b)-at >= headerSize; {
			h := b[at:]
			head := int(min(uint64(le32(h[16:])), uint64(len(h)-headerSize)))
			payload := int(min(uint64(le32(h[20:])), uint64(len(h)-headerSize-head)))
			copy(h[24:], enc.AppendU32(nil, enc.CRC(0, h[headerSize:headerSize+head])))
			copy(h[28:], enc.AppendU32(nil, enc.CRC(0, h[headerSize+head:headerSize+head+payload])))
			copy(h[44:], enc.AppendU32(nil, enc.CRC(0, h[:44])))
			at += headerSize + head + payload
		}
		p := hostileClient(t, s)
		p.write(b)
		if err := p.nc.(*net.UnixConn).CloseWrite(); err != nil {
			return
		}
		for {
			if _, _, _, ok := p.next(); !ok {
				break
			}
		}
		p.nc.Close()
	})
}

func le32(b []byte) uint32 { in := enc.Reader{B: b}; return in.U32() }
