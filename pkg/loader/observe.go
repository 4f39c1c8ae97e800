package loader

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"xdpcast/bpf"
	"xdpcast/pkg/flow"
)

// Observation is the result of Observe: the differences from the Loader's state.
type Observation struct {
	// Lost are the attachments that no longer exist: the interface is gone, even if another one has
	// the same index, or the link was detached by force. The Loader forgets them; Attach attaches
	// again.
	Lost []Attachment
	// Repaired describes each repair in one line.
	Repaired []string
	// Errs are failures to check or repair something.
	Errs []error
}

func (o *Observation) repaired(format string, args ...any) {
	o.Repaired = append(o.Repaired, fmt.Sprintf(format, args...))
}

func (o *Observation) fail(err error) {
	if err != nil {
		o.Errs = append(o.Errs, err)
	}
}

// Observe checks everything in the kernel, besides the rules' own entries, that packets need or
// that should outlive the process: links, devmap rows, the map config, and pins. It repairs
// whatever differs from the Loader's state, except for lost attachments. It makes about as many
// system calls as there are interfaces, devmaps and pins; if there are very many devmaps, each call
// checks some of them.
func (l *Loader) Observe() Observation {
	var o Observation
	if l.adopted { // else Open
		o.fail(l.clearOrphanBroadcasts())
	}
	l.observeLinks(&o)
	l.observeTapped(&o)
	l.observeDevices(&o)
	l.observePins(&o) // before devmaps are opened by their pins
	l.observeBroadcasts(&o)
	l.observeConfig(&o)
	return o
}

// observeLinks forgets defunct XDP links, and restores the relay program in those that another
// process has updated.
func (l *Loader) observeLinks(o *Observation) {
	for _, index := range slices.Sorted(maps.Keys(l.links)) {
		a := l.links[index]
		info, err := a.info()
		switch {
		case errors.Is(err, unix.ENODEV):
			o.Lost = append(o.Lost, a.Attachment)
			o.fail(l.forgetLink(index))
		case err != nil:
			o.fail(err)
		case uint32(info.Program) != a.ProgramID:
			err := a.link.Update(l.relay)
			if err == nil {
				err = a.fillIDs()
			}
			if err != nil {
				o.fail(fmt.Errorf("interface %s runs program %d, not the relay program: %w", a.Interface, info.Program, err))
				continue
			}
			o.repaired("interface %s ran program %d: it runs the relay program again", a.Interface, info.Program)
		}
	}
}

// info reads the link. The error matches ENODEV if its interface is gone or replaced.
func (a *attachment) info() (*link.Info, error) {
	info, err := a.link.Info()
	if err != nil {
		return nil, fmt.Errorf("link of interface %s: %w", a.Interface, err)
	}
	if xdp := info.XDP(); xdp == nil || int(xdp.Ifindex) != a.Index {
		return nil, fmt.Errorf("link of interface %s leads nowhere: %w", a.Interface, unix.ENODEV)
	}
	return info, nil
}

// forgetLink drops a defunct link.
func (l *Loader) forgetLink(index int) error {
	a := l.links[index]
	delete(l.links, index)
	return errors.Join(removePins(linkPin(l.opts.PinDir, index)), a.link.Close(), l.dropQueriers(index))
}

// observeTapped is observeLinks for the tcx links. Lost ones are attached again if the interface
// exists.
func (l *Loader) observeTapped(o *Observation) {
	lost := false
	for _, index := range slices.Sorted(maps.Keys(l.tapped)) {
		t := l.tapped[index]
		if t.link == nil {
			continue
		}
		info, err := t.link.Info()
		switch {
		case err != nil:
			o.fail(fmt.Errorf("tcx link of %s: %w", programInterface(index), err))
		case info.TCX() == nil || int(info.TCX().Ifindex) != index:
			delete(l.tapped, index)
			o.fail(errors.Join(removePins(tappedPin(l.opts.PinDir, index)), t.link.Close()))
			o.repaired("the tapped program was off %s", programInterface(index))
			lost = true
		}
	}
	if !lost {
		return
	}
	inputs := map[int]bool{}
	for _, e := range l.rules {
		if e.rule.Path == flow.PathFanout && !e.rule.Local {
			_, err := hasEthernetHeader(e.rule.In.Index)
			inputs[e.rule.In.Index] = err == nil
		}
	}
	maps.DeleteFunc(inputs, func(_ int, there bool) bool { return !there })
	l.attachTapped(inputs)
}

// observeDevices refills the rows of the map devices that the kernel emptied when their interface
// disappeared. A missing interface is no error: no packet goes to it.
func (l *Loader) observeDevices(o *Observation) {
	egress := l.egressID(o)
	for _, index := range slices.Sorted(maps.Keys(l.devices)) {
		p := l.devices[index]
		if p.rowUsers == 0 {
			continue
		}
		var have bpf.RelayBpfDevmapVal
		err := l.maps.Devices.Lookup(p.row, &have)
		if err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			o.fail(fmt.Errorf("read row %d of devices: %w", p.row, err))
			continue
		}
		program := ebpf.ProgramID(have.BpfProg.Fd) // read, it is the program's id
		p.rowHasProg = err == nil && program != 0
		if err == nil && int(have.Ifindex) == index && (program == egress || program == 0 && p.slotUsers == 0) {
			continue
		}
		if l.writeRow(p) == nil {
			o.repaired("outputs on %s had no device: their row is filled again", programInterface(index))
		}
	}
}

func (l *Loader) egressID(o *Observation) ebpf.ProgramID {
	info, err := l.egress.Info()
	if err != nil {
		o.fail(fmt.Errorf("egress program: %w", err))
		return 0
	}
	id, _ := info.ID()
	return id
}

// observedRows is the number of devmap rows that one Observe reads.
const observedRows = 8192

// observeBroadcasts is observeDevices for the devmaps of rules with several outputs.
func (l *Loader) observeBroadcasts(o *Observation) {
	if len(l.broadcasts) == 0 {
		return
	}
	egress := l.egressID(o)
	keys := slices.Sorted(maps.Keys(l.broadcasts))
	start, _ := slices.BinarySearch(keys, l.broadcastCursor)
	filled := map[int]bool{}
	for i, rows := 0, 0; i < len(keys) && rows < observedRows; i++ {
		key := keys[(start+i)%len(keys)]
		f := l.broadcasts[key]
		rows += 1 + len(f.indexes)
		o.fail(l.observeBroadcast(key, f, egress, filled))
		l.broadcastCursor = key + "\x00" // the smallest string after it
	}
	for _, index := range slices.Sorted(maps.Keys(filled)) {
		o.repaired("outputs on %s of rules with several had no device: their rows are filled again", programInterface(index))
	}
}

func (l *Loader) observeBroadcast(key string, f *broadcast, egress ebpf.ProgramID, filled map[int]bool) error {
	if len(f.indexes) == 0 {
		return nil
	}
	devmap, err := l.openDevmap(key, f)
	if err != nil {
		return err
	}
	for row, index := range f.indexes {
		var have bpf.RelayBpfDevmapVal
		err := devmap.Lookup(uint32(row), &have)
		if err == nil && int(have.Ifindex) == index && ebpf.ProgramID(have.BpfProg.Fd) == egress {
			continue
		}
		if l.setSlot(devmap, uint32(row), index) == nil {
			filled[index] = true
		}
	}
	return devmap.Close()
}

func (l *Loader) observeConfig(o *Observation) {
	want := l.config(l.lookups.kinds())
	var have bpf.RelayConfig
	if err := l.maps.Config.Lookup(uint32(0), &have); err != nil {
		o.fail(fmt.Errorf("read map config: %w", err))
		return
	}
	if have == want {
		return
	}
	if err := l.writeConfig(); err != nil {
		o.fail(err)
		return
	}
	o.repaired("map config was changed: it is written again")
}

// observePins restores missing pins: without them the relay would end with the process.
func (l *Loader) observePins(o *Observation) {
	dir := l.opts.PinDir
	have := map[string]bool{}
	for _, sub := range []string{"", programsDir, linksDir, broadcastsDir} {
		entries, err := os.ReadDir(filepath.Join(dir, sub))
		if errors.Is(err, os.ErrNotExist) {
			err = os.MkdirAll(filepath.Join(dir, sub), 0o700)
		}
		if err != nil {
			o.fail(fmt.Errorf("look at pins: %w", err))
			return
		}
		for _, e := range entries {
			have[filepath.Join(dir, sub, e.Name())] = true
		}
	}
	if err := l.lock.renew(l.opts); err != nil {
		o.fail(err)
		return
	}
	missing := 0
	for path, p := range l.pins() {
		if have[path] {
			continue
		}
		missing++
		// A pinned object remembers its path, and would not be pinned there again.
		err := p.Unpin()
		if err == nil {
			err = repin(p, path)
		}
		o.fail(err)
	}
	for key, f := range l.broadcasts {
		if have[broadcastPin(dir, f.id)] {
			continue
		}
		missing++
		devmap, err := l.openDevmap(key, f) // pins it, or a replacement
		if err == nil {
			err = devmap.Close()
		}
		o.fail(err)
	}
	if missing > 0 {
		o.repaired("%d pins were removed from %s: they are made again", missing, dir)
	}
}

type unpinner interface {
	pinner
	Unpin() error
}

// pins are all pins of the state by path.
func (l *Loader) pins() map[string]unpinner {
	dir := l.opts.PinDir
	all := map[string]unpinner{relayPin(dir): l.relay, egressPin(dir): l.egress}
	for name, p := range l.attached {
		all[filepath.Join(dir, programsDir, name)] = p
	}
	for kind := range tableKinds {
		all[filepath.Join(dir, tableNames[kind].pin)] = l.tables[kind]
	}
	for name, m := range l.maps.byName() {
		all[filepath.Join(dir, name)] = m
	}
	for index, a := range l.links {
		all[linkPin(dir, index)] = a.link
	}
	for name, t := range l.transmit {
		all[filepath.Join(dir, linksDir, name)] = t
	}
	for index, t := range l.tapped {
		if t.link != nil {
			all[tappedPin(dir, index)] = t.link
		}
	}
	return all
}
