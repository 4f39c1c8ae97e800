package forward

import (
	"errors"
	"fmt"
	"math"
	"net/netip"

	"xdpcast/pkg/loader"
	"xdpcast/pkg/packet"
)

// Rule is a rule in a Table. What counts and polices is shared with the same rule
// in the Tables before and behind.
type Rule struct {
	rule    loader.Rule
	unicast bool
	policer *policer
	counts  []ruleCounters // by worker
	out     []output
}

// Name returns the rule's name.
func (r *Rule) Name() string { return r.rule.Name }

type output struct {
	loader.Output
	device  int // place in Table.devices; -1 while there is none
	policer *policer
	counts  []outputCounters // by worker
}

// newRule makes a rule; old is the one with the same name in the table before, or
// nil.
func newRule(r loader.Rule, old *Rule, workers int) *Rule {
	n := &Rule{rule: normalize(r), unicast: !r.In.Group.IsMulticast()}
	goesOn := old != nil && continues(&n.rule, &old.rule)
	n.policer = newPolicer(r.Rate)
	if goesOn {
		n.counts = old.counts
		if r.Rate == old.rule.Rate {
			n.policer = old.policer
		}
	} else {
		n.counts = make([]ruleCounters, workers)
	}
	n.out = make([]output, len(r.Out))
	for slot := range n.out {
		o := &n.out[slot]
		*o = output{Output: n.rule.Out[slot], device: -1, policer: newPolicer(r.Out[slot].Rate)}
		if !goesOn {
			o.counts = make([]outputCounters, workers)
			continue
		}
		before := &old.out[slot]
		o.counts = before.counts
		if o.Rate == before.Rate {
			o.policer = before.policer
		}
	}
	return n
}

// continues says whether a rule is the same as another but for addresses and
// policies, so that its counters go on. It is what package loader does.
func continues(r, old *loader.Rule) bool {
	in, oldIn := r.In, old.In
	in.MAC, oldIn.MAC = [6]byte{}, [6]byte{}
	if r.Name != old.Name || in != oldIn || len(r.Out) != len(old.Out) {
		return false
	}
	for i := range r.Out {
		a, b := &r.Out[i], &old.Out[i]
		if a.Dst != b.Dst || a.DstLen != b.DstLen || a.DstPort != b.DstPort || a.PortAdd != b.PortAdd || a.PortShift != b.PortShift {
			return false
		}
	}
	return true
}

// normalize gives what means the same one form, as package loader does.
func normalize(r loader.Rule) loader.Rule {
	if r.In.Len == r.In.Group.BitLen() {
		r.In.Len = 0
	}
	out := make([]loader.Output, len(r.Out))
	for i, o := range r.Out {
		o.MTU = min(o.MTU, math.MaxUint16)
		if o.Ready || o.Blocked == 0 {
			o.Blocked = loader.NotReady
		}
		if int(o.DstLen) == o.Dst.BitLen() {
			o.DstLen = 0
		}
		out[i] = o
	}
	r.Out = out
	return r
}

// check refuses what cannot be forwarded. Callers validate rules for people; this
// keeps the engines from what they cannot do.
func check(r *loader.Rule) error {
	in := &r.In
	switch {
	case r.Name == "":
		return errors.New("no name")
	case len(r.Out) == 0:
		return errors.New("no outputs")
	case in.Index <= 0:
		return fmt.Errorf("input interface index %d: want a positive number", in.Index)
	case !in.Group.IsValid() || in.Group.Is4In6() || in.Group.Zone() != "":
		return fmt.Errorf("input address %v: want IPv4 or IPv6 without a zone", in.Group)
	case in.Len < 0 || in.Len > in.Group.BitLen():
		return fmt.Errorf("input prefix length %d: want 0 to %d", in.Len, in.Group.BitLen())
	case in.Len != 0 && netip.PrefixFrom(in.Group, in.Len).Masked().Addr() != in.Group:
		return fmt.Errorf("input prefix %v/%d: want no bits behind the prefix", in.Group, in.Len)
	case in.Source.IsValid() && (in.Source.BitLen() != in.Group.BitLen() || in.Source.IsUnspecified()):
		return fmt.Errorf("input source %v: want an address of the family of %v", in.Source, in.Group)
	}
	for slot := range r.Out {
		if err := checkOutput(&r.Out[slot], in); err != nil {
			return fmt.Errorf("output %d: %w", slot, err)
		}
	}
	return nil
}

func checkOutput(o *loader.Output, in *loader.Input) error {
	switch {
	case o.Dst.BitLen() != in.Group.BitLen() || o.Dst.Is4In6():
		return fmt.Errorf("address %v is of another family than %v", o.Dst, in.Group)
	case o.Src.IsValid() && (o.Src.BitLen() != o.Dst.BitLen() || o.Src.Is4In6()):
		return fmt.Errorf("source %v is of another family than %v", o.Src, o.Dst)
	case int(o.DstLen) > o.Dst.BitLen():
		return fmt.Errorf("prefix length %d: want 0 to %d", o.DstLen, o.Dst.BitLen())
	case !o.PortAdd && o.DstPort == 0:
		return errors.New("port 0: want 1 to 65535")
	case o.Ready && o.Index <= 0:
		return fmt.Errorf("interface index %d: want a positive number", o.Index)
	case o.VLAN > packet.VLANSet:
		return fmt.Errorf("VLAN mode %d: want keep, pop or set", o.VLAN)
	case int(o.Blocked) >= reasons:
		return fmt.Errorf("blocked for reason %v: want not_ready or no_neighbour", o.Blocked)
	}
	return nil
}
