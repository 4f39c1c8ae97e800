package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"xdpcast/pkg/packet"
)

// mostVIFs is how many interfaces the kernel routes to in addition to the input, of MAXVIFS and
// some that smcroute may take (include/uapi/linux/mroute.h).
const mostVIFs = 30

// multicastRouting is the kernel's, set up by smcroute. It sends a packet once per interface, and
// rewrites only the TTL.
func multicastRouting() subject {
	return subject{
		name: "mroute", what: "the kernel's multicast routing by smcroute; rewrites the TTL alone",
		most:     setup{Outputs: mostVIFs, Rules: 1},
		sinks:    mostVIFs,
		programs: []string{"smcrouted", "smcroutectl"},
		start:    startMulticastRouting,
	}
}

func startMulticastRouting(ctx context.Context, n *network, _ options) (*running, error) {
	// The source is on the input's network, but the reverse path check costs a lookup.
	for _, name := range []string{"all", "in"} {
		file := "/proc/sys/net/ipv4/conf/" + name + "/rp_filter"
		if err := n.relay.Do(func() error { return os.WriteFile(file, []byte("0"), 0o644) }); err != nil {
			return nil, err
		}
	}
	conf := filepath.Join(n.dir, "smcroute.conf")
	outs := n.outs[:n.setup.Outputs]
	text := fmt.Sprintf("mgroup from in group %v\nmroute from in source %v group %v to %s\n", firstGroup, sourceAddr, firstGroup, strings.Join(outs, " "))
	if err := os.WriteFile(conf, []byte(text), 0o644); err != nil {
		return nil, err
	}
	socket := filepath.Join(n.dir, "smcroute.sock")
	p, err := startProcess(n.relay, exec.Command("smcrouted", "-n", "-f", conf, "-P", filepath.Join(n.dir, "smcroute.pid"), "-u", socket))
	if err != nil {
		return nil, err
	}
	routed := func() string {
		out, err := command(ctx, n.relay, "", "ip", "-4", "mroute", "show")
		switch {
		case err != nil:
			return err.Error()
		case !strings.Contains(out, firstGroup.String()):
			return fmt.Sprintf("the kernel's routes are %q", out)
		}
		return ""
	}
	if err := p.until(ctx, routed); err != nil {
		return nil, errors.Join(err, p.stop())
	}
	return &running{stop: p.stop, pids: []int{p.cmd.Process.Pid}}, nil
}

// mirred is the traffic control action that copies a packet in the input's ingress hook.
func mirred() subject {
	return subject{
		name: "tc", what: "tc mirred in the input's ingress hook; nothing rewritten",
		// A filter holds up to 32 actions (the kernel's TCA_ACT_MAX_PRIO).
		most:     setup{Outputs: 32, Rules: 1},
		programs: []string{"tc"},
		start: func(ctx context.Context, n *network, _ options) (*running, error) {
			args := []string{"filter", "add", "dev", "in", "ingress", "protocol", "ip", "u32", "match", "ip", "dst", firstGroup.String() + "/32"}
			for output := range n.setup.Outputs {
				verb := "mirror"
				if output == n.setup.Outputs-1 {
					verb = "redirect"
				}
				args = append(args, "action", "mirred", "egress", verb, "dev", n.out(output))
			}
			for _, args := range [][]string{{"qdisc", "add", "dev", "in", "clsact"}, args} {
				if _, err := command(ctx, n.relay, "", "tc", args...); err != nil {
					return nil, err
				}
			}
			return &running{stop: nothing}, nil
		},
	}
}

// netdevDup is nftables' dup in the input's ingress hook, which can rewrite each copy.
func netdevDup() subject {
	return subject{
		name: "nft", what: "nftables netdev dup in the input's ingress hook: MAC, both addresses, port and TTL rewritten",
		rewrites: true, most: setup{Rules: 1},
		programs: []string{"nft"},
		start: func(ctx context.Context, n *network, _ options) (*running, error) {
			if _, err := command(ctx, n.relay, dupRules(n), "nft", "-f", "-"); err != nil {
				return nil, err
			}
			return &running{stop: nothing}, nil
		},
	}
}

func dupRules(n *network) string {
	var b strings.Builder
	fmt.Fprintf(&b, "table netdev bench {\n chain in {\n  type filter hook ingress device in priority 0;\n  ip daddr %v udp dport %d jump copy\n }\n chain copy {\n", firstGroup, groupPort)
	for output := range n.setup.Outputs {
		dst := plus(firstOut, output)
		mac := packet.MulticastMAC(dst)
		fmt.Fprintf(&b, "  ether daddr set %s ip saddr set %v ip daddr set %v udp dport set %d ip ttl set 8 ", net.HardwareAddr(mac[:]), relayAddr(output%len(n.outs)), dst, outPort+output)
		verb := "dup"
		if output == n.setup.Outputs-1 {
			verb = "fwd"
		}
		fmt.Fprintf(&b, "%s to %s\n", verb, n.out(output))
	}
	b.WriteString(" }\n}\n")
	return b.String()
}
