package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"
)

// network is a bridge in a network namespace of its own, with one namespace for
// each process around it. Nothing of it is in the namespace of the test, and mounts
// are not separated: what a daemon mounts is seen by all.
type network struct {
	prefix string // of the namespaces' names
	bridge string // the namespace with the bridge
	admin  string // the namespace of commands
	spaces []string
	lose   []string // a discipline of a queue that loses everything
}

// losing are disciplines of tc that lose everything; kernels differ in what they have.
var losing = [][]string{{"netem", "loss", "100%"}, {"blackhole"}, {"pfifo", "limit", "0"}}

// within returns a command line that runs in a network namespace; "" is the test's.
// Unlike `ip netns exec`, nsenter leaves the mounts alone.
func within(space string, args []string) []string {
	if space == "" {
		return args
	}
	return append([]string{"nsenter", "--net=/run/netns/" + space}, args...)
}

// newNetwork makes a network, or skips the test where that cannot be. The network
// belongs to whom it is given, who removes it.
func newNetwork(t *testing.T) *network {
	t.Helper()
	if testing.Short() {
		t.Skip("skipped: real mounts take too long for -short")
	}
	if os.Geteuid() != 0 {
		t.Skip("skipped: only root can make network namespaces")
	}
	for _, tool := range []string{"ip", "tc", "nsenter"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("skipped: the network cannot be made without %s", tool)
		}
	}
	n := &network{prefix: fmt.Sprintf("sealfs-%d-", os.Getpid())}
	n.bridge, n.admin = n.prefix+"bridge", n.prefix+"admin"
	if err := command("ip", "netns", "add", n.bridge); err != nil {
		t.Skipf("skipped: no network namespaces here: %v", err)
	}
	n.spaces = append(n.spaces, n.bridge)
	ok := false
	defer func() {
		if !ok {
			n.remove()
		}
	}()
	if err := command("ip", "-n", n.bridge, "link", "add", "name", "bridge", "type", "bridge"); err != nil {
		t.Skipf("skipped: no bridges here: %v", err)
	}
	n.must(t, "ip", "-n", n.bridge, "link", "set", "dev", "bridge", "up")
	n.join(t, "admin")
	for _, q := range losing {
		if command("tc", append([]string{"-n", n.admin, "qdisc", "replace", "dev", "eth0", "root"}, q...)...) == nil {
			n.must(t, "tc", "-n", n.admin, "qdisc", "del", "dev", "eth0", "root")
			n.lose = q
			break
		}
	}
	if n.lose == nil {
		t.Skipf("skipped: tc has none of %v here, so nothing can be cut off", losing)
	}
	ok = true
	return n
}

// command runs a program and returns what it said when it fails.
func command(name string, args ...string) error {
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		return fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, strings.TrimSpace(string(out)))
	}
	return nil
}

func (n *network) must(t testing.TB, name string, args ...string) {
	t.Helper()
	if err := command(name, args...); err != nil {
		t.Fatal(err)
	}
}

// join makes a namespace that is connected to the bridge. It returns its name
// and its address.
func (n *network) join(t testing.TB, name string) (space, host string) {
	t.Helper()
	space, host = n.prefix+name, fmt.Sprintf("10.77.0.%d", len(n.spaces))
	n.must(t, "ip", "netns", "add", space)
	n.spaces = append(n.spaces, space)
	n.must(t, "ip", "-n", n.bridge, "link", "add", "name", n.port(space), "type", "veth", "peer", "name", "eth0", "netns", space)
	n.must(t, "ip", "-n", n.bridge, "link", "set", "dev", n.port(space), "master", "bridge", "up")
	n.must(t, "ip", "-n", space, "addr", "add", host+"/24", "dev", "eth0")
	n.must(t, "ip", "-n", space, "link", "set", "dev", "eth0", "up")
	n.must(t, "ip", "-n", space, "link", "set", "dev", "lo", "up")
	return space, host
}

// port returns the name of the bridge's end of a namespace's link.
func (n *network) port(space string) string { return strings.TrimPrefix(space, n.prefix) }

// The directions of a cut.
const (
	cutFrom = 1 << iota // what the process sends is lost
	cutTo               // what is sent to it is lost
)

// cut loses, without a word to anybody, what a process sends or gets.
func (n *network) cut(t testing.TB, space string, ways int) {
	t.Helper()
	if ways&cutFrom != 0 {
		n.must(t, "tc", append([]string{"-n", space, "qdisc", "replace", "dev", "eth0", "root"}, n.lose...)...)
	}
	if ways&cutTo != 0 {
		n.must(t, "tc", append([]string{"-n", n.bridge, "qdisc", "replace", "dev", n.port(space), "root"}, n.lose...)...)
	}
}

// heal ends what cut did.
func (n *network) heal(t testing.TB, space string, ways int) {
	t.Helper()
	if ways&cutFrom != 0 {
		n.must(t, "tc", "-n", space, "qdisc", "del", "dev", "eth0", "root")
	}
	if ways&cutTo != 0 {
		n.must(t, "tc", "-n", n.bridge, "qdisc", "del", "dev", n.port(space), "root")
	}
}

// remove removes the namespaces, and all links with them.
func (n *network) remove() {
	for _, space := range n.spaces {
		if err := command("ip", "netns", "del", space); err != nil {
			fmt.Fprintln(os.Stderr, err)
		}
	}
	n.spaces = nil
}
