package discover

import (
	"container/list"
	"net/netip"
	"slices"
	"time"

	"xdpcast/pkg/packet"
)

// streamKey identifies a stream of one interface.
type streamKey struct {
	vlan, outer   uint16
	source, group netip.Addr
	port          uint16
}

// counted is the state of a stream.
type counted struct {
	key            streamKey
	packets, bytes uint64
	ttl            uint8
	identity       identity
}

// table is the streams of one interface. Only its watcher uses it.
type table struct {
	ifname    string
	only      []netip.Prefix
	taken     *taken
	most      int        // maximum number of streams
	recent    *list.List // of *counted, most recently seen first
	streams   map[streamKey]*list.Element
	forgotten uint64
	fragments uint64
	sessions  sessions
}

func newTable(ifname string, most int, only []netip.Prefix, taken *taken) *table {
	return &table{ifname: ifname, only: only, taken: taken, most: most, recent: list.New(), streams: map[streamKey]*list.Element{}}
}

// see counts a frame if it is multicast. wire is its length before truncation.
func (t *table) see(frame []byte, wire int) {
	if h, ok := packet.Parse(frame); ok {
		if !t.wants(h.Dst) {
			return
		}
		if h.Part == packet.LaterFragment {
			t.fragments++
			return
		}
		payload := frame[h.Payload:min(len(frame), h.L3+h.L3Len)]
		c := t.count(streamKey{h.VLAN, h.OuterVLAN, h.Src, h.Dst, h.DstPort}, wire, ttlOf(frame, &h))
		if h.Part == packet.Whole {
			c.identity.see(payload, h.DstPort, c.packets)
			if c.identity.kind == SAP {
				t.sessions.see(payload, t.ifname, h.VLAN, h.OuterVLAN)
			}
		}
		return
	}
	if m, ok := parseControl(frame); ok && t.wants(m.dst) {
		c := t.count(streamKey{m.vlan, m.outer, m.src, m.dst, 0}, wire, m.ttl)
		c.identity.control(m)
	}
}

func (t *table) wants(dst netip.Addr) bool {
	return dst.IsMulticast() && (len(t.only) == 0 || slices.ContainsFunc(t.only, func(p netip.Prefix) bool { return p.Contains(dst) }))
}

// count finds a stream, or adds one, evicting the least recently seen one if the table is full.
func (t *table) count(k streamKey, wire int, ttl uint8) *counted {
	at := t.streams[k]
	if at == nil {
		if len(t.streams) >= t.most {
			oldest := t.recent.Back()
			delete(t.streams, t.recent.Remove(oldest).(*counted).key)
			t.forgotten++
		}
		at = t.recent.PushFront(&counted{key: k})
		t.streams[k] = at
	}
	t.recent.MoveToFront(at)
	c := at.Value.(*counted)
	c.packets++
	c.bytes += uint64(wire)
	c.ttl = ttl
	return c
}

// list returns the streams that no rule takes.
func (t *table) list(took time.Duration) (all []Stream) {
	seconds := max(took, time.Millisecond).Seconds()
	for at := t.recent.Back(); at != nil; at = at.Prev() {
		c := at.Value.(*counted)
		k := c.key
		s := Stream{
			Interface: t.ifname, VLAN: k.vlan, OuterVLAN: k.outer, Source: k.source, Group: k.group, Port: k.port,
			Packets: c.packets, Bytes: c.bytes, PacketRate: float64(c.packets) / seconds, BitRate: float64(c.bytes) * 8 / seconds, TTL: c.ttl,
			Looks: c.identity.looks(),
		}
		if s.Port == 0 || !t.taken.by(s.Input()) {
			all = append(all, s)
		}
	}
	return all
}
