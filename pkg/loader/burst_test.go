package loader

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"

	"xdpcast/internal/lab"
	"xdpcast/internal/labtest"
	"xdpcast/pkg/flow"
	"xdpcast/pkg/packet"
)

// burst sends frames so that a device's receiver finds many of them at once: from a small XDP
// program, which BPF_PROG_RUN runs on a batch of live frames. Single writes to a packet socket
// would be received one by one.
type burst struct {
	host    *lab.Host
	program *ebpf.Program
	state   *ebpf.Map
	size    int // bytes of a frame, at least burstLen
}

const (
	burstLen     = 64 // bytes of a frame
	burstSize    = 64 // frames of a batch, and what a receiver takes at once
	burstPattern = 16 // destination ports, taken in turn
	burstNumber  = 44 // offset of a frame's number
	liveFrames   = 1 << 1
)

// burstState is what the program writes, and its progress.
type burstState struct {
	Next  uint64
	Frame [burstLen]byte
	Ports [burstPattern]uint16 // network order
}

func newBurst(t testing.TB, host *lab.Host, ifname string, frame []byte, ports [burstPattern]uint16) *burst {
	t.Helper()
	b := &burst{host: host, size: burstLen}
	labtest.Do(t, host, func() (err error) {
		out, err := net.InterfaceByName(ifname)
		if err != nil {
			return err
		}
		b.state, err = ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: uint32(binary.Size(burstState{})), MaxEntries: 1})
		if err != nil {
			return err
		}
		t.Cleanup(func() { b.state.Close() })
		state := burstState{Frame: [burstLen]byte(frame)}
		for i, port := range ports {
			state.Ports[i] = binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, port))
		}
		if err := b.state.Put(uint32(0), &state); err != nil {
			return err
		}
		b.program, err = ebpf.NewProgram(&ebpf.ProgramSpec{Name: "burst", Type: ebpf.XDP, License: "GPL", Instructions: burstProgram(b.state.FD(), out.Index)})
		return err
	})
	t.Cleanup(func() { b.program.Close() })
	return b
}

// burstProgram writes the whole frame each time, since buffers come back as others left them, with
// the next port and number in it.
func burstProgram(state, ifindex int) asm.Instructions {
	const frameAt, portsAt = 8, 8 + burstLen
	code := asm.Instructions{
		asm.LoadMem(asm.R7, asm.R1, 0, asm.Word), // data
		asm.LoadMem(asm.R3, asm.R1, 4, asm.Word), // data_end
		asm.Mov.Reg(asm.R4, asm.R7),
		asm.Add.Imm(asm.R4, burstLen),
		asm.JGT.Reg(asm.R4, asm.R3, "drop"),
		asm.StoreImm(asm.R10, -4, 0, asm.Word),
		asm.Mov.Reg(asm.R2, asm.R10),
		asm.Add.Imm(asm.R2, -4),
		asm.LoadMapPtr(asm.R1, state),
		asm.FnMapLookupElem.Call(),
		asm.JEq.Imm(asm.R0, 0, "drop"),
		asm.Mov.Reg(asm.R8, asm.R0),
		asm.LoadMem(asm.R9, asm.R8, 0, asm.DWord),
	}
	for i := int16(0); i < burstLen; i += 8 {
		code = append(code, asm.LoadMem(asm.R1, asm.R8, frameAt+i, asm.DWord), asm.StoreMem(asm.R7, i, asm.R1, asm.DWord))
	}
	return append(code,
		asm.StoreMem(asm.R7, burstNumber, asm.R9, asm.Word),
		asm.Mov.Reg(asm.R1, asm.R9),
		asm.And.Imm(asm.R1, burstPattern-1),
		asm.LSh.Imm(asm.R1, 1),
		asm.Mov.Reg(asm.R2, asm.R8),
		asm.Add.Reg(asm.R2, asm.R1),
		asm.LoadMem(asm.R3, asm.R2, portsAt, asm.Half),
		asm.StoreMem(asm.R7, atUDP+2, asm.R3, asm.Half),
		asm.Add.Imm(asm.R9, 1),
		asm.StoreMem(asm.R8, 0, asm.R9, asm.DWord),
		asm.Mov.Imm(asm.R1, int32(ifindex)),
		asm.Mov.Imm(asm.R2, 0),
		asm.FnRedirect.Call(),
		asm.Return(),
		asm.Mov.Imm(asm.R0, xdpDrop).WithSymbol("drop"),
		asm.Return(),
	)
}

// send sends one batch.
func (b *burst) send(t testing.TB) {
	t.Helper()
	labtest.Do(t, b.host, func() error {
		_, err := b.program.Run(&ebpf.RunOptions{Data: make([]byte, b.size), Repeat: burstSize, BatchSize: burstSize, Flags: liveFrames})
		return err
	})
}

// Frames of rules with one output and with several, for the same devices, come in one burst. The
// kernel collects frames for a device and runs one program on all of them, so this is where a copy
// could leave as another output's, or as no output's.
func TestForwardMixedBursts(t *testing.T) {
	t.Parallel()
	n := newLab(t, 2)
	l := open(t, testOptions(t))
	attachAll(t, l, append(n.out, n.in)...)
	to := func(sink, number int) flow.Output {
		return output(n.out[sink], fmt.Sprintf("239.2.%d.%d", sink, number), "10.1.0.1", uint16(6000+number))
	}
	rules := []flow.Flow{
		{Name: "one to 0", Out: []flow.Output{to(0, 1)}},
		{Name: "twice to 0, once to 1", Out: []flow.Output{to(0, 2), to(1, 2), to(0, 3)}},
		{Name: "one to 1", Out: []flow.Output{to(1, 4)}},
		{Name: "one each", Out: []flow.Output{to(1, 5), to(0, 5)}},
		{Name: "thrice to 1", Out: []flow.Output{to(1, 6), to(1, 7), to(1, 8)}},
		{Name: "one to 0 as well", Out: []flow.Output{to(0, 9)}},
	}
	byPort := map[uint16]*flow.Flow{}
	for i := range rules {
		rules[i].In = input(n.in, "239.1.1.1", "", uint16(5000+i))
		byPort[rules[i].In.Port] = &rules[i]
	}
	// Both orders matter: the first frame for a device decides the program.
	var ports [burstPattern]uint16
	for i, rule := range []int{0, 1, 0, 1, 2, 4, 2, 3, 5, 0, 3, 3, 4, 2, 1, 5} {
		ports[i] = uint16(5000 + rule)
	}
	frame := sourceFrame(n, "239.1.1.1", 5000, make([]byte, burstLen-atUDP-8))
	frame.NoChecksum = true
	whole := frame.Build()
	b := newBurst(t, n.source, "eth0", whole, ports)
	taps := []*labtest.Tap{labtest.NewTap(t, n.sinks[0], "eth0"), labtest.NewTap(t, n.sinks[1], "eth0")}

	// The order of the steps makes interfaces change from one use to the other and back.
	steps := [][]flow.Flow{{rules[0], rules[2], rules[5]}, rules, {rules[1], rules[3]}, rules, rules[:1], rules}
	number := 0
	for step, set := range steps {
		sync1(t, l, set...)
		for range 20 {
			b.send(t)
			want := []map[netip.AddrPort][][]byte{{}, {}}
			copies := []int{0, 0}
			for range burstSize {
				sent := bytes.Clone(whole)
				binary.NativeEndian.PutUint32(sent[burstNumber:], uint32(number))
				put16(sent, atUDP+2, ports[number%burstPattern])
				number++
				for _, o := range wanted(set, byPort[binary.BigEndian.Uint16(sent[atUDP+2:])]) {
					sink := 0
					if o.Index == n.out[1].Index {
						sink = 1
					}
					at := netip.AddrPortFrom(o.Dst, o.DstPort)
					want[sink][at] = append(want[sink][at], forwarded(t, sent, o.Rewrite))
					copies[sink]++
				}
			}
			for sink, tap := range taps {
				got := map[netip.AddrPort][][]byte{}
				for _, f := range tap.Collect(copies[sink], isUDP) {
					h, _ := packet.Parse(f)
					at := netip.AddrPortFrom(h.Dst, h.DstPort)
					got[at] = append(got[at], f)
				}
				for at, frames := range want[sink] {
					if len(got[at]) != len(frames) {
						t.Fatalf("step %d, sink %d: %d copies to %v, want %d", step, sink, len(got[at]), at, len(frames))
					}
					for i := range frames {
						if !bytes.Equal(got[at][i], frames[i]) {
							t.Fatalf("step %d, sink %d, copy %d to %v:\n got %x\nwant %x", step, sink, i, at, got[at][i], frames[i])
						}
					}
				}
			}
		}
	}
	for _, rule := range rules {
		s := statsOf(t, l, rule.Name)
		if s.Matched.Packets == 0 || len(s.Drops) != 0 {
			t.Errorf("rule %s: matched %+v, drops %v", rule.Name, s.Matched, s.Drops)
		}
		for slot, o := range s.Outputs {
			if o.Sent != s.Matched || len(o.Drops) != 0 {
				t.Errorf("rule %s, output %d: %+v of %+v sent, drops %v", rule.Name, slot, o.Sent, s.Matched, o.Drops)
			}
		}
	}
	if drops := globalStats(t, l).Drops; len(drops) != 0 {
		t.Errorf("drops %v", drops)
	}
}

// wanted returns the outputs of a rule if it is in the set.
func wanted(set []flow.Flow, rule *flow.Flow) []flow.Output {
	for i := range set {
		if set[i].Name == rule.Name {
			return rule.Out
		}
	}
	return nil
}

// TestBulkIsLost: a frame longer than the MTU of a veth's peer drops the rest of its bulk, also
// frames of another rule. Setting that MTU as the output's own prevents it.
func TestBulkIsLost(t *testing.T) {
	t.Parallel()
	const bursts, peerMTU = 20, 68
	n := newLab(t, 1)
	l := open(t, testOptions(t))
	attachAll(t, l, n.in, n.out[0])
	lk, err := n.sinks[0].Link("eth0")
	if err == nil {
		err = n.sinks[0].Netlink().LinkSetMTU(lk, peerMTU)
	}
	if err != nil {
		t.Fatal(err)
	}
	frame := sourceFrame(n, "239.1.1.1", 5000, make([]byte, burstLen-atUDP-8))
	frame.NoChecksum = true
	var ports [burstPattern]uint16 // one in eight is long
	for i := range ports {
		if ports[i] = 5000; i%8 == 3 {
			ports[i] = 5001
		}
	}
	const sentLong, sentShort = bursts * burstSize / 8, bursts * burstSize * 7 / 8
	b := newBurst(t, n.source, "eth0", frame.Build(), ports)
	b.size = peerMTU + 18 - 6 // too long with two more tags
	for _, mtu := range []int32{1500, peerMTU} {
		short, tagged := output(n.out[0], "239.2.2.1", "10.1.0.1", 6000), output(n.out[0], "239.2.2.2", "10.1.0.1", 6000)
		short.MTU, tagged.MTU = mtu, mtu
		tagged.VLAN, tagged.OuterVLAN, tagged.VLANID = packet.VLANSet, 20, 200
		name := fmt.Sprint("mtu ", mtu)
		sync1(t, l,
			flow.Flow{Name: name, In: input(n.in, "239.1.1.1", "", 5000), Out: []flow.Output{short}},
			flow.Flow{Name: name + ", tagged", In: input(n.in, "239.1.1.1", "", 5001), Out: []flow.Output{tagged}})
		before := transmitDrops(t, l, n.out[0])
		for i := range uint64(bursts) {
			b.send(t)
			// At a pace: a veth does not queue more than four bursts.
			labtest.Eventually(t, "all are matched", func() bool {
				return statsOf(t, l, name).Matched.Packets == (i+1)*sentShort/bursts && statsOf(t, l, name+", tagged").Matched.Packets == (i+1)*sentLong/bursts
			})
		}
		unsent := transmitDrops(t, l, n.out[0]) - before
		drops := statsOf(t, l, name+", tagged").Outputs[0].Drops[MTU].Packets
		t.Logf("MTU %d: of %d frames that fit and %d that do not, the device did not take %d; %d dropped for the MTU", mtu, sentShort, sentLong, unsent, drops)
		if mtu == peerMTU {
			if unsent != 0 || drops != sentLong {
				t.Errorf("MTU %d: the device did not take %d frames, %d were dropped for the MTU; want 0 and %d", mtu, unsent, drops, sentLong)
			}
		} else if unsent <= sentLong || drops != 0 {
			t.Errorf("MTU %d: the device did not take %d frames; want more than the %d that are too long, or there is nothing to prevent", mtu, unsent, sentLong)
		}
	}
}
