package control

import "time"

// StreamStatus is what has become of the stream that several inputs carry.
type StreamStatus struct {
	// Expected counts the numbers that there were since the stream began, and Lost those of them that
	// came by no input; numbers that are still to come are among them, for as long as the inputs
	// are apart. Both are 0 with failover.
	Expected uint64 `json:"expected"`
	Lost     uint64 `json:"lost"`
	// Restarts counts how often the sender began again, or with failover how often another input
	// was taken.
	Restarts uint64 `json:"restarts"`
	// Alarms say in a line each what somebody should look after.
	Alarms []string `json:"alarms,omitempty"`
}

// LegStatus is what one of several inputs has brought.
type LegStatus struct {
	// Relayed is set for an input whose packets go out: with merge all, with failover one.
	Relayed bool `json:"relayed"`
	// Won counts the packets that were relayed, and Share is their part of all that were, 0 to 1.
	Won   uint64  `json:"won"`
	Share float64 `json:"share"`
	// Lost counts the numbers that the input did not bring, Doubled those that it brought again,
	// and Reordered those that came behind a later one.
	Lost      uint64 `json:"lost"`
	Doubled   uint64 `json:"doubled"`
	Reordered uint64 `json:"reordered"`
	// Resets counts jumps of the numbers, and Senders changes of the sender.
	Resets  uint64 `json:"resets"`
	Senders uint64 `json:"senders"`
	// Different counts copies that are another packet than the one that was relayed with their
	// number; one number in 64 is looked at.
	Different uint64 `json:"different"`
	// Unnumbered counts packets without a number of their own: heartbeats, RTCP, others.
	Unnumbered uint64 `json:"unnumbered"`
	// Behind is how many numbers the input's last one is behind the newest one, and Bound how far
	// that may go: beyond, its numbers cannot be told from later ones. 0 with failover.
	Behind uint64 `json:"behind"`
	Bound  uint64 `json:"bound"`
	// LastSeen is when the last packet came, nil when none did.
	LastSeen *time.Time `json:"last_seen,omitempty"`
}
