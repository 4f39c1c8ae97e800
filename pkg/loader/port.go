package loader

import (
	"errors"
	"fmt"

	"github.com/cilium/ebpf"

	"xdpcast/bpf"
)

// port is an output interface in use.
type port struct {
	index int
	users int // outputs that send on it
	// row of the map ports, held while rules with one output send on it
	row      uint32
	rowUsers int
	// slotUsers are outputs of rules with several. With one, the row runs the
	// egress program too: all rows for one device must run the same.
	slotUsers  int
	rowHasProg bool
}

// countPort notes a user of an output interface; the first one makes its entry of
// port_stats.
func (l *Loader) countPort(index int) error {
	p := l.ports[index]
	if p == nil {
		cpus, err := ebpf.PossibleCPU()
		if err != nil {
			return fmt.Errorf("possible cpus: %w", err)
		}
		err = l.maps.PortStats.Update(uint32(index), make([]bpf.TransmitPortStats, cpus), ebpf.UpdateNoExist)
		if err != nil && !errors.Is(err, ebpf.ErrKeyExist) {
			return fmt.Errorf("count interface with index %d: %w", index, err)
		}
		p = &port{index: index}
		l.ports[index] = p
	}
	p.users++
	return nil
}

// uncountPort takes a user away; with the last one the counters go.
func (l *Loader) uncountPort(index int) error {
	p := l.ports[index]
	if p == nil {
		return fmt.Errorf("interface with index %d is not in use", index)
	}
	if p.users--; p.users > 0 {
		return nil
	}
	delete(l.ports, index)
	if err := l.maps.PortStats.Delete(uint32(index)); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return fmt.Errorf("forget interface with index %d: %w", index, err)
	}
	return nil
}

// usePort is countPort for a rule with one output, which sends through a row of
// the map ports.
func (l *Loader) usePort(index int) (*port, error) {
	if err := l.countPort(index); err != nil {
		return nil, err
	}
	p := l.ports[index]
	if p.rowUsers == 0 {
		if err := l.setRow(p); err != nil {
			return nil, errors.Join(err, l.uncountPort(index))
		}
	}
	p.rowUsers++
	return p, nil
}

func (l *Loader) setRow(p *port) error {
	row, _, err := l.portRows.take()
	if err != nil {
		return fmt.Errorf("output interfaces: %w", err)
	}
	p.row = row
	ifindex := uint32(p.index)
	err = l.maps.PortRows.Put(row, ifindex)
	if err == nil {
		err = l.writeRow(p)
	}
	if err != nil {
		l.portRows.give(row)
		return errors.Join(err, l.maps.PortRows.Put(row, uint32(0)))
	}
	return nil
}

func (l *Loader) writeRow(p *port) error {
	if p.slotUsers > 0 {
		p.rowHasProg = true
		return l.setSlot(l.maps.Ports, p.row, p.index)
	}
	p.rowHasProg = false
	if err := l.maps.Ports.Put(p.row, &bpf.RelayBpfDevmapVal{Ifindex: uint32(p.index)}); err != nil {
		return fmt.Errorf("output to interface with index %d: %w", p.index, err)
	}
	return nil
}

// useSlot is countPort for one output of a rule with several. The interface's row
// of ports keeps the egress program from then on: when it could do without again,
// frames that need it may still be queued for the device.
func (l *Loader) useSlot(index int) error {
	if err := l.countPort(index); err != nil {
		return err
	}
	p := l.ports[index]
	p.slotUsers++
	if p.rowUsers > 0 && !p.rowHasProg {
		if err := l.writeRow(p); err != nil {
			return errors.Join(err, l.releaseSlot(index))
		}
	}
	return nil
}

// releaseSlot is the inverse of useSlot.
func (l *Loader) releaseSlot(index int) error {
	if p := l.ports[index]; p != nil {
		p.slotUsers--
	}
	return l.uncountPort(index)
}

// releasePort is the inverse of usePort.
func (l *Loader) releasePort(index int) error {
	p := l.ports[index]
	if p == nil || p.rowUsers == 0 {
		return fmt.Errorf("interface with index %d has no row", index)
	}
	var errs []error
	if p.rowUsers--; p.rowUsers == 0 {
		// The kernel empties the row itself when the interface goes.
		if err := l.maps.Ports.Delete(p.row); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			errs = append(errs, fmt.Errorf("clear port: %w", err))
		}
		errs = append(errs, l.maps.PortRows.Put(p.row, uint32(0)))
		l.portRows.give(p.row)
	}
	return errors.Join(append(errs, l.uncountPort(index))...)
}
