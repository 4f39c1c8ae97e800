package loader

import (
	"context"
	"errors"
	"fmt"
	"math/bits"
	"os"
	"runtime"
	"strings"
	"sync/atomic"
	"time"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/cilium/ebpf/perf"
	"golang.org/x/sys/unix"

	"xdpcast/bpf"
	"xdpcast/internal/tap"
	"xdpcast/pkg/flow"
	"xdpcast/pkg/packet"
)

// TapOptions says what a [Tap] captures.
type TapOptions struct {
	PinDir string // empty: DefaultPinDir
	Rule   string // captures the flow of this name and the flows of the rule's inputs
	tap.Options
	// Memory for all rings together in bytes; 0: DefaultTapMemory.
	Memory int
}

// DefaultTapMemory is the memory of all rings of a Tap in bytes. Each CPU's ring has at least
// minTapRing (256 KiB) and at most maxTapRing (8 MiB).
const (
	DefaultTapMemory = 32 << 20

	minTapRing = 256 << 10
	maxTapRing = 8 << 20
)

// How often a Tap checks for changed flows of the rule, and for programs of another release: at
// most at this interval, and for at most one part in tapLookShare of its time.
const (
	tapLookEvery = 500 * time.Millisecond
	tapLookShare = 20
)

// Tap captures the packets of a rule that the relay and egress programs see: all of them on the
// kernel path, and on the others those that reach the relay program. It traces the pinned programs
// without changing them. What it loads is released by Close or when the process ends. Only one
// goroutine may use it.
type Tap struct {
	opts     TapOptions
	maps     *mapSet
	objects  bpf.TapPrograms
	own      tapMaps
	reader   *perf.Reader
	programs []ebpf.ProgramID // being traced
	links    []link.Link

	flows   map[uint32]*entry // by id of the rule
	outputs map[uint32]tapSlot
	known   map[int]bpf.TapTapFlows // content of map tapped_flows
	slots   map[uint32]uint32       // content of map tapped_outputs
	looked  time.Time
	took    time.Duration

	lost   atomic.Uint64 // in rings already closed
	record tap.Record
	joined []byte
}

type tapMaps struct {
	Flows   *ebpf.Map `ebpf:"tapped_flows"`
	Outputs *ebpf.Map `ebpf:"tapped_outputs"`
	Events  *ebpf.Map `ebpf:"tap_events"`
	Lost    *ebpf.Map `ebpf:"tap_lost"`
}

// tapSlot is an output of the tapped rule.
type tapSlot struct {
	entry *entry
	slot  int
}

// OpenTap starts to tap a rule; captured packets wait in the rings until Run. The caller must Close
// it. The rule need not be published: its packets are captured as soon as it is.
//
// Errors to match: ErrNotLoaded, ErrSchema, ErrDamaged, ErrNotSupported if the kernel cannot trace
// BPF programs.
func OpenTap(opts TapOptions) (_ *Tap, err error) {
	if opts.PinDir == "" {
		opts.PinDir = DefaultPinDir
	}
	if err := opts.Check(); err != nil {
		return nil, err
	}
	if _, err := os.Stat(opts.PinDir); errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("%w in %s", ErrNotLoaded, opts.PinDir)
	}
	t := &Tap{opts: opts, flows: map[uint32]*entry{}, outputs: map[uint32]tapSlot{}, known: map[int]bpf.TapTapFlows{}, slots: map[uint32]uint32{}}
	defer func() {
		if err != nil {
			err = errors.Join(err, t.Close())
		}
	}()
	if t.maps, err = openMaps(opts.PinDir, false, nil); err != nil {
		return nil, err
	}
	if err := t.trace(); err != nil {
		return nil, err
	}
	return t, t.look()
}

// tapFaults are the errors of kernels that cannot trace BPF programs: no trampolines for the
// processor (arm64 before Linux 6.0), no JIT compiler, or no BTF.
var tapFaults = []error{ebpf.ErrNotSupported, unix.EOPNOTSUPP, unix.Errno(524), unix.EINVAL, unix.ENOENT}

func tapError(what string, err error) error {
	if errors.Is(err, unix.EPERM) {
		if _, missing := checkCapabilities(); missing != nil {
			return permissionError(err)
		}
		// No capability is missing: the kernel allows no one to change its code.
		return fmt.Errorf("%s: tracing of BPF programs (fentry) is %w here (%s): the kernel refuses it to everybody", what, ErrNotSupported, kernelRelease())
	}
	for _, fault := range tapFaults {
		if errors.Is(err, fault) {
			return fmt.Errorf("%s: tracing of BPF programs (fentry; since Linux 6.0 on arm64) is %w here (%s, %s): %w", what, ErrNotSupported, kernelRelease(), runtime.GOARCH, err)
		}
	}
	return fmt.Errorf("%s: %w", what, err)
}

// trace loads the tap's programs for the pinned programs, and attaches them.
func (t *Tap) trace() (err error) {
	relay, err := ebpf.LoadPinnedProgram(relayPin(t.opts.PinDir), nil)
	if err != nil {
		return pinError(relayPin(t.opts.PinDir), err)
	}
	defer relay.Close()
	egress, err := ebpf.LoadPinnedProgram(egressPin(t.opts.PinDir), nil)
	if err != nil {
		return pinError(egressPin(t.opts.PinDir), err)
	}
	defer egress.Close()
	ids, err := programIDs(relay, egress)
	if err != nil {
		return err
	}
	spec, err := bpf.LoadTap()
	if err != nil {
		return fmt.Errorf("read tap programs: %w", err)
	}
	for name, value := range map[string]any{
		"want_in": t.opts.In, "want_dropped": t.opts.Dropped, "want_slots": t.opts.Slots, "sample": t.opts.Sample, "snap": t.opts.Snap,
	} {
		if err := spec.Variables[name].Set(value); err != nil {
			return fmt.Errorf("set %s: %w", name, err)
		}
	}
	for name, p := range spec.Programs {
		p.AttachTarget = egress
		if strings.HasPrefix(name, "relay") {
			p.AttachTarget = relay
		}
	}
	var out struct {
		bpf.TapPrograms
		tapMaps
	}
	if err := loadInto(spec, t.maps, &out); err != nil {
		return tapError("load tap programs", err)
	}
	t.objects, t.own = out.TapPrograms, out.tapMaps
	if t.reader, err = perf.NewReaderWithOptions(t.own.Events, tapRing(t.opts.Memory), perf.ReaderOptions{Watermark: tapRing(t.opts.Memory) / 4}); err != nil {
		return tapError("make rings", err)
	}
	clear(t.known)
	clear(t.slots)
	// The exit programs last: they ignore a run whose entry was not seen.
	for _, p := range t.wanted() {
		lk, err := link.AttachTracing(link.TracingOptions{Program: p})
		if err != nil {
			return tapError("attach tap programs", err)
		}
		t.links = append(t.links, lk)
	}
	t.programs = ids
	return nil
}

// wanted returns the programs needed for the options.
func (t *Tap) wanted() []*ebpf.Program {
	all := []*ebpf.Program{t.objects.RelayEntry, t.objects.RelayDrop, t.objects.RelayExit}
	if t.opts.Slots != 0 || t.opts.Dropped {
		all = append(all, t.objects.EgressEntry, t.objects.EgressDrop, t.objects.EgressExit)
	}
	return all
}

// tapRing is the length of one CPU's ring in bytes, a power of two.
func tapRing(memory int) int {
	if memory == 0 {
		memory = DefaultTapMemory
	}
	cpus, err := ebpf.PossibleCPU()
	if err != nil {
		cpus = runtime.NumCPU()
	}
	return 1 << (bits.Len(uint(min(max(memory/cpus, minTapRing), maxTapRing))) - 1)
}

func programIDs(programs ...*ebpf.Program) (ids []ebpf.ProgramID, err error) {
	for _, p := range programs {
		info, err := p.Info()
		if err != nil {
			return nil, fmt.Errorf("program info: %w", err)
		}
		id, ok := info.ID()
		if !ok {
			return nil, fmt.Errorf("program ids are %w", ErrNotSupported)
		}
		ids = append(ids, id)
	}
	return ids, nil
}

// Run adds captured packets to w until w has enough, ctx ends, or something fails. It writes
// everything captured until then, but does not close w. extra returns how many packets other
// sources of w lost; nil if there are none.
func (t *Tap) Run(ctx context.Context, w *tap.Writer, extra func() uint64) error {
	var record perf.Record
	next := time.Now()
	for n := 0; ; n++ {
		// Reading the clock costs more than most of the code below.
		if n%64 == 0 && time.Now().After(next) {
			if err := t.refresh(w); err != nil {
				return err
			}
			lost := t.Lost()
			if extra != nil {
				lost += extra()
			}
			if more, err := w.Flush(lost); err != nil || !more {
				return err
			}
			if ctx.Err() != nil {
				return t.drain(w)
			}
			next = time.Now().Add(tap.HoldTime)
			t.reader.SetDeadline(next)
		}
		err := t.reader.ReadInto(&record)
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded): // and the rings are empty
			n = -1
		case err != nil:
			return fmt.Errorf("read tap ring: %w", err)
		case record.LostSamples == 0: // otherwise they are counted in map tap_lost, too
			t.add(record.RawSample, w)
		}
	}
}

// drain detaches the programs, and adds the records left in the rings.
func (t *Tap) drain(w *tap.Writer) error {
	var errs []error
	for _, lk := range t.links {
		errs = append(errs, lk.Close())
	}
	t.links = nil
	var record perf.Record
	t.reader.SetDeadline(time.Now())
	// The first deadline may be an older one, from rings read before.
	for deadlines := 0; deadlines < 2; {
		err := t.reader.ReadInto(&record)
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded):
			deadlines++
		case err != nil:
			return errors.Join(append(errs, fmt.Errorf("read tap ring: %w", err))...)
		case record.LostSamples == 0:
			t.add(record.RawSample, w)
		}
	}
	return errors.Join(errs...)
}

// Lost is the number of packets for which the rings had no room.
func (t *Tap) Lost() uint64 {
	sum := t.lost.Load()
	if t.own.Lost == nil {
		return sum
	}
	var each []uint64
	if err := t.own.Lost.Lookup(uint32(0), &each); err == nil {
		for _, n := range each {
			sum += n
		}
	}
	return sum
}

// InForce returns how many outputs the rule had at the last check, 0 if it was not published, and
// whether user space forwards its packets. Call it only from the goroutine that runs the tap.
func (t *Tap) InForce() (outputs int, userSpace bool) {
	for _, e := range t.flows {
		outputs = max(outputs, len(e.rule.Out))
		userSpace = userSpace || e.rule.Path == flow.PathFanout || e.rule.Path == flow.PathAFXDP && !e.rule.Fallback
	}
	return outputs, userSpace
}

// refresh adapts the tap to changed rules and programs.
func (t *Tap) refresh(w *tap.Writer) error {
	if since := time.Since(t.looked); since < tapLookEvery || since < tapLookShare*t.took {
		return nil
	}
	same, err := t.tracesPinned()
	if err != nil {
		return err
	}
	if !same {
		if err := errors.Join(t.drain(w), t.detach()); err != nil {
			return err
		}
		if err := t.trace(); err != nil {
			return err
		}
	}
	return t.look()
}

// tracesPinned says whether the traced programs are still the pinned ones.
func (t *Tap) tracesPinned() (bool, error) {
	for i, pin := range []string{relayPin(t.opts.PinDir), egressPin(t.opts.PinDir)} {
		p, err := ebpf.LoadPinnedProgram(pin, nil)
		if errors.Is(err, os.ErrNotExist) {
			return false, fmt.Errorf("%w in %s any more", ErrNotLoaded, t.opts.PinDir)
		}
		if err != nil {
			return false, pinError(pin, err)
		}
		ids, err := programIDs(p)
		if err := errors.Join(err, p.Close()); err != nil {
			return false, err
		}
		if ids[0] != t.programs[i] {
			return false, nil
		}
	}
	return true, nil
}

// look finds the rule's flows and makes the programs capture them.
func (t *Tap) look() error {
	start := time.Now()
	defer func() { t.looked, t.took = time.Now(), time.Since(start) }()
	r, err := OpenReader(t.opts.PinDir)
	if err != nil {
		return err
	}
	entries, err := r.entries()
	if err := errors.Join(err, r.Close()); err != nil {
		return err
	}
	flows, slots := map[int]bpf.TapTapFlows{}, map[uint32]uint32{}
	clear(t.flows)
	for _, e := range entries {
		if name, _, _ := strings.Cut(e.rule.Name, flow.LegSeparator); name != t.opts.Rule || t.flows[e.id] != nil {
			continue
		}
		f := flows[e.rule.In.Index]
		if int(f.N) == len(f.Rule) {
			return fmt.Errorf("rule %s: more than %d flows on an interface cannot be tapped", t.opts.Rule, len(f.Rule))
		}
		f.Rule[f.N] = e.id
		f.N++
		flows[e.rule.In.Index] = f
		t.flows[e.id] = e
		for slot := range e.rule.Out {
			stats := e.firstStats + uint32(slot)
			slots[stats] = uint32(slot)
			t.outputs[stats] = tapSlot{e, slot}
		}
	}
	return errors.Join(syncTap(t.own.Outputs, t.slots, slots, func(k uint32) uint32 { return k }), syncTap(t.own.Flows, t.known, flows, func(k int) uint32 { return uint32(k) }))
}

// syncTap makes a map hold exactly want; known is its current content.
func syncTap[K, V comparable](m *ebpf.Map, known, want map[K]V, key func(K) uint32) error {
	for k := range known {
		if _, stays := want[k]; !stays {
			if err := m.Delete(key(k)); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
				return fmt.Errorf("write map of the tap: %w", err)
			}
			delete(known, k)
		}
	}
	for k, v := range want {
		if old, ok := known[k]; ok && old == v {
			continue
		}
		if err := m.Put(key(k), v); err != nil {
			return fmt.Errorf("write map of the tap: %w", err)
		}
		known[k] = v
	}
	return nil
}

// Offsets of the parts of a record (struct tap_record of bpf/include/tap.h).
const (
	tapHeadAt  = int(unsafe.Offsetof(bpf.TapTapRecord{}.Head))
	tapDropAt  = int(unsafe.Offsetof(bpf.TapTapRecord{}.Drop))
	tapDropLen = int(unsafe.Sizeof(bpf.TapTapDrop{}))
)

// add decodes a record.
func (t *Tap) add(raw []byte, w *tap.Writer) {
	if len(raw) < tapHeadAt {
		return
	}
	var r bpf.TapTapRecord
	copy(unsafe.Slice((*byte)(unsafe.Pointer(&r)), unsafe.Sizeof(r)), raw[:min(len(raw), int(unsafe.Sizeof(r)))])
	data := tapHeadAt + int(r.HeadBytes)
	if r.Drops > 0 {
		data = tapDropAt + int(r.Drops)*tapDropLen
	}
	if int(r.Drops) > len(r.Drop) || int(r.HeadBytes) > len(r.Head) || len(raw) < data+int(r.Captured) {
		return
	}
	frame := raw[data : data+int(r.Captured)]
	if r.Flags&uint8(bpf.TapTapFlagTAP_IN) != 0 {
		t.addIn(&r, frame, w)
	}
	switch r.Flags & uint8(bpf.TapTapFlagTAP_OUT|bpf.TapTapFlagTAP_EGRESS) {
	case uint8(bpf.TapTapFlagTAP_EGRESS):
		t.addUnsent(&r, frame, w)
	case uint8(bpf.TapTapFlagTAP_EGRESS | bpf.TapTapFlagTAP_OUT):
		o := t.outputs[r.Output]
		t.addOut(&r, o.entry, o.slot, frame, w)
	case uint8(bpf.TapTapFlagTAP_OUT):
		t.addOut(&r, t.flows[r.Rule], 0, frame, w)
	}
}

func (t *Tap) addIn(r *bpf.TapTapRecord, frame []byte, w *tap.Writer) {
	e := t.flows[r.Rule]
	if e == nil {
		return // the rule is gone
	}
	grown := int(int32(r.Grown))
	// The head holds the original first bytes; after them only the position has changed.
	t.joined = append(t.joined[:0], r.Head[:r.HeadBytes]...)
	if rest := int(r.HeadBytes) + grown; rest >= 0 && rest < len(frame) && int(r.HeadBytes) == len(r.Head) {
		t.joined = append(t.joined, frame[rest:]...)
	}
	to := &t.record
	*to = tap.Record{
		Time: int64(r.TimeNs), Index: int(r.Ifindex), Length: int(r.Length) - grown, Rule: t.opts.Rule, Slot: tap.NoSlot,
		Data: t.joined[:min(len(t.joined), int(t.opts.Snap))], Drops: t.drops(r, to.Drops[:0]),
	}
	if r.Flags&uint8(bpf.TapTapFlagTAP_COPY) != 0 {
		reason := Duplicate
		if e.rule.Leg != nil && e.rule.Leg.Settings.Kind == packet.StreamFailover {
			reason = Standby
		}
		to.Drops = append(to.Drops, tap.Drop{Slot: tap.NoSlot, Reason: reason.String()})
	}
	w.Add(to)
}

// drops appends why the packet or its copies were not sent.
func (t *Tap) drops(r *bpf.TapTapRecord, to []tap.Drop) []tap.Drop {
	for _, d := range r.Drop[:r.Drops] {
		drop := tap.Drop{Slot: tap.NoSlot, Reason: Reason(d.Reason).String()}
		switch bpf.RelayDropScope(d.Scope) {
		case bpf.RelayDropScopeDROP_RULE:
		case bpf.RelayDropScopeDROP_OUTPUT:
			o, ok := t.outputs[d.Id]
			if !ok {
				continue
			}
			drop.Slot = o.slot
		default:
			continue
		}
		to = append(to, drop)
	}
	return to
}

func (t *Tap) addOut(r *bpf.TapTapRecord, e *entry, slot int, frame []byte, w *tap.Writer) {
	if e == nil || slot >= len(e.rule.Out) {
		return
	}
	t.record = tap.Record{
		Time: int64(r.TimeNs), Index: e.rule.Out[slot].Index, Out: true, Length: int(r.Length), Rule: t.opts.Rule, Slot: slot,
		Data: frame[:min(len(frame), int(t.opts.Snap))], Drops: t.record.Drops[:0],
	}
	w.Add(&t.record)
}

// addUnsent adds a copy that the egress program dropped. It has no MAC addresses: the handover
// occupies their bytes.
func (t *Tap) addUnsent(r *bpf.TapTapRecord, frame []byte, w *tap.Writer) {
	drops := t.drops(r, t.record.Drops[:0])
	if len(drops) == 0 {
		return
	}
	clear(frame[:min(len(frame), int(unsafe.Sizeof(bpf.RelayHandover{})))])
	t.record = tap.Record{
		Time: int64(r.TimeNs), Index: int(r.Ifindex), Out: true, Length: int(r.Length), Rule: t.opts.Rule, Slot: drops[0].Slot,
		Data: frame[:min(len(frame), int(t.opts.Snap))], Drops: drops,
	}
	w.Add(&t.record)
}

// detach unloads everything, and keeps the count of lost packets.
func (t *Tap) detach() error {
	var errs []error
	for _, lk := range t.links {
		errs = append(errs, lk.Close())
	}
	t.lost.Store(t.Lost())
	if t.reader != nil {
		errs = append(errs, t.reader.Close())
	}
	if t.own.Lost != nil {
		errs = append(errs, t.objects.Close(), t.own.Flows.Close(), t.own.Outputs.Close(), t.own.Events.Close(), t.own.Lost.Close())
	}
	t.links, t.reader, t.objects, t.own = nil, nil, bpf.TapPrograms{}, tapMaps{}
	return errors.Join(errs...)
}

// Close stops the tap. The kernel unloads its programs.
func (t *Tap) Close() error {
	err := t.detach()
	if t.maps != nil {
		err = errors.Join(err, t.maps.Close())
	}
	return err
}
