package traffic

import (
	"errors"
	"fmt"
	"math"
	"math/bits"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// MaxLegs is the maximum number of legs of a sender.
const MaxLegs = 4

// Leg is a path for a sender's packets, with its impairments. Legs carry the same packets, byte for
// byte.
type Leg struct {
	Target
	// Delay is added to the send time of each packet.
	Delay time.Duration
	// Loss is the share of packets that are dropped, 0 to 1, Reorder the share of those sent after
	// the three that follow them. SendConfig.Seed determines which ones.
	Loss, Reorder float64
}

const (
	reorderBy  = 3         // packets
	maxLegWait = 1 << 24   // maximum packets between the legs
	minLegWait = 1 << 12   // more than one system call sends
	saltLoss   = 0x5deece6 // selects the random decision
	saltMoved  = 0x1b873593
)

// draw is a pseudo-random number from 0 to 1 for a packet on a leg, determined by the seed.
func draw(seed, salt uint64, leg int, index uint64) float64 {
	// The mixer of SplitMix64.
	x := seed + (index*MaxLegs+uint64(leg)+1)*fillFactor + salt<<32
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return float64((x^x>>31)>>11) / (1 << 53)
}

// leftOut says whether a leg drops a packet.
func (c *SendConfig) leftOut(leg int, index uint64) bool {
	if c.Legs == nil || draw(c.Seed, saltLoss, leg, index) >= c.Legs[leg].Loss {
		return false
	}
	return !c.Repairable || index%uint64(len(c.Legs)) != uint64(leg) || !c.onNoLeg(index)
}

// onNoLeg says whether all legs would drop a packet.
func (c *SendConfig) onNoLeg(index uint64) bool {
	for leg := range c.Legs {
		if draw(c.Seed, saltLoss, leg, index) >= c.Legs[leg].Loss {
			return false
		}
	}
	return len(c.Legs) > 0
}

func (c *SendConfig) checkLegs() error {
	if c.Legs == nil {
		return nil
	}
	if len(c.Legs) > MaxLegs {
		return fmt.Errorf("%d legs: must be 1 to %d", len(c.Legs), MaxLegs)
	}
	for i, l := range c.Legs {
		switch {
		case l.Loss < 0 || l.Loss > 1 || l.Reorder < 0 || l.Reorder > 1 || math.IsNaN(l.Loss+l.Reorder):
			return fmt.Errorf("leg %s: loss and reordering must be from 0%% to 100%%", l.Target)
		case l.Delay < 0:
			return fmt.Errorf("leg %s: delay %s: must not be negative", l.Target, l.Delay)
		case l.Delay > 0 && c.Rate.Value == 0:
			return fmt.Errorf("leg %s: delay %s: must have a rate, not max", l.Target, l.Delay)
		case l.Delay.Seconds()*c.Rate.packets(c.Size) > maxLegWait:
			return fmt.Errorf("leg %s: delay %s: must be within %d packets", l.Target, l.Delay, maxLegWait)
		case slices.ContainsFunc(c.Legs[:i], func(o Leg) bool { return o.Target == l.Target }):
			return fmt.Errorf("leg %s: given twice", l.Target)
		}
	}
	return nil
}

// maxDelay is the largest delay of a leg.
func (c *SendConfig) maxDelay() (d time.Duration) {
	for _, l := range c.Legs {
		d = max(d, l.Delay)
	}
	return d
}

// leg is the state of a leg; a sender without legs has one. Only Run uses it, except the fields
// guarded by the Sender's mutex.
type leg struct {
	Leg
	number  int
	fd      int
	targets []Target
	names   []unix.RawSockaddrInet6 // of targets
	msgs    *mmsgs
	next    uint64   // the next packet to decide on
	queue   []uint64 // due packets, in send order
	held    []uint64 // packets to send after others
	trouble troubles
	wait    time.Duration // until the next packet, if early

	// Guarded by Sender.mu.
	sent, out, moved uint64
}

// take queues the packets before due that fit into a batch.
func (s *Sender) take(l *leg, due uint64) {
	for len(l.queue) < s.cfg.Batch {
		if len(l.held) > 0 && (l.next > l.held[0]+reorderBy || l.next >= s.limit) {
			l.queue = append(l.queue, l.held[0])
			l.held = append(l.held[:0], l.held[1:]...)
			continue
		}
		if l.next >= due {
			return
		}
		index := l.next
		if l.early(s, index) {
			return
		}
		l.next++
		if s.cfg.Legs != nil {
			s.stamp(index)
		}
		switch {
		case s.cfg.leftOut(l.number, index):
			l.out++
		case l.Reorder > 0 && draw(s.cfg.Seed, saltMoved, l.number, index) < l.Reorder:
			l.held = append(l.held, index)
			l.moved++
		default:
			l.queue = append(l.queue, index)
		}
	}
}

// early says whether a leg must wait for a packet that another leg has sent later than it was due,
// and records until when.
func (l *leg) early(s *Sender, index uint64) bool {
	if l.Delay == 0 || index >= s.taken {
		return false
	}
	at := time.Unix(0, s.stamps[index&uint64(len(s.stamps)-1)]).Add(l.Delay)
	l.wait = time.Until(at)
	return l.wait > 0
}

// stamp records when a packet is first sent, so that its copies on other legs are identical.
func (s *Sender) stamp(index uint64) {
	if index < s.taken {
		return
	}
	s.taken = index + 1
	s.stamps[index&uint64(len(s.stamps)-1)] = time.Now().UnixNano()
	if !s.cfg.Repairable && s.cfg.onNoLeg(index) {
		s.onNone++
	}
}

// due is the first packet that a leg must not send yet.
func (s *Sender) due(l *leg, elapsed time.Duration) uint64 {
	due := min(s.pacer.due(elapsed-l.Delay), s.limit)
	if s.cfg.Legs == nil || elapsed < l.Delay {
		return min(due, s.limit)
	}
	// Keep the stamps of packets that another leg has yet to send.
	slowest := l.next
	for _, o := range s.legs {
		slowest = min(slowest, o.next)
		if len(o.queue) > 0 {
			slowest = min(slowest, o.queue[0])
		}
		if len(o.held) > 0 {
			slowest = min(slowest, o.held[0])
		}
	}
	return min(due, slowest+uint64(len(s.stamps)))
}

// stampsFor makes room for the packets between the first leg and the last.
func (c *SendConfig) stampsFor() []int64 {
	if c.Legs == nil {
		return nil
	}
	n := max(minLegWait, uint64((c.maxDelay()+c.MaxLag).Seconds()*c.Rate.packets(c.Size)))
	return make([]int64, min(uint64(1)<<bits.Len64(n), 2*maxLegWait))
}

// idle says that no queued packets remain on a leg.
func (l *leg) idle() bool { return len(l.queue) == 0 && len(l.held) == 0 }

// LegReport is what was sent on a leg.
type LegReport struct {
	Target  string `json:"target"`
	Packets uint64 `json:"packets"`
	// LeftOut packets were dropped on the leg; Reordered ones were sent after others that follow
	// them.
	LeftOut   uint64 `json:"left_out"`
	Reordered uint64 `json:"reordered"`
}

// ParseLegs parses comma-separated targets, and their impairments: comma-separated values, one for
// each leg, or one for all. A single delay applies to all legs but the first. Empty texts are none.
func ParseLegs(targets, loss, delay, reorder string) ([]Leg, error) {
	var legs []Leg
	for _, text := range strings.Split(targets, ",") {
		t, err := ParseTarget(text)
		if err != nil {
			return nil, err
		}
		legs = append(legs, Leg{Target: t})
	}
	set := func(name, text string, set func(l *Leg, value string) error) error {
		if text == "" {
			return nil
		}
		values := strings.Split(text, ",")
		if len(values) != 1 && len(values) != len(legs) {
			return fmt.Errorf("%s %q: must be one value, or one for each of %d legs", name, text, len(legs))
		}
		for i := range legs {
			value := values[min(i, len(values)-1)]
			if err := set(&legs[i], value); err != nil {
				return fmt.Errorf("%s %q: %w", name, value, err)
			}
		}
		return nil
	}
	err := errors.Join(
		set("loss", loss, func(l *Leg, value string) (err error) { l.Loss, err = ParseShare(value); return err }),
		set("delay", delay, func(l *Leg, value string) (err error) {
			if l.Delay, err = time.ParseDuration(value); err != nil || l.Delay < 0 {
				return errors.New("must be a time such as 20ms")
			}
			return nil
		}),
		set("reordering", reorder, func(l *Leg, value string) (err error) { l.Reorder, err = ParseShare(value); return err }),
	)
	if !strings.Contains(delay, ",") {
		legs[0].Delay = 0
	}
	return legs, err
}

// ParseShare parses a share from 0% to 100%.
func ParseShare(s string) (float64, error) {
	number, ok := strings.CutSuffix(s, "%")
	v, err := strconv.ParseFloat(number, 64)
	if !ok || err != nil || strings.Trim(number, "0123456789.") != "" || v > 100 {
		return 0, errors.New("must be from 0% to 100%, such as 1% or 0.5%")
	}
	return v / 100, nil
}
