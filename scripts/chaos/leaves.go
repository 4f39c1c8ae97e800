package main

import (
	"encoding/binary"
	"fmt"
	"net"

	"golang.org/x/sys/unix"

	"xdpcast/internal/lab"
)

// streamGroup is the group of the stream, 239.1.1.1.
const streamGroup = 239<<24 | 1<<16 | 1<<8 | 1

// leaves counts the IGMP messages on the source's link by which the relay leaves the stream's
// group.
type leaves struct{ fd int }

func watchLeaves(h *lab.Host) (*leaves, error) {
	l := &leaves{fd: -1}
	err := h.Do(func() error {
		link, err := net.InterfaceByName("src0")
		if err != nil {
			return err
		}
		const ip = unix.ETH_P_IP<<8 | unix.ETH_P_IP>>8 // in network byte order
		if l.fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0); err != nil {
			return err
		}
		// The stream itself is sent on this link: count only what arrives.
		if err := unix.SetsockoptInt(l.fd, unix.SOL_PACKET, unix.PACKET_IGNORE_OUTGOING, 1); err != nil {
			return err
		}
		return unix.Bind(l.fd, &unix.SockaddrLinklayer{Protocol: ip & 0xffff, Ifindex: link.Index})
	})
	return l, err
}

func (l *leaves) close() { _ = unix.Close(l.fd) }

// count reads and counts what has arrived. A link that goes down is reported once, ahead of what arrived before.
func (l *leaves) count() (n int, err error) {
	buf := make([]byte, 2048)
	for {
		size, _, err := unix.Recvfrom(l.fd, buf, 0)
		switch err {
		case nil:
			n += leavesIn(buf[:size])
		case unix.EINTR, unix.ENETDOWN:
		case unix.EAGAIN:
			return n, nil
		default:
			return n, fmt.Errorf("read what the relay leaves: %w", err)
		}
	}
}

// leavesIn counts the leaves of the stream's group in an IPv4 packet: an IGMPv2 leave, or IGMPv3 records that change
// to including no source or block one (RFC 3376 section 4.2.12).
func leavesIn(packet []byte) (n int) {
	const protocolIGMP, leaveV2, reportV3 = 2, 0x17, 0x22
	const toInclude, block = 3, 6
	if len(packet) < 20 || packet[9] != protocolIGMP {
		return 0
	}
	header := int(packet[0]&15) * 4
	if len(packet) < header+8 {
		return 0
	}
	igmp := packet[header:]
	switch igmp[0] {
	case leaveV2:
		if binary.BigEndian.Uint32(igmp[4:]) == streamGroup {
			n = 1
		}
		return n
	case reportV3:
	default:
		return 0
	}
	records := igmp[8:]
	for range binary.BigEndian.Uint16(igmp[6:]) {
		if len(records) < 8 {
			return n
		}
		sources := int(binary.BigEndian.Uint16(records[2:]))
		ours := binary.BigEndian.Uint32(records[4:]) == streamGroup
		if ours && (records[0] == block || records[0] == toInclude && sources == 0) {
			n++
		}
		size := 8 + 4*sources + 4*int(records[1])
		if len(records) < size {
			return n
		}
		records = records[size:]
	}
	return n
}
