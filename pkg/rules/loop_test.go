package rules

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"regexp"
	"strings"
	"testing"
)

// TestSelfLoop: an output that would feed its own rule.
func TestSelfLoop(t *testing.T) {
	const any, from5 = "239.1.1.1:1%eth0", "10.0.0.5@239.1.1.1:1%eth0"
	for _, c := range []struct {
		in, out string
		loop    bool
	}{
		{any, "239.1.1.1:1%eth0", true},
		{any, "239.1.1.1:1%eth0,src=keep", true},
		{any, "239.1.1.1:1%eth0,src=10.0.0.5", true},
		{any, "239.1.1.1:1%eth0,ttl=dec", true},
		{any, "239.1.1.1:1%eth1", false},
		{any, "239.1.1.1:2%eth0", false},
		{any, "239.1.1.2:1%eth0", false},
		{from5, "239.1.1.1:1%eth0,src=keep", true},
		{from5, "239.1.1.1:1%eth0,src=10.0.0.5", true},
		{from5, "239.1.1.1:1%eth0,src=10.0.0.6", false},
		{from5, "239.1.1.1:1%eth0", false}, // the interface's address, not known here
	} {
		err := mustRule(t, "a "+c.in+" -> "+c.out).Validate()
		if !c.loop {
			if err != nil {
				t.Errorf("%s -> %s: %v", c.in, c.out, err)
			}
			continue
		}
		if !errors.Is(err, ErrLoop) {
			t.Errorf("%s -> %s: %v, want a loop", c.in, c.out, err)
			continue
		}
		checkLines(t, err, fmt.Sprintf("rule %q: out[0] %q: want no loop: it feeds the rule's own input, a -> a", "a", c.out))
	}
}

func TestLoopsBetweenRules(t *testing.T) {
	const fault = "want no loop between rules: "
	for _, c := range []struct {
		name  string
		rules []string
		want  []string
	}{
		{"two", []string{
			"a 239.0.1.1:1%eth0 -> 239.0.1.2:1%eth1",
			"b 239.0.1.2:1%eth1 -> 239.9.9.9:9%eth5 239.0.1.1:1%eth0",
		}, []string{`rule "b": out[1] "239.0.1.1:1%eth0": ` + fault + "a -> b -> a"}},
		{"three, begun in the middle", []string{
			"b 239.0.1.2:1%eth0 -> 239.0.1.3:1%eth0",
			"a 239.0.1.1:1%eth0 -> 239.0.1.2:1%eth0",
			"c 239.0.1.3:1%eth0 -> 239.0.1.1:1%eth0",
		}, []string{`rule "c": out[0] "239.0.1.1:1%eth0": ` + fault + "b -> c -> a -> b"}},
		{"two apart", []string{
			"a 239.0.1.1:1%eth0 -> 239.0.1.2:1%eth0",
			"b 239.0.1.2:1%eth0 -> 239.0.1.1:1%eth0",
			"c 239.0.1.3:1%eth0 -> 239.0.1.4:1%eth0",
			"d 239.0.1.4:1%eth0 -> 239.0.1.3:1%eth0",
		}, []string{
			`rule "b": out[0] "239.0.1.1:1%eth0": ` + fault + "a -> b -> a",
			`rule "d": out[0] "239.0.1.3:1%eth0": ` + fault + "c -> d -> c",
		}},
		{"a chain", []string{
			"a 239.0.1.1:1%eth0 -> 239.0.1.2:1%eth0",
			"b 239.0.1.2:1%eth0 -> 239.0.1.3:1%eth0",
		}, nil},
		{"two ways to one end", []string{
			"a 239.0.1.1:1%eth0 -> 239.0.1.2:1%eth0 239.0.1.3:1%eth0",
			"b 239.0.1.2:1%eth0 -> 239.0.1.4:1%eth0",
			"c 239.0.1.3:1%eth0 -> 239.0.1.4:1%eth0",
			"d 239.0.1.4:1%eth0 -> 239.0.1.5:1%eth1",
		}, nil},
		{"other interface", []string{
			"a 239.0.1.1:1%eth0 -> 239.0.1.2:1%eth1",
			"b 239.0.1.2:1%eth1 -> 239.0.1.1:1%eth2",
		}, nil},
		{"source kept, input names it", []string{
			"a 10.0.0.5@239.0.1.1:1%eth0 -> 239.0.1.2:1%eth1,src=keep",
			"b 239.0.1.2:1%eth1 -> 239.0.1.1:1%eth0,src=10.0.0.5",
		}, []string{`rule "b": out[0] "239.0.1.1:1%eth0,src=10.0.0.5": ` + fault + "a -> b -> a"}},
		{"source of the interface does not feed an input that names one", []string{
			"a 10.0.0.5@239.0.1.1:1%eth0 -> 239.0.1.2:1%eth1,src=keep",
			"b 239.0.1.2:1%eth1 -> 239.0.1.1:1%eth0",
		}, nil},
		{"source set to another", []string{
			"a 10.0.0.5@239.0.1.1:1%eth0 -> 239.0.1.2:1%eth1",
			"b 239.0.1.2:1%eth1 -> 239.0.1.1:1%eth0,src=10.0.0.6",
		}, nil},
		{"any source kept feeds inputs that name one", []string{
			"a 239.0.1.1:1%eth0 -> 239.0.1.2:1%eth1,src=keep",
			"b 10.0.0.5@239.0.1.2:1%eth1 -> 239.0.1.1:1%eth0,src=keep",
		}, []string{`rule "b": out[0] "239.0.1.1:1%eth0,src=keep": ` + fault + "a -> b -> a"}},
		{"the input that names the source wins and ends it", []string{
			"a 239.0.1.1:1%eth0 -> 239.0.1.2:1%eth1,src=10.0.0.5",
			"b 239.0.1.2:1%eth1 -> 239.0.1.1:1%eth0",
			"c 10.0.0.5@239.0.1.2:1%eth1 -> 239.9.9.9:1%eth2",
		}, nil},
		{"unicast", []string{
			"a 10.0.0.1:1%eth0 -> 10.0.1.1:1%eth1",
			"b 10.0.1.1:1%eth1 -> 10.0.0.1:1%eth0",
		}, []string{`rule "b": out[0] "10.0.0.1:1%eth0": ` + fault + "a -> b -> a"}},
		{"IPv6", []string{
			"a [ff0e::1]:1%eth0 -> [ff0e::2]:1%eth1",
			"b [ff0e::2]:1%eth1 -> [ff0e::1]:1%eth0",
		}, []string{`rule "b": out[0] "[ff0e::1]:1%eth0": ` + fault + "a -> b -> a"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			err := ValidateSet(mustRules(t, c.rules...))
			checkLines(t, err, c.want...)
			if c.want != nil && !errors.Is(err, ErrLoop) {
				t.Error("is not ErrLoop")
			}
		})
	}
}

// TestLongLoop: a loop of many rules is found, and told in a few words.
func TestLongLoop(t *testing.T) {
	checkLines(t, ValidateSet(chainRules(8, true)),
		`rule "hop7": out[0] "239.0.0.0:5000%eth0": want no loop between rules: hop0 -> hop1 -> hop2 -> hop3 -> hop4 -> hop5 -> hop6 -> hop7 -> hop0`)
	checkLines(t, ValidateSet(chainRules(9, true)),
		`rule "hop8": out[0] "239.0.0.0:5000%eth0": want no loop between rules: hop0 -> hop1 -> hop2 -> hop3 -> hop4 -> hop5 -> hop6 -> (1 more) -> hop8 -> hop0`)
	checkLines(t, ValidateSet(chainRules(50_000, true)),
		`rule "hop49999": out[0] "239.0.0.0:5000%eth0": want no loop between rules: hop0 -> hop1 -> hop2 -> hop3 -> hop4 -> hop5 -> hop6 -> (49992 more) -> hop49999 -> hop0`)
}

// TestManyLoops: every rule of the first half feeds every one of the second, and
// back, through one group; the list stays bounded.
func TestManyLoops(t *testing.T) {
	rules := fanRules(20_000)
	for i := range rules {
		if strings.HasPrefix(rules[i].Name, "to") {
			first := rules[i-1].In
			rules[i].Out = []Output{{Interface: first.Interface, Address: first.Address, Port: first.Port}}
		}
	}
	lines := errorLines(ValidateSet(rules))
	if len(lines) != maxFaults+1 || !strings.HasPrefix(lines[maxFaults], "and ") {
		t.Fatalf("%d lines, the last %q", len(lines), lines[len(lines)-1])
	}
	if !strings.HasSuffix(lines[0], ": want no loop between rules: from0 -> to0 -> from0") {
		t.Error(lines[0])
	}
}

// feeds says by trying sources, without the graph, whether a packet that an
// output of a sends is taken by b.
func feeds(rules []Rule, a, b int, slot int) bool {
	o, in := rules[a].Out[slot], rules[a].In
	unnamed := addr("10.9.9.9") // a source that no input names
	sources := []netip.Addr{unnamed}
	switch {
	case o.Policy.Source == SourceAddress:
		sources = []netip.Addr{o.Policy.SourceAddr}
	case o.Policy.Source == SourceKeep && in.Source.IsValid():
		sources = []netip.Addr{in.Source}
	case o.Policy.Source == SourceKeep:
		sources = append(sources, addr("10.0.0.1"), addr("10.0.0.2"))
	}
	for _, source := range sources {
		best := -1
		for i, r := range rules {
			if r.In.Interface != o.Interface || r.In.Address != o.Address || r.In.Port != o.Port ||
				r.In.Source.IsValid() && r.In.Source != source {
				continue
			}
			if best >= 0 {
				if w, ok := Winner(rules[best].In, r.In); !ok || w != r.In {
					continue
				}
			}
			best = i
		}
		if best == b {
			return true
		}
	}
	return false
}

// TestLoopsAgainstOracle compares with a search that tries every pair of rules
// and closes the relation (Warshall), on small sets over few addresses.
func TestLoopsAgainstOracle(t *testing.T) {
	random := rand.New(rand.NewPCG(5, 6))
	circle := regexp.MustCompile(`want no loop between rules: (.*)$`)
	loops, none := 0, 0
	for range 4000 {
		rules := randomFeeders(random)
		n := len(rules)
		edge, reach := make([][]bool, n), make([][]bool, n)
		for a := range n {
			edge[a], reach[a] = make([]bool, n), make([]bool, n)
			for b := range n {
				for slot := range rules[a].Out {
					edge[a][b] = edge[a][b] || a != b && feeds(rules, a, b, slot)
				}
				reach[a][b] = edge[a][b]
			}
		}
		for k := range n {
			for a := range n {
				for b := range n {
					reach[a][b] = reach[a][b] || reach[a][k] && reach[k][b]
				}
			}
		}
		want := false
		for a := range n {
			want = want || reach[a][a]
		}
		got := false
		for _, line := range errorLines(ValidateSet(rules)) {
			m := circle.FindStringSubmatch(line)
			if m == nil {
				continue
			}
			got = true
			names := strings.Split(m[1], " -> ")
			for i := 1; i < len(names); i++ {
				var a, b int
				_, _ = fmt.Sscanf(names[i-1]+" "+names[i], "r%d r%d", &a, &b)
				if !edge[a][b] {
					t.Fatalf("%s: r%d does not feed r%d in %v", line, a, b, rules)
				}
			}
			if len(names) < 3 || names[0] != names[len(names)-1] {
				t.Fatalf("no circle: %s", line)
			}
		}
		if got != want {
			t.Fatalf("loop reported: %v, there is one: %v\n%v\n%v", got, want, rules, ValidateSet(rules))
		}
		if want {
			loops++
		} else {
			none++
		}
	}
	if loops < 100 || none < 100 {
		t.Errorf("%d sets with loops, %d without: too few of one", loops, none)
	}
}

// randomFeeders are rules with different inputs over two interfaces, two groups
// and two sources.
func randomFeeders(random *rand.Rand) []Rule {
	var rules []Rule
	taken := map[Input]bool{}
	groups := []string{"239.1.1.1", "239.1.1.2"}
	for range 2 + random.IntN(6) {
		in := Input{Interface: pick(random, "eth0", "eth1"), Address: addr(pick(random, groups...)), Port: 1}
		if random.IntN(2) == 0 {
			in.Source = addr(pick(random, "10.0.0.1", "10.0.0.2"))
		}
		if taken[in] {
			continue
		}
		taken[in] = true
		r := Rule{Name: fmt.Sprintf("r%d", len(rules)), In: in}
		for range 1 + random.IntN(2) {
			o := Output{Interface: pick(random, "eth0", "eth1"), Address: addr(pick(random, groups...)), Port: pick[uint16](random, 1, 2)}
			switch random.IntN(3) {
			case 0:
				o.Policy.Source = SourceKeep
			case 1:
				o.Policy.Source, o.Policy.SourceAddr = SourceAddress, addr(pick(random, "10.0.0.1", "10.0.0.2", "10.0.0.3"))
			}
			r.Out = append(r.Out, o)
		}
		rules = append(rules, r)
	}
	return rules
}
