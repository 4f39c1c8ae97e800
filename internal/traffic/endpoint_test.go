package traffic

import (
	"net/netip"
	"strings"
	"testing"
)

func TestParseTarget(t *testing.T) {
	for in, want := range map[string]Target{
		"239.1.1.1:5000%eth0":  {netip.MustParseAddrPort("239.1.1.1:5000"), "eth0"},
		"10.0.0.9:65535%a.100": {netip.MustParseAddrPort("10.0.0.9:65535"), "a.100"},
		"[ff3e::1]:1%eth0":     {netip.MustParseAddrPort("[ff3e::1]:1"), "eth0"},
	} {
		got, err := ParseTarget(in)
		if got != want || err != nil || got.String() != in {
			t.Errorf("%q: got %s, %v", in, got, err)
		}
	}
	for in, want := range map[string]string{
		"":                                `endpoint "": no interface: must end in %INTERFACE, such as %eth0`,
		"239.1.1.1:5000":                  `endpoint "239.1.1.1:5000": no interface: must end in %INTERFACE, such as %eth0`,
		"239.1.1.1:5000%":                 `endpoint "239.1.1.1:5000%": no interface: must end in %INTERFACE, such as %eth0`,
		"239.1.1.1:0%eth0":                `endpoint "239.1.1.1:0%eth0": port "0": must be 1 to 65535`,
		"239.1.1.1:65536%eth0":            `endpoint "239.1.1.1:65536%eth0": port "65536": must be 1 to 65535`,
		"239.1.1.1:x%eth0":                `endpoint "239.1.1.1:x%eth0": port "x": must be 1 to 65535`,
		"239.1.1.1:%eth0":                 `endpoint "239.1.1.1:%eth0": port "": must be 1 to 65535`,
		"239.1.1.1%eth0":                  `endpoint "239.1.1.1%eth0": no port: must be ADDRESS:PORT%INTERFACE`,
		"[ff3e::1]%eth0":                  `endpoint "[ff3e::1]%eth0": no port: must be ADDRESS:PORT%INTERFACE`,
		"239.1.1.1%eth0:5000":             `endpoint "239.1.1.1%eth0:5000": port after the interface: must be ADDRESS:PORT%INTERFACE`,
		"239.1.1:5000%eth0":               `endpoint "239.1.1:5000%eth0": address "239.1.1": must be an IPv4 or IPv6 address`,
		"camera:5000%eth0":                `endpoint "camera:5000%eth0": address "camera": must be an IPv4 or IPv6 address`,
		"ff3e::1:5000%eth0":               `endpoint "ff3e::1:5000%eth0": address "ff3e::1": an IPv6 address stands in brackets, an IPv4 address does not`,
		"[239.1.1.1]:5000%eth0":           `endpoint "[239.1.1.1]:5000%eth0": address "[239.1.1.1]": an IPv6 address stands in brackets, an IPv4 address does not`,
		"[ff3e::1:5000%eth0":              `endpoint "[ff3e::1:5000%eth0": address "[ff3e::1": bracket not closed`,
		"[fe80::1%eth0]:5000%eth0":        `endpoint "[fe80::1%eth0]:5000%eth0": address "fe80::1%eth0": must be without a zone, the interface follows the port`,
		"[fe80::1%eth0]:5000":             `endpoint "[fe80::1%eth0]:5000": no interface: must end in %INTERFACE, such as %eth0`,
		"[::ffff:1.2.3.4]:5000%eth0":      `endpoint "[::ffff:1.2.3.4]:5000%eth0": address "::ffff:1.2.3.4": must be written as IPv4, 1.2.3.4`,
		"0.0.0.0:5000%eth0":               `endpoint "0.0.0.0:5000%eth0": address "0.0.0.0": must not be the unspecified address`,
		"239.1.1.1:5000%sixteen-letters-": `endpoint "239.1.1.1:5000%sixteen-letters-": interface "sixteen-letters-": must be a name of up to 15 bytes`,
		"239.1.1.1:5000%a/b":              `endpoint "239.1.1.1:5000%a/b": interface "a/b": must be a name of up to 15 bytes`,
	} {
		got, err := ParseTarget(in)
		if err == nil || err.Error() != want || got != (Target{}) {
			t.Errorf("%q\n got %v, %v\nwant %s", in, got, err, want)
		}
	}
}

func TestParseSubscription(t *testing.T) {
	any4 := Target{netip.MustParseAddrPort("239.1.1.1:5000"), "eth0"}
	any6 := Target{netip.MustParseAddrPort("[ff3e::1]:5000"), "eth0"}
	for in, want := range map[string]Subscription{
		"239.1.1.1:5000%eth0":               {Target: any4},
		"10.0.0.5@239.1.1.1:5000%eth0":      {netip.MustParseAddr("10.0.0.5"), any4},
		"[2001:db8::1]@[ff3e::1]:5000%eth0": {netip.MustParseAddr("2001:db8::1"), any6},
		"2001:db8::1@[ff3e::1]:5000%eth0":   {netip.MustParseAddr("2001:db8::1"), any6},
	} {
		got, err := ParseSubscription(in)
		if got != want || err != nil {
			t.Errorf("%q: got %s, %v", in, got, err)
		}
		if again, err := ParseSubscription(got.String()); again != got || err != nil {
			t.Errorf("%q formats as %q, which reads as %s, %v", in, got, again, err)
		}
	}
	for in, want := range map[string]string{
		"239.1.1.9@239.1.1.1:5000%eth0":      `source 239.1.1.9: must be a unicast address`,
		"10.0.0.5@10.0.0.9:5000%eth0":        `source 10.0.0.5 with address 10.0.0.9, which is not multicast: only groups are source-specific`,
		"2001:db8::1@239.1.1.1:5000%eth0":    `source 2001:db8::1 and group 239.1.1.1: must be of one family`,
		"@239.1.1.1:5000%eth0":               `source: address "": must be an IPv4 or IPv6 address`,
		"[2001:db8::1@[ff3e::1]:5000%eth0":   `source "[2001:db8::1": bracket not closed`,
		"10.0.0.5@239.1.1.1:0%eth0":          `port "0": must be 1 to 65535`,
		"10.0.0.5@10.0.0.6@239.1.1.1:1%eth0": `address "10.0.0.6@239.1.1.1": must be an IPv4 or IPv6 address`,
	} {
		got, err := ParseSubscription(in)
		want = `endpoint "` + in + `": ` + want
		if err == nil || err.Error() != want {
			t.Errorf("%q\n got %v, %v\nwant %s", in, got, err, want)
		}
	}
}

// FuzzParseSubscription: an error xor a subscription, which formats as
// something that reads the same.
func FuzzParseSubscription(f *testing.F) {
	for _, s := range []string{"239.1.1.1:5000%eth0", "10.0.0.5@239.1.1.1:5000%eth0", "[2001:db8::1]@[ff3e::1]:5000%eth0", "[::]:1%%", "@:%"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		sub, err := ParseSubscription(s)
		if err != nil {
			if strings.ContainsAny(strings.TrimPrefix(err.Error(), "endpoint "+s), "\n") {
				t.Fatalf("%q: error of more than one line: %q", s, err)
			}
			return
		}
		if again, err := ParseSubscription(sub.String()); again != sub || err != nil {
			t.Fatalf("%q formats as %q, which reads as %s, %v", s, sub, again, err)
		}
	})
}

func TestParseDSCP(t *testing.T) {
	for in, want := range map[string]uint8{
		"0": 0, "63": 63, "ef": 46, "EF": 46, "af11": 10, "af41": 34, "af43": 38, "cs0": 0, "cs7": 56, "le": 1, "va": 44,
	} {
		if got, err := ParseDSCP(in); got != want || err != nil {
			t.Errorf("%q: got %d, %v, want %d", in, got, err, want)
		}
	}
	for _, in := range []string{"", "64", "-1", "af44", "af51", "af1", "cs8", "cs", "best"} {
		if got, err := ParseDSCP(in); err == nil {
			t.Errorf("%q was read as %d", in, got)
		}
	}
	if _, err := ParseDSCP("64"); err.Error() != `dscp "64": must be 0 to 63, or a name such as ef, af41 or cs3` {
		t.Error(err)
	}
}

func TestExpand(t *testing.T) {
	target := Target{netip.MustParseAddrPort("239.1.1.255:5000"), "eth0"}
	got, err := target.expand(3)
	if err != nil || len(got) != 3 || got[2].String() != "239.1.2.1:5000%eth0" {
		t.Errorf("got %v, %v", got, err)
	}
	for _, c := range []struct {
		addr string
		n    int
		want string
	}{
		{"239.1.1.1", 0, "groups 0: must be 1 to 65536"},
		{"239.1.1.1", 65537, "groups 65537: must be 1 to 65536"},
		{"10.0.0.1", 2, "groups 2 from 10.0.0.1: the address must be multicast"},
		{"239.255.255.254", 3, "groups 3 from 239.255.255.254: only 2 multicast addresses follow"},
	} {
		target := Target{netip.AddrPortFrom(netip.MustParseAddr(c.addr), 1), "eth0"}
		if _, err := target.expand(c.n); err == nil || err.Error() != c.want {
			t.Errorf("got %v, want %s", err, c.want)
		}
	}
}
