package flowtest

import (
	"bytes"
	"encoding/binary"
	"net/netip"

	"xdpcast/pkg/flow"
	"xdpcast/pkg/packet"
)

// Frame returns the frames of Frames one by one.
func (w *World) Frame(rules []flow.Flow) (index int, frame []byte) {
	if len(w.fragments) == 0 {
		w.index, w.fragments = w.Frames(rules)
	}
	frame = w.fragments[0]
	w.fragments = w.fragments[1:]
	return w.index, frame
}

// Frames draws a frame, or the fragments of one, and the index of their input interface. Most are
// valid and match one of the rules; the others are broken.
func (w *World) Frames(rules []flow.Flow) (index int, frames [][]byte) {
	groups, sources := w.values()
	f := packet.Frame{
		SrcMAC: [6]byte{2, 0, 0, 0, 0, 1}, Src: w.addr(sources), Dst: w.addr(groups),
		SrcPort: uint16(w.Uint32()), DstPort: Pick(w, ports...),
		TTL: Pick[uint8](w, 0, 1, 2, 64, 255), TOS: uint8(w.Uint32()),
		NoChecksum: w.Chance(10), Payload: make([]byte, Pick(w, 0, 1, 2, 31, 32, 33, 72, 73, w.IntN(1600))),
	}
	index = Pick(w, w.In...).Index
	if len(rules) > 0 && w.Chance(70) {
		in := Pick(w, rules...).In
		index = in.Index
		w.address(&f, in)
	}
	if f.DstMAC = packet.MulticastMAC(f.Dst); !f.Dst.IsMulticast() && w.Chance(80) {
		f.DstMAC = w.mac(index)
	}
	if w.Chance(3) {
		f.SrcMAC = Pick(w, w.In...).MAC
	}
	w.decorate(&f)
	b := f.Build()
	if w.Chance(15) && f.Extensions == nil {
		frames = packet.Fragment(b, w.Uint32(), 8*(1+w.IntN(40)))
		if w.Chance(30) {
			w.Shuffle(len(frames), func(i, j int) { frames[i], frames[j] = frames[j], frames[i] })
		}
		if len(frames) == 0 { // more tags than Fragment parses
			return w.Frames(rules)
		}
		return index, frames
	}
	if w.Chance(40) {
		b = w.mutate(b)
	}
	return index, [][]byte{b}
}

// address usually makes an input take a frame.
func (w *World) address(f *packet.Frame, in flow.Input) {
	f.Dst = in.Group
	if in.Port != 0 {
		f.DstPort = in.Port
	}
	if in.PortTo != 0 {
		f.DstPort = Pick(w, in.PortTo, in.PortTo-1, in.PortTo+1)
	}
	if in.Len != 0 {
		f.Dst = w.within(in)
	}
	if in.VLAN != 0 {
		f.VLANs = []uint16{uint16(w.IntN(16))<<12 | in.VLAN}
	}
	if in.OuterVLAN != 0 {
		f.VLANs = []uint16{in.OuterVLAN, f.VLANs[0]}
	}
	if f.Src = in.Source; !f.Src.IsValid() || w.Chance(20) {
		f.Src = w.random(in.Group)
	}
	switch {
	case in.BySource && in.Source.IsValid() && w.Chance(50):
		f.Src = w.within(flow.Input{Group: in.Source, Len: in.SourceLen})
	case in.BySource && w.Chance(80):
		f.Src = w.addr(map[bool][]string{true: sources4, false: sources6}[in.Group.Is4()])
	}
}

// within draws an address of a prefix.
func (w *World) within(in flow.Input) netip.Addr {
	host, group := w.random(in.Group).AsSlice(), in.Group.AsSlice()
	for bit := range in.Len {
		mask := byte(0x80 >> (bit % 8))
		host[bit/8] = host[bit/8]&^mask | group[bit/8]&mask
	}
	a, _ := netip.AddrFromSlice(host)
	return a
}

// mac is the MAC address of the input with an index.
func (w *World) mac(index int) [6]byte {
	for _, in := range w.In {
		if in.Index == index {
			return in.MAC
		}
	}
	return w.In[0].MAC
}

// decorate fills the payload, and adds tags, options, extension headers and padding.
func (w *World) decorate(f *packet.Frame) {
	fill := Pick(w, 0, 0xff, 0x1ff)
	for i := range f.Payload {
		f.Payload[i] = byte(min(fill, 0xff))
		if fill == 0x1ff {
			f.Payload[i] = byte(w.Uint32())
		}
	}
	if w.Chance(10) {
		f.VLANs = append(f.VLANs, Pick[uint16](w, 0, 0xe000, 7, 0x1007))
		if w.Chance(30) {
			f.VLANs = append(f.VLANs, Pick[uint16](w, 0, 9))
		}
	}
	if w.Chance(10) && f.Dst.Is4() {
		f.Options = bytes.Repeat([]byte{1}, 4*(1+w.IntN(10)))
	}
	if w.Chance(10) && f.Dst.Is6() {
		f.FirstExtension, f.Extensions = w.extensions()
	}
	if w.Chance(20) {
		f.Padding = w.IntN(20)
	}
}

// extensions draws IPv6 extension headers that usually lead to UDP.
func (w *World) extensions() (first uint8, b []byte) {
	const udp, hopByHop, destination, routing, fragment = 17, 0, 60, 43, 44
	kinds := []uint8{udp}
	for range 1 + w.IntN(5) {
		kinds = append(kinds, Pick[uint8](w, hopByHop, destination, fragment, routing))
	}
	for i := 1; i < len(kinds); i++ {
		length := 0
		if kinds[i] != fragment {
			length = Pick(w, 0, 0, 1, 9, 19)
		}
		ext := make([]byte, 8+8*length)
		ext[0], ext[1] = kinds[i-1], byte(length)
		if kinds[i] == fragment {
			ext[1] = 0
			binary.BigEndian.PutUint16(ext[2:], Pick[uint16](w, 0, 0, 1, 8))
		}
		b = append(ext, b...)
	}
	return kinds[len(kinds)-1], b
}

// mutate breaks a frame in one or more places.
func (w *World) mutate(b []byte) []byte {
	headers := min(len(b), 80)
	switch w.IntN(5) {
	case 0: // one bit of a header
		b[w.IntN(headers)] ^= 1 << w.IntN(8)
	case 1: // one byte of a header
		b[w.IntN(headers)] = byte(w.Uint32())
	case 2: // truncated
		b = b[:max(14, w.IntN(len(b)))]
	case 3: // a fragment, if the packet is untagged IPv4
		if len(b) > 14+8 {
			binary.BigEndian.PutUint16(b[14+6:], Pick[uint16](w, 0x2000, 0x4000, 1, 0x2001, 0x8000))
		}
	default: // a mix of everything
		for range 1 + w.IntN(6) {
			b[w.IntN(len(b))] ^= byte(1 + w.IntN(255))
		}
	}
	return b
}
