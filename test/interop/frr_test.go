//go:build interop

package interop

import (
	"context"
	"encoding/binary"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"xdpcast/internal/control"
	"xdpcast/internal/lab"
	"xdpcast/internal/labtest"
)

// frrRelease is the location of a release of FRR, and how to run it.
type frrRelease struct {
	dir    string   // of the daemons
	loader []string // prefix of each command; empty: none
	flags  []string
	daemon string // the one that speaks PIM
	vtysh  []string
}

// frr12 is Debian 12's, installed on the machine.
var frr12 = frrRelease{dir: "/usr/lib/frr", daemon: "pimd", vtysh: []string{"vtysh"}}

// frr13 is Debian 13's pim6d, from the files that scripts/frr-root unpacks.
func frr13(t *testing.T) frrRelease {
	t.Helper()
	out, err := exec.Command("../../scripts/frr-root").Output()
	root := strings.TrimSpace(string(out))
	if err != nil || root == "" {
		labtest.Lacking(t, "Debian 13's frr: "+root)
	}
	libraries := filepath.Join(root, "usr/lib", map[string]string{"amd64": "x86_64-linux-gnu", "arm64": "aarch64-linux-gnu"}[runtime.GOARCH])
	loaders, err := filepath.Glob(filepath.Join(libraries, "ld-linux-*.so.?"))
	if err != nil || len(loaders) != 1 {
		t.Fatalf("loader of %s: %v, %v", libraries, loaders, err)
	}
	loader := []string{loaders[0], "--library-path", filepath.Join(libraries, "frr") + ":" + libraries}
	return frrRelease{
		dir:    filepath.Join(root, "usr/lib/frr"),
		loader: loader,
		vtysh:  slices.Concat(loader, []string{filepath.Join(root, "usr/bin/vtysh")}),
		flags:  []string{"--moduledir", filepath.Join(libraries, "frr/modules")},
		daemon: "pim6d",
	}
}

// frrRouter is a router with FRR's zebra and the daemon that speaks PIM.
type frrRouter struct {
	ctx     context.Context
	t       *testing.T
	host    *lab.Host
	release frrRelease
	dir     string
	running map[string]*process
}

// startFRR starts both on a host; conf configures the second.
func startFRR(ctx context.Context, t *testing.T, h *lab.Host, release frrRelease, conf string) *frrRouter {
	t.Helper()
	dir, err := os.MkdirTemp("", "frr")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	for name, text := range map[string]string{"zebra.conf": "\n", release.daemon + ".conf": conf} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if out, err := exec.Command("chown", "-R", "frr:frr", dir).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	f := &frrRouter{ctx: ctx, t: t, host: h, release: release, dir: dir, running: map[string]*process{}}
	f.start()
	return f
}

// start starts the daemons.
func (f *frrRouter) start() {
	f.t.Helper()
	for _, daemon := range []string{"zebra", f.release.daemon} {
		_ = os.Remove(filepath.Join(f.dir, daemon+".vty"))
		args := slices.Concat(f.release.loader, []string{filepath.Join(f.release.dir, daemon)}, f.release.flags, []string{
			"-f", filepath.Join(f.dir, daemon+".conf"), "-z", filepath.Join(f.dir, "zserv.api"), "-i", filepath.Join(f.dir, daemon+".pid"),
			"--vty_socket", f.dir, "-A", "127.0.0.1", "--log", "file:" + filepath.Join(f.dir, daemon+".log"),
		})
		p := start(f.ctx, f.t, f.host, args[0], args[1:]...)
		f.running[daemon] = p
		labtest.Eventually(f.t, daemon+" listens", func() bool {
			select {
			case <-p.done:
				f.t.Fatalf("%s ended: %v\n%s", daemon, p.err, p.stderr.String())
			default:
			}
			_, err := os.Stat(filepath.Join(f.dir, daemon+".vty"))
			return err == nil
		})
	}
}

// kill kills the daemons, and clears their routes from the kernel.
func (f *frrRouter) kill() {
	for _, p := range f.running {
		p.stop(unix.SIGKILL)
	}
}

// vtysh queries the daemon that speaks PIM.
func (f *frrRouter) vtysh(command string) string {
	args := slices.Concat(f.release.vtysh, []string{"--vty_socket", f.dir, "-d", f.release.daemon, "-c", command})
	out, _ := exec.CommandContext(context.WithoutCancel(f.ctx), args[0], args[1:]...).CombinedOutput()
	return string(out)
}

// pimConfig is a configuration of pimd, with the rendezvous point of all groups.
func pimConfig(rp string, interfaces ...string) string {
	conf := "ip pim rp " + rp + " 239.0.0.0/8\nip pim keep-alive-timer 31\nip pim rp keep-alive-timer 31\n"
	for _, ifname := range interfaces {
		conf += "interface " + ifname + "\n ip pim\n ip pim hello 1 30\n"
		if ifname == "out0" || ifname == "in0" {
			conf += " ip igmp\n"
		}
		conf += "exit\n"
	}
	return conf
}

// pim6Config is a configuration of pim6d.
func pim6Config(rp string, interfaces ...string) string {
	conf := "router pim6\n rp " + rp + " ff15::/16\n keep-alive-timer 31\n rp keep-alive-timer 31\nexit\n"
	for _, ifname := range interfaces {
		conf += "interface " + ifname + "\n ipv6 pim\n ipv6 pim hello 1 30\n"
		if ifname == "out0" || ifname == "in0" {
			conf += " ipv6 mld\n"
		}
		conf += "exit\n"
	}
	return conf
}

// TestPIM6: two routers of FRR's pim6d forward an IPv6 stream in XDP from the first join to the last
// leave, and once PIM has settled no number is lost, duplicated or reordered.
func TestPIM6(t *testing.T) {
	t.Parallel() // waits for FRR
	ctx := labtest.Context(t)
	release := frr13(t)
	source, first, second, sink := labtest.Host(t, "src"), labtest.Host(t, "ra"), labtest.Host(t, "rb"), labtest.Host(t, "rcv")
	labtest.Connect(t, lab.End{Host: source, Name: "eth0", Addrs: []string{"fd01::2/64"}}, lab.End{Host: first, Name: "in0", Addrs: []string{"fd01::1/64"}})
	labtest.Connect(t, lab.End{Host: first, Name: "link0", Addrs: []string{"fd02::1/64"}}, lab.End{Host: second, Name: "link0", Addrs: []string{"fd02::2/64"}})
	labtest.Connect(t, lab.End{Host: second, Name: "out0", Addrs: []string{"fd03::1/64"}}, lab.End{Host: sink, Name: "eth0", Addrs: []string{"fd03::2/64"}})
	for _, h := range []*lab.Host{first, second} {
		in(ctx, t, h, "sysctl", "-qw", "net.ipv6.conf.all.forwarding=1")
	}
	in(ctx, t, second, "ip", "addr", "add", "fd0b::1/128", "dev", "lo")
	in(ctx, t, first, "ip", "-6", "route", "add", "fd0b::1", "via", "fd02::2")
	in(ctx, t, first, "ip", "-6", "route", "add", "fd03::/64", "via", "fd02::2")
	in(ctx, t, second, "ip", "-6", "route", "add", "fd01::/64", "via", "fd02::1")
	routers := []*frrRouter{
		startFRR(ctx, t, first, release, pim6Config("fd0b::1", "in0", "link0", "lo")),
		startFRR(ctx, t, second, release, pim6Config("fd0b::1", "link0", "out0", "lo")),
	}
	relays := []*relay{}
	for _, h := range []*lab.Host{first, second} {
		r, _ := startDaemon(ctx, t, h, "rules: []\nmroute: {families: ipv6}\n", 0)
		relays = append(relays, r)
	}
	labtest.Eventually(t, "the routers are neighbours", func() bool {
		return strings.Contains(routers[0].vtysh("show ipv6 pim neighbor"), "link0") && strings.Contains(routers[1].vtysh("show ipv6 pim neighbor"), "link0")
	})
	group := netip.MustParseAddrPort("[ff15::1]:5000")
	c, send := member(t, sink, group), sender(t, source, group)
	labtest.Eventually(t, "the join has come to the rendezvous point", func() bool { return strings.Contains(routers[1].vtysh("show ipv6 mld joins"), "ff15::1") })
	running, stop := context.WithCancel(ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer stop()
	s := runNumbers(running, &wg, send, c)
	active := func(r *relay) bool {
		status := route(ctx, r, "mroute/fd01::2/ff15::1")
		return status != nil && status.State == control.StateActive
	}
	labtest.Eventually(t, "both routers forward in XDP", func() bool { return active(relays[0]) && active(relays[1]) })
	s.settled(t, "PIM has settled")
	s.passes(t, "an IPv6 stream", uint32(labtest.Soak(3000, 60_000)))
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	labtest.Eventually(t, "the second router has pruned", func() bool { return !active(relays[1]) })
}

// member receives numbered packets of a group.
func member(t *testing.T, h *lab.Host, group netip.AddrPort) (c *net.UDPConn) {
	t.Helper()
	labtest.Do(t, h, func() (err error) {
		eth0, err := net.InterfaceByName("eth0")
		if err != nil {
			return err
		}
		c, err = net.ListenMulticastUDP("udp", eth0, net.UDPAddrFromAddrPort(group))
		return err
	})
	t.Cleanup(func() { c.Close() })
	labtest.GrowBuffer(t, c)
	return c
}

// sender sends numbered packets to a group.
func sender(t *testing.T, h *lab.Host, group netip.AddrPort) (send func(number uint32)) {
	t.Helper()
	var c *net.UDPConn
	labtest.Do(t, h, func() (err error) {
		to := net.UDPAddrFromAddrPort(group)
		if group.Addr().Is6() {
			to.Zone = "eth0"
		}
		if c, err = net.DialUDP("udp", nil, to); err != nil {
			return err
		}
		raw, err := c.SyscallConn()
		if err != nil {
			return err
		}
		level, option := unix.IPPROTO_IP, unix.IP_MULTICAST_TTL
		if group.Addr().Is6() {
			level, option = unix.IPPROTO_IPV6, unix.IPV6_MULTICAST_HOPS
		}
		var set error
		err = raw.Control(func(fd uintptr) { set = unix.SetsockoptInt(int(fd), level, option, 16) })
		if err == nil {
			err = set
		}
		return err
	})
	t.Cleanup(func() { c.Close() })
	return func(number uint32) {
		if _, err := c.Write(binary.BigEndian.AppendUint32(nil, number)); err != nil {
			t.Error(err)
		}
	}
}
