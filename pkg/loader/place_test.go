package loader

import (
	"fmt"
	"testing"
	"time"

	"xdpcast/internal/labtest"
	"xdpcast/pkg/flow"
)

// Rules of one group and very many ports take no more time than rules of as many groups: they are not compared
// with each other.
func TestManyRulesOfOneGroup(t *testing.T) {
	n := newLab(t, 1)
	const count = 8_000
	opts := stateOptions(t)
	opts.Logger = nil
	opts.MaxRules, opts.MaxOutputs = 2*count, 2*count
	l := open(t, opts)
	attachAll(t, l, n.in, n.out[0])
	rules := func(version uint16, input func(i int) flow.Input) (all []flow.Flow) {
		for i := range count {
			all = append(all, flow.Flow{Name: fmt.Sprintf("r%d", i), In: input(i), Out: []flow.Output{output(n.out[0], "239.2.2.1", "10.1.0.1", 6000+version)}})
		}
		return all
	}
	groups := func(i int) flow.Input {
		return input(n.in, fmt.Sprintf("239.1.%d.%d", i/250, 1+i%250), "", 5000)
	}
	ports := func(i int) flow.Input { return input(n.in, "239.1.1.1", "", uint16(1000+i)) }
	// Added, changed and removed.
	cost := func(of func(i int) flow.Input) time.Duration {
		before := labtest.CPUTime(t)
		sync1(t, l, rules(0, of)...)
		sync1(t, l, rules(1, of)...)
		change1(t, l, rules(2, of)[:count/2]...)
		sync1(t, l)
		countsFit(t, l)
		return labtest.CPUTime(t) - before
	}
	several, one := cost(groups), cost(ports)
	t.Logf("%d rules of as many groups take %v, of one group %v", count, several, one)
	if one > 8*several {
		t.Errorf("%d rules of as many groups take %v, of one group %v", count, several, one)
	}
}
