package loader

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"xdpcast/internal/genl"
)

// The netdev generic netlink family: include/uapi/linux/netdev.h, Linux 6.3.
const (
	netdevFamily          = "netdev"
	netdevCmdDevGet       = 1
	netdevVersion         = 1
	netdevAttrIfindex     = 1
	netdevAttrXDPFeatures = 3

	xdpActBasic     = 1 << 0
	xdpActNDOXmit   = 1 << 2
	xdpActNDOXmitSG = 1 << 6
)

// Features is what the driver of an interface says that XDP can do on it.
type Features struct {
	// Known is false on kernels that do not tell (before Linux 6.3).
	Known bool
	// Native: programs run in the driver.
	Native bool
	// Transmit: frames redirected to the interface are sent. A veth has it only
	// while its peer has generic receive offload or an XDP program on.
	Transmit bool
	// TransmitSG: redirected frames of several buffers are sent, too. Kernels that do
	// not tell refuse them on every device, and nothing counts it.
	TransmitSG bool
}

// DeviceFeatures asks the kernel for the XDP features of an interface.
func DeviceFeatures(index int) (Features, error) {
	family, err := genl.Find(netdevFamily)
	if errors.Is(err, unix.ENOENT) {
		return Features{}, nil
	}
	if err != nil {
		return Features{}, err
	}
	answers, err := genl.Ask(family.ID, genl.Header{Command: netdevCmdDevGet, Version: netdevVersion}, nl.NewRtAttr(netdevAttrIfindex, nl.Uint32Attr(uint32(index))))
	if err != nil {
		return Features{}, fmt.Errorf("xdp features of interface with index %d: %w", index, err)
	}
	for _, attrs := range answers {
		for _, a := range attrs {
			if a.Attr.Type&nl.NLA_TYPE_MASK == netdevAttrXDPFeatures && len(a.Value) >= 8 {
				bits := binary.NativeEndian.Uint64(a.Value)
				return Features{
					Known: true, Native: bits&xdpActBasic != 0,
					Transmit: bits&xdpActNDOXmit != 0, TransmitSG: bits&xdpActNDOXmitSG != 0,
				}, nil
			}
		}
	}
	return Features{}, nil
}
