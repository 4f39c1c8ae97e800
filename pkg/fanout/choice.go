package fanout

import (
	"errors"
	"fmt"
	"runtime"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"golang.org/x/sys/unix"
)

// choice is the program that selects a frame's worker and ring if workers have two rings.
// One group holds first the sockets of the workers' blocks and then those of their frame
// rings, so that the kernel gives each frame to exactly one.
//
// A frame uses the frame ring, which wakes the worker immediately, while that has room; when
// frames arrive faster than the worker takes them, they use blocks, which deliver hundreds
// per wake-up. Blocks also carry
//
//   - frames too long for a slot;
//   - merged datagrams: a socket with a virtio header and TPACKET_V2 never receives again
//     once the kernel meets one that it cannot describe, since it keeps the slot
//     (rx_owner_map in tpacket_rcv of net/packet/af_packet.c).
type choice struct {
	program *ebpf.Program // nil once the group has it
	state   *ebpf.Map
	memory  []byte // of state
}

// admission is the state shared by the program and a worker; a cache line.
type admission struct {
	taken uint64 // frames assigned to the frame ring, including those then filtered out
	limit uint64 // of taken; 0: admit none
	_     [6]uint64
}

const (
	sizeofAdmission = int(unsafe.Sizeof(admission{}))
	offsetOfTaken   = int16(unsafe.Offsetof(admission{}.taken))
	offsetOfLimit   = int16(unsafe.Offsetof(admission{}.limit))
)

func newChoice(o *Options) (_ *choice, err error) {
	c := &choice{}
	defer func() {
		if err != nil {
			err = errors.Join(err, c.close())
		}
	}()
	c.state, err = ebpf.NewMap(&ebpf.MapSpec{
		Name: "xdpcast_rings", Type: ebpf.Array, Flags: unix.BPF_F_MMAPABLE,
		KeySize: 4, ValueSize: uint32(o.Workers * sizeofAdmission), MaxEntries: 1,
	})
	if err != nil {
		return nil, fmt.Errorf("make map: %w", err)
	}
	c.memory, err = unix.Mmap(c.state.FD(), 0, o.Workers*sizeofAdmission, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("map map: %w", err)
	}
	c.program, err = ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: "xdpcast_choice", Type: ebpf.SocketFilter, Instructions: chooseRing(o, c.state.FD()), License: "MIT",
	})
	if err != nil {
		return nil, fmt.Errorf("load program: %w", err)
	}
	return c, nil
}

// inheritChoice maps the state of a group's program, which the group keeps. It takes ownership of fd.
func inheritChoice(o *Options, fd int) (_ *choice, err error) {
	c := &choice{}
	defer func() {
		if err != nil {
			err = errors.Join(err, c.close())
		}
	}()
	if c.state, err = ebpf.NewMapFromFD(fd); err != nil {
		return nil, errors.Join(fmt.Errorf("state of the program that chooses the ring: %w", err), unix.Close(fd))
	}
	if want := uint32(o.Workers * sizeofAdmission); c.state.Type() != ebpf.Array || c.state.ValueSize() != want || c.state.MaxEntries() != 1 {
		return nil, fmt.Errorf("%w: %v chooses the ring, want an array of one value of %d bytes", ErrLayout, c.state, want)
	}
	if c.memory, err = unix.Mmap(fd, 0, o.Workers*sizeofAdmission, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED); err != nil {
		return nil, fmt.Errorf("map map: %w", err)
	}
	return c, nil
}

// of returns the admission of a worker.
func (c *choice) of(worker int) *admission {
	return (*admission)(unsafe.Pointer(&c.memory[worker*sizeofAdmission]))
}

func (c *choice) closeProgram() error {
	if c.program == nil {
		return nil
	}
	p := c.program
	c.program = nil
	return p.Close()
}

func (c *choice) close() error {
	errs := []error{c.closeProgram()}
	if c.memory != nil {
		errs = append(errs, unix.Munmap(c.memory))
	}
	if c.state != nil {
		errs = append(errs, c.state.Close())
	}
	*c = choice{}
	return errors.Join(errs...)
}

// slackOf bounds how many frames CPUs may be writing into a worker's slots at one time.
func slackOf(o *Options) int { return min(2*runtime.NumCPU()+8, o.Frames/2) }

// Offsets into struct __sk_buff of include/uapi/linux/bpf.h.
const (
	skbLen     = 0
	skbGSOSize = 176
)

func chooseRing(o *Options, state int) asm.Instructions {
	worker := asm.Instructions{
		asm.Mov.Reg(regContext, asm.R1),
		asm.FnGetSmpProcessorId.Call(),
		asm.Mov.Reg32(regHash, asm.R0),
	}
	if o.Mode == ModeHash {
		worker = flowHash(ByAddressesAndPorts)
		worker = append(worker,
			asm.Mov.Imm(regHash, 0).WithSymbol("other"),
			asm.Mov.Reg32(regHash, regHash).WithSymbol("done"),
		)
	}
	return join(worker, asm.Instructions{
		asm.Mod.Imm32(regHash, int32(o.Workers)),
		// Older verifiers do not derive a bound from the modulo.
		asm.JLT.Imm(regHash, int32(o.Workers), "worker"),
		asm.Mov.Imm(regHash, 0),
		asm.Mov.Reg(asm.R0, regHash).WithSymbol("worker"),
		asm.LoadMem(asm.R1, regContext, skbLen, asm.Word),
		// Counted from the network or from the link-layer header.
		asm.JGT.Imm(asm.R1, int32(o.FrameSize-FrameOverhead), "blocks"),
		asm.LoadMem(asm.R1, regContext, skbGSOSize, asm.Word),
		asm.JNE.Imm(asm.R1, 0, "blocks"),
		asm.LoadMapValue(asm.R1, state, 0),
		asm.Mul.Imm(regHash, int32(sizeofAdmission)),
		asm.Add.Reg(asm.R1, regHash),
		asm.LoadMem(asm.R2, asm.R1, offsetOfTaken, asm.DWord),
		asm.LoadMem(asm.R3, asm.R1, offsetOfLimit, asm.DWord),
		asm.JGE.Reg(asm.R2, asm.R3, "blocks"),
		asm.Mov.Imm(asm.R2, 1),
		asm.AddAtomic.Mem(asm.R1, asm.R2, asm.DWord, offsetOfTaken),
		asm.Add.Imm(asm.R0, int32(o.Workers)),
		asm.Return().WithSymbol("blocks"),
	})
}
