package loader

import (
	"errors"
	"fmt"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// Upgrade replaces the programs in the kernel by this binary's, where they
// differ. Each replacement is one step of the kernel: a packet meets the old
// program or the new one, never none. After an error old and new ones may be
// mixed; they work on the same maps, and another Upgrade goes on.
//
// The egress program comes first: a relay program may hand over only what the
// egress program of its release or an older one understands.
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
	fresh, err := l.opts.programs.relay(l.maps, l.can)
	if err != nil {
		return err
	}
	same, err := sameProgram(fresh, l.relay)
	if err != nil || same {
		return errors.Join(err, fresh.Close())
	}
	for _, a := range l.links {
		err := a.link.Update(fresh)
		if errors.Is(err, unix.ENOLINK) {
			continue // its interface has gone since
		}
		if err != nil {
			return errors.Join(fmt.Errorf("upgrade interface %s: %w", a.Interface, err), fresh.Close())
		}
		if err := a.fillIDs(); err != nil {
			return errors.Join(err, fresh.Close())
		}
	}
	// Pinned last: a process that dies before leaves the old pin, and the next one
	// does it all again.
	if err := repin(fresh, relayPin(l.opts.PinDir)); err != nil {
		return errors.Join(err, fresh.Close())
	}
	old := l.relay
	l.relay = fresh
	l.log.Info("relay program upgraded", "interfaces", len(l.links))
	return old.Close()
}

// upgradeEgress replaces the egress program in every row that runs it.
func (l *Loader) upgradeEgress() error {
	fresh, err := l.opts.programs.egress(l.maps, l.can)
	if err != nil {
		return err
	}
	same, err := sameProgram(fresh, l.egress)
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

// renewRow puts the egress program of this binary into a row. A row that cannot be
// written belongs to an interface that is gone: the kernel has emptied it, and the
// next Sync replaces the rule.
func (l *Loader) renewRow(devmap *ebpf.Map, row uint32, index int) {
	if err := l.setSlot(devmap, row, index); err != nil {
		l.log.Warn("upgrade egress program", "error", err)
	}
}
