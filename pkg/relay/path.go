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

// choosePath decides how the packets of a rule that come in on an interface travel
// to n outputs. generic says that the interface runs XDP in generic mode. The note
// is what a person should know of the choice, "" for nothing; the error says why no
// path does.
func choosePath(rule *rules.Rule, in *iface, n int, generic bool) (path loader.Path, note string, err error) {
	switch rule.Path {
	case rules.PathAuto, rules.PathKernel:
	default:
		return 0, "", fmt.Errorf("path %s is not in this release: want auto or kernel", rule.Path)
	}
	if generic && n > 1 {
		return 0, "", fmt.Errorf("interface %s runs XDP in generic mode, which supports one output a rule: the kernel's copies would share one buffer", in.name)
	}
	if n > 1 && in.mtu+maxHeaders > broadcastFrame {
		note = fmt.Sprintf("frames of more than %d bytes are dropped for the reason multi_buffer: the kernel path cannot copy them to %d outputs (the MTU of %s is %d); paths afxdp and fanout can", broadcastFrame, n, in.name, in.mtu)
	}
	return loader.PathKernel, note, nil
}
