package rules

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"strings"
	"testing"
)

func TestValidateAccepts(t *testing.T) {
	for _, s := range []string{
		"a 239.1.1.1:5000%eth0 -> 239.2.2.2:6000%eth1",
		"cam1.left:A_-9 10.0.0.5@239.1.1.1:5000%eth0 -> 239.2.2.2:6000%eth1 10.0.9.9:6000%eth2,ttl=16",
		strings.Repeat("n", MaxNameLen) + " 239.1.1.1:5000%eth0 -> 239.2.2.2:6000%eth1",
		"unicast-in 10.0.0.1:5000%eth0 -> 239.2.2.2:6000%eth1",
		"unicast-from 10.0.0.5@10.0.0.1:5000%eth0 -> 239.2.2.2:6000%eth1",
		"ssm 10.0.0.5@232.1.1.1:5000%eth0 -> 232.2.2.2:6000%eth1",
		"edges 224.0.1.0:1%eth0 -> 239.255.255.255:65535%eth1 223.255.255.255:1%eth1 1.0.0.0:1%eth1 126.255.255.255:1%eth1 128.0.0.0:1%eth1",
		"not-ssm 231.255.255.255:1%eth0 -> 233.0.0.0:1%eth1",
		"same-group 239.1.1.1:5000%eth0 -> 239.1.1.1:5000%eth1",
		"other-port 239.1.1.1:5000%eth0 -> 239.1.1.1:5001%eth0",
		"other-iface 239.1.1.1:5000%eth0 -> 239.2.2.2:1%eth1 239.2.2.2:1%eth2 239.2.2.2:2%eth1 239.2.2.3:1%eth1",
		"v6 [ff05::1]:5000%eth0 -> [ff0e::2]:5000%eth1 [2001:db8::1]:5000%eth1 [fe80::1]:5000%eth1,src=2001:db8::2",
		"v6-ssm 2001:db8::5@[ff3e::1]:5000%eth0 -> [ff35::2]:5000%eth1",
		"v6-unicast-prefix [ff3e:30:2001:db8::1]:5000%eth0 -> [ff03::2]:5000%eth1", // RFC 3306: not the SSM range
		"own 239.1.1.1:5000%eth0,from=host -> 239.1.1.1:5000%eth0 239.1.1.1:5000%eth1",
		"own-prefix 239.1.0.0/16%eth0,from=host,vlan=7 -> 239.2.2.2%eth1",
		"own-ssm 232.1.1.1:5000%eth0,from=host -> 232.1.1.1:5000%eth1",
		"own-broadcast 255.255.255.255:9%eth0,from=host,broadcast=allow -> 239.1.1.1:9%eth1",
		"all 224.0.0.0/4%eth0,join=239.1.1.1+224.0.1.1 -> 224.0.0.0/4%eth1 239.2.2.2:5000%eth2",
		"all6 [ff00::]/8%eth0,join=none -> [ff00::]/8%eth1",
		"senders 10.0.0.0/24@239.1.1.1:5000-5010%eth0,except=10.0.0.7+10.0.0.64/26 -> 239.2.2.2:+1000%eth1 239.2.2.3%eth2 239.2.2.4:6000%eth2",
		"senders6 2001:db8::/32@[ff05::1]%eth0,except=2001:db8:1::/48 -> [ff05::2]%eth1",
		"but-one 239.1.1.1%eth0,except=10.0.0.7 -> 239.2.2.2%eth1",
		"any-ssm 10.0.0.0/8@232.1.1.1:5%eth0,join=none -> 239.2.2.2:5%eth1",
		"mdns 224.0.0.251:5353%eth0,local-control=allow -> 224.0.0.251:5353%eth1 239.2.2.2:5353%eth2",
		"mdns6 [ff02::fb]:5353%eth0,local-control=allow -> [ff02::fb]:5353%eth1",
		"to-the-link 239.1.1.9:5353%eth0,local-control=allow -> 224.0.0.251:5353%eth1",
		"wol 255.255.255.255:9%eth0,broadcast=allow -> 255.255.255.255:9%eth1,broadcast=allow 10.0.1.255:9%eth2,broadcast=allow 239.1.1.1%eth3",
		"directed 10.0.0.255%eth0,broadcast=allow -> 10.0.0.7%eth1",
		"policies 239.1.1.1:5%eth0 -> 239.2.2.2:6%eth1,csum=zero,ttl=1,dscp=63,src=10.0.0.1:9",
	} {
		if err := mustRule(t, s).Validate(); err != nil {
			t.Errorf("%s: %v", s, err)
		}
	}
}

// TestValidateRefuses changes one thing of a good rule at a time.
func TestValidateRefuses(t *testing.T) {
	const thisNet = "an address outside 0.0.0.0/8, this network (RFC 1122 section 3.2.1.3)"
	const loopback = "an address outside 127.0.0.0/8, loopback (RFC 1122 section 3.2.1.3)"
	const broadcast = "an address other than broadcast (RFC 1122 section 3.2.1.3), unless it has broadcast=allow"
	const reserved = "an address outside 240.0.0.0/4, reserved (RFC 1112 section 4)"
	const control = "a group outside 224.0.0.0/24: local network control is never forwarded between links (RFC 5771 section 4), unless the rule's input says local-control=allow"
	const scope = "a group of scope 3 or wider, ffx3::/16 and up: narrower ones are never forwarded between links (RFC 4291 section 2.7)"
	const linkScope = scope + ", unless the rule's input says local-control=allow"
	in := func(s string) func(*Rule) { return func(r *Rule) { r.In.Address = netip.MustParseAddr(s) } }
	out := func(s string) func(*Rule) { return func(r *Rule) { r.Out[0].Address = netip.MustParseAddr(s) } }
	source := func(s string) func(*Rule) { return func(r *Rule) { r.In.Source = netip.MustParseAddr(s) } }
	policy := func(p Policy) func(*Rule) { return func(r *Rule) { r.Out[0].Policy = p } }
	srcAddr := func(s string) func(*Rule) {
		return policy(Policy{Source: SourceAddress, SourceAddr: netip.MustParseAddr(s)})
	}
	prefix := func(s string) func(*Rule) {
		p := netip.MustParsePrefix(s)
		return func(r *Rule) { r.In.Address, r.In.Len = p.Addr(), uint8(p.Bits()) }
	}
	joined := func(f func(*Rule), policy JoinPolicy, groups ...string) func(*Rule) {
		return func(r *Rule) {
			f(r)
			r.Accept.Join = policy
			for _, g := range groups {
				r.Accept = r.Accept.with(Extra{Groups: append(r.Accept.Groups(), addr(g))})
			}
		}
	}
	shifted := func(n int32) func(*Rule) {
		return func(r *Rule) { r.Out[0].PortMode, r.Out[0].Port, r.Out[0].PortShift = PortAdd, 0, n }
	}
	host := func(f func(*Rule)) func(*Rule) { return func(r *Rule) { r.In.FromHost = true; f(r) } }
	senders := func(s string) func(*Rule) {
		p := netip.MustParsePrefix(s)
		return func(r *Rule) { r.In.Source, r.In.SourceLen = p.Addr(), uint8(p.Bits()) }
	}
	except := func(all ...string) func(*Rule) {
		return func(r *Rule) {
			for _, s := range all {
				r.Accept = r.Accept.with(Extra{Except: append(r.Accept.Except(), netip.MustParsePrefix(s))})
			}
		}
	}
	ports := func(first, last uint16) func(*Rule) { return func(r *Rule) { r.In.Port, r.In.PortTo = first, last } }
	v6 := func(f func(*Rule)) func(*Rule) {
		return func(r *Rule) {
			*r = mustRule(t, "a 2001:db8::5@[ff3e::1]:5000%eth0 -> [ff0e::2]:6000%eth1")
			f(r)
		}
	}
	for _, c := range []struct {
		change func(*Rule)
		class  error
		want   string // without `rule "a": `
	}{
		{in("0.1.2.3"), nil, `in.address "0.1.2.3": want ` + thisNet},
		{in("0.0.0.0"), nil, `in.address "0.0.0.0": want ` + thisNet},
		{in("127.0.0.1"), nil, `in.address "127.0.0.1": want ` + loopback},
		{in("255.255.255.255"), nil, `in.address "255.255.255.255": want ` + broadcast},
		{in("240.0.0.1"), nil, `in.address "240.0.0.1": want ` + reserved},
		{in("224.0.0.251"), ErrLinkLocal, `in.address "224.0.0.251": want ` + control},
		{in("232.1.1.1"), ErrNeedSource, `in.source missing: write SOURCE@232.1.1.1: groups of 232.0.0.0/8 need a source (RFC 4607 section 4.1)`},
		{in("::ffff:239.1.1.1"), nil, `in.address "::ffff:239.1.1.1": want 239.1.1.1: IPv4-mapped IPv6 addresses are not sent on a wire (RFC 4291 section 2.5.5.2)`},
		{func(r *Rule) { r.In.Address = netip.Addr{} }, nil, `in.address missing: write a multicast group or a unicast address`},
		{func(r *Rule) { r.In.Len = 16; r.Accept.Join = JoinNone }, nil, `in.address "239.1.1.1/16": want 239.1.0.0/16, without host bits`},
		{func(r *Rule) { r.In.Len = 32; r.Accept.Join = JoinNone }, nil, `in.prefix "/32": want /1 to /31, or none for the address alone`},
		{prefix("239.1.1.0/24"), nil, `in.join missing: write join=all to join every group, join=GROUP+GROUP... to join some, or join=none when the network floods the groups or another program joins them`},
		{prefix("239.1.0.0/16"), nil, `in.join missing: write join=GROUP+GROUP... to join some, or join=none when the network floods the groups or another program joins them`},
		{joined(prefix("239.1.0.0/16"), JoinAll), nil, `in.join "all": want join=none or join=GROUP+GROUP...: 239.1.0.0/16 has more than 4096 groups`},
		{joined(prefix("239.1.1.0/24"), JoinList), nil, `in.join missing: write join=GROUP+GROUP...`},
		{joined(prefix("239.1.1.0/24"), JoinList, "239.1.2.1"), nil, `in.join "239.1.2.1": want groups of the input, 239.1.1.0/24`},
		{joined(prefix("239.1.1.0/24"), JoinList, "239.1.1.1", "239.1.1.1"), nil, `in.join "239.1.1.1": want each group once`},
		{joined(prefix("239.1.1.0/24"), JoinNone, "239.1.1.1"), nil, `in.join "239.1.1.1": want no groups with join=none`},
		{joined(in("10.0.0.1"), JoinAll), nil, `in.join "all": want no join: a unicast address is not joined`},
		{joined(prefix("224.0.0.0/8"), JoinNone), ErrLinkLocal, `in.address "224.0.0.0/8": want a prefix without 224.0.0.0/24 (never forwarded between links, RFC 5771 section 4)`},
		{joined(prefix("192.0.0.0/2"), JoinNone), ErrLinkLocal, `in.address "192.0.0.0/2": want a prefix without 224.0.0.0/24 (never forwarded between links, RFC 5771 section 4)`},
		{prefix("64.0.0.0/2"), nil, `in.address "64.0.0.0/2": want a prefix without 127.0.0.0/8 (loopback, RFC 1122 section 3.2.1.3)`},
		{joined(prefix("232.1.1.0/24"), JoinAll), ErrNeedSource, `in.source missing: write SOURCE@232.1.1.0: groups of 232.0.0.0/8 need a source (RFC 4607 section 4.1)`},
		{func(r *Rule) { r.In.VLAN.ID = 4095 }, nil, `in.vlan "4095": want VLANs of 1 to 4094 (IEEE 802.1Q section 9.6)`},
		{func(r *Rule) { r.In.VLAN.Outer = 7 }, nil, `in.vlan "7.0": want VLANs of 1 to 4094 (IEEE 802.1Q section 9.6)`},
		{func(r *Rule) { r.Accept.ZeroChecksum = true }, nil, `in.csum "any": want no csum: IPv4 packets without a UDP checksum are always taken`},
		{func(r *Rule) { r.Accept.LocalControl = true }, nil, `in.local-control "allow": want no local-control: no address of the rule is a single group of 224.0.0.0/24 or ffx2::/16`},
		{func(r *Rule) {
			joined(prefix("224.0.0.0/28"), JoinAll)(r)
			r.Accept.LocalControl = true
			r.Out[0].Address = addr("224.0.0.9")
		},
			ErrLinkLocal, `in.address "224.0.0.0/28": want a prefix without 224.0.0.0/24 (never forwarded between links, RFC 5771 section 4)`},
		{v6(func(r *Rule) {
			r.In.Address = addr("ff01::1")
			r.Accept.LocalControl = true
			r.Out[0].Address = addr("ff02::1")
		}), ErrLinkLocal, `in.address "ff01::1": want ` + scope},
		{func(r *Rule) { r.Accept.Broadcast = true }, nil, `in.broadcast "allow": want no broadcast: 239.1.1.1 is a group`},
		{policy(Policy{Broadcast: true}), nil, `out[0].broadcast "allow": want no broadcast: 239.2.2.2 is a group`},
		{func(r *Rule) { prefix("10.1.0.0/16")(r); r.Accept.Broadcast = true }, nil,
			`in.broadcast "allow": want one address, without a prefix length: 255.255.255.255, or the highest of a network of the link`},
		{v6(func(r *Rule) { r.In.Address = addr("2001:db8::1"); r.Accept.Broadcast = true }), nil, `in.broadcast "allow": want no broadcast: IPv6 has none (RFC 4291 section 2)`},
		{func(r *Rule) { joined(in("255.255.255.255"), JoinAll)(r); r.Accept.Broadcast = true }, nil, `in.join "all": want no join: a unicast address is not joined`},
		{func(r *Rule) { in("250.1.1.255")(r); r.Accept.Broadcast = true }, nil, `in.address "250.1.1.255": want ` + reserved},
		{func(r *Rule) { r.Accept.Local, r.Path = true, PathKernel }, nil, `in.local "yes": want path auto or fanout: path kernel takes the packets away from the host's receivers`},
		{func(r *Rule) { r.Accept.Extra = &Extra{Rate: Rate{Bits: 999}} }, nil, `in.rate "999bit": want 1kbit or more`},
		{func(r *Rule) { r.Accept.Extra = &Extra{Rate: Rate{Bits: 1000, Packets: 1}} }, nil, `in.rate "1pps and 1000bit": want packets or bits, not both`},
		{func(r *Rule) { r.Accept.Extra = &Extra{Rate: Rate{Burst: 9}} }, nil, `in.burst "9": want a rate, too`},
		{func(r *Rule) { r.Out[0].Policy.Rate = Rate{Packets: 1e18} }, nil, `out[0].rate "1000000000000000000": want at most 1000000G`},
		{func(r *Rule) { r.Out[0].Len = 16; r.Out[0].Address = addr("239.2.0.0") }, nil, `out[0].address "239.2.0.0/16": want one address, or a prefix as long as the input's, /32`},
		{func(r *Rule) {
			joined(prefix("10.1.0.0/16"), JoinNone)(r)
			r.Out[0].Address, r.Out[0].Len = addr("10.2.0.0"), 16
		}, nil, `out[0].address "10.2.0.0/16": want a prefix of groups: unicast addresses have a neighbour each, write one output for each`},
		{shifted(61000), nil, `out[0].port "+61000": want what leaves the input's port 5000 within 1 to 65535: it would be 66000`},
		{shifted(-5000), nil, `out[0].port "-5000": want what leaves the input's port 5000 within 1 to 65535: it would be 0`},
		{shifted(0), nil, `out[0].port "+0": want +1 to +65534 or -1 to -65534`},
		{func(r *Rule) { r.Out[0].PortMode = PortKeep }, nil, `out[0].port "6000": want no value with a port that is not set to it`},
		{policy(Policy{VLAN: VLANSet}), nil, `out[0].vlan missing: write vlan=ID or vlan=OUTER.ID`},
		{policy(Policy{VLAN: VLANPop, VLANTags: VLAN{ID: 7}}), nil, `out[0].vlan "7": want no value with policy pop`},
		{policy(Policy{VLAN: 9}), nil, `out[0].vlan "VLANPolicy(9)": want one of the policies declared`},
		{policy(Policy{PCP: 3}), nil, `out[0].pcp "3": want 0 to 7`},
		{policy(Policy{PCP: 8, PCPSet: true}), nil, `out[0].pcp "8": want 0 to 7`},
		{func(r *Rule) { r.In.Interface = "a%b" }, nil, `in.interface "a%b": want an interface name without '/', ':', ',' or '%'`},
		{func(r *Rule) { r.In.Interface = "" }, nil, `in.interface missing: write an interface name`},
		{func(r *Rule) { r.In = Input{} }, nil, `in missing: write [SOURCE@]ADDRESS[/LEN][:PORT]%INTERFACE[,option...]`},
		{source("239.9.9.9"), nil, `in.source "239.9.9.9": want a unicast address: a group is never a source`},
		{source("0.0.0.0"), nil, `in.source "0.0.0.0": want ` + thisNet},
		{source("127.0.0.1"), nil, `in.source "127.0.0.1": want ` + loopback},
		{source("2001:db8::1"), ErrFamily, `in.source "2001:db8::1": want the family of 239.1.1.1`},

		{v6(in("::")), nil, `in.address "::": want an address other than the unspecified one (RFC 4291 section 2.5.2)`},
		{v6(in("::1")), nil, `in.address "::1": want an address other than loopback (RFC 4291 section 2.5.3)`},
		{v6(in("ff02::fb")), ErrLinkLocal, `in.address "ff02::fb": want ` + linkScope},
		{v6(in("ff12::1")), ErrLinkLocal, `in.address "ff12::1": want ` + linkScope},
		{v6(in("ff01::1")), ErrLinkLocal, `in.address "ff01::1": want ` + scope},
		{v6(in("ff00::1")), ErrLinkLocal, `in.address "ff00::1": want ` + scope},
		{v6(func(r *Rule) { r.In.Source = netip.Addr{} }), ErrNeedSource, `in.source missing: write SOURCE@ff3e::1: groups of ff3x::/32 need a source (RFC 4607 section 4.1)`},
		{v6(source("::1")), nil, `in.source "::1": want an address other than loopback (RFC 4291 section 2.5.3)`},
		{v6(source("fe80::1%eth0")), nil, `in.source "fe80::1%eth0": want an address without a zone`},
		{v6(out("ff02::2")), ErrLinkLocal, `out[0].address "ff02::2": want ` + linkScope},
		{v6(out("fe80::1%eth0")), nil, `out[0].address "fe80::1%eth0": want an address without a zone`},
		{v6(out("239.2.2.2")), ErrFamily, `out[0].address "239.2.2.2": want the family of the input, ff3e::1: a rule cannot translate between IPv4 and IPv6`},
		{v6(policy(Policy{Checksum: ChecksumZero})), nil, `out[0].csum "zero": want update: IPv6 needs the UDP checksum (RFC 8200 section 8.1)`},
		{v6(srcAddr("10.0.0.1")), ErrFamily, `out[0].src "10.0.0.1": want the family of ff0e::2`},

		{out("0.1.2.3"), nil, `out[0].address "0.1.2.3": want ` + thisNet},
		{out("127.9.9.9"), nil, `out[0].address "127.9.9.9": want ` + loopback},
		{out("255.255.255.255"), nil, `out[0].address "255.255.255.255": want ` + broadcast},
		{out("250.1.1.1"), nil, `out[0].address "250.1.1.1": want ` + reserved},
		{out("224.0.0.1"), ErrLinkLocal, `out[0].address "224.0.0.1": want ` + control},
		{out("ff0e::1"), ErrFamily, `out[0].address "ff0e::1": want the family of the input, 239.1.1.1: a rule cannot translate between IPv4 and IPv6`},
		{func(r *Rule) { r.Out[0].Address = netip.Addr{} }, nil, `out[0].address missing: write a multicast group or a unicast address`},
		{func(r *Rule) { r.Out[0].Port = 0 }, nil, `out[0].port "0": want 1 to 65535`},
		{func(r *Rule) { r.Out[0].Interface = "eth0/1" }, nil, `out[0].interface "eth0/1": want an interface name without '/', ':', ',' or '%'`},
		{func(r *Rule) { r.Out[0] = Output{} }, nil, `out[0] missing: write ADDRESS[/LEN][:PORT]%INTERFACE[,policy...]`},
		{func(r *Rule) { r.Out = nil }, nil, `out missing: write 1 to 64 outputs`},
		{func(r *Rule) { r.Out = manyOutputs(65) }, ErrTooManyOutputs, `out "65 outputs": want 1 to 64 outputs`},
		{func(r *Rule) { r.Out = append(r.Out, r.Out[0]); r.Out[1].Policy.TTL = TTLDecrement }, ErrDuplicateOutput,
			`out[1] "239.2.2.2:6000%eth1,ttl=dec": want another interface, address, port or VLAN: out[0] has these`},

		{srcAddr("239.1.1.1"), nil, `out[0].src "239.1.1.1": want a unicast address: a group is never a source`},
		{srcAddr("127.0.0.1"), nil, `out[0].src "127.0.0.1": want ` + loopback},
		{policy(Policy{Source: SourceAddress}), nil, `out[0].src missing: write a unicast address`},
		{policy(Policy{SourceAddr: addr("10.0.0.1")}), nil, `out[0].src "10.0.0.1": want no value with policy iface`},
		{policy(Policy{Source: SourceKeep, SourceAddr: addr("10.0.0.1")}), nil, `out[0].src "10.0.0.1": want no value with policy keep`},
		{policy(Policy{Source: 7}), nil, `out[0].src "SourcePolicy(7)": want one of the policies declared`},
		{policy(Policy{TTL: TTLSet}), nil, `out[0].ttl "0": want 1 to 255`},
		{policy(Policy{TTLValue: 9}), nil, `out[0].ttl "9": want no value with policy keep`},
		{policy(Policy{TTL: TTLDecrement, TTLValue: 9}), nil, `out[0].ttl "9": want no value with policy dec`},
		{policy(Policy{TTL: 7}), nil, `out[0].ttl "TTLPolicy(7)": want one of the policies declared`},
		{policy(Policy{DSCP: DSCPSet, DSCPValue: 64}), nil, `out[0].dscp "64": want 0 to 63`},
		{policy(Policy{DSCPValue: 1}), nil, `out[0].dscp "1": want no value with policy keep`},
		{policy(Policy{DSCP: 7}), nil, `out[0].dscp "DSCPPolicy(7)": want one of the policies declared`},
		{policy(Policy{PCPSet: true, PCP: 3}), nil, `out[0].pcp "3": want a copy with a VLAN tag, which carries the priority, such as vlan=ID`},
		{policy(Policy{PCPSet: true, VLAN: VLANPop}), nil, `out[0].pcp "0": want a copy with a VLAN tag, which carries the priority, such as vlan=ID`},
		{v6(func(r *Rule) { r.In.Address, r.In.Len, r.Accept.Join = addr("ff02::"), 64, JoinNone }), ErrLinkLocal, `in.address "ff02::/64": want ` + scope},
		{joined(prefix("224.0.0.0/4"), JoinList, "239.1.1.1", "224.0.0.5"), ErrLinkLocal, `in.join "224.0.0.5": want a group outside 224.0.0.0/24: local network control is never forwarded between links (RFC 5771 section 4)`},
		{joined(prefix("224.0.0.0/4"), JoinAll), nil, `in.join "all": want join=none or join=GROUP+GROUP...: 224.0.0.0/4 has more than 4096 groups`},
		{func(r *Rule) {
			joined(prefix("16.0.0.0/4"), JoinNone)(r)
			r.Out[0].Address, r.Out[0].Len = addr("224.0.0.0"), 4
		}, ErrLinkLocal, `out[0].address "224.0.0.0/4": want an input of 224.0.0.0/4, too: otherwise some would go to groups that are never forwarded between links`},
		{host(func(r *Rule) { r.Path = PathKernel }), nil, `in.from "host": want path auto or fanout: packets that this host sends do not pass path kernel`},
		{host(func(r *Rule) { r.Accept.Join = JoinNone }), nil, `in.from "host": want no join: packets that this host sends need no membership`},
		{host(func(r *Rule) { r.Accept.Local = true }), nil, `in.from "host": want no local: the host's receivers get its packets anyway`},
		{host(in("10.0.0.1")), nil, `in.from "host": want a multicast group, or broadcast=allow`},
		{senders("10.0.0.1/24"), nil, `in.source "10.0.0.1/24": want 10.0.0.0/24, without host bits`},
		{senders("10.0.0.0/32"), nil, `in.source "/32": want /1 to /31, or none for the address alone`},
		{senders("128.0.0.0/1"), nil, `in.source "128.0.0.0/1": want a prefix of unicast addresses: a group is never a source`},
		{senders("2001:db8::/32"), ErrFamily, `in.source "2001:db8::": want the family of 239.1.1.1`},
		{func(r *Rule) { r.In.SourceLen = 8 }, nil, `in.source "/8": want an address in front of the length`},
		{func(r *Rule) { in("232.1.1.1")(r); senders("10.0.0.0/8")(r) }, ErrNeedSource,
			`in.source "10.0.0.0/8": want one source, or join=none: groups of 232.0.0.0/8 need a source (RFC 4607 section 4.1)`},
		{except("10.0.0.1/24"), nil, `in.except "10.0.0.1/24": want 10.0.0.0/24, without host bits`},
		{except("2001:db8::1/128"), ErrFamily, `in.except "2001:db8::1": want the family of 239.1.1.1`},
		{except("10.0.0.0/24", "10.0.0.7/32"), nil, `in.except "10.0.0.7": want each sender once`},
		{func(r *Rule) { senders("10.0.0.0/24")(r); except("10.0.1.0/32")(r) }, nil, `in.except "10.0.1.0": want senders of the input, 10.0.0.0/24`},
		{func(r *Rule) { senders("10.0.0.0/24")(r); except("10.0.0.0/24")(r) }, nil, `in.except "10.0.0.0/24": want senders of the input, 10.0.0.0/24`},
		{func(r *Rule) { source("10.0.0.1")(r); except("10.0.0.1/32")(r) }, nil, `in.except "10.0.0.1": want no except: one sender alone is taken`},
		{func(r *Rule) { joined(prefix("239.1.0.0/16"), JoinNone)(r); except("10.0.0.1/24")(r) }, nil, `in.except "10.0.0.1/24": want 10.0.0.0/24, without host bits`},
		{func(r *Rule) {
			joined(prefix("239.1.0.0/16"), JoinNone)(r)
			senders("10.0.0.0/24")(r)
			except("10.0.1.0/32")(r)
		}, nil, `in.except "10.0.1.0": want senders of the input, 10.0.0.0/24`},
		{func(r *Rule) { joined(prefix("232.1.0.0/16"), JoinAll)(r); r.In.Len = 20; senders("10.0.0.0/24")(r) }, ErrNeedSource,
			`in.source "10.0.0.0/24": want one source, or join=none: groups of 232.0.0.0/8 need a source (RFC 4607 section 4.1)`},
		{func(r *Rule) {
			for i := range 65 {
				r.Accept = r.Accept.with(Extra{Except: append(r.Accept.Except(), netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 0, 0, byte(i)}), 32))})
			}
		}, nil, `in.except "65 prefixes": want at most 64`},
		{ports(5000, 5000), nil, `in.port "5000-5000": want a range of ports from a lower to a higher one, as 5000-5010`},
		{ports(0, 5000), nil, `in.port "0-5000": want a range of ports from a lower to a higher one, as 5000-5010`},
		{ports(5000, 6024), nil, `in.port "5000-6024": want at most 1024 ports, or no ':' for any port`},
		{func(r *Rule) { ports(5000, 5010)(r); shifted(60530)(r) }, nil, `out[0].port "+60530": want what leaves the input's port 5010 within 1 to 65535: it would be 65540`},
		{policy(Policy{Checksum: 7}), nil, `out[0].csum "ChecksumPolicy(7)": want one of the policies declared`},
		{func(r *Rule) { r.Path = 7 }, nil, `path "Path(7)": want auto, kernel, afxdp or fanout`},
	} {
		r := mustRule(t, "a 239.1.1.1:5000%eth0 -> 239.2.2.2:6000%eth1")
		c.change(&r)
		err := r.Validate()
		checkLines(t, err, `rule "a": `+c.want)
		if f := fieldError(t, err); f.Err != c.class || c.class != nil && !errors.Is(err, c.class) {
			t.Errorf("%v: class %v, want %v", err, f.Err, c.class)
		}
	}
}

func manyOutputs(n int) []Output {
	var out []Output
	for i := range n {
		out = append(out, Output{Interface: "eth1", Address: addr("239.2.2.2"), Port: uint16(i + 1)})
	}
	return out
}

func TestOutputLimits(t *testing.T) {
	r := mustRule(t, "a 239.1.1.1:5000%eth0 ->")
	r.Out = manyOutputs(MaxOutputs)
	if err := r.Validate(); err != nil {
		t.Error(err)
	}
	r.Out = manyOutputs(1 << 16)
	r.Out[MaxOutputs] = Output{} // not looked at
	checkLines(t, r.Validate(), `rule "a": out "65536 outputs": want 1 to 64 outputs`)
}

func TestNames(t *testing.T) {
	r := mustRule(t, "a 239.1.1.1:5000%eth0 -> 239.2.2.2:6000%eth1")
	for _, name := range []string{"a", "9", "Z.:_-z", "null", strings.Repeat("x", MaxNameLen)} {
		if r.Name = name; r.Validate() != nil {
			t.Errorf("%q: %v", name, r.Validate())
		}
	}
	const form = "1 to 63 bytes of A-Z a-z 0-9 . _ : -, a letter or digit first"
	for _, name := range []string{".a", "-a", "_a", ":a", "a b", "a\n", "a/b", "#1", "é", "a\x00", strings.Repeat("x", MaxNameLen+1)} {
		r.Name = name
		checkLines(t, r.Validate(), fmt.Sprintf("rule %q: name %q: want %s", name, name, form))
	}
	r.Name = ""
	checkLines(t, r.Validate(), "name missing: write "+form)
}

// TestValidateReportsAll: every fault of a rule, in the order of its fields.
func TestValidateReportsAll(t *testing.T) {
	r := mustRule(t, "bad 10.0.0.5@127.0.0.1:5000%eth0 -> 239.2.2.2:6000%eth1,ttl=9 [ff0e::1]:1%eth1 239.2.2.2:6000%eth1")
	r.Name, r.Out[0].Policy.TTL = "b d", TTLKeep
	checkLines(t, r.Validate(),
		`rule "b d": name "b d": want 1 to 63 bytes of A-Z a-z 0-9 . _ : -, a letter or digit first`,
		`rule "b d": in.address "127.0.0.1": want an address outside 127.0.0.0/8, loopback (RFC 1122 section 3.2.1.3)`,
		`rule "b d": out[0].ttl "9": want no value with policy keep`,
		`rule "b d": out[1].address "ff0e::1": want the family of the input, 127.0.0.1: a rule cannot translate between IPv4 and IPv6`,
		`rule "b d": out[2] "239.2.2.2:6000%eth1": want another interface, address, port or VLAN: out[0] has these`,
	)
	for _, err := range joined(t, r.Validate()) {
		if _, ok := err.(*FieldError); !ok {
			t.Errorf("%T in the list", err)
		}
	}
}

func TestValidateSet(t *testing.T) {
	if err := ValidateSet(nil); err != nil {
		t.Error(err)
	}
	good := mustRules(t,
		"a 239.1.1.1:1%eth0 -> 239.2.2.2:1%eth1",
		"b 10.0.0.5@239.1.1.1:1%eth0 -> 239.2.2.2:1%eth1",
		"c 239.1.1.1:1%eth2 -> 239.2.2.2:1%eth1",
		"d 239.1.1.1:2%eth0 -> 239.2.2.2:1%eth1")
	if err := ValidateSet(good); err != nil {
		t.Error(err)
	}
	bad := mustRules(t,
		"a 239.1.1.1:1%eth0 -> 239.2.2.2:1%eth1",
		"a 10.0.0.5@239.1.1.1:1%eth0 -> 239.2.2.2:1%eth1",
		"b 239.1.1.1:1%eth0 -> 239.2.2.2:1%eth1",
		"x 239.1.1.9:1%eth0 -> 127.0.0.1:1%eth1",
		"a 10.0.0.5@239.1.1.1:1%eth0 -> 239.2.2.2:1%eth1")
	bad = append(bad, Rule{}, Rule{})
	err := ValidateSet(bad)
	const missingName = "name missing: write 1 to 63 bytes of A-Z a-z 0-9 . _ : -, a letter or digit first"
	checkLines(t, err,
		`rule "a": name "a": want a unique name: rule #1 has it`,
		`rule "b": in "239.1.1.1:1%eth0": want an input of its own: rule "a" takes it`,
		`rule "x": out[0].address "127.0.0.1": want an address outside 127.0.0.0/8, loopback (RFC 1122 section 3.2.1.3)`,
		`rule "a": name "a": want a unique name: rule #1 has it`,
		`rule "a": in "10.0.0.5@239.1.1.1:1%eth0": want an input of its own: rule "a" takes it`,
		`rule "#6": `+missingName,
		`rule "#6": in missing: write [SOURCE@]ADDRESS[/LEN][:PORT]%INTERFACE[,option...]`,
		`rule "#6": out missing: write 1 to 64 outputs`,
		`rule "#7": `+missingName,
		`rule "#7": in missing: write [SOURCE@]ADDRESS[/LEN][:PORT]%INTERFACE[,option...]`,
		`rule "#7": out missing: write 1 to 64 outputs`,
	)
	for _, class := range []error{ErrDuplicateName, ErrDuplicateInput} {
		if !errors.Is(err, class) {
			t.Errorf("is not %v", class)
		}
	}
	if errors.Is(err, ErrLoop) {
		t.Error("is a loop")
	}
}

// TestFaultsAreCapped: 100 faults and how many more, for one rule and for sets.
func TestFaultsAreCapped(t *testing.T) {
	r := mustRule(t, "a 239.1.1.1:5000%eth0 ->")
	for range MaxOutputs {
		r.Out = append(r.Out, Output{Interface: "eth0"}) // no address, port 0, duplicates
	}
	lines := errorLines(r.Validate())
	if n := len(lines); n != maxFaults+1 || lines[maxFaults] != "and 91 more" {
		t.Errorf("%d lines, the last %q", n, lines[n-1])
	}
	lines = errorLines(ValidateSet(make([]Rule, 1000)))
	if n := len(lines); n != maxFaults+1 || lines[maxFaults] != "and 2900 more" {
		t.Errorf("%d lines, the last %q", n, lines[n-1])
	}
}

// TestValidRoundTrips: whatever Validate accepts can be written and read back,
// for values put together at random from good and bad ones.
func TestValidRoundTrips(t *testing.T) {
	random := rand.New(rand.NewPCG(3, 4))
	valid := 0
	for range 20_000 {
		r := randomRule(random)
		if r.Validate() != nil {
			continue
		}
		valid++
		if in := mustInput(t, r.In.String()); in != r.In {
			t.Fatalf("%+v is read back as %+v", r.In, in)
		}
		for _, o := range r.Out {
			if got := mustOutput(t, o.String()); got != o {
				t.Fatalf("%+v is read back as %+v", o, got)
			}
		}
		data, err := FormatFile([]Rule{r})
		if err != nil {
			t.Fatal(err)
		}
		back, err := ParseFile("f", data)
		if err != nil || len(back) != 1 || !Equal(back[0], r) {
			t.Fatalf("%+v is read back as %+v, %v from\n%s", r, back, err, data)
		}
	}
	if valid < 500 {
		t.Errorf("only %d of the rules were valid", valid)
	}
}

func pick[T any](random *rand.Rand, from ...T) T { return from[random.IntN(len(from))] }

func randomRule(random *rand.Rand) Rule {
	ifaces := []string{"eth0", "eth1", "br-lan", "a'b\"c", "x#y", "v\\n", "-", "?", "é", "eth 0", "e%f", "a,b", "eth+", ""}
	groups := []string{"239.1.1.1", "239.2.2.2", "10.0.0.9", "ff0e::1", "ff3e::1", "2001:db8::9", "224.0.0.1", "::ffff:1.2.3.4", "fe80::1%z"}
	anyAddr := func(list ...string) netip.Addr {
		if random.IntN(4) == 0 {
			return netip.Addr{}
		}
		return addr(pick(random, list...))
	}
	weighted := func(list []string, good int) string {
		if random.IntN(20) == 0 {
			return pick(random, list...)
		}
		return pick(random, list[:good]...)
	}
	r := Rule{
		Name: pick(random, "cam1", "1.5", "true", "No", "a:", "a:b", "0x1f", "1e3", "12:30", "null", "2024-01-01", "x_", ".x", "a b"),
		Path: Path(random.IntN(5)),
		In: Input{Interface: weighted(ifaces, 9), Address: addr(pick(random, groups...)), Port: pick[uint16](random, 1, 5000, 65535),
			Source: anyAddr("10.0.0.5", "2001:db8::5")},
	}
	for range 1 + random.IntN(2) {
		r.Out = append(r.Out, Output{Interface: weighted(ifaces, 9), Address: addr(weighted(groups, 3)), Port: pick[uint16](random, 2, 6000, 6001),
			Policy: randomPolicy(random)})
	}
	return r
}

func randomPolicy(random *rand.Rand) Policy {
	p := Policy{Source: SourcePolicy(random.IntN(3)), SourcePort: pick[uint16](random, 0, 0, 7, 65535),
		TTL: TTLPolicy(random.IntN(3)), DSCP: DSCPPolicy(random.IntN(2)), Checksum: ChecksumPolicy(random.IntN(2))}
	if p.Source == SourceAddress || random.IntN(20) == 0 {
		p.SourceAddr = addr(pick(random, "10.0.0.1", "10.0.0.5", "2001:db8::1"))
	}
	if p.TTL == TTLSet || random.IntN(20) == 0 {
		p.TTLValue = uint8(random.IntN(256))
	}
	if p.DSCP == DSCPSet || random.IntN(20) == 0 {
		p.DSCPValue = uint8(random.IntN(66))
	}
	return p
}
