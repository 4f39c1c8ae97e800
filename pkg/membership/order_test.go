package membership

import (
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
	"time"

	"xdpcast/internal/labtest"
)

// TestCompareToJoin: groups that the kernel keeps in one list come one after the other,
// and all of one interface.
func TestCompareToJoin(t *testing.T) {
	var all []Membership
	for index := 1; index <= 2; index++ {
		for i := range 2000 {
			group := netip.AddrFrom4([4]byte{239, byte(i >> 16), byte(i >> 8), byte(i)})
			all = append(all, Membership{Index: index, Group: group}, Membership{Index: index, Group: group, Source: netip.MustParseAddr("10.0.0.5")})
		}
		all = append(all, Membership{Index: index, Group: netip.MustParseAddr("ff1e::1")})
	}
	rand.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
	slices.SortFunc(all, CompareToJoin)
	type place struct {
		index int
		list  uint32
	}
	seen := map[place]bool{}
	for i, m := range all {
		at := place{m.Index, m.list()}
		if i > 0 && at != (place{all[i-1].Index, all[i-1].list()}) && seen[at] {
			t.Fatalf("list %d of interface %d comes twice", at.list, at.index)
		}
		seen[at] = true
		if i > 0 && CompareToJoin(all[i-1], m) >= 0 {
			t.Fatalf("%v and %v are out of order", all[i-1], m)
		}
	}
	if lists := len(seen); lists < 2*400 || lists > 2*512 {
		t.Errorf("2,000 groups are in %d lists of 2 times 512", lists)
	}
}

// BenchmarkJoinOrder joins 100,000 groups in the order of their addresses and in that of
// CompareToJoin, and reports the time of each and how many times as fast the latter is.
func BenchmarkJoinOrder(b *testing.B) {
	const groups = 100_000
	join := func(ordered bool) time.Duration {
		bn := newBench(b) // one that has not to forget others' groups first
		all := manyMemberships(groups, labtest.Index(b, bn.host, "eth0"), "239.0.0.0", "")
		m := managerOn(b, nil)
		defer m.Close() // the next one needs the descriptors
		started := time.Now()
		if ordered {
			slices.SortFunc(all, CompareToJoin)
		}
		labtest.Do(b, bn.host, func() error {
			mustJoin(b, m, all...)
			return nil
		})
		return time.Since(started)
	}
	var slow, quick time.Duration
	for b.Loop() {
		slow += join(false)
		quick += join(true)
	}
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(slow.Seconds()/float64(b.N), "s-by-address/op")
	b.ReportMetric(quick.Seconds()/float64(b.N), "s-ordered/op")
	b.ReportMetric(float64(slow)/float64(quick), "times-as-fast")
}
