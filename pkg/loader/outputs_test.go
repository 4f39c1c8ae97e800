package loader

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"

	"xdpcast/internal/labtest"
	"xdpcast/pkg/flow"
	"xdpcast/pkg/packet"
)

// setLink changes an interface of the relay.
func setLink(t testing.TB, i *net.Interface, change func(netlink.Link) error) {
	t.Helper()
	lk, err := netlink.LinkByIndex(i.Index)
	if err == nil {
		err = change(lk)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// Whatever happens to an output's interface, its counters show it, and for every output the matched
// packets equal the sent plus the dropped ones.
func TestOutputsThatCannotSend(t *testing.T) {
	t.Parallel()
	const frames = 20
	for _, c := range []struct {
		name    string
		breaks  func(i *net.Interface)
		payload int
		refused bool   // one output: the device refuses the frame
		one     Reason // one output, otherwise
		several Reason
	}{
		{name: "down", breaks: func(i *net.Interface) { setLink(t, i, netlink.LinkSetDown) }, refused: true, several: NoDevice},
		{name: "gone", breaks: func(i *net.Interface) { setLink(t, i, netlink.LinkDel) }, one: NoDevice, several: NoDevice},
		{name: "smaller mtu, unknown to the rule", breaks: func(i *net.Interface) {
			setLink(t, i, func(lk netlink.Link) error { return netlink.LinkSetMTU(lk, 200) })
		}, payload: 400, refused: true, several: NoDevice},
		{name: "smaller mtu, known", payload: 1450, one: MTU, several: MTU},
	} {
		t.Run(c.name, func(t *testing.T) {
			n := newLab(t, 2)
			l := open(t, testOptions(t))
			attachAll(t, l, append(n.out, n.in)...)
			broken, fine := n.out[0], n.out[1]
			to := func(i *net.Interface, number int) flow.Output {
				o := output(i, fmt.Sprintf("239.2.2.%d", number), "10.1.0.1", 6000)
				if c.breaks == nil && i == broken {
					o.MTU = 1400
				}
				return o
			}
			sync1(t, l,
				flow.Flow{Name: "one", In: input(n.in, "239.1.1.1", "", 5000), Out: []flow.Output{to(broken, 1)}},
				flow.Flow{Name: "several", In: input(n.in, "239.1.1.2", "", 5000), Out: []flow.Output{to(broken, 2), to(fine, 3), to(broken, 4), to(broken, 5)}},
			)
			source, sink := labtest.NewTap(t, n.source, "eth0"), labtest.NewTap(t, n.sinks[1], "eth0")
			if c.breaks != nil {
				c.breaks(broken)
			}
			var size uint64
			for range frames {
				for _, group := range []string{"239.1.1.1", "239.1.1.2"} {
					f := sourceFrame(n, group, 5000, make([]byte, c.payload)).Build()
					size = uint64(len(f))
					source.Send(f)
				}
			}
			sink.Collect(frames, isUDP)
			all := Counter{frames, frames * size}
			one, several := statsOf(t, l, "one"), statsOf(t, l, "several")
			sumRule(t, one)
			sumRule(t, several)
			if one.Matched != all || several.Matched != all {
				t.Errorf("matched %+v and %+v, want %+v", one.Matched, several.Matched, all)
			}
			for slot, o := range several.Outputs {
				switch {
				case slot == 1 && (o.Sent != all || len(o.Drops) != 0):
					t.Errorf("several, output %d: sent %+v, drops %v", slot, o.Sent, o.Drops)
				case slot != 1 && (o.Sent != Counter{} || o.Drops[c.several] != all):
					t.Errorf("several, output %d: sent %+v, drops %v, want %s", slot, o.Sent, o.Drops, c.several)
				}
			}
			if !c.refused {
				if o := one.Outputs[0]; o.Drops[c.one] != all {
					t.Errorf("one: drops %v, want %s", o.Drops, c.one)
				}
				return
			}
			for _, p := range globalStats(t, l).Devices {
				want := uint64(0)
				if p.Index == broken.Index {
					want = frames
				}
				if p.RedirectRefused != want {
					t.Errorf("interface %d refused %d frames, want %d", p.Index, p.RedirectRefused, want)
				}
			}
		})
	}
}

// sumRule checks that for every output each matched packet was either sent or dropped.
func sumRule(t testing.TB, s RuleStats) {
	t.Helper()
	for slot, o := range s.Outputs {
		total := o.Sent
		for _, drops := range []map[Reason]Counter{s.Drops, o.Drops} {
			for _, c := range drops {
				total.add(c.Packets, c.Bytes)
			}
		}
		if total != s.Matched {
			t.Errorf("rule %s, output %d: %+v sent or dropped, %+v matched", s.Name, slot, total, s.Matched)
		}
	}
}

// While packets flow and all arrive, no reading of the counters shows a drop.
func TestStatsUnderTraffic(t *testing.T) {
	t.Parallel()
	n := newLab(t, 2)
	l := open(t, testOptions(t))
	attachAll(t, l, append(n.out, n.in)...)
	sync1(t, l, someRules(n)...)
	s := startStream(t, n, "239.1.1.2", 1, 1)
	for s.sent.Load() < 100*window && !t.Failed() {
		for slot, o := range statsOf(t, l, "two").Outputs {
			if len(o.Drops) != 0 {
				t.Fatalf("output %d has lost %v, while everything arrives", slot, o.Drops)
			}
		}
	}
	s.finish()
	sumRule(t, statsOf(t, l, "two"))
}

// A foreign program on an interface stays, and the error names it.
func TestBusyInterface(t *testing.T) {
	t.Parallel()
	n := newLab(t, 1)
	l := open(t, testOptions(t))
	other, err := ebpf.NewProgram(&ebpf.ProgramSpec{Name: "firewall", Type: ebpf.XDP, License: "GPL", Instructions: asm.Instructions{
		asm.Mov.Imm(asm.R0, xdpPass), asm.Return(),
	}})
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	lk, err := link.AttachXDP(link.XDPOptions{Program: other, Interface: n.in.Index, Flags: link.XDPDriverMode})
	if err != nil {
		t.Fatal(err)
	}
	defer lk.Close()
	for _, mode := range []Mode{ModeNative, ModeGeneric, ModeAuto} {
		_, err := l.Attach(n.in.Index, mode)
		var busy *BusyError
		if !errors.As(err, &busy) || busy.Interface != "in" || !strings.Contains(busy.Program, "firewall") || !strings.Contains(err.Error(), fmt.Sprintf("id %d", programID(t, other))) {
			t.Errorf("mode %s: %v, want a BusyError that names the program", mode, err)
		}
	}
	if got := xdpProgram(t, n.in.Index); got != uint32(programID(t, other)) {
		t.Errorf("program %d is on the interface, want %d", got, programID(t, other))
	}
	if len(l.Attachments()) != 0 {
		t.Errorf("attached %+v", l.Attachments())
	}
	if err := lk.Close(); err != nil {
		t.Fatal(err)
	}
	labtest.Eventually(t, "the other program is gone", func() bool { return xdpProgram(t, n.in.Index) == 0 })
	attachAll(t, l, n.in)
}

func TestAttachToNothing(t *testing.T) {
	t.Parallel()
	newLab(t, 0)
	l := open(t, testOptions(t))
	if _, err := l.Attach(9999, ModeAuto); err == nil || !strings.Contains(err.Error(), "9999") {
		t.Errorf("Attach: %v", err)
	}
	if err := l.Detach(9999); err != nil {
		t.Errorf("Detach: %v", err)
	}
}

// endToEnd sends frames and compares the received ones, byte by byte.
func endToEnd(t *testing.T, n *testLab, out flow.Output, frames ...packet.Frame) {
	t.Helper()
	source, sink := labtest.NewTap(t, n.source, "eth0"), labtest.NewTap(t, n.sinks[0], "eth0")
	var sent [][]byte
	for _, f := range frames {
		sent = append(sent, f.Build())
		source.Send(sent[len(sent)-1])
	}
	for i, got := range sink.Collect(len(sent), isUDP) {
		if want := forwarded(t, sent[i], out.Rewrite); !bytes.Equal(got, want) {
			t.Errorf("frame %d:\n got %x\nwant %x", i, got, want)
		}
		h, _ := packet.Parse(got)
		if ip, udp := packet.Checksums(got, &h); !ip || !udp {
			t.Errorf("frame %d: checksums ip %v udp %v", i, ip, udp)
		}
	}
}

func TestForwardGeneric(t *testing.T) {
	t.Parallel()
	n := newLab(t, 1)
	l := open(t, testOptions(t))
	a, err := l.Attach(n.in.Index, ModeGeneric)
	if err != nil || a.Mode != ModeGeneric || a.Fallback != nil {
		t.Fatalf("attach: %+v, %v", a, err)
	}
	out := output(n.out[0], "239.2.2.2", "10.1.0.1", 6000)
	sync1(t, l, flow.Flow{Name: "one", In: input(n.in, "239.1.1.1", "", 5000), Out: []flow.Output{out}})
	var frames []packet.Frame
	for _, size := range []int{18, 19, 1471, 1472} {
		frames = append(frames, sourceFrame(n, "239.1.1.1", 5000, bytes.Repeat([]byte{7}, size)))
	}
	endToEnd(t, n, out, frames...)
	l = reopen(t, l)
	if got := l.Attachments(); len(got) != 1 || got[0].Mode != ModeGeneric {
		t.Errorf("adopted %+v", got)
	}
	endToEnd(t, n, out, frames...)
}

func TestForwardIPv6(t *testing.T) {
	t.Parallel()
	for _, outputs := range []int{1, 2} {
		t.Run(fmt.Sprintf("%d outputs", outputs), func(t *testing.T) {
			n := newLab(t, 1)
			l := open(t, testOptions(t))
			attachAll(t, l, append(n.out, n.in)...)
			out := output(n.out[0], "ff3e::2:2", "fd00::1", 6000)
			out.TTLMode, out.SetDSCP, out.DSCP = packet.TTLDecrement, true, 46
			rule := flow.Flow{Name: "six", In: input(n.in, "ff3e::1", "", 5000), Out: []flow.Output{out}}
			for len(rule.Out) < outputs {
				waiting := out
				waiting.Ready = false
				rule.Out = append(rule.Out, waiting)
			}
			sync1(t, l, rule)
			var frames []packet.Frame
			for _, size := range []int{0, 1, 700, 1451, 1452} {
				f := sourceFrame(n, "239.1.1.1", 5000, bytes.Repeat([]byte{7}, size))
				f.Dst, f.Src = netip.MustParseAddr("ff3e::1"), netip.MustParseAddr("2001:db8::7")
				f.DstMAC = packet.MulticastMAC(f.Dst)
				frames = append(frames, f)
			}
			endToEnd(t, n, out, frames...)
			sumRule(t, statsOf(t, l, "six"))
		})
	}
}

// 1472 bytes of payload fill an MTU of 1500; one more is dropped and counted for the only output
// for which it is too long.
func TestForwardAtTheMTU(t *testing.T) {
	t.Parallel()
	n := newLab(t, 2)
	lk, err := n.source.Link("eth0")
	if err == nil {
		err = n.source.Netlink().LinkSetMTU(lk, 1600)
	}
	if err != nil {
		t.Fatal(err)
	}
	setLink(t, n.in, func(lk netlink.Link) error { return netlink.LinkSetMTU(lk, 1600) })
	l := open(t, testOptions(t))
	attachAll(t, l, append(n.out, n.in)...)
	out := output(n.out[0], "239.2.2.2", "10.1.0.1", 6000)
	smaller := output(n.out[1], "239.2.2.3", "10.1.1.1", 6000)
	smaller.MTU = 1499
	sync1(t, l,
		flow.Flow{Name: "one", In: input(n.in, "239.1.1.1", "", 5000), Out: []flow.Output{out}},
		flow.Flow{Name: "two", In: input(n.in, "239.1.1.2", "", 5000), Out: []flow.Output{out, smaller}})
	frames := func(group string) (all []packet.Frame) {
		for _, size := range []int{1473, 1471, 1473, 1472} {
			all = append(all, sourceFrame(n, group, 5000, bytes.Repeat([]byte{9}, size)))
		}
		return all
	}
	for _, group := range []string{"239.1.1.1", "239.1.1.2"} {
		source := labtest.NewTap(t, n.source, "eth0")
		all := frames(group)
		source.Send(all[0].Build())
		endToEnd(t, n, out, all[1])
		source.Send(all[2].Build())
		endToEnd(t, n, out, all[3])
	}
	tooLong := Counter{2, 2 * (14 + 28 + 1473)}
	for _, name := range []string{"one", "two"} {
		s := statsOf(t, l, name)
		sumRule(t, s)
		if got := s.Outputs[0].Drops; got[MTU] != tooLong || len(got) != 1 {
			t.Errorf("rule %s, output 0: drops %v, want mtu %+v", name, got, tooLong)
		}
	}
	s := statsOf(t, l, "two").Outputs[1]
	if s.Sent.Packets != 1 || s.Drops[MTU].Packets != 3 {
		t.Errorf("output of mtu 1499: sent %+v, drops %v", s.Sent, s.Drops)
	}
}

// TestTransmitDropsOfOthers: only the loader that sent frames counts those that a device did not
// take, although a device of another network namespace has the same index and the tracepoint
// reports both.
func TestTransmitDropsOfOthers(t *testing.T) {
	t.Parallel()
	const frames = 5
	drops := func(l *Loader, index int) (n uint64) {
		for _, p := range globalStats(t, l).Devices {
			if p.Index == index {
				n += p.TransmitDrops
			}
		}
		return n
	}
	start := func() (*testLab, *Loader) {
		n := newLab(t, 1)
		l := open(t, testOptions(t))
		attachAll(t, l, n.in, n.out[0])
		sync1(t, l, flow.Flow{Name: "one", In: input(n.in, "239.1.1.1", "", 5000), Out: []flow.Output{output(n.out[0], "239.2.2.2", "10.1.0.1", 6000)}})
		return n, l
	}
	other, idle := start()
	n, l := start()
	if other.out[0].Index != n.out[0].Index {
		t.Fatalf("the outputs have the indexes %d and %d: the test needs them to be the same", other.out[0].Index, n.out[0].Index)
	}
	labtest.Do(t, n.sinks[0], func() error { // the sender does not know its peer's limit
		link, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		return netlink.LinkSetMTU(link, 1000)
	})
	source := labtest.NewTap(t, n.source, "eth0")
	for range frames {
		source.Send(sourceFrame(n, "239.1.1.1", 5000, make([]byte, 1200)).Build())
	}
	labtest.Eventually(t, "the sender's loader counts them", func() bool { return drops(l, n.out[0].Index) == frames })
	if got := drops(idle, n.out[0].Index); got != 0 {
		t.Errorf("another loader counts %d", got)
	}
}
