package traffic

import (
	"fmt"
	"net/netip"
)

// SendReport is the result of a sender.
type SendReport struct {
	// Target is that of the first leg, if there are several.
	Target string `json:"target"`
	Groups int    `json:"groups"`
	// Stream is the run's stream id, in hexadecimal.
	Stream string `json:"stream"`
	// SizeBytes is the UDP payload of one packet.
	SizeBytes int `json:"size_bytes"`
	// Numbers is the format of the additional numbers, empty for none.
	Numbers string `json:"numbers,omitempty"`
	// Packets of the stream: a packet sent on several legs, or on none, counts once.
	Packets uint64 `json:"packets"`
	// OnNoLeg counts packets that all legs dropped.
	OnNoLeg uint64 `json:"on_no_leg,omitempty"`
	// Legs are in the order of the configuration; empty without legs.
	Legs []LegReport `json:"legs,omitempty"`
	// Bytes of UDP payload, on all legs.
	Bytes            uint64  `json:"bytes"`
	ElapsedNS        int64   `json:"elapsed_ns"`
	PacketsPerSecond float64 `json:"packets_per_second"`
	// BitsPerSecond counts UDP payload.
	BitsPerSecond float64 `json:"bits_per_second"`
	// BufferFull counts the times the socket or the device had no room (EAGAIN, ENOBUFS, ENOMEM).
	// The packet was sent later.
	BufferFull uint64 `json:"buffer_full"`
	// NetworkErrors counts the times the network refused (ECONNREFUSED, ENETUNREACH and the like).
	// The packet was sent later.
	NetworkErrors uint64 `json:"network_errors"`
	// BehindNS is how much of the schedule was abandoned because the rate could not be sustained.
	BehindNS int64 `json:"behind_ns"`
}

// Counters are the receiver's counters.
//
// Every datagram read is counted exactly once: Datagrams = Received + Duplicated + Stale + Corrupt
// + Foreign.
type Counters struct {
	Datagrams uint64 `json:"datagrams"`
	// Received counts numbered packets, each once.
	Received uint64 `json:"received"`
	// Bytes is the UDP payload of the received packets.
	Bytes uint64 `json:"bytes"`
	// Lost counts missing numbers. With an expected number of packets, a finished receiver also
	// counts those missing at the end.
	Lost       uint64 `json:"lost"`
	Duplicated uint64 `json:"duplicated"`
	// Reordered packets arrived after one with a higher number; they also count as received.
	Reordered uint64 `json:"reordered"`
	// Repaired and Late packets are reordered ones that filled a gap, in time or not: see
	// RecvConfig.Late.
	Repaired uint64 `json:"repaired"`
	Late     uint64 `json:"late"`
	// Stale packets are too old to tell late ones from duplicates.
	Stale uint64 `json:"stale"`
	// Corrupt packets were changed in transit. Their numbers are not trustworthy, so they do not
	// count as received and also show as lost.
	Corrupt uint64 `json:"corrupt"`
	// Foreign datagrams are not numbered packets, or have another version.
	Foreign uint64 `json:"foreign"`
	// Surplus is how many more packets than expected were received.
	Surplus uint64 `json:"surplus"`
	// SocketDrops counts the datagrams that the kernel dropped at the receiver's own socket: its
	// buffer was full, or the UDP checksum was wrong. Numbered ones among them also show as lost.
	SocketDrops uint64 `json:"socket_drops"`
	// Wrong counts received packets with an unexpected field.
	Wrong Wrong `json:"wrong"`
}

// Wrong counts packets by unexpected field.
type Wrong struct {
	TTL        uint64 `json:"ttl"`
	Source     uint64 `json:"source"`
	SourcePort uint64 `json:"source_port"`
	DSCP       uint64 `json:"dscp"`
}

// Fields are the header fields of one packet.
type Fields struct {
	// Source is the source address and port of the packet.
	Source netip.AddrPort `json:"source"`
	// TTL is the IPv4 TTL or the IPv6 hop limit.
	TTL  uint8 `json:"ttl"`
	DSCP uint8 `json:"dscp"`
}

// Latency is measured from the send time in the packet to the kernel's receive time.
type Latency struct {
	Samples uint64 `json:"samples"`
	// Negative counts packets that arrived before they were sent: the clocks differ.
	Negative uint64 `json:"negative"`
	MinNS    int64  `json:"min_ns"`
	MeanNS   int64  `json:"mean_ns"`
	P50NS    int64  `json:"p50_ns"`
	P90NS    int64  `json:"p90_ns"`
	P99NS    int64  `json:"p99_ns"`
	P999NS   int64  `json:"p99_9_ns"`
	MaxNS    int64  `json:"max_ns"`
}

// Flow is one flow of one sender as received by a group.
type Flow struct {
	// Stream is the sender's stream id, in hexadecimal; for another sender's packets its SSRC or
	// session, with Flow 2^32 - 1.
	Stream string `json:"stream"`
	Flow   uint32 `json:"flow"`
	// FirstSeq and HighestSeq continue when the numbers of a format wrap.
	FirstSeq   uint64 `json:"first_seq"`
	HighestSeq uint64 `json:"highest_seq"`
	Received   uint64 `json:"received"`
	Lost       uint64 `json:"lost"`
}

// GroupReport is what one group, or unicast address, received.
type GroupReport struct {
	Endpoint string `json:"endpoint"`
	Counters
	Latency Latency `json:"latency"`
	// RepairTime is the time from detecting a gap to filling it; nil if none was filled.
	RepairTime *Latency `json:"repair_time,omitempty"`
	// LongestGapNS is the longest time between two packets.
	LongestGapNS int64 `json:"longest_gap_ns"`
	// Last is of the latest packet; nil if there was none.
	Last *Fields `json:"last,omitempty"`
	// LastWrong is of the latest packet with a wrong field.
	LastWrong *Fields `json:"last_wrong,omitempty"`
	// Flows are the recently active flows, sorted.
	Flows []Flow `json:"flows"`
}

// RecvReport is the result of a receiver.
type RecvReport struct {
	// Finished says that Run has returned and that the figures are final.
	Finished  bool  `json:"finished"`
	ElapsedNS int64 `json:"elapsed_ns"`
	// SpanNS is from the first to the last packet.
	SpanNS int64 `json:"span_ns"`
	// PacketsPerSecond and BitsPerSecond (UDP payload) are over the span.
	PacketsPerSecond float64 `json:"packets_per_second"`
	BitsPerSecond    float64 `json:"bits_per_second"`
	// SocketBufferBytes is what the kernel granted each socket.
	SocketBufferBytes int           `json:"socket_buffer_bytes"`
	Total             Counters      `json:"total"`
	Latency           Latency       `json:"latency"`
	Groups            []GroupReport `json:"groups"`
}

// IntervalReport covers the time since the previous report, plus the totals.
type IntervalReport struct {
	ElapsedNS        int64    `json:"elapsed_ns"`
	IntervalNS       int64    `json:"interval_ns"`
	Received         uint64   `json:"received"`
	PacketsPerSecond float64  `json:"packets_per_second"`
	BitsPerSecond    float64  `json:"bits_per_second"`
	Latency          Latency  `json:"latency"`
	Total            Counters `json:"total"`
}

// Faults lists the reasons for a strict receiver to fail, one phrase each: packets that are lost,
// duplicated, corrupt, dropped, surplus or with a wrong field, and groups that received nothing. It
// is empty if there are none.
func (r RecvReport) Faults() []string {
	var faults []string
	for _, f := range []struct {
		name string
		n    uint64
	}{
		{"lost", r.Total.Lost},
		{"duplicated", r.Total.Duplicated},
		{"later than the receiver tolerates", r.Total.Late},
		{"too late to judge", r.Total.Stale},
		{"corrupt", r.Total.Corrupt},
		{"more than expected", r.Total.Surplus},
		{"dropped by the receiver's socket", r.Total.SocketDrops},
		{"with a wrong ttl", r.Total.Wrong.TTL},
		{"with a wrong source address", r.Total.Wrong.Source},
		{"with a wrong source port", r.Total.Wrong.SourcePort},
		{"with a wrong dscp", r.Total.Wrong.DSCP},
	} {
		if f.n > 0 {
			faults = append(faults, fmt.Sprintf("%d %s", f.n, f.name))
		}
	}
	return append(faults, r.silent()...)
}

func (r RecvReport) silent() []string {
	var count int
	var first string
	for _, g := range r.Groups {
		if g.Received > 0 {
			continue
		}
		if count++; count == 1 {
			first = g.Endpoint
		}
	}
	switch {
	case count == 0:
		return nil
	case count == len(r.Groups):
		return []string{"nothing received"}
	}
	return []string{fmt.Sprintf("nothing received on %d of %d groups, such as %s", count, len(r.Groups), first)}
}

// Add adds the counters of another group or receiver.
func (c *Counters) Add(o Counters) {
	c.Datagrams += o.Datagrams
	c.Received += o.Received
	c.Bytes += o.Bytes
	c.Lost += o.Lost
	c.Duplicated += o.Duplicated
	c.Reordered += o.Reordered
	c.Repaired += o.Repaired
	c.Late += o.Late
	c.Stale += o.Stale
	c.Corrupt += o.Corrupt
	c.Foreign += o.Foreign
	c.Surplus += o.Surplus
	c.SocketDrops += o.SocketDrops
	c.Wrong.TTL += o.Wrong.TTL
	c.Wrong.Source += o.Wrong.Source
	c.Wrong.SourcePort += o.Wrong.SourcePort
	c.Wrong.DSCP += o.Wrong.DSCP
}
