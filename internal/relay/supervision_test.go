package relay

import (
	"bytes"
	"log/slog"
	"maps"
	"net/netip"
	"strings"
	"testing"
	"time"

	"xdpcast/internal/control"
	"xdpcast/internal/labtest"
	"xdpcast/pkg/loader"
	"xdpcast/pkg/membership"
)

func TestDetail(t *testing.T) {
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	before := func(d time.Duration) *time.Time { at := now.Add(-d); return &at }
	heard := func(age time.Duration) control.Multicast {
		return control.Multicast{Querier: "10.0.0.254", QuerierSeen: before(age)}
	}
	for _, c := range []struct {
		name string
		g    control.Group
		want string
	}{
		{"joined just now", control.Group{Since: before(9999 * time.Millisecond)}, "joined, no packet yet, no querier heard"},
		{"no packet since it was joined", control.Group{Since: before(12345 * time.Millisecond)}, "joined, silent for 12s, no querier heard"},
		{"no packet for ten seconds", control.Group{Since: before(time.Hour), LastPacket: before(10 * time.Second)}, "joined, silent for 10s, no querier heard"},
		{"packets come", control.Group{Since: before(time.Hour), LastPacket: before(2 * time.Second), Multicast: heard(time.Minute)}, "joined, receiving, querier 10.0.0.254"},
		{"querier heard long ago", control.Group{Since: before(time.Hour), LastPacket: before(0), Multicast: heard(260 * time.Second)}, "joined, receiving, querier 10.0.0.254 not heard for 4m20s"},
		{"querier just present", control.Group{Since: before(time.Hour), LastPacket: before(70 * time.Second), Multicast: heard(259 * time.Second)}, "joined, silent for 1m10s, querier 10.0.0.254"},
		{"the clock was set back", control.Group{Since: before(-time.Hour), LastPacket: before(-time.Hour)}, "joined, receiving, no querier heard"},
		{"wanted", control.Group{State: control.GroupWanted}, "wanted"},
		{"retrying", control.Group{State: control.GroupRetrying, Cause: "no buffer space available", Next: before(-4 * time.Second)}, "retrying: no buffer space available (next try in 4s)"},
		{"failed, next try is due", control.Group{State: control.GroupFailed, Cause: "invalid argument", Next: before(time.Second)}, "failed: invalid argument (next try in 0s)"},
	} {
		if c.g.State == "" {
			c.g.State = control.GroupJoined
		}
		if got := detail(c.g, now); got != c.want {
			t.Errorf("%s: %q, want %q", c.name, got, c.want)
		}
	}
}

// Nothing in the kernel tells the MLD version: it follows from the queries.
func TestMulticast(t *testing.T) {
	q := func(family, version int, age time.Duration) loader.Querier {
		return loader.Querier{Index: 2, Family: family, Version: version, Address: netip.MustParseAddr("fe80::1"), Packets: 3, LastSeen: age}
	}
	for _, c := range []struct {
		name    string
		heard   loader.Querier
		is4     bool
		version string
		queries uint64
	}{
		{"none", loader.Querier{}, false, "MLDv2", 0},
		{"MLDv1", q(6, 1, time.Second), false, "MLDv1", 3},
		{"MLDv1 long ago", q(6, 1, 260*time.Second), false, "MLDv2", 3},
		{"MLDv2", q(6, 2, time.Second), false, "MLDv2", 3},
		{"IGMPv2 as the kernel says", q(4, 3, time.Second), true, "IGMPv2", 3},
		{"querier of the other family", q(6, 1, time.Second), true, "IGMPv2", 0},
	} {
		s := supervision{
			now: time.Now(), igmp: map[int]int{2: 2}, described: map[querierKey]control.Multicast{},
			queriers: map[querierKey]loader.Querier{{c.heard.Index, c.heard.Family == 4}: c.heard},
		}
		got := s.multicast("absent", 2, c.is4)
		if got.Version != c.version || got.Queries != c.queries || (got.QuerierSeen != nil) != (c.queries > 0) || (got.Querier != "") != (c.queries > 0) {
			t.Errorf("%s: %+v, want %s and %d queries", c.name, got, c.version, c.queries)
		}
	}
}

// The kernel is asked for versions again after a hundred times as long as it took.
func TestIGMPVersionsAreAskedForWithMeasure(t *testing.T) {
	asked := time.Now()
	known := map[int]int{4711: 3}
	v := igmpVersions{byIndex: known, asked: asked, took: time.Second}
	if err := v.refresh(asked.Add(99*time.Second), false); err != nil || v.byIndex[4711] != 3 || v.asked != asked {
		t.Errorf("asked again at once: %+v, %v", v, err)
	}
	now := asked.Add(101 * time.Second)
	if err := v.refresh(now, false); err != nil || v.byIndex[4711] != 0 || v.asked != now {
		t.Errorf("not asked again: %+v, %v", v, err)
	}
}

// With many groups the versions are read beside the caller, and come with a later call; closing ends
// the reading.
func TestIGMPVersionsOfManyGroups(t *testing.T) {
	want, err := membership.IGMPVersions()
	if err != nil {
		t.Fatal(err)
	}
	known := map[int]int{4711: 3}
	v := igmpVersions{byIndex: known}
	now := time.Now()
	if err := v.refresh(now, true); err != nil || v.byIndex[4711] != 3 {
		t.Errorf("the first call: %+v, %v; want what is known", v, err)
	}
	labtest.Eventually(t, "the versions are read", func() bool {
		if err := v.refresh(now, true); err != nil {
			t.Fatal(err)
		}
		return v.reading == nil
	})
	if !maps.Equal(v.byIndex, want) || v.asked != now || v.took == 0 {
		t.Errorf("%+v, want %v", v, want)
	}
	v.took = 0
	if err := v.refresh(now, true); err != nil || v.reading == nil {
		t.Fatalf("not read again: %v", err)
	}
	v.close()
	v.close()
}

// A few memberships have a line each in the log, very many one together.
func TestLogsManyMembershipsAtOnce(t *testing.T) {
	for _, c := range []struct {
		memberships, lines int
		has                string
	}{
		{0, 0, ""},
		{1, 1, `msg=joined membership="239.0.0.0 on eth0"`},
		{manyMemberships, manyMemberships, `membership="239.0.0.31 on eth0"`},
		{manyMemberships + 1, 1, `msg=joined memberships=33 first="239.0.0.0 on eth0" last="239.0.0.32 on eth0"`},
	} {
		var log bytes.Buffer
		m := newMemberships(nil, slog.New(slog.NewTextHandler(&log, nil)), nil)
		var all []membership.Membership
		for i := range c.memberships {
			all = append(all, membership.Membership{Interface: "eth0", Group: netip.AddrFrom4([4]byte{239, 0, 0, byte(i)})})
		}
		m.logMemberships("joined", all)
		if lines := strings.Count(log.String(), "\n"); lines != c.lines || !strings.Contains(log.String(), c.has) {
			t.Errorf("%d memberships: %d lines, want %d with %s: %s", c.memberships, lines, c.lines, c.has, log.String())
		}
	}
}
