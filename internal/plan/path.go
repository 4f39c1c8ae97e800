package plan

import (
	"cmp"
	"errors"
	"fmt"

	"xdpcast/internal/network"
	"xdpcast/pkg/flow"
	"xdpcast/pkg/rules"
)

const (
	// broadcastFrame is the largest frame in bytes that certainly arrives in one buffer, and that
	// the kernel can certainly broadcast: it copies a frame into one page, after 256 bytes of
	// headroom and, for devices that receive into single pages, before struct skb_shared_info
	// (xdpf_clone of net/core/xdp.c, XDP_PACKET_HEADROOM). A longer frame has several buffers,
	// which the kernel does not clone.
	broadcastFrame = 4096 - 256 - 320
	// maxHeaders is the part of a frame beyond the IP packet: Ethernet and one VLAN tag.
	maxHeaders = 18
)

// mayTap says whether a rule can take the fanout path.
func mayTap(rule *Rule) bool {
	return rule.Path == rules.PathAuto || rule.Path == rules.PathFanout
}

// PathName is the name of a path in rules and the API.
func PathName(p flow.Path) string {
	switch p {
	case flow.PathAFXDP:
		return "afxdp"
	case flow.PathFanout:
		return "fanout"
	default:
		return "kernel"
	}
}

// chooser selects the path of a flow, by the rules in the package documentation.
type chooser struct {
	maker    *maker
	rule     *Rule
	in       *network.Link
	slots    []slot
	attached Attached
	untried  bool      // not known yet whether the program can be attached
	path     flow.Path // the choice
}

// choice is a path. why is the reason against a better one, note a hint for the user; err says why
// no path works.
type choice struct {
	path      flow.Path
	why, note string
	err       error
}

func (c *chooser) choose(carried flow.Path) choice {
	got := c.find(carried)
	c.path = got.path
	return got
}

func (c *chooser) find(carried flow.Path) choice {
	switch c.rule.Path {
	case rules.PathFanout:
		return choice{path: flow.PathFanout}
	case rules.PathKernel:
		if why := c.carries(flow.PathKernel); why != "" {
			return choice{err: c.failure(why)}
		}
		if c.delivers(flow.PathAFXDP) != "" {
			return c.explicit(flow.PathKernel, "path fanout")
		}
		return c.explicit(flow.PathKernel, "paths afxdp and fanout")
	case rules.PathAFXDP:
		if why := cmp.Or(c.carries(flow.PathAFXDP), c.servesAll(flow.PathAFXDP)); why != "" {
			return choice{err: fmt.Errorf("path afxdp: %w", c.failure(why))}
		}
		return c.explicit(flow.PathAFXDP, "path fanout")
	}
	if c.untried && carried != 0 && c.fault(carried) == "" {
		return choice{path: carried}
	}
	best := c.best()
	if carried > best.path && c.fault(carried) == "" {
		if name := c.unknown(); name != "" {
			return choice{path: carried, why: fmt.Sprintf("path %s: kept until it is known what interface %s can do", PathName(carried), name)}
		}
	}
	return best
}

// failure is the error of a reason: the kernel's own error if it is the cause.
func (c *chooser) failure(why string) error {
	if err := c.attached.Err; err != nil && err.Error() == why {
		return err
	}
	return errors.New(why)
}

// explicit is the path that the rule names, with a note about frames that it cannot send but other
// paths can.
func (c *chooser) explicit(p flow.Path, others string) (got choice) {
	got.path = p
	if why := c.delivers(p); why != "" {
		got.note = fmt.Sprintf("%s: they are dropped for the reason multi_buffer (%s can)", why, others)
	} else if why := c.maker.localSenders(c.in); why != "" && p == flow.PathKernel {
		got.note = why + ": they leave with wrong checksums, or are dropped for the reason mtu (path fanout can)"
	}
	return got
}

// best is the first path without a fault.
func (c *chooser) best() choice {
	why := c.fault(flow.PathKernel)
	if why == "" {
		return choice{path: flow.PathKernel}
	}
	notSockets := c.fault(flow.PathAFXDP)
	if notSockets == "" {
		return choice{path: flow.PathAFXDP, why: "path afxdp: " + why}
	}
	if notSockets != why {
		why += "; not path afxdp: " + notSockets
	}
	return choice{path: flow.PathFanout, why: "path fanout: " + why}
}

// fault is the reason against a path, "" if there is none.
func (c *chooser) fault(p flow.Path) string {
	if why := c.carries(p); why != "" {
		return why
	}
	if p != flow.PathFanout {
		if why := c.maker.localSenders(c.in); why != "" {
			return why
		}
	}
	if why := c.servesAll(p); why != "" {
		return why
	}
	return c.delivers(p)
}

// carries says why a path cannot carry the flow, "" if it can.
func (c *chooser) carries(p flow.Path) string {
	if p == flow.PathFanout {
		return ""
	}
	switch {
	case c.rule.In.FromHost:
		return "from=host takes packets that this host sends, which only the packet tap sees"
	case c.rule.Accept.Local:
		return "local=yes keeps the packets for the host's receivers"
	case !c.in.Ethernet:
		return fmt.Sprintf("interface %s has no Ethernet header", c.in.Name)
	case c.attached.Err != nil:
		return c.attached.Err.Error()
	case p == flow.PathKernel && c.attached.Generic && len(c.slots) > 1:
		return fmt.Sprintf("interface %s runs XDP in generic mode, which supports one output a rule: the kernel's copies would share one buffer", c.in.Name)
	}
	return ""
}

// servesAll says why a path cannot send on the interface of some output, "" if it can or nothing is
// known against it.
func (c *chooser) servesAll(p flow.Path) string {
	for i := range c.slots {
		if l := c.slots[i].link; l != nil {
			if why := c.serves(p, l); why != "" {
				return why
			}
		}
	}
	return ""
}

// serves is servesAll for one interface.
func (c *chooser) serves(p flow.Path, l *network.Link) string {
	switch {
	case p == flow.PathFanout:
		return ""
	case !l.Ethernet && p == flow.PathKernel:
		return fmt.Sprintf("interface %s has no Ethernet header, which the kernel path needs", l.Name)
	case !l.Ethernet:
		return fmt.Sprintf("interface %s has no Ethernet header", l.Name)
	case p == flow.PathAFXDP || c.attached.Generic || isUnknown(l):
		return "" // frames of a generic program are sent like those of the stack
	case l.Features.Known && !l.Features.Transmit:
		return fmt.Sprintf("interface %s does not send redirected frames (its driver says so; a veth needs generic receive offload at its peer: ethtool -K PEER gro on, or off and on again if it was switched on while the veth was down)", l.Name)
	}
	if why, ok := c.maker.answers.NoTransmit[l.LinkID]; ok {
		return fmt.Sprintf("interface %s does not send redirected frames (%s)", l.Name, cmp.Or(why, "it refused some"))
	}
	return ""
}

// isUnknown says whether an interface's ability to send is unknown. The features of a veth depend
// on its peer, and change when that is set up.
func isUnknown(l *network.Link) bool { return l == nil || l.Kind == "veth" && !l.Running() }

// unknown names an output interface that may later require another path.
func (c *chooser) unknown() string {
	for i := range c.slots {
		if isUnknown(c.slots[i].link) {
			return c.slots[i].ifname
		}
	}
	return ""
}

// delivers says why a path cannot send every frame that the input's MTU allows, "" if it can.
// Frames longer than a page come in several buffers.
func (c *chooser) delivers(p flow.Path) string {
	if c.in.MTU+maxHeaders <= broadcastFrame || p == flow.PathFanout {
		return ""
	}
	name, mtu := c.in.Name, c.in.MTU
	switch kernel := c.maker.opts.Kernel; {
	case p == flow.PathAFXDP && kernel.SocketSG:
		return ""
	case p == flow.PathAFXDP:
		return fmt.Sprintf("AF_XDP sockets take no frames of more than %d bytes before Linux 6.6, and the MTU of %s is %d", broadcastFrame, name, mtu)
	case len(c.slots) > 1:
		return fmt.Sprintf("the kernel path cannot copy frames of more than %d bytes to %d outputs, and the MTU of %s is %d", broadcastFrame, len(c.slots), name, mtu)
	case c.attached.Generic:
		return "" // frames of a generic program are sent like those of the stack
	}
	l := c.slots[0].link
	if isUnknown(l) || l.MTU+maxHeaders <= broadcastFrame || l.Features.TransmitSG {
		return "" // otherwise longer frames are dropped anyway
	}
	return fmt.Sprintf("interface %s does not send redirected frames of more than %d bytes, which come in several buffers (Linux 6.3, and a driver that can), and the MTU of %s is %d", l.Name, broadcastFrame, name, mtu)
}

// softKind says whether links of a kind receive frames of local stacks that never crossed a wire,
// with offloads pending: checksums left to the device, and several datagrams in one frame
// (UDP_SEGMENT). XDP sees such frames as they are, and can neither complete nor segment them; the
// packet tap gets the offload metadata. On a veth with native XDP the kernel segments them, and the
// relay program completes checksums.
func softKind(kind string) bool {
	switch kind {
	case "bridge", "openvswitch", "macvlan", "macvtap", "ipvlan", "ipvtap", "tun", "vxlan", "geneve", "gretap", "ip6gretap":
		return true
	}
	return false
}

// localSenders says which senders make an input require the packet tap; "" for none. It depends
// only on the kind of the link, for a VLAN device on that of the lower one.
func (m *maker) localSenders(in *network.Link) string {
	below := in
	for below.Kind == "vlan" {
		if below = m.net.ByIndex(below.Lower); below == nil {
			return ""
		}
	}
	if !softKind(below.Kind) || !in.Ethernet {
		return ""
	}
	return fmt.Sprintf("interface %s (%s) carries packets of senders on this host, with checksums and segments that only the fanout path can complete", in.Name, below.Kind)
}

// finishes says whether incomplete checksums are completed on the way: by the relay program, if no
// buffer metadata marks them, or by workers of AF_XDP sockets, which only ever see the frame.
func (c *chooser) finishes() bool {
	soft := c.in.Kind == "veth" || c.maker.localSenders(c.in) != ""
	return soft && (c.path == flow.PathAFXDP || c.path == flow.PathKernel && !c.attached.Generic)
}
