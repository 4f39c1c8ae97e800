package packet

import (
	"bytes"
	"encoding/binary"
	"net/netip"
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

// FuzzApply: whatever the frame, parsing and rewriting stay inside it; what is
// rewritten is what was asked for and nothing else; and right checksums stay
// right.
func FuzzApply(f *testing.F) {
	for _, dst := range []string{"239.1.1.1", "ff3e::1"} {
		src := netip.MustParseAddr("10.0.0.1")
		if netip.MustParseAddr(dst).Is6() {
			src = netip.MustParseAddr("fd00::1")
		}
		f.Add(Frame{Dst: netip.MustParseAddr(dst), Src: src, DstPort: 5000, TTL: 9, VLANs: []uint16{0}, Payload: []byte("payload"), Padding: 3}.Build(), uint64(1), uint16(7), uint8(3), uint8(0x2e))
	}
	f.Fuzz(func(t *testing.T, frame []byte, addresses uint64, ports uint16, modes, dscp uint8) {
		h, ok := Parse(frame)
		if !ok {
			if h != (Headers{}) {
				t.Fatalf("not parsed, but %+v", h)
			}
			return
		}
		r := Rewrite{DstPort: ports, SrcPort: ports << 1, TTLMode: TTLMode(modes % 3), TTL: dscp, SetDSCP: modes&4 != 0, DSCP: dscp & 0x3f}
		r.DstMAC[0], r.SrcMAC[5] = modes, dscp
		wide := make([]byte, h.Dst.BitLen()/8)
		binary.NativeEndian.PutUint32(wide, uint32(addresses))
		r.Dst, _ = netip.AddrFromSlice(wide)
		if modes&8 != 0 {
			binary.NativeEndian.PutUint32(wide, uint32(addresses>>32))
			r.Src, _ = netip.AddrFromSlice(wide)
		}
		ip, udp := Checksums(frame, &h)
		out := bytes.Clone(frame)
		if !r.Apply(out, &h) {
			if !bytes.Equal(out, frame) {
				t.Fatal("refused, but changed")
			}
			return
		}
		after, ok := Parse(out)
		if !ok {
			t.Fatalf("%x became %x, which does not parse", frame, out)
		}
		want := h
		want.Dst, want.DstPort = r.Dst, r.DstPort
		if r.Src.IsValid() {
			want.Src = r.Src
		}
		if r.SrcPort != 0 {
			want.SrcPort = r.SrcPort
		}
		if after != want {
			t.Fatalf("%+v became %+v, want %+v", h, after, want)
		}
		if !bytes.Equal(out[h.UDP+8:], frame[h.UDP+8:]) || !bytes.Equal(out[12:h.L3], frame[12:h.L3]) {
			t.Fatal("payload or tags have changed")
		}
		if gotIP, gotUDP := Checksums(out, &after); (ip && !gotIP) || (udp && !gotUDP) {
			t.Fatalf("checksums were %v and %v, are %v and %v: %x became %x", ip, udp, gotIP, gotUDP, frame, out)
		}
	})
}
