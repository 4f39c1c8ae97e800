package loader

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"golang.org/x/sys/unix"
)

// takeOver takes over the pinned state: unchanged, migrated, or rebuilt.
func (l *Loader) takeOver() error {
	counters, err := l.migrate()
	if err == nil {
		err = l.adopt()
	}
	if counters != nil {
		if err == nil {
			l.carryOver(counters)
		}
		err = errors.Join(err, counters.done())
	}
	if err != nil && l.opts.Replace && (errors.Is(err, ErrSchema) || errors.Is(err, ErrDamaged)) {
		return l.replace(err)
	}
	return err
}

// carryOver completes a migration: no interface and no row of a devmap has an old program any
// longer.
func (l *Loader) carryOver(counters *carry) {
	l.opts.wait()
	grown, err := counters.finish()
	if err != nil {
		l.warn(fmt.Sprintf("what was counted while the pinned state was migrated is missing in some counters: %v", err))
		return
	}
	l.log.Debug("counters carried over", "grown meanwhile", grown)
}

// replacement is pinned state that was rebuilt because the previous one could not be taken over.
type replacement struct {
	why         error
	done        bool          // the interfaces run this release's program
	interrupted time.Duration // how long packets were not relayed
}

func (r *replacement) warnings() []string {
	switch {
	case r == nil:
		return nil
	case !r.done:
		return []string{fmt.Sprintf("pinned state was replaced, and its programs run until the rules are active: %v", r.why)}
	}
	return []string{fmt.Sprintf("pinned state was replaced: counters restarted at 0, and the streams of the kernel path were interrupted for %v: %v",
		r.interrupted.Round(time.Microsecond), r.why)}
}

// replace rebuilds the pinned state. The interfaces keep running their programs until rules are
// published: see endReplaced.
func (l *Loader) replace(why error) (err error) {
	head, err := l.header()
	if err != nil || head.cookie != l.cookie {
		return fmt.Errorf("%w; it is not replaced, since nothing proves that it belongs to this network namespace", why)
	}
	if err := l.closeState(); err != nil {
		return err
	}
	l.reset()
	dir := l.opts.PinDir
	building := filepath.Join(dir, pinMigrating)
	if err := removePins(building); err != nil {
		return err
	}
	if err := os.Mkdir(building, 0o700); err != nil {
		return fmt.Errorf("make pin directory: %w", err)
	}
	if err := l.build(building); err != nil {
		return errors.Join(why, err, removePins(building))
	}
	if err := os.Rename(building, filepath.Join(dir, pinMigrated)); err != nil {
		return errors.Join(fmt.Errorf("publish pinned state: %w", err), removePins(building))
	}
	if err := l.settleMigrated(); err != nil {
		return err
	}
	if err := errors.Join(l.sweepBroadcasts(), l.adoptWhatItCan()); err != nil {
		return err
	}
	l.replaced = &replacement{why: why}
	l.log.Warn("pinned state is replaced; its programs run until the rules are active", "why", why, "interfaces", len(l.links))
	return nil
}

// adoptWhatItCan takes over the links, and removes other pins from their directory.
func (l *Loader) adoptWhatItCan() error {
	dir := filepath.Join(l.opts.PinDir, linksDir)
	links, err := os.ReadDir(dir)
	if err != nil {
		return pinError(dir, err)
	}
	for _, f := range links {
		path := filepath.Join(dir, f.Name())
		switch name := f.Name(); {
		case l.transmit[name] != nil:
		case strings.HasPrefix(name, pinInterface):
			a, err := adoptLink(path)
			if err == nil {
				l.links[a.Index] = a
				continue
			}
			l.log.Info("pin of a link removed", "why", err)
			if err := removePins(path); err != nil {
				return err
			}
		case strings.HasPrefix(name, pinTapped):
			lk, index, err := openTCX(path)
			if err == nil {
				l.tapped[index] = &tapped{link: lk}
				continue
			}
			l.log.Info("pin of a link removed", "why", err)
			if err := removePins(path); err != nil {
				return err
			}
		default:
			if err := removePins(path); err != nil {
				return err
			}
		}
	}
	return nil
}

// endReplaced switches the interfaces to this release's program, now that rules are published.
// Frames of both programs must never share a bulk: the kernel runs the egress program of the first
// frame on all of them, and the two programs count outputs differently. So for a grace period in
// between, packets pass and are not relayed.
func (l *Loader) endReplaced() error {
	if l.replaced == nil || l.replaced.done {
		return nil
	}
	strays, err := l.strays()
	if err != nil {
		return err
	}
	if len(strays) > 0 {
		pass, err := l.passProgram()
		if err != nil {
			return err
		}
		defer pass.Close()
		began := time.Now()
		for _, a := range strays {
			if err := l.forceUpdate(a, pass); err != nil {
				return err
			}
		}
		l.opts.wait()
		for _, a := range strays {
			if err := l.forceUpdate(a, l.relay); err != nil {
				return err
			}
		}
		l.replaced.interrupted = time.Since(began)
	}
	l.replaced.done = true
	if err := l.upgradeTapped(); err != nil {
		return err
	}
	for _, warning := range l.replaced.warnings() {
		l.log.Warn(warning)
	}
	return nil
}

// passProgram loads an XDP program that passes all packets.
func (l *Loader) passProgram() (*ebpf.Program, error) {
	const xdpPass = 2 // include/uapi/linux/bpf.h
	spec := &ebpf.ProgramSpec{
		Name: "xdpcast_pass", Type: ebpf.XDP, AttachType: ebpf.AttachXDP, License: "Dual BSD/GPL",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, xdpPass), asm.Return()},
	}
	if l.can.MultiBuffer { // an interface with a large MTU accepts no other
		spec.Flags = unix.BPF_F_XDP_HAS_FRAGS
	}
	p, err := ebpf.NewProgram(spec)
	if err != nil {
		return nil, fmt.Errorf("load the program that passes packets: %w", err)
	}
	return p, nil
}

// forceUpdate updates a link or, if the kernel refuses (its program was made for another kind of
// attachment), reattaches.
func (l *Loader) forceUpdate(a *attachment, p *ebpf.Program) error {
	err := a.link.Update(p)
	switch {
	case errors.Is(err, unix.ENOLINK):
		return nil // its interface has gone
	case err == nil:
		return a.fillIDs()
	case p != l.relay:
		return nil // the second update reattaches it
	}
	delete(l.links, a.Index)
	if err := errors.Join(a.release(), removePins(linkPin(l.opts.PinDir, a.Index)), a.link.Close()); err != nil {
		return err
	}
	_, err = l.attach(a.Index, a.Mode)
	return err
}
