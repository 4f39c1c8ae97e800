package mroute

import (
	"encoding/binary"
	"encoding/hex"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"xdpcast/pkg/flow"
	"xdpcast/pkg/rules"
)

// attr is a netlink attribute.
func attr(kind uint16, value ...byte) []byte {
	b := binary.NativeEndian.AppendUint16(nil, uint16(4+len(value)))
	b = append(binary.NativeEndian.AppendUint16(b, kind), value...)
	return append(b, make([]byte, -len(b)&3)...)
}

func number(n uint32) []byte { return binary.NativeEndian.AppendUint32(nil, n) }

// route is a kernel message: struct rtmsg and attributes.
func route(family, table byte, flags uint32, attrs ...[]byte) []byte {
	b := []byte{family, 32, 32, 0, table, 17, 0, 5}
	return append(binary.NativeEndian.AppendUint32(b, flags), slices.Concat(attrs...)...)
}

func hop(index uint32, threshold byte) []byte {
	return append([]byte{8, 0, 0, threshold}, number(index)...)
}

func TestParse(t *testing.T) {
	src, dst := attr(unix.RTA_SRC, 10, 0, 0, 1), attr(unix.RTA_DST, 239, 1, 1, 1)
	key := Key{Source: netip.MustParseAddr("10.0.0.1"), Group: netip.MustParseAddr("239.1.1.1")}
	six := netip.MustParseAddr("ff0e::1")
	src6, dst6 := attr(unix.RTA_SRC, netip.MustParseAddr("fd00::1").AsSlice()...), attr(unix.RTA_DST, six.AsSlice()...)
	for _, c := range []struct {
		name     string
		body     []byte
		want     Entry
		resolved bool
		ok       bool
	}{
		{"two outputs", route(128, 253, 0, src, dst, attr(unix.RTA_IIF, number(3)...), attr(unix.RTA_MULTIPATH, append(hop(5, 4), hop(4, 1)...)...)),
			Entry{Key: key, Input: 3, Outputs: []Output{{4, 1}, {5, 4}}}, true, true},
		{"none", route(128, 253, 0, src, dst, attr(unix.RTA_IIF, number(3)...)), Entry{Key: key, Input: 3}, true, true},
		{"unresolved", route(128, 253, unix.RTNH_F_UNRESOLVED, src, dst), Entry{Key: key}, false, true},
		{"gone: no input", route(128, 253, 0, src, dst), Entry{Key: key}, false, true},
		{"table of its own", route(128, 0, 0, attr(unix.RTA_TABLE, number(1000)...), src, dst, attr(unix.RTA_IIF, number(3)...)),
			Entry{Key: Key{Table: 1000, Source: key.Source, Group: key.Group}, Input: 3}, true, true},
		{"any source", route(128, 253, 0, dst, attr(unix.RTA_IIF, number(3)...)), Entry{Key: Key{Source: netip.IPv4Unspecified(), Group: key.Group}, Input: 3}, true, true},
		{"IPv6", route(129, 254, 0, src6, dst6, attr(unix.RTA_IIF, number(3)...), attr(unix.RTA_MULTIPATH, hop(4, 1)...)),
			Entry{Key: Key{Source: netip.MustParseAddr("fd00::1"), Group: six}, Input: 3, Outputs: []Output{{4, 1}}}, true, true},
		{"IPv6, table of IPv4", route(129, 253, 0, src6, dst6, attr(unix.RTA_IIF, number(3)...)),
			Entry{Key: Key{Table: 253, Source: netip.MustParseAddr("fd00::1"), Group: six}, Input: 3}, true, true},
		{"unicast route", route(unix.AF_INET, 254, 0, dst), Entry{}, false, false},
		{"no group", route(128, 253, 0, src, attr(unix.RTA_DST, 10, 0, 0, 9)), Entry{}, false, false},
		{"address of another length", route(128, 253, 0, src6, dst), Entry{}, false, false},
		{"hop cut short", route(128, 253, 0, src, dst, attr(unix.RTA_MULTIPATH, 8, 0, 0, 1)), Entry{}, false, false},
		{"hop without length", route(128, 253, 0, src, dst, attr(unix.RTA_MULTIPATH, 0, 0, 0, 1, 4, 0, 0, 0)), Entry{}, false, false},
		{"attribute longer than the message", append(route(128, 253, 0, src, dst), 9, 0, 1, 0), Entry{}, false, false},
		{"message cut short", []byte{128, 32, 32, 0}, Entry{}, false, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			m, ok := parse(c.body)
			if ok != c.ok {
				t.Fatalf("ok %v, want %v", ok, c.ok)
			}
			if ok && (!m.entry.Equal(&c.want) || m.resolved != c.resolved) {
				t.Errorf("got %+v, resolved %v; want %+v, %v", m.entry, m.resolved, c.want, c.resolved)
			}
		})
	}
}

// FuzzParse: no message panics, and every accepted one can be converted.
func FuzzParse(f *testing.F) {
	f.Add(route(128, 253, 0, attr(unix.RTA_SRC, 10, 0, 0, 1), attr(unix.RTA_DST, 239, 1, 1, 1), attr(unix.RTA_IIF, number(3)...), attr(unix.RTA_MULTIPATH, append(hop(5, 4), hop(4, 1)...)...)))
	f.Add(route(129, 254, 0, attr(unix.RTA_DST, netip.MustParseAddr("ff0e::1").AsSlice()...), attr(unix.RTA_IIF, number(3)...)))
	f.Fuzz(func(t *testing.T, body []byte) {
		m, ok := parse(body)
		if !ok {
			return
		}
		e := m.entry
		if !e.Group.IsMulticast() || e.Group.Is4() != e.Source.Is4() {
			t.Errorf("%+v", e)
		}
		if e.Threshold() == 0 {
			t.Error("threshold 0")
		}
		rule, left := Convert(&e, &rules.Mroute{}, func(int) string { return "eth0" })
		if len(rule.Name) > flow.MaxName || left.Why == "" && len(rule.Out) == 0 {
			t.Errorf("%+v, left %+v", rule, left)
		}
	})
}

func TestConvert(t *testing.T) {
	e := func(change func(e *Entry)) *Entry {
		e := &Entry{Key: Key{Source: netip.MustParseAddr("10.0.0.1"), Group: netip.MustParseAddr("239.1.1.1")}, Input: 1, Outputs: []Output{{2, 1}, {3, 8}}}
		if change != nil {
			change(e)
		}
		return e
	}
	names := map[int]string{1: "eth0", 2: "eth1", 3: "eth2", 4: "pimreg"}
	prefix := func(s string) []netip.Prefix { return []netip.Prefix{netip.MustParsePrefix(s)} }
	for _, c := range []struct {
		name string
		e    *Entry
		s    rules.Mroute
		left string
	}{
		{"all", e(nil), rules.Mroute{}, ""},
		{"any source", e(func(e *Entry) { e.Source = netip.IPv4Unspecified() }), rules.Mroute{}, "it is for any source: what the kernel does with a packet depends on where it came in"},
		{"no outputs", e(func(e *Entry) { e.Outputs = nil }), rules.Mroute{}, "it has no outputs: the kernel drops its packets"},
		{"back to its input", e(func(e *Entry) { e.Outputs[0].Index = 1 }), rules.Mroute{}, "it sends back to eth0, where its packets come in"},
		{"an interface that is gone", e(func(e *Entry) { e.Outputs[0].Index = 9 }), rules.Mroute{}, "interface with index 9 not found"},
		{"registers", e(func(e *Entry) { e.Outputs[1].Index = 4 }), rules.Mroute{}, "it sends PIM registers, or comes of them (pimreg): the kernel and its daemon make those"},
		{"too many outputs", e(func(e *Entry) { e.Outputs = slices.Repeat([]Output{{2, 1}}, rules.MaxOutputs+1) }), rules.Mroute{}, "it has 65 outputs: want at most 64"},
		{"group selected", e(nil), rules.Mroute{Groups: prefix("239.1.0.0/16")}, ""},
		{"group not selected", e(nil), rules.Mroute{Groups: prefix("239.2.0.0/16")}, "its group is in none of the mirrored prefixes"},
		{"group left", e(nil), rules.Mroute{Leave: prefix("239.1.1.0/24")}, "its group is in a prefix left to the kernel"},
		{"interfaces selected", e(nil), rules.Mroute{Interfaces: []string{"eth0", "eth1", "eth2"}}, ""},
		{"interfaces selected by a pattern", e(nil), rules.Mroute{Interfaces: []string{"eth+"}}, ""},
		{"interface not selected", e(nil), rules.Mroute{Interfaces: []string{"eth0", "eth1"}}, "interface eth2 is not mirrored"},
	} {
		t.Run(c.name, func(t *testing.T) {
			rule, left := Convert(c.e, &c.s, func(index int) string { return names[index] })
			if left.Why != c.left || left.Expected != (c.left != "" && !strings.Contains(c.left, "not found")) {
				t.Errorf("left %+v, want %q", left, c.left)
			}
			if left.Why != "" {
				return
			}
			// Cross-check with Validate: it is a rule except for its name, which no user's rule can
			// have.
			if err := rule.Validate(); err == nil || strings.Count(err.Error(), "\n") != 0 || !strings.Contains(err.Error(), "name") {
				t.Errorf("validate: %v", err)
			}
			if text := rule.In.String(); text != "10.0.0.1@239.1.1.1%eth0" {
				t.Errorf("input %s", text)
			}
			if text := rule.Out[1].String(); text != "239.1.1.1%eth2,src=keep,ttl=dec" {
				t.Errorf("output %s", text)
			}
		})
	}
}

// TestRuleNames: each entry has a unique name that fits the kernel's limit.
func TestRuleNames(t *testing.T) {
	long := func(s string) netip.Addr {
		b, err := hex.DecodeString(s)
		if err != nil {
			t.Fatal(err)
		}
		return netip.AddrFrom16([16]byte(b))
	}
	seen := map[string]Key{}
	for _, k := range []Key{
		{Source: netip.MustParseAddr("10.0.0.1"), Group: netip.MustParseAddr("239.1.1.1")},
		{Table: 100, Source: netip.MustParseAddr("10.0.0.1"), Group: netip.MustParseAddr("239.1.1.1")},
		{Table: 1<<32 - 1, Source: netip.MustParseAddr("10.0.0.1"), Group: netip.MustParseAddr("239.1.1.1")},
		{Source: long("20010db8111122223333444455556666"), Group: long("ff3e111122223333444455556666aaaa")},
		{Source: long("20010db8111122223333444455556667"), Group: long("ff3e111122223333444455556666aaaa")},
		{Source: long("20010db8111122223333444455556666"), Group: long("ff3e111122223333444455556666aaab")},
		{Table: 1<<32 - 1, Source: long("20010db8111122223333444455556666"), Group: long("ff3e111122223333444455556666aaaa")},
		{Table: 1<<32 - 2, Source: long("20010db8111122223333444455556666"), Group: long("ff3e111122223333444455556666aaaa")},
	} {
		name := RuleName(k)
		if len(name) > flow.MaxName {
			t.Errorf("%v: %s has %d bytes", k, name, len(name))
		}
		if other, taken := seen[name]; taken {
			t.Errorf("%v and %v are both called %s", k, other, name)
		}
		seen[name] = k
	}
}
