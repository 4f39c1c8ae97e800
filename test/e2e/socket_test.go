package e2e_test

import (
	"syscall"

	"golang.org/x/sys/unix"
)

// multicastInterface makes a socket send multicast on an interface.
func multicastInterface(index int, is4 bool) func(network, address string, c syscall.RawConn) error {
	return func(_, _ string, c syscall.RawConn) error {
		var sent error
		err := c.Control(func(fd uintptr) {
			if is4 {
				sent = unix.SetsockoptIPMreqn(int(fd), unix.IPPROTO_IP, unix.IP_MULTICAST_IF, &unix.IPMreqn{Ifindex: int32(index)})
				return
			}
			sent = unix.SetsockoptInt(int(fd), unix.IPPROTO_IPV6, unix.IPV6_MULTICAST_IF, index)
		})
		if err != nil {
			return err
		}
		return sent
	}
}
