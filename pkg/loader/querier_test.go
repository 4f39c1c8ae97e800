package loader

import (
	"bytes"
	"encoding/binary"
	"net/netip"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"golang.org/x/sync/errgroup"
)

// igmp4 is a frame with an IGMP message from 10.0.0.254. None of it is built by the code under
// test.
func igmp4(vlans []uint16, options, message []byte) []byte {
	ip := []byte{0x45, 0xc0, 0, 0, 0, 0, 0, 0, 1, 2, 0, 0, 10, 0, 0, 254, 224, 0, 0, 1}
	ip[0] += byte(len(options) / 4)
	ip = append(append(ip, options...), message...)
	binary.BigEndian.PutUint16(ip[2:], uint16(len(ip)))
	return append(ethernet(0x0800, vlans), ip...)
}

// mld6 is a frame with an MLD message from fe80::1, after hop-by-hop options.
func mld6(vlans []uint16, options, message []byte) []byte {
	hop := append([]byte{58, byte((2+len(options))/8 - 1)}, options...)
	payload := append(hop, message...)
	ip := []byte{0x60, 0, 0, 0, 0, 0, 0, 1}
	binary.BigEndian.PutUint16(ip[4:], uint16(len(payload)))
	src, dst := netip.MustParseAddr("fe80::1").As16(), netip.MustParseAddr("ff02::1").As16()
	ip = append(append(ip, src[:]...), dst[:]...)
	return append(ethernet(0x86dd, vlans), append(ip, payload...)...)
}

func ethernet(etherType uint16, vlans []uint16) []byte {
	b := []byte{1, 0, 0x5e, 0, 0, 1, 2, 0, 0, 0, 0, 9}
	for _, tci := range vlans {
		b = binary.BigEndian.AppendUint16(b, 0x8100)
		b = binary.BigEndian.AppendUint16(b, tci)
	}
	return binary.BigEndian.AppendUint16(b, etherType)
}

// message is an IGMP or MLD message of n bytes.
func message(n int, kind, code byte) []byte {
	b := make([]byte, n)
	b[0] = kind
	if n > 1 {
		b[1] = code
	}
	return b
}

var (
	routerAlert4 = []byte{0x94, 4, 0, 0}       // RFC 2113
	routerAlert6 = []byte{5, 2, 0, 0, 1, 0}    // RFC 2711, and PadN
	longOptions6 = bytes.Repeat([]byte{0}, 14) // Pad1
)

// Queries are counted with their version, and pass untouched like all packets that no rule matches.
func TestQueriers(t *testing.T) {
	t.Parallel()
	const igmpQuery, mldQuery = 0x11, 130
	edit := func(b []byte, change func(b []byte)) []byte { change(b); return b }
	cases := []struct {
		name    string
		frame   []byte
		linear  int // bytes in the first buffer; 0: all
		family  int
		version int // 0: no query
	}{
		{name: "igmpv1", frame: igmp4(nil, nil, message(8, igmpQuery, 0)), family: 4, version: 1},
		{name: "igmpv2", frame: igmp4(nil, nil, message(8, igmpQuery, 100)), family: 4, version: 2},
		{name: "igmpv2 with router alert", frame: igmp4(nil, routerAlert4, message(8, igmpQuery, 100)), family: 4, version: 2},
		{name: "igmpv3", frame: igmp4(nil, routerAlert4, message(12, igmpQuery, 100)), family: 4, version: 3},
		{name: "igmpv3 without router alert", frame: igmp4(nil, nil, message(12, igmpQuery, 100)), family: 4, version: 3},
		{name: "igmpv3, code 0", frame: igmp4(nil, routerAlert4, message(12, igmpQuery, 0)), family: 4, version: 3},
		{name: "igmpv3 with sources", frame: igmp4(nil, routerAlert4, message(12+4*300, igmpQuery, 100)), family: 4, version: 3},
		{name: "igmp, all the options there can be", frame: igmp4(nil, bytes.Repeat([]byte{1}, 40), message(8, igmpQuery, 1)), family: 4, version: 2},
		{name: "igmp, ethernet padding", frame: append(igmp4(nil, nil, message(8, igmpQuery, 100)), make([]byte, 18)...), family: 4, version: 2},
		{name: "igmp, priority tag", frame: igmp4([]uint16{0xe000}, nil, message(8, igmpQuery, 100)), family: 4, version: 2},
		{name: "igmp, spread over buffers", frame: igmp4(nil, nil, message(200, igmpQuery, 100)), linear: 64, family: 4, version: 3},

		{name: "igmp in a vlan", frame: igmp4([]uint16{7}, nil, message(8, igmpQuery, 100))},
		{name: "igmp in a vlan behind a priority tag", frame: igmp4([]uint16{0xe000, 7}, nil, message(8, igmpQuery, 100))},
		{name: "igmpv1 report", frame: igmp4(nil, nil, message(8, 0x12, 0))},
		{name: "igmpv2 report", frame: igmp4(nil, routerAlert4, message(8, 0x16, 0))},
		{name: "igmpv2 leave", frame: igmp4(nil, routerAlert4, message(8, 0x17, 0))},
		{name: "igmpv3 report", frame: igmp4(nil, routerAlert4, message(16, 0x22, 0))},
		{name: "igmp of 9 bytes", frame: igmp4(nil, nil, message(9, igmpQuery, 100))},
		{name: "igmp of 11 bytes", frame: igmp4(nil, nil, message(11, igmpQuery, 100))},
		{name: "igmp of 7 bytes", frame: igmp4(nil, nil, message(7, igmpQuery, 100))},
		{name: "igmp of 7 bytes, padded", frame: append(igmp4(nil, nil, message(7, igmpQuery, 100)), make([]byte, 20)...)},
		{name: "igmp without a message", frame: igmp4(nil, nil, nil)},
		{name: "igmp cut short", frame: igmp4(nil, nil, message(12, igmpQuery, 100))[:14+20+11]},
		{name: "igmp, ip length under its header", frame: edit(igmp4(nil, nil, message(8, igmpQuery, 100)), func(b []byte) { put16(b, atIP+2, 19) })},
		{name: "igmp, ihl 4", frame: edit(igmp4(nil, nil, message(8, igmpQuery, 100)), func(b []byte) { b[atIP] = 0x44 })},
		{name: "igmp, ihl beyond the packet", frame: edit(igmp4(nil, nil, message(8, igmpQuery, 100)), func(b []byte) { b[atIP] = 0x4f })},
		{name: "igmp, first fragment", frame: edit(igmp4(nil, nil, message(8, igmpQuery, 100)), func(b []byte) { put16(b, atIP+6, 0x2000) })},
		{name: "igmp, later fragment", frame: edit(igmp4(nil, nil, message(8, igmpQuery, 100)), func(b []byte) { put16(b, atIP+6, 5) })},
		{name: "igmp, version 6", frame: edit(igmp4(nil, nil, message(8, igmpQuery, 100)), func(b []byte) { b[atIP] = 0x65 })},
		{name: "icmp that looks like a query", frame: edit(igmp4(nil, nil, message(8, igmpQuery, 100)), func(b []byte) { b[atIP+9] = 1 })},

		{name: "mldv1", frame: mld6(nil, routerAlert6, message(24, mldQuery, 0)), family: 6, version: 1},
		{name: "mldv2", frame: mld6(nil, routerAlert6, message(28, mldQuery, 0)), family: 6, version: 2},
		{name: "mldv2 with sources", frame: mld6(nil, routerAlert6, message(28+16*80, mldQuery, 0)), family: 6, version: 2},
		{name: "mldv2, long options", frame: mld6(nil, longOptions6, message(28, mldQuery, 0)), family: 6, version: 2},
		{name: "mldv2, priority tag", frame: mld6([]uint16{0x2000}, routerAlert6, message(28, mldQuery, 0)), family: 6, version: 2},

		{name: "mld in a vlan", frame: mld6([]uint16{7}, routerAlert6, message(28, mldQuery, 0))},
		{name: "mldv1 report", frame: mld6(nil, routerAlert6, message(24, 131, 0))},
		{name: "mldv1 done", frame: mld6(nil, routerAlert6, message(24, 132, 0))},
		{name: "mldv2 report", frame: mld6(nil, routerAlert6, message(28, 143, 0))},
		{name: "mld of 23 bytes", frame: mld6(nil, routerAlert6, message(23, mldQuery, 0))},
		{name: "mld of 27 bytes", frame: mld6(nil, routerAlert6, message(27, mldQuery, 0))},
		{name: "mld cut short", frame: func() []byte {
			b := mld6(nil, routerAlert6, message(28, mldQuery, 0))
			return b[:len(b)-1]
		}()},
		{name: "mld without a message", frame: mld6(nil, routerAlert6, nil)},
		{name: "mld, options beyond the packet", frame: edit(mld6(nil, routerAlert6, message(28, mldQuery, 0)), func(b []byte) { b[55] = 255 })},
		{name: "mld, payload length under the options", frame: edit(mld6(nil, routerAlert6, message(28, mldQuery, 0)), func(b []byte) { put16(b, atIP+4, 7) })},
		{name: "mld without hop-by-hop options", frame: edit(mld6(nil, routerAlert6, message(28, mldQuery, 0)), func(b []byte) { b[atIP+6] = 58 })},
		{name: "mld behind another header", frame: edit(mld6(nil, routerAlert6, message(28, mldQuery, 0)), func(b []byte) { b[54] = 60 })},
		{name: "mld from a routed address", frame: edit(mld6(nil, routerAlert6, message(28, mldQuery, 0)), func(b []byte) { b[22], b[23] = 0x20, 1 })},
		{name: "mld with a hop limit of 2", frame: edit(mld6(nil, routerAlert6, message(28, mldQuery, 0)), func(b []byte) { b[21] = 2 })},
		{name: "arp", frame: append(ethernet(0x0806, nil), make([]byte, 28)...)},
	}
	n, r := programLab(t, 1)
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			r.enter(t)
			if err := r.l.dropQueriers(n.in.Index); err != nil {
				t.Fatal(err)
			}
			linear := c.linear
			if linear == 0 {
				linear = len(c.frame)
			} else if !r.partial {
				t.Skip("this kernel does not run programs on frames in several buffers of any size")
			}
			before := globalStats(t, r.l)
			const times = 3
			for range times {
				verdict, out := r.must(t, r.l.relay, n.in.Index, c.frame, linear)
				if verdict != xdpPass || !bytes.Equal(out, c.frame) {
					t.Errorf("verdict %d, want pass; frame\n got %x\nwant %x", verdict, out, c.frame)
				}
			}
			after := globalStats(t, r.l)
			var want []Querier
			if c.version != 0 {
				from := map[int]string{4: "10.0.0.254", 6: "fe80::1"}[c.family]
				want = []Querier{{Index: n.in.Index, Family: c.family, Version: c.version, Address: netip.MustParseAddr(from), Packets: times}}
			}
			if diff := cmp.Diff(want, after.Queriers, cmpopts.IgnoreFields(Querier{}, "LastSeen"), cmpopts.EquateComparable(netip.Addr{})); diff != "" {
				t.Errorf("queriers (-want +got):\n%s", diff)
			}
			after.Passed.subtract(before.Passed)
			if want := (Counter{times, times * uint64(len(c.frame))}); after.Passed != want {
				t.Errorf("passed %+v, want %+v", after.Passed, want)
			}
		})
	}
}

// The last querier is shown; all queries are counted, separately for each interface and family.
func TestQueriersByInterface(t *testing.T) {
	t.Parallel()
	n, r := programLab(t, 1)
	send := func(index int, frame []byte) { r.must(t, r.l.relay, index, frame, len(frame)) }
	v2, v3 := igmp4(nil, nil, message(8, 0x11, 100)), igmp4(nil, nil, message(12, 0x11, 100))
	v3[atIP+15] = 253
	send(n.in.Index, v2)
	send(n.in.Index, v3)
	send(n.in.Index, mld6(nil, routerAlert6, message(24, 130, 0)))
	send(n.out[0].Index, v2)
	want := []Querier{
		{Index: n.in.Index, Family: 4, Version: 3, Address: netip.MustParseAddr("10.0.0.253"), Packets: 2},
		{Index: n.in.Index, Family: 6, Version: 1, Address: netip.MustParseAddr("fe80::1"), Packets: 1},
		{Index: n.out[0].Index, Family: 4, Version: 2, Address: netip.MustParseAddr("10.0.0.254"), Packets: 1},
	}
	check := func() {
		t.Helper()
		got := globalStats(t, r.l).Queriers
		if diff := cmp.Diff(want, got, cmpopts.IgnoreFields(Querier{}, "LastSeen"), cmpopts.EquateComparable(netip.Addr{})); diff != "" {
			t.Errorf("queriers (-want +got):\n%s", diff)
		}
		for _, q := range got {
			if q.LastSeen < 0 || q.LastSeen > time.Minute {
				t.Errorf("last seen %s ago", q.LastSeen)
			}
		}
	}
	check()
	// They are removed with the program.
	if err := r.l.Detach(n.in.Index); err != nil {
		t.Fatal(err)
	}
	want = want[2:]
	check()
}

// Queries heard by several CPUs at once are all counted.
func TestQueriersAtOnce(t *testing.T) {
	t.Parallel()
	n, r := programLab(t, 1)
	const goroutines, each = 4, 500
	frame := mld6(nil, routerAlert6, message(28, 130, 0))
	var running errgroup.Group
	for range goroutines {
		running.Go(func() error {
			return n.relay.Do(func() error {
				own := &runner{l: r.l, out: make([]byte, 1<<16)}
				for range each {
					if _, _, err := own.try(r.l.relay, n.in.Index, frame, len(frame)); err != nil {
						return err
					}
				}
				return nil
			})
		})
	}
	if err := running.Wait(); err != nil {
		t.Fatal(err)
	}
	got := globalStats(t, r.l).Queriers
	if len(got) != 1 || got[0].Packets != goroutines*each {
		t.Errorf("queriers %+v, want one of %d queries", got, goroutines*each)
	}
}

// A process that takes over keeps the queriers heard on interfaces that still have the program, and
// forgets the others.
func TestAdoptQueriers(t *testing.T) {
	t.Parallel()
	n := newLab(t, 1)
	opts := testOptions(t)
	l := open(t, opts)
	attachAll(t, l, n.in, n.out[0])
	r := newRunner(t, l, n.relay)
	frame := igmp4(nil, nil, message(12, 0x11, 100))
	r.must(t, l.relay, n.in.Index, frame, len(frame))
	r.must(t, l.relay, n.out[0].Index, frame, len(frame))
	closeLoader(t, l)
	dev, err := n.relay.Link(n.in.Name)
	if err != nil {
		t.Fatal(err)
	}
	if err := n.relay.Netlink().LinkDel(dev); err != nil {
		t.Fatal(err)
	}
	got := globalStats(t, open(t, opts)).Queriers
	if len(got) != 1 || got[0].Index != n.out[0].Index || got[0].Version != 3 {
		t.Errorf("queriers %+v, want that of interface %d alone", got, n.out[0].Index)
	}
}
