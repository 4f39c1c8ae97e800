package loader

import (
	"fmt"
	"net/netip"
	"testing"

	"xdpcast/pkg/flow"
)

// manyRules creates rules with distinct groups, each with the given number of outputs.
func manyRules(n *testLab, count, outputs int) []flow.Flow {
	rules := make([]flow.Flow, count)
	for i := range rules {
		group := netip.AddrFrom4([4]byte{239, byte(i >> 16), byte(i >> 8), byte(i)})
		rules[i] = flow.Flow{Name: fmt.Sprint("rule", i), In: input(n.in, group.String(), "", 5000)}
		for slot := range outputs {
			rules[i].Out = append(rules[i].Out, output(n.out[slot%len(n.out)], group.String(), "10.1.0.1", 6000))
		}
	}
	return rules
}

// A hundred thousand rules added at once, replaced, and removed, by their number of outputs.
func BenchmarkSyncMany(b *testing.B) {
	const count = 100_000
	for _, outputs := range []int{1, 2} {
		b.Run(fmt.Sprintf("outputs=%d", outputs), func(b *testing.B) {
			n := newLab(b, 2)
			opts := testOptions(b)
			opts.Logger = nil
			opts.MaxRules, opts.MaxOutputs = 2*count, 2*count*uint32(outputs)
			l := open(b, opts)
			attachAll(b, l, n.in, n.out[0], n.out[1])
			rules := manyRules(n, count, outputs)
			for b.Loop() {
				sync1(b, l, rules...)
				b.StopTimer()
				sync1(b, l)
				b.StartTimer()
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*count), "ns/rule")
		})
	}
}
