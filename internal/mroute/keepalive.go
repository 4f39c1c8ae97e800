package mroute

import (
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"xdpcast/bpf"
	"xdpcast/pkg/packet"
)

// maxProbes is the maximum number of frames per run.
const maxProbes = 16384

// Probe is a frame for an entry's counters to count.
type Probe struct {
	Source, Group netip.Addr
	Input         int // interface index
}

// Keepalive advances the kernel's counters of entries whose packets bypass it: a frame of TTL 1
// from the source to the group, received on the entry's input, is counted and leaves by no output.
// A daemon that watches the counters then keeps the entry, and no packet of the stream is lost or
// reordered. It is not safe for concurrent use.
type Keepalive struct{ objs bpf.KeepaliveObjects }

// NewKeepalive loads the program. The caller must Close it. The error matches
// ebpf.ErrNotSupported before Linux 5.18.
func NewKeepalive() (*Keepalive, error) {
	spec, err := bpf.LoadKeepalive()
	if err != nil {
		return nil, fmt.Errorf("keepalive of multicast routes: %w", err)
	}
	spec.Maps["probes"].MaxEntries = maxProbes
	k := &Keepalive{}
	if err := spec.LoadAndAssign(&k.objs, nil); err != nil {
		return nil, fmt.Errorf("keepalive of multicast routes: %w", err)
	}
	return k, nil
}

// Close unloads the program.
func (k *Keepalive) Close() error { return k.objs.Close() }

// Send sends a frame for each probe. An interface that cannot be used yields an error but does not
// stop the others. Call it in the network namespace of the interfaces.
func (k *Keepalive) Send(probes []Probe) error {
	inputs := map[int][]bpf.KeepaliveProbe{}
	for _, p := range probes {
		inputs[p.Input] = append(inputs[p.Input], bpf.KeepaliveProbe{Frame: p.frame()})
	}
	var errs []error
	for _, index := range slices.Sorted(maps.Keys(inputs)) {
		for part := range slices.Chunk(inputs[index], maxProbes) {
			if err := k.run(index, part); err != nil {
				errs = append(errs, fmt.Errorf("keepalive of multicast routes that come in by the interface with index %d: %w", index, err))
				break
			}
		}
	}
	return errors.Join(errs...)
}

func (k *Keepalive) run(index int, frames []bpf.KeepaliveProbe) error {
	keys := make([]uint32, len(frames))
	for i := range keys {
		keys[i] = uint32(i)
	}
	if _, err := k.objs.Probes.BatchUpdate(keys, frames, nil); err != nil {
		return fmt.Errorf("write frames: %w", err)
	}
	if err := errors.Join(k.objs.Next.Set(uint32(0)), k.objs.Limit.Set(uint32(len(frames)))); err != nil {
		return err
	}
	data := make([]byte, len(frames[0].Frame))
	// struct xdp_md of include/uapi/linux/bpf.h.
	context := struct{ Data, DataEnd, DataMeta, Ingress, Queue, Egress uint32 }{DataEnd: uint32(len(data)), Ingress: uint32(index)}
	_, err := k.objs.Keepalive.Run(&ebpf.RunOptions{Data: data, Context: context, Repeat: uint32(len(frames)), Flags: unix.BPF_F_TEST_XDP_LIVE_FRAMES})
	return err
}

// probeMAC is the source address of the frames: a locally administered one.
var probeMAC = [6]byte{2, 'x', 'd', 'p', 'c', 0}

const protocolExperiment = 253 // RFC 3692

func (p *Probe) frame() (f [60]byte) {
	mac := packet.MulticastMAC(p.Group)
	copy(f[0:], mac[:])
	copy(f[6:], probeMAC[:])
	ip := f[14:]
	if p.Group.Is4() {
		binary.BigEndian.PutUint16(f[12:], unix.ETH_P_IP)
		ip[0], ip[8], ip[9] = 0x45, 1, protocolExperiment
		binary.BigEndian.PutUint16(ip[2:], 20)
		binary.BigEndian.PutUint16(ip[6:], 0x4000) // don't fragment
		copy(ip[12:], p.Source.AsSlice())
		copy(ip[16:], p.Group.AsSlice())
		sum := uint32(0)
		for i := 0; i < 20; i += 2 {
			sum += uint32(binary.BigEndian.Uint16(ip[i:]))
		}
		sum = sum&0xffff + sum>>16
		binary.BigEndian.PutUint16(ip[10:], ^uint16(sum&0xffff+sum>>16))
		return f
	}
	binary.BigEndian.PutUint16(f[12:], unix.ETH_P_IPV6)
	ip[0], ip[6], ip[7] = 0x60, protocolExperiment, 1
	copy(ip[8:], p.Source.AsSlice())
	copy(ip[24:], p.Group.AsSlice())
	return f
}
