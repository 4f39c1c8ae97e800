package rules

import (
	"cmp"
	"slices"
	"strings"
)

// Diff is the difference between two sets of rules. Add, Change and Keep are in the order of the
// wanted set, Remove in the reverse order of the present one.
//
// Both sets are valid, but a step between them need not be: an input can move from a removed rule
// to an added one, or between two changed ones.
type Diff struct {
	Add    []Rule
	Remove []Rule
	Change []Change
	Keep   []Rule
}

// Change is a rule of the same name with different contents.
type Change struct {
	Old, New Rule
}

// Compute returns the difference between two sets, matching rules by name. Of rules that share a
// name within a set, which ValidateSet refuses, the first counts. The result shares the Out slices
// of the given rules.
func Compute(have, want []Rule) Diff {
	var d Diff
	old := byName(have)
	seen := make(map[string]bool, len(want))
	if len(have) == 0 {
		d.Add = make([]Rule, 0, len(want))
	} else {
		d.Keep = make([]Rule, 0, len(want)) // usually most of them
	}
	for _, r := range want {
		if seen[r.Name] {
			continue
		}
		seen[r.Name] = true
		i, ok := old[r.Name]
		switch {
		case !ok:
			d.Add = append(d.Add, r)
		case Equal(have[i], r):
			d.Keep = append(d.Keep, r)
		default:
			d.Change = append(d.Change, Change{Old: have[i], New: r})
		}
	}
	for i, r := range slices.Backward(have) {
		if !seen[r.Name] && old[r.Name] == i {
			d.Remove = append(d.Remove, r)
		}
	}
	return d
}

// And concatenates the differences of two disjoint sets.
func (d Diff) And(other Diff) Diff {
	return Diff{
		Add: slices.Concat(d.Add, other.Add), Remove: slices.Concat(d.Remove, other.Remove),
		Change: slices.Concat(d.Change, other.Change), Keep: slices.Concat(d.Keep, other.Keep),
	}
}

// byName maps each name to its first rule.
func byName(rules []Rule) map[string]int {
	m := make(map[string]int, len(rules))
	for i, r := range slices.Backward(rules) {
		m[r.Name] = i
	}
	return m
}

// Empty reports whether the sets are equal.
func (d Diff) Empty() bool {
	return len(d.Add) == 0 && len(d.Remove) == 0 && len(d.Change) == 0
}

// String has a line for each rule that is removed ("- cam2"), changed ("~ cam3" and the changes) or
// added ("+ cam1" and the rule), in this order; "" if Empty.
func (d Diff) String() string {
	var b strings.Builder
	for _, r := range d.Remove {
		b.WriteString("- " + r.Name + "\n")
	}
	for _, c := range d.Change {
		b.WriteString(c.String() + "\n")
	}
	for _, r := range d.Add {
		b.WriteString("+ " + r.String() + "\n")
	}
	return b.String()
}

// String formats the change as one line: `~ cam3 in A => B; out -C +D; path auto => kernel`.
func (c Change) String() string {
	var parts []string
	if old, new := c.Old.FormatInputs(), c.New.FormatInputs(); old != new {
		parts = append(parts, "in "+old+" => "+new)
	}
	oldMerge, oldFailover := c.Old.FormatStream()
	newMerge, newFailover := c.New.FormatStream()
	if oldMerge != newMerge {
		parts = append(parts, "merge "+orNone(oldMerge)+" => "+orNone(newMerge))
	}
	if oldFailover != newFailover {
		parts = append(parts, "failover "+orNone(oldFailover)+" => "+orNone(newFailover))
	}
	if !slices.Equal(c.Old.Out, c.New.Out) {
		parts = append(parts, "out"+changedOutputs(c.Old.Out, c.New.Out))
	}
	if c.Old.Path != c.New.Path {
		parts = append(parts, "path "+c.Old.Path.String()+" => "+c.New.Path.String())
	}
	return "~ " + c.New.Name + " " + strings.Join(parts, "; ")
}

func orNone(s string) string { return cmp.Or(s, "none") }

func changedOutputs(old, new []Output) string {
	var b strings.Builder
	for _, o := range old {
		if !slices.Contains(new, o) {
			b.WriteString(" -" + o.String())
		}
	}
	for _, o := range new {
		if !slices.Contains(old, o) {
			b.WriteString(" +" + o.String())
		}
	}
	if b.Len() == 0 {
		return " in another order"
	}
	return b.String()
}
