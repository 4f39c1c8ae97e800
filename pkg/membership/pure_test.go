package membership

import (
	"errors"
	"fmt"
	"math"
	"math/bits"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestErrorTexts(t *testing.T) {
	ms := parseMembership("eth0", 7, "10.0.0.5@239.1.1.1")
	unnamed := parseMembership("", 7, "ff1e::1")
	for _, test := range []struct {
		err  error
		want string
	}{
		{&JoinError{ms, unix.ENODEV}, "join 239.1.1.1 from 10.0.0.5 on eth0: no such device"},
		{&JoinError{unnamed, unix.ENOBUFS}, "join ff1e::1 on interface 7: no buffer space available"},
		{&LeaveError{ms, ErrNotJoined}, "leave 239.1.1.1 from 10.0.0.5 on eth0: not joined"},
		{&JoinError{ms, &InterfaceNotFoundError{"eth0", 7, unix.ENODEV}},
			"join 239.1.1.1 from 10.0.0.5 on eth0: no interface with index 7: no such device"},
		{&JoinError{unnamed, &HelperSocketError{"eth0", "IPv6", unix.EMFILE}},
			"join ff1e::1 on interface 7: open IPv6 helper socket for eth0: too many open files"},
	} {
		if got := test.err.Error(); got != test.want {
			t.Errorf("got  %s\nwant %s", got, test.want)
		}
	}
}

func TestInvalidMemberships(t *testing.T) {
	addr := netip.MustParseAddr
	for _, test := range []struct {
		name string
		ms   Membership
		want string
	}{
		{"no group", Membership{Index: 1}, "no group given"},
		{"unicast group", Membership{Index: 1, Group: addr("10.0.0.1")}, "not a multicast group"},
		{"broadcast group", Membership{Index: 1, Group: addr("255.255.255.255")}, "not a multicast group"},
		{"above multicast", Membership{Index: 1, Group: addr("240.0.0.0")}, "not a multicast group"},
		{"unicast group, IPv6", Membership{Index: 1, Group: addr("fe80::1")}, "not a multicast group"},
		{"zone", Membership{Index: 1, Group: addr("ff02::1%eth0")}, "zone"},
		{"source with zone", Membership{Index: 1, Group: addr("ff1e::1"), Source: addr("fe80::1%eth0")}, "zone"},
		{"mapped group", Membership{Index: 1, Group: addr("::ffff:239.1.1.1")}, "IPv6 notation"},
		{"mapped source", Membership{Index: 1, Group: addr("239.1.1.1"), Source: addr("::ffff:10.0.0.1")}, "IPv6 notation"},
		{"families", Membership{Index: 1, Group: addr("239.1.1.1"), Source: addr("fd00::1")}, "different families"},
		{"multicast source", Membership{Index: 1, Group: addr("239.1.1.1"), Source: addr("239.1.1.2")}, "not a unicast address"},
		{"no source in so many words", Membership{Index: 1, Group: addr("239.1.1.1"), Source: addr("0.0.0.0")}, "not a unicast address"},
	} {
		t.Run(test.name, func(t *testing.T) {
			m := managerOn(t, nil) // nothing gets as far as a system call
			err := m.Join(test.ms)
			var join *JoinError
			if !errors.As(err, &join) || !errors.Is(err, unix.EINVAL) || !strings.Contains(err.Error(), test.want) {
				t.Errorf("error is %v, want %q", err, test.want)
			}
			if Transient(err) {
				t.Errorf("%v is called transient", err)
			}
			if got := m.Counters(); len(got) != 0 {
				t.Errorf("counted: %+v", got)
			}
		})
	}
}

func TestAdvice(t *testing.T) {
	for what, want := range map[string]string{
		"239.1.1.1":           "",
		"224.0.1.1":           "",
		"224.0.0.5":           "RFC 5771",
		"10.0.0.5@224.0.0.5":  "RFC 5771",
		"232.1.1.1":           "RFC 4607",
		"10.0.0.5@232.1.1.1":  "",
		"ff1e::1":             "",
		"ff3e::1":             "RFC 4607",
		"ff35::8000:1":        "RFC 4607",
		"fd00::5@ff3e::1":     "",
		"ff3e:20:2001:db8::1": "", // a prefix-based group, RFC 3306: not source-specific
		"ff02::5":             "link-local scope",
		"fd00::5@ff12::5":     "link-local scope",
		"ff01::1":             "interface-local",
		"ff00::1":             "interface-local",
	} {
		ms := parseMembership("eth0", 1, what)
		got := Advice(ms.Group, ms.Source)
		if want == "" && got != "" || !strings.Contains(got, want) || strings.Contains(got, "\n") {
			t.Errorf("%s: %q, want %q", what, got, want)
		}
	}
}

// TestRequestLayout holds the layout against what C lays out: struct
// group_source_req is 264 bytes on 64-bit machines, 260 on 32-bit ones.
func TestRequestLayout(t *testing.T) {
	want := map[int][2]int{64: {136, 264}, 32: {132, 260}}[bits.UintSize]
	ms := parseMembership("eth0", 7, "10.0.0.5@239.1.1.1")
	if got := [2]int{len(ms.groupReq()), len(ms.groupSourceReq())}; got != want {
		t.Errorf("sizes are %v, want %v", got, want)
	}
}

func TestTransientSeesThroughWrapping(t *testing.T) {
	err := fmt.Errorf("rule cam1: %w", &JoinError{Err: &HelperSocketError{Err: unix.ENFILE}})
	if !Transient(err) {
		t.Errorf("%v is not transient", err)
	}
	for _, err := range []error{nil, errors.New("other"), unix.EINVAL, os.ErrClosed, ErrNotJoined} {
		if Transient(err) {
			t.Errorf("%v is transient", err)
		}
	}
}

func TestBackoff(t *testing.T) {
	const ms = time.Millisecond
	b := Backoff{Min: 100 * ms, Max: time.Second, Factor: 2, Jitter: 0.5}
	for _, test := range []struct {
		backoff Backoff
		try     int
		random  float64
		want    time.Duration
	}{
		{b, 1, 0, 100 * ms},
		{b, 2, 0, 200 * ms},
		{b, 4, 0, 800 * ms},
		{b, 5, 0, time.Second},
		{b, math.MaxInt, 0, time.Second},
		{b, 1, 0.5, 75 * ms},
		{b, 5, 0.5, 750 * ms},
		{b, 1, 1, 50 * ms},
		{b, 0, 0, 100 * ms},
		{b, -5, 0, 100 * ms},
		{b, 1, -3, 100 * ms},
		{b, 1, 3, 50 * ms},
		{b, 1, math.NaN(), 100 * ms},
		{Backoff{}, 1, 0.9, 100 * ms},
		{Backoff{}, 2, 0.9, 200 * ms},
		{Backoff{}, 1000, 0.9, 30 * time.Second},
		{Backoff{Min: time.Minute}, 3, 0, time.Minute},
		{Backoff{Factor: math.NaN(), Jitter: math.NaN()}, 2, 0.5, 200 * ms},
		{Backoff{Factor: math.Inf(1)}, 2, 0.5, 30 * time.Second},
		{Backoff{Factor: 1}, 9, 0.5, 100 * ms},
	} {
		if got := test.backoff.Next(test.try, test.random); got != test.want {
			t.Errorf("%+v.Next(%d, %v) = %v, want %v", test.backoff, test.try, test.random, got, test.want)
		}
	}
}

func FuzzBackoffStaysInBounds(f *testing.F) {
	f.Add(int64(1), int64(1000), 2.0, 0.2, 3, 0.7)
	f.Add(int64(-1), int64(math.MaxInt64), math.Inf(1), -1.0, math.MaxInt, 2.0)
	f.Fuzz(func(t *testing.T, shortest, longest int64, factor, jitter float64, try int, random float64) {
		b := Backoff{Min: time.Duration(shortest), Max: time.Duration(longest), Factor: factor, Jitter: jitter}
		limit := max(time.Duration(longest), time.Duration(shortest), 30*time.Second)
		if wait := b.Next(try, random); wait < 0 || wait > limit {
			t.Errorf("%+v.Next(%d, %v) = %v", b, try, random, wait)
		}
	})
}
