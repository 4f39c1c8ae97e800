package loader

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/cilium/ebpf"

	"xdpcast/bpf"
	"xdpcast/pkg/flow"
)

// refusing returns a map that refuses all writes, and can be read where the kernel can freeze its type.
func refusing(t *testing.T, m *ebpf.Map) *ebpf.Map {
	t.Helper()
	var broken *ebpf.Map
	var err error
	switch m.Type() {
	case ebpf.Array, ebpf.PerCPUArray, ebpf.Hash, ebpf.PerCPUHash:
		spec := &ebpf.MapSpec{Type: m.Type(), KeySize: m.KeySize(), ValueSize: m.ValueSize(), MaxEntries: m.MaxEntries(), Flags: m.Flags()}
		if broken, err = ebpf.NewMap(spec); err == nil {
			t.Cleanup(func() { broken.Close() })
			err = broken.Freeze()
		}
	default:
		if broken, err = m.Clone(); err == nil {
			err = broken.Close()
		}
	}
	if err != nil {
		t.Fatalf("%v: %v", m, err)
	}
	return broken
}

// Whichever map refuses a change: after an error the old rules are in force, without one the new ones, and what the
// loader keeps about them is what they say. The next change succeeds.
func TestSyncFails(t *testing.T) {
	t.Parallel()
	n := newLab(t, 3)
	l := open(t, stateOptions(t))
	attachAll(t, l, append(n.out, n.in)...)
	w := newWorld(11, n)
	random := rand.New(rand.NewPCG(11, 3))
	slots := l.maps.slots()
	refused := map[string]int{}
	for _, name := range []string{
		bpf.RelayMapConfig, bpf.RelayMapFlowTables4, bpf.RelayMapFlowTables6, bpf.RelayMapPrefixTables4, bpf.RelayMapPrefixTables6,
		bpf.RelayMapShortcuts, bpf.RelayMapLoops, bpf.RelayMapPolicers, bpf.RelayMapStreams, bpf.RelayMapStreamStates,
		bpf.RelayMapStreamHealth, bpf.RelayMapStreamWindows, bpf.RelayMapRules, bpf.RelayMapOutputs, bpf.RelayMapDevices,
		bpf.RelayMapBroadcast, bpf.RelayMapCopies, bpf.RelayMapTurns, bpf.RelayMapRuleStats, bpf.RelayMapOutputStats,
		bpf.RelayMapRuleDrops, bpf.TransmitMapDeviceStats, bpf.TransmitMapDeviceRows,
	} {
		var rules []flow.Flow
		for step := range 3 {
			next := slices.Clone(rules)
			switch kind := random.IntN(5); {
			case kind == 0 || len(rules) == 0:
				next = w.Rules(step)
			case kind == 1:
				next = slices.Delete(next, 0, 1)
			case kind == 2:
				one := w.Rules(1000 + step)[0]
				if !slices.ContainsFunc(next, func(o flow.Flow) bool { return o.In.Key() == one.In.Key() }) {
					next = append(next, one)
				}
			case kind == 3:
				for i := range next {
					next[i].Out = slices.Clone(next[i].Out)
					next[i].Out[0].SrcMAC[5]++
				}
			case kind == 4 && len(next) > 1:
				next[0].Name, next[1].Name = next[1].Name, next[0].Name
			}
			what := fmt.Sprintf("map %s, step %d", name, step)
			slot := slots[name]
			intact := *slot
			*slot = refusing(t, intact)
			var err error
			if random.IntN(2) == 0 {
				err = l.Sync(pointers(next))
			} else {
				err = tryChange(l, next...)
			}
			*slot = intact
			after := next
			if err != nil {
				refused[name]++
				after = rules
			}
			sameRules(t, what+", in memory", sorted(after), rulesOf(l))
			sameRules(t, what, sorted(after), inKernel(t, l))
			allocatorsFit(t, l)
			if l.shortcuts.known {
				countsFit(t, l)
			}
			sync1(t, l, next...)
			rules = next
			sameRules(t, what+", then", sorted(rules), inKernel(t, l))
			allocatorsFit(t, l)
			countsFit(t, l)
			shortcutsAgree(t, l.maps)
			if t.Failed() {
				t.Fatalf("%s: %v", what, err)
			}
		}
		sync1(t, l)
		countsFit(t, l)
	}
	t.Logf("refused changes: %v", refused)
	if len(refused) < 10 {
		t.Errorf("only changes of maps %v were refused", refused)
	}
}
