package live

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Window is how far behind the highest number of its flow a frame may come and still be told from
// one that came before.
const Window = 1<<24 - 64

// WitnessOptions configure a [Witness].
type WitnessOptions struct {
	// Group and Port are the frames' destination, after the relay.
	Group netip.Addr
	Port  int
	// Flows is the number of flows.
	Flows int
	// StampShift is that of the source. Stamps have 32 bits: they must not wrap while a frame
	// is under way. 10 is about a microsecond, and an hour.
	StampShift int
	// Legs are flows that count as one: each number comes on any of them.
	Legs bool
	// Arrivals is how many numbers of flow 0, from 0 on, have the time noted at which they came.
	Arrivals int
}

// Witness is an XDP program that keeps account of the frames of a source, on an interface with one
// receive queue. One goroutine at a time uses it.
type Witness struct {
	objs     witnessObjects
	flows    int
	arrivals int
}

// NewWitness loads the program and attaches it to the interface in the calling thread's network
// namespace, where it stays for the lifetime of that. The caller must Close it.
func NewWitness(ifname string, o WitnessOptions) (*Witness, error) {
	spec, err := loadWitness()
	if err != nil {
		return nil, err
	}
	legs := uint32(0)
	if o.Legs {
		legs, o.Flows = 1, 1
	}
	if err := SetVariables(spec.Variables, map[string]any{
		"legs": legs, "flows": uint32(o.Flows), "group": number(o.Group), "port": uint16(o.Port), "stamp_shift": uint32(o.StampShift),
	}); err != nil {
		return nil, err
	}
	spec.Maps["streams"].MaxEntries = uint32(o.Flows)
	spec.Maps["seen"].MaxEntries *= uint32(o.Flows)
	spec.Maps["arrivals"].MaxEntries = uint32(max(o.Arrivals, 1))
	w := &Witness{flows: o.Flows, arrivals: o.Arrivals}
	if err := spec.LoadAndAssign(&w.objs, nil); err != nil {
		return nil, fmt.Errorf("load witness: %w", err)
	}
	if err := Attach(ifname, w.objs.Witness); err != nil {
		return nil, errors.Join(err, w.Close())
	}
	return w, nil
}

// Attach attaches a program to an interface in the calling thread's network namespace, without a BPF
// link: it stays for the lifetime of the namespace.
func Attach(ifname string, p *ebpf.Program) error {
	i, err := net.InterfaceByName(ifname)
	if err != nil {
		return fmt.Errorf("interface %s: %w", ifname, err)
	}
	l, err := netlink.LinkByIndex(i.Index)
	if err != nil {
		return fmt.Errorf("interface %s: %w", ifname, err)
	}
	if err := netlink.LinkSetXdpFdWithFlags(l, p.FD(), unix.XDP_FLAGS_DRV_MODE); err != nil {
		return fmt.Errorf("attach to %s: %w", ifname, err)
	}
	return nil
}

// Close frees what the kernel does not need for the attachment.
func (w *Witness) Close() error { return w.objs.Close() }

// Expect makes a trial the one whose frames count, with numbers from any number on.
func (w *Witness) Expect(trial uint32) error {
	for flow := range uint32(w.flows) {
		if err := w.objs.Streams.Put(flow, witnessStream{}); err != nil {
			return fmt.Errorf("clear witness: %w", err)
		}
	}
	if w.arrivals > 0 {
		keys := make([]uint32, w.arrivals)
		for i := range keys {
			keys[i] = uint32(i)
		}
		if _, err := w.objs.Arrivals.BatchUpdate(keys, make([]uint64, w.arrivals), nil); err != nil {
			return fmt.Errorf("clear witness: %w", err)
		}
	}
	if err := errors.Join(w.objs.Wrongs.Put(uint32(0), witnessWrong{}), w.objs.Trial.Set(trial)); err != nil {
		return fmt.Errorf("clear witness: %w", err)
	}
	return nil
}

// Arrivals returns when each number of flow 0 came first, from 0 on, in time of CLOCK_MONOTONIC; 0 if it has
// not.
func (w *Witness) Arrivals() ([]time.Duration, error) {
	at := make([]time.Duration, max(w.arrivals, 1))
	var cursor ebpf.MapBatchCursor
	n, err := w.objs.Arrivals.BatchLookup(&cursor, make([]uint32, len(at)), at, nil)
	if err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return nil, fmt.Errorf("read witness: %w", err)
	}
	return at[:min(n, w.arrivals)], nil
}

// Seen is what came of a trial: exact counts.
type Seen struct {
	Packets   uint64 // each number once
	Doubled   uint64 // further frames with a number that had come
	Reordered uint64 // of Packets: behind a higher number
	Forgotten uint64 // more than Window behind: any of the above
	Checksum  uint64 // frames with a wrong checksum
	Address   uint64 // frames with another destination
	Stray     uint64 // frames of another trial
	// Longest is the longest time for which a flow stood still: between two packets, but not counting
	// the time before the second was sent, unless some between them are missing.
	Longest time.Duration
}

// Read returns what came so far.
func (w *Witness) Read() (all Seen, err error) {
	for flow := range uint32(w.flows) {
		var s witnessStream
		if err := w.objs.Streams.Lookup(flow, &s); err != nil {
			return all, fmt.Errorf("read witness: %w", err)
		}
		all.Packets += s.Packets
		all.Doubled += s.Doubled
		all.Reordered += s.Reordered
		all.Forgotten += s.Forgotten
		all.Longest = max(all.Longest, time.Duration(s.Longest))
	}
	var wrong witnessWrong
	if err := w.objs.Wrongs.Lookup(uint32(0), &wrong); err != nil {
		return all, fmt.Errorf("read witness: %w", err)
	}
	all.Checksum, all.Address, all.Stray = wrong.Checksum, wrong.Address, wrong.Stray
	return all, nil
}

// Refused returns how many frames the peer of a veth in the calling thread's network namespace did not
// take since it was made, since its ring was full: live and redirected frames, and those of sockets
// and of the stack (veth_get_stats64 of drivers/net/veth.c).
func Refused(ifname string) (frames uint64, err error) {
	l, err := netlink.LinkByName(ifname)
	if err != nil {
		return 0, fmt.Errorf("interface %s: %w", ifname, err)
	}
	if l.Type() != "veth" || l.Attrs().Statistics == nil {
		return 0, fmt.Errorf("interface %s of type %s: want a veth with statistics", ifname, l.Type())
	}
	return l.Attrs().Statistics.TxDropped, nil
}
