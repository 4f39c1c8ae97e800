package relay

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"syscall"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// The kernel tells of queues that are added and removed (ethtool -L) to the multicast
// group "monitor" of the generic netlink family "ethtool" (ethtool-netlink.rst).
const (
	ethtoolFamily = "ethtool"
	ethtoolGroup  = "monitor"
)

// genlHeader is struct genlmsghdr (include/uapi/linux/genetlink.h). The library's own
// sends two bytes of stray memory.
type genlHeader struct{ cmd, version uint8 }

const genlHeaderLen = 4

func (h genlHeader) Len() int          { return genlHeaderLen }
func (h genlHeader) Serialize() []byte { return []byte{h.cmd, h.version, 0, 0} }

// listenEthtool opens a socket that hears of queues, in the network namespace of the
// calling thread; nil on a kernel that does not tell (before Linux 5.6). The caller must
// close it.
func listenEthtool() (*os.File, error) {
	group, err := genlGroup(ethtoolFamily, ethtoolGroup)
	if errors.Is(err, unix.ENOENT) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("find netlink group %s of family %s: %w", ethtoolGroup, ethtoolFamily, err)
	}
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_GENERIC)
	if err != nil {
		return nil, fmt.Errorf("netlink socket: %w", err)
	}
	err = unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK})
	if err == nil {
		// A group's number may be beyond those that bind takes.
		err = unix.SetsockoptInt(fd, unix.SOL_NETLINK, unix.NETLINK_ADD_MEMBERSHIP, int(group))
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("listen to netlink group %s of family %s: %w", ethtoolGroup, ethtoolFamily, err), unix.Close(fd))
	}
	return os.NewFile(uintptr(fd), "ethtool netlink"), nil
}

// genlGroup asks for the number of a multicast group; ENOENT when the kernel has not
// the family or the group.
func genlGroup(family, group string) (uint32, error) {
	req := nl.NewNetlinkRequest(nl.GENL_ID_CTRL, 0)
	req.AddData(genlHeader{nl.GENL_CTRL_CMD_GETFAMILY, nl.GENL_CTRL_VERSION})
	req.AddData(nl.NewRtAttr(nl.GENL_CTRL_ATTR_FAMILY_NAME, nl.ZeroTerminated(family)))
	messages, err := req.Execute(unix.NETLINK_GENERIC, 0)
	if err != nil {
		return 0, err
	}
	for _, m := range messages {
		if len(m) < genlHeaderLen {
			continue
		}
		number, err := groupNumber(m[genlHeaderLen:], group)
		if err != nil || number != 0 {
			return number, err
		}
	}
	return 0, unix.ENOENT
}

// groupNumber finds a group among the attributes of a family: CTRL_ATTR_MCAST_GROUPS
// holds a list of entries, each with a name and a number; 0 when it is not there.
func groupNumber(data []byte, group string) (uint32, error) {
	attrs, err := nl.ParseRouteAttr(data)
	if err != nil {
		return 0, err
	}
	for _, a := range attrs {
		if a.Attr.Type&nl.NLA_TYPE_MASK != nl.GENL_CTRL_ATTR_MCAST_GROUPS {
			continue
		}
		entries, err := nl.ParseRouteAttr(a.Value)
		if err != nil {
			return 0, err
		}
		for _, e := range entries {
			fields, err := nl.ParseRouteAttr(e.Value)
			if err != nil {
				return 0, err
			}
			name, number := "", uint32(0)
			for _, f := range fields {
				switch f.Attr.Type & nl.NLA_TYPE_MASK {
				case nl.GENL_CTRL_ATTR_MCAST_GRP_NAME:
					name = nl.BytesToString(f.Value)
				case nl.GENL_CTRL_ATTR_MCAST_GRP_ID:
					if len(f.Value) >= 4 {
						number = binary.NativeEndian.Uint32(f.Value)
					}
				}
			}
			if name == group {
				return number, nil
			}
		}
	}
	return 0, nil
}

// tellsOfQueues says whether one of some messages of the family is about queues; also when
// they make no sense.
func tellsOfQueues(data []byte) bool {
	messages, err := syscall.ParseNetlinkMessage(data)
	if err != nil {
		return true
	}
	for _, m := range messages {
		if len(m.Data) >= genlHeaderLen && m.Data[0] == unix.ETHTOOL_MSG_CHANNELS_NTF {
			return true
		}
	}
	return false
}
