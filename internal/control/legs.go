package control

import "time"

// StreamStatus is the state of a stream with several inputs, or of one with health=.
type StreamStatus struct {
	// Expected counts the numbers since the stream began, and Lost those that no input delivered within
	// the skew. Both are 0 without merge.
	Expected uint64 `json:"expected"`
	Lost     uint64 `json:"lost"`
	// Restarts counts restarts of the sender, or with failover changes of the active input.
	Restarts uint64 `json:"restarts"`
	// Alarms are problems that need attention, one line each.
	Alarms []string `json:"alarms,omitempty"`
}

// Values of LegStatus.JitterBy.
const (
	JitterByTimestamps = "timestamps" // of RTP, whose clock is known
	JitterByGaps       = "gaps"       // the mean time between packets
)

// LegStatus is the state of one of several inputs, or of one with health=.
type LegStatus struct {
	// Relayed is set if the input's packets are sent: with merge for all inputs, with failover for
	// one.
	Relayed bool `json:"relayed"`
	// Won counts the relayed packets of this input, and Share is their share of all relayed ones, 0
	// to 1.
	Won   uint64  `json:"won"`
	Share float64 `json:"share"`
	// Lost counts the numbers missing on this input, Doubled those that it delivered again, and
	// Reordered those after a later one.
	Lost      uint64 `json:"lost"`
	Doubled   uint64 `json:"doubled"`
	Reordered uint64 `json:"reordered"`
	// Resets counts jumps of the numbers, and Senders changes of the sender.
	Resets  uint64 `json:"resets"`
	Senders uint64 `json:"senders"`
	// Different counts copies that differ from the relayed packet with their number; one number in
	// 64 is compared.
	Different uint64 `json:"different"`
	// Unnumbered counts packets without a number of their own: heartbeats, RTCP, others.
	Unnumbered uint64 `json:"unnumbered"`
	// Behind is how far the input's last number is behind the newest one, and Bound the limit of
	// that: beyond, its numbers cannot be told from later ones. 0 with failover.
	Behind uint64 `json:"behind"`
	Bound  uint64 `json:"bound"`
	// Jitter is the interarrival jitter in seconds (RFC 3550 section A.8), and JitterBy its reference;
	// empty until it is known.
	Jitter   float64 `json:"jitter_seconds"`
	JitterBy string  `json:"jitter_by,omitempty"`
	// Lag is the mean delay after the first copy of a number, in seconds, over samples of the last
	// packets; up to 2 seconds are measured, and Behind shows more.
	Lag float64 `json:"lag_seconds"`
	// LastSeen is the time of the last packet, nil if there was none.
	LastSeen *time.Time `json:"last_seen,omitempty"`
}
