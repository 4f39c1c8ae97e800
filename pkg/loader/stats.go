package loader

import (
	"errors"
	"fmt"
	"iter"
	"maps"
	"os"
	"slices"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"xdpcast/bpf"
	"xdpcast/internal/account"
	"xdpcast/pkg/flow"
)

// Counter counts packets and the bytes of their frames as received.
type Counter struct {
	Packets, Bytes uint64
}

func (c *Counter) add(packets, bytes uint64) {
	c.Packets += packets
	c.Bytes += bytes
}

// Reason is why a packet, or one copy of it, was not sent.
type Reason uint8

// The reasons, as the programs count them (enum drop_reason of bpf/include/abi.h). NoDevice includes
// copies that the kernel skipped before the egress program ran.
const (
	Loop        = Reason(bpf.RelayDropReasonDROP_LOOP)
	TTL         = Reason(bpf.RelayDropReasonDROP_TTL)
	MTU         = Reason(bpf.RelayDropReasonDROP_MTU)
	MultiBuffer = Reason(bpf.RelayDropReasonDROP_MULTI_BUFFER)
	NotReady    = Reason(bpf.RelayDropReasonDROP_NOT_READY)
	NoNeighbour = Reason(bpf.RelayDropReasonDROP_NO_NEIGHBOUR)
	NoDevice    = Reason(bpf.RelayDropReasonDROP_NO_DEVICE)
	NoChecksum  = Reason(bpf.RelayDropReasonDROP_NO_CHECKSUM)
	Port        = Reason(bpf.RelayDropReasonDROP_PORT)
	Policed     = Reason(bpf.RelayDropReasonDROP_POLICED)
	NoSocket    = Reason(bpf.RelayDropReasonDROP_NO_SOCKET)
	TxFull      = Reason(bpf.RelayDropReasonDROP_TX_FULL)
	CPUFull     = Reason(bpf.RelayDropReasonDROP_CPU_FULL)
	NoCarrier   = Reason(bpf.RelayDropReasonDROP_NO_CARRIER)
	WorkerLost  = Reason(bpf.RelayDropReasonDROP_WORKER_LOST)
	Looping     = Reason(bpf.RelayDropReasonDROP_LOOPING)
	Duplicate   = Reason(bpf.RelayDropReasonDROP_DUPLICATE)
	Late        = Reason(bpf.RelayDropReasonDROP_LATE)
	Astray      = Reason(bpf.RelayDropReasonDROP_ASTRAY)
	OldSession  = Reason(bpf.RelayDropReasonDROP_OLD_SESSION)
	Contended   = Reason(bpf.RelayDropReasonDROP_CONTENDED)
	NoNumber    = Reason(bpf.RelayDropReasonDROP_NO_NUMBER)
	Standby     = Reason(bpf.RelayDropReasonDROP_STANDBY)
	Internal    = Reason(bpf.RelayDropReasonDROP_INTERNAL)
	reasons     = Reason(bpf.RelayDropReasonDROP_REASONS)
)

// ReasonOf is the drop reason for copies to a blocked output.
func ReasonOf(b flow.Blocked) Reason {
	switch b {
	case flow.NoNeighbour:
		return NoNeighbour
	case flow.NoCarrier:
		return NoCarrier
	}
	return NotReady
}

// blockedOf is the inverse of ReasonOf.
func blockedOf(r Reason) flow.Blocked {
	switch r {
	case NoNeighbour:
		return flow.NoNeighbour
	case NoCarrier:
		return flow.NoCarrier
	}
	return flow.NotReady
}

func (r Reason) String() string {
	switch r {
	case Loop:
		return "loop"
	case TTL:
		return "ttl"
	case MTU:
		return "mtu"
	case MultiBuffer:
		return "multi_buffer"
	case NotReady:
		return "not_ready"
	case NoNeighbour:
		return "no_neighbour"
	case NoDevice:
		return "no_device"
	case NoChecksum:
		return "no_checksum"
	case Port:
		return "port"
	case Policed:
		return "policed"
	case NoSocket:
		return "no_socket"
	case TxFull:
		return "tx_full"
	case CPUFull:
		return "cpu_full"
	case NoCarrier:
		return "no_carrier"
	case WorkerLost:
		return "worker_lost"
	case Looping:
		return "looping"
	case Duplicate:
		return "duplicate"
	case Late:
		return "late"
	case Astray:
		return "astray"
	case OldSession:
		return "old_session"
	case Contended:
		return "contended"
	case NoNumber:
		return "no_number"
	case Standby:
		return "standby"
	case Internal:
		return "internal"
	default:
		return fmt.Sprintf("reason_%d", uint8(r))
	}
}

// RuleStats are the statistics of one rule. For each output,
//
//	Matched = Sent + sum of Drops of the rule + sum of Drops of the output
//
// once no packet is in flight.
type RuleStats struct {
	Name    string
	ID      uint32
	Matched Counter
	// LastSeen is the age of the last match; negative if there was none.
	LastSeen time.Duration
	// Drops happened before the packet was copied, so every output missed it.
	Drops   map[Reason]Counter
	Outputs []OutputStats // by slot
	// Notes count notable packets that were not dropped.
	Notes map[Note]Counter
	// Leg and Stream are set for a rule that is one of several inputs, or that is watched.
	Leg    *LegStats
	Stream *StreamStats
}

// OutputStats are the statistics of one output's copies.
type OutputStats struct {
	Rule  flow.Output
	Sent  Counter // handed to the device
	Drops map[Reason]Counter
}

// DeviceStats counts frames that were handed to a device and lost there; the kernel does not report
// them per rule. TransmitDrops are those that the driver did not take; RedirectRefused those that
// met a device that was down, or were too long for it.
type DeviceStats struct {
	Index                          int
	TransmitDrops, RedirectRefused uint64
}

// Stats is one reading of all counters.
type Stats struct {
	Rules []RuleStats
	// Drops are the totals over all rules. The bytes of CPUFull, which is not counted per rule, are
	// unknown.
	Drops map[Reason]Counter
	// Passed counts packets on all interfaces that matched no rule, and PassedBroadcast those of
	// them that were IPv4 UDP in broadcast frames.
	Passed, PassedBroadcast Counter
	// Kept counts packets that rules of PathFanout withheld from the host's stack.
	Kept      Counter
	Fragments Fragments
	Devices   []DeviceStats
	// Queriers are those heard on interfaces since the program was attached.
	Queriers []Querier
}

// Fragments counts fragments of UDP datagrams by what was known of them.
type Fragments struct {
	First  Counter // of datagrams that matched a rule
	Later  Counter // followed their first fragment
	Orphan Counter // first fragment not seen before, or too long ago: left to the stack
}

func readFragments(m *ebpf.Map) (f Fragments, err error) {
	for kind, c := range map[bpf.RelayFragmentKind]*Counter{
		bpf.RelayFragmentKindFRAGMENT_FIRST:  &f.First,
		bpf.RelayFragmentKindFRAGMENT_LATER:  &f.Later,
		bpf.RelayFragmentKindFRAGMENT_ORPHAN: &f.Orphan,
	} {
		var perCPU []bpf.RelayCounter
		if err := m.Lookup(uint32(kind), &perCPU); err != nil {
			return f, fmt.Errorf("read map fragment_stats: %w", err)
		}
		*c = sum(perCPU)
	}
	return f, nil
}

// Stats reads the counters. It may be called while packets flow: each counter is exact, and packets
// in flight between two counters are missing.
func (l *Loader) Stats() (Stats, error) {
	entries := make([]*entry, 0, len(l.rules))
	for _, e := range l.rules {
		entries = append(entries, e)
	}
	return readStats(l.maps, entries, l.account, l.account.Settle, l.lost)
}

// StatsOf is like Stats for the named rules only; it omits those not in the kernel.
func (l *Loader) StatsOf(names []string) (Stats, error) {
	entries := make([]*entry, 0, len(names))
	for _, name := range names {
		if e := l.rules[name]; e != nil {
			entries = append(entries, e)
		}
	}
	return readStats(l.maps, entries, l.account, l.account.Settle, l.lost)
}

// Matched returns how many packets each rule matched on all paths, by name. It reads no other
// counter.
func (l *Loader) Matched() (map[string]uint64, error) {
	entries := make([]*entry, 0, len(l.rules))
	for _, e := range l.rules {
		entries = append(entries, e)
	}
	matched := make(map[string]uint64, len(entries))
	err := readRuleStats(l.maps, entries, func(i int, perCPU []bpf.RelayRuleStats) {
		e := entries[i]
		n := l.account.Sums(account.Target{Scope: account.Rule, ID: e.id})[account.Matched].Packets
		for _, c := range perCPU {
			n += c.Packets
		}
		matched[e.rule.Name] = n
	})
	return matched, err
}

// Reader reads pinned state without changing it, while another process may own it and change it: what
// it returns of a rule is one of the versions that were published, and no older than the read.
type Reader struct {
	pinDir string
	maps   *mapSet
}

// OpenReader opens the pinned state read-only; the caller must Close it. Errors to match:
// ErrNotLoaded, ErrSchema, ErrDamaged.
func OpenReader(pinDir string) (_ *Reader, err error) {
	if nothing, err := unbuilt(pinDir); nothing || errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("%w in %s", ErrNotLoaded, pinDir)
	}
	r := &Reader{pinDir: pinDir}
	if r.maps, err = openMaps(pinDir, true, nil); err != nil {
		return nil, err
	}
	if _, err = r.flows(); err != nil {
		return nil, errors.Join(err, r.Close())
	}
	return r, nil
}

// Close closes the file descriptors.
func (r *Reader) Close() error { return r.maps.Close() }

// Rules reads the published rules.
func (r *Reader) Rules() ([]flow.Flow, error) {
	entries, err := r.entries()
	if err != nil {
		return nil, err
	}
	rules := make([]flow.Flow, 0, len(entries))
	for _, e := range entries {
		rules = append(rules, *e.rule)
	}
	return rules, nil
}

// Stats reads the counters of the published rules.
func (r *Reader) Stats() (Stats, error) {
	entries, err := r.entries()
	if err != nil {
		return Stats{}, err
	}
	a, err := readAccount(r.maps.UserStats)
	if err != nil {
		return Stats{}, err
	}
	return readStats(r.maps, entries, a, func() {}, nil)
}

// readerTries is how often a Reader reads anew because the rules changed meanwhile.
const readerTries = 100

// entries reads the flow tables, what their entries refer to, and the tables again: rows that entries
// referred to all the time were not freed and used again in between (see transaction.retire).
func (r *Reader) entries() (entries []*entry, err error) {
	flows, err := r.flows()
	if err != nil {
		return nil, err
	}
	for range readerTries {
		entries, err = r.resolve(flows)
		again, readErr := r.flows()
		if readErr != nil {
			return nil, readErr
		}
		if slices.EqualFunc(flows, again, func(a, b flowEntry) bool { return a.equal(&b) }) {
			return entries, err
		}
		flows = again
	}
	return nil, fmt.Errorf("rules in %s changed during each of %d reads", r.pinDir, readerTries)
}

// flows reads the current flow tables.
func (r *Reader) flows() (_ []flowEntry, err error) {
	current, err := openTables(r.maps, r.pinDir, true)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, current.Close()) }()
	return current.read()
}

func (r *Reader) resolve(flows []flowEntry) ([]*entry, error) {
	pointed, err := readReferents(r.maps, flows)
	if err != nil {
		return nil, err
	}
	entries := make([]*entry, 0, len(flows))
	for _, flow := range flows {
		e, err := pointed.entry(flow)
		if err != nil {
			return nil, err
		}
		entries = append(entries, e)
	}
	return entries, nil
}

// readStats reads the counters. settle waits for counts that workers still hold; lost may be nil.
func readStats(m *mapSet, entries []*entry, a *account.Account, settle func(), lost losses) (Stats, error) {
	var s Stats
	var err error
	if s.Drops, err = readDrops(m.Drops); err != nil {
		return s, err
	}
	dropped, err := readCPUDrops(m.CpuDrops)
	if err != nil {
		return s, err
	}
	if dropped > 0 {
		s.Drops[CPUFull] = Counter{Packets: dropped}
	}
	if s.Passed, err = readTotal("passed", m.Passed, uint32(bpf.RelayPassedKindPASSED_ALL)); err != nil {
		return s, err
	}
	if s.PassedBroadcast, err = readTotal("passed", m.Passed, uint32(bpf.RelayPassedKindPASSED_BROADCAST)); err != nil {
		return s, err
	}
	if s.Kept, err = readTotal("kept", m.Kept, 0); err != nil {
		return s, err
	}
	if s.Fragments, err = readFragments(m.FragmentStats); err != nil {
		return s, err
	}
	s.addUser(a)
	if s.Devices, err = readDevices(m.DeviceStats); err != nil {
		return s, err
	}
	if s.Queriers, err = readQueriers(m.Queriers); err != nil {
		return s, err
	}
	tallies, err := readTallies(m, entries)
	if err != nil {
		return s, err
	}
	// Read each counter before those further along a packet's path: packets that arrive in between
	// then appear only in the later counters, and never look lost.
	for _, t := range tallies {
		t.readUser(a, true)
	}
	if err := readSinks(m, tallies); err != nil {
		return s, err
	}
	if slices.ContainsFunc(tallies, (*tally).missing) {
		// Perhaps only in flight: read again after they have arrived.
		waitForPrograms()
		settle()
		for _, t := range tallies {
			t.resetSinks()
			t.readUser(a, false)
		}
		if err := readSinks(m, tallies); err != nil {
			return s, err
		}
	}
	s.Rules = make([]RuleStats, len(tallies))
	for i, t := range tallies {
		for reason, c := range t.copies.drops { // the program counts them only per rule
			total := s.Drops[reason]
			total.add(c.Packets, c.Bytes)
			s.Drops[reason] = total
		}
		s.Rules[i] = t.stats(lost)
	}
	return s, nil
}

// addUser adds the workers' counts that cover all rules.
func (s *Stats) addUser(a *account.Account) {
	a.Each(func(t account.Target, kind account.Kind, w account.Writer, sum account.Sum) {
		var to *Counter
		switch {
		case kind >= account.FirstDrop:
			reason := Reason(kind - account.FirstDrop)
			total := s.Drops[reason]
			if total.add(sum.Packets, sum.Bytes); total.Packets > 0 {
				s.Drops[reason] = total
			}
			return
		case kind == account.FragmentFirst:
			to = &s.Fragments.First
		case kind == account.FragmentLater:
			to = &s.Fragments.Later
		case kind == account.FragmentOrphan:
			to = &s.Fragments.Orphan
		default:
			return
		}
		to.add(sum.Packets, sum.Bytes)
	})
}

// waitForPrograms returns after every packet that was in a program, or in a queue after it, has
// left: the kernel delays freeing what programs read for the same time (RCU), and membarrier(2)
// waits for it, too.
func waitForPrograms() {
	const membarrierCmdGlobal = 1 << 0 // include/uapi/linux/membarrier.h
	if _, _, errno := unix.Syscall(unix.SYS_MEMBARRIER, membarrierCmdGlobal, 0, 0); errno != 0 {
		time.Sleep(20 * time.Millisecond) // far longer than a packet is in flight
	}
}

// readRuleStats calls fn with the relay program's counters of each rule, by its index in entries.
func readRuleStats(m *mapSet, entries []*entry, fn func(i int, perCPU []bpf.RelayRuleStats)) error {
	ids := make([]uint32, len(entries))
	for i, e := range entries {
		ids[i] = e.id
	}
	if err := eachRow(m.RuleStats, ids, fn); err != nil {
		return fmt.Errorf("read map rule_stats: %w", err)
	}
	return nil
}

// readTallies reads the relay program's counters of matched packets.
func readTallies(m *mapSet, entries []*entry) ([]*tally, error) {
	tallies := make([]*tally, len(entries))
	err := readRuleStats(m, entries, func(i int, perCPU []bpf.RelayRuleStats) {
		e := entries[i]
		t := &tally{entry: e, out: make([]outputTally, len(e.rule.Out))}
		for _, c := range perCPU {
			t.matched.add(c.Packets, c.Bytes)
			t.handed.add(c.HandedPackets, c.HandedBytes)
			t.copies.add(copyReason(e), Counter{c.CopiesPackets, c.CopiesBytes})
			t.lastSeen = max(t.lastSeen, c.LastSeenNs)
		}
		tallies[i] = t
	})
	if err != nil {
		return nil, err
	}
	for _, t := range tallies {
		if err := t.readLeg(m); err != nil {
			return nil, err
		}
	}
	return tallies, nil
}

// readSinks reads where packets and copies ended on the kernel path.
func readSinks(m *mapSet, tallies []*tally) error {
	byID, byStats := make(map[uint32]*tally, len(tallies)), map[uint32]*outputSink{}
	// A rule's only output is counted in the rule's entry.
	var alone []*entry
	var one, several []*outputSink
	var indexes []uint32
	for _, t := range tallies {
		byID[t.entry.id] = t
		for slot := range t.out {
			o, index := &t.out[slot].kernel, t.entry.firstStats+uint32(slot)
			byStats[index] = o
			if len(t.out) == 1 {
				alone, one = append(alone, t.entry), append(one, o)
			} else {
				indexes, several = append(indexes, index), append(several, o)
			}
		}
	}
	err := readRuleStats(m, alone, func(i int, perCPU []bpf.RelayRuleStats) {
		for _, c := range perCPU {
			one[i].sent.add(c.SentPackets, c.SentBytes)
		}
	})
	if err != nil {
		return err
	}
	err = eachRow(m.OutputStats, indexes, func(i int, perCPU []bpf.RelayOutputStats) {
		for _, c := range perCPU {
			several[i].sent.add(c.Packets, c.Bytes)
		}
	})
	if err != nil {
		return fmt.Errorf("read map output_stats: %w", err)
	}
	return readRuleDrops(m.RuleDrops, byID, byStats)
}

// readTotal reads one counter of a map.
func readTotal(name string, m *ebpf.Map, kind uint32) (Counter, error) {
	var perCPU []bpf.RelayCounter
	if err := m.Lookup(kind, &perCPU); err != nil {
		return Counter{}, fmt.Errorf("read map %s: %w", name, err)
	}
	return sum(perCPU), nil
}

func readDrops(m *ebpf.Map) (map[Reason]Counter, error) {
	drops := map[Reason]Counter{}
	for reason := range reasons {
		var perCPU []bpf.RelayCounter
		if err := m.Lookup(uint32(reason), &perCPU); err != nil {
			return nil, fmt.Errorf("read drops: %w", err)
		}
		if c := sum(perCPU); c.Packets > 0 {
			drops[reason] = c
		}
	}
	return drops, nil
}

func readRuleDrops(m *ebpf.Map, byID map[uint32]*tally, byStats map[uint32]*outputSink) error {
	var perCPU []bpf.RelayCounter
	count := func(key *bpf.RelayDropKey) {
		switch bpf.RelayDropScope(key.Scope) {
		case bpf.RelayDropScopeDROP_RULE:
			if t := byID[key.Id]; t != nil {
				t.kernel.add(Reason(key.Reason), sum(perCPU))
			}
		case bpf.RelayDropScopeDROP_OUTPUT:
			if o := byStats[key.Id]; o != nil {
				o.add(Reason(key.Reason), sum(perCPU))
			}
		case bpf.RelayDropScopeDROP_NOTE:
			if t := byID[key.Id]; t != nil {
				t.note(Note(key.Reason), sum(perCPU))
			}
		}
	}
	if len(byID)+len(byStats) <= fewCounters {
		for key := range dropKeys(maps.Keys(byID), maps.Keys(byStats)) {
			switch err := m.Lookup(&key, &perCPU); {
			case err == nil:
				count(&key)
			case !errors.Is(err, ebpf.ErrKeyNotExist):
				return fmt.Errorf("read drops by rule: %w", err)
			}
		}
		return nil
	}
	var key bpf.RelayDropKey
	iter := m.Iterate()
	for iter.Next(&key, &perCPU) {
		count(&key)
	}
	if err := iter.Err(); err != nil {
		return fmt.Errorf("read drops by rule: %w", err)
	}
	return nil
}

// fewCounters is the number of rules and outputs up to which their drop counters are looked for one
// by one. For more, all drop counters are: the kernel searches a large map for those that there are.
const fewCounters = 16

// dropKeys yields the keys that the drop counters of some rules, and of some outputs by the indexes
// of their counters, can have.
func dropKeys(ids, stats iter.Seq[uint32]) iter.Seq[bpf.RelayDropKey] {
	return func(yield func(bpf.RelayDropKey) bool) {
		each := func(scope bpf.RelayDropScope, id uint32, reasons int) bool {
			for reason := range reasons {
				if !yield(bpf.RelayDropKey{Id: id, Scope: uint16(scope), Reason: uint16(reason)}) {
					return false
				}
			}
			return true
		}
		for id := range ids {
			if !each(bpf.RelayDropScopeDROP_RULE, id, int(reasons)) || !each(bpf.RelayDropScopeDROP_NOTE, id, int(notes)) {
				return
			}
		}
		for id := range stats {
			if !each(bpf.RelayDropScopeDROP_OUTPUT, id, int(reasons)) {
				return
			}
		}
	}
}

func readDevices(m *ebpf.Map) ([]DeviceStats, error) {
	var devices []DeviceStats
	var index uint32
	var perCPU []bpf.TransmitDeviceStats
	iter := m.Iterate()
	for iter.Next(&index, &perCPU) {
		p := DeviceStats{Index: int(index)}
		for _, c := range perCPU {
			p.TransmitDrops += c.TransmitDrops
			p.RedirectRefused += c.RedirectErrors
		}
		devices = append(devices, p)
	}
	if err := iter.Err(); err != nil {
		return nil, fmt.Errorf("read counters of devices: %w", err)
	}
	return devices, nil
}

func sum(perCPU []bpf.RelayCounter) (c Counter) {
	for _, v := range perCPU {
		c.add(v.Packets, v.Bytes)
	}
	return c
}

// monotonicOf converts a time of the kernel's monotonic clock, in ns.
func monotonicOf(ns uint64) time.Duration { return time.Duration(ns) }

// monotonic is CLOCK_MONOTONIC, the clock that the programs read.
func monotonic() time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts); err != nil {
		return 0 // cannot fail for this clock
	}
	return time.Duration(ts.Nano())
}
