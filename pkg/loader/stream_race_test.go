package loader

import (
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"os"
	"runtime"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"xdpcast/internal/labtest"
	"xdpcast/internal/streamtest"
	"xdpcast/pkg/flow"
	"xdpcast/pkg/packet"
)

// raceHeaders is the part rewritten in the frame for each number: everything before the payload,
// and more, to a multiple of 8. The number follows Ethernet, IPv4 and UDP.
const (
	raceHeaders = 48
	raceNumber  = 42
	raceSlot    = 128 // bytes: each leg has its own cache lines
	raceApart   = 16  // numbers by which a leg may be ahead of the other
	raceRun     = 1_000_000
)

// raceParts are the headers in the pieces in which the relay program reads them: a load that spans two
// stores waits until both have left the store buffer, which no packet of a network card makes it do.
var raceParts = []struct {
	at   int16
	size asm.Size
}{
	{0, asm.DWord}, {8, asm.Word}, {12, asm.DWord}, {20, asm.Word}, {24, asm.Half}, {26, asm.Word}, {30, asm.Word},
	{34, asm.Half}, {36, asm.Half}, {38, asm.Half}, {40, asm.Half}, {46, asm.Half},
}

// raceMaps are shared by two drivers: the position of each, and its frame.
type raceMaps struct {
	next, frames, programs *ebpf.Map
}

// newDriver loads a program that makes the next number of a leg, unless that is too far ahead of
// the other, and tail-calls the relay program with it. One run handles many packets without a
// system call in between, so that two CPUs meet at one number again and again.
func newDriver(t testing.TB, m raceMaps, leg int32, numbers int64) *ebpf.Program {
	t.Helper()
	lookup := func(m *ebpf.Map, key int32, to asm.Register) asm.Instructions {
		return asm.Instructions{
			asm.StoreImm(asm.RFP, -4, int64(key), asm.Word),
			asm.LoadMapPtr(asm.R1, m.FD()),
			asm.Mov.Reg(asm.R2, asm.RFP),
			asm.Add.Imm(asm.R2, -4),
			asm.FnMapLookupElem.Call(),
			asm.JEq.Imm(asm.R0, 0, "drop"),
			asm.Mov.Reg(to, asm.R0),
		}
	}
	ins := asm.Instructions{asm.Mov.Reg(asm.R6, asm.R1)}
	ins = append(ins, lookup(m.next, leg, asm.R7)...)
	ins = append(ins, lookup(m.next, 1-leg, asm.R8)...)
	ins = append(ins,
		asm.LoadMem(asm.R9, asm.R7, 0, asm.DWord),
		asm.LoadImm(asm.R1, numbers, asm.DWord),
		asm.JGE.Reg(asm.R9, asm.R1, "drop"),
		asm.LoadMem(asm.R1, asm.R8, 0, asm.DWord),
		asm.Add.Imm(asm.R1, raceApart),
		asm.JGT.Reg(asm.R9, asm.R1, "drop"),
	)
	ins = append(ins, lookup(m.frames, leg, asm.R8)...)
	ins = append(ins,
		asm.LoadMem(asm.R2, asm.R6, 0, asm.Word), // data
		asm.LoadMem(asm.R3, asm.R6, 4, asm.Word), // data_end
		asm.Mov.Reg(asm.R1, asm.R2),
		asm.Add.Imm(asm.R1, raceHeaders),
		asm.JGT.Reg(asm.R1, asm.R3, "drop"),
	)
	for _, part := range raceParts {
		ins = append(ins, asm.LoadMem(asm.R1, asm.R8, part.at, part.size), asm.StoreMem(asm.R2, part.at, asm.R1, part.size))
	}
	ins = append(ins,
		asm.StoreMem(asm.R2, raceNumber, asm.R9, asm.Word),
		asm.Add.Imm(asm.R9, 1),
		asm.StoreMem(asm.R7, 0, asm.R9, asm.DWord),
		asm.Mov.Reg(asm.R1, asm.R6),
		asm.LoadMapPtr(asm.R2, m.programs.FD()),
		asm.Mov.Imm(asm.R3, 0),
		asm.FnTailCall.Call(),
		asm.Mov.Imm(asm.R0, xdpDrop).WithSymbol("drop"),
		asm.Return(),
	)
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{Type: ebpf.XDP, AttachType: ebpf.AttachXDP, Flags: unix.BPF_F_XDP_HAS_FRAGS, License: "GPL", Instructions: ins})
	if err != nil {
		t.Fatalf("%+v", err)
	}
	t.Cleanup(func() { p.Close() })
	return p
}

// attachDriver attaches a driver to an interface without traffic. The kernel then has a dispatcher
// for it, and need not create one for each run, which takes the grace period that the other leg's
// run would hold up (bpf_prog_change_xdp in net/bpf/test_run.c).
func attachDriver(t testing.TB, p *ebpf.Program, at *net.Interface) {
	t.Helper()
	l, err := link.AttachXDP(link.XDPOptions{Program: p, Interface: at.Index})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
}

func raceMap(t testing.TB, spec *ebpf.MapSpec) *ebpf.Map {
	t.Helper()
	m, err := ebpf.NewMap(spec)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.Close() })
	return m
}

// raced is the result of a race: the numbers sent, packets that passed, and those dropped for
// another reason than as a duplicate.
type raced struct{ numbers, passed, others uint64 }

// race sends numbers on two legs from two CPUs at the same time, as many as it can in some time. With
// oneLeg both CPUs deliver packets of the first leg.
func race(t *testing.T, broken, oneLeg bool, numbers int64, most time.Duration) (r raced) {
	opts := testOptions(t)
	opts.Logger = nil
	opts.programs = embedded{noPacket: true, streamBroken: broken}
	n := newLab(t, 3)
	l := open(t, opts)
	attachAll(t, l, n.in, n.out[0])
	settings := streamtest.MDP3
	settings.Skew, settings.Reset = time.Hour, 4*time.Hour // shared CPUs stall
	sync1(t, l, legs(n, "race", settings, output(n.out[0], "239.9.9.9", "10.1.0.1", 6000), legGroups[:2]...)...)
	m := raceMaps{
		next:     raceMap(t, &ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: raceSlot, MaxEntries: 2}),
		frames:   raceMap(t, &ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: raceHeaders, MaxEntries: 2}),
		programs: raceMap(t, &ebpf.MapSpec{Type: ebpf.ProgramArray, KeySize: 4, ValueSize: 4, MaxEntries: 1}),
	}
	ended := make(chan error, 2)
	var drivers [2]*ebpf.Program
	var frames [2][]byte
	for leg := range drivers {
		drivers[leg] = newDriver(t, m, int32(leg), numbers)
		attachDriver(t, drivers[leg], n.out[1+leg])
		group := netip.MustParseAddr(legGroups[leg])
		if oneLeg {
			group = netip.MustParseAddr(legGroups[0])
		}
		frames[leg] = packet.Frame{DstMAC: packet.MulticastMAC(group), SrcMAC: [6]byte{2, 0, 0, 0, 0, 9}, Src: netip.MustParseAddr("192.0.2.7"), Dst: group, SrcPort: 7, DstPort: 5000, TTL: 9, Payload: make([]byte, 60)}.Build()
		if err := m.frames.Put(uint32(leg), frames[leg][:raceHeaders]); err != nil {
			t.Fatal(err)
		}
	}
	if err := m.programs.Put(uint32(0), uint32(l.relay.FD())); err != nil {
		t.Fatal(err)
	}
	for leg, p := range drivers {
		go func() {
			runtime.LockOSThread() // never unlocked: the thread ends with its CPU affinity
			if err := errors.Join(onCPU(leg), first()); err != nil {
				ended <- err
				return
			}
			ended <- drive(p, frames[leg], n.in.Index, m.next, leg, numbers, time.Now().Add(most))
		}()
	}
	for range drivers {
		if err := <-ended; err != nil {
			t.Fatal(err)
		}
	}
	for leg := range drivers {
		at, err := raceNext(m.next, leg)
		if err != nil {
			t.Fatal(err)
		}
		r.numbers = max(r.numbers, uint64(at))
		// Counters of a CPU: those of a leg are inaccurate when two write them.
		counted := statsOf(t, l, legs(n, "race", settings, flow.Output{}, legGroups[:2]...)[leg].Name)
		r.passed += counted.Outputs[0].Sent.Packets
		for reason, c := range counted.Drops {
			// At the begin one may come while the other CPU, which has a copy, is kept from running.
			if reason != Duplicate && reason != Contended {
				r.others += c.Packets
			}
		}
	}
	return r
}

// raceNext is the next number of a leg.
func raceNext(next *ebpf.Map, leg int) (int64, error) {
	slot := make([]byte, raceSlot)
	err := next.Lookup(uint32(leg), &slot)
	return int64(binary.NativeEndian.Uint64(slot)), err
}

// drive runs a driver until it has sent all numbers, or time is up. The legs meet while both CPUs
// run: a leg that waits for the other keeps running, since a sleeping thread wakes late.
func drive(p *ebpf.Program, frame []byte, index int, next *ebpf.Map, leg int, numbers int64, end time.Time) error {
	for time.Now().Before(end) {
		opts := ebpf.RunOptions{Data: frame, Context: xdpContext{DataEnd: uint32(len(frame)), IngressIfindex: uint32(index)}, Repeat: raceRun}
		if _, err := p.Run(&opts); err != nil && !errors.Is(err, unix.EINTR) {
			return err
		}
		at, err := raceNext(next, leg)
		if err != nil || at >= numbers {
			return err
		}
	}
	return nil
}

// first gives the thread priority over all others of the machine, so that both CPUs run the race at
// the same time: legs that take turns do not meet. The kernel leaves others 5 % of each CPU
// (sched_rt_runtime_us). With one CPU it would keep the other leg from running.
func first() error {
	if runtime.NumCPU() < 2 {
		return nil
	}
	err := unix.SchedSetAttr(0, &unix.SchedAttr{Policy: unix.SCHED_FIFO, Priority: 1}, 0)
	if errors.Is(err, unix.EPERM) {
		return nil // in a container without the permission: slower, and the control may detect nothing
	}
	return os.NewSyscallError("sched_setattr", err)
}

// onCPU pins the thread to the nth CPU that it may use.
func onCPU(n int) error {
	var now, one unix.CPUSet
	if err := unix.SchedGetaffinity(0, &now); err != nil {
		return err
	}
	for cpu := range 1024 {
		if !now.IsSet(cpu) {
			continue
		}
		if n == 0 {
			one.Set(cpu)
			return unix.SchedSetaffinity(0, &one)
		}
		n--
	}
	return nil // too few CPUs: the legs take turns
}

// Two CPUs deliver the copies of each number at the same time: each number passes once. With one
// CPU the legs take turns.
func TestStreamRace(t *testing.T) {
	labtest.RequireRoot(t)
	numbers, most := int64(labtest.Soak(200_000, 10_000_000)), time.Duration(labtest.Soak(5, 240))*time.Second
	begin := time.Now()
	r := race(t, false, false, numbers, most)
	if r.passed != r.numbers || r.others != 0 {
		t.Errorf("%d packets passed, want each of %d numbers once; %d were dropped for other reasons", r.passed, r.numbers, r.others)
	}
	if runtime.NumCPU() > 1 && r.numbers < uint64(numbers) {
		t.Logf("the CPUs hardly ran at the same time: %d numbers in %v", r.numbers, most)
	}
	t.Logf("%d numbers in %v", r.numbers, time.Since(begin).Round(time.Millisecond))
}

// The packets of a leg may come on several CPUs, which write the leg's state at the same time: each
// number still passes once.
func TestStreamRaceOnOneLeg(t *testing.T) {
	labtest.RequireRoot(t)
	numbers, most := int64(labtest.Soak(200_000, 10_000_000)), time.Duration(labtest.Soak(5, 240))*time.Second
	r := race(t, false, true, numbers, most)
	if r.passed != r.numbers || r.others != 0 {
		t.Errorf("%d packets passed, want each of %d numbers once; %d were dropped for other reasons", r.passed, r.numbers, r.others)
	}
	t.Logf("%d numbers", r.numbers)
}

// The control of TestStreamRace: without atomics some numbers pass twice, so the test would detect
// it.
func TestStreamRaceNeedsAtomics(t *testing.T) {
	labtest.RequireRoot(t)
	if runtime.NumCPU() < 2 {
		labtest.Lacking(t, "the legs must run at the same time, which needs two CPUs")
	}
	numbers, most := int64(labtest.Soak(200_000, 10_000_000)), time.Duration(labtest.Soak(5, 240))*time.Second
	for begin, together := time.Now(), uint64(0); ; {
		r := race(t, true, false, numbers, most)
		together += r.numbers
		if r.passed != r.numbers {
			t.Logf("without atomics %d packets passed of %d numbers", r.passed, r.numbers)
			return
		}
		if time.Since(begin) > labtest.Timeout {
			t.Fatalf("without atomics each of %d numbers passed once: the test is too weak, or the CPUs did not run at the same time", together)
		}
	}
}
