package loader

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"xdpcast/bpf"
	"xdpcast/pkg/flow"
)

// tapped is the tapped program (bpf/tapped.bpf.c) on one interface.
type tapped struct {
	link link.Link
	// fault is why it is not attached, nil if it is.
	fault error
}

func tappedPin(dir string, index int) string {
	return filepath.Join(dir, linksDir, pinTapped+strconv.Itoa(index))
}

// tapped loads the program for interfaces with or without an Ethernet header.
func (e embedded) tapped(m *mapSet, ethernet bool, have *ebpf.Program) (*ebpf.Program, error) {
	spec, err := bpf.LoadTapped()
	if err != nil {
		return nil, fmt.Errorf("read tapped program: %w", err)
	}
	if err := e.setTimeout(spec); err != nil {
		return nil, err
	}
	if !ethernet {
		if err := spec.Variables["link_header"].Set(uint32(0)); err != nil {
			return nil, fmt.Errorf("set link_header: %w", err)
		}
	}
	if m.isLoaded(spec.Programs[bpf.TappedProgTapped], have) {
		return have.Clone()
	}
	var out struct {
		Tapped *ebpf.Program `ebpf:"tapped"`
	}
	if err := loadInto(spec, m, &out); err != nil {
		return nil, fmt.Errorf("load tapped program: %w", err)
	}
	return out.Tapped, nil
}

// tappedProgram loads the program once for all interfaces of a kind.
func (l *Loader) tappedProgram(index int) (*ebpf.Program, error) {
	ethernet, err := hasEthernetHeader(index)
	if err != nil {
		return nil, err
	}
	if p := l.tappedPrograms[ethernet]; p != nil {
		return p, nil
	}
	pin := tappedProgramPin(l.opts.PinDir, ethernet)
	pinned, err := ebpf.LoadPinnedProgram(pin, nil)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("open pin %s: %w", pin, err)
	}
	p, err := l.opts.programs.tapped(l.maps, ethernet, pinned)
	if err = errors.Join(err, pinned.Close()); err != nil {
		return nil, errors.Join(err, p.Close())
	}
	l.tappedPrograms[ethernet] = p
	return p, nil
}

// keepsFromStack says whether the packets of a rule, of PathFanout, must not reach the host's stack.
func keepsFromStack(r *flow.Flow) bool {
	return r.Path == flow.PathFanout && !r.Local && !r.In.FromHost
}

// attachTapped attaches the tapped program where needed. It does nothing until the flow tables say
// so. If it fails the relay still works, but the host's stack also gets the packets: Warnings says
// so, and the next Sync retries.
func (l *Loader) attachTapped(inputs map[int]bool) {
	for _, index := range slices.Sorted(maps.Keys(inputs)) {
		t := l.tapped[index]
		if t != nil && (t.fault == nil || errors.Is(t.fault, ErrNotSupported)) {
			continue
		}
		lk, err := l.attachTCX(index)
		if err != nil && t == nil {
			l.log.Warn("packets of the fanout path reach the host's stack", "interface", programInterface(index), "error", err)
		}
		l.tapped[index] = &tapped{link: lk, fault: err}
	}
}

// detachTapped detaches the tapped program from interfaces that no longer need it.
func (l *Loader) detachTapped(inputs map[int]bool) error {
	var errs []error
	for index, t := range l.tapped {
		if inputs[index] {
			continue
		}
		delete(l.tapped, index)
		if t.link != nil {
			errs = append(errs, releaseTCX(t.link), removePins(tappedPin(l.opts.PinDir, index)), t.link.Close())
		}
	}
	return errors.Join(errs...)
}

// attachTCX attaches before other programs, which do not see the relay's packets, as with XDP.
func (l *Loader) attachTCX(index int) (_ link.Link, err error) {
	if !l.can.TCX { // the verifier takes a while for the program
		return nil, fmt.Errorf("tcx is %w (needs Linux 6.6 or newer)", ErrNotSupported)
	}
	program, err := l.tappedProgram(index)
	if err != nil {
		return nil, err
	}
	lk, err := link.AttachTCX(link.TCXOptions{Program: program, Interface: index, Attach: ebpf.AttachTCXIngress, Anchor: link.Head()})
	if err != nil {
		return nil, fmt.Errorf("attach tapped program: %w", err)
	}
	if err := errors.Join(repin(lk, tappedPin(l.opts.PinDir, index)), l.pinTappedPrograms()); err != nil {
		return nil, errors.Join(err, lk.Close())
	}
	return lk, nil
}

// hasEthernetHeader says whether frames of an interface have an Ethernet header.
func hasEthernetHeader(index int) (bool, error) {
	dev, err := netlink.LinkByIndex(index)
	if err != nil {
		return false, fmt.Errorf("interface with index %d: %w", index, err)
	}
	kind := dev.Attrs().EncapType
	return kind == "ether" || kind == "loopback", nil
}

// releaseTCX detaches now; see attachment.release.
func releaseTCX(lk link.Link) error {
	if err := lk.Detach(); err != nil && !errors.Is(err, unix.ENOLINK) && !errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("detach tapped program: %w", err)
	}
	return nil
}

// openTCX opens a pinned link and returns its interface. The error matches ENODEV if that is gone.
func openTCX(path string) (lk link.Link, index int, err error) {
	lk, err = link.LoadPinnedLink(path, nil)
	if err != nil {
		return nil, 0, linkError(path, err)
	}
	info, err := lk.Info()
	if err == nil && info.TCX() == nil {
		err = damaged(filepath.Dir(filepath.Dir(path)), fmt.Errorf("pin %s is not a tcx link", path))
	} else if err == nil && info.TCX().Ifindex == 0 {
		err = fmt.Errorf("link %s: %w", path, unix.ENODEV)
	}
	if err != nil {
		return nil, 0, errors.Join(err, lk.Close())
	}
	return lk, int(info.TCX().Ifindex), nil
}

// adoptTapped takes over pinned links, and removes those of removed interfaces.
func (l *Loader) adoptTapped(paths []string) error {
	for _, path := range paths {
		lk, index, err := openTCX(path)
		if errors.Is(err, unix.ENODEV) {
			if err := removePins(path); err != nil {
				return err
			}
			continue
		}
		if err != nil {
			return err
		}
		l.tapped[index] = &tapped{link: lk}
	}
	return nil
}

// upgradeTapped replaces the program if it differs from this binary's.
func (l *Loader) upgradeTapped() error {
	for index, t := range l.tapped {
		if t.link == nil {
			continue
		}
		if err := l.upgradeTCX(t.link, index); err != nil && !errors.Is(err, unix.ENOLINK) {
			return fmt.Errorf("upgrade tapped program of interface with index %d: %w", index, err)
		}
	}
	return l.pinTappedPrograms()
}

func (l *Loader) upgradeTCX(lk link.Link, index int) error {
	fresh, err := l.tappedProgram(index)
	if err != nil {
		return err
	}
	ethernet, err := hasEthernetHeader(index)
	if err != nil {
		return err
	}
	// With two interfaces of a kind the pin may already be the new program: updating twice is
	// harmless.
	if same, err := l.runs(lk, fresh, tappedProgramPin(l.opts.PinDir, ethernet)); err != nil || same {
		return err
	}
	return lk.Update(fresh)
}

func tappedProgramPin(dir string, ethernet bool) string {
	if ethernet {
		return filepath.Join(dir, programsDir, pinTappedEthernet)
	}
	return filepath.Join(dir, programsDir, pinTappedBare)
}

// pinTappedPrograms pins the attached programs, so that the next process recognizes them.
func (l *Loader) pinTappedPrograms() error {
	for ethernet, p := range l.tappedPrograms {
		if err := l.pinProgram(p, tappedProgramPin(l.opts.PinDir, ethernet)); err != nil {
			return err
		}
	}
	return nil
}

// closeTapped closes the file descriptors; pins remain.
func (l *Loader) closeTapped() error {
	var errs []error
	for _, t := range l.tapped {
		if t.link != nil {
			errs = append(errs, t.link.Close())
		}
	}
	for _, p := range l.tappedPrograms {
		errs = append(errs, p.Close())
	}
	l.tapped, l.tappedPrograms = nil, nil
	return errors.Join(errs...)
}

// tappedWarnings says where the tapped program is missing.
func (l *Loader) tappedWarnings() (warnings []string) {
	for _, index := range slices.Sorted(maps.Keys(l.tapped)) {
		if fault := l.tapped[index].fault; fault != nil {
			warnings = append(warnings, fmt.Sprintf("packets of the fanout path from %s reach the host's stack, too: %v", programInterface(index), fault))
		}
	}
	return warnings
}

// programInterface names an interface, for messages.
func programInterface(index int) string {
	if dev, err := netlink.LinkByIndex(index); err == nil {
		return dev.Attrs().Name
	}
	return "interface " + strconv.Itoa(index)
}
