package membership

import (
	"net/netip"
	"runtime"
	"testing"
	"time"

	"xdpcast/internal/labtest"
)

const manyGroups = 10_000

// TestTenThousandGroups on one interface, with the default sysctls: 20 groups a
// socket in IPv4.
func TestTenThousandGroups(t *testing.T) {
	for _, test := range []struct {
		name           string
		first, source  string
		leaveBackwards bool
	}{
		{"any source", "239.0.0.0", "", false},
		{"any source, last first", "239.0.0.0", "", true},
		{"one source", "232.0.0.0", "10.9.0.5", false},
		{"any source, IPv6", "ff1e::", "", false},
		{"one source, IPv6", "ff3e::", "fd00::5", false},
	} {
		t.Run(test.name, func(t *testing.T) {
			if testing.Short() && test.name != "any source" {
				t.Skip("seconds of the kernel's time; run without -short")
			}
			b := newBench(t) // one that has not to forget others' groups first
			groups := manyMemberships(manyGroups, labtest.Index(t, b.host, "eth0"), test.first, test.source)
			m := managerOn(t, nil)
			sockets, memory := openSockets(), heap()
			labtest.Do(t, b.host, func() error { // the sockets belong to this thread's namespace
				started := time.Now()
				mustJoin(t, m, groups...)
				t.Logf("joined %d groups in %v", len(groups), time.Since(started).Round(time.Millisecond))
				return nil
			})
			t.Logf("%d helper sockets, %d kB of heap", openSockets()-sockets, (heap()-memory)>>10)
			state := b.kernelState(t)
			for _, ms := range groups {
				if state.Users[kernelGroup{ms.Index, ms.Group}] != 1 {
					t.Fatalf("%v is not held", ms)
				}
			}
			if test.leaveBackwards {
				for i, j := 0, len(groups)-1; i < j; i, j = i+1, j-1 {
					groups[i], groups[j] = groups[j], groups[i]
				}
			}
			started := time.Now()
			mustLeave(t, m, groups...)
			took := time.Since(started)
			t.Logf("left them in %v", took.Round(time.Millisecond))
			if took > time.Minute {
				t.Errorf("left in %v", took)
			}
			if got := openSockets(); got != sockets {
				t.Errorf("%d sockets afterwards, %d before", got, sockets)
			}
			b.checkState(t)
			checkNothingHeld(t, m)
		})
	}
}

// manyMemberships counts up n groups from the first.
func manyMemberships(n, index int, first, source string) []Membership {
	ms := Membership{Interface: "eth0", Index: index, Group: netip.MustParseAddr(first)}
	if source != "" {
		ms.Source = netip.MustParseAddr(source)
	}
	all := make([]Membership, n)
	for i := range all {
		all[i] = ms
		ms.Group = ms.Group.Next()
	}
	return all
}

func heap() int64 {
	runtime.GC()
	var stats runtime.MemStats
	runtime.ReadMemStats(&stats)
	return int64(stats.HeapAlloc)
}

// BenchmarkJoinLeave joins and leaves 10,000 groups an operation, and reports
// the time of each half.
func BenchmarkJoinLeave(b *testing.B) {
	for _, first := range []string{"239.0.0.0", "ff1e::"} {
		b.Run(first, func(b *testing.B) {
			bn := newBench(b)
			groups := manyMemberships(manyGroups, labtest.Index(b, bn.host, "eth0"), first, "")
			m := managerOn(b, nil)
			var joining, leaving time.Duration
			labtest.Do(b, bn.host, func() error {
				for b.Loop() {
					started := time.Now()
					mustJoin(b, m, groups...)
					joined := time.Now()
					mustLeave(b, m, groups...)
					joining += joined.Sub(started)
					leaving += time.Since(joined)
				}
				return nil
			})
			if c := m.Counters(); len(c) != 1 || c[0].Joins.Succeeded != uint64(b.N*manyGroups) || c[0].Leaves.Succeeded != uint64(b.N*manyGroups) {
				b.Errorf("not all was joined and left: %+v", c)
			}
			b.ReportMetric(joining.Seconds()*1e3/float64(b.N), "ms-join/op")
			b.ReportMetric(leaving.Seconds()*1e3/float64(b.N), "ms-leave/op")
		})
	}
}

// TestFullSocketsAreNotTriedAgain bounds the system calls that finding room
// takes: one refused join a full socket, whatever the number of sockets.
func TestFullSocketsAreNotTriedAgain(t *testing.T) {
	b := newBench(t)
	for _, test := range []struct {
		what    string
		refused int // calls spent on each refusal: for a source, the undo too
	}{{"239.0.0.0", 1}, {"10.9.0.5@232.0.0.0", 2}} {
		sys := &faultSystem{System: hostSystem{Kernel(), b.host}}
		m := managerOn(t, sys)
		ms := b.membership(t, "eth0", test.what)
		for range 400 {
			mustJoin(t, m, ms)
			ms.Group = ms.Group.Next()
		}
		const sockets = 400 / 20
		if got, want := len(sys.calls), sockets+400+(sockets-1)*test.refused; got != want {
			t.Errorf("%s: %d system calls, want %d", test.what, got, want)
		}
	}
}
