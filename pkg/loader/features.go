package loader

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// The netdev generic netlink family: include/uapi/linux/netdev.h, Linux 6.3.
const (
	netdevFamily          = "netdev"
	netdevCmdDevGet       = 1
	netdevVersion         = 1
	netdevAttrIfindex     = 1
	netdevAttrXDPFeatures = 3

	xdpActBasic   = 1 << 0
	xdpActNDOXmit = 1 << 2
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
}

// DeviceFeatures asks the kernel for the XDP features of an interface.
func DeviceFeatures(index int) (Features, error) {
	family, err := familyID(netdevFamily)
	if errors.Is(err, unix.ENOENT) {
		return Features{}, nil
	}
	if err != nil {
		return Features{}, fmt.Errorf("find netlink family %s: %w", netdevFamily, err)
	}
	req := nl.NewNetlinkRequest(int(family), 0)
	req.AddData(genlHeader{netdevCmdDevGet, netdevVersion})
	req.AddData(nl.NewRtAttr(netdevAttrIfindex, nl.Uint32Attr(uint32(index))))
	messages, err := req.Execute(unix.NETLINK_GENERIC, 0)
	if err != nil {
		return Features{}, fmt.Errorf("xdp features of interface with index %d: %w", index, err)
	}
	for _, m := range messages {
		if len(m) < genlHeaderLen {
			continue
		}
		attrs, err := nl.ParseRouteAttr(m[genlHeaderLen:])
		if err != nil {
			return Features{}, fmt.Errorf("xdp features of interface with index %d: %w", index, err)
		}
		for _, a := range attrs {
			if a.Attr.Type&nl.NLA_TYPE_MASK == netdevAttrXDPFeatures && len(a.Value) >= 8 {
				bits := binary.NativeEndian.Uint64(a.Value)
				return Features{Known: true, Native: bits&xdpActBasic != 0, Transmit: bits&xdpActNDOXmit != 0}, nil
			}
		}
	}
	return Features{}, nil
}

// familyID asks for the number of a generic netlink family; ENOENT when the kernel
// has it not. The library's own function reads two bytes beyond its header.
func familyID(name string) (uint16, error) {
	req := nl.NewNetlinkRequest(nl.GENL_ID_CTRL, 0)
	req.AddData(genlHeader{nl.GENL_CTRL_CMD_GETFAMILY, nl.GENL_CTRL_VERSION})
	req.AddData(nl.NewRtAttr(nl.GENL_CTRL_ATTR_FAMILY_NAME, nl.ZeroTerminated(name)))
	messages, err := req.Execute(unix.NETLINK_GENERIC, 0)
	if err != nil {
		return 0, err
	}
	for _, m := range messages {
		if len(m) < genlHeaderLen {
			continue
		}
		attrs, err := nl.ParseRouteAttr(m[genlHeaderLen:])
		if err != nil {
			return 0, err
		}
		for _, a := range attrs {
			if a.Attr.Type&nl.NLA_TYPE_MASK == nl.GENL_CTRL_ATTR_FAMILY_ID && len(a.Value) >= 2 {
				return binary.NativeEndian.Uint16(a.Value), nil
			}
		}
	}
	return 0, errors.New("the answer names no family")
}

const genlHeaderLen = 4

// genlHeader is struct genlmsghdr; the library's own leaves its last two bytes
// unset, which this family refuses.
type genlHeader struct{ command, version byte }

func (h genlHeader) Len() int          { return genlHeaderLen }
func (h genlHeader) Serialize() []byte { return []byte{h.command, h.version, 0, 0} }
