package packet

import (
	"bytes"
	"encoding/binary"
	"math/big"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
)

func TestMulticastMAC(t *testing.T) {
	for group, want := range map[string][6]byte{
		"224.0.0.1":             {1, 0, 0x5e, 0, 0, 1},
		"239.129.2.3":           {1, 0, 0x5e, 1, 2, 3},
		"239.255.255.255":       {1, 0, 0x5e, 0x7f, 0xff, 0xff},
		"::ffff:239.129.2.3":    {1, 0, 0x5e, 1, 2, 3},
		"ff3e::1":               {0x33, 0x33, 0, 0, 0, 1},
		"ff02::1:ff28:9c5a":     {0x33, 0x33, 0xff, 0x28, 0x9c, 0x5a},
		"ff3e::8000:1234:56:78": {0x33, 0x33, 0, 0x56, 0, 0x78},
	} {
		if got := MulticastMAC(netip.MustParseAddr(group)); got != want {
			t.Errorf("%s: %x, want %x", group, got, want)
		}
	}
}

// The worked example of RFC 1071 section 3, and sums that fold more than once.
func TestFold(t *testing.T) {
	if got := fold(sum([]byte{0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7})); got != 0xddf2 {
		t.Errorf("RFC 1071: %#x, want 0xddf2", got)
	}
	for in, want := range map[uint64]uint16{0: 0, 0xffff: 0xffff, 0x10000: 1, 0x1ffff: 1, 0xffffffff: 0xffff, 1<<48 + 1: 2, ^uint64(0): 0xffff} {
		if got := fold(in); got != want {
			t.Errorf("fold(%#x) = %#x, want %#x", in, got, want)
		}
	}
}

// The BPF programs fold sums of 32-bit words by one multiplication (fold of bpf/include/rewrite.h).
func TestFoldByProduct(t *testing.T) {
	product := func(sum uint64) uint16 { return uint16(sum * 0x0001000100010001 >> 48) }
	random := rand.New(rand.NewPCG(1, 1))
	edges := []uint64{0, 1, 2, 15, 16, 0x7fff, 0x8000, 0xfff0, 0xfffd, 0xfffe, 0xffff}
	for range 20 {
		edges = append(edges, random.Uint64()&0xffff)
	}
	for _, high := range edges {
		for _, middle := range edges {
			for _, low := range edges {
				if sum := high<<32 | middle<<16 | low; product(sum) != fold(sum) {
					t.Errorf("%#x: %#x by the product, want %#x", sum, product(sum), fold(sum))
				}
			}
		}
	}
}

// FuzzAppend: whatever the frame, parsing and rewriting stay inside it; what is
// rewritten is what was asked for and nothing else; and right checksums stay
// right.
func FuzzAppend(f *testing.F) {
	for _, dst := range []string{"239.1.1.1", "ff3e::1"} {
		src := netip.MustParseAddr("10.0.0.1")
		if netip.MustParseAddr(dst).Is6() {
			src = netip.MustParseAddr("fd00::1")
		}
		whole := Frame{Dst: netip.MustParseAddr(dst), Src: src, DstPort: 5000, TTL: 9, VLANs: []uint16{0}, Payload: []byte("a payload of some length"), Padding: 3}
		f.Add(whole.Build(), uint64(1), uint16(7), uint8(3), uint8(0x2e), int32(0))
		for _, b := range Fragment(whole.Build(), 77, 16) {
			f.Add(b, uint64(1), uint16(7), uint8(3), uint8(0x2e), int32(1))
			f.Add(b, uint64(1)<<32|1, uint16(7), uint8(8|1), uint8(0x2e), int32(1)) // with another source
		}
		if src.Is6() {
			whole.FirstExtension, whole.Extensions = protocolHopByHop, []byte{60, 0, 1, 4, 0, 0, 0, 0, 17, 0, 1, 4, 0, 0, 0, 0}
			f.Add(whole.Build(), uint64(1), uint16(7), uint8(0x70), uint8(0x2e), int32(-5))
		}
	}
	f.Fuzz(func(t *testing.T, frame []byte, addresses uint64, ports uint16, modes, dscp uint8, shift int32) {
		h, ok := Parse(frame)
		if !ok {
			if h != (Headers{}) {
				t.Fatalf("not parsed, but %+v", h)
			}
			return
		}
		r := Rewrite{DstPort: ports, SrcPort: ports << 1, TTLMode: TTLMode(modes % 3), TTL: dscp, SetDSCP: modes&4 != 0, DSCP: dscp & 0x3f,
			PortAdd: shift != 0, PortShift: shift % 65536, MinTTL: dscp >> 6, VLAN: VLANMode(modes>>4) % 3, VLANID: ports & 0xfff, SetPCP: modes&64 != 0, PCP: dscp & 7}
		if modes&128 != 0 {
			r.OuterVLAN = uint16(addresses)&0xffe + 1
		}
		r.DstMAC[1], r.SrcMAC[5] = modes, dscp
		wide := make([]byte, h.Dst.BitLen()/8)
		binary.NativeEndian.PutUint32(wide, uint32(addresses))
		r.Dst, _ = netip.AddrFromSlice(wide)
		if shift&8 != 0 {
			r.DstLen = uint8(1 + int(dscp)%h.Dst.BitLen())
		}
		if modes&8 != 0 {
			binary.NativeEndian.PutUint32(wide, uint32(addresses>>32))
			r.Src, _ = netip.AddrFromSlice(wide)
		}
		ip, udp := Checksums(frame, &h)
		before := bytes.Clone(frame)
		headers, outcome := r.Append(make([]byte, 3, 3+MaxHeaders), frame, &h)
		if !bytes.Equal(before, frame) {
			t.Fatal("the frame has changed")
		}
		if outcome != Rewritten {
			if len(headers) != 3 {
				t.Fatal("refused, but appended")
			}
			return
		}
		out := append(headers[3:], frame[h.Payload:]...)
		after, ok := Parse(out)
		if !ok {
			t.Fatalf("%x became %x, which does not parse", frame, out)
		}
		checkRewritten(t, &r, &h, &after)
		if gotIP, gotUDP := Checksums(out, &after); (ip && !gotIP) || (udp && !gotUDP) {
			t.Fatalf("checksums were %v and %v, are %v and %v: %x became %x", ip, udp, gotIP, gotUDP, frame, out)
		}
	})
}

// checkRewritten compares the headers after a rewrite with those before.
func checkRewritten(t *testing.T, r *Rewrite, h, after *Headers) {
	t.Helper()
	want := *h
	moved := 0
	switch r.VLAN {
	case VLANPop:
		want.VLAN, want.OuterVLAN, moved = 0, 0, ethLen-h.L3
	case VLANSet:
		want.VLAN, want.OuterVLAN, moved = r.VLANID, r.OuterVLAN, ethLen+vlanLen-h.L3
		if r.OuterVLAN != 0 {
			moved += vlanLen
		}
	}
	want.L3, want.Payload = h.L3+moved, h.Payload+moved
	want.Dst = r.Dst
	if r.DstLen != 0 {
		prefix, host := netip.PrefixFrom(r.Dst, int(r.DstLen)), h.Dst.AsSlice()
		if !prefix.Contains(after.Dst) {
			t.Fatalf("%v is not in %v", after.Dst, prefix)
		}
		got := after.Dst.AsSlice()
		for bit := int(r.DstLen); bit < h.Dst.BitLen(); bit++ {
			if (got[bit/8]^host[bit/8])&(0x80>>(bit%8)) != 0 {
				t.Fatalf("%v became %v in %v: host bits differ", h.Dst, after.Dst, prefix)
			}
		}
		want.Dst = after.Dst
	}
	if r.Src.IsValid() {
		want.Src = r.Src
		if h.Dst.Is4() && h.Part != Whole {
			want.FragmentID = uint32(renumbered(uint16(h.FragmentID), h.Src))
		}
	}
	if h.Part != LaterFragment {
		want.UDP += moved
		want.DstPort = r.DstPort
		if r.PortAdd {
			want.DstPort = uint16(int32(h.DstPort) + r.PortShift)
		}
		if r.SrcPort != 0 {
			want.SrcPort = r.SrcPort
		}
	}
	if *after != want {
		t.Fatalf("%+v became %+v, want %+v", *h, *after, want)
	}
}

// renumbered is the identification of a fragment that leaves with another source address, in the long
// form of docs/rules.md: exclusive or with bits 16 to 31 of the original address times 2^32 divided by the
// golden ratio, both numbers with their first byte lowest.
func renumbered(id uint16, source netip.Addr) uint16 {
	address := new(big.Int)
	for i, b := range source.AsSlice() {
		address.Or(address, new(big.Int).Lsh(big.NewInt(int64(b)), uint(8*i)))
	}
	product := address.Mul(address, big.NewInt(2654435761))
	for bit := range 16 {
		id ^= uint16(product.Bit(16+bit)) << bit
	}
	return id
}

// Identifications on the wire. They must be the same on every path and in every release: two may each
// send fragments of one datagram. The values were computed by another program.
func TestIdentifications(t *testing.T) {
	for _, c := range []struct {
		source       string
		before, want [2]byte
	}{
		{"10.0.0.1", [2]byte{0x00, 0x00}, [2]byte{0x2a, 0xdf}},
		{"10.0.0.1", [2]byte{0x12, 0x34}, [2]byte{0x38, 0xeb}},
		{"10.0.0.2", [2]byte{0x12, 0x34}, [2]byte{0x38, 0xa4}},
		{"192.168.7.7", [2]byte{0xff, 0xff}, [2]byte{0xb1, 0xc3}},
		{"255.255.255.255", [2]byte{0x00, 0x01}, [2]byte{0xc8, 0x60}},
	} {
		source := netip.MustParseAddr(c.source)
		if got := mergedID(c.before, source.As4()); got != c.want {
			t.Errorf("%x of %v became %x, want %x", c.before, source, got, c.want)
		}
		if got := renumbered(binary.LittleEndian.Uint16(c.before[:]), source); got != binary.LittleEndian.Uint16(c.want[:]) {
			t.Errorf("%x of %v is to become %x, want %x", c.before, source, got, c.want)
		}
	}
}

func TestAppendDoesNotAllocate(t *testing.T) {
	frame := Frame{Dst: netip.MustParseAddr("ff3e::1"), Src: netip.MustParseAddr("fd00::1"), DstPort: 5000, TTL: 9, Payload: make([]byte, 100)}.Build()
	r := Rewrite{Dst: netip.MustParseAddr("ff3e::2"), DstPort: 1, VLAN: VLANSet, VLANID: 5, OuterVLAN: 6, DstLen: 64}
	room := make([]byte, 0, MaxHeaders)
	if n := testing.AllocsPerRun(100, func() {
		h, _ := Parse(frame)
		if _, outcome := r.Append(room, frame, &h); outcome != Rewritten {
			t.Fatal(outcome)
		}
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

// The drop eligible indicator (IEEE 802.1Q, bit 12 of the tag) stays whatever happens to the
// priority and the VLAN.
func TestDropEligibleStays(t *testing.T) {
	for name, c := range map[string]struct {
		rewrite  Rewrite
		in, want []uint16
	}{
		"kept":                         {Rewrite{}, []uint16{0xf007}, []uint16{0xf007}},
		"priority set":                 {Rewrite{SetPCP: true, PCP: 2}, []uint16{0xf007}, []uint16{0x5007}},
		"priority set, not eligible":   {Rewrite{SetPCP: true, PCP: 2}, []uint16{0xe007}, []uint16{0x4007}},
		"priority set in both":         {Rewrite{SetPCP: true, PCP: 3}, []uint16{0xe009, 0x1007}, []uint16{0x6009, 0x7007}},
		"VLAN set":                     {Rewrite{VLAN: VLANSet, VLANID: 100}, []uint16{0x7007}, []uint16{0x7064}},
		"VLAN and priority set":        {Rewrite{VLAN: VLANSet, VLANID: 100, SetPCP: true, PCP: 5}, []uint16{0x7007}, []uint16{0xb064}},
		"two tags for one":             {Rewrite{VLAN: VLANSet, VLANID: 100, OuterVLAN: 8, SetPCP: true, PCP: 1}, []uint16{0x1007}, []uint16{0x3008, 0x3064}},
		"new tag with a priority":      {Rewrite{VLAN: VLANSet, VLANID: 100, SetPCP: true, PCP: 5}, nil, []uint16{0xa064}},
		"priority set where no tag is": {Rewrite{SetPCP: true, PCP: 5}, nil, nil},
	} {
		f := Frame{Dst: netip.MustParseAddr("239.1.1.1"), Src: netip.MustParseAddr("10.0.0.1"), DstPort: 5000, TTL: 9, VLANs: c.in, Payload: []byte("payload")}
		frame := f.Build()
		h, ok := Parse(frame)
		if !ok {
			t.Fatalf("%s: not parsed", name)
		}
		r := c.rewrite
		r.Dst, r.DstPort = f.Dst, 6000
		out, outcome := r.Append(nil, frame, &h)
		var tags []uint16
		for at := 12; len(out) > at+4 && (binary.BigEndian.Uint16(out[at:]) == etherVLAN || binary.BigEndian.Uint16(out[at:]) == etherQinQ); at += vlanLen {
			tags = append(tags, binary.BigEndian.Uint16(out[at+2:]))
		}
		if outcome != 0 || !slices.Equal(tags, c.want) {
			t.Errorf("%s: tags %#04x become %#04x (outcome %v), want %#04x", name, c.in, tags, outcome, c.want)
		}
	}
}
