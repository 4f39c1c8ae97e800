package loader

import (
	"errors"
	"fmt"
	"path/filepath"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
)

// attachTransmit attaches the programs that count what devices did with frames after the relay
// program had returned, and pins them below dir. Without them the relay works; only these counters
// stay empty, and Warnings says so. Attached ones stay, unless they are of another release: two of
// them would count everything twice.
func (l *Loader) attachTransmit(dir string) {
	if err := l.tryAttachTransmit(dir); err != nil {
		l.warnings = append(l.warnings, fmt.Sprintf("frames that devices refuse are not counted: %v", err))
	}
}

func (l *Loader) tryAttachTransmit(dir string) error {
	programs, err := l.opts.programs.transmit(l.maps)
	if err != nil {
		return err
	}
	defer programs.Close() // the links hold them
	for name, p := range map[string]*ebpf.Program{
		pinDevmapXmit: programs.DevmapXmit, pinRedirectErr: programs.RedirectErr,
		pinCPUEnqueue: programs.CpumapEnqueue, pinCPUThread: programs.CpumapKthread,
	} {
		if err := l.attachTracing(name, filepath.Join(dir, linksDir, name), p); err != nil {
			return err
		}
	}
	return nil
}

func (l *Loader) attachTracing(name, path string, p *ebpf.Program) error {
	programPin := filepath.Join(filepath.Dir(filepath.Dir(path)), programsDir, name)
	if old := l.transmit[name]; old != nil {
		if same, err := l.runs(old, p, programPin); err == nil && same {
			return nil
		}
		// The kernel cannot update a tracing link: counting pauses for a moment.
		delete(l.transmit, name)
		if err := errors.Join(old.Close(), removePins(path)); err != nil {
			return fmt.Errorf("replace %s: %w", name, err)
		}
	}
	t, err := link.AttachTracing(link.TracingOptions{Program: p})
	if err != nil {
		return fmt.Errorf("attach %s: %w", name, err)
	}
	if err := errors.Join(repin(t, path), l.pinProgram(p, programPin)); err != nil {
		return errors.Join(err, t.Close())
	}
	l.transmit[name] = t
	return nil
}
