package loader

import (
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// Upgrade replaces the programs in the kernel with this binary's, where they differ. Each
// replacement is atomic: a packet meets the old program or the new one, never none. After an error
// old and new ones may be mixed; they work on the same maps, and another Upgrade continues.
//
// The egress program comes first: a relay program may hand over only what the egress program of its
// release or an older one understands.
func (l *Loader) Upgrade() error {
	if err := l.upgradeEgress(); err != nil {
		return err
	}
	if err := l.upgradeRelay(); err != nil {
		return err
	}
	return l.upgradeTapped()
}

func (l *Loader) upgradeRelay() error {
	fresh, err := l.opts.programs.relay(l.maps, l.can, l.relay)
	if err != nil {
		return err
	}
	same, err := l.maps.sameProgram(fresh, l.relay)
	if err != nil {
		return errors.Join(err, fresh.Close())
	}
	if same {
		return errors.Join(fresh.Close(), l.updateStrays())
	}
	for _, a := range l.links {
		if err := l.opts.step("upgrade"); err != nil {
			return errors.Join(err, fresh.Close())
		}
		err := a.link.Update(fresh)
		if errors.Is(err, unix.ENOLINK) {
			continue // its interface is gone since
		}
		if err != nil {
			return errors.Join(fmt.Errorf("upgrade interface %s: %w", a.Interface, err), fresh.Close())
		}
		if err := a.fillIDs(); err != nil {
			return errors.Join(err, fresh.Close())
		}
	}
	// Pinned last: if the process dies earlier, the old pin remains, and the next one repeats the
	// upgrade.
	if err := repin(fresh, relayPin(l.opts.PinDir)); err != nil {
		return errors.Join(err, fresh.Close())
	}
	old := l.relay
	l.relay = fresh
	l.log.Info("relay program upgraded", "interfaces", len(l.links))
	return old.Close()
}

// updateStrays brings the relay program to links that run another one: a process died before it
// came to them.
func (l *Loader) updateStrays() error {
	strays, err := l.strays()
	if err != nil {
		return err
	}
	for _, a := range strays {
		if err := a.link.Update(l.relay); err != nil && !errors.Is(err, unix.ENOLINK) {
			return fmt.Errorf("upgrade interface %s: %w", a.Interface, err)
		}
		if err := a.fillIDs(); err != nil {
			return err
		}
		l.log.Info("relay program upgraded where it was another one", "interface", a.Interface)
	}
	return nil
}

// strays are the attachments that run another program than the pinned one.
func (l *Loader) strays() (strays []*attachment, err error) {
	info, err := l.relay.Info()
	if err != nil {
		return nil, fmt.Errorf("program info: %w", err)
	}
	id, ok := info.ID()
	if !ok {
		return nil, fmt.Errorf("program ids are %w", ErrNotSupported)
	}
	for _, index := range slices.Sorted(maps.Keys(l.links)) {
		if a := l.links[index]; ebpf.ProgramID(a.ProgramID) != id {
			strays = append(strays, a)
		}
	}
	return strays, nil
}

// upgradeEgress replaces the egress program in every row that runs it.
func (l *Loader) upgradeEgress() error {
	fresh, err := l.opts.programs.egress(l.maps, l.can, l.egress)
	if err != nil {
		return err
	}
	same, err := l.maps.sameProgram(fresh, l.egress)
	if err != nil || same {
		return errors.Join(err, fresh.Close())
	}
	old := l.egress
	l.egress = fresh
	for key, f := range l.broadcasts {
		l.renewBroadcast(key, f)
	}
	for _, p := range l.devices {
		if p.rowUsers > 0 && p.rowHasProg {
			l.renewRow(l.maps.Devices, p.row, p.index)
		}
	}
	if err := repin(fresh, egressPin(l.opts.PinDir)); err != nil {
		return errors.Join(err, old.Close())
	}
	l.log.Info("egress program upgraded")
	return old.Close()
}

// renewRow writes this binary's egress program into a row. A row that cannot be written belongs to
// a removed interface: the kernel has emptied it, and the next Sync replaces the rule.
func (l *Loader) renewRow(devmap *ebpf.Map, row uint32, index int) {
	if err := l.setSlot(devmap, row, index); err != nil {
		l.log.Warn("upgrade egress program", "error", err)
	}
}
