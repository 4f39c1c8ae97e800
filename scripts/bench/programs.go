package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"xdpcast/bpf"
)

// XDP verdicts and flags of include/uapi/linux/bpf.h.
const (
	xdpAborted       = 0
	xdpDrop          = 1
	xdpPass          = 2
	xdpTx            = 3
	bpfFBroadcast    = 1 << 3
	testXDPLive      = 1 << 1 // BPF_F_TEST_XDP_LIVE_FRAMES
	headerToRewrite  = 44     // Ethernet, IPv4 and UDP, to a whole word
	offsetData       = 0      // struct xdp_md
	offsetDataEnd    = 4
	license          = "GPL"
	maxPacketCounter = 1
)

// newGenerator returns a program that writes the header of frame anew and sends
// it: the kernel uses a live frame's buffer again, with what became of it.
func newGenerator(frame []byte, sent *ebpf.Map) (*ebpf.Program, error) {
	ins := asm.Instructions{
		asm.Mov.Reg(asm.R6, asm.R1),
	}
	ins = append(ins, increment(sent)...)
	ins = append(ins,
		asm.Mov.Reg(asm.R1, asm.R6),
		asm.LoadMem(asm.R2, asm.R1, offsetData, asm.Word),
		asm.LoadMem(asm.R3, asm.R1, offsetDataEnd, asm.Word),
		asm.Mov.Imm(asm.R0, xdpAborted),
		asm.Mov.Reg(asm.R4, asm.R2),
		asm.Add.Imm(asm.R4, headerToRewrite),
		asm.JGT.Reg(asm.R4, asm.R3, "out"),
	)
	for off := 0; off < headerToRewrite; off += 4 {
		ins = append(ins, asm.StoreImm(asm.R2, int16(off), int64(int32(binary.LittleEndian.Uint32(frame[off:]))), asm.Word))
	}
	ins = append(ins, asm.Mov.Imm(asm.R0, xdpTx), asm.Return().WithSymbol("out"))
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{Name: "bench_source", Type: ebpf.XDP, License: license, Instructions: ins})
	if err != nil {
		return nil, fmt.Errorf("load source: %w", err)
	}
	return p, nil
}

// newCounter returns a per-CPU counter.
func newCounter() (*ebpf.Map, error) {
	return ebpf.NewMap(&ebpf.MapSpec{Name: "bench_received", Type: ebpf.PerCPUArray, KeySize: 4, ValueSize: 8, MaxEntries: maxPacketCounter})
}

// newSink returns a program that counts IPv4 and drops it.
func newSink(received *ebpf.Map) (*ebpf.Program, error) {
	const ethLen, etherTypeAt = 14, 12
	ins := asm.Instructions{
		asm.Mov.Imm(asm.R0, xdpPass),
		asm.LoadMem(asm.R2, asm.R1, offsetData, asm.Word),
		asm.LoadMem(asm.R3, asm.R1, offsetDataEnd, asm.Word),
		asm.Mov.Reg(asm.R4, asm.R2),
		asm.Add.Imm(asm.R4, ethLen),
		asm.JGT.Reg(asm.R4, asm.R3, "out"),
		asm.LoadMem(asm.R4, asm.R2, etherTypeAt, asm.Half),
		// Hosts also talk about themselves, over IPv6.
		asm.JNE.Imm(asm.R4, int32(binary.NativeEndian.Uint16([]byte{0x08, 0x00})), "out"),
	}
	ins = append(ins, increment(received)...)
	ins = append(ins, asm.Mov.Imm(asm.R0, xdpDrop), asm.Return().WithSymbol("out"))
	return ebpf.NewProgram(&ebpf.ProgramSpec{Name: "bench_sink", Type: ebpf.XDP, License: license, Instructions: ins})
}

// increment adds one to a counter. It uses all registers but R6 to R9.
func increment(counter *ebpf.Map) asm.Instructions {
	return asm.Instructions{
		asm.StoreImm(asm.RFP, -4, 0, asm.Word),
		asm.Mov.Reg(asm.R2, asm.RFP),
		asm.Add.Imm(asm.R2, -4),
		asm.LoadMapPtr(asm.R1, counter.FD()),
		asm.FnMapLookupElem.Call(),
		asm.JEq.Imm(asm.R0, 0, "counted"),
		asm.LoadMem(asm.R1, asm.R0, 0, asm.DWord),
		asm.Add.Imm(asm.R1, 1),
		asm.StoreMem(asm.R0, 0, asm.R1, asm.DWord),
		asm.Mov.Imm(asm.R0, 0).WithSymbol("counted"),
	}
}

// xdpMD is struct xdp_md of include/uapi/linux/bpf.h.
type xdpMD struct {
	Data, DataEnd, DataMeta, IngressIfindex, RxQueueIndex, EgressIfindex uint32
}

// sendLive sends frames out of an interface of the calling thread's namespace. A
// signal makes the kernel start again, so that more may be sent: the program counts
// them.
func sendLive(generator *ebpf.Program, frame []byte, index, frames, batch int) error {
	_, err := generator.Run(&ebpf.RunOptions{
		Data: frame, Repeat: uint32(frames), Flags: testXDPLive, BatchSize: uint32(batch),
		Context: xdpMD{DataEnd: uint32(len(frame)), IngressIfindex: uint32(index)},
	})
	if err != nil {
		return fmt.Errorf("send live frames: %w", err)
	}
	return nil
}

// newRedirect returns the least that a forwarder can do.
func newRedirect(devmap *ebpf.Map, broadcast bool) (*ebpf.Program, error) {
	flags := int32(0)
	if broadcast {
		flags = bpfFBroadcast
	}
	return ebpf.NewProgram(&ebpf.ProgramSpec{Name: "bench_bare", Type: ebpf.XDP, License: license, Instructions: asm.Instructions{
		asm.LoadMapPtr(asm.R1, devmap.FD()),
		asm.Mov.Imm(asm.R2, 0),
		asm.Mov.Imm(asm.R3, flags),
		asm.FnRedirectMap.Call(),
		asm.Return(),
	}})
}

func newDevmap(out []*net.Interface) (*ebpf.Map, error) {
	m, err := ebpf.NewMap(&ebpf.MapSpec{Name: "bench_devmap", Type: ebpf.DevMap, KeySize: 4, ValueSize: 8, MaxEntries: uint32(len(out))})
	if err != nil {
		return nil, err
	}
	for i, o := range out {
		if err := m.Put(uint32(i), &bpf.RelayBpfDevmapVal{Ifindex: uint32(o.Index)}); err != nil {
			return nil, errors.Join(err, m.Close())
		}
	}
	return m, nil
}

// attachNetlink attaches without a link: the program stays until its namespace goes.
func attachNetlink(index int, p *ebpf.Program) error {
	l, err := netlink.LinkByIndex(index)
	if err != nil {
		return err
	}
	return netlink.LinkSetXdpFdWithFlags(l, p.FD(), unix.XDP_FLAGS_DRV_MODE)
}

func total(m *ebpf.Map) (sum uint64, err error) {
	var perCPU []uint64
	if err := m.Lookup(uint32(0), &perCPU); err != nil {
		return 0, err
	}
	for _, n := range perCPU {
		sum += n
	}
	return sum, nil
}
