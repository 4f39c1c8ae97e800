package loader

import (
	"errors"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/btf"
	"golang.org/x/sys/unix"

	"xdpcast/bpf"
)

// programSource provides the programs of one release, loaded with its maps, for a kernel with these
// capabilities. If the same program is loaded already, as have, it returns a clone of that: the
// verifier takes an eighth of a second, in an emulated machine a minute.
type programSource interface {
	relay(m *mapSet, can Capabilities, have *ebpf.Program) (*ebpf.Program, error)
	egress(m *mapSet, can Capabilities, have *ebpf.Program) (*ebpf.Program, error)
	tapped(m *mapSet, ethernet bool, have *ebpf.Program) (*ebpf.Program, error)
	transmit(m *mapSet) (*bpf.TransmitPrograms, error)
}

// embedded is this binary's own programs.
type embedded struct {
	known *definitions
	// fragmentTimeout is how long a first fragment's port is valid; 0 keeps the program's default.
	fragmentTimeout time.Duration
	// everyPacket makes the loop guard inspect every packet, and its marks predictable.
	everyPacket bool
	// noPacket makes it inspect none, as with most packets of a fast rule: a benchmark that feeds a
	// program its own output is a loop.
	noPacket bool
	// streamClock makes streams use the time in state 0, and streamBroken makes them claim numbers
	// without atomics, which a test has to detect.
	streamClock, streamBroken bool
	// anyTick lets plain packets take the short way without another packet of the same tick before
	// them.
	anyTick bool
}

func (e embedded) relay(m *mapSet, can Capabilities, have *ebpf.Program) (*ebpf.Program, error) {
	spec, err := e.known.relay()
	if err != nil {
		return nil, fmt.Errorf("read relay program: %w", err)
	}
	if err := e.setTimeout(spec); err != nil {
		return nil, err
	}
	if err := e.setGuard(spec); err != nil {
		return nil, err
	}
	for name, on := range map[string]bool{"stream_test_clock": e.streamClock, "stream_test_broken": e.streamBroken, "plain_test_any_tick": e.anyTick} {
		if err := spec.Variables[name].Set(on); err != nil {
			return nil, fmt.Errorf("set %s: %w", name, err)
		}
	}
	if err := fitKernel(spec, can); err != nil {
		return nil, err
	}
	if m.isLoaded(spec.Programs[bpf.RelayProgRelay], have) {
		return have.Clone()
	}
	var out struct {
		Relay *ebpf.Program `ebpf:"relay"`
	}
	if err := loadInto(spec, m, &out); err != nil {
		return nil, fmt.Errorf("load relay program: %w", err)
	}
	return out.Relay, nil
}

// fitKernel removes features that the kernel lacks from XDP programs. All programs that see the
// same frames must agree on support for several buffers: the kernel refuses to mix them in one
// devmap.
func fitKernel(spec *ebpf.CollectionSpec, can Capabilities) error {
	for _, p := range spec.Programs {
		if !can.MultiBuffer {
			p.Flags &^= unix.BPF_F_XDP_HAS_FRAGS
			replaceBuffLen(p)
		}
	}
	const name = "socket_multi_buffer"
	if v := spec.Variables[name]; v != nil {
		if err := v.Set(can.SocketMultiBuffer); err != nil {
			return fmt.Errorf("set %s: %w", name, err)
		}
	}
	return nil
}

// replaceBuffLen makes a program measure the first and only buffer of a frame instead of calling
// for its total length. A branch in C would make the verifier process half as many instructions
// again on every kernel.
func replaceBuffLen(p *ebpf.ProgramSpec) {
	const name = "first_buffer"
	used := false
	for i := range p.Instructions {
		ins := &p.Instructions[i]
		if ins.IsBuiltinCall() && asm.BuiltinFunc(ins.Constant) == asm.FnXdpGetBuffLen {
			call := asm.Call.Label(name)
			call.Metadata = ins.Metadata
			*ins = call.WithReference(name)
			used = true
		}
	}
	if !used {
		return
	}
	// Offsets into struct xdp_md of include/uapi/linux/bpf.h.
	const data, dataEnd = 0, 4
	first := asm.LoadMem(asm.R0, asm.R1, dataEnd, asm.Word).WithSymbol(name)
	if main := btf.FuncMetadata(&p.Instructions[0]); main != nil { // it takes the same argument
		first = btf.WithFuncMetadata(first, &btf.Func{Name: name, Type: main.Type, Linkage: btf.StaticFunc})
		first = first.WithSource(p.Instructions[0].Source()) // the kernel requires a line for each function
	}
	p.Instructions = append(p.Instructions,
		first,
		asm.LoadMem(asm.R1, asm.R1, data, asm.Word),
		asm.Sub.Reg(asm.R0, asm.R1),
		asm.Return(),
	)
}

func (e embedded) setTimeout(spec *ebpf.CollectionSpec) error {
	if e.fragmentTimeout == 0 {
		return nil
	}
	if err := spec.Variables["fragment_timeout_ns"].Set(uint64(e.fragmentTimeout)); err != nil {
		return fmt.Errorf("set fragment_timeout_ns: %w", err)
	}
	return nil
}

func (e embedded) setGuard(spec *ebpf.CollectionSpec) error {
	set := map[string]uint32{"guard_secret": rand.Uint32()}
	if e.everyPacket {
		set = map[string]uint32{"guard_secret": 0, "guard_budget": math.MaxUint32}
	}
	// Tests that set the time of fragments send one frame repeatedly, like loops do.
	if e.noPacket || e.fragmentTimeout != 0 && !e.everyPacket {
		set["guard_budget"], set["guard_watch"] = 0, 0
	}
	for name, value := range set {
		if err := spec.Variables[name].Set(value); err != nil {
			return fmt.Errorf("set %s: %w", name, err)
		}
	}
	return nil
}

func (embedded) egress(m *mapSet, can Capabilities, have *ebpf.Program) (*ebpf.Program, error) {
	spec, err := bpf.LoadEgress()
	if err != nil {
		return nil, fmt.Errorf("read egress program: %w", err)
	}
	if err := fitKernel(spec, can); err != nil {
		return nil, err
	}
	if m.isLoaded(spec.Programs[bpf.EgressProgEgress], have) {
		return have.Clone()
	}
	var out struct {
		Egress *ebpf.Program `ebpf:"egress"`
	}
	if err := loadInto(spec, m, &out); err != nil {
		return nil, fmt.Errorf("load egress program: %w", err)
	}
	return out.Egress, nil
}

func (e embedded) transmit(m *mapSet) (*bpf.TransmitPrograms, error) {
	spec, err := e.known.transmit()
	if err != nil {
		return nil, fmt.Errorf("read transmit programs: %w", err)
	}
	for variable, of := range map[string]*ebpf.Map{"devices_id": m.Devices, "cpus_id": m.Cpus} {
		info, err := of.Info()
		if err != nil {
			return nil, fmt.Errorf("map for %s: %w", variable, err)
		}
		id, ok := info.ID()
		if !ok {
			return nil, fmt.Errorf("map ids are %w", ErrNotSupported)
		}
		if err := spec.Variables[variable].Set(uint32(id)); err != nil {
			return nil, fmt.Errorf("set %s: %w", variable, err)
		}
	}
	cookie, err := netnsCookie()
	if err != nil {
		return nil, err
	}
	if err := spec.Variables["netns_cookie"].Set(cookie); err != nil {
		return nil, fmt.Errorf("set netns_cookie: %w", err)
	}
	var out bpf.TransmitPrograms
	if err := loadInto(spec, m, &out); err != nil {
		return nil, fmt.Errorf("load transmit programs: %w", err)
	}
	return &out, nil
}

// configSection has the variable by which programs read the only entry of map config: they know its
// address then (bpf/include/config.h).
const configSection = ".data.config"

// useConfig makes a program refer to map config there. Idempotent.
func useConfig(p *ebpf.ProgramSpec) {
	for i := range p.Instructions {
		if ins := &p.Instructions[i]; ins.Reference() == configSection {
			*ins = ins.WithReference(bpf.RelayMapConfig)
		}
	}
}

// loadInto loads the programs that to asks for against the given maps.
func loadInto(spec *ebpf.CollectionSpec, m *mapSet, to any) error {
	replacements := map[string]*ebpf.Map{}
	for name, mapped := range m.byName() {
		if s := spec.Maps[name]; s != nil {
			s.MaxEntries = mapped.MaxEntries()
			replacements[name] = mapped
		}
	}
	for _, p := range spec.Programs {
		useConfig(p)
	}
	err := spec.LoadAndAssign(to, &ebpf.CollectionOptions{MapReplacements: replacements})
	var verifier *ebpf.VerifierError
	switch {
	case err == nil:
		return nil
	case errors.As(err, &verifier):
		return fmt.Errorf("%w (%s): its verifier refuses the program: %w", ErrNotSupported, kernelRelease(), err)
	case errors.Is(err, ebpf.ErrNotSupported):
		return fmt.Errorf("%w (%s): %w", ErrNotSupported, kernelRelease(), err)
	case errors.Is(err, unix.EPERM):
		return permissionError(err)
	default:
		return err
	}
}

// isLoaded says whether a loaded program, if there is one, is what loading the spec would give, by the
// criteria of sameProgram. If that is unknown, it is not: loading is always right.
func (m *mapSet) isLoaded(spec *ebpf.ProgramSpec, p *ebpf.Program) bool {
	if p == nil {
		return false
	}
	info, err := p.Info()
	if err != nil {
		return false
	}
	useConfig(spec)
	instructions := slices.Clone(spec.Instructions)
	// Marshal resolves calls and jumps, of which the kernel's hash has the offsets.
	if instructions.Marshal(io.Discard, spec.ByteOrder) != nil {
		return false
	}
	if same, err := instructions.HasTag(info.Tag, spec.ByteOrder); err != nil || !same {
		return false
	}
	used, ok := info.MapIDs()
	references := spec.Instructions.ReferenceOffsets()
	ids, err := m.ids()
	if !ok || err != nil {
		return false
	}
	for name, id := range ids {
		if _, uses := references[name]; uses != slices.Contains(used, id) {
			return false
		}
	}
	return true
}

// sameProgram says whether two loaded programs have the same instructions, by their hash, and
// work on the same of the shared maps: a migration replaces some. Constants are not compared: to open
// their map by its id takes CAP_SYS_ADMIN. Those of pinned programs follow from the kernel or from the pin.
func (m *mapSet) sameProgram(a, b *ebpf.Program) (bool, error) {
	infoA, err := a.Info()
	if err != nil {
		return false, fmt.Errorf("program info: %w", err)
	}
	infoB, err := b.Info()
	if err != nil {
		return false, fmt.Errorf("program info: %w", err)
	}
	if infoA.Tag != infoB.Tag {
		return false, nil
	}
	mapsA, okA := infoA.MapIDs()
	mapsB, okB := infoB.MapIDs()
	if !okA || !okB {
		return false, fmt.Errorf("the maps of a program are %w to be told", ErrNotSupported)
	}
	ids, err := m.ids()
	if err != nil {
		return false, err
	}
	for _, id := range ids {
		if slices.Contains(mapsA, id) != slices.Contains(mapsB, id) {
			return false, nil
		}
	}
	return true, nil
}
