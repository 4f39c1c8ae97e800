package relay

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"xdpcast/internal/control"
	"xdpcast/internal/lab"
	"xdpcast/internal/labtest"
	"xdpcast/internal/network"
	"xdpcast/internal/plan"
	"xdpcast/pkg/membership"
	"xdpcast/pkg/rules"
)

func addr(s string) netip.Addr { return netip.MustParseAddr(s) }

// put adds rules as AddRule does once they are validated.
func (r *running) put(all ...rules.Rule) error {
	var e edit
	for _, rule := range all {
		e.put = append(e.put, &plan.Rule{Rule: rule, Origin: plan.OriginAPI})
	}
	return r.do(r.t.Context(), func() error { return r.replace(e, false) })
}

func (r *running) mustPut(all ...rules.Rule) {
	r.t.Helper()
	if err := r.put(all...); err != nil {
		r.t.Fatal(err)
	}
}

// inKernel lists the rules in the kernel, each with the interfaces of its outputs.
func (r *running) inKernel() (all []string) {
	r.t.Helper()
	if err := r.do(r.t.Context(), func() error {
		for _, rule := range r.loader.Rules() {
			text := rule.Name + " ->"
			for _, o := range rule.Out {
				text += " " + r.nameOf(o.Index)
			}
			all = append(all, text)
		}
		return nil
	}); err != nil {
		r.t.Fatal(err)
	}
	slices.Sort(all)
	return all
}

func (r *running) waitKernel(want ...string) {
	r.t.Helper()
	var last []string
	defer func() {
		if r.t.Failed() {
			r.t.Logf("the kernel holds %q", last)
		}
	}()
	labtest.Eventually(r.t, fmt.Sprintf("the kernel holds %q", want), func() bool {
		last = r.inKernel()
		return slices.Equal(last, want)
	})
}

func (p *place) connect(name, cidr string) {
	p.t.Helper()
	labtest.Connect(p.t, lab.End{Host: p.host, Name: name, Addrs: []string{cidr}}, lab.End{Host: p.peer, Name: name})
}

func (p *place) remove(name string) {
	p.t.Helper()
	l, err := p.host.Link(name)
	if err == nil {
		err = p.host.Netlink().LinkDel(l)
	}
	if err != nil {
		p.t.Fatal(err)
	}
}

func stream(name, in, group string, outputs ...rules.Output) rules.Rule {
	return rules.Rule{Name: name, In: rules.Input{Interface: in, Address: addr(group), Port: 5000}, Out: outputs}
}

func to(ifname, group string) rules.Output {
	return rules.Output{Interface: ifname, Address: addr(group), Port: 6000}
}

// TestInputPattern: a pattern follows interfaces as they come and go; a rule that
// names one wins, and so does a longer pattern.
func TestInputPattern(t *testing.T) {
	p := newPlace(t)
	r := p.start()
	r.mustPut(stream("any", "in+", "239.1.1.1", to("out0", "239.2.2.1")))
	r.waitKernel("any%in0 -> out0")
	p.connect("in1", "10.11.0.1/24")
	p.connect("in1b", "10.12.0.1/24")
	r.waitKernel("any%in0 -> out0", "any%in1 -> out0", "any%in1b -> out0")
	for _, name := range []string{"in0", "in1", "in1b"} {
		if got := p.groups(); !strings.Contains(got, name+" group 010101EF") || strings.Count(got, "010101EF") != 3 {
			t.Errorf("groups are\n%s", got)
		}
	}
	r.mustPut(stream("longer", "in1+", "239.1.1.1", to("out1", "239.2.2.1")))
	r.waitKernel("any%in0 -> out0", "longer%in1 -> out1", "longer%in1b -> out1")
	r.mustPut(stream("named", "in1", "239.1.1.1", to("out0", "239.2.2.9")))
	r.waitKernel("any%in0 -> out0", "longer%in1b -> out1", "named -> out0")
	// Another group is no matter of theirs.
	r.mustPut(stream("other", "in1", "239.1.1.2", to("out0", "239.2.2.9")))
	r.waitKernel("any%in0 -> out0", "longer%in1b -> out1", "named -> out0", "other -> out0")
	for _, name := range []string{"longer", "named"} {
		if err := r.DeleteRule(t.Context(), name); err != nil {
			t.Fatal(err)
		}
	}
	r.waitKernel("any%in0 -> out0", "any%in1 -> out0", "any%in1b -> out0", "other -> out0")
	p.remove("in1b")
	p.remove("in1")
	r.waitKernel("any%in0 -> out0")
	r.mustPut(stream("taken", "in0", "239.1.1.1", to("out0", "239.2.2.9")))
	r.waitKernel("taken -> out0")
	s, err := r.Rule(t.Context(), "any")
	if want := "the interfaces that match in+ are taken: rule taken takes the same on in0"; err != nil || s.State != control.StatePending || s.Reason != want {
		t.Errorf("rule is %s (%s), %v; want %s", s.State, s.Reason, err, want)
	}
	r.mustPut(stream("nothing", "eth+", "239.1.1.1", to("out0", "239.2.2.1")))
	if s, err := r.Rule(t.Context(), "nothing"); err != nil || s.Reason != "no interface matches eth+" {
		t.Errorf("rule is %s (%s), %v", s.State, s.Reason, err)
	}
}

// TestOutputPattern: one slot for each interface, by name; those that another output
// names, and the one that would feed the input, are left out.
func TestOutputPattern(t *testing.T) {
	p := newPlace(t)
	r := p.start()
	r.mustPut(stream("out", "in0", "239.1.1.1", to("out+", "239.2.2.1")))
	r.waitKernel("out -> out0 out1")
	p.connect("out00", "10.21.0.1/24")
	r.waitKernel("out -> out0 out00 out1")
	p.remove("out0")
	r.waitKernel("out -> out00 out1")
	s, err := r.Rule(t.Context(), "out")
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, o := range s.Outputs {
		got = append(got, fmt.Sprint(o.Slot, " ", o.Output, " ", o.State))
	}
	if d := cmp.Diff([]string{"0 239.2.2.1:6000%out00 active", "1 239.2.2.1:6000%out1 active"}, got); d != "" {
		t.Errorf("outputs:\n%s", d)
	}
	if s.State != control.StateActive || s.Reason != "" {
		t.Errorf("rule is %s (%s)", s.State, s.Reason)
	}
	p.remove("out00")
	p.remove("out1")
	labtest.Eventually(t, "nothing matches", func() bool {
		s, err = r.Rule(t.Context(), "out")
		return err == nil && s.State == control.StatePending && s.Reason == "no interface matches out+" && len(s.Outputs) == 1
	})
	p.connect("out5", "10.22.0.1/24")
	r.waitKernel("out -> out5")
}

// TestPrefixMemberships: which groups are joined is what the rule says.
func TestPrefixMemberships(t *testing.T) {
	p := newPlace(t)
	r := p.start()
	prefix := func(name, group string, length uint8, join rules.JoinPolicy, groups ...netip.Addr) rules.Rule {
		rule := stream(name, "in0", group, to("out0", "239.2.2.1"))
		rule.In.Len, rule.In.Port = length, 0
		rule.Accept = rules.Acceptance{Join: join, Extra: &rules.Extra{Groups: groups}}
		return rule
	}
	before := p.groups()
	r.mustPut(prefix("none", "239.9.0.0", 16, rules.JoinNone))
	if got := p.groups(); got != before {
		t.Errorf("joined something:\n%s", got)
	}
	r.mustPut(prefix("all", "239.1.1.8", 29, rules.JoinAll))
	for i := range 8 {
		if got := p.groups(); !strings.Contains(got, fmt.Sprintf("group %02X0101EF users 1", 8+i)) {
			t.Errorf("239.1.1.%d is not joined:\n%s", 8+i, got)
		}
	}
	// A group that two rules want is joined once, and left with the last.
	r.mustPut(prefix("list", "239.1.0.0", 16, rules.JoinList, addr("239.1.1.9"), addr("239.1.7.7")))
	if got := p.groups(); !strings.Contains(got, "group 070701EF users 1") || !strings.Contains(got, "group 090101EF users 1") {
		t.Errorf("groups are\n%s", got)
	}
	all, err := r.Groups(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	i := slices.IndexFunc(all, func(g control.Group) bool { return g.Group == "239.1.1.9" })
	if len(all) != 9 || i < 0 || !slices.Equal(all[i].Rules, []string{"all", "list"}) {
		t.Errorf("%d memberships: %+v", len(all), all)
	}
	source := prefix("source", "232.1.0.0", 16, rules.JoinList, addr("232.1.0.1"), addr("232.1.0.2"))
	source.In.Source = addr("10.0.0.2")
	r.mustPut(source)
	if got := p.groups(); !strings.Contains(got, "0xe8010001 0x0a000002") || !strings.Contains(got, "0xe8010002 0x0a000002") {
		t.Errorf("groups are\n%s", got)
	}
	for _, name := range []string{"all", "list", "source", "none"} {
		if err := r.DeleteRule(t.Context(), name); err != nil {
			t.Fatal(err)
		}
	}
	if got := p.groups(); got != before {
		t.Errorf("something is still joined:\n%s", got)
	}
}

// TestPrefixJoinFails: one group that cannot be joined fails the rule, and is named.
func TestPrefixJoinFails(t *testing.T) {
	p := newPlace(t)
	system := newFaulty()
	p.opts.Membership.System = system
	r := p.start()
	before := p.footprint(r)
	rule := stream("all", "in0", "239.1.1.0", to("out0", "239.2.2.1"))
	rule.In.Len, rule.Accept.Join = 28, rules.JoinAll
	system.fail(unix.ENOPROTOOPT, "\xef\x01\x01\x05")
	err := r.put(rule)
	var join *membership.JoinError
	if !errors.As(err, &join) || join.Membership.Group != addr("239.1.1.5") || !errors.Is(err, unix.ENOPROTOOPT) {
		t.Errorf("error is %v", err)
	}
	if d := cmp.Diff(before, p.footprint(r)); d != "" {
		t.Errorf("something remains:\n%s", d)
	}
	// Where none can be joined, one try tells: the others wait for it.
	tries := func() uint64 {
		status, err := r.Status(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		i := slices.IndexFunc(status.Interfaces, func(i control.InterfaceStatus) bool { return i.Name == "in0" })
		return status.Interfaces[i].JoinsFailed
	}
	system.fail(unix.EPERM, "")
	failed := tries()
	if err := r.put(rule); !errors.Is(err, unix.EPERM) {
		t.Errorf("error is %v", err)
	}
	if got := tries() - failed; got != 1 {
		t.Errorf("%d joins of 16 were tried, want 1", got)
	}
	system.fail(nil, "")
	r.mustPut(rule)
}

// TestUnicastInput: a single address must be the host's; a prefix need not hold one.
func TestUnicastInput(t *testing.T) {
	p := newPlace(t)
	r := p.start()
	any := stream("any", "in0", "10.0.0.1", to("out0", "239.2.2.1"))
	any.In.Port = 0
	prefix := stream("prefix", "in0", "192.0.2.0", to("out0", "239.2.2.1"), to("out1", "10.2.0.2"))
	prefix.In.Len, prefix.In.Port = 24, 0
	r.mustPut(any, prefix)
	r.waitKernel("any -> out0", "prefix -> out0 out1")
	if k := r.kernel("prefix"); k.In.Len != 24 || k.In.Port != 0 || k.In.Group != addr("192.0.2.0") {
		t.Errorf("input is %+v", k.In)
	}
	err := r.put(stream("bad", "in0", "192.0.2.1", to("out0", "239.2.2.1")))
	if err == nil || !strings.HasPrefix(err.Error(), "rule bad: address 192.0.2.1 is neither a multicast group nor an address of this host") {
		t.Errorf("error is %v", err)
	}
}

// TestVLANOffload: a device leaves the tags in the frames as long as a rule matches
// them.
func TestVLANOffload(t *testing.T) {
	p := newPlace(t)
	r := p.start()
	active := func() (on bool) {
		t.Helper()
		labtest.Do(t, p.host, func() error {
			f, err := network.OpenFeatures("in0")
			if err != nil {
				return err
			}
			defer f.Close()
			on = f.Active(network.TagFeatures()[0]) && f.Active(network.TagFeatures()[1])
			return nil
		})
		return on
	}
	if !active() {
		t.Fatal("in0 does not strip tags to begin with")
	}
	tagged := func(name string, id uint16) rules.Rule {
		rule := stream(name, "in0", "239.1.1."+name, to("out0", "239.2.2.1"))
		rule.In.VLAN.ID = id
		return rule
	}
	r.mustPut(tagged("1", 7), tagged("2", 8))
	if k := r.kernel("2"); active() || k.In.VLAN != 8 {
		t.Errorf("in0 strips tags: %v; input is %+v", active(), k.In)
	}
	status, err := r.Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	i := slices.IndexFunc(status.Interfaces, func(i control.InterfaceStatus) bool { return i.Name == "in0" })
	if want := "rx-vlan-hw-parse and rx-vlan-stag-hw-parse is off while rules match VLAN tags here"; status.Interfaces[i].Note != want {
		t.Errorf("note is %q, want %q", status.Interfaces[i].Note, want)
	}
	if err := r.DeleteRule(t.Context(), "1"); err != nil || active() {
		t.Errorf("in0 strips tags although rule 2 is there: %v", err)
	}
	// The rule that outlives the process needs it, and the next process restores it.
	r.stop()
	if active() {
		t.Error("in0 strips tags although the kernel has rule 2")
	}
	if err := os.WriteFile(p.stateFile(), []byte("rules: []"), 0o600); err != nil {
		t.Fatal(err)
	}
	r = p.start()
	if !active() {
		t.Error("in0 does not strip tags although no rule is left")
	}
	// What cannot be switched off fails the rule.
	if err := r.do(t.Context(), func() error {
		r.tags.open = func(string) (featureSet, error) { return fixed{}, nil }
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	err = r.put(tagged("1", 7))
	if err == nil || !errors.Is(err, unix.EOPNOTSUPP) || !strings.Contains(err.Error(), "rule 1: interface in0 strips VLAN tags before XDP sees them") {
		t.Errorf("error is %v", err)
	}
	if got := r.inKernel(); len(got) != 0 {
		t.Errorf("the kernel holds %q", got)
	}
}

// fixed are features that cannot be changed.
type fixed struct{}

func (fixed) Active(string) bool       { return true }
func (fixed) Set([]string, bool) error { return unix.EOPNOTSUPP }
func (fixed) Close() error             { return nil }

// TestPatternRestart: what a pattern stands for is found again, with its counters.
func TestPatternRestart(t *testing.T) {
	p := newPlace(t)
	p.connect("in1", "10.11.0.1/24")
	r := p.start()
	r.mustAdd("any", "239.1.1.1:5000%in+", "239.2.2.1:6000%out+")
	r.waitKernel("any%in0 -> out0 out1", "any%in1 -> out0 out1")
	ids := func() map[string]uint32 {
		all := map[string]uint32{}
		if err := r.do(t.Context(), func() error {
			s, err := r.loader.Stats()
			for _, s := range s.Rules {
				all[s.Name] = s.ID
			}
			return err
		}); err != nil {
			t.Fatal(err)
		}
		return all
	}
	before := ids()
	r.stop()
	r = p.start()
	r.waitKernel("any%in0 -> out0 out1", "any%in1 -> out0 out1")
	if d := cmp.Diff(before, ids()); d != "" {
		t.Errorf("rules are not those from before:\n%s", d)
	}
}
