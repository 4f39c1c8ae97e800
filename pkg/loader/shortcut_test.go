package loader

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net/netip"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"xdpcast/bpf"
	"xdpcast/pkg/flow"
	"xdpcast/pkg/packet"
)

// shortcutsOf reads the used slots.
func shortcutsOf(t testing.TB, m *mapSet) map[uint32]bpf.RelayShortcut {
	t.Helper()
	found := map[uint32]bpf.RelayShortcut{}
	var at uint32
	var s bpf.RelayShortcut
	iter := m.Shortcuts.Iterate()
	for iter.Next(&at, &s) {
		if s.Family != 0 {
			found[at] = s
		}
	}
	if err := iter.Err(); err != nil {
		t.Fatal(err)
	}
	return found
}

func shortcutInput(s *bpf.RelayShortcut) flow.Input {
	if s.Family == 4 {
		return decodeKey4(&bpf.RelayFlow4{Ifindex: s.Ifindex, Vlan: s.Vlan, OuterVlan: s.OuterVlan, Port: s.Port, Group: s.Group, Source: s.Source})
	}
	return decodeKey6(&bpf.RelayFlow6{Ifindex: s.Ifindex, Vlan: s.Vlan, OuterVlan: s.OuterVlan, Port: s.Port, Group: [16]byte(s.Second[:]), Source: [16]byte(s.Second[16:])})
}

// shortcutsAgree checks what programs rely on: an open shortcut gives the same result as the flow
// tables.
func shortcutsAgree(t testing.TB, m *mapSet) {
	t.Helper()
	config, err := m.config("")
	if err != nil {
		t.Fatal(err)
	}
	if config.ShortcutShift == 0 {
		return
	}
	tables, err := openTables(m, "", false) // by id
	if err != nil {
		t.Fatal(err)
	}
	defer tables.Close()
	flows, err := tables.read()
	if err != nil {
		t.Fatal(err)
	}
	inForce, sourced, ported := map[flow.Input]bpf.RelayFlow{}, map[flow.Input]bool{}, map[flow.Input]bool{}
	every := func(in flow.Input) flow.Input {
		in = in.AnySource()
		in.Port = 0
		return in
	}
	for _, f := range flows {
		inForce[f.in.Key()] = f.value
		if f.in.Port != 0 && f.in.Len == 0 {
			ported[every(f.in)] = true
		}
		if in := f.in.Key(); in.Source.IsValid() {
			in.Source = netip.Addr{}
			sourced[in] = true
		}
	}
	for at, s := range shortcutsOf(t, m) {
		in := shortcutInput(&s)
		if flow, ok := inForce[in]; !ok || flow != s.Flow {
			t.Errorf("slot %d has %+v, the flow tables say %+v", at, s, flow)
		}
		if s.HasOutput != 0 {
			var o bpf.RelayOutput
			if err := m.Outputs.Lookup(s.Flow.FirstOutput, &o); err != nil {
				t.Fatal(err)
			}
			var line [128]byte
			if n, err := binary.Encode(line[:], binary.NativeEndian, &o); err != nil || n != len(line) {
				t.Fatalf("output of %d bytes, %v", n, err)
			}
			if s.Family != 4 || s.Flow.Outputs != 1 || !bytes.Equal(s.Second[:], line[:len(s.Second)]) {
				t.Errorf("slot %d has output %x, map outputs %+v", at, s.Second, o)
			}
		}
		if sourced[in] || in.Port == 0 && (!in.Source.IsValid() || ported[every(in)]) {
			t.Errorf("slot %d takes the packets of a more specific rule from %+v", at, in)
		}
	}
}

// shortcutCases are rules that have a shortcut, with frames that use it.
func shortcutCases(n *testLab) map[string]struct {
	rule  flow.Flow
	frame []byte
} {
	frame := func(src, dst string, vlans ...uint16) []byte {
		f := packet.Frame{SrcMAC: [6]byte{2, 0, 0, 0, 0, 1}, Src: netip.MustParseAddr(src), Dst: netip.MustParseAddr(dst), SrcPort: 1, DstPort: 5000, TTL: 9, VLANs: vlans, Payload: []byte("payload")}
		f.DstMAC = packet.MulticastMAC(f.Dst)
		return f.Build()
	}
	tagged := input(n.in, "239.1.1.3", "", 5000)
	tagged.VLAN, tagged.OuterVLAN = 7, 9
	out4, out6 := output(n.out[0], "239.2.2.2", "10.1.0.1", 6000), output(n.out[0], "ff3e::2", "fd00::1", 6000)
	rule := func(name string, in flow.Input, out ...flow.Output) flow.Flow {
		return flow.Flow{Name: name, In: in, Out: out}
	}
	type c = struct {
		rule  flow.Flow
		frame []byte
	}
	return map[string]c{
		"any source":     {rule("a", input(n.in, "239.1.1.1", "", 5000), out4), frame("192.168.7.7", "239.1.1.1")},
		"one source":     {rule("b", input(n.in, "239.1.1.2", "192.168.7.7", 5000), out4), frame("192.168.7.7", "239.1.1.2")},
		"VLANs":          {rule("c", tagged, out4), frame("192.168.7.7", "239.1.1.3", 9, 7)},
		"several":        {rule("d", input(n.in, "239.1.1.4", "", 5000), out4, out4), frame("192.168.7.7", "239.1.1.4")},
		"IPv6":           {rule("e", input(n.in, "ff3e::1", "", 5000), out6), frame("2001:db8::7", "ff3e::1")},
		"IPv6, sourced":  {rule("f", input(n.in, "ff3e::3", "2001:db8::7", 5000), out6), frame("2001:db8::7", "ff3e::3")},
		"any port":       {rule("g", input(n.in, "239.1.1.5", "192.168.7.7", 0), out4), frame("192.168.7.7", "239.1.1.5")},
		"IPv6, any port": {rule("h", input(n.in, "ff3e::4", "2001:db8::7", 0), out6), frame("2001:db8::7", "ff3e::4")},
	}
}

// A packet whose rule has a shortcut needs no flow table, and one without it finds its rule in the
// tables.
func TestShortcutsAreTaken(t *testing.T) {
	t.Parallel()
	n, r := programLab(t, 1)
	cases := shortcutCases(n)
	var rules []flow.Flow
	for _, c := range cases {
		rules = append(rules, c.rule)
	}
	sync1(t, r.l, rules...)
	shortcutsAgree(t, r.l.maps)
	if got := len(shortcutsOf(t, r.l.maps)); got != len(rules) {
		t.Errorf("%d shortcuts to %d rules", got, len(rules))
	}
	verdict := func(frame []byte) uint32 {
		verdict, _ := r.must(t, r.l.relay, n.in.Index, frame, len(frame))
		return verdict
	}
	open := func(t *testing.T, yes bool) {
		t.Helper()
		r.l.shortcuts.open = yes
		if err := r.l.writeConfig(); err != nil {
			t.Fatal(err)
		}
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			r.enter(t)
			open(t, false)
			if got := verdict(c.frame); got != xdpRedirect {
				t.Errorf("verdict %d without shortcuts", got)
			}
			if err := r.l.tableOf(c.rule.In).Delete(encodeKey(c.rule.In)); err != nil {
				t.Fatal(err)
			}
			if got := verdict(c.frame); got != xdpPass {
				t.Errorf("verdict %d without shortcuts and flow entry", got)
			}
			open(t, true)
			if got := verdict(c.frame); got != xdpRedirect {
				t.Errorf("verdict %d with a shortcut alone", got)
			}
			other := bytes.Clone(c.frame)
			other[len(other)-len("payload")-5]++ // the destination port
			want := uint32(xdpPass)
			if c.rule.In.Port == 0 {
				want = xdpRedirect
			}
			if got := verdict(other); got != want {
				t.Errorf("verdict %d for another port, want %d", got, want)
			}
		})
	}
}

// A rule has a shortcut only while no more specific one can take its packets.
func TestShortcutsOfOverlappingRules(t *testing.T) {
	t.Parallel()
	n := newLab(t, 1)
	l := open(t, stateOptions(t))
	rule := func(name, source string, port uint16) flow.Flow {
		return flow.Flow{Name: name, In: input(n.in, "239.1.1.1", source, port), Out: []flow.Output{output(n.out[0], "239.2.2.2", "10.1.0.1", 6000)}}
	}
	prefix := rule("prefix", "", 5000)
	prefix.In.Group, prefix.In.Len = netip.MustParseAddr("239.1.0.0"), 16
	elsewhere := rule("elsewhere", "192.168.7.7", 5000)
	elsewhere.In.VLAN = 7
	anySource, s1, s2, anyPort, other := rule("any", "", 5000), rule("s1", "192.168.7.7", 5000), rule("s2", "192.168.7.9", 5000), rule("port", "", 0), rule("other", "192.168.7.7", 5001)
	every, ports, some := rule("every", "192.168.7.7", 0), rule("ports", "", 5000), rule("some", "192.168.0.0", 5000)
	ports.In.PortTo = 5003
	some.In.SourceLen, some.In.BySource = 16, true
	for _, c := range []struct {
		name  string
		rules []flow.Flow
		want  string
	}{
		{"any source", []flow.Flow{anySource, prefix, anyPort, other, elsewhere}, "any elsewhere other"},
		{"a source beside it", []flow.Flow{anySource, s1, prefix}, "s1"},
		{"more sources than slots", []flow.Flow{anySource, s1, s2}, "s1 s2"},
		{"sources alone", []flow.Flow{s1, s2, anyPort}, "s1 s2"},
		{"any source again", []flow.Flow{anySource}, "any"},
		{"any port of a source", []flow.Flow{every, prefix, anyPort, elsewhere}, "elsewhere every"},
		{"a port beside it", []flow.Flow{every, anySource}, "any"},
		{"a source's port beside it", []flow.Flow{every, s2}, "s2"},
		{"ports beside it", []flow.Flow{every, ports}, ""},
		{"a port of some sources beside it", []flow.Flow{every, some}, ""},
		{"any port of a source again", []flow.Flow{every}, "every"},
		{"none", nil, ""},
	} {
		sync1(t, l, c.rules...)
		shortcutsAgree(t, l.maps)
		var names []string
		for _, s := range shortcutsOf(t, l.maps) {
			for _, e := range l.rules {
				if e.id == s.Flow.Rule {
					names = append(names, e.rule.Name)
				}
			}
		}
		slices.Sort(names)
		if got := strings.Join(names, " "); got != c.want {
			t.Errorf("%s: shortcuts to %q, want %q", c.name, got, c.want)
		}
	}
}

// Nearly every rule finds a slot, however many there are, and keeps it when others come and go.
func TestShortcutPlaces(t *testing.T) {
	for _, c := range []struct{ rules, slots uint32 }{{1, 2}, {2, 2}, {3, 4}, {16384, 16384}, {16385, 32768}, {1 << 31, 1 << 31}, {1<<32 - 1, 1 << 31}} {
		if got := shortcutSlots(c.rules); got != c.slots {
			t.Errorf("%d slots for %d rules, want %d", got, c.rules, c.slots)
		}
	}
	const n = 16384
	s := newShortcuts(shortcutSlots(2*n), true)
	var entries []*entry
	for i := range n {
		group := netip.AddrFrom4([4]byte{239, 1, byte(i >> 8), byte(i)})
		if i%2 == 1 {
			group = netip.MustParseAddr(fmt.Sprintf("ff3e::%x", i))
		}
		entries = append(entries, &entry{rule: &flow.Flow{In: flow.Input{Index: 2 + i%3, Group: group, Port: uint16(5000 + i%2)}}})
	}
	for _, e := range entries {
		s.put(e, map[uint32]bool{})
	}
	placed, seen := 0, map[*entry]bool{}
	for _, e := range entries {
		if s.has(e) {
			placed++
		}
	}
	for _, e := range s.slots {
		if e != nil && seen[e] {
			t.Fatalf("%v has two slots", e.rule.In)
		}
		seen[e] = true
	}
	if placed < n*99/100 {
		t.Errorf("%d of %d rules have a slot", placed, n)
	}
	// If there are more rules than slots, no entry loses its slot, and there are no useless writes.
	full := newShortcuts(shortcutSlots(n), true)
	for _, e := range entries {
		full.put(e, map[uint32]bool{})
	}
	before := slices.Clone(full.slots)
	placed = 0
	for _, e := range entries {
		if full.has(e) {
			placed++
			continue
		}
		changed := map[uint32]bool{}
		if full.put(e, changed); len(changed) != 0 {
			t.Errorf("%v: a second try changes %v", e.rule.In, changed)
		}
	}
	if !slices.Equal(before, full.slots) {
		t.Error("slots have changed")
	}
	t.Logf("%d of %d rules have one of as many slots", placed, n)
	if placed < n*2/3 {
		t.Errorf("only %d of %d rules have a slot", placed, n)
	}
}

// Slots left by a dead process, or changed by anything else, are corrected before they are used.
func TestShortcutsAreMadeAnew(t *testing.T) {
	t.Parallel()
	n := newLab(t, 2)
	l := open(t, stateOptions(t))
	rules := someRules(n)
	sync1(t, l, rules...)
	want := shortcutsOf(t, l.maps)
	if len(want) == 0 {
		t.Fatal("no rule has a shortcut")
	}
	for at := range uint32(len(l.shortcuts.slots)) {
		wrong := bpf.RelayShortcut{Family: 4, Group: [4]byte{239, 9, 9, 9}, Port: 1}
		if err := l.maps.Shortcuts.Put(at, &wrong); err != nil {
			t.Fatal(err)
		}
	}
	l.shortcuts.open = false
	if err := l.writeConfig(); err != nil {
		t.Fatal(err)
	}
	l = reopen(t, l)
	shortcutsAgree(t, l.maps)
	if got := len(shortcutsOf(t, l.maps)); got != len(want) {
		t.Errorf("%d shortcuts, want %d", got, len(want))
	}
	if config, _ := l.maps.config(""); config.ShortcutShift == 0 {
		t.Error("the shortcuts are not used")
	}
}

// A failure to write shortcuts costs time, not packets, and is made up for later.
func TestShortcutsThatFail(t *testing.T) {
	t.Parallel()
	n, r := programLab(t, 1)
	var log bytes.Buffer
	r.l.log = slog.New(slog.NewTextHandler(&log, nil))
	cases := shortcutCases(n)
	a, b := cases["any source"], cases["one source"]
	sync1(t, r.l, a.rule)

	good := r.l.maps.Shortcuts
	var err error
	if r.l.maps.Shortcuts, err = ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: good.ValueSize(), MaxEntries: 1}); err != nil {
		t.Fatal(err)
	}
	sync1(t, r.l, a.rule, b.rule)
	err = r.l.maps.Shortcuts.Close()
	r.l.maps.Shortcuts = good
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(log.String(), "level=WARN") {
		t.Errorf("no warning in the log: %s", log.String())
	}
	for _, frame := range [][]byte{a.frame, b.frame} {
		if verdict, _ := r.must(t, r.l.relay, n.in.Index, frame, len(frame)); verdict != xdpRedirect {
			t.Errorf("verdict %d while there are no shortcuts", verdict)
		}
	}
	sync1(t, r.l, b.rule)
	shortcutsAgree(t, r.l.maps)
	if got := shortcutsOf(t, r.l.maps); len(got) != 1 {
		t.Errorf("%d shortcuts to 1 rule", len(got))
	}
	if config, _ := r.l.maps.config(""); config.ShortcutShift == 0 {
		t.Error("the shortcuts stay closed")
	}

	// A failed change leaves them as they were.
	nowhere := cases["VLANs"].rule
	nowhere.Out = []flow.Output{output(n.out[0], "239.2.2.2", "10.1.0.1", 6000)}
	nowhere.Out[0].Index = 9999
	if err := r.l.Sync(pointers([]flow.Flow{b.rule, nowhere})); err == nil {
		t.Fatal("an interface that is not there is accepted")
	}
	table := r.l.tables[exact4]
	r.l.tables[exact4] = r.l.tables[prefixes4]
	err = r.l.Sync(pointers([]flow.Flow{a.rule, b.rule}))
	r.l.tables[exact4] = table
	if refused := (*RuleError)(nil); err == nil || errors.As(err, &refused) {
		t.Fatalf("the flow table cannot be written: %v", err)
	}
	if config, _ := r.l.maps.config(""); config.ShortcutShift == 0 || !r.l.shortcuts.open {
		t.Error("the shortcuts stay closed after a failure")
	}
	shortcutsAgree(t, r.l.maps)
}

// Wherever rules have their slots, however few and full, a new one takes no slot from another: each
// has one of its two candidates, or none, and changed slots are recorded.
func TestShortcutsAreNotLost(t *testing.T) {
	for seed := range uint64(200) {
		random := rand.New(rand.NewPCG(seed, 1))
		s := newShortcuts(1<<(1+random.IntN(5)), true)
		placed := map[*entry]bool{}
		for i := range 2 * len(s.slots) {
			e := &entry{rule: &flow.Flow{In: flow.Input{Index: 2, Group: netip.AddrFrom4([4]byte{239, byte(seed), byte(i >> 8), byte(i)}), Port: uint16(1 + random.IntN(3))}}}
			before := slices.Clone(s.slots)
			changed := map[uint32]bool{}
			s.put(e, changed)
			if s.has(e) {
				placed[e] = true
			}
			found := map[*entry]bool{}
			for at, holder := range s.slots {
				if (holder != before[at]) != changed[uint32(at)] {
					t.Fatalf("seed %d, rule %d: slot %d noted as changed: %v", seed, i, at, changed[uint32(at)])
				}
				if holder == nil {
					continue
				}
				first, second := s.slotsOf(holder.rule.In)
				if found[holder] || uint32(at) != first && uint32(at) != second {
					t.Fatalf("seed %d, rule %d: slot %d has a rule of slots %d and %d, twice: %v", seed, i, at, first, second, found[holder])
				}
				found[holder] = true
			}
			if !maps.Equal(found, placed) {
				t.Fatalf("seed %d, rule %d: %d rules have slots, want the %d that had one", seed, i, len(found), len(placed))
			}
		}
		if len(placed) < len(s.slots)/2 {
			t.Errorf("seed %d: %d of %d slots are taken", seed, len(placed), len(s.slots))
		}
	}
}

// After any changes of few rules, shortcuts are as if they were assigned anew: all rules that may have
// a slot have one, or wait for one of two that others have.
func TestShortcutsOfFewChanges(t *testing.T) {
	for seed := range uint64(300) {
		random := rand.New(rand.NewPCG(seed, 2))
		l := &Loader{rules: map[string]*entry{}, keep: map[int]int{}, lookups: lookupCount{}, shortcuts: newShortcuts(1<<(1+random.IntN(6)), true)}
		input := func() flow.Input {
			in := flow.Input{Index: 2 + random.IntN(2), Group: netip.AddrFrom4([4]byte{239, 1, 1, byte(random.IntN(3))}), Port: uint16(random.IntN(4))}
			switch random.IntN(4) {
			case 0, 1:
				in.Source = netip.AddrFrom4([4]byte{10, 0, 0, byte(1 + random.IntN(3))})
			case 2:
				if in.Port != 0 && random.IntN(2) == 0 {
					in.PortTo = in.Port + 2
				}
				if random.IntN(3) == 0 {
					in.BySource, in.SourceLen, in.Source = true, 8, netip.AddrFrom4([4]byte{10, 0, 0, 0})
				}
			}
			return in
		}
		for step := range 60 {
			s := &transaction{Loader: l}
			touched := map[string]bool{}
			for range 1 + random.IntN(3) {
				name := fmt.Sprint(random.IntN(20))
				if touched[name] {
					continue
				}
				touched[name] = true
				c := change{old: l.rules[name]}
				if c.old == nil || random.IntN(2) == 0 {
					c.new = &entry{rule: &flow.Flow{Name: name, In: input(), Out: make([]flow.Output, 1)}}
				}
				s.changes = append(s.changes, c)
			}
			if s.claimInputs() != nil {
				if err := s.takeBack(); err != nil {
					t.Fatal(err)
				}
				countsFit(t, l)
				continue
			}
			for _, c := range s.changes {
				if c.old != nil {
					l.places.remove(c.old)
					l.leave(c.old)
				}
				if c.new != nil {
					l.enter(c.new)
				}
			}
			before := slices.Clone(l.shortcuts.slots)
			changed := map[uint32]bool{}
			l.assignSome(s.changes, changed)
			for at := range before {
				if before[at] != l.shortcuts.slots[at] && !changed[uint32(at)] {
					t.Errorf("slot %d has changed, which is not recorded", at)
				}
			}
			countsFit(t, l)
			for _, e := range l.rules {
				if mayHaveShortcut(e.rule.In) {
					if got := !l.places.shade(placeOf(e.rule.In)).covers(e.rule.In); got != l.wantsShortcut(e) {
						t.Errorf("rule %s %+v wants a shortcut: %v by the shade of its place", e.rule.Name, e.rule.In, got)
					}
				}
			}
			for _, e := range l.shortcuts.slots {
				if e != nil && l.rules[e.rule.Name] != e {
					t.Errorf("a slot has rule %s, which is gone", e.rule.Name)
				}
			}
			for e := range l.shortcuts.slotless {
				for _, at := range l.shortcuts.candidates(e) {
					if l.shortcuts.slots[at] == nil {
						t.Errorf("rule %s waits for slot %d, which is free", e.rule.Name, at)
					}
				}
			}
			if t.Failed() {
				t.Fatalf("seed %d, step %d", seed, step)
			}
		}
	}
}

// TestShortcutsOfManySources: a rule of one port beside very many of one source and any port, which all lose
// their shortcuts to it and get them back, costs what the rules of the group are, and not their square.
func TestShortcutsOfManySources(t *testing.T) {
	const many = 20_000
	l := &Loader{rules: map[string]*entry{}, keep: map[int]int{}, lookups: lookupCount{}, shortcuts: newShortcuts(1<<16, true)}
	add := func(name string, in flow.Input) *entry {
		e := &entry{rule: &flow.Flow{Name: name, In: in, Out: make([]flow.Output, 1)}}
		l.places.add(e)
		l.enter(e)
		return e
	}
	group := netip.AddrFrom4([4]byte{232, 1, 1, 1})
	for i := range many {
		add(fmt.Sprint(i), flow.Input{Index: 2, Group: group, Source: netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)})})
	}
	l.assignAll(map[uint32]bool{})
	port := add("port", flow.Input{Index: 2, Group: group, Port: 5000})
	var before, after unix.Rusage
	cpu := func(u *unix.Rusage) time.Duration {
		return time.Duration(u.Utime.Nano() + u.Stime.Nano())
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := unix.Getrusage(unix.RUSAGE_THREAD, &before); err != nil {
		t.Fatal(err)
	}
	l.assignSome([]change{{new: port}}, map[uint32]bool{})
	for _, e := range l.rules {
		if l.shortcuts.has(e) != (e == port) {
			t.Fatalf("rule %s has a shortcut: %v, beside one of a port", e.rule.Name, l.shortcuts.has(e))
		}
	}
	l.places.remove(port)
	l.leave(port)
	l.assignSome([]change{{old: port}}, map[uint32]bool{})
	if err := unix.Getrusage(unix.RUSAGE_THREAD, &after); err != nil {
		t.Fatal(err)
	}
	if took := cpu(&after) - cpu(&before); took > time.Second {
		t.Errorf("%v of CPU for %d rules of a group, want at most 1s", took, many)
	}
}
