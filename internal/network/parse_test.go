package network

import (
	"bufio"
	"bytes"
	_ "embed"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// recorded are the bodies of messages that Linux 6.18 sent, on a little-endian machine: of
// a host with eth0 (in br0, with an alternative name) and eth1 (with a program), both
// veths to elsewhere, br0, and mac0 upon br0.
//
//go:embed testdata/messages.txt
var recorded string

// messagesOf returns the recorded bodies of a kind.
func messagesOf(t testing.TB, kind string) (all [][]byte) {
	t.Helper()
	for lines := bufio.NewScanner(strings.NewReader(recorded)); lines.Scan(); {
		name, text, _ := strings.Cut(lines.Text(), " ")
		body, err := hex.DecodeString(text)
		must(t, err)
		if name == kind {
			all = append(all, body)
		}
	}
	return all
}

func TestParseRecorded(t *testing.T) {
	if binary.NativeEndian.Uint16([]byte{1, 0}) != 1 {
		t.Skip("the messages are little-endian")
	}
	var got []string
	say := func(format string, args ...any) { got = append(got, fmt.Sprintf(format, args...)) }
	for _, m := range messagesOf(t, "link") {
		l, ok := parseLink(m)
		if !ok {
			t.Fatalf("no link: %x", m)
		}
		l.MAC[1], l.MAC[2], l.MAC[3], l.MAC[4], l.MAC[5] = 0, 0, 0, 0, 0
		l.MAC[0] &= 2 // locally administered; the rest is random
		for i := range l.XDP {
			l.XDP[i].Program = min(l.XDP[i].Program, 1)
		}
		say("link %d %s %q kind %q master %d %q lower %d outside %v hardware %v ether %v %x loopback %v mtu %d up %v carrier %v xdp %v",
			l.Index, l.Name, l.AltNames, l.Kind, l.Master, l.MasterKind, l.Lower, l.outside, l.Hardware, l.Ethernet, l.MAC[0], l.Loopback, l.MTU, l.Up, l.Carrier, l.XDP)
	}
	for _, m := range messagesOf(t, "addr") {
		if index, addr, usable, ok := parseAddr(m); ok && !addr.IsLinkLocalUnicast() {
			say("addr %d %s %v", index, addr, usable)
		}
	}
	for _, m := range messagesOf(t, "features") {
		index, f, ok := parseFeatures(m)
		say("features %d %+v %v", index, f, ok)
	}
	for _, m := range messagesOf(t, "channels") {
		index, n, ok := parseChannels(m)
		say("queues %d %d %v", index, n, ok)
	}
	for _, m := range messagesOf(t, "route") {
		r, ok := parseRoute(m, 3)
		prefix, named := parseRoutePrefix(m)
		say("route %s: %d %s %v %v %v", prefix, r.kind, r.gateway, r.object, ok, named)
	}
	for _, m := range messagesOf(t, "neighbour") {
		e, ok := parseNeighbour(m)
		say("neighbour %d %s %x %v %v %v %v", e.Index, e.Addr, e.mac, e.valid(), e.static(), e.ours(), ok)
	}
	want := []string{
		`link 1 lo [] kind "" master 0 "" lower 0 outside false hardware false ether false 0 loopback true mtu 65536 up true carrier true xdp []`,
		`link 2 eth0 ["a-name-longer-than-fifteen"] kind "veth" master 4 "bridge" lower 0 outside false hardware false ether true 2 loopback false mtu 1500 up true carrier true xdp []`,
		`link 3 eth1 [] kind "veth" master 0 "" lower 0 outside false hardware false ether true 2 loopback false mtu 1500 up true carrier true xdp [{1 true}]`,
		`link 4 br0 [] kind "bridge" master 0 "" lower 0 outside false hardware false ether true 2 loopback false mtu 1500 up false carrier false xdp []`,
		`link 5 mac0 [] kind "macvlan" master 0 "" lower 4 outside false hardware false ether true 2 loopback false mtu 1500 up false carrier false xdp []`,
		"addr 1 127.0.0.1 true", "addr 1 ::1 true",
		"addr 2 10.0.0.1 true", "addr 2 2001:db8::1 true",
		"addr 3 10.1.0.1 true", "addr 3 10.5.0.1 true", "addr 3 2001:db8:1::1 true",
		"features 1 {Known:true Native:false Transmit:false TransmitSG:false} true",
		"features 2 {Known:true Native:true Transmit:true TransmitSG:true} true",
		"features 3 {Known:true Native:true Transmit:true TransmitSG:true} true",
		"features 4 {Known:true Native:false Transmit:false TransmitSG:false} true",
		"features 5 {Known:true Native:false Transmit:false TransmitSG:false} true",
		"queues 2 1 true", "queues 3 1 true",
		"route 10.99.0.0/24: 2 10.1.0.2 false true true",
		"route 10.98.0.0/24: 2 fe80::2 false true true",
		"route 2001:db8:99::/48: 2 fe80::2 false true true",
		"route 10.1.0.0/24: 2 invalid IP false true true",
		"route 10.1.0.1/32: 4 invalid IP false true true",
		"route 10.1.0.255/32: 3 invalid IP false true true",
		"neighbour 3 10.1.0.2 020000000002 true true false true",
	}
	if !slices.Equal(got, want) {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	for _, m := range messagesOf(t, "route") {
		if r, ok := parseRoute(m, 2); ok && r.gateway == netip.MustParseAddr("10.0.0.2") {
			return
		}
	}
	t.Error("the second of several gateways is not found")
}

// TestParseXDP: programs of several modes are all there.
func TestParseXDP(t *testing.T) {
	var b []byte
	b = appendAttribute(b, unix.IFLA_XDP_ATTACHED, []byte{4}) // several
	b = appendUint32(b, unix.IFLA_XDP_DRV_PROG_ID, 7)
	b = appendUint32(b, unix.IFLA_XDP_SKB_PROG_ID, 8)
	b = appendUint32(b, unix.IFLA_XDP_HW_PROG_ID, 9)
	got, ok := parseXDP(b)
	if want := []XDP{{7, false}, {8, true}, {9, false}}; !ok || !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
	if got, ok := parseXDP(appendAttribute(nil, unix.IFLA_XDP_ATTACHED, []byte{0})); !ok || got != nil {
		t.Errorf("without a program it is %v", got)
	}
}

// TestUsableAddr: what must not be a source is told from what may.
func TestUsableAddr(t *testing.T) {
	for _, tt := range []struct {
		flags uint32
		want  bool
	}{
		{unix.IFA_F_PERMANENT, true}, {unix.IFA_F_TENTATIVE, false}, {unix.IFA_F_DADFAILED | unix.IFA_F_PERMANENT, false},
		{unix.IFA_F_TENTATIVE | unix.IFA_F_OPTIMISTIC, true}, {unix.IFA_F_DEPRECATED, true},
	} {
		body := []byte{unix.AF_INET6, 64, 0, 0, 7, 0, 0, 0}
		body = appendAttribute(body, unix.IFA_ADDRESS, netip.MustParseAddr("2001:db8::1").AsSlice())
		body = appendUint32(body, unix.IFA_FLAGS, tt.flags)
		if index, addr, usable, ok := parseAddr(body); !ok || index != int(binary.NativeEndian.Uint32(body[4:])) || usable != tt.want || addr.String() != "2001:db8::1" {
			t.Errorf("with flags %#x address %s of %d is usable: %v", tt.flags, addr, index, usable)
		}
	}
}

// TestAnswers: what a read brings is sorted out, whatever it is.
func TestAnswers(t *testing.T) {
	msg := func(kind, flags uint16, seq uint32, body ...byte) []byte {
		b := binary.NativeEndian.AppendUint32(nil, uint32(unix.SizeofNlMsghdr+len(body)))
		b = binary.NativeEndian.AppendUint16(b, kind)
		b = binary.NativeEndian.AppendUint16(b, flags)
		b = binary.NativeEndian.AppendUint32(b, seq)
		return append(append(b, 0, 0, 0, 0), body...)
	}
	errno := func(e unix.Errno) []byte { return binary.NativeEndian.AppendUint32(nil, uint32(-int32(e))) }
	for _, tt := range []struct {
		name              string
		reads             [][]byte
		list              bool
		bodies            string
		done, interrupted bool
		err               error
	}{
		{"one", [][]byte{msg(16, 0, 5, 'a', 'b', 'c', 'd')}, false, "abcd", true, false, nil},
		{"list", [][]byte{msg(16, unix.NLM_F_MULTI, 5, 'a', 'b', 'c', 'd'), msg(unix.NLMSG_DONE, unix.NLM_F_MULTI, 5, 0, 0, 0, 0)}, true, "abcd", true, false, nil},
		{"list in one read", [][]byte{append(msg(16, unix.NLM_F_MULTI, 5, 'a', 'b', 'c', 'd'), msg(unix.NLMSG_DONE, unix.NLM_F_MULTI, 5)...)}, true, "abcd", true, false, nil},
		{"interrupted", [][]byte{msg(unix.NLMSG_DONE, unix.NLM_F_MULTI|unix.NLM_F_DUMP_INTR, 5, 0, 0, 0, 0)}, true, "", true, true, nil},
		{"interrupted before", [][]byte{msg(16, unix.NLM_F_MULTI|unix.NLM_F_DUMP_INTR, 5, 'a'), msg(unix.NLMSG_DONE, 0, 5)}, true, "a", true, true, nil},
		{"refused", [][]byte{msg(unix.NLMSG_ERROR, 0, 5, errno(unix.ENODEV)...)}, false, "", true, false, unix.ENODEV},
		{"list failed", [][]byte{msg(unix.NLMSG_DONE, unix.NLM_F_MULTI, 5, errno(unix.ENOMEM)...)}, true, "", true, false, unix.ENOMEM},
		{"acknowledged", [][]byte{msg(unix.NLMSG_ERROR, 0, 5, errno(0)...)}, false, "", true, false, nil},
		{"of another request", [][]byte{msg(unix.NLMSG_ERROR, 0, 4, errno(unix.ENODEV)...), msg(16, 0, 4, 'x')}, false, "", false, false, nil},
		{"cut off", [][]byte{msg(16, 0, 5, 'a', 'b')[:17]}, false, "", false, false, unix.EBADMSG},
		{"no message", [][]byte{{1, 2, 3}}, false, "", false, false, unix.EBADMSG},
		{"length of zero", [][]byte{make([]byte, 32)}, false, "", false, false, unix.EBADMSG},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var bodies []byte
			a := answers{seq: 5, list: tt.list, each: func(b []byte) { bodies = append(bodies, b...) }}
			var err error
			for _, b := range tt.reads {
				if err = a.read(b); err != nil {
					break
				}
			}
			if string(bodies) != tt.bodies || a.done != tt.done || a.interrupted != tt.interrupted || err != tt.err && !strings.Contains(fmt.Sprint(err), fmt.Sprint(tt.err)) {
				t.Errorf("bodies %q, done %v, interrupted %v, error %v", bodies, a.done, a.interrupted, err)
			}
		})
	}
}

// FuzzMessages: whatever arrives, it is read to its end without a panic, and what is taken for
// sound makes sense.
func FuzzMessages(f *testing.F) {
	for _, kind := range []string{"link", "addr", "features", "channels", "route", "neighbour"} {
		for _, m := range messagesOf(f, kind) {
			f.Add(m)
		}
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		kept := bytes.Clone(b)
		if l, ok := parseLink(b); ok && (l.Index <= 0 || l.Name == "" || l.Carrier && !l.Up || !l.Equal(l)) {
			t.Errorf("link %+v", l)
		}
		if _, addr, _, ok := parseAddr(b); ok && (!addr.IsValid() || addr.Zone() != "") {
			t.Errorf("address %v", addr)
		}
		if index, features, ok := parseFeatures(b); ok && (index <= 0 || !features.Known && features != Features{}) {
			t.Errorf("features %d %+v", index, features)
		}
		if index, n, ok := parseChannels(b); ok && (index <= 0 || n < 1) {
			t.Errorf("queues %d %d", index, n)
		}
		parseBridge(b)
		if r, ok := parseRoute(b, 3); ok && (r.gateway.IsValid() && (r.kind != HopUnicast || r.object || r.gateway.IsUnspecified())) {
			t.Errorf("route %+v", r)
		}
		if p, ok := parseRoutePrefix(b); ok && (!p.IsValid() || p != p.Masked()) {
			t.Errorf("prefix %v", p)
		}
		if e, ok := parseNeighbour(b); ok && !e.Addr.IsValid() {
			t.Errorf("neighbour %+v", e)
		}
		n, of := news{}, interests{dsts: []netip.Addr{netip.MustParseAddr("10.1.0.2")}}
		for kind := range uint16(130) {
			n.hearLink(message{kind: kind, data: b})
			n.hearWay(message{kind: kind, data: b}, &of)
			n.hearFeatures(message{kind: kind, data: b})
			n.hearQueues(message{kind: kind, data: b})
		}
		a := answers{list: true, each: func([]byte) {}}
		_ = a.read(b)
		if !bytes.Equal(b, kept) {
			t.Error("the message was changed")
		}
	})
}

// TestInterests: of the routes that change, those about a destination are known.
func TestInterests(t *testing.T) {
	var of interests
	for _, s := range []string{"10.0.0.2", "10.1.0.255", "192.168.5.5", "2001:db8::2"} {
		of.dsts = append(of.dsts, netip.MustParseAddr(s))
	}
	for prefix, want := range map[string]bool{
		"0.0.0.0/0": true, "::/0": true, "10.0.0.0/8": true, "10.0.0.2/32": true, "10.0.0.3/32": false, "10.1.0.0/25": false,
		"10.1.0.128/25": true, "10.2.0.0/16": false, "192.168.5.0/24": true, "193.0.0.0/8": false, "2001:db8::/64": true, "2001:db8::3/128": false, "fe80::/64": false,
	} {
		if got := of.routed(netip.MustParsePrefix(prefix)); got != want {
			t.Errorf("a change of %s matters: %v", prefix, got)
		}
	}
}
