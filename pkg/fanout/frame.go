package fanout

import (
	"encoding/binary"

	"golang.org/x/sys/unix"
)

const (
	etherAddressesLen = 12
	etherLen          = 14
	vlanLen           = 4
	sizeofVnetHeader  = 10 // struct virtio_net_hdr of include/uapi/linux/virtio_net.h
)

// Frame is one frame and its metadata from the kernel.
type Frame struct {
	// Data is the frame from its link-layer header on, or from its IP header on
	// for an interface without one.
	Data []byte
	// WireLen is the original length of the frame, in bytes, without the VLAN tag
	// that the kernel removed; Data is shorter if the filter truncated it.
	WireLen int
	// Time is when the frame was received, in nanoseconds since the Unix epoch.
	Time int64
	// VLANProtocol is the EtherType of the outermost VLAN tag, which the kernel
	// removed from the frame: 0x8100 or 0x88a8; 0 if it removed none.
	VLANProtocol uint16
	// VLANTag is that tag's control word: priority, drop eligible bit and VLAN id
	// (IEEE 802.1Q), in host byte order.
	VLANTag uint16
	// ChecksumPartial says that the sender, on this machine, left the transport
	// checksum to the device: the field covers the pseudo header alone.
	ChecksumPartial bool
	// SegmentSize is the payload in bytes of each datagram, or TCP segment, that was
	// merged into this frame, and 0 for an unmerged frame. It is set only on frames
	// that Next cannot split, mainly TCP: they are not what was on the wire.
	SegmentSize int

	// room is Data and the usable bytes in front of it.
	room []byte
	// checksumStart is the first byte that the checksum covers, checksumAt its
	// position; offsets into Data.
	checksumStart, checksumAt int
	// network is the offset of the network header as the kernel sees it: after the
	// removed tag, but before any further one.
	network int
	gsoType uint8
}

// layout holds the offsets of header fields in bytes, which differ between ring
// versions.
type layout struct {
	seconds, nanos, snaplen, length, status, mac, net, vlan, tpid, size int
	// wideVLAN says that the tag's field has 32 bits.
	wideVLAN bool
}

// Struct tpacket3_hdr of frames in a block, and struct tpacket2_hdr of frames in a
// frame ring (include/uapi/linux/if_packet.h). All fields are in host byte order.
var (
	inBlock = layout{
		seconds: 4, nanos: 8, snaplen: 12, length: 16, status: 20, mac: 24, net: 26, vlan: 32, tpid: 36,
		size: unix.SizeofTpacket3Hdr, wideVLAN: true,
	}
	inFrameRing = layout{
		status: 0, length: 4, snaplen: 8, mac: 12, net: 14, seconds: 16, nanos: 20, vlan: 24, tpid: 26,
		size: unix.SizeofTpacket2Hdr,
	}
)

// time reads the receive timestamp of a frame.
func (l *layout) time(header []byte) int64 {
	order := binary.NativeEndian
	return int64(order.Uint32(header[l.seconds:]))*1e9 + int64(order.Uint32(header[l.nanos:]))
}

// parse reads a frame's header, and the frame and the struct virtio_net_hdr that it
// points to. memory extends to the end of the block, or of the frame's slot.
func (f *Frame) parse(memory []byte, l *layout) bool {
	order := binary.NativeEndian
	header := memory[:l.size]
	start := int(order.Uint16(header[l.mac:]))
	length := int(order.Uint32(header[l.snaplen:]))
	if start < l.size+sizeofVnetHeader || length < 0 || length > len(memory)-start {
		return false
	}
	*f = Frame{
		// The virtio header lies just before the frame. It is read before anything
		// overwrites it.
		room:    memory[start-vlanLen : start+length : start+length],
		WireLen: int(order.Uint32(header[l.length:])),
		Time:    l.time(header),
		network: int(order.Uint16(header[l.net:])) - start,
	}
	f.Data = f.room[vlanLen:]
	f.parseVLAN(header, l)
	f.parseVirtio(memory[start-sizeofVnetHeader:])
	return true
}

func (f *Frame) parseVLAN(header []byte, l *layout) {
	status := binary.NativeEndian.Uint32(header[l.status:])
	if status&unix.TP_STATUS_VLAN_VALID == 0 {
		return
	}
	f.VLANTag = binary.NativeEndian.Uint16(header[l.vlan:])
	if l.wideVLAN {
		f.VLANTag = uint16(binary.NativeEndian.Uint32(header[l.vlan:]))
	}
	f.VLANProtocol = unix.ETH_P_8021Q
	if status&unix.TP_STATUS_VLAN_TPID_VALID != 0 {
		f.VLANProtocol = binary.NativeEndian.Uint16(header[l.tpid:])
	}
}

// parseVirtio reads struct virtio_net_hdr: flags, gso_type, hdr_len, gso_size,
// csum_start, csum_offset.
func (f *Frame) parseVirtio(header []byte) {
	order := binary.NativeEndian
	if header[0]&unix.VIRTIO_NET_HDR_F_NEEDS_CSUM != 0 {
		f.ChecksumPartial = true
		f.checksumStart = int(order.Uint16(header[6:]))
		f.checksumAt = f.checksumStart + int(order.Uint16(header[8:]))
	}
	if header[1] != unix.VIRTIO_NET_HDR_GSO_NONE {
		f.gsoType = header[1] &^ unix.VIRTIO_NET_HDR_GSO_ECN
		f.SegmentSize = max(1, int(order.Uint16(header[4:]))) // 0 would mean unmerged
	}
}

// merged says whether the frame consists of several UDP datagrams.
func (f *Frame) merged() bool {
	return f.gsoType == unix.VIRTIO_NET_HDR_GSO_UDP_L4
}

// CompleteChecksum completes the transport checksum in Data if ChecksumPartial is
// set, and clears that. It returns false, and changes nothing, if it cannot: the
// frame is truncated, or the kernel's offset is outside it.
func (f *Frame) CompleteChecksum() bool {
	if !f.ChecksumPartial {
		return true
	}
	if len(f.Data) < f.WireLen || f.checksumAt < f.checksumStart || f.checksumAt+2 > len(f.Data) {
		return false
	}
	// The checksum field holds the uncomplemented sum of the pseudo header.
	check := ^fold(sum(f.Data[f.checksumStart:]))
	if check == 0 {
		check = 0xffff // RFC 768: zero means no checksum
	}
	binary.BigEndian.PutUint16(f.Data[f.checksumAt:], check)
	f.ChecksumPartial = false
	return true
}

// RestoreVLAN puts the VLAN tag that the kernel removed back into Data, and
// clears VLANProtocol. It does nothing if there is none. Do not call it for an
// interface without an Ethernet header.
func (f *Frame) RestoreVLAN() {
	if f.VLANProtocol == 0 || len(f.Data) < etherLen || len(f.room) != len(f.Data)+vlanLen {
		return
	}
	copy(f.room[:etherAddressesLen], f.Data[:etherAddressesLen])
	binary.BigEndian.PutUint16(f.room[etherAddressesLen:], f.VLANProtocol)
	binary.BigEndian.PutUint16(f.room[etherAddressesLen+2:], f.VLANTag)
	f.Data = f.room
	f.WireLen += vlanLen
	f.checksumStart += vlanLen
	f.checksumAt += vlanLen
	f.network += vlanLen
	f.VLANProtocol, f.VLANTag = 0, 0
}

// sum adds up 16-bit words (RFC 1071).
func sum(b []byte) (total uint64) {
	for ; len(b) >= 8; b = b[8:] {
		v := binary.BigEndian.Uint64(b)
		total += v>>32 + v&0xffffffff
	}
	for ; len(b) >= 2; b = b[2:] {
		total += uint64(binary.BigEndian.Uint16(b))
	}
	if len(b) == 1 {
		total += uint64(b[0]) << 8
	}
	return total
}

func fold(total uint64) uint16 {
	for total > 0xffff {
		total = total>>16 + total&0xffff
	}
	return uint16(total)
}
