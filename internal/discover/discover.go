// Package discover finds the multicast streams that arrive on an interface and match no rule: their
// senders, groups, rates and formats.
//
// It reads from a packet socket (package fanout), after the XDP programs: packets that the relay
// takes in the kernel never get there, so neither slows the other. Packets of rules on the path
// fanout do, and are excluded by the rules' inputs.
package discover

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"xdpcast/pkg/fanout"
	"xdpcast/pkg/membership"
	"xdpcast/pkg/packet"
	"xdpcast/pkg/rules"
)

// MaxStreams bounds the streams that are kept; beyond it, those silent for the longest are
// forgotten.
const MaxStreams = 100_000

// Interface is an interface to watch.
type Interface struct {
	Name  string
	Index int
}

// Options say what to watch, and for how long.
type Options struct {
	Interfaces []Interface
	For        time.Duration
	// Join lists prefixes of groups to join on each interface during the watch, so that the network
	// delivers them; at most MaxJoin groups of each.
	Join []netip.Prefix
	// Only restricts the watch to these destinations; empty for all.
	Only []netip.Prefix
	// Passive leaves the devices as they are: groups that they filter out are not seen.
	Passive bool
	// Taken lists the inputs of rules, whose packets are ignored.
	Taken []rules.Input
	// MaxStreams is for tests; 0: MaxStreams.
	MaxStreams int
}

// MaxJoin is the maximum number of groups joined of one prefix.
const MaxJoin = 4096

// Stream is the traffic of one sender to one group and port.
type Stream struct {
	Interface string     `json:"interface"`
	VLAN      uint16     `json:"vlan,omitempty"`
	OuterVLAN uint16     `json:"outer_vlan,omitempty"`
	Source    netip.Addr `json:"source"`
	Group     netip.Addr `json:"group"`
	// Port is the UDP destination port; 0 for IGMP and MLD.
	Port    uint16 `json:"port,omitempty"`
	Packets uint64 `json:"packets"`
	Bytes   uint64 `json:"bytes"` // of whole frames
	// PacketRate and BitRate are per second, averaged over the whole watch.
	PacketRate float64 `json:"packets_per_second"`
	BitRate    float64 `json:"bits_per_second"`
	TTL        uint8   `json:"ttl"` // or hop limit, of the last packet
	Looks
}

// Result is the result of Watch.
type Result struct {
	Seconds float64 `json:"seconds"`
	// Streams are sorted by interface, group, port and source.
	Streams []Stream `json:"streams"`
	// Sessions are those announced (SAP), whether or not their streams arrived.
	Sessions []Session `json:"sessions"`
	// Missed counts packets that arrived faster than they could be read, which the rates lack;
	// Forgotten counts streams beyond MaxStreams.
	Missed    uint64 `json:"missed"`
	Forgotten uint64 `json:"forgotten"`
	// Fragments counts later fragments of datagrams, which carry no ports and are in no stream's
	// rate; Unkept counts announcements of sessions beyond MaxSessions.
	Fragments uint64 `json:"fragments"`
	Unkept    uint64 `json:"unkept"`
}

// multicastFilter passes frames whose destination MAC has the group bit, on devices with an
// Ethernet header.
var multicastFilter = []unix.SockFilter{
	{Code: unix.BPF_LD | unix.BPF_B | unix.BPF_ABS},
	{Code: unix.BPF_JMP | unix.BPF_JSET | unix.BPF_K, K: 1, Jf: 1},
	{Code: unix.BPF_RET | unix.BPF_K, K: 0xffff},
	{Code: unix.BPF_RET | unix.BPF_K},
}

// Watch watches the interfaces until the time is up or the context ends, which is no error. It
// opens sockets in the calling thread's network namespace.
func Watch(ctx context.Context, o Options) (r Result, err error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	ctx, cancel := context.WithTimeout(ctx, o.For)
	defer cancel()
	release, err := hold(o)
	if err != nil {
		return r, err
	}
	defer func() { err = errors.Join(err, release()) }()
	taken := newTaken(o.Taken)
	most := cmp.Or(o.MaxStreams, MaxStreams) / len(o.Interfaces)
	var groups []*fanout.Group
	defer func() {
		for _, g := range groups {
			err = errors.Join(err, g.Close())
		}
	}()
	var watchers []*watcher
	for _, i := range o.Interfaces {
		g, err := fanout.Open(fanout.Options{Interface: i.Name, Index: i.Index, Filter: fanout.Filter{Classic: multicastFilter}, Blocks: 256})
		if err != nil {
			return r, err
		}
		groups = append(groups, g)
		if !g.Ethernet() { // frames begin with the IP header
			if err := g.SetFilter(fanout.Filter{}); err != nil {
				return r, err
			}
		}
		watchers = append(watchers, &watcher{group: g, ethernet: g.Ethernet(), table: newTable(i.Name, max(1, most), o.Only, taken)})
	}
	begin := time.Now()
	stop := context.AfterFunc(ctx, func() {
		for _, g := range groups {
			g.Workers()[0].Wake()
		}
	})
	defer stop()
	ends := make(chan error, len(watchers))
	for _, w := range watchers {
		go func() { ends <- w.run(ctx) }()
	}
	for range watchers {
		if end := <-ends; end != nil {
			err = errors.Join(err, end)
			cancel() // ends the others, too
		}
	}
	return collect(watchers, time.Since(begin)), err
}

// hold makes the devices receive all groups, and joins those of o.Join. release undoes both.
func hold(o Options) (release func() error, err error) {
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("packet socket: %w", err)
	}
	m := membership.New(membership.Options{})
	release = func() error { return errors.Join(m.Close(), unix.Close(fd)) }
	defer func() {
		if err != nil {
			err = errors.Join(err, release())
		}
	}()
	for _, i := range o.Interfaces {
		// Lasts until the socket is closed. A device without a filter receives everything anyway.
		mreq := unix.PacketMreq{Ifindex: int32(i.Index), Type: unix.PACKET_MR_ALLMULTI}
		if o.Passive {
			continue
		}
		if err := unix.SetsockoptPacketMreq(fd, unix.SOL_PACKET, unix.PACKET_ADD_MEMBERSHIP, &mreq); err != nil {
			return nil, fmt.Errorf("interface %s: take all groups: %w", i.Name, err)
		}
		for _, prefix := range o.Join {
			for group, n := prefix.Masked().Addr(), 0; prefix.Contains(group) && n < MaxJoin; group, n = group.Next(), n+1 {
				if err := m.Join(membership.Membership{Interface: i.Name, Index: i.Index, Group: group}); err != nil {
					return nil, err
				}
			}
		}
	}
	return release, nil
}

// watcher watches one interface.
type watcher struct {
	group    *fanout.Group
	ethernet bool
	table    *table
}

// run reads frames until the context ends.
func (w *watcher) run(ctx context.Context) error {
	worker := w.group.Workers()[0]
	var frame fanout.Frame
	for ctx.Err() == nil {
		block, err := worker.Wait()
		switch {
		case errors.Is(err, fanout.ErrWoken), errors.Is(err, os.ErrClosed):
			continue
		case errors.Is(err, unix.ENETDOWN):
			continue // resumes when the interface is up again
		case err != nil:
			return err
		}
		for block.Next(&frame) {
			if w.ethernet {
				frame.RestoreVLAN()
				w.table.see(frame.Data, frame.WireLen)
			} else if bare := withHeader(frame.Data); bare != nil {
				w.table.see(bare, frame.WireLen)
			}
		}
		block.Release()
	}
	return nil
}

// withHeader prepends an Ethernet header to an IP packet; nil for anything else.
func withHeader(ip []byte) []byte {
	if len(ip) == 0 {
		return nil
	}
	frame := make([]byte, 14, 14+len(ip))
	switch ip[0] >> 4 {
	case 4:
		frame[12], frame[13] = 0x08, 0x00
	case 6:
		frame[12], frame[13] = 0x86, 0xdd
	default:
		return nil
	}
	return append(frame, ip...)
}

// collect merges the results of the watchers.
func collect(watchers []*watcher, took time.Duration) Result {
	r := Result{Seconds: took.Seconds(), Streams: []Stream{}, Sessions: []Session{}}
	for _, w := range watchers {
		if stats, err := w.group.Stats(); err == nil {
			r.Missed += stats[0].Dropped
		}
		r.Forgotten += w.table.forgotten
		r.Fragments += w.table.fragments
		r.Unkept += w.table.sessions.unkept
		r.Streams = append(r.Streams, w.table.list(took)...)
		r.Sessions = append(r.Sessions, w.table.sessions.list()...)
	}
	slices.SortFunc(r.Streams, func(a, b Stream) int {
		return cmp.Or(cmp.Compare(a.Interface, b.Interface), a.Group.Compare(b.Group), cmp.Compare(a.Port, b.Port), a.Source.Compare(b.Source),
			cmp.Compare(a.OuterVLAN, b.OuterVLAN), cmp.Compare(a.VLAN, b.VLAN))
	})
	return r
}

// Input returns the stream as the input of a rule.
func (s *Stream) Input() rules.Input {
	return rules.Input{Interface: s.Interface, Address: s.Group, Port: s.Port, Source: s.Source, VLAN: rules.VLAN{ID: s.VLAN, Outer: s.OuterVLAN}}
}

// taken knows which streams rules take.
type taken struct {
	exact map[rules.Input][]rules.Input // by interface, group, port and VLAN
	wide  []rules.Input                 // prefixes, any ports, patterns
}

func newTaken(inputs []rules.Input) *taken {
	t := &taken{exact: map[rules.Input][]rules.Input{}}
	for _, in := range inputs {
		if _, pattern := rules.IsPattern(in.Interface); pattern || in.Len != 0 || in.Port == 0 || in.PortTo != 0 {
			t.wide = append(t.wide, in)
			continue
		}
		k := exactKey(in)
		t.exact[k] = append(t.exact[k], in)
	}
	return t
}

func exactKey(in rules.Input) rules.Input {
	return rules.Input{Interface: in.Interface, Address: in.Address, Port: in.Port, VLAN: in.VLAN}
}

// by reports whether a rule takes a stream.
func (t *taken) by(stream rules.Input) bool {
	overlaps := func(in rules.Input) bool { return !in.FromHost && in.Overlaps(stream) }
	return slices.ContainsFunc(t.exact[exactKey(stream)], overlaps) || slices.ContainsFunc(t.wide, overlaps)
}

// ttlOf returns the TTL or hop limit of a parsed frame.
func ttlOf(frame []byte, h *packet.Headers) uint8 {
	if h.Dst.Is4() {
		return frame[h.L3+8]
	}
	return frame[h.L3+7]
}
