package loader

import (
	"errors"
	"fmt"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"xdpcast/bpf"
)

// programSource gives the programs of one release, loaded against its maps.
type programSource interface {
	relay(m *mapSet) (*ebpf.Program, error)
	egress(m *mapSet) (*ebpf.Program, error)
	tapped(m *mapSet, ethernet bool) (*ebpf.Program, error)
	transmit(m *mapSet) (*bpf.TransmitPrograms, error)
}

// embedded is this binary's own programs.
type embedded struct {
	// fragmentTimeout is how long a first fragment speaks for the others; 0 leaves
	// it as the program has it.
	fragmentTimeout time.Duration
}

func (e embedded) relay(m *mapSet) (*ebpf.Program, error) {
	spec, err := bpf.LoadRelay()
	if err != nil {
		return nil, fmt.Errorf("read relay program: %w", err)
	}
	if err := e.setTimeout(spec); err != nil {
		return nil, err
	}
	var out struct {
		Relay *ebpf.Program `ebpf:"relay"`
	}
	if err := loadInto(spec, m, &out); err != nil {
		return nil, fmt.Errorf("load relay program: %w", err)
	}
	return out.Relay, nil
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

func (embedded) egress(m *mapSet) (*ebpf.Program, error) {
	spec, err := bpf.LoadEgress()
	if err != nil {
		return nil, fmt.Errorf("read egress program: %w", err)
	}
	var out struct {
		Egress *ebpf.Program `ebpf:"egress"`
	}
	if err := loadInto(spec, m, &out); err != nil {
		return nil, fmt.Errorf("load egress program: %w", err)
	}
	return out.Egress, nil
}

func (embedded) transmit(m *mapSet) (*bpf.TransmitPrograms, error) {
	spec, err := bpf.LoadTransmit()
	if err != nil {
		return nil, fmt.Errorf("read transmit programs: %w", err)
	}
	for variable, of := range map[string]*ebpf.Map{"ports_id": m.Ports, "cpus_id": m.Cpus} {
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

// loadInto loads the programs that to asks for against the given maps.
func loadInto(spec *ebpf.CollectionSpec, m *mapSet, to any) error {
	replacements := map[string]*ebpf.Map{}
	for name, mapped := range m.byName() {
		if s := spec.Maps[name]; s != nil {
			s.MaxEntries = mapped.MaxEntries()
			replacements[name] = mapped
		}
	}
	err := spec.LoadAndAssign(to, &ebpf.CollectionOptions{MapReplacements: replacements})
	var verifier *ebpf.VerifierError
	switch {
	case err == nil:
		return nil
	case errors.Is(err, ebpf.ErrNotSupported):
		return fmt.Errorf("%w (needs Linux 5.18 or newer): %w", ErrNotSupported, err)
	case errors.Is(err, unix.EPERM) && !errors.As(err, &verifier):
		return fmt.Errorf("%w: needs root, or the capabilities CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON", err)
	default:
		return err
	}
}

// sameProgram compares two loaded programs by the hash of their instructions.
func sameProgram(a, b *ebpf.Program) (bool, error) {
	infoA, err := a.Info()
	if err != nil {
		return false, fmt.Errorf("program info: %w", err)
	}
	infoB, err := b.Info()
	if err != nil {
		return false, fmt.Errorf("program info: %w", err)
	}
	return infoA.Tag == infoB.Tag, nil
}
