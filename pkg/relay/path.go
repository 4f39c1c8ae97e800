package relay

import (
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

// choosePath decides how the packets of an instance travel. The note is what a
// person should know of the choice, "" for nothing; the error says why no path does.
func (r *Relay) choosePath(rule *rules.Rule, in *iface, n *instance, generic bool) (path loader.Path, note string, err error) {
	switch rule.Path {
	case rules.PathAFXDP:
		return 0, "", fmt.Errorf("path %s is not in this release: want auto, kernel or fanout", rule.Path)
	case rules.PathFanout:
		return loader.PathFanout, "", nil
	}
	why := r.notInKernel(rule, in, n, generic)
	jumbo := len(n.slots) > 1 && in.mtu+maxHeaders > broadcastFrame
	switch {
	case why == "" && !jumbo:
		return loader.PathKernel, "", nil
	case why == "" && rule.Path == rules.PathKernel:
		return loader.PathKernel, fmt.Sprintf("frames of more than %d bytes are dropped for the reason multi_buffer: the kernel path cannot copy them to %d outputs (the MTU of %s is %d); path fanout can", broadcastFrame, len(n.slots), in.name, in.mtu), nil
	case rule.Path == rules.PathKernel:
		return 0, "", fmt.Errorf("%s", why)
	case why == "":
		why = fmt.Sprintf("the kernel path cannot copy frames of more than %d bytes to %d outputs, and the MTU of %s is %d", broadcastFrame, len(n.slots), in.name, in.mtu)
	}
	return loader.PathFanout, "path fanout: " + why, nil
}

// notInKernel says why the kernel path cannot carry an instance, "" when it can. An
// output that is absent or down says nothing: it may come as it was. What an output
// lacks leaves that output pending alone when the rule must take the kernel path, or
// has streams there: they are not moved because another interface has come.
func (r *Relay) notInKernel(rule *rules.Rule, in *iface, n *instance, generic bool) string {
	switch {
	case rule.Accept.Local:
		return "local=yes keeps the packets for the host's receivers"
	case !in.ethernet:
		return fmt.Sprintf("interface %s has no Ethernet header", in.name)
	case n.noXDP != nil:
		return n.noXDP.Error()
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
