package loader

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"

	"xdpcast/internal/lab"
	"xdpcast/internal/labtest"
	"xdpcast/pkg/flow"
	"xdpcast/pkg/packet"
)

// routedFlow mirrors a multicast route to a number of outputs.
func routedFlow(n *testLab, name string, source netip.Addr, outputs int) *flow.Flow {
	group := netip.MustParseAddr("239.1.1.1")
	f := &flow.Flow{
		Name: name, In: flow.Input{Index: n.in.Index, MAC: mac(n.in), Group: group, Source: source},
		Path: flow.PathKernel, Routed: 1, Unguarded: true,
	}
	for _, out := range n.out[:outputs] {
		f.Out = append(f.Out, flow.Output{
			Ready: true, Index: out.Index, MTU: 1500,
			Rewrite: packet.Rewrite{DstMAC: packet.MulticastMAC(group), SrcMAC: mac(out), Dst: group, PortAdd: true, TTLMode: packet.TTLDecrement},
		})
	}
	return f
}

// TestHeldRoutes: the kernel handles the packets of a routed flow from before it is published until
// it is released, and while it is held, also across a change of it and a new process; other flows
// are not affected. It handles those of all routed flows as soon as the process that mirrors routes
// has ended, and while it hangs.
func TestHeldRoutes(t *testing.T) {
	labtest.RequireRoot(t)
	n := newLab(t, 2)
	opts := testOptions(t)
	l := open(t, opts)
	attachAll(t, l, n.in, n.out[0], n.out[1])
	mirror := func(d time.Duration) {
		t.Helper()
		if err := l.MirrorUntil(d); err != nil {
			t.Fatal(err)
		}
	}
	mirror(time.Hour)
	first, second := netip.MustParseAddr("10.0.0.5"), netip.MustParseAddr("10.0.0.6")
	frame := func(source netip.Addr) []byte {
		group := netip.MustParseAddr("239.1.1.1")
		return packet.Frame{
			SrcMAC: [6]byte{2, 0, 0, 0, 0, 1}, DstMAC: packet.MulticastMAC(group), Src: source, Dst: group,
			SrcPort: 4000, DstPort: 5000, TTL: 16, Payload: make([]byte, 40),
		}.Build()
	}
	sync := func(flows ...*flow.Flow) {
		t.Helper()
		if err := l.Sync(flows); err != nil {
			t.Fatal(err)
		}
	}
	passes := func(when string, held ...string) {
		t.Helper()
		r := newRunner(t, l, n.relay)
		for name, source := range map[string]netip.Addr{"a": first, "b": second} {
			want := uint32(xdpRedirect)
			if slices.Contains(held, name) {
				want = xdpPass
			}
			f := frame(source)
			if got := r.run(t, n.in.Index, f, len(f)).verdict; got != want {
				t.Errorf("%s: a packet of %s has verdict %d, want %d", when, name, got, want)
			}
		}
	}
	wants := func(when string, held ...string) {
		t.Helper()
		if got := l.HeldRouted(); !slices.Equal(got, held) {
			t.Errorf("%s: %v are held, want %v", when, got, held)
		}
		passes(when, held...)
	}
	a, b := routedFlow(n, "a", first, 1), routedFlow(n, "b", second, 2)
	sync(a, b)
	wants("both are new", "a", "b")
	l.ReleaseRouted("a")
	l.ReleaseRouted("b")
	l.ReleaseRouted("c")
	wants("released")
	l.HoldRouted("b")
	l.HoldRouted("c")
	wants("b was held", "b")
	l.ReleaseRouted("b")
	b = routedFlow(n, "b", second, 1)
	sync(a, b)
	wants("b was changed", "b")
	l.HoldRouted("a")
	sync(a, b)
	wants("nothing was changed", "a", "b")
	closeLoader(t, l)
	l = open(t, opts)
	mirror(time.Hour)
	wants("by another process", "a", "b")
	l.ReleaseRouted("a")
	wants("a is released", "b")
	sync(a)
	l.HoldRouted("b") // its outputs are free
	sync(a, b)
	l.ReleaseRouted("b")
	wants("b is there again")

	// Without a process that mirrors the routes no flow is in force, held or not.
	mirror(0)
	passes("the mirror has ended", "a", "b")
	mirror(time.Hour)
	passes("it has begun again")
	mirror(time.Nanosecond)
	time.Sleep(20 * time.Millisecond) // the kernel's clock for this is as coarse as its tick
	passes("the process hangs", "a", "b")
	mirror(time.Hour)
	passes("it goes on")
	closeLoader(t, l)
	l = open(t, opts)
	if got := l.HeldRouted(); len(got) != 0 {
		t.Errorf("%v are held", got)
	}
	passes("the process has died", "a", "b")
	mirror(time.Hour)
	passes("another has taken over")
	// As during xdpcast upgrade --exec: the previous process's socket is closed late.
	late := l.routed.alive
	l.routed.alive = nil
	mirror(time.Hour)
	if err := late.Close(); err != nil {
		t.Fatal(err)
	}
	passes("the previous process has closed its socket")
}

// afresh is a program that writes the first bytes of a frame again, and tail-calls a program: in a
// test run each run sees the frame as the previous one left it, and a routed flow counts down its
// TTL.
func afresh(b *testing.B, p *ebpf.Program, frame []byte) *ebpf.Program {
	b.Helper()
	const hasFrags, words = 1 << 5, 5 // BPF_F_XDP_HAS_FRAGS; Ethernet and IPv4 headers, and the UDP ports
	programs, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.ProgramArray, KeySize: 4, ValueSize: 4, MaxEntries: 1})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { programs.Close() })
	insns := asm.Instructions{
		asm.LoadMem(asm.R2, asm.R1, 0, asm.Word), // data
		asm.LoadMem(asm.R3, asm.R1, 4, asm.Word), // data_end
		asm.Mov.Reg(asm.R4, asm.R2),
		asm.Add.Imm(asm.R4, words*8),
		asm.JGT.Reg(asm.R4, asm.R3, "out"),
	}
	for i := range words {
		insns = append(insns, asm.LoadImm(asm.R5, int64(binary.NativeEndian.Uint64(frame[8*i:])), asm.DWord), asm.StoreMem(asm.R2, int16(8*i), asm.R5, asm.DWord))
	}
	insns = append(insns,
		asm.LoadMapPtr(asm.R2, programs.FD()),
		asm.Mov.Imm(asm.R3, 0),
		asm.FnTailCall.Call(),
		asm.Mov.Imm(asm.R0, 0).WithSymbol("out"),
		asm.Return(),
	)
	again, err := ebpf.NewProgram(&ebpf.ProgramSpec{Name: "afresh", Type: ebpf.XDP, AttachType: ebpf.AttachXDP, Flags: hasFrags, License: "GPL", Instructions: insns})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { again.Close() })
	if err := programs.Put(uint32(0), p); err != nil {
		b.Fatal(err)
	}
	return again
}

// BenchmarkRouted alternates packets of a routed flow with those of a rule, each with a frame that
// is written anew, in the relay program and, with several outputs, in the egress program. It
// reports as BenchmarkRelay does.
func BenchmarkRouted(b *testing.B) {
	for _, outputs := range []int{1, 4} {
		b.Run(fmt.Sprintf("outputs=%d", outputs), func(b *testing.B) {
			n := newLab(b, outputs+1)
			opts := testOptions(b)
			opts.Logger = nil
			l := open(b, opts)
			attachAll(b, l, n.in)
			attachAll(b, l, n.out[:outputs]...)
			r := newRunner(b, l, n.relay) // stays on one CPU
			if err := l.MirrorUntil(time.Hour); err != nil {
				b.Fatal(err)
			}
			route := routedFlow(n, "route", netip.MustParseAddr("10.0.0.5"), outputs)
			rule := flow.Flow{Name: "rule", In: input(n.in, "239.1.1.2", "", 5000), Unguarded: true}
			for _, out := range n.out[:outputs] {
				rule.Out = append(rule.Out, output(out, "239.1.1.2", "10.1.0.1", 5000))
			}
			sync1(b, l, rule, *route)
			l.ReleaseRouted("route")
			names := []string{"rule", "route"}
			var programs, copies [2]*ebpf.Program
			var frames, handed [2][]byte
			for i, group := range []string{"239.1.1.2", "239.1.1.1"} {
				frames[i] = packet.Frame{
					SrcMAC: [6]byte{2, 0, 0, 0, 0, 1}, DstMAC: packet.MulticastMAC(netip.MustParseAddr(group)), Src: netip.MustParseAddr("10.0.0.5"), Dst: netip.MustParseAddr(group),
					SrcPort: 4000, DstPort: 5000, TTL: 16, Payload: make([]byte, 86),
				}.Build()
				programs[i] = afresh(b, l.relay, frames[i])
				if outputs > 1 {
					_, handed[i] = r.must(b, l.relay, n.in.Index, frames[i], len(frames[i]))
					copies[i] = afresh(b, r.egress, handed[i])
				}
			}
			for i, p := range []*ebpf.Program{programs[0], programs[1], copies[0], copies[1]} {
				if p == nil {
					continue
				}
				// Attached: see BenchmarkRelay.
				on := labtest.Host(b, "bench")
				labtest.Connect(b, lab.End{Host: n.relay, Name: fmt.Sprint("bench", i)}, lab.End{Host: on, Name: "eth0"})
				held, err := link.AttachXDP(link.XDPOptions{Program: p, Interface: iface(b, fmt.Sprint("bench", i)).Index})
				if err != nil {
					b.Fatal(err)
				}
				defer held.Close()
			}
			const burst, bursts = 20_000, 50
			relayed, copied := [2]time.Duration{time.Hour, time.Hour}, [2]time.Duration{time.Hour, time.Hour}
			runs := 0
			for b.Loop() {
				for range bursts {
					for i := range names {
						relayed[i] = min(relayed[i], measure(b, programs[i], n.in.Index, frames[i], burst, xdpRedirect))
						if outputs > 1 {
							copied[i] = min(copied[i], measure(b, copies[i], n.out[0].Index, handed[i], burst, xdpPass))
						}
					}
					runs += burst
				}
			}
			for _, name := range names {
				s := statsOf(b, l, name)
				if s.Matched.Packets < uint64(runs) || s.Outputs[0].Sent.Packets < uint64(runs) || len(s.Drops)+len(s.Notes) != 0 {
					b.Fatalf("%s: %d runs, counters %+v", name, runs, s)
				}
			}
			ns := func(d time.Duration) float64 { return float64(d.Nanoseconds()) / burst }
			b.ReportMetric(0, "ns/op")
			b.ReportMetric(ns(relayed[0]), "rule-ns/packet")
			b.ReportMetric(ns(relayed[1]), "route-ns/packet")
			if outputs > 1 {
				b.ReportMetric(ns(copied[0]), "rule-ns/copy")
				b.ReportMetric(ns(copied[1]), "route-ns/copy")
			}
		})
	}
}
