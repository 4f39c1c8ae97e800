package loader

import (
	"fmt"
	"net/netip"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
)

// bareRedirect is the least that a relay can do: every frame to one interface.
func bareRedirect(b *testing.B, ports *ebpf.Map) *ebpf.Program {
	b.Helper()
	const hasFrags = 1 << 5 // BPF_F_XDP_HAS_FRAGS: programs that share a devmap must agree
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{Name: "bare", Type: ebpf.XDP, Flags: hasFrags, License: "GPL", Instructions: asm.Instructions{
		asm.LoadMapPtr(asm.R1, ports.FD()),
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

// BenchmarkRelay measures one run of the relay program for a packet that matches, and
// of a bare redirect, in turns, so that both meet the same machine. It reports
// nanoseconds a run of each and their ratio.
func BenchmarkRelay(b *testing.B) {
	for _, c := range []struct {
		rules, outputs int
	}{{1, 1}, {100, 1}, {10_000, 1}, {100_000, 1}, {1, 4}} {
		b.Run(fmt.Sprintf("rules=%d/outputs=%d", c.rules, c.outputs), func(b *testing.B) {
			n := newLab(b, 1)
			opts := testOptions(b)
			opts.Logger, opts.MaxRules, opts.MaxOutputs = nil, 131072, 262144
			l := open(b, opts)
			attachAll(b, l, n.in, n.out[0])
			r := newRunner(b, l, n.relay)
			rules := make([]Rule, c.rules)
			for i := range rules {
				group := netip.AddrFrom4([4]byte{239, 1 + byte(i>>16), byte(i >> 8), byte(i)}).String()
				rules[i] = Rule{Name: fmt.Sprint("rule", i), In: input(n.in, group, "", 5000)}
				for range c.outputs {
					rules[i].Out = append(rules[i].Out, output(n.out[0], group, "10.1.0.1", 5000))
				}
			}
			sync1(b, l, rules...)
			frame := sourceFrame(n, "239.1.0.0", 5000, make([]byte, 86)).Build()
			bare := bareRedirect(b, l.maps.Ports)
			const repeat = 1_000_000
			var relayed, redirected time.Duration
			runs := 0
			for b.Loop() {
				relayed += measure(b, r, l.relay, n.in.Index, frame, repeat)
				if c.outputs == 1 {
					redirected += measure(b, r, bare, n.in.Index, frame, repeat)
				}
				runs += repeat
			}
			s := statsOf(b, l, "rule0")
			if s.Matched.Packets < uint64(runs) || len(s.Drops) != 0 {
				b.Fatalf("%d runs, counters %+v", runs, s)
			}
			b.ReportMetric(0, "ns/op")
			b.ReportMetric(float64(relayed.Nanoseconds())/float64(runs), "relay-ns/packet")
			if c.outputs == 1 {
				b.ReportMetric(float64(redirected.Nanoseconds())/float64(runs), "redirect-ns/packet")
				b.ReportMetric(float64(relayed)/float64(redirected), "relay/redirect")
			}
		})
	}
}

// measure runs a program many times on one frame. The program meets the frame as it
// has left it, so the rules send to the group that they match.
func measure(b *testing.B, r *runner, p *ebpf.Program, index int, frame []byte, repeat uint32) time.Duration {
	b.Helper()
	opts := ebpf.RunOptions{Data: frame, Context: xdpContext{DataEnd: uint32(len(frame)), IngressIfindex: uint32(index)}, Repeat: repeat}
	start := time.Now()
	verdict, err := p.Run(&opts)
	if err != nil || verdict != xdpRedirect {
		b.Fatalf("verdict %d, %v", verdict, err)
	}
	return time.Since(start)
}
