package relay

import (
	"cmp"
	"errors"
	"fmt"

	"xdpcast/pkg/loader"
	"xdpcast/pkg/rules"
)

// broadcastFrame is the largest frame in bytes that the kernel is sure to broadcast:
// it copies a frame into one page, in front of which are 256 bytes of headroom and
// behind which, for devices that receive into single pages, is struct
// skb_shared_info (xdpf_clone of net/core/xdp.c, XDP_PACKET_HEADROOM). A longer
// frame comes in several buffers, which it does not clone.
const broadcastFrame = 4096 - 256 - 320

// mayTap says whether a rule can take the fanout path.
func mayTap(rule *rules.Rule) bool {
	return rule.Path == rules.PathAuto || rule.Path == rules.PathFanout
}

// choosePath decides how the packets of an instance travel: the kernel path where it
// can carry them, else AF_XDP sockets, else the packet tap. The note is what a person
// should know of the choice, "" for nothing; the error says why no path does.
func (r *Relay) choosePath(rule *rules.Rule, in *iface, n *instance, generic bool) (path loader.Path, note string, err error) {
	notKernel, jumbo := r.notInKernel(rule, in, n, generic), r.jumboFault(in, n)
	switch rule.Path {
	case rules.PathFanout:
		return loader.PathFanout, "", nil
	case rules.PathKernel:
		if notKernel != "" {
			return 0, "", errors.New(notKernel)
		}
		if jumbo != "" {
			note = jumbo + ": they are dropped for the reason multi_buffer (paths afxdp and fanout can)"
		} else if local := r.localSenders(in); local != "" {
			note = local + ": they leave with wrong checksums, or are dropped for the reason mtu (path fanout can)"
		}
		return loader.PathKernel, note, nil
	case rules.PathAFXDP:
		if why := r.notBySockets(rule, in, n); why != "" {
			return 0, "", fmt.Errorf("path afxdp: %s", why)
		}
		return loader.PathAFXDP, "", nil
	}
	if local := r.localSenders(in); local != "" {
		return loader.PathFanout, "path fanout: " + local, nil
	}
	why := cmp.Or(notKernel, jumbo)
	if why == "" {
		return loader.PathKernel, "", nil
	}
	if notSockets := r.notBySockets(rule, in, n); notSockets != "" {
		if notSockets != why {
			why += "; not path afxdp: " + notSockets
		}
		return loader.PathFanout, "path fanout: " + why, nil
	}
	return loader.PathAFXDP, "path afxdp: " + why, nil
}

// softKinds are the kinds of devices on which frames of local stacks come in that no wire
// has seen: with checksums that were left to the device, and several datagrams in one
// (UDP_SEGMENT). XDP sees such frames as they are, and can neither finish nor divide
// them; the packet tap is told what is left to do. On a veth with native XDP the kernel
// divides them, and the relay program finishes checksums.
var softKinds = map[string]bool{
	"bridge": true, "openvswitch": true, "macvlan": true, "macvtap": true, "ipvlan": true, "ipvtap": true,
	"tuntap": true, "vxlan": true, "geneve": true, "gretap": true, "ip6gretap": true,
}

// localSenders says which senders make an input one for the packet tap; "" for none. It
// depends on the kind of the device alone, for a VLAN device on that of the one below.
func (r *Relay) localSenders(in *iface) string {
	kind, below := in.kind, in
	for kind == "vlan" {
		if below = r.byIndex(below.parent); below == nil {
			return ""
		}
		kind = below.kind
	}
	if !softKinds[kind] || !in.ethernet {
		return ""
	}
	return fmt.Sprintf("interface %s (%s) carries packets of senders on this host, with checksums and segments that only the packet tap finishes", in.name, kind)
}

func (r *Relay) byIndex(index int) *iface {
	for _, i := range r.interfaces {
		if i.index == index {
			return i
		}
	}
	return nil
}

// finishes says whether unfinished checksums are to be completed on the way: by the relay
// program, where a buffer has nothing else that says so, or by workers of AF_XDP sockets,
// who never see more than the frame.
func (r *Relay) finishes(in *iface, path loader.Path, generic bool) bool {
	soft := in.kind == "veth" || r.localSenders(in) != ""
	return soft && (path == loader.PathAFXDP || path == loader.PathKernel && !generic)
}

// jumboFault says why the kernel path cannot copy every frame of an input, "" when it
// can.
func (r *Relay) jumboFault(in *iface, n *instance) string {
	if len(n.slots) < 2 || in.mtu+maxHeaders <= broadcastFrame {
		return ""
	}
	return fmt.Sprintf("the kernel path cannot copy frames of more than %d bytes to %d outputs, and the MTU of %s is %d", broadcastFrame, len(n.slots), in.name, in.mtu)
}

// notInKernel says why the kernel path cannot carry an instance, "" when it can. An
// output that is absent or down says nothing: it may come as it was. What an output
// lacks leaves that output pending alone when the rule must take the kernel path, or
// has streams there: they are not moved because another interface has come.
func (r *Relay) notInKernel(rule *rules.Rule, in *iface, n *instance, generic bool) string {
	switch why := notByProgram(rule, in, n); {
	case why != "":
		return why
	case generic && len(n.slots) > 1:
		return fmt.Sprintf("interface %s runs XDP in generic mode, which supports one output a rule: the kernel's copies would share one buffer", in.name)
	case rule.Path == rules.PathKernel || n.stays:
		return ""
	}
	for i := range n.slots {
		if out := r.interfaces[n.slots[i].ifname]; out != nil && out.up {
			if why := r.cannotTransmit(out, generic); why != "" {
				return why
			}
		}
	}
	return ""
}

// notByProgram says why the relay program cannot take an instance's packets, "" when
// it can.
func notByProgram(rule *rules.Rule, in *iface, n *instance) string {
	switch {
	case rule.Accept.Local:
		return "local=yes keeps the packets for the host's receivers"
	case !in.ethernet:
		return fmt.Sprintf("interface %s has no Ethernet header", in.name)
	case n.noXDP != nil:
		return n.noXDP.Error()
	}
	return ""
}

// notBySockets says why AF_XDP sockets cannot carry an instance, "" when they can.
func (r *Relay) notBySockets(rule *rules.Rule, in *iface, n *instance) string {
	if why := notByProgram(rule, in, n); why != "" {
		return why
	}
	for i := range n.slots {
		if out := r.interfaces[n.slots[i].ifname]; out != nil && !out.ethernet {
			return fmt.Sprintf("interface %s has no Ethernet header", out.name)
		}
	}
	return ""
}

// cannotTransmit says why the kernel path cannot send on an interface, "" when it
// can.
func (r *Relay) cannotTransmit(i *iface, generic bool) string {
	if !i.ethernet {
		return fmt.Sprintf("interface %s has no Ethernet header, which the kernel path needs", i.name)
	}
	if f := r.featuresOf(i.index); !generic && f.Known && !f.Transmit {
		return fmt.Sprintf("interface %s does not send redirected frames (its driver says so; a veth needs generic receive offload at its peer: ethtool -K PEER gro on)", i.name)
	}
	return ""
}
