package relay

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"

	"xdpcast/internal/history"
	"xdpcast/internal/plan"
	"xdpcast/pkg/rules"
)

func concatenated(parts []*history.Part) []byte {
	var text []byte
	for _, p := range parts {
		text = append(text, p.Text...)
	}
	return text
}

// The text of a set in parts is that of the whole set, whatever changed before, and a change of one
// rule formats few of them again.
func TestSetText(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 1))
	origins := []plan.Origin{plan.OriginFile, plan.OriginAPI, plan.OriginMroute}
	some := scaleRules(3000, 3000)
	fresh := func(n int) *plan.Rule {
		r := some[n]
		r.Name = fmt.Sprintf("r%05d", n)
		r.In.Port = uint16(1 + random.IntN(60000))
		return &plan.Rule{Rule: r, Origin: origins[random.IntN(len(origins))]}
	}
	text := setText{origin: plan.OriginAPI}
	var all []*plan.Rule
	for step, count := range []int{0, 1, 1, 2, 1, 40, 300, 1, 1, 1, -1, -1, -1, -200, 1, 1000, 1, -1, -900, -300, 1, 500, 1, -5000, 1} {
		var e edit
		for range count {
			e.put = append(e.put, fresh(random.IntN(3000)))
		}
		for range -count {
			if len(all) > 0 {
				e.remove = append(e.remove, all[random.IntN(len(all))].Name)
			}
		}
		e.put = slices.CompactFunc(slices.SortedFunc(slices.Values(e.put), func(a, b *plan.Rule) int { return bytes.Compare([]byte(a.Name), []byte(b.Name)) }),
			func(a, b *plan.Rule) bool { return a.Name == b.Name })
		e.remove = slices.DeleteFunc(e.remove, func(name string) bool {
			return slices.ContainsFunc(e.put, func(r *plan.Rule) bool { return r.Name == name })
		})
		before := map[*history.Part]bool{}
		for _, p := range text.parts {
			before[p.text] = true
		}
		all = edited(all, e)
		if !slices.IsSortedFunc(all, func(a, b *plan.Rule) int { return bytes.Compare([]byte(a.Name), []byte(b.Name)) }) {
			t.Fatalf("step %d: rules are not in order", step)
		}
		got := concatenated(text.of(all))
		var want []byte
		for _, r := range all {
			if r.Origin == plan.OriginAPI {
				want = rules.AppendRule(want, r.Rule)
			}
		}
		if want = rules.EndFile(want); !bytes.Equal(got, want) {
			t.Fatalf("step %d: the text is\n%s\nwant\n%s", step, got, want)
		}
		news := 0
		for _, p := range text.parts {
			if !before[p.text] {
				news++
			}
			if len(p.rules) > 2*partRules {
				t.Errorf("step %d: a part of %d rules", step, len(p.rules))
			}
		}
		if (count == 1 || count == -1) && news > 2 {
			t.Errorf("step %d: %d parts are formatted for one rule", step, news)
		}
		if parts := len(text.parts); parts > 1+len(all)/minPart {
			t.Errorf("step %d: %d parts for %d rules", step, parts, len(all))
		}
	}
}

// BenchmarkSetText measures what the text costs of a set in which one rule changed.
func BenchmarkSetText(b *testing.B) {
	for _, count := range []int{1_000, 100_000} {
		var e edit
		for _, r := range scaleRules(count, count) {
			e.put = append(e.put, &plan.Rule{Rule: r, Origin: plan.OriginAPI})
		}
		all := edited(nil, e)
		one := *all[count/2]
		sets := [2][]*plan.Rule{all, edited(all, edit{put: []*plan.Rule{&one}})}
		text := setText{origin: plan.OriginAPI}
		text.of(all)
		b.Run(fmt.Sprintf("rules=%d", count), func(b *testing.B) {
			for i := 0; b.Loop(); i++ {
				text.of(sets[i%2])
			}
		})
		b.Run(fmt.Sprintf("rules=%d/digest", count), func(b *testing.B) {
			for b.Loop() {
				history.SumParts(text.of(all))
			}
		})
	}
}
