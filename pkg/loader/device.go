package loader

import (
	"errors"
	"fmt"

	"github.com/cilium/ebpf"

	"xdpcast/bpf"
)

// device is an output interface in use.
type device struct {
	index int
	users int // number of outputs that send on it
	// row of the map devices, held while rules with one output send on it
	row      uint32
	rowUsers int
	// slotUsers is the number of outputs of rules with several. If there are any, the row also runs
	// the egress program: all rows for one device must run the same program.
	slotUsers  int
	rowHasProg bool
}

// countDevice counts a user of an output interface; the first one creates its entry of port_stats.
func (l *Loader) countDevice(index int) error {
	p := l.devices[index]
	if p == nil {
		cpus, err := ebpf.PossibleCPU()
		if err != nil {
			return fmt.Errorf("possible cpus: %w", err)
		}
		err = l.maps.DeviceStats.Update(uint32(index), make([]bpf.TransmitDeviceStats, cpus), ebpf.UpdateNoExist)
		if err != nil && !errors.Is(err, ebpf.ErrKeyExist) {
			return fmt.Errorf("count interface with index %d: %w", index, err)
		}
		p = &device{index: index}
		l.devices[index] = p
	}
	p.users++
	return nil
}

// uncountDevice removes a user; the last one removes the counters.
func (l *Loader) uncountDevice(index int) error {
	p := l.devices[index]
	if p == nil {
		return fmt.Errorf("interface with index %d is not in use", index)
	}
	if p.users--; p.users > 0 {
		return nil
	}
	delete(l.devices, index)
	if err := l.maps.DeviceStats.Delete(uint32(index)); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return fmt.Errorf("forget interface with index %d: %w", index, err)
	}
	return nil
}

// useDevice is countDevice for a rule with one output, which sends through a row of the map
// devices.
func (l *Loader) useDevice(index int) (*device, error) {
	if err := l.countDevice(index); err != nil {
		return nil, err
	}
	p := l.devices[index]
	if p.rowUsers == 0 {
		if err := l.setRow(p); err != nil {
			return nil, errors.Join(err, l.uncountDevice(index))
		}
	}
	p.rowUsers++
	return p, nil
}

func (l *Loader) setRow(p *device) error {
	row, _, err := l.deviceRows.take()
	if err != nil {
		return fmt.Errorf("output interfaces: %w", err)
	}
	p.row = row
	ifindex := uint32(p.index)
	err = l.maps.DeviceRows.Put(row, ifindex)
	if err == nil {
		err = l.writeRow(p)
	}
	if err != nil {
		l.deviceRows.give(row)
		return errors.Join(err, l.maps.DeviceRows.Put(row, uint32(0)))
	}
	return nil
}

func (l *Loader) writeRow(p *device) error {
	if p.slotUsers > 0 {
		p.rowHasProg = true
		return l.setSlot(l.maps.Devices, p.row, p.index)
	}
	p.rowHasProg = false
	if err := l.maps.Devices.Put(p.row, &bpf.RelayBpfDevmapVal{Ifindex: uint32(p.index)}); err != nil {
		return fmt.Errorf("output to interface with index %d: %w", p.index, err)
	}
	return nil
}

// useSlot is countDevice for one output of a rule with several. The interface's row of devices
// keeps the egress program from then on: even when no rule needs it any more, frames that need it
// may still be queued for the device.
func (l *Loader) useSlot(index int) error {
	if err := l.countDevice(index); err != nil {
		return err
	}
	p := l.devices[index]
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
	if p := l.devices[index]; p != nil {
		p.slotUsers--
	}
	return l.uncountDevice(index)
}

// releaseDevice is the inverse of useDevice.
func (l *Loader) releaseDevice(index int) error {
	p := l.devices[index]
	if p == nil || p.rowUsers == 0 {
		return fmt.Errorf("interface with index %d has no row", index)
	}
	var errs []error
	if p.rowUsers--; p.rowUsers == 0 {
		// The kernel empties the row itself when the interface goes.
		if err := l.maps.Devices.Delete(p.row); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			errs = append(errs, fmt.Errorf("clear port: %w", err))
		}
		errs = append(errs, l.maps.DeviceRows.Put(p.row, uint32(0)))
		l.deviceRows.give(p.row)
	}
	return errors.Join(append(errs, l.uncountDevice(index))...)
}
