package rules

import (
	"bytes"
	"fmt"
	"net/netip"
	"strings"
	"testing"
)

const manyRules = 100_000

// camRules is a valid set of n rules, two outputs each, the second with policies.
func camRules(n int) []Rule {
	rules := make([]Rule, n)
	for i := range rules {
		group := netip.AddrFrom4([4]byte{239, byte(i >> 16), byte(i >> 8), byte(i)})
		rules[i] = Rule{
			Name: fmt.Sprintf("cam%d", i),
			In:   Input{Interface: "eth0", Address: group, Port: 5000, Source: netip.AddrFrom4([4]byte{10, 0, byte(i >> 8), 5})},
			Out: []Output{
				{Interface: "eth1", Address: group, Port: 6000},
				{Interface: "eth2", Address: group, Port: 6000, Policy: Policy{Source: SourceKeep, TTL: TTLSet, TTLValue: 16}},
			},
		}
	}
	return rules
}

// chainRules is a set in which every rule feeds the next: the worst case of the
// search for loops. closed makes the last feed the first.
func chainRules(n int, closed bool) []Rule {
	rules := make([]Rule, n)
	at := func(i int) netip.Addr { return netip.AddrFrom4([4]byte{239, byte(i >> 16), byte(i >> 8), byte(i)}) }
	for i := range rules {
		to := i + 1
		if closed {
			to %= n
		}
		rules[i] = Rule{
			Name: fmt.Sprintf("hop%d", i),
			In:   Input{Interface: "eth0", Address: at(i), Port: 5000},
			Out:  []Output{{Interface: "eth0", Address: at(to), Port: 5000}},
		}
	}
	return rules
}

// fanRules is a set in which half the rules send from any source to a group of
// which the other half takes one source each: n*n/4 pairs that feed each other.
func fanRules(n int) []Rule {
	rules := make([]Rule, 0, n)
	group := netip.MustParseAddr("239.255.0.1")
	for i := range n / 2 {
		a := netip.AddrFrom4([4]byte{239, byte(i >> 16), byte(i >> 8), byte(i)})
		s := netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)})
		rules = append(rules,
			Rule{Name: fmt.Sprintf("from%d", i), In: Input{Interface: "eth1", Address: a, Port: 1},
				Out: []Output{{Interface: "eth0", Address: group, Port: 1, Policy: Policy{Source: SourceKeep}}}},
			Rule{Name: fmt.Sprintf("to%d", i), In: Input{Interface: "eth0", Address: group, Port: 1, Source: s},
				Out: []Output{{Interface: "eth2", Address: group, Port: 1}}})
	}
	return rules
}

// BenchmarkValidateSet shows that the time a rule takes does not grow with the set.
func BenchmarkValidateSet(b *testing.B) {
	for _, n := range []int{1000, 10_000, manyRules} {
		for _, set := range []struct {
			name  string
			rules []Rule
			bad   bool
		}{
			{"plain", camRules(n), false},
			{"chain", chainRules(n, false), false},
			{"ring", chainRules(n, true), true},
			{"fan", fanRules(n), false},
		} {
			b.Run(fmt.Sprintf("%s/%d", set.name, n), func(b *testing.B) {
				b.ReportAllocs()
				for b.Loop() {
					if err := ValidateSet(set.rules); (err != nil) != set.bad {
						b.Fatal(err)
					}
				}
				b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/float64(n), "ns/rule")
			})
		}
	}
}

// compactFile writes rules with their outputs on one line, as people do.
func compactFile(rules []Rule) []byte {
	var b bytes.Buffer
	b.WriteString("rules:\n")
	for _, r := range rules {
		fmt.Fprintf(&b, "  - name: %s\n    in: %s\n    out: [", r.Name, yamlText(FormatInput(r.In, r.Accept)))
		for i, o := range r.Out {
			if i > 0 {
				b.WriteString(", ")
			}
			b.WriteString(yamlText(o.String()))
		}
		b.WriteString("]\n")
	}
	return b.Bytes()
}

// flowFile writes each rule as a {mapping} on one line.
func flowFile(rules []Rule) []byte {
	text := string(compactFile(rules))
	text = strings.ReplaceAll(text, "  - name: ", "  - {name: ")
	text = strings.ReplaceAll(text, "\n    ", ", ")
	text = strings.ReplaceAll(text, "]\n", "]}\n")
	return []byte(text)
}

func BenchmarkParseFile(b *testing.B) {
	rules := camRules(manyRules)
	formatted, err := FormatFile(rules)
	if err != nil {
		b.Fatal(err)
	}
	compact := compactFile(rules)
	for _, file := range []struct {
		name string
		data []byte
	}{
		{"formatted", formatted},
		{"compact", compact},
		{"a line each", flowFile(rules)},
		{"other", append([]byte("--- # by way of the YAML package\n"), formatted...)},
	} {
		b.Run(file.name, func(b *testing.B) {
			b.SetBytes(int64(len(file.data)))
			b.ReportAllocs()
			for b.Loop() {
				got, err := ParseFile("bench.yaml", file.data)
				if err != nil || len(got) != len(rules) {
					b.Fatalf("%d rules, %v", len(got), err)
				}
			}
		})
	}
}

func BenchmarkFormatFile(b *testing.B) {
	rules := camRules(manyRules)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := FormatFile(rules); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkCompute(b *testing.B) {
	have, want := camRules(manyRules), camRules(manyRules)
	want[manyRules/2].Path = PathFanout
	b.ReportAllocs()
	for b.Loop() {
		if d := Compute(have, want); len(d.Change) != 1 || len(d.Keep) != manyRules-1 {
			b.Fatal(len(d.Change), len(d.Keep))
		}
	}
}

func BenchmarkParseInput(b *testing.B) {
	b.ReportAllocs()
	for b.Loop() {
		if _, _, err := ParseInput("10.0.0.5@239.1.1.1:5000%eth0"); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkParseOutput(b *testing.B) {
	b.ReportAllocs()
	for b.Loop() {
		if _, err := ParseOutput("239.2.2.2:6000%eth1,src=keep,ttl=8,dscp=af41"); err != nil {
			b.Fatal(err)
		}
	}
}
