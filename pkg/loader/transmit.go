package loader

import (
	"errors"
	"fmt"
	"path/filepath"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
)

// attachTransmit attaches the programs that count what devices did with frames
// after the relay program had returned, and pins them below dir. Without them the
// relay works; only these counters stay empty, and Warnings says so.
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
		t, err := link.AttachTracing(link.TracingOptions{Program: p})
		if err != nil {
			return fmt.Errorf("attach %s: %w", name, err)
		}
		if err := repin(t, filepath.Join(dir, linksDir, name)); err != nil {
			return errors.Join(err, t.Close())
		}
		l.transmit = append(l.transmit, t)
	}
	return nil
}
