package main

import (
	"net/netip"
	"testing"

	"xdpcast/pkg/flow"
	"xdpcast/pkg/packet"
	"xdpcast/pkg/rules"
)

// What is read from the kernel is in the grammar of rules, and reads back as itself.
func TestKernelInput(t *testing.T) {
	group, source := netip.MustParseAddr("239.1.0.0"), netip.MustParseAddr("10.0.0.5")
	for want, rule := range map[string]flow.Flow{
		"239.1.0.0:5000%lo":                           {In: flow.Input{Index: 1, Group: group, Port: 5000}},
		"239.1.0.0%lo":                                {In: flow.Input{Index: 1, Group: group}},
		"10.0.0.5@239.1.0.0:5000%lo":                  {In: flow.Input{Index: 1, Group: group, Port: 5000, Source: source}},
		"239.1.0.0/16%lo":                             {In: flow.Input{Index: 1, Group: group, Len: 16}},
		"239.1.0.0%lo,vlan=100.7":                     {In: flow.Input{Index: 1, Group: group, VLAN: 7, OuterVLAN: 100}},
		"[ff3e::1]:5000%lo,csum=any":                  {In: flow.Input{Index: 1, Group: netip.MustParseAddr("ff3e::1"), Port: 5000}, AllowNoChecksum: true},
		"239.1.0.0%lo,loop=allow,rate=1kpps,burst=50": {In: flow.Input{Index: 1, Group: group}, AllowLoop: true, Rate: flow.Rate{Packets: 1000, Burst: 50}},
	} {
		if got := kernelInput(rule, interfaceName); got != want {
			t.Errorf("%s, want %s", got, want)
		}
	}
}

func TestKernelOutput(t *testing.T) {
	dst := netip.MustParseAddr("239.2.0.0")
	for want, rewrite := range map[string]packet.Rewrite{
		"239.2.0.0:6000%lo,src=keep":                     {Dst: dst, DstPort: 6000},
		"239.2.0.0%lo,src=keep":                          {Dst: dst, PortAdd: true},
		"239.2.0.0:+1000%lo,src=keep":                    {Dst: dst, PortAdd: true, PortShift: 1000},
		"239.2.0.0/16:6000%lo,src=keep":                  {Dst: dst, DstLen: 16, DstPort: 6000},
		"239.2.0.0:6000%lo,src=10.0.0.1:7,ttl=dec":       {Dst: dst, DstPort: 6000, Src: netip.MustParseAddr("10.0.0.1"), SrcPort: 7, TTLMode: packet.TTLDecrement},
		"239.2.0.0:6000%lo,src=keep,ttl=9,minttl=3":      {Dst: dst, DstPort: 6000, TTLMode: packet.TTLSet, TTL: 9, MinTTL: 3},
		"239.2.0.0:6000%lo,src=keep,dscp=af41,csum=zero": {Dst: dst, DstPort: 6000, SetDSCP: true, DSCP: 34, ZeroChecksum: true},
		"239.2.0.0:6000%lo,src=keep,vlan=pop":            {Dst: dst, DstPort: 6000, VLAN: packet.VLANPop},
		"239.2.0.0:6000%lo,src=keep,vlan=100.7,pcp=5":    {Dst: dst, DstPort: 6000, VLAN: packet.VLANSet, VLANID: 7, OuterVLAN: 100, SetPCP: true, PCP: 5},
	} {
		out := flow.Output{Index: 1, Ready: true, Rewrite: rewrite}
		got := kernelOutput(out, interfaceName).String()
		if got != want {
			t.Errorf("%s, want %s", got, want)
		}
		if back, err := rules.ParseOutput(got); err != nil || back != kernelOutput(out, interfaceName) {
			t.Errorf("%s reads back as %+v, %v", got, back, err)
		}
	}
	out := flow.Output{Index: 1, Rewrite: packet.Rewrite{Dst: dst, DstPort: 6000}, Rate: flow.Rate{Bits: 8_000_000, Burst: 64_000}}
	if got, want := kernelOutput(out, interfaceName).String(), "239.2.0.0:6000%lo,src=keep,rate=8Mbit,burst=64k"; got != want {
		t.Errorf("%s, want %s", got, want)
	}
}
