package loader

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
)

// Programs of links are also pinned, so that the next process can compare them with its own:
// opening them by id would require CAP_SYS_ADMIN.

// runs says whether a link runs this program, which was pinned when it was attached. One without a
// pin, from an earlier release, counts as different.
func (l *Loader) runs(lk link.Link, p *ebpf.Program, pin string) (bool, error) {
	info, err := lk.Info()
	if err != nil {
		return false, fmt.Errorf("link info: %w", err)
	}
	pinned, err := ebpf.LoadPinnedProgram(pin, nil)
	if errors.Is(err, os.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("open pin %s: %w", pin, err)
	}
	of, err := pinned.Info()
	if err != nil {
		return false, errors.Join(fmt.Errorf("program info: %w", err), pinned.Close())
	}
	if id, ok := of.ID(); !ok || id != info.Program {
		return false, pinned.Close()
	}
	same, err := l.maps.sameProgram(pinned, p)
	return same, errors.Join(err, l.keepAttached(pin, pinned))
}

// pinProgram pins an attached program, replacing the previous pin.
func (l *Loader) pinProgram(p *ebpf.Program, path string) error {
	clone, err := p.Clone() // because p would remember the path
	if err != nil {
		return fmt.Errorf("pin %s: %w", path, err)
	}
	if err := repin(clone, path); err != nil {
		return errors.Join(err, clone.Close())
	}
	return l.keepAttached(path, clone)
}

// keepAttached keeps the program of a pin open, for Observe to pin it again.
func (l *Loader) keepAttached(path string, p *ebpf.Program) error {
	name := filepath.Base(path)
	old := l.attached[name]
	l.attached[name] = p
	return old.Close()
}

func (l *Loader) closeAttached() error {
	var errs []error
	for name, p := range l.attached {
		errs = append(errs, p.Close())
		delete(l.attached, name)
	}
	return errors.Join(errs...)
}
