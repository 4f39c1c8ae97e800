package rules

import (
	"strings"
	"testing"
)

func TestParseInput(t *testing.T) {
	for _, c := range []struct {
		text      string
		want      Input
		canonical string // "" when it is the text
	}{
		{"239.1.1.1:5000%eth0", Input{Interface: "eth0", Address: addr("239.1.1.1"), Port: 5000, Source: zeroAddr}, ""},
		{"10.0.0.5@239.1.1.1:5000%eth0", Input{Interface: "eth0", Address: addr("239.1.1.1"), Port: 5000, Source: addr("10.0.0.5")}, ""},
		{"10.0.0.1:1%eth0.100", Input{Interface: "eth0.100", Address: addr("10.0.0.1"), Port: 1, Source: zeroAddr}, ""},
		{"[ff3e::1]:65535%eth0", Input{Interface: "eth0", Address: addr("ff3e::1"), Port: 65535, Source: zeroAddr}, ""},
		{"2001:db8::5@[ff3e::1]:5000%eth0", Input{Interface: "eth0", Address: addr("ff3e::1"), Port: 5000, Source: addr("2001:db8::5")}, ""},
		{"[2001:db8::5]@[ff3e::1]:5000%eth0", Input{Interface: "eth0", Address: addr("ff3e::1"), Port: 5000, Source: addr("2001:db8::5")}, "2001:db8::5@[ff3e::1]:5000%eth0"},
		{"[FF3E:0::1]:5000%eth0", Input{Interface: "eth0", Address: addr("ff3e::1"), Port: 5000, Source: zeroAddr}, "[ff3e::1]:5000%eth0"},
		{"239.1.1.1:5000%fifteen-bytes-x", Input{Interface: "fifteen-bytes-x", Address: addr("239.1.1.1"), Port: 5000, Source: zeroAddr}, ""},
		{"239.1.1.1:5000%a+b#c=d'\"*é", Input{Interface: "a+b#c=d'\"*é", Address: addr("239.1.1.1"), Port: 5000, Source: zeroAddr}, ""},
		{"239.1.1.1:5000%...", Input{Interface: "...", Address: addr("239.1.1.1"), Port: 5000, Source: zeroAddr}, ""},
		{"239.1.1.1%eth0", Input{Interface: "eth0", Address: addr("239.1.1.1")}, ""},
		{"[ff3e::1]%eth0", Input{Interface: "eth0", Address: addr("ff3e::1")}, ""},
		{"239.1.0.0/16%eth+", Input{Interface: "eth+", Address: addr("239.1.0.0"), Len: 16}, ""},
		{"10.0.0.5@239.1.0.0/16:5000%+", Input{Interface: "+", Address: addr("239.1.0.0"), Len: 16, Port: 5000, Source: addr("10.0.0.5")}, ""},
		{"[ff3e::]/64:5000%eth0", Input{Interface: "eth0", Address: addr("ff3e::"), Len: 64, Port: 5000}, ""},
		{"[ff3e::]/64%eth0,vlan=7", Input{Interface: "eth0", Address: addr("ff3e::"), Len: 64, VLAN: VLAN{ID: 7}}, ""},
		{"239.1.1.1/32:5%eth0,vlan=100.7", Input{Interface: "eth0", Address: addr("239.1.1.1"), Port: 5, VLAN: VLAN{ID: 7, Outer: 100}}, "239.1.1.1:5%eth0,vlan=100.7"},
	} {
		got, _, err := ParseInput(c.text)
		if err != nil || got != c.want {
			t.Errorf("ParseInput(%q) = %+v, %v", c.text, got, err)
			continue
		}
		if want := c.canonical; want == "" && got.String() != c.text || want != "" && got.String() != want {
			t.Errorf("%q is written %q", c.text, got)
		}
	}
}

var zeroAddr = Input{}.Source

func TestParseInputErrors(t *testing.T) {
	const (
		wantPort     = "1 to 65535, or no ':' for any port"
		wantBrackets = "brackets around an IPv6 address, which end it before a port: [ADDRESS]:PORT"
		wantKey      = "KEY=VALUE, KEY one of vlan, from, join, except, csum, loop, loop-guard, local, local-control, broadcast, rate, burst, health"
		wantVLAN     = "vlan=ID or vlan=OUTER.ID, each 1 to 4094"
		wantJoin     = "join=none, join=all or join=GROUP+GROUP..."
		wantRate     = "rate=Npps or rate=Nbit, N a number, or one with k, M or G (rate=100kpps, rate=50Mbit)"
		wantBurst    = "burst=N, packets or bytes as the rate is of packets or bits, N a number, or one with k, M or G"
		wantPlain    = "an interface name without '/', ':', ',' or '%'"
		wantOne      = "one '%' alone, before the interface: addresses take no zone, and an interface with '%' in its name cannot be written"
		wantShown    = "an interface name of printable characters without white space"
	)
	for _, c := range []struct{ text, field, value, want string }{
		{"", "interface", "", "ADDRESS[/LEN][:PORT]%INTERFACE"},
		{"239.1.1.1:5000", "interface", "", "ADDRESS[/LEN][:PORT]%INTERFACE"},
		{"239.1.1.1:5000%", "interface", "", "an interface name"},
		{"239.1.1.1:%eth0", "port", "", wantPort},
		{"[ff3e::1]:%eth0", "port", "", wantPort},
		{"ff3e::1:5000%eth0", "address", "ff3e::1:5000", wantBrackets},
		{"ff3e::1%eth0", "address", "ff3e::1", wantBrackets},
		{"ff3e::/64%eth0", "address", "ff3e::/64", wantBrackets},
		{"239.1.0.0/%eth0", "prefix", "/", "/1 to /32"},
		{"239.1.0.0/0%eth0", "prefix", "/0", "/1 to /32"},
		{"239.1.0.0/33:5000%eth0", "prefix", "/33", "/1 to /32"},
		{"239.1.0.0/016%eth0", "prefix", "/016", "/1 to /32"},
		{"239.1.0.0/16/8%eth0", "prefix", "/16/8", "/1 to /32"},
		{"[ff3e::]/129%eth0", "prefix", "/129", "/1 to /128"},
		{"239.1.0.0/16:x%eth0", "port", "x", wantPort},
		{"239.1.1.1:5:6%eth0", "address", "239.1.1.1:5:6", "an IPv4 or IPv6 address"},
		{"239.1.1.1:0%eth0", "port", "0", wantPort},
		{"239.1.1.1:65536%eth0", "port", "65536", wantPort},
		{"239.1.1.1:99999999999999999999%eth0", "port", "99999999999999999999", wantPort},
		{"239.1.1.1:+5%eth0", "port", "+5", wantPort},
		{"239.1.1.1:05%eth0", "port", "05", wantPort},
		{"239.1.1.1:5_0%eth0", "port", "5_0", wantPort},
		{"239.1.1.1:any%eth0", "port", "any", wantPort},
		{"%eth0", "address", "", "ADDRESS[/LEN][:PORT]"},
		{":5%eth0", "address", "", "ADDRESS[/LEN][:PORT]"},
		{"[]:5%eth0", "address", "", "ADDRESS[/LEN][:PORT]"},
		{"239.1.1.300:5%eth0", "address", "239.1.1.300", "an IPv4 or IPv6 address"},
		{"239.1.1.01:5%eth0", "address", "239.1.1.01", "an IPv4 or IPv6 address"},
		{"239.1.1:5%eth0", "address", "239.1.1", "an IPv4 or IPv6 address"},
		{" 239.1.1.1:5%eth0", "address", " 239.1.1.1", "an IPv4 or IPv6 address"},
		{"camera.example:5%eth0", "address", "camera.example", "an IPv4 or IPv6 address"},
		{"[ff3e::1:5%eth0", "address", "[ff3e::1:5", "an IPv4 address, or an IPv6 one in brackets"},
		{"[ff3e::1]x:5%eth0", "address", "[ff3e::1]x:5", "an IPv4 address, or an IPv6 one in brackets"},
		{"[239.1.1.1]:5%eth0", "address", "[239.1.1.1]:5", "no brackets around an IPv4 address"},
		{"[ff3e::/64]:5000%eth0", "address", "ff3e::/64", "one address, without a prefix length"},
		{"[::ffff:239.1.1.1]:5%eth0", "address", "::ffff:239.1.1.1", "239.1.1.1: IPv4-mapped IPv6 addresses are not sent on a wire (RFC 4291 section 2.5.5.2)"},
		{"::ffff:10.0.0.5@239.1.1.1:5%eth0", "source", "::ffff:10.0.0.5", "10.0.0.5: IPv4-mapped IPv6 addresses are not sent on a wire (RFC 4291 section 2.5.5.2)"},
		{"@239.1.1.1:5%eth0", "source", "", "an IPv4 or IPv6 address"},
		{"*@239.1.1.1:5%eth0", "source", "*", "an IPv4 or IPv6 address"},
		{"239.1.1.1:5%eth0,from=net", "option", "from=net", "from=host"},
		{"10.0.0.0/33@239.1.1.1:5%eth0", "source", "/33", "/1 to /32"},
		{"10.0.0.0/0@239.1.1.1:5%eth0", "source", "/0", "/1 to /32"},
		{"10.0.0.0/@239.1.1.1:5%eth0", "source", "/", "/1 to /32"},
		{"2001:db8::/129@[ff3e::1]:5%eth0", "source", "/129", "/1 to /128"},
		{"239.1.1.1:5-%eth0", "port", "5-", wantRange},
		{"239.1.1.1:5-5%eth0", "port", "5-5", wantRange},
		{"239.1.1.1:6-5%eth0", "port", "6-5", wantRange},
		{"239.1.1.1:0-5%eth0", "port", "0-5", wantRange},
		{"239.1.1.1:5-65536%eth0", "port", "5-65536", wantRange},
		{"239.1.1.1:5-6-7%eth0", "port", "5-6-7", wantRange},
		{"239.1.1.1:5%eth0,except=", "option", "except=", "except=ADDRESS+ADDRESS/LEN..."},
		{"239.1.1.1:5%eth0,except=10.0.0.1+", "option", "except=10.0.0.1+", "except=ADDRESS+ADDRESS/LEN..."},
		{"239.1.1.1:5%eth0,except=10.0.0.0/33", "option", "except=10.0.0.0/33", "except=ADDRESS+ADDRESS/LEN..."},
		{"239.1.1.1:5%eth0,except=fe80::1%eth0", "option", "except=fe80::1%eth0", "except=ADDRESS+ADDRESS/LEN..."},
		{"[10.0.0.5]@239.1.1.1:5%eth0", "source", "[10.0.0.5]", "an IPv4 address, or an IPv6 one in brackets"},
		{"10.0.0.5:9@239.1.1.1:5%eth0", "source", "10.0.0.5:9", "an IPv4 or IPv6 address"},
		{"10.0.0.5@10.0.0.6@239.1.1.1:5%eth0", "address", "10.0.0.6@239.1.1.1", "an IPv4 or IPv6 address"},
		{"[fe80::1%eth0]:5000%eth1", "interface", "eth0]:5000%eth1", wantOne},
		{"[fe80::1%eth0]:5000", "interface", "eth0]:5000", wantOne},
		{"fe80::1%eth0@[ff3e::1]:5000%eth1", "interface", "eth0@[ff3e::1]:5000%eth1", wantOne},
		{"239.1.1.1:5%et%h", "interface", "et%h", wantOne},
		{"239.1.1.1:5%sixteen-bytes-xy", "interface", "sixteen-bytes-xy", "at most 15 bytes"},
		{"239.1.1.1:5%.", "interface", ".", `an interface name other than "." and ".."`},
		{"239.1.1.1:5%..", "interface", "..", `an interface name other than "." and ".."`},
		{"239.1.1.1:5%eth0/1", "interface", "eth0/1", wantPlain},
		{"239.1.1.1:5%eth0:1", "interface", "eth0:1", wantPlain},
		{"239.1.1.1:5%veth1@if2", "interface", "veth1@if2", "the name alone, without the '@' and what follows it in the output of ip link"},
		{"239.1.1.1:5%eth 0", "interface", "eth 0", wantShown},
		{"239.1.1.1:5%eth0\n", "interface", "eth0\n", wantShown},
		{"239.1.1.1:5%eth\x00", "interface", "eth\x00", wantShown},
		{"239.1.1.1:5%eth\x1b[2J", "interface", "eth\x1b[2J", wantShown},
		{"239.1.1.1:5%eth\xff", "interface", "eth\xff", wantShown},
		{"239.1.1.1:5%eth\u00a0", "interface", "eth\u00a0", wantShown},
		{"239.1.1.1:5%à", "interface", "à", wantShown}, // c3 a0: the kernel takes a0 for white space
		{"239.1.1.1:5%eth0,ttl=8", "option", "ttl=8", wantKey},
		{"239.1.1.1:5%eth0,", "option", "", wantKey},
		{"239.1.1.1:5%eth0,vlan", "option", "vlan", wantVLAN},
		{"239.1.1.1:5%eth0,vlan=0", "option", "vlan=0", wantVLAN},
		{"239.1.1.1:5%eth0,vlan=4095", "option", "vlan=4095", wantVLAN},
		{"239.1.1.1:5%eth0,vlan=1.", "option", "vlan=1.", wantVLAN},
		{"239.1.1.1:5%eth0,vlan=.1", "option", "vlan=.1", wantVLAN},
		{"239.1.1.1:5%eth0,vlan=1.2.3", "option", "vlan=1.2.3", wantVLAN},
		{"239.1.1.1:5%eth0,vlan=7,vlan=7", "option", "vlan=7", "vlan only once"},
		{"239.1.0.0/16%eth0,join=", "option", "join=", wantJoin},
		{"239.1.0.0/16%eth0,join=some", "option", "join=some", wantJoin},
		{"239.1.0.0/16%eth0,join=239.1.1.1+", "option", "join=239.1.1.1+", wantJoin},
		{"239.1.0.0/16%eth0,join=::ffff:239.1.1.1", "option", "join=::ffff:239.1.1.1", wantJoin},
		{"239.1.1.1:5%eth0,csum=zero", "option", "csum=zero", "csum=any"},
		{"239.1.1.1:5%eth0,local=no", "option", "local=no", "local=yes"},
		{"224.0.0.1:5%eth0,local-control=yes", "option", "local-control=yes", "local-control=allow"},
		{"224.0.0.1:5%eth0,local-control=allow,local-control=allow", "option", "local-control=allow", "local-control only once"},
		{"10.0.0.255:5%eth0,broadcast", "option", "broadcast", "broadcast=allow"},
		{"239.1.1.1:5%eth0,loop=yes", "option", "loop=yes", "loop=two-way or loop=allow"},
		{"239.1.1.1:5%eth0,loop-guard=on", "option", "loop-guard=on", "loop-guard=off"},
		{"239.1.1.1:5%eth0,loop=two-way,loop=allow", "option", "loop=allow", "loop only once"},
		{"239.1.1.1:5%eth0,rate=5", "option", "rate=5", wantRate},
		{"239.1.1.1:5%eth0,rate=0pps", "option", "rate=0pps", wantRate},
		{"239.1.1.1:5%eth0,rate=pps", "option", "rate=pps", wantRate},
		{"239.1.1.1:5%eth0,rate=-5pps", "option", "rate=-5pps", wantRate},
		{"239.1.1.1:5%eth0,rate=1.5Mbit", "option", "rate=1.5Mbit", wantRate},
		{"239.1.1.1:5%eth0,rate=5Tbit", "option", "rate=5Tbit", wantRate},
		{"239.1.1.1:5%eth0,rate=99999999999999999Gbit", "option", "rate=99999999999999999Gbit", wantRate},
		{"239.1.1.1:5%eth0,rate=5pps,burst=x", "option", "burst=x", wantBurst},
		{"239.1.1.1:5%eth0,burst=5", "burst", "5", "rate=Npps or rate=Nbit, too"},
	} {
		got, _, err := ParseInput(c.text)
		if err == nil {
			t.Errorf("ParseInput(%q) = %v, no error", c.text, got)
			continue
		}
		if got != (Input{}) {
			t.Errorf("ParseInput(%q): an error and %+v", c.text, got)
		}
		if f := fieldError(t, err); *f != (FieldError{Field: c.field, Value: c.value, Want: c.want}) {
			t.Errorf("ParseInput(%q): %+v", c.text, *f)
		}
	}
}

func TestParseOutput(t *testing.T) {
	out := func(p Policy) Output {
		return Output{Interface: "eth1", Address: addr("239.2.2.2"), Port: 6000, Policy: p}
	}
	for _, c := range []struct {
		policies  string
		want      Policy
		canonical string // "" when it is the policies
	}{
		{"", Policy{}, ""},
		{",src=iface,sport=keep,ttl=keep,dscp=keep,csum=update", Policy{}, "none"},
		{",src=keep", Policy{Source: SourceKeep}, ""},
		{",src=10.0.0.1", Policy{Source: SourceAddress, SourceAddr: addr("10.0.0.1")}, ""},
		{",src=10.0.0.1:7", Policy{Source: SourceAddress, SourceAddr: addr("10.0.0.1"), SourcePort: 7}, ""},
		{",sport=7,src=10.0.0.1", Policy{Source: SourceAddress, SourceAddr: addr("10.0.0.1"), SourcePort: 7}, ",src=10.0.0.1:7"},
		{",src=10.0.0.1,sport=7", Policy{Source: SourceAddress, SourceAddr: addr("10.0.0.1"), SourcePort: 7}, ",src=10.0.0.1:7"},
		{",src=2001:db8::1", Policy{Source: SourceAddress, SourceAddr: addr("2001:db8::1")}, ""},
		{",src=[2001:db8::1]", Policy{Source: SourceAddress, SourceAddr: addr("2001:db8::1")}, ",src=2001:db8::1"},
		{",src=[2001:db8::1]:7", Policy{Source: SourceAddress, SourceAddr: addr("2001:db8::1"), SourcePort: 7}, ""},
		{",sport=65535", Policy{SourcePort: 65535}, ""},
		{",sport=1,src=keep", Policy{Source: SourceKeep, SourcePort: 1}, ",src=keep,sport=1"},
		{",ttl=dec", Policy{TTL: TTLDecrement}, ""},
		{",ttl=1", Policy{TTL: TTLSet, TTLValue: 1}, ""},
		{",ttl=255", Policy{TTL: TTLSet, TTLValue: 255}, ""},
		{",dscp=0", Policy{DSCP: DSCPSet}, ",dscp=be"},
		{",dscp=AF41", Policy{DSCP: DSCPSet, DSCPValue: 34}, ",dscp=af41"},
		{",dscp=63", Policy{DSCP: DSCPSet, DSCPValue: 63}, ""},
		{",csum=zero", Policy{Checksum: ChecksumZero}, ""},
		{",minttl=2", Policy{MinTTL: 2}, ""},
		{",broadcast=allow,ttl=dec", Policy{TTL: TTLDecrement, Broadcast: true}, ",ttl=dec,broadcast=allow"},
		{",vlan=pop", Policy{VLAN: VLANPop}, ",vlan=pop"},
		{",vlan=pop", Policy{VLAN: VLANPop}, ""},
		{",vlan=100", Policy{VLAN: VLANSet, VLANTags: VLAN{ID: 100}}, ""},
		{",pcp=0,vlan=7.100", Policy{VLAN: VLANSet, VLANTags: VLAN{ID: 100, Outer: 7}, PCPSet: true}, ",vlan=7.100,pcp=0"},
		{",rate=1500pps", Policy{Rate: Rate{Packets: 1500}}, ""},
		{",burst=64k,rate=2000Mbit", Policy{Rate: Rate{Bits: 2e9, Burst: 64000}}, ",rate=2Gbit,burst=64k"},
		{",csum=zero,dscp=ef,ttl=8,sport=9,src=keep",
			Policy{Source: SourceKeep, SourcePort: 9, TTL: TTLSet, TTLValue: 8, DSCP: DSCPSet, DSCPValue: 46, Checksum: ChecksumZero}, ",src=keep,sport=9,ttl=8,dscp=ef,csum=zero"},
	} {
		const endpoint = "239.2.2.2:6000%eth1"
		got, err := ParseOutput(endpoint + c.policies)
		if err != nil || got != out(c.want) {
			t.Errorf("%q: %+v, %v", c.policies, got, err)
			continue
		}
		want := c.canonical
		switch want {
		case "":
			want = c.policies
		case "none":
			want = ""
		}
		if got.String() != endpoint+want {
			t.Errorf("%q is written %q", c.policies, got)
		}
	}
	if got := mustOutput(t, "[2001:db8::9]:6000%eth1,ttl=3"); got != (Output{Interface: "eth1", Address: addr("2001:db8::9"), Port: 6000, Policy: Policy{TTL: TTLSet, TTLValue: 3}}) {
		t.Errorf("%+v", got)
	}
}

func TestParseOutputErrors(t *testing.T) {
	const (
		wantPort = "1 to 65535, +N or -N to shift the packet's, or no ':' to keep it"
		wantVLAN = "vlan=keep, vlan=pop, vlan=ID or vlan=OUTER.ID, each 1 to 4094"
		wantKey  = "KEY=VALUE, KEY one of src, sport, ttl, minttl, dscp, csum, vlan, pcp, broadcast, rate, burst"
		wantSrc  = "src=iface, src=keep, src=ADDRESS or src=ADDRESS:PORT (IPv6: src=[ADDRESS]:PORT)"
		wantDSCP = "dscp=keep, dscp=0 to 63, or a name: be, cs0 to cs7, af11 to af43, ef, voice-admit, le"
	)
	for _, c := range []struct{ text, field, value, want string }{
		{"239.2.2.2:70000%eth1", "port", "70000", wantPort},
		{"239.2.2.2:+0%eth1", "port", "+0", wantPort},
		{"239.2.2.2:+65535%eth1", "port", "+65535", wantPort},
		{"239.2.2.2:--5%eth1", "port", "--5", wantPort},
		{"239.2.2.2:%eth1", "port", "", wantPort},
		{"239.2.2.2:6%,ttl=3", "interface", "", "an interface name"},
		{"239.2.2.2:6,ttl=3", "interface", "", "ADDRESS[/LEN][:PORT]%INTERFACE"},
		{"10.0.0.5@239.2.2.2:6%eth1", "address", "10.0.0.5@239.2.2.2:6", "239.2.2.2:6 alone: the source of an output is a policy, src=10.0.0.5"},
		{"239.2.2.2:6%e,", "policy", "", wantKey},
		{"239.2.2.2:6%e,ttl=3,", "policy", "", wantKey},
		{"239.2.2.2:6%e, ttl=3", "policy", " ttl=3", wantKey},
		{"239.2.2.2:6%e,foo=1", "policy", "foo=1", wantKey},
		{"239.2.2.2:6%e,TTL=1", "policy", "TTL=1", wantKey},
		{"239.2.2.2:6%e,=1", "policy", "=1", wantKey},
		{"239.2.2.2:6%e,ttl", "policy", "ttl", "ttl=keep, ttl=dec or ttl=1 to 255"},
		{"239.2.2.2:6%e,ttl=", "policy", "ttl=", "ttl=keep, ttl=dec or ttl=1 to 255"},
		{"239.2.2.2:6%e,ttl=0", "policy", "ttl=0", "ttl=keep, ttl=dec or ttl=1 to 255"},
		{"239.2.2.2:6%e,ttl=256", "policy", "ttl=256", "ttl=keep, ttl=dec or ttl=1 to 255"},
		{"239.2.2.2:6%e,ttl=08", "policy", "ttl=08", "ttl=keep, ttl=dec or ttl=1 to 255"},
		{"239.2.2.2:6%e,ttl=-1", "policy", "ttl=-1", "ttl=keep, ttl=dec or ttl=1 to 255"},
		{"239.2.2.2:6%e,ttl=3,ttl=3", "policy", "ttl=3", "ttl only once"},
		{"239.2.2.2:6%e,src=keep,src=iface", "policy", "src=iface", "src only once"},
		{"239.2.2.2:6%e,dscp=1,dscp=keep", "policy", "dscp=keep", "dscp only once"},
		{"239.2.2.2:6%e,csum=zero,csum=zero", "policy", "csum=zero", "csum only once"},
		{"239.2.2.2:6%e,sport=1,sport=2", "policy", "sport=2", "sport only once"},
		{"239.2.2.2:6%e,sport=keep,sport=2", "policy", "sport=2", "sport only once"},
		{"239.2.2.2:6%e,src=1.2.3.4:5,sport=4", "policy", "sport=4", "the source port only once: it has been set"},
		{"239.2.2.2:6%e,src=1.2.3.4:5,sport=keep", "policy", "sport=keep", "the source port only once: it has been set"},
		{"239.2.2.2:6%e,sport=4,src=1.2.3.4:5", "policy", "src=1.2.3.4:5", "the source port only once: sport has it"},
		{"239.2.2.2:6%e,sport=0", "policy", "sport=0", "sport=keep or sport=1 to 65535"},
		{"239.2.2.2:6%e,sport=65536", "policy", "sport=65536", "sport=keep or sport=1 to 65535"},
		{"239.2.2.2:6%e,src=", "policy", "src=", wantSrc},
		{"239.2.2.2:6%e,src=foo", "policy", "src=foo", wantSrc},
		{"239.2.2.2:6%e,src=[1.2.3.4]:5", "policy", "src=[1.2.3.4]:5", wantSrc},
		{"239.2.2.2:6%e,src=1.2.3.4:0", "policy", "src=1.2.3.4:0", wantSrc + ", PORT 1 to 65535"},
		{"239.2.2.2:6%e,src=1.2.3.4:", "policy", "src=1.2.3.4:", wantSrc + ", PORT 1 to 65535"},
		{"239.2.2.2:6%e,src=::ffff:1.2.3.4", "policy", "src=::ffff:1.2.3.4", wantSrc},
		{"239.2.2.2:6%e,src=fe80::1%e", "policy", "src=fe80::1%e", wantSrc},
		{"239.2.2.2:6%e,dscp=64", "policy", "dscp=64", wantDSCP},
		{"239.2.2.2:6%e,dscp=cs8", "policy", "dscp=cs8", wantDSCP},
		{"239.2.2.2:6%e,dscp=af44", "policy", "dscp=af44", wantDSCP},
		{"239.2.2.2:6%e,dscp=af01", "policy", "dscp=af01", wantDSCP},
		{"239.2.2.2:6%e,dscp=", "policy", "dscp=", wantDSCP},
		{"239.2.2.2:6%e,minttl=0", "policy", "minttl=0", "minttl=1 to 255"},
		{"239.2.2.2:6%e,minttl=256", "policy", "minttl=256", "minttl=1 to 255"},
		{"239.2.2.2:6%e,vlan=push", "policy", "vlan=push", wantVLAN},
		{"239.2.2.2:6%e,vlan=4095", "policy", "vlan=4095", wantVLAN},
		{"239.2.2.2:6%e,vlan=7,vlan=pop", "policy", "vlan=pop", "vlan only once"},
		{"239.2.2.2:6%e,pcp=8", "policy", "pcp=8", "pcp=0 to 7"},
		{"239.2.2.2:6%e,pcp=", "policy", "pcp=", "pcp=0 to 7"},
		{"239.2.2.2:6%e,rate=1,burst=2", "policy", "rate=1", "rate=Npps or rate=Nbit, N a number, or one with k, M or G (rate=100kpps, rate=50Mbit)"},
		{"239.2.2.2:6%e,burst=2", "burst", "2", "rate=Npps or rate=Nbit, too"},
		{"239.2.2.2:6%e,csum=no", "policy", "csum=no", "csum=update or csum=zero"},
	} {
		got, err := ParseOutput(c.text)
		if err == nil {
			t.Errorf("ParseOutput(%q) = %v, no error", c.text, got)
			continue
		}
		if got != (Output{}) {
			t.Errorf("ParseOutput(%q): an error and %+v", c.text, got)
		}
		if f := fieldError(t, err); *f != (FieldError{Field: c.field, Value: c.value, Want: c.want}) {
			t.Errorf("ParseOutput(%q): %+v", c.text, *f)
		}
	}
}

// TestParseErrorText holds the whole text of the main errors.
func TestParseErrorText(t *testing.T) {
	for text, want := range map[string]string{
		"239.2.2.2:70000%eth1":      `output "239.2.2.2:70000%eth1": port "70000": want 1 to 65535, +N or -N to shift the packet's, or no ':' to keep it`,
		"ff0e::2:6000%eth1":         `output "ff0e::2:6000%eth1": address "ff0e::2:6000": want brackets around an IPv6 address, which end it before a port: [ADDRESS]:PORT`,
		"239.2.2.2:6000%eth1,foo=1": `output "239.2.2.2:6000%eth1,foo=1": policy "foo=1": want KEY=VALUE, KEY one of src, sport, ttl, minttl, dscp, csum, vlan, pcp, broadcast, rate, burst`,
		"239.2.2.2:6000%a\nb":       `output "239.2.2.2:6000%a\nb": interface "a\nb": want an interface name of printable characters without white space`,
	} {
		_, err := ParseOutput(text)
		checkLines(t, err, want)
	}
	_, _, err := ParseInput("239.1.1.1:x%eth0")
	checkLines(t, err, `input "239.1.1.1:x%eth0": port "x": want 1 to 65535, or no ':' for any port`)
}

// TestLongValuesAreCut: a message repeats no more than a bounded part of a value.
func TestLongValuesAreCut(t *testing.T) {
	long := strings.Repeat("é\x00", 1<<20)
	for _, text := range []string{long, long + "%eth0", "239.1.1.1:5%" + long, "239.1.1.1:" + long + "%e", long + "@" + long + "%e", "239.1.1.1:5%e," + long} {
		_, _, inErr := ParseInput(text)
		_, outErr := ParseOutput(text)
		for _, err := range []error{inErr, outErr} {
			if err == nil {
				t.Fatalf("no error for %d bytes", len(text))
			}
			if n := len(err.Error()); n > 2000 || strings.ContainsAny(err.Error(), "\n\x00") {
				t.Errorf("message of %d bytes: %.200s", n, err)
			}
		}
	}
	err := Rule{Name: long}.Validate()
	if n := len(err.Error()); n > 4000 {
		t.Errorf("message of %d bytes", n)
	}
}
