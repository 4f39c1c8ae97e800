package fanout

import (
	"encoding/binary"

	"golang.org/x/sys/unix"
)

const (
	ip4Len = 20
	ip6Len = 40
	udpLen = 8
)

// maxArena bounds the memory for the datagrams of one frame. Even 64 KiB split into
// one-byte datagrams, which no kernel delivers, fit.
const maxArena = 16 << 20

// merged splits a frame of several UDP datagrams as the kernel does on output
// (__udp_gso_segment and inet_gso_segment): each datagram but the last has
// SegmentSize bytes of payload.
type merged struct {
	whole Frame
	// ip, udp and payload are offsets into whole.Data: of the headers, and of the
	// remaining payload.
	ip, udp, payload int
	count            int // datagrams returned
	// arena holds the datagrams. Those of one block share it.
	arena []byte
	used  int
}

func (m *merged) reset() {
	m.whole = Frame{}
	m.payload, m.used = 0, 0
}

// split starts splitting a frame. It returns false if that is not possible.
func (m *merged) split(f *Frame) bool {
	if len(f.Data) < f.WireLen || f.SegmentSize <= 0 || !f.ChecksumPartial {
		return false
	}
	ip, ok := f.ipHeader()
	// A merged frame always leaves the UDP checksum partial, so that checksumStart is
	// the UDP header.
	udp := f.checksumStart
	if !ok || udp+udpLen > len(f.Data) || f.checksumAt != udp+6 || !headersFit(f.Data[ip:], udp-ip) {
		return false
	}
	size := need(len(f.Data)-udp-udpLen, f.SegmentSize, udp+udpLen)
	if size > maxArena {
		return false
	}
	m.reserve(size)
	m.whole, m.ip, m.udp, m.payload, m.count = *f, ip, udp, udp+udpLen, 0
	return true
}

// ipHeader finds the IP header after any VLAN tags left in the frame.
func (f *Frame) ipHeader() (offset int, ok bool) {
	offset = f.network
	if offset < 0 {
		return 0, false
	}
	for offset >= etherLen && offset+vlanLen <= len(f.Data) {
		protocol := binary.BigEndian.Uint16(f.Data[offset-2:])
		if protocol != unix.ETH_P_8021Q && protocol != unix.ETH_P_8021AD {
			break
		}
		offset += vlanLen
	}
	return offset, offset < len(f.Data)
}

// headersFit says whether ip starts with an IP header of this length, options or
// extension headers included.
func headersFit(ip []byte, length int) bool {
	switch ip[0] >> 4 {
	case 4:
		return length >= ip4Len && length == int(ip[0]&0x0f)*4
	case 6:
		return length >= ip6Len
	}
	return false
}

// need returns the memory for the datagrams of a frame, each with its headers and
// room for a VLAN tag.
func need(payload, segmentSize, headers int) int {
	datagrams := (payload + segmentSize - 1) / segmentSize
	return payload + datagrams*(vlanLen+headers)
}

// reserve ensures that much memory, without moving the earlier datagrams of the
// block, which are still in use.
func (m *merged) reserve(need int) {
	if m.used+need > len(m.arena) {
		m.arena = make([]byte, max(2*len(m.arena), need))
		m.used = 0
	}
}

// next sets f to the next datagram, and returns false after the last one.
func (m *merged) next(f *Frame) bool {
	n := min(len(m.whole.Data)-m.payload, m.whole.SegmentSize)
	if m.whole.Data == nil || n <= 0 {
		return false
	}
	headers := m.udp + udpLen
	size := vlanLen + headers + n
	*f = m.whole
	f.room = m.arena[m.used : m.used+size : m.used+size]
	f.Data = f.room[vlanLen:]
	m.used += size
	copy(f.Data, m.whole.Data[:headers])
	copy(f.Data[headers:], m.whole.Data[m.payload:m.payload+n])
	m.payload += n
	m.writeHeaders(f.Data)
	m.count++
	f.WireLen, f.SegmentSize, f.gsoType, f.ChecksumPartial = len(f.Data), 0, unix.VIRTIO_NET_HDR_GSO_NONE, false
	return true
}

// writeHeaders turns the copied headers of the merged frame into those of one
// datagram.
func (m *merged) writeHeaders(frame []byte) {
	ip, udp := frame[m.ip:], frame[m.udp:]
	length := uint16(len(udp))
	binary.BigEndian.PutUint16(udp[4:], length)
	var addresses []byte
	if ip[0]>>4 == 4 {
		binary.BigEndian.PutUint16(ip[2:], uint16(len(ip)))
		m.writeIdentification(ip)
		binary.BigEndian.PutUint16(ip[10:], 0)
		binary.BigEndian.PutUint16(ip[10:], ^fold(sum(ip[:m.udp-m.ip])))
		addresses = ip[12:20]
	} else {
		binary.BigEndian.PutUint16(ip[4:], uint16(len(ip)-ip6Len))
		addresses = ip[8:40]
	}
	binary.BigEndian.PutUint16(udp[6:], 0)
	check := ^fold(sum(addresses) + unix.IPPROTO_UDP + uint64(length) + sum(udp))
	if check == 0 {
		check = 0xffff
	}
	binary.BigEndian.PutUint16(udp[6:], check)
}

// writeIdentification increments the identification, as the kernel does. Merged
// packets had either consecutive ones or, with DF set, a constant one, which is
// zero for all but contrived senders (RFC 6864: it is meaningless there).
func (m *merged) writeIdentification(ip []byte) {
	id := binary.BigEndian.Uint16(ip[4:])
	dontFragment := ip[6]&0x40 != 0
	if dontFragment && id == 0 {
		return
	}
	binary.BigEndian.PutUint16(ip[4:], id+uint16(m.count))
}
