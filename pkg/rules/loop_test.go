package rules

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"xdpcast/internal/labtest"
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

		{any, "239.1.1.1%eth0", true},
		{any, "239.1.1.1:+1%eth0", false},
		{"239.1.1.1%eth0", "239.1.1.1:+1%eth0", true}, // until the port is out of range
		{"239.1.1.1%eth0", "239.1.1.1:7%eth0", true},
		{"239.1.0.0/16%eth0,join=none", "239.1.0.0/16%eth0", true},
		{"239.1.0.0/16%eth0,join=none", "239.1.9.9%eth0", true},
		{"239.1.0.0/16%eth0,join=none", "239.2.0.0/16%eth0", false},
		{"239.1.0.0/16:1%eth0,join=none", "239.1.0.0/16:2%eth0", false},
		{"239.1.1.1:1%eth0,vlan=7", "239.1.1.1:1%eth0", true},
		{"239.1.1.1:1%eth0,vlan=7", "239.1.1.1:1%eth0,vlan=7", true},
		{"239.1.1.1:1%eth0,vlan=7", "239.1.1.1:1%eth0,vlan=8", false},
		{"239.1.1.1:1%eth0,vlan=7", "239.1.1.1:1%eth0,vlan=8.7", false},
		{"239.1.1.1:1%eth0,vlan=7", "239.1.1.1:1%eth0,vlan=pop", false},
		{any, "239.1.1.1:1%eth0,vlan=pop", true},
		{any, "239.1.1.1:1%eth+", false}, // not on eth0
		{"239.1.1.1:1%eth+", "239.1.1.1:1%eth1", true},
		{"239.1.1.1:1%eth+", "239.1.1.1:1%eth+", true}, // from eth0 to eth1 and back
		{"239.1.1.1:1%eth+", "239.1.1.1:1%+", true},
		{"239.1.1.1:1%eth+", "239.1.1.1:1%eth1+", true},
		{"239.1.1.1:1%eth+", "239.1.1.1:1%wan0", false},
		{"239.1.1.1:1%eth+", "239.1.1.1:1%wan+", false},
		{"10.0.0.1%eth0", "10.0.0.1%eth0", true},
		{"10.0.0.1%eth0", "10.0.0.2%eth0", false},
		{"[ff1e:1::]/96%eth0,join=none", "[ff1e:1::]/96%eth0", true},
		{"[ff1e:1::]/96%eth0,join=none", "[ff1e:2::]/96%eth0", false},
	} {
		in, accept, err := ParseInput(c.in)
		if err != nil {
			t.Fatal(err)
		}
		r := Rule{Name: "a", In: in, Accept: accept, Out: []Output{mustOutput(t, c.out)}}
		allowed := r
		allowed.Accept.AllowLoop = true
		if err := allowed.Validate(); err != nil {
			t.Errorf("%s,loop=allow -> %s: %v", c.in, c.out, err)
		}
		err = r.Validate()
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
		checkLines(t, err, fmt.Sprintf("rule %q: out[0] %q: want no loop: it feeds the rule's own input, a -> a"+insist, "a", c.out))
	}
}

// acceptedRules is mustRules with the options of the inputs.
func acceptedRules(t *testing.T, lines ...string) []Rule {
	rules := mustRules(t, lines...)
	for i, line := range lines {
		_, accept, err := ParseInput(strings.Fields(line)[1])
		if err != nil {
			t.Fatal(err)
		}
		rules[i].Accept = accept
	}
	return rules
}

func TestLoopsBetweenRules(t *testing.T) {
	const fault = "want no loop between rules: "
	for _, c := range []struct {
		name  string
		rules []string
		want  []string
	}{
		{"prefixes, three rules, ports shifted", []string{
			"a 239.1.0.0/16%eth0,join=none -> 239.2.0.0/16:+1000%eth1",
			"b 239.2.0.0/16%eth1,join=none -> 239.3.0.0/16:-2000%eth2",
			"c 239.3.7.0/24%eth2,join=none -> 239.1.7.0/24:+1000%eth0",
		}, []string{`rule "c": out[0] "239.1.7.0/24:+1000%eth0": ` + fault + "a -> b -> c -> a"}},
		{"prefixes, three rules, ports shifted away", []string{
			"a 239.1.0.0/16:5000%eth0,join=none -> 239.2.0.0/16:+1000%eth1",
			"b 239.2.0.0/16:6000%eth1,join=none -> 239.3.0.0/16:-2000%eth2",
			"c 239.3.7.0/24:4000%eth2,join=none -> 239.1.7.0/24:+2000%eth0",
		}, nil},
		{"any port shifted above the port", []string{
			"a 239.1.1.1%eth0 -> 239.2.1.1:+1000%eth1",
			"b 239.2.1.1:999%eth1 -> 239.1.1.1%eth0",
		}, nil},
		{"any port shifted to the port", []string{
			"a 239.1.1.1%eth0 -> 239.2.1.1:+1000%eth1",
			"b 239.2.1.1:1001%eth1 -> 239.1.1.1%eth0",
		}, []string{`rule "b": out[0] "239.1.1.1%eth0": ` + fault + "a -> b -> a"}},
		{"a prefix and one of its groups", []string{
			"a 239.1.0.0/16%eth0,join=none -> 239.2.0.0/16%eth1",
			"b 239.2.5.5:7%eth1 -> 239.1.9.9:7%eth0",
		}, []string{`rule "b": out[0] "239.1.9.9:7%eth0": ` + fault + "a -> b -> a"}},
		{"a prefix and a group outside", []string{
			"a 239.1.0.0/16%eth0,join=none -> 239.2.0.0/16%eth1",
			"b 239.3.5.5:7%eth1 -> 239.1.9.9:7%eth0",
		}, nil},
		{"one address for a prefix", []string{
			"a 239.1.0.0/16%eth0,join=none -> 239.2.0.1:7%eth1",
			"b 239.2.0.0/24%eth1,join=none -> 239.1.0.1:7%eth0",
		}, []string{`rule "b": out[0] "239.1.0.1:7%eth0": ` + fault + "a -> b -> a"}},
		{"the exact input wins and ends it", []string{
			"a 239.1.0.0/16%eth0,join=none -> 239.2.0.1:7%eth1",
			"b 239.2.0.0/24%eth1,join=none -> 239.1.0.1:7%eth0",
			"c 239.2.0.1:7%eth1 -> 239.9.9.9:7%eth2",
		}, nil},
		{"the longer prefix wins and ends it", []string{
			"a 239.1.0.0/25%eth0,join=none -> 239.2.0.0/25%eth1",
			"b 239.2.0.0/16%eth1,join=none -> 239.1.0.1%eth0",
			"c 239.2.0.0/24%eth1,join=none -> 239.9.9.9:7%eth2",
		}, nil},
		{"the longer prefix wins a part", []string{
			"a 239.1.0.0/16%eth0,join=none -> 239.2.0.0/16%eth1",
			"b 239.2.0.0/16%eth1,join=none -> 239.1.0.1%eth0",
			"c 239.2.0.0/24%eth1,join=none -> 239.9.9.9:7%eth2",
		}, []string{`rule "b": out[0] "239.1.0.1%eth0": ` + fault + "a -> b -> a"}},
		{"the port wins and ends it", []string{
			"a 239.1.0.0/16%eth0,join=none -> 239.2.0.0/16:7%eth1",
			"b 239.2.0.0/16%eth1,join=none -> 239.1.0.1%eth0",
			"c 239.2.0.0/16:7%eth1,join=none -> 239.9.9.9:7%eth2",
		}, nil},
		{"tags set", []string{
			"a 239.1.1.1:1%eth0 -> 239.1.1.2:1%eth0,vlan=5.7",
			"b 239.1.1.2:1%eth0,vlan=5.7 -> 239.1.1.1:1%eth0,vlan=pop",
		}, []string{`rule "b": out[0] "239.1.1.1:1%eth0,vlan=pop": ` + fault + "a -> b -> a"}},
		{"tags kept", []string{
			"a 239.1.1.1:1%eth0,vlan=7 -> 239.1.1.2:1%eth0",
			"b 239.1.1.2:1%eth0,vlan=7 -> 239.1.1.1:1%eth0",
		}, []string{`rule "b": out[0] "239.1.1.1:1%eth0": ` + fault + "a -> b -> a"}},
		{"other tags", []string{
			"a 239.1.1.1:1%eth0,vlan=7 -> 239.1.1.2:1%eth0",
			"b 239.1.1.2:1%eth0,vlan=7 -> 239.1.1.1:1%eth0,vlan=8",
			"c 239.1.1.1:1%eth0,vlan=8.7 -> 239.1.1.2:1%eth0",
		}, nil},
		{"patterns", []string{
			"a 239.1.1.1:1%eth+ -> 239.1.1.2:1%wan0",
			"b 239.1.1.2:1%+ -> 239.1.1.1:1%eth10",
		}, []string{`rule "b": out[0] "239.1.1.1:1%eth10": ` + fault + "a -> b -> a"}},
		{"patterns apart", []string{
			"a 239.1.1.1:1%eth+ -> 239.1.1.2:1%wan+",
			"b 239.1.1.2:1%lan+ -> 239.1.1.1:1%eth+",
		}, nil},
		{"patterns that no name matches together", []string{
			"a 239.1.1.1:1%eth0+ -> 239.1.1.2:1%eth1+",
			"b 239.1.1.2:1%eth1+ -> 239.1.1.1:1%eth2+",
		}, nil},
		{"the interface wins over the pattern and ends it", []string{
			"a 239.1.1.1:1%eth0 -> 239.1.1.2:1%wan0",
			"b 239.1.1.2:1%wan+ -> 239.1.1.1:1%eth0",
			"c 239.1.1.2:1%wan0 -> 239.9.9.9:1%eth0",
		}, nil},
		{"the longer pattern wins and ends it", []string{
			"a 239.1.1.1:1%eth0 -> 239.1.1.2:1%wan0+",
			"b 239.1.1.2:1%wan+ -> 239.1.1.1:1%eth0",
			"c 239.1.1.2:1%wan0+ -> 239.9.9.9:1%eth0",
		}, nil},
		{"to all interfaces but the own, alone", []string{
			"a 239.1.1.1:1%eth0 -> 239.1.1.1:1%eth+",
			"b 239.1.1.2:1%eth1 -> 239.1.1.1:1%eth+",
		}, nil},
		{"to all interfaces but the own, both ways", []string{
			"a 239.1.1.1:1%eth0 -> 239.1.1.1:1%eth+",
			"b 239.1.1.1:1%eth1 -> 239.1.1.1:1%eth+",
		}, []string{`rule "b": out[0] "239.1.1.1:1%eth+": ` + fault + "a -> b -> a"}},
		{"to all interfaces but the own, and another way back", []string{
			"x 239.1.1.9:1%eth0 -> 239.1.1.1:1%eth+",
			"a 239.1.1.1:1%eth0 -> 239.1.1.1:1%eth+",
			"b 239.1.1.1:1%eth1 -> 239.1.1.2:1%wan0",
			"c 239.1.1.2:1%wan0 -> 239.1.1.1:1%eth0",
		}, []string{`rule "c": out[0] "239.1.1.1:1%eth0": ` + fault + "a -> b -> c -> a"}},
		{"the input that names a source wins but a part of any", []string{
			"a 239.1.1.1:1%eth0 -> 239.1.1.2:1%eth1,src=keep",
			"b 239.1.1.2%eth1 -> 239.1.1.1:1%eth0",
			"c 10.0.0.5@239.1.1.2:1%eth1 -> 239.9.9.9:1%eth2",
		}, []string{`rule "b": out[0] "239.1.1.1:1%eth0": ` + fault + "a -> b -> a"}},
		{"a prefix keeps any source", []string{
			"a 239.1.0.0/16%eth0,join=none -> 239.2.0.0/16%eth1,src=keep",
			"b 10.0.0.5@239.2.1.1:7%eth1 -> 239.1.1.1:7%eth0",
		}, []string{`rule "b": out[0] "239.1.1.1:7%eth0": ` + fault + "a -> b -> a"}},
		{"a prefix of another source", []string{
			"a 10.0.0.6@239.1.0.0/16%eth0,join=none -> 239.2.0.0/16%eth1,src=keep",
			"b 10.0.0.5@239.2.1.1:7%eth1 -> 239.1.1.1:7%eth0,src=10.0.0.6",
		}, nil},
		{"IPv6 prefixes", []string{
			"a [ff1e:1::]/96%eth0,join=none -> [ff1e:2::]/96%eth1",
			"b [ff1e:2::]/64%eth1,join=none -> [ff1e:1::]/64%eth0",
		}, []string{`rule "b": out[0] "[ff1e:1::]/64%eth0": ` + fault + "a -> b -> a"}},
		{"unicast, any port", []string{
			"a 10.0.0.1%eth0 -> 239.2.1.1%eth1",
			"b 239.2.0.0/16%eth1,join=none -> 10.0.0.1%eth0",
		}, []string{`rule "b": out[0] "10.0.0.1%eth0": ` + fault + "a -> b -> a"}},
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
			err := ValidateSet(acceptedRules(t, c.rules...))
			for i := range c.want {
				c.want[i] += insist
			}
			checkLines(t, err, c.want...)
			if c.want != nil && !errors.Is(err, ErrLoop) {
				t.Error("is not ErrLoop")
			}
		})
	}
}

// TestAllowLoop: a rule that allows loops is no part of any.
func TestAllowLoop(t *testing.T) {
	for _, rules := range [][]Rule{
		acceptedRules(t, "a 239.0.1.1:1%eth0 -> 239.0.1.2:1%eth1", "b 239.0.1.2:1%eth1 -> 239.0.1.3:1%eth0", "c 239.0.1.3:1%eth0 -> 239.0.1.1:1%eth0"),
		acceptedRules(t, "a 239.1.0.0/16%eth0,join=none -> 239.2.0.0/16%eth+", "b 239.2.0.0/24%eth1,join=all -> 239.3.0.0/24%eth2",
			"c 239.3.0.0/24%+,join=none -> 239.1.1.1%eth0"),
	} {
		if err := ValidateSet(rules); !errors.Is(err, ErrLoop) {
			t.Fatalf("%v: %v", rules, err)
		}
		for i := range rules {
			rules[i].Accept.AllowLoop = true
			if err := ValidateSet(rules); err != nil {
				t.Errorf("%v allows it: %v", rules[i], err)
			}
			rules[i].Accept.AllowLoop = false
		}
		open := acceptedRules(t, "d 239.9.9.9:1%eth9,loop=allow -> 239.0.1.1:1%eth0 239.1.1.1:1%eth0")[0]
		if err := ValidateSet(append(rules, open)); !errors.Is(err, ErrLoop) {
			t.Errorf("a rule beside the circle allows it: %v", err)
		}
	}
}

// TestLongLoop: a loop of many rules is found, and told in a few words.
func TestLongLoop(t *testing.T) {
	checkLines(t, ValidateSet(chainRules(8, true)),
		`rule "hop7": out[0] "239.0.0.0:5000%eth0": want no loop between rules: hop0 -> hop1 -> hop2 -> hop3 -> hop4 -> hop5 -> hop6 -> hop7 -> hop0`+insist)
	checkLines(t, ValidateSet(chainRules(9, true)),
		`rule "hop8": out[0] "239.0.0.0:5000%eth0": want no loop between rules: hop0 -> hop1 -> hop2 -> hop3 -> hop4 -> hop5 -> hop6 -> (1 more) -> hop8 -> hop0`+insist)
	checkLines(t, ValidateSet(chainRules(50_000, true)),
		`rule "hop49999": out[0] "239.0.0.0:5000%eth0": want no loop between rules: hop0 -> hop1 -> hop2 -> hop3 -> hop4 -> hop5 -> hop6 -> (49992 more) -> hop49999 -> hop0`+insist)
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
	if !strings.HasSuffix(lines[0], ": want no loop between rules: from0 -> to0 -> from0"+insist) {
		t.Error(lines[0])
	}
}

// mirrorRule is a rule that takes what the first output of r sends and sends it back
// to r. It is false when the output sends nothing.
func mirrorRule(r Rule) (Rule, bool) {
	o := r.Out[0]
	sent, ok := o.sent(r.In)
	if !ok {
		return Rule{}, false
	}
	in := Input{Interface: o.Interface, Address: o.Address, Len: o.Len, VLAN: sent.vlan}
	if sent.low == sent.high {
		in.Port = sent.low
	}
	back := Output{Interface: r.In.Interface, Address: r.In.Address, Len: r.In.Len, Port: r.In.Port}
	if back.Port == 0 {
		back.PortMode = PortKeep
	}
	if back.Policy.VLAN = VLANPop; r.In.VLAN != (VLAN{}) {
		back.Policy.VLAN, back.Policy.VLANTags = VLANSet, r.In.VLAN
	}
	if r.In.Source.IsValid() {
		back.Policy.Source, back.Policy.SourceAddr = SourceAddress, r.In.Source
	}
	return Rule{Name: "b", In: in, Out: []Output{back}}, true
}

// feedOracle knows by trying packets, without the graph, which rules feed which.
type feedOracle struct {
	rules   []Rule
	packets []packet
	takes   [][]bool // by rule and packet: its input matches it
	winner  []int    // by packet: the rule that gets it, or -1
}

func newFeedOracle(rules []Rule, packets []packet) *feedOracle {
	f := &feedOracle{rules: rules, packets: packets, winner: winners(rules, packets)}
	for _, r := range rules {
		takes := make([]bool, len(packets))
		for i, p := range packets {
			takes[i] = p.takenBy(r)
		}
		f.takes = append(f.takes, takes)
	}
	return f
}

// feeds reports whether rule a sends a packet that rule b gets, and whether it may
// be taken to: no other rule alone gets all that it sends of what b matches.
func (f *feedOracle) feeds(a, b, slot int) (truly, taken bool) {
	var sent []int
	for i, p := range f.packets {
		if f.takes[b][i] && p.sentBy(f.rules[a], slot) {
			sent = append(sent, i)
		}
	}
	for _, i := range sent {
		truly = truly || f.winner[i] == b
	}
	taken = len(sent) > 0
	for c := range f.rules {
		all := rank(f.rules[c].In) > rank(f.rules[b].In)
		for _, i := range sent {
			all = all && f.takes[c][i]
		}
		taken = taken && !all
	}
	return truly, taken
}

// circles closes a relation (Warshall) and reports whether it has a circle.
func circles(edge [][]bool) bool {
	reach := make([][]bool, len(edge))
	for a := range edge {
		reach[a] = slices.Clone(edge[a])
	}
	for k := range reach {
		for a := range reach {
			for b := range reach {
				reach[a][b] = reach[a][b] || reach[a][k] && reach[k][b]
			}
		}
	}
	for a := range reach {
		if reach[a][a] {
			return true
		}
	}
	return false
}

// TestLoopsAgainstOracle compares the check with a trial of every packet, on small
// sets over few addresses, ports, interfaces, tags and sources.
func TestLoopsAgainstOracle(t *testing.T) {
	random := rand.New(rand.NewPCG(5, 6))
	packets := allPackets()
	sets, loops, none, beyond := labtest.Soak(1000, 30_000), 0, 0, 0
	if testing.Short() {
		sets = 500
	}
	for range sets {
		rules := randomRules(random, 2+random.IntN(6))
		oracle := newFeedOracle(rules, packets)
		edge, real := make([][]bool, len(rules)), make([][]bool, len(rules))
		for a, r := range rules {
			edge[a], real[a] = make([]bool, len(rules)), make([]bool, len(rules))
			for b := range rules {
				for slot := range r.Out {
					if a != b && !r.Accept.AllowLoop {
						truly, taken := oracle.feeds(a, b, slot)
						real[a][b], edge[a][b] = real[a][b] || truly, edge[a][b] || taken
					}
				}
			}
		}
		want := circles(edge)
		if circles(real) && !want {
			t.Fatalf("the oracle does not agree with itself on %v", rules)
		}
		var list, bounded faultList
		newSet(rules, nil).findLoops(maxFeedPairs, &list)
		if slices.ContainsFunc(rules, func(r Rule) bool { return r.Accept.Except() != nil }) {
			// A rule that leaves senders out is not taken to win all of anything.
			if want && len(list.faults) == 0 {
				t.Fatalf("no loop reported, there is one: %v", rules)
			}
			continue
		}
		for _, f := range list.faults {
			checkCircle(t, f.err, rules, edge)
		}
		if got := len(list.faults) > 0; got != want {
			t.Fatalf("loop reported: %v, there is one: %v\n%v\n%v", got, want, rules, list.join())
		}
		newSet(rules, nil).findLoops(-1, &bounded)
		if want && len(bounded.faults) == 0 {
			t.Fatalf("not found by the bounded search: %v", list.join())
		}
		switch {
		case !want:
			none++
		case circles(real):
			loops++
		default:
			beyond++
		}
	}
	if loops < sets/20 || none < sets/10 || beyond > sets/100 {
		t.Errorf("%d sets with loops, %d without, %d with none in truth that are taken to have one", loops, none, beyond)
	}
}

// checkCircle holds a fault to being a circle of edges.
func checkCircle(t *testing.T, f *FieldError, rules []Rule, edge [][]bool) {
	t.Helper()
	_, text, ok := strings.Cut(f.Want, "no loop between rules: ")
	text, hint := strings.CutSuffix(text, insist)
	if !hint {
		t.Errorf("does not say how it may stand: %v", f)
	}
	names := strings.Split(text, " -> ")
	if !ok || len(names) < 3 || names[0] != names[len(names)-1] {
		t.Fatalf("no circle: %v", f)
	}
	for i := 1; i < len(names); i++ {
		var a, b int
		if _, err := fmt.Sscanf(names[i-1]+" "+names[i], "r%d r%d", &a, &b); err != nil {
			t.Fatal(err)
		}
		if !edge[a][b] {
			t.Fatalf("%v: r%d does not feed r%d in %v", f, a, b, rules)
		}
	}
}

// TestSelfLoopAgainstOracle tries every packet and interface with one rule.
func TestSelfLoopAgainstOracle(t *testing.T) {
	random := rand.New(rand.NewPCG(7, 8))
	packets := allPackets()
	loops, none := 0, 0
	for range 3000 {
		r := randomRules(random, 1)[0]
		for slot, o := range r.Out {
			want := false
			for _, p := range packets {
				if !p.takenBy(r) || !p.sentBy(r, slot) {
					continue
				}
				for _, from := range packetInterfaces { // a pattern does not send where it comes from
					if ifaceMatches(r.In.Interface, from) && (from != p.iface || !strings.HasSuffix(o.Interface, "+")) {
						want = true
					}
				}
			}
			sent, _ := o.sent(r.In)
			if got := feeds(o, r.In, r.In) && !r.excludes(sent); got != want {
				t.Fatalf("%v: feeds itself: %v, want %v", r, got, want)
			}
			if r.feedsSelf(o) != (want && !r.Accept.AllowLoop) {
				t.Fatalf("%v: loop=allow is not heeded", r)
			}
			if want {
				loops++
			} else {
				none++
			}
		}
	}
	if loops < 150 || none < 300 {
		t.Errorf("%d loops, %d without: too few of one", loops, none)
	}
}

// prefixRules are rules of prefixes, half of which feed the other half.
func prefixRules(n int, from, to func(i int) Input) []Rule {
	var rules []Rule
	for i := range n / 2 {
		in := from(i)
		out := Output{Interface: "eth0", Address: netip.MustParseAddr("238.0.0.0"), Len: in.Len, PortMode: PortKeep, Policy: Policy{Source: SourceKeep}}
		rules = append(rules, Rule{Name: fmt.Sprintf("from%d", i), In: in, Out: []Output{out}},
			Rule{Name: fmt.Sprintf("to%d", i), In: to(i), Out: []Output{{Interface: "eth2", Address: in.Address, Port: 1}}})
	}
	return rules
}

// manyFeeders are sets of n rules that would make n*n/4 edges.
func manyFeeders(n int) map[string][]Rule {
	base := netip.MustParseAddr("239.0.0.0")
	at := func(a byte, i int) netip.Addr {
		return netip.AddrFrom4([4]byte{a, byte(i >> 16), byte(i >> 8), byte(i)})
	}
	group := func(i int) Input { return Input{Interface: "eth0", Address: at(238, i), Port: uint16(1 + i%9)} }
	return map[string][]Rule{
		"ports, any to exact": prefixRules(n, func(i int) Input {
			return Input{Interface: fmt.Sprintf("in%d", i), Address: base, Len: 8}
		}, group),
		"sources, any to exact": prefixRules(n, func(i int) Input {
			return Input{Interface: "eth1", Address: base, Len: 8, Source: at(10, i)}
		}, group),
		"ports to prefixes": prefixRules(n, func(i int) Input {
			return Input{Interface: "eth1", Address: base, Len: 8, Port: uint16(1 + i%65535), Source: at(10, i/65535)}
		}, func(i int) Input {
			return Input{Interface: "eth0", Address: at(238, i<<1&0xffffff), Len: 31}
		}),
	}
}

// TestManyPrefixes: sets in which each of one half feeds each of the other are
// searched within bounds, and what closes the circle is found.
func TestManyPrefixes(t *testing.T) {
	const maxPairs = 1 << 14
	for name, rules := range manyFeeders(1000) {
		var list faultList
		edges := 0
		for _, e := range newFeedGraph(newSet(rules, nil), maxPairs, &list).edges {
			edges += len(e)
		}
		if edges > 2*maxPairs {
			t.Errorf("%s: %d edges", name, edges)
		}
		newSet(rules, nil).findLoops(maxPairs, &list)
		if err := list.join(); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		last := &rules[len(rules)-1]
		in := rules[2].In
		back := Output{Interface: in.Interface, Address: in.Address, Port: max(in.Port, 1)}
		if in.Source.IsValid() {
			back.Policy.Source, back.Policy.SourceAddr = SourceAddress, in.Source
		}
		last.Out = append(last.Out, back)
		newSet(rules, nil).findLoops(maxPairs, &list)
		if !errors.Is(list.join(), ErrLoop) {
			t.Errorf("%s: the circle is not found", name)
		}
	}
}

func BenchmarkCheckLoops(b *testing.B) {
	sets := manyFeeders(10_000)
	sets["100,000 exact, chain"] = chainRules(100_000, false)
	sets["100,000 exact, apart"] = camRules(100_000)
	mixed := chainRules(100_000, false)
	for i := range 100 {
		in := Input{Interface: "eth+", Address: netip.AddrFrom4([4]byte{239, byte(i), 0, 0}), Len: 16}
		mixed = append(mixed, Rule{Name: fmt.Sprintf("p%d", i), In: in, Out: []Output{{Interface: "eth9", Address: in.Address, Len: 16, PortMode: PortKeep}}})
	}
	sets["100,000 exact, chain, 100 prefixes of patterns"] = mixed
	for name, rules := range sets {
		b.Run(name, func(b *testing.B) {
			s := newSet(rules, nil)
			b.ReportAllocs()
			for b.Loop() {
				var list faultList
				s.checkLoops(&list)
			}
		})
	}
}

// TestTwoWay: loop=two-way lets both directions stand, whichever of them says it, and a
// pattern that feeds itself by other interfaces; an output never feeds its own input on one
// interface.
func TestTwoWay(t *testing.T) {
	for _, c := range []struct {
		rules []string
		fine  bool
	}{
		{[]string{"a 239.255.255.250:1900%eth0 -> 239.255.255.250:1900%eth1", "b 239.255.255.250:1900%eth1 -> 239.255.255.250:1900%eth0"}, false},
		{[]string{"a 239.255.255.250:1900%eth0,loop=two-way -> 239.255.255.250:1900%eth1", "b 239.255.255.250:1900%eth1 -> 239.255.255.250:1900%eth0"}, true},
		{[]string{"a 239.255.255.250:1900%eth0 -> 239.255.255.250:1900%eth1", "b 239.255.255.250:1900%eth1,loop=two-way -> 239.255.255.250:1900%eth0"}, true},
		{[]string{"a 239.1.1.1:5%eth0,loop=two-way -> 239.1.1.1:5%eth1", "b 239.1.1.1:5%eth1 -> 239.1.1.1:5%eth2", "c 239.1.1.1:5%eth2 -> 239.1.1.1:5%eth0"}, true},
		{[]string{"a 239.1.1.1:5%eth0,loop=two-way -> 239.1.1.1:5%eth0"}, false},
		{[]string{"a 239.1.1.1:5%eth+ -> 239.1.1.1:5%eth+"}, false},
		{[]string{"a 239.1.1.1:5%eth+,loop=two-way -> 239.1.1.1:5%eth+"}, true},
	} {
		if err := ValidateSet(acceptedRules(t, c.rules...)); (err == nil) != c.fine || err != nil && !errors.Is(err, ErrLoop) {
			t.Errorf("%v: %v", c.rules, err)
		}
	}
}

// TestGuardOptions: the options of loops are written as they are read.
func TestGuardOptions(t *testing.T) {
	for _, s := range []string{"", ",loop=allow", ",loop=two-way", ",loop-guard=off", ",loop=two-way,loop-guard=off"} {
		in, accept, err := ParseInput("239.1.1.1:5%eth0" + s)
		if err != nil || FormatInput(in, accept) != "239.1.1.1:5%eth0"+s {
			t.Errorf("%q becomes %q, %v", s, FormatInput(in, accept), err)
		}
		want := Acceptance{AllowLoop: s == ",loop=allow", TwoWay: strings.Contains(s, "two-way"), Unguarded: strings.Contains(s, "guard")}
		if !equalAcceptance(accept, want) {
			t.Errorf("%q is read as %+v", s, accept)
		}
		if s != "" && equalAcceptance(accept, Acceptance{}) {
			t.Errorf("%q is equal to nothing", s)
		}
	}
}
