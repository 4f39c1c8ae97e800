// Package flowtest generates random flows and frames, and finds the flow of a frame in plain Go.
// With it the tests of package loader compare the BPF programs with an oracle, and those of package
// forward the engine of the user-space paths.
package flowtest

import (
	"fmt"
	"math/rand/v2"
	"net/netip"

	"xdpcast/pkg/flow"
	"xdpcast/pkg/packet"
)

// Interface is an input or an output of the flows.
type Interface struct {
	Index int
	MAC   [6]byte
}

// World draws flows and frames from few values, so that they often match. The same Rand gives the
// same results. A World is not for concurrent use.
type World struct {
	*rand.Rand
	In, Out []Interface

	// Fragments that Frame has yet to return, and the index of their interface.
	fragments [][]byte
	index     int
}

var (
	groups4  = []string{"239.1.1.1", "239.129.1.1", "239.1.2.1", "10.0.0.2", "255.255.255.255", "10.0.0.255"}
	groups6  = []string{"ff3e::1", "ff3e::8000:1", "fd00::2"}
	sources4 = []string{"192.168.7.7", "192.168.7.9", "192.168.9.9", "192.1.7.7", "255.255.255.255"}
	sources6 = []string{"2001:db8::7", "2001:db8::9", "2001:dbf::7", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"}
	ports    = []uint16{1, 5000, 65535}
)

// OwnAddresses returns the senders that a test should declare the host's own: some of the frames'
// senders.
func OwnAddresses() []netip.Addr {
	return []netip.Addr{netip.MustParseAddr("192.168.7.9"), netip.MustParseAddr("2001:db8::9")}
}

// Pick draws one of several values.
func Pick[T any](w *World, from ...T) T { return from[w.IntN(len(from))] }

// Chance is true in this percentage of draws.
func (w *World) Chance(percent int) bool { return w.IntN(100) < percent }

func (w *World) addr(of []string) netip.Addr { return netip.MustParseAddr(Pick(w, of...)) }

// values draws a family, and returns its groups and sources.
func (w *World) values() (groups, sources []string) {
	if w.Chance(40) {
		return groups6, sources6
	}
	return groups4, sources4
}

// random draws an address of a family, with runs of zeros and ones.
func (w *World) random(family netip.Addr) netip.Addr {
	b := make([]byte, family.BitLen()/8)
	for i := range b {
		b[i] = Pick(w, 0, 0xff, byte(w.Uint32()))
	}
	a, _ := netip.AddrFromSlice(b)
	return a
}

// Rules draws a set of flows with different inputs. Their names begin with the number of the set,
// so that sets share no counters.
func (w *World) Rules(set int) (rules []flow.Flow) {
	inputs := map[flow.Input]bool{}
	for i := range 1 + w.IntN(12) {
		groups, sources := w.values()
		in := Pick(w, w.In...)
		r := flow.Flow{Name: fmt.Sprintf("set%d-%d", set, i), In: flow.Input{Index: in.Index, MAC: in.MAC, Group: w.addr(groups), Port: Pick(w, ports...)}}
		if w.Chance(40) {
			r.In.Source = w.addr(sources)
		}
		if w.Chance(25) {
			r.In.Port = 0
		}
		if w.Chance(30) {
			r.In.Len = Pick(w, 4, 8, 16, 24, 31)
			r.In.Group = netip.PrefixFrom(r.In.Group, r.In.Len).Masked().Addr()
		}
		if w.Chance(30) {
			r.In.VLAN, r.In.OuterVLAN = Pick[uint16](w, 7, 4094), Pick[uint16](w, 0, 0, 9)
		}
		r.Broadcast = r.In.Len == 0 && r.In.Group.Is4() && !r.In.Group.IsMulticast() && w.Chance(50)
		r.AllowLoop, r.AllowNoChecksum = w.Chance(20), w.Chance(20)
		w.spread(&r, sources)
		taken := false
		for in := range r.In.Key().EveryPort() {
			taken = taken || inputs[in]
		}
		if taken {
			continue
		}
		for in := range r.In.Key().EveryPort() {
			inputs[in] = true
		}
		for range Pick(w, 1, 1, 2, 3, 5, 64) {
			r.Out = append(r.Out, w.Output(r.In.Group))
		}
		rules = append(rules, r)
	}
	return rules
}

// spread makes a flow take a range of ports, a source prefix, or any source except some.
func (w *World) spread(r *flow.Flow, sources []string) {
	in := &r.In
	if in.Port == 5000 && w.Chance(30) {
		in.PortTo = Pick[uint16](w, 5001, 5003)
	}
	if !w.Chance(40) {
		return
	}
	in.BySource, in.Source = true, netip.Addr{}
	if w.Chance(70) {
		in.SourceLen = Pick(w, 8, 16, 24, 31)
		in.Source = netip.PrefixFrom(w.addr(sources), in.SourceLen).Masked().Addr()
	}
	for range w.IntN(3) {
		source := w.addr(sources)
		p := netip.PrefixFrom(source, Pick(w, 9, 17, 25, source.BitLen())).Masked()
		if p.Bits() > in.SourceLen && (!in.Source.IsValid() || netip.PrefixFrom(in.Source, in.SourceLen).Contains(source)) {
			r.Except = append(r.Except, p)
		}
	}
	*r = r.Normalized()
}

// Output draws an output of a family, with any policy.
func (w *World) Output(family netip.Addr) flow.Output {
	out := Pick(w, w.Out...)
	o := flow.Output{Ready: w.Chance(90), Index: out.Index, MTU: Pick[int32](w, 28, 60, 100, 1500, 1500, 1500, 70000)}
	o.SrcMAC = out.MAC
	o.DstPort = uint16(1 + w.IntN(65535))
	o.SrcPort = Pick(w, 0, 0, uint16(w.Uint32()))
	o.TTLMode, o.TTL = Pick(w, packet.TTLKeep, packet.TTLDecrement, packet.TTLSet), Pick(w, 1, 64, 255, uint8(w.Uint32()))
	o.SetDSCP, o.DSCP = w.Chance(50), uint8(w.IntN(64))
	o.ZeroChecksum = w.Chance(20)
	o.Dst = w.random(family)
	if w.Chance(70) {
		o.Src = w.random(family)
	}
	o.DstMAC = packet.MulticastMAC(o.Dst)
	if w.Chance(50) {
		return o
	}
	o.Blocked = Pick(w, flow.NotReady, flow.NoNeighbour)
	o.DstLen = Pick[uint8](w, 0, 1, 8, 16, 31, uint8(1+w.IntN(o.Dst.BitLen())))
	if w.Chance(20) {
		o.DstMAC[0] = 2 // a neighbour's
	}
	o.PortAdd, o.PortShift = w.Chance(30), Pick[int32](w, 0, 1, -1, 60000, -60000)
	o.MinTTL = Pick[uint8](w, 0, 0, 0, 2, 64)
	o.VLAN = Pick(w, packet.VLANKeep, packet.VLANPop, packet.VLANSet)
	o.VLANID, o.OuterVLAN = uint16(1+w.IntN(4094)), Pick[uint16](w, 0, 0, 4094)
	o.SetPCP, o.PCP = w.Chance(30), uint8(w.IntN(8))
	o.OneBuffer = w.Chance(30)
	return o
}
