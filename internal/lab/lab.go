// Package lab builds small networks from network namespaces and veth pairs: the hosts of the demo,
// the benchmarks and the tests.
//
// Close removes everything that a Lab made. Nothing outside its namespaces is touched.
package lab

import (
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// RunDir is where named namespaces are bound, as by ip-netns(8), so that `ip netns exec` and
// `nsenter --net=` find them.
const RunDir = "/run/netns"

// Host is one network namespace. Its methods may be called from any goroutine.
type Host struct {
	// Name is the namespace's name under RunDir.
	Name string

	ns netns.NsHandle
	nl *netlink.Handle
}

// NewHost makes a network namespace bound at RunDir/name, with its loopback
// interface up and IPv6 noise (router solicitations, duplicate address
// detection, MLD resends) off. The caller owns the host and must Close it.
func NewHost(name string) (_ *Host, err error) {
	if err := prepareRunDir(); err != nil {
		return nil, err
	}
	h := &Host{Name: name, ns: netns.None()}
	if err := inNewNamespace(func() error {
		return bindNamespace(h.Path())
	}); err != nil {
		return nil, fmt.Errorf("make namespace %s: %w", name, err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, h.Close())
		}
	}()
	if h.ns, err = netns.GetFromPath(h.Path()); err != nil {
		return nil, fmt.Errorf("open namespace %s: %w", name, err)
	}
	// Without a list the library opens every family that it knows, for which the kernel needs the
	// modules nfnetlink and xfrm_user.
	if h.nl, err = netlink.NewHandleAt(h.ns, unix.NETLINK_ROUTE); err != nil {
		return nil, fmt.Errorf("netlink in namespace %s: %w", name, err)
	}
	if err := h.Do(quiet); err != nil {
		return nil, fmt.Errorf("set up namespace %s: %w", name, err)
	}
	return h, nil
}

// Path returns the file that the namespace is bound to.
func (h *Host) Path() string { return filepath.Join(RunDir, h.Name) }

// FD returns the namespace's file descriptor, which the host keeps owning.
func (h *Host) FD() int { return int(h.ns) }

// Netlink returns a handle whose requests act inside the namespace. The host keeps owning it.
func (h *Host) Netlink() *netlink.Handle { return h.nl }

// Close unbinds the namespace. The kernel frees it, and its end of every veth pair, when the last
// socket and process in it are gone.
func (h *Host) Close() error { return errors.Join(h.Release(), Remove(h.Name)) }

// Release closes the host's descriptors only: the namespace stays bound, until Remove.
func (h *Host) Release() error {
	if h.nl != nil {
		h.nl.Close()
		h.nl = nil
	}
	if h.ns.IsOpen() {
		return h.ns.Close()
	}
	return nil
}

// Remove unbinds the named namespace, whoever made it. It is no error if there is none.
func Remove(name string) error {
	path := filepath.Join(RunDir, name)
	var errs []error
	if err := unix.Unmount(path, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
		errs = append(errs, fmt.Errorf("unmount %s: %w", path, err))
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// Do runs fn on a thread inside the namespace. Sockets opened by fn, and processes that it starts
// before it returns, stay in the namespace; goroutines that it starts do not. The thread is
// discarded afterwards, so a failure to leave the namespace cannot affect other goroutines.
func (h *Host) Do(fn func() error) error {
	return onOwnThread(func() error {
		if err := unix.Setns(h.FD(), unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("enter namespace %s: %w", h.Name, err)
		}
		return fn()
	})
}

// Start starts cmd inside the namespace.
func (h *Host) Start(cmd *exec.Cmd) error { return h.Do(cmd.Start) }

// Link returns the named interface of the namespace.
func (h *Host) Link(name string) (netlink.Link, error) {
	l, err := h.nl.LinkByName(name)
	if err != nil {
		return nil, fmt.Errorf("interface %s in %s: %w", name, h.Name, err)
	}
	return l, nil
}

// AddAddr gives the named interface an address in CIDR form.
func (h *Host) AddAddr(ifname, cidr string) error {
	l, err := h.Link(ifname)
	if err != nil {
		return err
	}
	addr, err := netlink.ParseAddr(cidr)
	if err != nil {
		return fmt.Errorf("address %q: %w", cidr, err)
	}
	if addr.IP.To4() == nil {
		addr.Flags |= unix.IFA_F_NODAD
	}
	if err := h.nl.AddrAdd(l, addr); err != nil {
		return fmt.Errorf("add %s to %s in %s: %w", cidr, ifname, h.Name, err)
	}
	return nil
}

// SetUp brings the named interface up or down.
func (h *Host) SetUp(ifname string, up bool) error {
	l, err := h.Link(ifname)
	if err != nil {
		return err
	}
	if up {
		return h.nl.LinkSetUp(l)
	}
	return h.nl.LinkSetDown(l)
}

// AddRoute adds a route to dst (CIDR) straight out of the named interface.
func (h *Host) AddRoute(dst, ifname string) error {
	l, err := h.Link(ifname)
	if err != nil {
		return err
	}
	ipnet, err := netlink.ParseIPNet(dst)
	if err != nil {
		return fmt.Errorf("route %q: %w", dst, err)
	}
	return h.nl.RouteReplace(&netlink.Route{LinkIndex: l.Attrs().Index, Dst: ipnet, Scope: netlink.SCOPE_LINK})
}

// End is one end of a veth pair.
type End struct {
	Host *Host
	// Name is the interface's name inside the host.
	Name string
	// Addrs are in CIDR form.
	Addrs []string
	// Queues is the number of receive and of transmit queues; 0 means 1.
	Queues int
	// Index is the interface's index; 0: chosen by the kernel.
	Index int
}

// Connect makes a veth pair between two hosts, and brings both ends up with transmit checksum
// offload off and generic receive offload on: veth delivers redirected frames only to a peer that
// has it, or an XDP program. MTU 0 leaves the kernel's default.
func Connect(a, b End, mtu int) error {
	qa, qb := max(a.Queues, 1), max(b.Queues, 1)
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.Index = a.Name, a.Index
	attrs.NumTxQueues, attrs.NumRxQueues = qa, qa
	attrs.MTU = mtu
	veth := &netlink.Veth{
		LinkAttrs: attrs,
		PeerName:  b.Name,
		PeerMTU:   uint32(mtu),
		// The peer needs as many receive queues as this end has transmit
		// queues, or it refuses XDP programs.
		PeerNumTxQueues: uint32(qb),
		PeerNumRxQueues: uint32(qb),
		PeerNamespace:   netlink.NsFd(b.Host.FD()),
	}
	if err := a.Host.nl.LinkAdd(veth); err != nil {
		return fmt.Errorf("connect %s/%s to %s/%s: %w", a.Host.Name, a.Name, b.Host.Name, b.Name, err)
	}
	for _, e := range []End{a, b} {
		if err := e.configure(); err != nil {
			return err
		}
	}
	return errors.Join(a.waitCarrier(), b.waitCarrier())
}

// carrierTimeout limits the wait for a link; the kernel's work queue takes some milliseconds, on a
// busy machine more.
const carrierTimeout = time.Minute

// waitCarrier waits until frames pass: until the kernel has seen the carrier, the interface drops
// outgoing frames.
func (e End) waitCarrier() error {
	for deadline := time.Now().Add(carrierTimeout); ; time.Sleep(time.Millisecond) {
		l, err := e.Host.Link(e.Name)
		if err != nil {
			return err
		}
		if l.Attrs().OperState == netlink.OperUp {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("interface %s in %s is %s, not up", e.Name, e.Host.Name, l.Attrs().OperState)
		}
	}
}

func (e End) configure() error {
	for _, cidr := range e.Addrs {
		if err := e.Host.AddAddr(e.Name, cidr); err != nil {
			return err
		}
	}
	if err := e.Host.Do(func() error {
		quietInterface(e.Name)
		// A veth would leave checksums incomplete, for a device that never completes them.
		return SetTxChecksum(e.Name, false)
	}); err != nil {
		return err
	}
	if err := e.addQueue(); err != nil {
		return err
	}
	if err := e.Host.SetUp(e.Name, true); err != nil {
		return err
	}
	// Only now: a veth that is down does not tell its peer that it can receive redirected frames.
	return e.Host.Do(func() error { return SetGRO(e.Name, true) })
}

// addQueue gives a veth a queue, which it lacks by default: with one, a sender that is faster than
// the receiver waits (since Linux 6.16) instead of losing packets.
func (e End) addQueue() error {
	l, err := e.Host.Link(e.Name)
	if err != nil {
		return err
	}
	queue := &netlink.GenericQdisc{
		QdiscAttrs: netlink.QdiscAttrs{LinkIndex: l.Attrs().Index, Parent: netlink.HANDLE_ROOT},
		QdiscType:  "pfifo",
	}
	if err := e.Host.nl.QdiscReplace(queue); err != nil {
		return fmt.Errorf("queue of %s in %s: %w", e.Name, e.Host.Name, err)
	}
	return nil
}

// UniqueName returns an unused namespace name: the prefix and random letters.
func UniqueName(prefix string) string {
	return prefix + "-" + strings.ToLower(rand.Text()[:8])
}

// onOwnThread runs fn on an operating system thread that is never used again: it stays locked, so
// the runtime ends it with its goroutine.
func onOwnThread(fn func() error) (err error) {
	var wg sync.WaitGroup
	wg.Add(1)
	go func() {
		defer wg.Done()
		runtime.LockOSThread()
		err = fn()
	}()
	wg.Wait()
	return err
}

func inNewNamespace(fn func() error) error {
	return onOwnThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("unshare: %w", err)
		}
		return fn()
	})
}

// prepareRunDir makes RunDir a shared mount point, as ip-netns(8) does when it makes the first
// namespace: doing so later would hide earlier ones. The lock is that of ip-netns(8), too: of
// processes that make their first namespaces at the same time one mounts, before any of them goes on.
func prepareRunDir() error {
	if err := os.MkdirAll(RunDir, 0o755); err != nil {
		return fmt.Errorf("make %s: %w", RunDir, err)
	}
	dir, err := os.Open(RunDir)
	if err != nil {
		return err
	}
	defer dir.Close()
	if err := unix.Flock(int(dir.Fd()), unix.LOCK_EX); err != nil {
		return fmt.Errorf("lock %s: %w", RunDir, err)
	}
	const share = unix.MS_SHARED | unix.MS_REC
	err = unix.Mount("", RunDir, "none", share, "")
	if errors.Is(err, unix.EINVAL) { // not a mount point yet
		err = unix.Mount(RunDir, RunDir, "none", unix.MS_BIND|unix.MS_REC, "")
		if err == nil {
			err = unix.Mount("", RunDir, "none", share, "")
		}
	}
	if err != nil {
		return fmt.Errorf("share %s: %w", RunDir, err)
	}
	return nil
}

func bindNamespace(path string) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_RDONLY, 0o444)
	if err != nil {
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	self := "/proc/self/task/" + strconv.Itoa(unix.Gettid()) + "/ns/net"
	if err := unix.Mount(self, path, "none", unix.MS_BIND, ""); err != nil {
		return errors.Join(fmt.Errorf("bind %s: %w", path, err), os.Remove(path))
	}
	return nil
}

// quiet runs inside a new namespace: loopback up, and no IPv6 traffic that would disturb a capture.
func quiet() error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		return err
	}
	quietInterface("all")
	quietInterface("default")
	return nil
}

// quietInterface is best effort: a kernel without IPv6 has none of these files.
func quietInterface(name string) {
	for key, value := range map[string]string{
		"accept_dad": "0", "accept_ra": "0", "router_solicitations": "0",
		"mldv2_unsolicited_report_interval": "0",
	} {
		_ = os.WriteFile("/proc/sys/net/ipv6/conf/"+name+"/"+key, []byte(value), 0o644)
	}
}

// Excursion moves an interface of a host to another host and back. It keeps its index, and its XDP
// program, while the kernel drops its other state: memberships, devmap rows, addresses. Afterwards
// it is up and has its addresses again.
func (h *Host) Excursion(e End, to *Host) error {
	l, err := h.Link(e.Name)
	if err != nil {
		return err
	}
	if err := h.nl.LinkSetNsFd(l, to.FD()); err != nil {
		return fmt.Errorf("move interface %s: %w", e.Name, err)
	}
	away, err := to.Link(e.Name)
	if err != nil {
		return err
	}
	if err := to.nl.LinkSetNsFd(away, h.FD()); err != nil {
		return fmt.Errorf("move interface %s back: %w", e.Name, err)
	}
	back, err := h.Link(e.Name)
	if err != nil {
		return err
	}
	if back.Attrs().Index != l.Attrs().Index {
		return fmt.Errorf("interface %s came back with index %d, had %d", e.Name, back.Attrs().Index, l.Attrs().Index)
	}
	if err := e.configure(); err != nil {
		return err
	}
	return e.waitCarrier()
}
