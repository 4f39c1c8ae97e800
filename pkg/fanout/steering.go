package fanout

import (
	"fmt"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"golang.org/x/sys/unix"
)

// SteerBy selects the fields by which a steering program distinguishes flows.
type SteerBy uint8

const (
	// ByAddresses keeps all packets from one address to another on one worker, and
	// so every flow in order, fragments included.
	ByAddresses SteerBy = iota
	// ByAddressesAndPorts spreads UDP flows between the same addresses. Fragments,
	// of which only the first has ports, are hashed by their addresses alone: a flow
	// that mixes whole and fragmented datagrams may use two workers.
	ByAddressesAndPorts
)

// NewSteering loads a program for ModeEBPF that keeps each flow on one worker:
// IPv4 and IPv6, with up to two VLAN tags. All other frames go to the first
// worker. The caller must Close it; groups that use it hold their own reference.
func NewSteering(by SteerBy) (*ebpf.Program, error) {
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Name:         "xdpcast_steer",
		Type:         ebpf.SocketFilter,
		Instructions: steering(by),
		License:      "MIT",
	})
	if err != nil {
		return nil, fmt.Errorf("load steering program: %w", err)
	}
	return p, nil
}

const (
	// skbProtocol is the offset of protocol, in network byte order, in struct
	// __sk_buff of include/uapi/linux/bpf.h.
	skbProtocol = 16
	// hdrStartNet is BPF_HDR_START_NET: offsets count from the network header.
	hdrStartNet = 1
	// Stack offsets of the bytes that the program loads.
	stackIP    = -48
	stackPorts = -8
)

// The program's registers.
const (
	regContext = asm.R6
	regOffset  = asm.R7 // of the IP header, from the network header
	regHash    = asm.R8 // first the protocol
	regLength  = asm.R9 // of the IP header
)

func steering(by SteerBy) asm.Instructions {
	return append(flowHash(by),
		asm.Mov.Reg32(asm.R0, regHash).WithSymbol("done"),
		asm.Return(),
		asm.Mov.Imm(asm.R0, 0).WithSymbol("other"),
		asm.Return(),
	)
}

// flowHash jumps to done with a hash of the packet's flow in regHash, and to other if the
// packet is not IP.
func flowHash(by SteerBy) asm.Instructions {
	return join(
		asm.Instructions{
			asm.Mov.Reg(regContext, asm.R1),
			asm.Mov.Imm(regOffset, 0),
			asm.LoadMem(regHash, regContext, skbProtocol, asm.Word),
			asm.JEq.Imm(regHash, protocol(unix.ETH_P_8021Q), "tag"),
			asm.JEq.Imm(regHash, protocol(unix.ETH_P_8021AD), "tag"),
			asm.Ja.Label("network"),
		},
		// The kernel removed one tag; this is another: tag control, EtherType.
		labelled("tag", load(stackIP, 4)),
		asm.Instructions{
			asm.LoadMem(regHash, asm.RFP, stackIP+2, asm.Half),
			asm.Mov.Imm(regOffset, 4),
			asm.JEq.Imm(regHash, protocol(unix.ETH_P_IP), "ipv4").WithSymbol("network"),
			asm.JEq.Imm(regHash, protocol(unix.ETH_P_IPV6), "ipv6"),
			asm.Ja.Label("other"),
		},
		labelled("ipv4", steerIPv4()), ports(by),
		labelled("ipv6", steerIPv6()), ports(by),
	)
}

// steerIPv4 hashes the addresses, and jumps to done for packets without ports.
func steerIPv4() asm.Instructions {
	return join(
		load(stackIP, ip4Len),
		mix(stackIP+12, 2),
		asm.Instructions{
			asm.LoadMem(asm.R0, asm.RFP, stackIP+9, asm.Byte),
			asm.JNE.Imm(asm.R0, unix.IPPROTO_UDP, "done"),
			asm.LoadMem(asm.R0, asm.RFP, stackIP+6, asm.Half),
			asm.And.Imm(asm.R0, protocol(0x3fff)), // more fragments, fragment offset
			asm.JNE.Imm(asm.R0, 0, "done"),
			asm.LoadMem(regLength, asm.RFP, stackIP, asm.Byte),
			asm.And.Imm(regLength, 0x0f),
			asm.LSh.Imm(regLength, 2),
		},
	)
}

// steerIPv6 does the same; fragments have an extension header.
func steerIPv6() asm.Instructions {
	return join(
		load(stackIP, ip6Len),
		mix(stackIP+8, 8),
		asm.Instructions{
			asm.LoadMem(asm.R0, asm.RFP, stackIP+6, asm.Byte),
			asm.JNE.Imm(asm.R0, unix.IPPROTO_UDP, "done"),
			asm.Mov.Imm(regLength, ip6Len),
		},
	)
}

// ports hashes the ports after the IP header if by includes them.
func ports(by SteerBy) asm.Instructions {
	if by != ByAddressesAndPorts {
		return asm.Instructions{asm.Ja.Label("done")}
	}
	return join(
		asm.Instructions{asm.Add.Reg(regOffset, regLength)},
		load(stackPorts, 4),
		mix(stackPorts, 1),
		asm.Instructions{asm.Ja.Label("done")},
	)
}

// load copies size bytes of the packet at regOffset to the stack.
func load(to int16, size int32) asm.Instructions {
	return asm.Instructions{
		asm.Mov.Reg(asm.R1, regContext),
		asm.Mov.Reg(asm.R2, regOffset),
		asm.Mov.Reg(asm.R3, asm.RFP),
		asm.Add.Imm(asm.R3, int32(to)),
		asm.Mov.Imm(asm.R4, size),
		asm.Mov.Imm(asm.R5, hdrStartNet),
		asm.FnSkbLoadBytesRelative.Call(),
		asm.JNE.Imm(asm.R0, 0, "other"),
	}
}

// mix hashes 32-bit words from the stack into regHash. It starts from the protocol
// left in it, which is harmless.
func mix(from int16, words int) (prog asm.Instructions) {
	const odd = -0x61c88647 // 2^32 over the golden ratio
	for i := range words {
		prog = append(prog,
			asm.LoadMem(asm.R0, asm.RFP, from+int16(4*i), asm.Word),
			asm.Xor.Reg32(regHash, asm.R0),
			// Multiplication carries upwards only, and addresses differ most in the byte
			// that is the highest on little-endian machines: shift it down, before and
			// after. The low bits matter, since the kernel takes the hash modulo the
			// number of workers.
			asm.Mov.Reg32(asm.R0, regHash),
			asm.RSh.Imm32(asm.R0, 16),
			asm.Xor.Reg32(regHash, asm.R0),
			asm.Mul.Imm32(regHash, odd),
			asm.Mov.Reg32(asm.R0, regHash),
			asm.RSh.Imm32(asm.R0, 15),
			asm.Xor.Reg32(regHash, asm.R0),
		)
	}
	return prog
}

// protocol returns a 16-bit value in network byte order, as an operand.
func protocol(v uint16) int32 { return int32(networkOrder(v)) }

func labelled(label string, prog asm.Instructions) asm.Instructions {
	prog[0] = prog[0].WithSymbol(label)
	return prog
}

func join(parts ...asm.Instructions) (prog asm.Instructions) {
	for _, p := range parts {
		prog = append(prog, p...)
	}
	return prog
}
