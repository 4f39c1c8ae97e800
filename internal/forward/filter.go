package forward

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"golang.org/x/sys/unix"

	"xdpcast/pkg/fanout"
	"xdpcast/pkg/flow"
)

// filter is the socket filter of all groups of a Fanout: it accepts UDP packets to the
// group or prefix of some rule of the interface, so that unwanted packets never reach user
// space. Table checks VLAN, source and port. The filter drops frames that the host sends,
// since PACKET_FANOUT_FLAG_IGNORE_OUTGOING has no effect before Linux 6.2.
type filter struct {
	wanted  *ebpf.Map
	program *ebpf.Program
	sent    *ebpf.Program // for groups of packets that this host sends
	have    map[wantedKey]bool
	gate    *gate
}

// gate selects which of several Fanouts receives packets: the one whose number is its value. So
// one process takes over from another with one write; until then its sockets receive nothing.
type gate struct {
	value  *ebpf.Map
	number uint32
}

// newGate makes an open gate, or joins that of another Fanout, still closed; it owns value.
func newGate(value *ebpf.Map) (_ *gate, err error) {
	g := &gate{value: value, number: 1}
	if value == nil {
		if g.value, err = ebpf.NewMap(&ebpf.MapSpec{Name: "xdpcast_gate", Type: ebpf.Array, KeySize: 4, ValueSize: 4, MaxEntries: 1}); err != nil {
			return nil, fmt.Errorf("make gate of the socket filter: %w", err)
		}
		return g, g.enter()
	}
	var now uint32
	switch {
	case value.Type() != ebpf.Array || value.KeySize() != 4 || value.ValueSize() != 4 || value.MaxEntries() != 1:
		err = fmt.Errorf("the gate of the socket filter is a map of another kind: %v", value)
	default:
		err = value.Lookup(uint32(0), &now)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("read gate of the socket filter: %w", err), value.Close())
	}
	g.number = now + 1
	return g, nil
}

// enter directs packets to this Fanout alone from now on.
func (g *gate) enter() error {
	if err := g.value.Put(uint32(0), g.number); err != nil {
		return fmt.Errorf("write gate of the socket filter: %w", err)
	}
	return nil
}

// pass continues if this Fanout receives packets.
func (g *gate) pass() asm.Instructions {
	return asm.Instructions{
		asm.LoadMapValue(asm.R0, g.value.FD(), 0),
		asm.LoadMem(asm.R0, asm.R0, 0, asm.Word),
		asm.JNE.Imm(asm.R0, int32(g.number), "drop"),
	}
}

// wantedKey is the key of the map: a prefix of interface index and address, IPv4 as
// ::ffff:a.b.c.d.
type wantedKey struct {
	PrefixLen uint32 // bits of Index and Address
	Index     uint32
	Address   [16]byte
}

const maxWanted = 1 << 20

func wantedOf(in flow.Input) wantedKey {
	length := in.Len
	if length == 0 {
		length = in.Group.BitLen()
	}
	return wantedKey{
		PrefixLen: uint32(32 + 128 - in.Group.BitLen() + length),
		Index:     uint32(in.Index),
		Address:   in.Group.As16(),
	}
}

// newFilter takes ownership of gate.
func newFilter(gate *gate) (_ *filter, err error) {
	defer func() {
		if err != nil {
			err = errors.Join(err, gate.value.Close())
		}
	}()
	wanted, err := ebpf.NewMap(&ebpf.MapSpec{
		Name: "xdpcast_wanted", Type: ebpf.LPMTrie, Flags: unix.BPF_F_NO_PREALLOC,
		KeySize: uint32(binary.Size(wantedKey{})), ValueSize: 1, MaxEntries: maxWanted,
	})
	if err != nil {
		return nil, fmt.Errorf("make map of the socket filter: %w", err)
	}
	program, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: "xdpcast_filter", Type: ebpf.SocketFilter, License: "MIT",
		Instructions: append(append(arriving(), gate.pass()...), filterProgram(wanted)...),
	})
	if err != nil {
		return nil, errors.Join(fmt.Errorf("load socket filter: %w", err), wanted.Close())
	}
	sent, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: "xdpcast_sent", Type: ebpf.SocketFilter, License: "MIT",
		Instructions: append(append(sentByHost(), gate.pass()...), filterProgram(wanted)...),
	})
	if err != nil {
		return nil, errors.Join(fmt.Errorf("load socket filter: %w", err), program.Close(), wanted.Close())
	}
	return &filter{wanted: wanted, program: program, sent: sent, have: map[wantedKey]bool{}, gate: gate}, nil
}

func (f *filter) close() error {
	return errors.Join(f.program.Close(), f.sent.Close(), f.wanted.Close(), f.gate.value.Close())
}

// allow adds keys, and returns those that were new.
func (f *filter) allow(want map[wantedKey]bool) (added []wantedKey, err error) {
	for key := range want {
		if f.have[key] {
			continue
		}
		if err := f.wanted.Put(key, uint8(1)); err != nil {
			return nil, errors.Join(fmt.Errorf("write map of the socket filter: %w", err), f.forget(added))
		}
		f.have[key] = true
		added = append(added, key)
	}
	return added, nil
}

// restrict removes all keys that are not in want.
func (f *filter) restrict(want map[wantedKey]bool) error {
	var gone []wantedKey
	for key := range f.have {
		if !want[key] {
			gone = append(gone, key)
		}
	}
	return f.forget(gone)
}

func (f *filter) forget(keys []wantedKey) error {
	var errs []error
	for _, key := range keys {
		if err := f.wanted.Delete(key); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			errs = append(errs, fmt.Errorf("write map of the socket filter: %w", err))
			continue
		}
		delete(f.have, key)
	}
	return errors.Join(errs...)
}

const (
	// Offsets into struct __sk_buff of include/uapi/linux/bpf.h; the protocol is in
	// network byte order.
	skbPacketType = 4
	skbMark       = 8
	skbProtocol   = 16
	skbIngress    = 36
	skbIndex      = 40
	// hdrStartNet is BPF_HDR_START_NET: offsets count from the network header.
	hdrStartNet = 1
	// keepAll is the return value that keeps the whole frame.
	keepAll = -1

	// Stack offsets of the lookup key and of the loaded bytes.
	stackKey     = -24
	stackIndex   = stackKey + 4
	stackAddress = stackKey + 8
	stackIP      = stackKey - ip6Len

	ip4Len = 20
	ip6Len = 40
)

// arriving continues with received packets only: PACKET_FANOUT_FLAG_IGNORE_OUTGOING omits
// those that the host sends only since Linux 6.2.
func arriving() asm.Instructions {
	return asm.Instructions{
		asm.LoadMem(asm.R0, asm.R1, skbPacketType, asm.Word),
		asm.JEq.Imm(asm.R0, unix.PACKET_OUTGOING, "drop"),
	}
}

// sentByHost continues with packets sent by a socket of this host: not with received ones,
// those forwarded by the host, which have an input interface, or the relay's own.
func sentByHost() asm.Instructions {
	return asm.Instructions{
		asm.LoadMem(asm.R0, asm.R1, skbPacketType, asm.Word),
		asm.JNE.Imm(asm.R0, unix.PACKET_OUTGOING, "drop"),
		asm.LoadMem(asm.R0, asm.R1, skbIngress, asm.Word),
		asm.JNE.Imm(asm.R0, 0, "drop"),
		asm.LoadMem(asm.R0, asm.R1, skbMark, asm.Word),
		asm.JEq.Imm(asm.R0, fanout.Mark, "drop"),
	}
}

func filterProgram(wanted *ebpf.Map) asm.Instructions {
	const context, offset, protocol = asm.R6, asm.R7, asm.R8
	load := func(size int32) asm.Instructions {
		return asm.Instructions{
			asm.Mov.Reg(asm.R1, context),
			asm.Mov.Reg(asm.R2, offset),
			asm.Mov.Reg(asm.R3, asm.RFP),
			asm.Add.Imm(asm.R3, stackIP),
			asm.Mov.Imm(asm.R4, size),
			asm.Mov.Imm(asm.R5, hdrStartNet),
			asm.FnSkbLoadBytesRelative.Call(),
			asm.JNE.Imm(asm.R0, 0, "drop"),
		}
	}
	program := asm.Instructions{
		asm.Mov.Reg(context, asm.R1),
		asm.Mov.Imm(offset, 0),
		asm.LoadMem(protocol, context, skbIndex, asm.Word),
		asm.StoreMem(asm.RFP, stackIndex, protocol, asm.Word),
		asm.Mov.Imm(protocol, 32+128),
		asm.StoreMem(asm.RFP, stackKey, protocol, asm.Word),
		asm.LoadMem(protocol, context, skbProtocol, asm.Word),
		asm.JEq.Imm(protocol, networkOrder(unix.ETH_P_8021Q), "tag"),
		asm.JEq.Imm(protocol, networkOrder(unix.ETH_P_8021AD), "tag"),
		asm.Ja.Label("network"),
	}
	// The kernel removed one tag; this is another: tag control, EtherType.
	tag := load(4)
	tag[0] = tag[0].WithSymbol("tag")
	program = append(program, tag...)
	program = append(program,
		asm.LoadMem(protocol, asm.RFP, stackIP+2, asm.Half),
		asm.Mov.Imm(offset, 4),
		asm.JEq.Imm(protocol, networkOrder(unix.ETH_P_IP), "ipv4").WithSymbol("network"),
		asm.JEq.Imm(protocol, networkOrder(unix.ETH_P_IPV6), "ipv6"),
		asm.Ja.Label("drop"),
	)
	ipv4 := load(ip4Len)
	ipv4[0] = ipv4[0].WithSymbol("ipv4")
	program = append(program, ipv4...)
	program = append(program,
		asm.LoadMem(asm.R0, asm.RFP, stackIP+9, asm.Byte),
		asm.JNE.Imm(asm.R0, unix.IPPROTO_UDP, "drop"),
		asm.Mov.Imm(asm.R0, 0),
		asm.StoreMem(asm.RFP, stackAddress, asm.R0, asm.DWord),
		asm.StoreMem(asm.RFP, stackAddress+8, asm.R0, asm.Word),
		asm.Mov.Imm(asm.R0, 0xffff),
		asm.StoreMem(asm.RFP, stackAddress+10, asm.R0, asm.Half),
		asm.LoadMem(asm.R0, asm.RFP, stackIP+16, asm.Word),
		asm.StoreMem(asm.RFP, stackAddress+12, asm.R0, asm.Word),
		asm.Ja.Label("lookup"),
	)
	ipv6 := load(ip6Len)
	ipv6[0] = ipv6[0].WithSymbol("ipv6")
	program = append(program, ipv6...)
	program = append(program,
		// UDP, or extension headers that may precede it.
		asm.LoadMem(asm.R0, asm.RFP, stackIP+6, asm.Byte),
		asm.JEq.Imm(asm.R0, unix.IPPROTO_UDP, "address"),
		asm.JEq.Imm(asm.R0, unix.IPPROTO_HOPOPTS, "address"),
		asm.JEq.Imm(asm.R0, unix.IPPROTO_FRAGMENT, "address"),
		asm.JNE.Imm(asm.R0, unix.IPPROTO_DSTOPTS, "drop"),
	)
	for i := range int16(4) {
		word := asm.LoadMem(asm.R0, asm.RFP, stackIP+24+4*i, asm.Word)
		if i == 0 {
			word = word.WithSymbol("address")
		}
		program = append(program, word, asm.StoreMem(asm.RFP, stackAddress+4*i, asm.R0, asm.Word))
	}
	return append(program,
		asm.LoadMapPtr(asm.R1, wanted.FD()).WithSymbol("lookup"),
		asm.Mov.Reg(asm.R2, asm.RFP),
		asm.Add.Imm(asm.R2, stackKey),
		asm.FnMapLookupElem.Call(),
		asm.JEq.Imm(asm.R0, 0, "drop"),
		asm.Mov.Imm(asm.R0, keepAll),
		asm.Return(),
		asm.Mov.Imm(asm.R0, 0).WithSymbol("drop"),
		asm.Return(),
	)
}

// networkOrder returns v as the kernel's __be16, as an operand.
func networkOrder(v uint16) int32 {
	return int32(binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, v)))
}
