package loader

import (
	"bytes"
	"encoding/binary"
	"math"
	"net/netip"
	"reflect"
	"slices"
	"testing"

	"xdpcast/bpf"
	"xdpcast/pkg/flow"
	"xdpcast/pkg/packet"
)

// FuzzOutput: every row that decodes encodes to the same row again, and no row makes decoding
// panic.
func FuzzOutput(f *testing.F) {
	n := binary.Size(bpf.RelayOutput{})
	family, _ := reflect.TypeFor[bpf.RelayOutput]().FieldByName("Family")
	familyAt := family.Offset
	f.Add(make([]byte, n))
	for _, family := range []byte{4, 6} {
		row := bytes.Repeat([]byte{0x5a}, n)
		row[familyAt] = family
		f.Add(row)
	}
	f.Fuzz(func(t *testing.T, row []byte) {
		if len(row) != n {
			t.Skip("no row")
		}
		var b bpf.RelayOutput
		if _, err := binary.Decode(row, binary.NativeEndian, &b); err != nil {
			t.Fatal(err)
		}
		o, err := decodeOutput(&b)
		if (err != nil) != (b.Family != 4 && b.Family != 6) {
			t.Fatalf("family %d: %v", b.Family, err)
		}
		if err != nil {
			return
		}
		again, err := decodeOutput(new(encodeOutput(o, b.Stats, b.Policer)))
		if err != nil || again != o {
			t.Fatalf("%+v became %+v, %v", o, again, err)
		}
	})
}

// FuzzKeys: each key of the flow tables stands for exactly one input.
func FuzzKeys(f *testing.F) {
	f.Add(uint32(1), uint16(5000), []byte{239, 1, 1, 1}, []byte{0, 0, 0, 0}, uint8(0), uint16(0), uint16(0))
	f.Add(uint32(1), uint16(5000), []byte{239, 1, 0, 0}, []byte{10, 0, 0, 1}, uint8(16), uint16(100), uint16(7))
	f.Add(uint32(7), uint16(0), bytes.Repeat([]byte{0xff}, 16), bytes.Repeat([]byte{1}, 16), uint8(64), uint16(1), uint16(0))
	f.Fuzz(func(t *testing.T, index uint32, port uint16, group, source []byte, length uint8, vlan, outer uint16) {
		in := flow.Input{Index: int(index), Port: port, Len: int(length), VLAN: vlan, OuterVLAN: outer}
		var ok bool
		if in.Group, ok = netip.AddrFromSlice(group); !ok || in.Group.Is4In6() {
			t.Skip("no group")
		}
		if s, ok := netip.AddrFromSlice(source); ok && s.BitLen() == in.Group.BitLen() && !s.IsUnspecified() {
			in.Source = s
		}
		var got flow.Input
		switch key := encodeKey(in).(type) {
		case *bpf.RelayFlow4:
			got = decodeKey4(key)
		case *bpf.RelayFlow6:
			got = decodeKey6(key)
		case *bpf.RelayPrefix4:
			got = decodePrefix4(key).in
		case *bpf.RelayPrefix6:
			got = decodePrefix6(key).in
		}
		if got != in {
			t.Fatalf("%+v became %+v", in, got)
		}
	})
}

// FuzzName: a valid rule name is read back unchanged.
func FuzzName(f *testing.F) {
	f.Add("cam1")
	f.Add("")
	f.Add("größe ☃")
	f.Add(string(bytes.Repeat([]byte{'x'}, bpf.NameLen)))
	f.Fuzz(func(t *testing.T, name string) {
		r := flow.Flow{Name: name, In: flow.Input{Index: 1, Group: netip.MustParseAddr("239.1.1.1")}, Out: make([]flow.Output, 1)}
		r.Out[0].Dst = r.In.Group
		if r.Check() != nil {
			t.Skip("no name")
		}
		got, err := decodeName(encodeRule(&entry{rule: &r}).Name)
		if err != nil || got != name {
			t.Fatalf("%q became %q, %v", name, got, err)
		}
	})
}

func TestEncodeCopies(t *testing.T) {
	ready := func(index int) flow.Output { return flow.Output{Ready: true, Index: index} }
	for _, c := range []struct {
		name string
		out  []flow.Output
		want []bpf.RelayCopy
	}{
		{"sorted by interface, slots in order", []flow.Output{ready(9), ready(3), ready(9), ready(5)}, []bpf.RelayCopy{
			{Ifindex: 3, Slot: 1, Same: 1}, {Ifindex: 5, Slot: 3, Same: 1}, {Ifindex: 9, Slot: 0, Same: 2}, {Ifindex: 9, Slot: 2},
		}},
		{"not ready is last and on no interface", []flow.Output{{Index: 1}, ready(3)}, []bpf.RelayCopy{
			{Ifindex: 3, Slot: 1, Same: 1}, {Ifindex: math.MaxUint32, Slot: 0, Same: 1},
		}},
		{"none ready", []flow.Output{{}, {}}, []bpf.RelayCopy{
			{Ifindex: math.MaxUint32, Slot: 0, Same: 2}, {Ifindex: math.MaxUint32, Slot: 1},
		}},
	} {
		if got := encodeCopies(c.out); !slices.Equal(got, c.want) {
			t.Errorf("%s: %+v, want %+v", c.name, got, c.want)
		}
	}
}

func TestEncodeFlowMTU(t *testing.T) {
	for _, c := range []struct {
		name string
		out  []flow.Output
		want uint16
	}{
		{"smallest", []flow.Output{{Ready: true, MTU: 1500}, {Ready: true, MTU: 900}}, 900},
		{"largest there is", []flow.Output{{Ready: true, MTU: flow.MaxMTU}}, flow.MaxMTU},
		{"one is not ready", []flow.Output{{Ready: true, MTU: 1500}, {MTU: 1500}}, 0},
	} {
		if got := encodeFlow(&entry{rule: &flow.Flow{Out: c.out}}).MinMtu; got != c.want {
			t.Errorf("%s: %d, want %d", c.name, got, c.want)
		}
	}
}

// Outputs are copied only if one is not in its normal form, and never modified in place.
func TestNormalizedCopiesOnDemand(t *testing.T) {
	odd := flow.Output{Blocked: flow.NotReady, Rewrite: packet.Rewrite{Dst: netip.MustParseAddr("239.1.1.1"), DstPort: 1, PCP: 3}}
	r := flow.Flow{Name: "r", Out: []flow.Output{{Blocked: flow.NotReady, Rewrite: odd.Rewrite}}}
	r.Out[0].PCP = 0
	if n := r.Normalized(); &n.Out[0] != &r.Out[0] {
		t.Error("copied without need")
	}
	r.Out = append(r.Out, odd)
	n := r.Normalized()
	if &n.Out[0] == &r.Out[0] || n.Out[1].PCP != 0 || r.Out[1].PCP != 3 {
		t.Errorf("normalized %+v from %+v", n.Out, r.Out)
	}
}

// Package flow may not import the ABI, so its limits are compared here.
func TestLimitsOfFlows(t *testing.T) {
	if flow.MaxName != bpf.NameLen-1 || flow.MaxOutputs != bpf.MaxSlots {
		t.Errorf("package flow has names of %d bytes and %d outputs, the programs %d and %d", flow.MaxName, flow.MaxOutputs, bpf.NameLen-1, bpf.MaxSlots)
	}
}
