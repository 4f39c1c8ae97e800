package relay

import (
	"errors"
	"fmt"
	"os"
	"syscall"

	"golang.org/x/sys/unix"

	"xdpcast/internal/genl"
)

// The kernel tells of queues that are added and removed (ethtool -L) to the multicast
// group "monitor" of the generic netlink family "ethtool" (ethtool-netlink.rst).
const (
	ethtoolFamily = "ethtool"
	ethtoolGroup  = "monitor"
)

// It tells of XDP features that change, such as those of a veth whose peer is given generic
// receive offload, to the group "mgmt" of the family "netdev"
// (Documentation/netlink/specs/netdev.yaml, Linux 6.3).
const (
	netdevFamily = "netdev"
	netdevGroup  = "mgmt"
)

// listenGeneric opens a socket that hears a multicast group of a generic netlink family, in
// the network namespace of the calling thread; nil on a kernel that has it not. The caller
// must close it.
func listenGeneric(familyName, groupName string) (*os.File, error) {
	family, err := genl.Find(familyName)
	group := family.Groups[groupName]
	switch {
	case errors.Is(err, unix.ENOENT) || err == nil && group == 0:
		return nil, nil
	case err != nil:
		return nil, err
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
		return nil, errors.Join(fmt.Errorf("listen to netlink group %s of family %s: %w", groupName, familyName, err), unix.Close(fd))
	}
	return os.NewFile(uintptr(fd), familyName+" netlink"), nil
}

// tellsOfQueues says whether one of some messages of the family is about queues; also when
// they make no sense.
func tellsOfQueues(data []byte) bool {
	messages, err := syscall.ParseNetlinkMessage(data)
	if err != nil {
		return true
	}
	for _, m := range messages {
		if len(m.Data) >= genl.HeaderLen && m.Data[0] == unix.ETHTOOL_MSG_CHANNELS_NTF {
			return true
		}
	}
	return false
}
