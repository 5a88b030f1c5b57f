package node

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"sealfs"
)

// Where processes listen unless told otherwise.
const (
	DefaultManagerAddr = "127.0.0.1:8081"
	DefaultServerAddr  = "127.0.0.1:8085"
)

// Listen says where a process is reached.
type Listen struct {
	Addr      string // host:port to listen at; port 0 takes a free one
	Advertise string // host:port that others shall use; empty: where it listens
	// Insecure allows addresses beyond this machine: as long as nobody has to
	// prove who he is, whoever reaches a listener may do everything.
	Insecure bool
}

// open listens, and returns the address to advertise. SO_REUSEADDR is set, as Go
// does everywhere: a process that is started again finds its address free.
func (l Listen) open(ctx context.Context) (net.Listener, string, error) {
	host, err := l.check("--listen", l.Addr)
	if err != nil {
		return nil, "", err
	}
	if l.Advertise != "" {
		if _, err := l.check("--advertise", l.Advertise); err != nil {
			return nil, "", err
		}
		if _, port, _ := net.SplitHostPort(l.Advertise); port == "0" {
			return nil, "", fault(sealfs.ErrInvalid, "--advertise %s: port 0 cannot be reached, name the port", l.Advertise)
		}
	} else if ip, err := netip.ParseAddr(host); host == "" || err == nil && ip.IsUnspecified() {
		return nil, "", fault(sealfs.ErrInvalid, "--listen %s is every address of this machine: say with --advertise HOST:PORT under which one others reach it", l.Addr)
	}
	ln, err := new(net.ListenConfig).Listen(ctx, "tcp", l.Addr)
	if errors.Is(err, unix.EADDRINUSE) {
		return nil, "", fault(sealfs.ErrBusy, "--listen %s: another process listens there: stop it, or take another port", l.Addr)
	}
	if err != nil {
		return nil, "", fault(sealfs.ErrInvalid, "--listen %s: %v", l.Addr, errors.Unwrap(err))
	}
	if l.Advertise != "" {
		return ln, l.Advertise, nil
	}
	_, port, _ := net.SplitHostPort(ln.Addr().String())
	return ln, net.JoinHostPort(host, port), nil
}

// check refuses an address that makes no sense, or is reached from elsewhere.
func (l Listen) check(flag, addr string) (host string, err error) {
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		return "", fault(sealfs.ErrInvalid, "%s %q is not HOST:PORT, such as 127.0.0.1:8081", flag, addr)
	}
	if n, err := strconv.ParseUint(port, 10, 16); err != nil || strconv.FormatUint(n, 10) != port {
		return "", fault(sealfs.ErrInvalid, "%s %q: %q is not a port, a number from 1 to 65535", flag, addr, port)
	}
	ip, err := netip.ParseAddr(host)
	loopback := host == "localhost" || err == nil && ip.IsLoopback()
	if !loopback && !l.Insecure {
		return "", fault(sealfs.ErrPerm, "%s %s can be reached from other machines, and there is no authentication yet: whoever reaches it may read and change everything; use 127.0.0.1, or add --insecure-listen if the network is closed to others", flag, addr)
	}
	return host, nil
}

// ParseAddrs reads a list of addresses, separated by commas, such as that of
// the managers. Each must be HOST:PORT.
func ParseAddrs(what, list string) ([]string, error) {
	var addrs []string
	for a := range strings.SplitSeq(list, ",") {
		if a = strings.TrimSpace(a); a == "" {
			continue
		}
		if _, _, err := net.SplitHostPort(a); err != nil {
			return nil, fault(sealfs.ErrInvalid, "%s: %q is not HOST:PORT, such as 127.0.0.1:8081", what, a)
		}
		addrs = append(addrs, a)
	}
	if len(addrs) == 0 {
		return nil, fault(sealfs.ErrInvalid, "%s: no address: name the managers as HOST:PORT, separated by commas", what)
	}
	return addrs, nil
}

// Notify tells systemd how this process is, if systemd has asked to be told: see
// sd_notify(3). State is such as READY=1.
func Notify(state string) error {
	path := os.Getenv("NOTIFY_SOCKET")
	if path == "" {
		return nil
	}
	// A path that begins with @ is an abstract one, as the net package knows them.
	c, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		return err
	}
	_, err = c.Write([]byte(state))
	return errors.Join(err, c.Close())
}
