package relay

import (
	"fmt"
	"strings"
	"time"

	"xdpcast/internal/control"
	"xdpcast/pkg/loader"
	"xdpcast/pkg/membership"
)

const (
	// silence is the time without packets after which a membership is called silent.
	silence = 10 * time.Second
	// querierPresent is how long a querier counts as present after its last query: the Group
	// Membership Interval with the default values (RFC 3376 section 8.4, RFC 3810 section 9.4),
	// after which a network without queries has forgotten its members.
	querierPresent = 260 * time.Second
)

// supervision is the state of queriers and versions at one time.
type supervision struct {
	now       time.Time
	igmp      map[int]int // IGMP version by interface index
	queriers  map[querierKey]loader.Querier
	described map[querierKey]control.Multicast // thousands of groups need the same
}

type querierKey struct {
	index int
	is4   bool
}

// supervise reads the versions from the kernel; without an answer they stay unknown.
func (r *Relay) supervise(heard []loader.Querier, now time.Time) *supervision {
	s := &supervision{now: now, queriers: map[querierKey]loader.Querier{}, described: map[querierKey]control.Multicast{}}
	for _, q := range heard {
		s.queriers[querierKey{q.Index, q.Family == 4}] = q
	}
	if err := r.igmp.refresh(now, r.memberships.manager.Len() > quickLen); err != nil {
		r.log.Debug("IGMP versions", "error", err)
	}
	s.igmp = r.igmp.byIndex
	return s
}

// igmpVersions is the kernel's last answer. Reading it is quadratic in the groups, some seconds with
// 100,000: then it is read less often, and beside the control loop.
type igmpVersions struct {
	byIndex map[int]int
	asked   time.Time
	took    time.Duration
	reading *igmpReading // nil: none is in progress
}

// igmpReading is a reading in a goroutine of its own, which closes done after setting the rest.
type igmpReading struct {
	table   *membership.IGMPTable
	byIndex map[int]int
	err     error
	took    time.Duration
	done    chan struct{}
}

// askedShare is the largest share of time spent reading, as 1/askedShare.
const askedShare = 100

// refresh reads the versions, unless that was recent relative to its cost. If many groups are joined
// the answer comes with a later call.
func (v *igmpVersions) refresh(now time.Time, many bool) (err error) {
	if r := v.reading; r != nil {
		select {
		case <-r.done:
			v.reading, v.took = nil, r.took
			if r.err == nil {
				v.byIndex = r.byIndex
			}
			return r.err
		default:
			return nil
		}
	}
	if now.Sub(v.asked) < askedShare*v.took {
		return nil
	}
	v.asked = now
	start := time.Now()
	if !many {
		v.byIndex, err = membership.IGMPVersions()
		v.took = time.Since(start)
		return err
	}
	table, err := membership.OpenIGMPTable()
	if err != nil {
		return err
	}
	r := &igmpReading{table: table, done: make(chan struct{})}
	v.reading = r
	go func() {
		defer close(r.done)
		r.byIndex, r.err = table.Versions()
		r.took = time.Since(start)
		_ = table.Close() // also by close
	}()
	return nil
}

// close ends a reading.
func (v *igmpVersions) close() {
	if v.reading != nil {
		_ = v.reading.table.Close()
		<-v.reading.done
		v.reading = nil
	}
}

func (s *supervision) multicast(ifname string, index int, is4 bool) control.Multicast {
	key := querierKey{index, is4}
	m, ok := s.described[key]
	if !ok {
		m = s.describe(ifname, key)
		s.described[key] = m
	}
	return m
}

func (s *supervision) describe(ifname string, key querierKey) (m control.Multicast) {
	q, heard := s.queriers[key]
	if heard {
		at := s.now.Add(-q.LastSeen)
		m.Querier, m.QuerierSeen, m.Queries = q.Address.String(), &at, q.Packets
	}
	if key.is4 {
		if version := s.igmp[key.index]; version != 0 {
			m.Version = fmt.Sprintf("IGMPv%d", version)
		}
		return m
	}
	hearsV1 := heard && q.Version == 1 && q.LastSeen < querierPresent
	m.Version = fmt.Sprintf("MLDv%d", membership.MLDVersion(ifname, hearsV1))
	return m
}

// describeMulticast adds the multicast state of interfaces that have any.
func (r *Relay) describeMulticast(byName map[string]*control.InterfaceStatus, heard []loader.Querier) {
	on := r.supervise(heard, time.Now())
	set := func(index int, is4 bool) {
		name := r.nameOf(index)
		s := byName[name]
		if s == nil {
			return
		}
		m := on.multicast(name, index, is4)
		if is4 {
			s.IGMP = &m
		} else {
			s.MLD = &m
		}
	}
	seen := map[querierKey]bool{}
	for key := range families(r.plan) {
		seen[key] = true
	}
	for key := range on.queriers {
		seen[key] = true
	}
	for key := range seen {
		set(key.index, key.is4)
	}
}

// detail describes a membership in one line. Hearing no querier is normal between two hosts; behind
// a snooping switch it is why packets stop.
func detail(g control.Group, now time.Time) string {
	if g.State != control.GroupJoined {
		return notJoined(g, now)
	}
	parts := []string{"joined"}
	last := g.Since
	if g.LastPacket != nil {
		last = g.LastPacket
	}
	switch age := since(now, last); {
	case age >= silence:
		parts = append(parts, "silent for "+age.String())
	case g.LastPacket != nil:
		parts = append(parts, "receiving")
	default:
		parts = append(parts, "no packet yet")
	}
	switch age := since(now, g.QuerierSeen); {
	case g.QuerierSeen == nil:
		parts = append(parts, "no querier heard")
	case age >= querierPresent:
		parts = append(parts, fmt.Sprintf("querier %s not heard for %s", g.Querier, age))
	default:
		parts = append(parts, fmt.Sprintf("querier %s", g.Querier))
	}
	return strings.Join(parts, ", ")
}

func notJoined(g control.Group, now time.Time) string {
	text := g.State
	if g.Cause != "" {
		text += ": " + g.Cause
	}
	if g.Next != nil {
		text += fmt.Sprintf(" (next try in %s)", max(0, g.Next.Sub(now).Round(time.Second)))
	}
	return text
}

// since is the age of t in whole seconds; 0 for no time.
func since(now time.Time, t *time.Time) time.Duration {
	if t == nil {
		return 0
	}
	return max(0, now.Sub(*t).Truncate(time.Second))
}
