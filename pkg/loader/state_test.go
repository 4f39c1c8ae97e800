package loader

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cilium/ebpf"

	"xdpcast/bpf"
	"xdpcast/internal/labtest"
	"xdpcast/pkg/flow"
	"xdpcast/pkg/packet"
)

// dump describes everything that a Loader keeps in the kernel except counters, and the free space
// of its allocators. Two dumps are equal if nothing has changed and nothing has leaked.
func dump(t testing.TB, l *Loader) string {
	t.Helper()
	var b strings.Builder
	config, err := l.maps.config(l.opts.PinDir)
	if err != nil {
		t.Fatal(err)
	}
	fmt.Fprintf(&b, "config %+v\n", config)
	dumpFlows(t, &b, l)
	dumpMap(t, &b, "rules", l.maps.Rules, func(_ uint32, r bpf.RelayRule) string {
		if r.Name[0] == 0 {
			return ""
		}
		return fmt.Sprintf("%+v", r)
	})
	// Rules that differ only in their sources share the same two candidate slots, and may swap
	// them.
	for _, s := range shortcutsOf(t, l.maps) {
		fmt.Fprintf(&b, "shortcut: %+v\n", s)
	}
	dumpMap(t, &b, "devices", l.maps.Devices, func(_ uint32, v bpf.RelayBpfDevmapVal) string { return fmt.Sprintf("%+v", v) })
	dumpMap(t, &b, "port_rows", l.maps.DeviceRows, func(_ uint32, v uint32) string {
		if v == 0 {
			return ""
		}
		return fmt.Sprint(v)
	})
	dumpMap(t, &b, "port_stats", l.maps.DeviceStats, func(uint32, []bpf.TransmitDeviceStats) string { return "counted" })
	for first, id := range fanoutRows(t, l) {
		fmt.Fprintf(&b, "broadcast %d: map %d: %s\n", first, id, dumpSlots(t, id))
	}
	copies, err := readArray[bpf.RelayCopy](l.maps.Copies, int(l.maps.Copies.MaxEntries()))
	if err != nil {
		t.Fatal(err)
	}
	for i, c := range copies {
		if c != (bpf.RelayCopy{}) {
			fmt.Fprintf(&b, "copy %d: %+v\n", i, c)
		}
	}
	var indexes []int
	for index, p := range l.devices {
		indexes = append(indexes, index)
		held := *p
		if held.rowUsers == 0 {
			held.row, held.rowHasProg = 0, false
		}
		fmt.Fprintf(&b, "port %+v\n", held)
	}
	slices.Sort(indexes)
	fmt.Fprintf(&b, "free: %d rules, %d outputs, %d counters, %d rows; devices %v\n", freeIDs(l.ids), freeBlocks(l.outputs), freeBlocks(l.stats), freeIDs(l.deviceRows), indexes)
	lines := strings.Split(strings.TrimSpace(b.String()), "\n")
	slices.Sort(lines)
	return strings.Join(lines, "\n")
}

func dumpFlows(t testing.TB, b *strings.Builder, l *Loader) {
	t.Helper()
	flows, err := l.tables.read()
	if err != nil {
		t.Fatal(err)
	}
	pointed, err := readReferents(l.maps, flows)
	if err != nil {
		t.Fatal(err)
	}
	for _, flow := range flows {
		e, err := pointed.entry(flow)
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(b, "flow %+v %+v\n", flow, e.rule)
	}
}

func dumpMap[K, V any](t testing.TB, b *strings.Builder, name string, m *ebpf.Map, describe func(K, V) string) {
	t.Helper()
	var key K
	var value V
	iter := m.Iterate()
	for iter.Next(&key, &value) {
		if s := describe(key, value); s != "" {
			fmt.Fprintf(b, "%s %v: %s\n", name, key, s)
		}
	}
	if err := iter.Err(); err != nil {
		t.Fatalf("read map %s: %v", name, err)
	}
}

func dumpSlots(t testing.TB, id ebpf.MapID) string {
	t.Helper()
	slots, err := ebpf.NewMapFromID(id)
	if err != nil {
		t.Fatal(err)
	}
	defer slots.Close()
	var b strings.Builder
	dumpMap(t, &b, "", slots, func(_ uint32, v bpf.RelayBpfDevmapVal) string { return fmt.Sprintf("%+v", v) })
	return strings.ReplaceAll(b.String(), "\n", ";")
}

func freeIDs(a *idAllocator) int { return int(a.max-a.next) + len(a.freed) }

func freeBlocks(a *blockAllocator) (n int) {
	for _, e := range a.free {
		n += int(e.n)
	}
	return n
}

// kernelIDs lists every map, program and link of a Loader.
type kernelIDs struct {
	Maps     []ebpf.MapID
	Programs []ebpf.ProgramID
	Links    []uint32
}

func idsOf(t testing.TB, l *Loader) (ids kernelIDs) {
	t.Helper()
	all := l.tables[:]
	for _, m := range l.maps.byName() {
		all = append(all, m)
	}
	for _, m := range all {
		info, err := m.Info()
		if err != nil {
			t.Fatal(err)
		}
		id, _ := info.ID()
		ids.Maps = append(ids.Maps, id)
	}
	for _, first := range fanoutRows(t, l) {
		ids.Maps = append(ids.Maps, first)
	}
	for _, p := range []*ebpf.Program{l.relay, l.egress} {
		ids.Programs = append(ids.Programs, programID(t, p))
	}
	for _, a := range l.Attachments() {
		ids.Links = append(ids.Links, a.LinkID)
	}
	for _, lk := range l.transmit {
		info, err := lk.Info()
		if err != nil {
			t.Fatal(err)
		}
		ids.Links = append(ids.Links, uint32(info.ID))
		ids.Programs = append(ids.Programs, info.Program)
	}
	slices.Sort(ids.Maps)
	slices.Sort(ids.Programs)
	slices.Sort(ids.Links)
	return ids
}

func programID(t testing.TB, p *ebpf.Program) ebpf.ProgramID {
	t.Helper()
	info, err := p.Info()
	if err != nil {
		t.Fatal(err)
	}
	id, _ := info.ID()
	return id
}

// fanoutRows returns the devmaps by first output, without empty ones: rows that rules no longer use
// keep those.
func fanoutRows(t testing.TB, l *Loader) map[uint32]ebpf.MapID {
	t.Helper()
	ids := make([]ebpf.MapID, l.maps.Broadcast.MaxEntries())
	// Before Linux 6.8 each lookup waits for a grace period.
	if err := atOnce(len(ids), func(from, to int) error {
		for first := from; first < to; first++ {
			if err := l.maps.Broadcast.Lookup(uint32(first), &ids[first]); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
				return err
			}
		}
		return nil
	}); err != nil {
		t.Fatalf("read map broadcast: %v", err)
	}
	rows := map[uint32]ebpf.MapID{}
	for first, id := range ids {
		if id != 0 && dumpSlots(t, id) != "" {
			rows[uint32(first)] = id
		}
	}
	return rows
}

// gone says whether the kernel has none of these any longer.
func (ids kernelIDs) gone() bool {
	for _, id := range ids.Maps {
		if m, err := ebpf.NewMapFromID(id); !errors.Is(err, os.ErrNotExist) {
			m.Close()
			return false
		}
	}
	for _, id := range ids.Programs {
		if p, err := ebpf.NewProgramFromID(id); !errors.Is(err, os.ErrNotExist) {
			p.Close()
			return false
		}
	}
	return true
}

// someRules has rules of every kind: one output, several, several on one interface, one not ready,
// source-specific, IPv6.
func someRules(n *testLab) []flow.Flow {
	waiting := output(n.out[0], "239.2.2.9", "10.1.0.1", 6000)
	waiting.Ready = false
	return []flow.Flow{
		{Name: "one", In: input(n.in, "239.1.1.1", "", 5000), Out: []flow.Output{output(n.out[0], "239.2.2.1", "10.1.0.1", 6000)}},
		{Name: "two", In: input(n.in, "239.1.1.2", "", 5000), Out: []flow.Output{output(n.out[0], "239.2.2.2", "10.1.0.1", 6000), output(n.out[1], "239.2.2.3", "10.1.1.1", 6000)}},
		{Name: "same", In: input(n.in, "239.1.1.3", "192.168.7.7", 5000), Out: []flow.Output{output(n.out[1], "239.2.2.4", "10.1.1.1", 6000), output(n.out[1], "239.2.2.5", "10.1.1.1", 6001), waiting}},
		{Name: "waiting", In: input(n.in, "239.1.1.4", "", 5000), Out: []flow.Output{waiting}},
		{Name: "six", In: input(n.in, "ff3e::1", "", 5000), Out: []flow.Output{output(n.out[0], "ff3e::2", "fd00::1", 6000)}},
	}
}

// allocatorsFit checks that the rules' allocations and the free space add up to everything.
func allocatorsFit(t testing.TB, l *Loader) {
	t.Helper()
	held := 0
	for _, e := range l.rules {
		held += len(e.rule.Out)
	}
	if got, want := freeIDs(l.ids), int(l.ids.max)-len(l.rules); got != want {
		t.Errorf("%d rules are free, want %d", got, want)
	}
	if got, want := freeBlocks(l.outputs), int(l.outputs.max)-held; got != want {
		t.Errorf("%d outputs are free, want %d", got, want)
	}
	if got, want := freeBlocks(l.stats), int(l.stats.max)-held; got != want {
		t.Errorf("%d output counters are free, want %d", got, want)
	}
	rows := 0
	for _, p := range l.devices {
		if p.rowUsers > 0 {
			rows++
		}
	}
	if got, want := freeIDs(l.deviceRows), int(l.deviceRows.max)-rows; got != want {
		t.Errorf("%d rows of devices are free, want %d", got, want)
	}
}

// countsFit checks that what follows from the rules as a whole, and is kept in step with their
// changes, is what they say.
func countsFit(t testing.TB, l *Loader) {
	t.Helper()
	fresh := &Loader{rules: map[string]*entry{}, keep: map[int]int{}, lookups: lookupCount{}}
	wants := l.shortcutRules()
	for _, e := range l.rules {
		fresh.enter(e)
		found := false
		for other := range l.places.of(e.rule.In) {
			found = found || other == e
		}
		if !found || e.leaving || !e.inForce {
			t.Errorf("rule %s: in places %v, leaving %v, in force %v", e.rule.Name, found, e.leaving, e.inForce)
		}
		if l.wantsShortcut(e) != wants(e) {
			t.Errorf("rule %s: wants a shortcut: %v, want %v", e.rule.Name, l.wantsShortcut(e), wants(e))
		}
		if has, waits := l.shortcuts.has(e), l.shortcuts.slotless[e]; has && waits || (has || waits) != wants(e) {
			t.Errorf("rule %s: has a slot %v, waits for one %v, want one of them: %v", e.rule.Name, has, waits, wants(e))
		}
	}
	if l.places.count != len(l.rules) {
		t.Errorf("%d rules have a place, want %d", l.places.count, len(l.rules))
	}
	if !maps.Equal(l.keep, fresh.keep) || l.steered != fresh.steered || l.extra != fresh.extra || l.both != fresh.both || !maps.Equal(l.lookups, fresh.lookups) {
		t.Errorf("counts are %v %d %d %d %v, want %v %d %d %d %v", l.keep, l.steered, l.extra, l.both, l.lookups, fresh.keep, fresh.steered, fresh.extra, fresh.both, fresh.lookups)
	}
	for e := range l.shortcuts.slotless {
		if l.rules[e.rule.Name] != e {
			t.Errorf("rule %s waits for a slot and is gone", e.rule.Name)
		}
	}
}

// kernelFits checks that the kernel holds only what the rules need.
func kernelFits(t testing.TB, l *Loader) {
	t.Helper()
	several, names := 0, 0
	for _, e := range l.rules {
		if key, _ := broadcastKey(e.rule.Out); len(e.rule.Out) > 1 && key != "" {
			several++
		}
	}
	if got := len(fanoutRows(t, l)); got != several {
		t.Errorf("%d devmaps, want %d", got, several)
	}
	var row bpf.RelayRule
	var id uint32
	iter := l.maps.Rules.Iterate()
	for iter.Next(&id, &row) {
		if row.Name[0] == 0 {
			continue
		}
		names++
		name, _ := decodeName(row.Name)
		if e := l.rules[name]; e == nil || e.id != id || row != encodeRule(e) {
			t.Errorf("rule %s is described as %+v", name, row)
		}
	}
	if err := iter.Err(); err != nil {
		t.Fatal(err)
	}
	if names != len(l.rules) {
		t.Errorf("%d rules are described, want %d", names, len(l.rules))
	}
	shortcutsAgree(t, l.maps)
	countsFit(t, l)
	s, err := l.Stats()
	if err != nil {
		t.Fatal(err)
	}
	if len(s.Devices) != len(l.devices) {
		t.Errorf("%d interfaces are counted, want %d", len(s.Devices), len(l.devices))
	}
}

// stream sends numbered frames from its own goroutine, a few at a time, and checks that every copy
// of each arrives, once and in order.
type stream struct {
	t    testing.TB
	stop atomic.Bool
	done sync.WaitGroup
	sent atomic.Uint64
}

// window is the maximum number of frames in flight, so that no queue overflows.
const window = 16

// startStream sends frames for a rule with outputs[i] copies at sink i.
func startStream(t testing.TB, n *testLab, group string, outputs ...int) *stream {
	t.Helper()
	return startNumbers(t, n, 0, []string{group}, outputs...)
}

// startNumbers is startStream with numbers from first on, each sent to all groups, of which one copy
// is relayed. The number follows "stream ", the first group and a space.
func startNumbers(t testing.TB, n *testLab, first uint64, groups []string, outputs ...int) *stream {
	t.Helper()
	s := &stream{t: t}
	source := labtest.NewTap(t, n.source, "eth0")
	marker := "stream " + groups[0] + " "
	taps := map[int]*labtest.Tap{}
	for i, copies := range outputs {
		if copies > 0 {
			taps[i] = labtest.NewTap(t, n.sinks[i], "eth0")
		}
	}
	s.done.Go(func() {
		for next := first; !s.stop.Load() && !t.Failed(); next += window {
			began := time.Now()
			for i := range uint64(window) {
				for _, group := range groups {
					source.Send(sourceFrame(n, group, 5000, binary.BigEndian.AppendUint64([]byte(marker), next+i)).Build())
				}
			}
			for i, tap := range taps {
				numbers := map[netip.AddrPort]uint64{}
				for _, f := range tap.Collect(window*outputs[i], func(f []byte) bool { return bytes.Contains(f, []byte(marker)) }) {
					h, ok := packet.Parse(f)
					if !ok {
						t.Errorf("broken frame %x", f)
						return
					}
					to := netip.AddrPortFrom(h.Dst, h.DstPort)
					number := binary.BigEndian.Uint64(f[h.UDP+8+len(marker):])
					if number != next+numbers[to] {
						t.Errorf("%v: frame %d arrived when %d was next", to, number, next+numbers[to])
						return
					}
					numbers[to]++
				}
			}
			s.sent.Add(window)
			time.Sleep(time.Since(began)) // half of a CPU is left to the changes
		}
	})
	t.Cleanup(s.finish)
	return s
}

// more waits until further frames have arrived.
func (s *stream) more() {
	s.t.Helper()
	before := s.sent.Load()
	labtest.Eventually(s.t, "the stream goes on", func() bool { return s.t.Failed() || s.sent.Load() >= before+2*window })
}

// finish ends the stream after a full window.
func (s *stream) finish() {
	s.stop.Store(true)
	s.done.Wait()
}

// openFDs lists the open file descriptors by their targets.
func openFDs(t testing.TB) (fds []string) {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if target, err := os.Readlink("/proc/self/fd/" + e.Name()); err == nil {
			fds = append(fds, e.Name()+" "+target)
		}
	}
	slices.SortFunc(fds, cmp.Compare[string])
	return fds
}
