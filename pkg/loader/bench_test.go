package loader

import (
	"fmt"
	"net/netip"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"

	"xdpcast/pkg/flow"
)

// bareRedirect is the minimum that a relay can do: send every frame to one interface.
func bareRedirect(b *testing.B, devices *ebpf.Map) *ebpf.Program {
	b.Helper()
	const hasFrags = 1 << 5 // BPF_F_XDP_HAS_FRAGS: programs that share a devmap must agree
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{Name: "bare", Type: ebpf.XDP, Flags: hasFrags, License: "GPL", Instructions: asm.Instructions{
		asm.LoadMapPtr(asm.R1, devices.FD()),
		asm.Mov.Imm(asm.R2, 0),
		asm.Mov.Imm(asm.R3, xdpDrop),
		asm.FnRedirectMap.Call(),
		asm.Return(),
	}})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { p.Close() })
	return p
}

// BenchmarkRelay alternates runs of the relay program for a matching packet with runs of a bare
// redirect, so that both see the same machine. It reports the minimum ns per run over many short
// bursts, since other load only adds to it, and their difference and ratio.
func BenchmarkRelay(b *testing.B) {
	for _, c := range []struct {
		rules, outputs, flows int
	}{{1, 1, 1}, {100, 1, 1}, {10_000, 1, 1}, {100_000, 1, 1}, {1, 4, 1}, {100_000, 1, 4096}} {
		b.Run(fmt.Sprintf("rules=%d/outputs=%d/flows=%d", c.rules, c.outputs, c.flows), func(b *testing.B) {
			n := newLab(b, 2)
			opts := testOptions(b)
			opts.Logger, opts.MaxRules, opts.MaxOutputs = nil, 131072, 262144
			opts.programs = embedded{noPacket: true}
			l := open(b, opts)
			attachAll(b, l, n.in, n.out[0])
			newRunner(b, l, n.relay) // stays on one CPU
			rules := make([]flow.Flow, c.rules)
			groupOf := func(i int) string {
				return netip.AddrFrom4([4]byte{239, 1 + byte(i>>16), byte(i >> 8), byte(i)}).String()
			}
			for i := range rules {
				rules[i] = flow.Flow{Name: fmt.Sprint("rule", i), In: input(n.in, groupOf(i), "", 5000)}
				to := groupOf(nextFlow(i, c.rules, c.flows))
				for range c.outputs {
					rules[i].Out = append(rules[i].Out, output(n.out[0], to, "10.1.0.1", 5000))
				}
			}
			sync1(b, l, rules...)
			frame := sourceFrame(n, "239.1.0.0", 5000, make([]byte, 86)).Build()
			bare := bareRedirect(b, l.maps.Devices)
			// Attached, as the relay program is: a test run of an unattached program waits until
			// the kernel's dispatcher is updated.
			held, err := link.AttachXDP(link.XDPOptions{Program: bare, Interface: n.out[1].Index})
			if err != nil {
				b.Fatal(err)
			}
			defer held.Close()
			const burst, bursts = 20_000, 50
			relayed, redirected := time.Hour, time.Hour
			runs := 0
			for b.Loop() {
				for range bursts {
					relayed = min(relayed, measure(b, l.relay, n.in.Index, frame, burst, xdpRedirect))
					if c.outputs == 1 {
						redirected = min(redirected, measure(b, bare, n.in.Index, frame, burst, xdpRedirect))
					}
					runs += burst
				}
			}
			s := statsOf(b, l, "rule0")
			if s.Matched.Packets < uint64(runs/c.flows) || len(s.Drops) != 0 {
				b.Fatalf("%d runs, counters %+v", runs, s)
			}
			b.ReportMetric(0, "ns/op")
			b.ReportMetric(float64(relayed.Nanoseconds())/burst, "relay-ns/packet")
			if c.outputs == 1 {
				b.ReportMetric(float64(redirected.Nanoseconds())/burst, "redirect-ns/packet")
				b.ReportMetric(float64((relayed-redirected).Nanoseconds())/burst, "more-ns/packet")
				b.ReportMetric(float64(relayed)/float64(redirected), "relay/redirect")
			}
		})
	}
}

// freshContent is a program that gives the frame a new payload, and tail-calls the relay program.
func freshContent(b *testing.B, relay *ebpf.Program) *ebpf.Program {
	b.Helper()
	programs, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.ProgramArray, KeySize: 4, ValueSize: 4, MaxEntries: 1})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { programs.Close() })
	const hasFrags, payload = 1 << 5, 14 + 20 + 8
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{Name: "fresh", Type: ebpf.XDP, AttachType: ebpf.AttachXDP, Flags: hasFrags, License: "GPL", Instructions: asm.Instructions{
		asm.LoadMem(asm.R2, asm.R1, 0, asm.Word), // data
		asm.LoadMem(asm.R3, asm.R1, 4, asm.Word), // data_end
		asm.Mov.Reg(asm.R4, asm.R2),
		asm.Add.Imm(asm.R4, payload+4),
		asm.JGT.Reg(asm.R4, asm.R3, "out"),
		asm.LoadMem(asm.R5, asm.R2, payload, asm.Word),
		asm.Add.Imm(asm.R5, 1),
		asm.StoreMem(asm.R2, payload, asm.R5, asm.Word),
		asm.LoadMapPtr(asm.R2, programs.FD()),
		asm.Mov.Imm(asm.R3, 0),
		asm.FnTailCall.Call(),
		asm.Mov.Imm(asm.R0, 0).WithSymbol("out"),
		asm.Return(),
	}})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { p.Close() })
	if err := programs.Put(uint32(0), relay); err != nil {
		b.Fatal(err)
	}
	return p
}

// BenchmarkGuard measures the cost of a packet that the loop guard checks, alternating with one of
// a rule that it ignores: with a payload never seen before, as most are, and with the payload of
// the previous packet, as null packets and keepalives have. It reports as BenchmarkRelay does.
func BenchmarkGuard(b *testing.B) {
	for _, c := range []struct {
		name  string
		fresh bool
	}{{"payload=fresh", true}, {"payload=repeated", false}} {
		b.Run(c.name, func(b *testing.B) {
			n := newLab(b, 2)
			opts := testOptions(b)
			opts.Logger = nil
			opts.programs = embedded{everyPacket: true}
			l := open(b, opts)
			attachAll(b, l, n.in, n.out[0])
			newRunner(b, l, n.relay) // stays on one CPU
			rules := make([]flow.Flow, 2)
			var frames [2][]byte
			for i := range rules {
				group := fmt.Sprintf("239.1.0.%d", i)
				rules[i] = flow.Flow{Name: fmt.Sprint("rule", i), In: input(n.in, group, "", 5000), Out: []flow.Output{output(n.out[0], group, "10.1.0.1", 5000)}}
				rules[i].Unguarded, rules[i].TwoWay = i == 0, i == 1 && c.fresh
				// As the programs leave it, so that all packets have one sender.
				f := sourceFrame(n, group, 5000, make([]byte, 86))
				f.SrcMAC, f.Src, f.NoChecksum = mac(n.out[0]), netip.MustParseAddr("10.1.0.1"), true
				frames[i] = f.Build()
			}
			sync1(b, l, rules...)
			program := l.relay
			if c.fresh {
				program = freshContent(b, l.relay)
				held, err := link.AttachXDP(link.XDPOptions{Program: program, Interface: n.out[1].Index})
				if err != nil {
					b.Fatal(err)
				}
				defer held.Close()
			}
			const burst, bursts = 20_000, 50
			took := [2]time.Duration{time.Hour, time.Hour}
			runs := 0
			for b.Loop() {
				for range bursts {
					for i, frame := range frames {
						took[i] = min(took[i], measure(b, program, n.in.Index, frame, burst, xdpRedirect))
					}
					runs += burst
				}
			}
			for i := range rules {
				if s := statsOf(b, l, rules[i].Name); s.Outputs[0].Sent.Packets < uint64(runs) || len(s.Drops)+len(s.Notes) != 0 {
					b.Fatalf("%d runs, counters %+v", runs, s)
				}
			}
			b.ReportMetric(0, "ns/op")
			b.ReportMetric(float64(took[0].Nanoseconds())/burst, "plain-ns/packet")
			b.ReportMetric(float64(took[1].Nanoseconds())/burst, "looked-at-ns/packet")
			b.ReportMetric(float64((took[1]-took[0]).Nanoseconds())/burst, "more-ns/packet")
			b.ReportMetric(float64(took[1])/float64(took[0]), "looked-at/plain")
		})
	}
}

// nextFlow is the rule that takes the packet that rule i sent: itself if one flow feeds itself,
// otherwise the next of a cycle through flows rules, spread over all in an order that no prefetcher
// predicts (a full period of a linear congruential generator).
func nextFlow(i, rules, flows int) int {
	if flows == 1 {
		return i
	}
	apart := rules / flows
	return (i/apart*5 + 3) % flows * apart
}

// measure runs a program many times on one frame. Each run sees the frame as the previous one left
// it, so the rules send to a group that one of them matches.
func measure(b testing.TB, p *ebpf.Program, index int, frame []byte, repeat, want uint32) time.Duration {
	b.Helper()
	opts := ebpf.RunOptions{Data: frame, Context: xdpContext{DataEnd: uint32(len(frame)), IngressIfindex: uint32(index)}, Repeat: repeat}
	start := time.Now()
	verdict, err := p.Run(&opts)
	if err != nil || verdict != want {
		b.Fatalf("verdict %d, %v", verdict, err)
	}
	return time.Since(start)
}

// BenchmarkEgress measures one run of the egress program for a copy. The output's MACs are a
// handover, so that each run leaves the next copy.
func BenchmarkEgress(b *testing.B) {
	for _, outputs := range []int{2, 64} {
		b.Run(fmt.Sprintf("outputs=%d", outputs), func(b *testing.B) {
			n := newLab(b, 1)
			opts := testOptions(b)
			opts.Logger = nil
			l := open(b, opts)
			attachAll(b, l, n.in, n.out[0])
			r := newRunner(b, l, n.relay)
			frame := sourceFrame(n, "239.1.0.0", 5000, make([]byte, 86)).Build()
			rule := flow.Flow{Name: "rule", In: input(n.in, "239.1.0.0", "", 5000)}
			for range outputs {
				rule.Out = append(rule.Out, output(n.out[0], "239.1.0.0", "10.1.0.1", 5000))
			}
			for i := range rule.Out[1:] { // elsewhere
				rule.Out[1+i].Ready = false
			}
			sync1(b, l, rule)
			_, handed := r.must(b, l.relay, n.in.Index, frame, len(frame))
			copy(rule.Out[0].DstMAC[:], handed)
			copy(rule.Out[0].SrcMAC[:], handed[6:])
			e := l.rules["rule"]
			first := encodeOutput(rule.Out[0], e.firstStats, 0)
			if err := l.maps.Outputs.Put(e.first, &first); err != nil {
				b.Fatal(err)
			}
			const repeat = 1_000_000
			var took time.Duration
			runs := 0
			for b.Loop() {
				took += measure(b, r.egress, n.out[0].Index, handed, repeat, xdpPass)
				runs += repeat
			}
			if s := statsOf(b, l, "rule"); s.Outputs[0].Sent.Packets < uint64(runs) {
				b.Fatalf("%d runs, counters %+v", runs, s)
			}
			b.ReportMetric(0, "ns/op")
			b.ReportMetric(float64(took.Nanoseconds())/float64(runs), "egress-ns/copy")
		})
	}
}
