package loader

import (
	"encoding/binary"
	"net/netip"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"golang.org/x/sys/unix"

	"xdpcast/internal/streamtest"
	"xdpcast/pkg/flow"
	"xdpcast/pkg/packet"
)

// BenchmarkStream compares the cost in the relay program of a packet of a plain rule, one whose
// numbers are watched, the first copy of a number on a merged rule, and a duplicate. The kinds take
// turns, and the minimum of many bursts counts; the cost of generating the numbers is measured
// separately and subtracted.
func BenchmarkStream(b *testing.B) {
	opts := testOptions(b)
	opts.Logger = nil
	opts.programs = embedded{noPacket: true}
	n := newLab(b, 4)
	l := open(b, opts)
	attachAll(b, l, n.in, n.out[0])
	newRunner(b, l, n.relay) // stays on one CPU
	settings := streamtest.MDP3
	settings.Skew, settings.Reset = time.Hour, 4*time.Hour
	out := output(n.out[0], "239.9.9.9", "10.1.0.1", 6000)
	rules := legs(n, "merged", settings, out, legGroups[:2]...)
	rules = append(rules, legs(n, "watched", packet.Stream{Kind: packet.StreamSingle, Watch: packet.StreamField, Width: 4, Little: true}, out, legGroups[2])...)
	rules = append(rules, flow.Flow{Name: "plain", In: input(n.in, legGroups[3], "", 5000), Out: []flow.Output{out}})
	sync1(b, l, rules...)

	shared := raceMaps{
		next:     raceMap(b, &ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: raceSlot, MaxEntries: 2}),
		frames:   raceMap(b, &ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: raceHeaders, MaxEntries: 2}),
		programs: raceMap(b, &ebpf.MapSpec{Type: ebpf.ProgramArray, KeySize: 4, ValueSize: 4, MaxEntries: 1}),
	}
	alone := shared
	alone.programs = raceMap(b, &ebpf.MapSpec{Type: ebpf.ProgramArray, KeySize: 4, ValueSize: 4, MaxEntries: 1})
	nothing, err := ebpf.NewProgram(&ebpf.ProgramSpec{Type: ebpf.XDP, AttachType: ebpf.AttachXDP, Flags: unix.BPF_F_XDP_HAS_FRAGS, License: "GPL",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, xdpRedirect), asm.Return()}})
	if err != nil {
		b.Fatal(err)
	}
	defer nothing.Close()
	for m, p := range map[*ebpf.Map]*ebpf.Program{shared.programs: l.relay, alone.programs: nothing} {
		if err := m.Put(uint32(0), uint32(p.FD())); err != nil {
			b.Fatal(err)
		}
	}
	const burst, bursts, most = 20_000, 50, int64(1) << 40
	drivers := [3]*ebpf.Program{newDriver(b, shared, 0, most), newDriver(b, shared, 1, most), newDriver(b, alone, 0, most)}
	for i, p := range drivers {
		attachDriver(b, p, n.out[1+i])
	}
	set := func(leg uint32, number int64) {
		slot := make([]byte, raceSlot)
		binary.NativeEndian.PutUint64(slot, uint64(number))
		if err := shared.next.Put(leg, slot); err != nil {
			b.Fatal(err)
		}
	}
	kinds := []struct {
		name    string
		driver  int
		group   string
		verdict uint32
		least   time.Duration
	}{
		{"driver", 2, legGroups[3], xdpRedirect, time.Hour},
		{"plain", 0, legGroups[3], xdpRedirect, time.Hour},
		{"watched", 0, legGroups[2], xdpRedirect, time.Hour},
		{"merged", 0, legGroups[0], xdpRedirect, time.Hour},
		{"duplicate", 1, legGroups[1], xdpDrop, time.Hour},
	}
	number := int64(1)
	for b.Loop() {
		for range bursts {
			for i := range kinds {
				k := &kinds[i]
				leg := uint32(k.driver & 1)
				group := netip.MustParseAddr(k.group)
				frame := packet.Frame{DstMAC: packet.MulticastMAC(group), SrcMAC: [6]byte{2, 0, 0, 0, 0, 9}, Src: netip.MustParseAddr("192.0.2.7"), Dst: group, SrcPort: 7, DstPort: 5000, TTL: 9, Payload: make([]byte, 86)}.Build()
				if err := shared.frames.Put(leg, frame[:raceHeaders]); err != nil {
					b.Fatal(err)
				}
				begin := func() {
					set(leg, number)
					set(1-leg, number+burst)
				}
				begin()
				opts := ebpf.RunOptions{Data: frame, Context: xdpContext{DataEnd: uint32(len(frame)), IngressIfindex: uint32(n.in.Index)}, Repeat: burst}
				// After a signal the kernel runs the burst again: numbers that have passed would be
				// duplicates.
				//lint:ignore SA1019 nothing else tells of a signal in the middle of a burst
				opts.Reset = func() {
					if k.name == "merged" {
						next, err := raceNext(shared.next, 0)
						if err != nil {
							b.Error(err)
						}
						number = next
					}
					begin()
				}
				start := time.Now()
				verdict, err := drivers[k.driver].Run(&opts)
				k.least = min(k.least, time.Since(start))
				if err != nil || verdict != k.verdict {
					b.Fatalf("%s: verdict %d, %v", k.name, verdict, err)
				}
			}
			number += burst
		}
	}
	b.ReportMetric(0, "ns/op")
	of := func(i int) float64 { return float64((kinds[i].least - kinds[0].least).Nanoseconds()) / burst }
	for i := 1; i < len(kinds); i++ {
		b.ReportMetric(of(i), kinds[i].name+"-ns/packet")
		b.ReportMetric(of(i)/of(1), kinds[i].name+"/plain")
	}
	for _, name := range []string{"merged%0", "merged%1"} {
		for reason, c := range statsOf(b, l, name).Drops {
			if reason != Duplicate || name == "merged%0" {
				b.Fatalf("%s: %d packets dropped, reason %v", name, c.Packets, reason)
			}
		}
	}
}
