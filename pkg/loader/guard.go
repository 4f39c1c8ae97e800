package loader

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/cilium/ebpf"

	"xdpcast/bpf"
	"xdpcast/pkg/packet"
)

// SetOwnMACs sets the MAC addresses of this host's interfaces: a frame from one of them was sent by
// us and is dropped with reason Loop, unless its rule allows it. The addresses stay after Close.
func (l *Loader) SetOwnMACs(macs [][6]byte) error {
	want := map[bpf.RelayOwnMac]bool{}
	for _, mac := range macs {
		want[bpf.RelayOwnMac{Mac: mac}] = true
	}
	return setOwn(l, l.maps.OwnMacs, bpf.RelayMapOwnMacs, want, func() { l.ownMACs = ownMACBits(want) })
}

// ownMACBits computes the field own_macs of map config: a filter with the hash of
// bpf/include/own.h.
func ownMACBits(macs map[bpf.RelayOwnMac]bool) (bits [8]uint64) {
	for key := range macs {
		bit := binary.NativeEndian.Uint32(key.Mac[2:]) * 0x9e3779b1 >> 23
		bits[bit>>6] |= 1 << (bit & 63)
	}
	return bits
}

// LoopingRule is a rule whose packets return to it.
type LoopingRule struct {
	Rule string
	// Since is when the first packet returned, and Last when the last one did; converted from
	// CLOCK_MONOTONIC to wall-clock time.
	Since, Last time.Time
	// Looping is set if packets returned within packet.GuardHeal.
	Looping bool
	Ways    []LoopWay // most recently used first
}

// LoopWay is a path by which packets return to a rule.
type LoopWay struct {
	Index  int        // interface on which they arrive
	MAC    [6]byte    // their source MAC; zero without an Ethernet header
	Source netip.Addr // their source address
	From   string     // rule whose output sent the last of them; "" if it is gone
	Last   time.Time  // when the last of them arrived
	// Packets is the number dropped with reason Looping.
	Packets uint64
}

// Loops reads the rules whose packets returned within packet.GuardMemory, sorted by name.
func (l *Loader) Loops() ([]LoopingRule, error) {
	return readLoops(l.maps, func() map[uint32]string {
		names := make(map[uint32]string, len(l.rules))
		for _, e := range l.rules {
			names[e.id] = e.rule.Name
		}
		return names
	})
}

// Echoes returns how many packets of each rule the relay program noted as Echo, without rules that
// have none. It reads the drop counters of all rules.
func (l *Loader) Echoes() (map[string]uint64, error) {
	counted := map[uint32]uint64{}
	var key bpf.RelayDropKey
	var perCPU []bpf.RelayCounter
	iter := l.maps.RuleDrops.Iterate()
	for iter.Next(&key, &perCPU) {
		if bpf.RelayDropScope(key.Scope) == bpf.RelayDropScopeDROP_NOTE && Note(key.Reason) == Echo {
			counted[key.Id] = sum(perCPU).Packets
		}
	}
	if err := iter.Err(); err != nil {
		return nil, fmt.Errorf("read echoes: %w", err)
	}
	byName := make(map[string]uint64, len(counted))
	if len(counted) == 0 {
		return byName, nil
	}
	for name, e := range l.rules {
		if n := counted[e.id]; n > 0 {
			byName[name] = n
		}
	}
	return byName, nil
}

// Loops is like Loader.Loops.
func (r *Reader) Loops() ([]LoopingRule, error) {
	entries, err := r.entries()
	if err != nil {
		return nil, err
	}
	names := make(map[uint32]string, len(entries))
	for _, e := range entries {
		names[e.id] = e.rule.Name
	}
	return readLoops(r.maps, func() map[uint32]string { return names })
}

// readLoops reads the map loops. It calls named, for the names of all rules, only if there are loops.
func readLoops(m *mapSet, named func() map[uint32]string) ([]LoopingRule, error) {
	var all []LoopingRule
	var names map[uint32]string
	var rule uint32
	var value bpf.RelayLoop
	now, wall := monotonic(), time.Now()
	at := func(ns uint64) time.Time { return wall.Add(time.Duration(ns) - now) }
	iter := m.Loops.Iterate()
	for iter.Next(&rule, &value) {
		if names == nil {
			names = named()
		}
		name, ok := names[rule]
		if !ok || now-time.Duration(value.LastNs) > packet.GuardMemory {
			continue
		}
		loop := LoopingRule{Rule: name, Since: at(value.SinceNs), Last: at(value.LastNs), Looping: now-time.Duration(value.LastNs) < packet.GuardHeal}
		for i := range value.Ways {
			if w := &value.Ways[i]; w.LastNs != 0 && now-time.Duration(w.LastNs) < packet.GuardMemory {
				loop.Ways = append(loop.Ways, LoopWay{
					Index: int(w.Ifindex), MAC: w.Mac, Source: netip.AddrFrom16(w.Source).Unmap(),
					From: names[w.From], Last: at(w.LastNs), Packets: w.Packets,
				})
			}
		}
		slices.SortFunc(loop.Ways, func(a, b LoopWay) int { return b.Last.Compare(a.Last) })
		all = append(all, loop)
	}
	if err := iter.Err(); err != nil {
		return nil, fmt.Errorf("read map loops: %w", err)
	}
	slices.SortFunc(all, func(a, b LoopingRule) int { return cmp.Compare(a.Rule, b.Rule) })
	return all, nil
}

// forgetLoops deletes the loops of removed rules.
func (l *Loader) forgetLoops(isGone func(uint32) bool) error {
	var stale []uint32
	var rule uint32
	var value bpf.RelayLoop
	iter := l.maps.Loops.Iterate()
	for iter.Next(&rule, &value) {
		if isGone(rule) {
			stale = append(stale, rule)
		}
	}
	if err := iter.Err(); err != nil {
		return fmt.Errorf("read map loops: %w", err)
	}
	for _, rule := range stale {
		if err := l.maps.Loops.Delete(rule); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return fmt.Errorf("clear map loops: %w", err)
		}
	}
	return nil
}
