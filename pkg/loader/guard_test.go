package loader

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"testing"
	"time"

	"github.com/cilium/ebpf"

	"xdpcast/bpf"
	"xdpcast/pkg/flow"
	"xdpcast/pkg/packet"
)

// guardWorld draws packets of few senders and payloads, some of which the host has just sent
// itself: returning packets, and similar ones.
type guardWorld struct {
	*rand.Rand
	rules []flow.Flow
	alone bool     // one sender, so that only marks distinguish packets
	last  [][]byte // frames as sent
}

func (w *guardWorld) frame() (index int, frame []byte) {
	r := &w.rules[w.IntN(len(w.rules))]
	sender := byte(1 + w.IntN(3)*w.IntN(3))
	if w.alone {
		sender = 1
	}
	f := packet.Frame{
		SrcMAC: [6]byte{2, 0, 0, 0, 1, sender}, DstMAC: packet.MulticastMAC(r.In.Group), Dst: r.In.Group,
		Src: netip.AddrFrom4([4]byte{192, 0, 2, sender}), SrcPort: uint16(7000 + w.IntN(8)/7), DstPort: 5000, TTL: uint8(9 + w.IntN(3)),
		Payload: bytes.Repeat([]byte{byte(w.IntN(3))}, []int{0, 3, 20, 40, 200}[w.IntN(5)]), NoChecksum: w.IntN(3) == 0,
	}
	if w.alone { // and few payloads, each repeated often
		f.Payload = f.Payload[:min(len(f.Payload), 20)]
		clear(f.Payload)
	}
	if r.In.Group.Is6() {
		f.Src = netip.AddrFrom16([16]byte{0xfd, 15: sender})
	}
	b := f.Build()
	h, _ := packet.Parse(b)
	if w.IntN(8) == 0 && len(f.Payload) > 60 {
		parts := packet.Fragment(b, uint32(w.IntN(2)), 64)
		return r.In.Index, parts[w.IntN(len(parts))]
	}
	if len(w.last) > 0 && w.IntN(2) == 0 { // with the mark of a sent one
		was, _ := packet.Parse(w.last[w.IntN(len(w.last))])
		if was.Dst.Is4() && h.Dst.Is4() {
			id := w.last[len(w.last)-1][18:20]
			copy(b[h.L3+4:], id)
			packet.FillChecksums(b, &h)
		}
	}
	return r.In.Index, b
}

// The programs' guard and its Go twin agree on what to drop, on the bytes of what is relayed, and
// on the paths that they found. For each packet both use one time, the program's.
func TestGuardDifferential(t *testing.T) {
	n := newLab(t, 2)
	opts := testOptions(t)
	opts.programs = embedded{fragmentTimeout: time.Hour, everyPacket: true}
	l := open(t, opts)
	attachAll(t, l, n.in, n.out[0], n.out[1])
	r := newRunner(t, l, n.relay)
	cut, marked, found, echo := 0, 0, 0, 0
	for round := range 12 {
		var rules []flow.Flow
		for i, group := range []string{"239.1.1.1", "239.1.1.2", "ff3e::1"} {
			rule := flow.Flow{Name: fmt.Sprintf("round%d-%d", round, i), In: input(n.in, group, "", 5000), AllowNoChecksum: true, TwoWay: (round/2+i)%3 != 0}
			src := "10.9.9.9"
			if netip.MustParseAddr(group).Is6() {
				src = "fd00::99"
			}
			rule.Out = append(rule.Out, output(n.out[i%2], group, src, 5000))
			rules = append(rules, rule)
		}
		sync1(t, l, rules...)
		w := &guardWorld{Rand: rand.New(rand.NewPCG(uint64(round), 7)), rules: rules, alone: round%2 == 1}
		twin := &packet.Guard{Unlimited: true}
		at := int64(0)
		clearGuard(t, l)
		ids := map[string]uint32{}
		for name, e := range l.rules {
			ids[name] = e.id
		}
		for range 800 {
			index, frame := w.frame()
			h, ok := packet.Parse(frame)
			if !ok {
				t.Fatalf("frame %x does not parse", frame)
			}
			if h.Part == packet.LaterFragment {
				continue // its rule also depends on fragments of other rounds
			}
			rule := &rules[0]
			for i := range rules {
				if rules[i].In.Group == h.Dst {
					rule = &rules[i]
				}
			}
			before := echoes(t, l, ids[rule.Name])
			got := r.run(t, index, frame, len(frame))
			at = lastSeen(t, l, ids[rule.Name])
			want := bytes.Clone(frame)
			said, mark := twin.Returned(want, &h, packet.GuardPacket{Rule: ids[rule.Name], Index: index, Outputs: len(rule.Out), Ethernet: true, TwoWay: rule.TwoWay, At: at})
			noted := echoes(t, l, ids[rule.Name]) != before
			if (said == packet.GuardCut) != (got.verdict == xdpDrop) || (said == packet.GuardEcho) != noted {
				t.Fatalf("round %d: frame %x: verdict %d, noted %v, the twin says %v", round, frame, got.verdict, noted, said)
			}
			if noted {
				echo++
			}
			if said == packet.GuardCut {
				cut++
				continue
			}
			mark.Apply(want, h.L3, h.Dst.Is4())
			if !bytes.Equal(want, frame) {
				marked++
			}
			copied, reason := sendOne(rule.Normalized().Out[0], want, &h, false, false)
			if copied == nil || !bytes.Equal(copied, got.copies[0]) {
				t.Fatalf("round %d: frame %x (%v):\n got  %x\n twin %x", round, frame, reason, got.copies[0], copied)
			}
			w.last = append(w.last, copied)
			w.last = w.last[max(0, len(w.last)-4):]
		}
		found += compareLoops(t, l, twin, at)
	}
	t.Logf("%d cut, %d marked, %d noted, %d ways found", cut, marked, echo, found)
	if cut < 100 || marked < 30 || found < 20 || echo < 20 {
		t.Errorf("%d cut, %d marked, %d noted, %d ways found, which proves little", cut, marked, echo, found)
	}
}

// echoes is how many packets of a rule were noted as echoes, on all CPUs.
func echoes(t *testing.T, l *Loader, id uint32) (n uint64) {
	t.Helper()
	key := bpf.RelayDropKey{Id: id, Scope: uint16(bpf.RelayDropScopeDROP_NOTE), Reason: uint16(bpf.RelayNoteNOTE_ECHO)}
	var cpus []bpf.RelayCounter
	if err := l.maps.RuleDrops.Lookup(&key, &cpus); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		t.Fatal(err)
	}
	return sum(cpus).Packets
}

// lastSeen is the time of a rule's last packet on any CPU.
func lastSeen(t *testing.T, l *Loader, rule uint32) (at int64) {
	t.Helper()
	var cpus []bpf.RelayRuleStats
	if err := l.maps.RuleStats.Lookup(rule, &cpus); err != nil {
		t.Fatal(err)
	}
	for _, s := range cpus {
		at = max(at, int64(s.LastSeenNs))
	}
	return at
}

// compareLoops compares the paths in the kernel with those of the twin.
func compareLoops(t *testing.T, l *Loader, twin *packet.Guard, at int64) (n int) {
	t.Helper()
	kernel, err := l.Loops()
	if err != nil {
		t.Fatal(err)
	}
	type way struct {
		rule    string
		mac     [6]byte
		source  netip.Addr
		index   int
		from    string
		packets uint64
	}
	names := map[uint32]string{}
	for name, e := range l.rules {
		names[e.id] = name
	}
	got, want := map[way]bool{}, map[way]bool{}
	for _, rule := range kernel {
		if !rule.Looping {
			t.Errorf("rule %s is not looping", rule.Rule)
		}
		for _, w := range rule.Ways {
			got[way{rule.Rule, w.MAC, w.Source, w.Index, w.From, w.Packets}] = true
		}
	}
	for _, rule := range twin.Loops(at) {
		for _, w := range rule.Ways {
			if w.Last != 0 {
				want[way{names[rule.Rule], w.MAC, w.Source, w.Index, names[w.From], w.Packets}] = true
			}
		}
	}
	if fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("ways\n got  %v\n twin %v", got, want)
	}
	return len(want)
}

// clearGuard clears the memory of the guard.
func clearGuard(t *testing.T, l *Loader) {
	t.Helper()
	for i := range l.maps.GuardSlots.MaxEntries() {
		if err := l.maps.GuardSlots.Put(i, make([]byte, l.maps.GuardSlots.ValueSize())); err != nil {
			t.Fatal(err)
		}
	}
}
