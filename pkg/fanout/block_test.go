package fanout

import (
	"bytes"
	"encoding/binary"
	"net/netip"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"xdpcast/pkg/packet"
)

// rawFrame is a frame as the kernel writes it to a block.
type rawFrame struct {
	data          []byte
	wireLen       int
	status        uint32
	tci, tpid     uint16
	network       int
	flags, gso    uint8
	segment       uint16
	start, offset uint16 // of the checksum
}

// buildBlock lays frames out in a block of the given size.
func buildBlock(size int, frames ...rawFrame) []byte {
	order := binary.NativeEndian
	block := make([]byte, size)
	order.PutUint32(block[offsetOfBlockStatus:], unix.TP_STATUS_USER)
	order.PutUint32(block[offsetOfFrames:], uint32(len(frames)))
	order.PutUint32(block[offsetOfFirstFrame:], uint32(sizeofBlockHdr))
	at := sizeofBlockHdr
	for _, f := range frames {
		const start = 96
		h := block[at:]
		step := (start + len(f.data) + 7) &^ 7
		order.PutUint32(h[offsetOfNext:], uint32(step))
		order.PutUint32(h[inBlock.seconds:], 12)
		order.PutUint32(h[inBlock.nanos:], 34)
		order.PutUint32(h[inBlock.snaplen:], uint32(len(f.data)))
		order.PutUint32(h[inBlock.length:], uint32(max(f.wireLen, len(f.data))))
		order.PutUint32(h[inBlock.status:], unix.TP_STATUS_USER|f.status)
		order.PutUint16(h[inBlock.mac:], start)
		order.PutUint16(h[inBlock.net:], uint16(start+f.network))
		order.PutUint32(h[inBlock.vlan:], uint32(f.tci))
		order.PutUint16(h[inBlock.tpid:], f.tpid)
		v := h[start-sizeofVnetHeader:]
		v[0], v[1] = f.flags, f.gso
		order.PutUint16(v[4:], f.segment)
		order.PutUint16(v[6:], f.start)
		order.PutUint16(v[8:], f.offset)
		copy(h[start:], f.data)
		at += step
	}
	return block
}

// openBlock makes a block to call only Next on.
func openBlock(memory []byte) *Block {
	b := &Block{worker: &Worker{}}
	b.open(memory, 0)
	return b
}

func all(b *Block) (frames []Frame) {
	var f Frame
	for b.Next(&f) {
		frames = append(frames, f)
	}
	return frames
}

// The offsets are those of the structs in x/sys, which are generated from the
// kernel's headers.
func TestOffsets(t *testing.T) {
	var frame unix.Tpacket3Hdr
	var single unix.Tpacket2Hdr
	var block unix.TpacketHdrV1
	hdr := unsafe.Offsetof(unix.TpacketBlockDesc{}.Hdr)
	for _, test := range []struct {
		name string
		got  uintptr
		want int
	}{
		{"block_status", hdr + unsafe.Offsetof(block.Block_status), offsetOfBlockStatus},
		{"num_pkts", hdr + unsafe.Offsetof(block.Num_pkts), offsetOfFrames},
		{"offset_to_first_pkt", hdr + unsafe.Offsetof(block.Offset_to_first_pkt), offsetOfFirstFrame},
		{"tp_next_offset", unsafe.Offsetof(frame.Next_offset), offsetOfNext},
		{"tp_sec", unsafe.Offsetof(frame.Sec), inBlock.seconds},
		{"tp_nsec", unsafe.Offsetof(frame.Nsec), inBlock.nanos},
		{"tp_snaplen", unsafe.Offsetof(frame.Snaplen), inBlock.snaplen},
		{"tp_len", unsafe.Offsetof(frame.Len), inBlock.length},
		{"tp_status", unsafe.Offsetof(frame.Status), inBlock.status},
		{"tp_mac", unsafe.Offsetof(frame.Mac), inBlock.mac},
		{"tp_net", unsafe.Offsetof(frame.Net), inBlock.net},
		{"tp_vlan_tci", unsafe.Offsetof(frame.Hv1) + unsafe.Offsetof(frame.Hv1.Vlan_tci), inBlock.vlan},
		{"tp_vlan_tpid", unsafe.Offsetof(frame.Hv1) + unsafe.Offsetof(frame.Hv1.Vlan_tpid), inBlock.tpid},
		{"tp_sec of tpacket2_hdr", unsafe.Offsetof(single.Sec), inFrameRing.seconds},
		{"tp_nsec of tpacket2_hdr", unsafe.Offsetof(single.Nsec), inFrameRing.nanos},
		{"tp_snaplen of tpacket2_hdr", unsafe.Offsetof(single.Snaplen), inFrameRing.snaplen},
		{"tp_len of tpacket2_hdr", unsafe.Offsetof(single.Len), inFrameRing.length},
		{"tp_status of tpacket2_hdr", unsafe.Offsetof(single.Status), inFrameRing.status},
		{"tp_mac of tpacket2_hdr", unsafe.Offsetof(single.Mac), inFrameRing.mac},
		{"tp_net of tpacket2_hdr", unsafe.Offsetof(single.Net), inFrameRing.net},
		{"tp_vlan_tci of tpacket2_hdr", unsafe.Offsetof(single.Vlan_tci), inFrameRing.vlan},
		{"tp_vlan_tpid of tpacket2_hdr", unsafe.Offsetof(single.Vlan_tpid), inFrameRing.tpid},
	} {
		if int(test.got) != test.want {
			t.Errorf("%s is at %d, not %d", test.name, test.got, test.want)
		}
	}
}

// mergedFrame is the frame of n datagrams of segment bytes, including the tags.
func mergedFrame(v6 bool, tags []uint16, id uint16, dontFragment bool, payload []byte, segment int) rawFrame {
	f := frame(0, 0)
	f.VLANs, f.Payload = tags, payload
	if v6 {
		f.Src, f.Dst = netip.MustParseAddr("fd00::1"), netip.MustParseAddr("ff3e::1")
	}
	data := f.Build()
	h, ok := packet.Parse(data)
	if !ok {
		panic("built no datagram")
	}
	if !v6 {
		binary.BigEndian.PutUint16(data[h.L3+4:], id)
		if dontFragment {
			data[h.L3+6] = 0x40
		}
	}
	return rawFrame{
		data: data, network: etherLen, flags: unix.VIRTIO_NET_HDR_F_NEEDS_CSUM,
		gso: unix.VIRTIO_NET_HDR_GSO_UDP_L4, segment: uint16(segment), start: uint16(h.UDP), offset: 6,
	}
}

// Merged frames of every kind in one block, between plain ones: each datagram has
// its payload, correct headers, and its tags.
func TestSplitTable(t *testing.T) {
	payload := make([]byte, 1001)
	for i := range payload {
		payload[i] = byte(i)
	}
	for _, test := range []struct {
		name         string
		v6           bool
		tags         []uint16 // left in the frame
		id           uint16
		dontFragment bool
		segment      int
		ids          []uint16
	}{
		{"IPv4 counts the identification up", false, nil, 65535, false, 500, []uint16{65535, 0, 1}},
		{"IPv4 counts it up that is not zero", false, nil, 7, true, 500, []uint16{7, 8, 9}},
		{"IPv4 leaves a zero that means nothing", false, nil, 0, true, 500, []uint16{0, 0, 0}},
		{"one datagram", false, nil, 7, false, 1001, []uint16{7}},
		{"IPv6", true, nil, 0, false, 500, make([]uint16, 3)},
		{"an inner tag", false, []uint16{8}, 1, false, 500, []uint16{1, 2, 3}},
		{"inner tags, IPv6", true, []uint16{8, 9}, 0, false, 500, make([]uint16, 3)},
	} {
		t.Run(test.name, func(t *testing.T) {
			merged := mergedFrame(test.v6, test.tags, test.id, test.dontFragment, payload, test.segment)
			merged.status, merged.tci, merged.tpid = unix.TP_STATUS_VLAN_VALID|unix.TP_STATUS_VLAN_TPID_VALID, 5, 0x88a8
			plain := rawFrame{data: frame(1, 1).Build(), network: etherLen}
			block := openBlock(buildBlock(1<<17, plain, merged, merged, plain))
			frames := all(block)
			n := len(test.ids)
			if len(frames) != 2*n+2 || !bytes.Equal(frames[0].Data, plain.data) || !bytes.Equal(frames[2*n+1].Data, plain.data) {
				t.Fatalf("%d frames", len(frames))
			}
			for i, f := range frames[1 : 2*n+1] {
				i %= n
				f.RestoreVLAN()
				if got := f.Data[12:16]; !bytes.Equal(got, []byte{0x88, 0xa8, 0, 5}) || f.WireLen != len(f.Data) || f.Time != 12e9+34 {
					t.Errorf("datagram %d: tag %x, %d bytes, wire length %d, time %d", i, got, len(f.Data), f.WireLen, f.Time)
				}
				data := f.Data
				for range test.tags { // more than packet.Parse supports
					data = append(data[:12:12], data[16:]...)
				}
				h, ok := packet.Parse(data)
				if !ok {
					t.Fatalf("datagram %d: %x", i, data)
				}
				if ip, udp := packet.Checksums(data, &h); !ip || !udp {
					t.Errorf("datagram %d: checksums ip %v, udp %v", i, ip, udp)
				}
				if got, want := data[h.UDP+8:], payload[i*test.segment:min(len(payload), (i+1)*test.segment)]; !bytes.Equal(got, want) {
					t.Errorf("datagram %d: payload %x, want %x", i, got, want)
				}
				if id := binary.BigEndian.Uint16(data[h.L3+4:]); !test.v6 && id != test.ids[i] {
					t.Errorf("datagram %d: identification %d, want %d", i, id, test.ids[i])
				}
			}
		})
	}
}

// Frames that cannot be split are returned whole, with SegmentSize set.
func TestNotSplit(t *testing.T) {
	valid := mergedFrame(false, nil, 0, false, make([]byte, 100), 10)
	for name, change := range map[string]func(*rawFrame){
		"TCP":                      func(f *rawFrame) { f.gso = unix.VIRTIO_NET_HDR_GSO_TCPV4 },
		"cut":                      func(f *rawFrame) { f.wireLen = 2000 },
		"checksum not left":        func(f *rawFrame) { f.flags = 0 },
		"segment size 0":           func(f *rawFrame) { f.gso, f.segment = unix.VIRTIO_NET_HDR_GSO_TCPV6, 0 },
		"checksum outside":         func(f *rawFrame) { f.start = 60000 },
		"checksum elsewhere":       func(f *rawFrame) { f.offset = 4 },
		"network header outside":   func(f *rawFrame) { f.network = 3000 },
		"network header in front":  func(f *rawFrame) { f.network = -5 },
		"neither IPv4 nor IPv6":    func(f *rawFrame) { f.data[etherLen] = 0x55 },
		"IPv4 header of odd size":  func(f *rawFrame) { f.data[etherLen] = 0x46 },
		"IPv6 header is too short": func(f *rawFrame) { f.data[etherLen] = 0x60 },
	} {
		f := valid
		f.data = bytes.Clone(valid.data)
		change(&f)
		b := openBlock(buildBlock(1<<17, f))
		frames := all(b)
		if len(frames) != 1 || frames[0].SegmentSize == 0 || !bytes.Equal(frames[0].Data, f.data) {
			t.Errorf("%s: %+v", name, frames)
		}
	}
}

// Invalid data ends the block, and is counted.
func TestMalformed(t *testing.T) {
	plain := rawFrame{data: frame(1, 1).Build(), network: etherLen}
	order := binary.NativeEndian
	second := sizeofBlockHdr + int(order.Uint32(buildBlock(1<<17, plain)[sizeofBlockHdr:]))
	for name, change := range map[string]func(block []byte){
		"next frame outside":  func(b []byte) { order.PutUint32(b[sizeofBlockHdr+offsetOfNext:], 1<<31) },
		"next frame is this":  func(b []byte) { order.PutUint32(b[sizeofBlockHdr+offsetOfNext:], 0) },
		"length outside":      func(b []byte) { order.PutUint32(b[second+inBlock.snaplen:], 1<<17) },
		"data in the header":  func(b []byte) { order.PutUint16(b[second+inBlock.mac:], 20) },
		"more than there are": func(b []byte) { order.PutUint32(b[offsetOfFrames:], 1<<31) },
		"first frame outside": func(b []byte) { order.PutUint32(b[offsetOfFirstFrame:], 1<<17-8) },
	} {
		memory := buildBlock(1<<17, plain, plain)
		change(memory)
		want := uint64(order.Uint32(memory[offsetOfFrames:]))
		b := openBlock(memory)
		n := uint64(len(all(b)))
		if got := b.worker.malformed.Load(); got == 0 || n+got != want {
			t.Errorf("%s: %d handed out and %d malformed of %d", name, n, got, want)
		}
	}
}

// A frame that the kernel dropped after reserving room is skipped, regardless of its memory's
// contents; later frames are returned.
func TestVoidFrames(t *testing.T) {
	plain := rawFrame{data: frame(1, 1).Build(), network: etherLen}
	for at := range 3 {
		memory := buildBlock(1<<17, plain, plain, plain)
		header := sizeofBlockHdr
		for range at {
			header += int(binary.NativeEndian.Uint32(memory[header:]))
		}
		binary.NativeEndian.PutUint32(memory[header+inBlock.status:], unix.TP_STATUS_VLAN_VALID)
		clear(memory[header+inBlock.snaplen : header+inBlock.size])
		b := openBlock(memory)
		if n := len(all(b)); n != 2 || b.voids != 1 || b.worker.malformed.Load() != 0 {
			t.Errorf("frame %d is void: %d handed out, %d void, %d malformed", at, n, b.voids, b.worker.malformed.Load())
		}
	}
}

// TestChecksumRefused: CompleteChecksum does not write outside the frame.
func TestChecksumRefused(t *testing.T) {
	for _, f := range []rawFrame{
		{start: 60000, offset: 6}, {start: 34, offset: 60000}, {start: 34, offset: 6, wireLen: 3000},
	} {
		f.data, f.flags = frame(1, 1).Build(), unix.VIRTIO_NET_HDR_F_NEEDS_CSUM
		got := all(openBlock(buildBlock(1<<17, f)))[0]
		if got.CompleteChecksum() || !got.ChecksumPartial || !bytes.Equal(got.Data, f.data) {
			t.Errorf("%+v: completed", f)
		}
	}
}

// FuzzBlock: for any contents of a block, nothing panics, no frame extends beyond the
// block, and each is returned or counted.
func FuzzBlock(f *testing.F) {
	f.Add(buildBlock(2048, mergedFrame(false, nil, 3, false, make([]byte, 300), 100)))
	f.Add(buildBlock(2048, mergedFrame(true, []uint16{8}, 3, false, make([]byte, 300), 7), rawFrame{data: frame(0, 0).Build()}))
	f.Add(buildBlock(1024, rawFrame{data: frame(0, 0).Build(), status: unix.TP_STATUS_VLAN_VALID, tci: 5, flags: 1, start: 34, offset: 6}))
	f.Fuzz(func(t *testing.T, memory []byte) {
		if len(memory) < sizeofBlockHdr {
			return
		}
		b := openBlock(memory)
		left, n := uint64(b.left), uint64(0)
		var fr Frame
		for ; b.Next(&fr); n++ {
			if len(fr.Data) > len(memory) || len(fr.room) != len(fr.Data)+vlanLen {
				t.Fatalf("%d bytes with room %d out of %d", len(fr.Data), len(fr.room), len(memory))
			}
			fr.CompleteChecksum()
			fr.RestoreVLAN()
		}
		if b.left != 0 || n+uint64(b.voids)+b.worker.malformed.Load() < left {
			t.Fatalf("%d handed out and %d malformed of %d", n, b.worker.malformed.Load(), left)
		}
	})
}

// A checksum of zero is sent as 0xffff: zero would mean no checksum (RFC 768), and IPv6
// forbids it.
func TestChecksumIsNeverZero(t *testing.T) {
	const udp, check = 34, 34 + 6
	data := frame(1, 1).Build()
	// Partial, as the kernel leaves it: only the sum of the pseudo header.
	pseudo := sum(data[26:34]) + unix.IPPROTO_UDP + uint64(len(data)-udp)
	binary.BigEndian.PutUint16(data[check:], fold(pseudo))
	// The last word of the payload makes the whole sum 0xffff, whose complement is zero.
	last := data[len(data)-2:]
	if len(data[udp:])%2 != 0 {
		last = data[len(data)-3:]
	}
	binary.BigEndian.PutUint16(last, 0)
	binary.BigEndian.PutUint16(last, 0xffff-fold(sum(data[udp:])))
	got := all(openBlock(buildBlock(1<<17, rawFrame{data: data, flags: unix.VIRTIO_NET_HDR_F_NEEDS_CSUM, start: udp, offset: 6})))[0]
	if !got.CompleteChecksum() {
		t.Fatal("not completed")
	}
	if sent := binary.BigEndian.Uint16(got.Data[check:]); sent != 0xffff {
		t.Errorf("checksum %#04x, want 0xffff", sent)
	}
	h, ok := packet.Parse(got.Data)
	if !ok {
		t.Fatal("not parsed")
	}
	if _, right := packet.Checksums(got.Data, &h); !right {
		t.Error("the checksum is wrong")
	}
}
