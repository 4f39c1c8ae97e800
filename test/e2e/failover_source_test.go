package e2e_test

import (
	"errors"
	"math/bits"
	"net"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"xdpcast/internal/lab"
	"xdpcast/internal/labtest"
	"xdpcast/pkg/packet"
)

// Frames of legSource.
const (
	legFrame  = 144 // bytes, a multiple of 8
	legNumber = 54  // offset of the number: 4 bytes, big-endian, behind an RTP header
	legPort   = 36  // of the UDP destination port
)

const (
	xdpDrop = 1
	xdpPass = 2
)

// legEnd is where a source sends one leg.
type legEnd struct {
	host          *lab.Host
	ifname        string
	source, group string
}

// legSource sends numbered packets on two legs, at any rate, from one CPU: by BPF_PROG_RUN with live frames, whose program waits in the kernel
// until a number is due. So the legs of a number leave within a few microseconds.
type legSource struct {
	host    *lab.Host
	devices *ebpf.Map
	frames  *ebpf.Map
	frame   []byte
}

func newLegSource(t *testing.T, legs [2]legEnd) *legSource {
	t.Helper()
	s := &legSource{
		host:    legs[0].host,
		devices: newTestMap(t, ebpf.MapSpec{Type: ebpf.DevMap, KeySize: 4, ValueSize: 4, MaxEntries: 2}),
		frames:  newTestMap(t, ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: 2 * legFrame, MaxEntries: 1}),
	}
	var both []byte
	for i, leg := range legs {
		group := netip.MustParseAddr(leg.group)
		frame := packet.Frame{DstMAC: packet.MulticastMAC(group), SrcMAC: [6]byte{2, 0, 0, 0, 0, 9}, Src: netip.MustParseAddr(leg.source), Dst: group,
			SrcPort: 7, DstPort: 5000, TTL: 9, Payload: make([]byte, legFrame-14-20-8)}.Build()
		frame[40], frame[41] = 0, 0 // no UDP checksum: the number changes
		both, s.frame = append(both, frame...), frame
		labtest.Do(t, leg.host, func() error { // the map takes devices of the caller's namespace
			device, err := net.InterfaceByName(leg.ifname)
			if err != nil {
				return err
			}
			return s.devices.Put(uint32(i), uint32(device.Index))
		})
	}
	if err := s.frames.Put(uint32(0), both); err != nil {
		t.Fatal(err)
	}
	return s
}

func newTestMap(t *testing.T, spec ebpf.MapSpec) *ebpf.Map {
	t.Helper()
	m, err := ebpf.NewMap(&spec)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.Close() })
	return m
}

// send sends len(up) numbers, on the second leg all and on the first those that are up. It returns how many it sent before the kernel
// ended the run, and how often it was stopped for more than 2 ms: such a time it does not catch up.
func (s *legSource) send(t *testing.T, rate int, up []bool) (sent, stalls int) {
	t.Helper()
	flags := make([]byte, len(up))
	for i, is := range up {
		if is {
			flags[i] = 1
		}
	}
	ups, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: uint32(len(up)), MaxEntries: 1})
	if err != nil {
		t.Fatal(err)
	}
	defer ups.Close()
	if err := ups.Put(uint32(0), flags); err != nil {
		t.Fatal(err)
	}
	state, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: 24, MaxEntries: 1})
	if err != nil {
		t.Fatal(err)
	}
	defer state.Close()
	program, err := ebpf.NewProgram(&ebpf.ProgramSpec{Type: ebpf.XDP, License: "GPL", Instructions: s.instructions(state, ups, rate, len(up))})
	if err != nil {
		t.Fatalf("%+v", err)
	}
	defer program.Close()
	// A run ends after legWaits readings of the clock at the latest, which take 15 ns each, or more.
	runs := 2*len(up) + 10_000 + 2*len(up)*(int(time.Second)/rate)/(legWaits*15)
	labtest.Do(t, s.host, func() error {
		_, err := program.Run(&ebpf.RunOptions{Data: s.frame, Repeat: uint32(runs), Flags: unix.BPF_F_TEST_XDP_LIVE_FRAMES, BatchSize: 1})
		return err
	})
	var did [3]uint64
	if err := state.Lookup(uint32(0), &did); err != nil {
		t.Fatal(err)
	}
	return int(did[0] / 2), int(did[2])
}

const legWaits = 4000

// instructions are the program of a source. state has twice the number that is due, and the leg in the last bit; when the first was due; and
// how often the source was stopped.
func (s *legSource) instructions(state, ups *ebpf.Map, rate, count int) asm.Instructions {
	const due, waits = -8, -16 // on the stack
	ins := asm.Instructions{
		asm.Mov.Reg(asm.R6, asm.R1),
		asm.LoadMapValue(asm.R7, state.FD(), 0),
		asm.LoadMem(asm.R8, asm.R7, 0, asm.DWord),
		asm.JGE.Imm(asm.R8, int32(2*count), "drop"),
		asm.Mov.Reg(asm.R9, asm.R8),
		asm.RSh.Imm(asm.R9, 1),
		asm.FnKtimeGetNs.Call(),
		asm.JNE.Imm(asm.R8, 0, "begun"),
		asm.StoreMem(asm.R7, 8, asm.R0, asm.DWord),

		asm.Mov.Reg(asm.R1, asm.R9).WithSymbol("begun"),
		asm.Mul.Imm(asm.R1, int32(int(time.Second)/rate)),
		asm.LoadMem(asm.R2, asm.R7, 8, asm.DWord),
		asm.Add.Reg(asm.R1, asm.R2),
		asm.StoreMem(asm.RFP, due, asm.R1, asm.DWord),
		asm.Mov.Imm(asm.R1, 0),
		asm.StoreMem(asm.RFP, waits, asm.R1, asm.DWord),

		asm.LoadMem(asm.R1, asm.RFP, due, asm.DWord).WithSymbol("wait"),
		asm.JGE.Reg(asm.R0, asm.R1, "due"),
		asm.LoadMem(asm.R1, asm.RFP, waits, asm.DWord),
		asm.Add.Imm(asm.R1, 1),
		asm.StoreMem(asm.RFP, waits, asm.R1, asm.DWord),
		asm.JGT.Imm(asm.R1, legWaits, "drop"),
		asm.FnKtimeGetNs.Call(),
		asm.Ja.Label("wait"),

		asm.Sub.Reg(asm.R0, asm.R1).WithSymbol("due"),
		asm.JLT.Imm(asm.R0, int32(2*time.Millisecond), "send"),
		asm.LoadMem(asm.R1, asm.R7, 8, asm.DWord),
		asm.Add.Reg(asm.R1, asm.R0),
		asm.StoreMem(asm.R7, 8, asm.R1, asm.DWord),
		asm.LoadMem(asm.R1, asm.R7, 16, asm.DWord),
		asm.Add.Imm(asm.R1, 1),
		asm.StoreMem(asm.R7, 16, asm.R1, asm.DWord),

		asm.Mov.Reg(asm.R1, asm.R8).WithSymbol("send"),
		asm.And.Imm(asm.R1, 1),
		asm.JNE.Imm(asm.R1, 0, "second"),
		asm.LoadMapValue(asm.R2, ups.FD(), 0),
		asm.Add.Reg(asm.R2, asm.R9),
		asm.LoadMem(asm.R2, asm.R2, 0, asm.Byte),
		asm.Mov.Imm(asm.R4, 0),
		asm.LoadMapValue(asm.R5, s.frames.FD(), 0),
		asm.JNE.Imm(asm.R2, 0, "write"),
		asm.Add.Imm(asm.R8, 1),
		asm.Mov.Imm(asm.R4, 1).WithSymbol("second"),
		asm.LoadMapValue(asm.R5, s.frames.FD(), legFrame),

		asm.LoadMem(asm.R2, asm.R6, 0, asm.Word).WithSymbol("write"), // data
		asm.LoadMem(asm.R3, asm.R6, 4, asm.Word),                     // data_end
		asm.Mov.Reg(asm.R1, asm.R2),
		asm.Add.Imm(asm.R1, legFrame),
		asm.JGT.Reg(asm.R1, asm.R3, "drop"),
	}
	for at := int16(0); at < legFrame; at += 8 {
		ins = append(ins, asm.LoadMem(asm.R1, asm.R5, at, asm.DWord), asm.StoreMem(asm.R2, at, asm.R1, asm.DWord))
	}
	return append(ins,
		asm.HostTo(asm.BE, asm.R9, asm.Word),
		asm.StoreMem(asm.R2, legNumber, asm.R9, asm.Word),
		asm.Add.Imm(asm.R8, 1),
		asm.StoreMem(asm.R7, 0, asm.R8, asm.DWord),
		asm.LoadMapPtr(asm.R1, s.devices.FD()),
		asm.Mov.Reg(asm.R2, asm.R4),
		asm.Mov.Imm(asm.R3, 0),
		asm.FnRedirectMap.Call(),
		asm.Return(),
		asm.Mov.Imm(asm.R0, xdpDrop).WithSymbol("drop"),
		asm.Return(),
	)
}

// arrivalSink records when each number of a legSource arrives at an interface: by an XDP program, which takes its packets.
type arrivalSink struct {
	at    *ebpf.Map // number -> bpf_ktime_get_ns
	state *ebpf.Map // the latest number, how many were behind it, and how many came twice
}

// sinkNumbers is how many numbers a sink holds: six seconds of 100,000 a second.
const sinkNumbers = 600_000

func newArrivalSink(t *testing.T, h *lab.Host, ifname string, port uint16) *arrivalSink {
	t.Helper()
	s := &arrivalSink{
		at:    newTestMap(t, ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: 8, MaxEntries: sinkNumbers}),
		state: newTestMap(t, ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: 24, MaxEntries: 1}),
	}
	count := func(at int16) asm.Instructions {
		return asm.Instructions{asm.LoadMem(asm.R1, asm.R8, at, asm.DWord), asm.Add.Imm(asm.R1, 1), asm.StoreMem(asm.R8, at, asm.R1, asm.DWord)}
	}
	ins := asm.Instructions{
		asm.LoadMem(asm.R2, asm.R1, 0, asm.Word),
		asm.LoadMem(asm.R3, asm.R1, 4, asm.Word),
		asm.Mov.Reg(asm.R1, asm.R2),
		asm.Add.Imm(asm.R1, legFrame),
		asm.JGT.Reg(asm.R1, asm.R3, "pass"),
		asm.LoadMem(asm.R1, asm.R2, legPort, asm.Half),
		asm.JNE.Imm(asm.R1, int32(bits.ReverseBytes16(port)), "pass"),
		asm.LoadMem(asm.R6, asm.R2, legNumber, asm.Word),
		asm.HostTo(asm.BE, asm.R6, asm.Word),
		asm.FnKtimeGetNs.Call(),
		asm.Mov.Reg(asm.R7, asm.R0),
		asm.LoadMapValue(asm.R8, s.state.FD(), 0),
		asm.StoreMem(asm.RFP, -4, asm.R6, asm.Word),
		asm.LoadMapPtr(asm.R1, s.at.FD()),
		asm.Mov.Reg(asm.R2, asm.RFP),
		asm.Add.Imm(asm.R2, -4),
		asm.FnMapLookupElem.Call(),
		asm.JEq.Imm(asm.R0, 0, "drop"),
		asm.LoadMem(asm.R1, asm.R0, 0, asm.DWord),
		asm.JNE.Imm(asm.R1, 0, "twice"),
		asm.StoreMem(asm.R0, 0, asm.R7, asm.DWord),
		asm.LoadMem(asm.R1, asm.R8, 0, asm.DWord),
		asm.JLT.Reg(asm.R6, asm.R1, "behind"),
		asm.StoreMem(asm.R8, 0, asm.R6, asm.DWord),
		asm.Mov.Imm(asm.R0, xdpDrop).WithSymbol("drop"),
		asm.Return(),
		asm.Mov.Imm(asm.R0, xdpPass).WithSymbol("pass"),
		asm.Return(),
	}
	behind, twice := count(8), count(16)
	behind[0], twice[0] = behind[0].WithSymbol("behind"), twice[0].WithSymbol("twice")
	ins = slices.Concat(ins, behind, asm.Instructions{asm.Ja.Label("drop")}, twice, asm.Instructions{asm.Ja.Label("drop")})
	program, err := ebpf.NewProgram(&ebpf.ProgramSpec{Type: ebpf.XDP, AttachType: ebpf.AttachXDP, License: "GPL", Instructions: ins})
	if err != nil {
		t.Fatalf("%+v", err)
	}
	defer program.Close()
	labtest.Do(t, h, func() error {
		device, err := net.InterfaceByName(ifname)
		if err != nil {
			return err
		}
		l, err := link.AttachXDP(link.XDPOptions{Program: program, Interface: device.Index})
		if err == nil {
			t.Cleanup(func() { l.Close() })
		}
		return err
	})
	return s
}

// reset forgets what arrived, of numbers below count.
func (s *arrivalSink) reset(t *testing.T, count int) {
	t.Helper()
	if count > sinkNumbers {
		t.Fatalf("%d numbers: a sink holds %d", count, sinkNumbers)
	}
	keys := make([]uint32, sinkNumbers)
	for i := range keys {
		keys[i] = uint32(i)
	}
	_, err := s.at.BatchUpdate(keys, make([]uint64, sinkNumbers), nil)
	if err := errors.Join(err, s.state.Put(uint32(0), [3]uint64{})); err != nil {
		t.Fatal(err)
	}
}

// arrived is when a number arrived; 0: it has not.
func (s *arrivalSink) arrived(t *testing.T, number int) (at uint64) {
	t.Helper()
	if err := s.at.Lookup(uint32(number), &at); err != nil {
		t.Fatal(err)
	}
	return at
}

// all returns when the numbers below count arrived, 0 for those that did not, and how many came after a later one, and twice.
func (s *arrivalSink) all(t *testing.T, count int) (at []time.Duration, behind, twice uint64) {
	t.Helper()
	values := make([]uint64, sinkNumbers)
	var cursor ebpf.MapBatchCursor
	n, err := s.at.BatchLookup(&cursor, make([]uint32, sinkNumbers), values, nil)
	if err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) || n < count {
		t.Fatalf("%d of %d numbers: %v", n, count, err)
	}
	for i := range count {
		at = append(at, time.Duration(values[i]))
	}
	var state [3]uint64
	if err := s.state.Lookup(uint32(0), &state); err != nil {
		t.Fatal(err)
	}
	return at, state[1], state[2]
}
