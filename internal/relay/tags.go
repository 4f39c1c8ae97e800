package relay

import (
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"xdpcast/internal/network"
	"xdpcast/internal/plan"
	"xdpcast/internal/savefile"
)

// A device that strips VLAN tags off received frames hides them from XDP, which then sees untagged
// frames. While a rule matches tags on an interface, stripping is switched off.

// tags reconciles which interfaces leave VLAN tags in the frames. It reads their state from the
// kernel. A file stores what was switched off, by interface name, for a later process, since the
// rules outlive this one.
type tags struct {
	file    string
	off     map[string][]string
	open    func(ifname string) (featureSet, error) // network.OpenFeatures; tests inject faults
	answers map[network.LinkID]error
	looked  map[network.LinkID]*network.Link // as of the last check of the interface's features
}

// featureSet is the features of one interface: *network.DeviceFeatures.
type featureSet interface {
	Active(name string) bool
	Set(names []string, on bool) error
	Close() error
}

func openFeatures(ifname string) (featureSet, error) { return network.OpenFeatures(ifname) }

// readTags reads the file. A damaged one is renamed, to be examined later: the interfaces then keep what was
// switched off, which does no harm, while a daemon that does not start would.
func readTags(file string, log *slog.Logger) (*tags, error) {
	t := &tags{file: file, off: map[string][]string{}, open: openFeatures, answers: map[network.LinkID]error{}, looked: map[network.LinkID]*network.Link{}}
	data, err := os.ReadFile(file)
	if errors.Is(err, os.ErrNotExist) {
		return t, nil
	}
	if err != nil {
		return nil, fmt.Errorf("features switched off earlier: %w", err)
	}
	if err := json.Unmarshal(data, &t.off); err != nil {
		aside := file + ".damaged"
		log.Warn("features switched off earlier cannot be read, and stay off on their interfaces", "file", file, "error", err, "kept_as", aside)
		t.off = map[string][]string{}
		if err := os.Rename(file, aside); err != nil {
			return nil, fmt.Errorf("features switched off earlier: %w", err)
		}
	}
	return t, nil
}

func (t *tags) save() error {
	if len(t.off) == 0 {
		if err := os.Remove(t.file); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
		return nil
	}
	data, err := json.Marshal(t.off)
	if err != nil {
		return err
	}
	if err := savefile.Stage(t.file, append(data, '\n')); err != nil {
		return err
	}
	return savefile.Commit(t.file)
}

// apply makes the plan's interfaces leave tags in the frames, and returns whether an answer
// changed. An interface is checked once, and again when it changes.
func (t *tags) apply(p *plan.Plan, now *network.Snapshot) (changed bool) {
	for _, id := range p.Tags {
		link := now.ByIndex(id.Index)
		if link == nil || link.LinkID != id {
			continue
		}
		before, known := t.answers[id]
		if known && t.looked[id] == link {
			continue
		}
		err := t.show(link.Name)
		t.answers[id], t.looked[id] = err, link
		changed = changed || !known || errorText(before) != errorText(err)
	}
	return changed
}

// again makes the next apply check all interfaces.
func (t *tags) again() { clear(t.looked) }

// rename keeps a stored entry when an interface is renamed.
func (t *tags) rename(before, now *network.Link) {
	if features := t.off[before.Name]; before.Name != now.Name && features != nil {
		delete(t.off, before.Name)
		t.off[now.Name] = union(t.off[now.Name], features)
	}
}

// show makes an interface leave tags in the frames. It is idempotent.
func (t *tags) show(ifname string) (err error) {
	f, err := t.open(ifname)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	var on []string
	for _, name := range network.TagFeatures() {
		if f.Active(name) {
			on = append(on, name)
		}
	}
	if len(on) == 0 {
		return nil
	}
	// Stored first: a crash in between restores too much, not too little.
	t.off[ifname] = union(t.off[ifname], on)
	if err := t.save(); err != nil {
		return fmt.Errorf("note the features of interface %s: %w", ifname, err)
	}
	if err := f.Set(on, false); err != nil {
		return fmt.Errorf("interface %s strips VLAN tags before XDP sees them, and that cannot be switched off (ethtool -K %s rxvlan off): %w", ifname, ifname, err)
	}
	return nil
}

// restore restores the features of interfaces that the plan no longer names. Removed interfaces are
// forgotten.
func (t *tags) restore(p *plan.Plan, now *network.Snapshot) error {
	keep := map[string]bool{}
	wanted := map[network.LinkID]bool{}
	for _, id := range p.Tags {
		wanted[id] = true
		if link := now.ByIndex(id.Index); link != nil {
			keep[link.Name] = true
		}
	}
	for id := range t.answers {
		if !wanted[id] {
			delete(t.answers, id)
			delete(t.looked, id)
		}
	}
	var errs []error
	changed := false
	for _, ifname := range slices.Sorted(maps.Keys(t.off)) {
		if keep[ifname] {
			continue
		}
		changed = true
		features := t.off[ifname]
		delete(t.off, ifname)
		f, err := t.open(ifname)
		if err != nil {
			if !errors.Is(err, unix.ENODEV) {
				errs = append(errs, err)
			}
			continue
		}
		if err := f.Set(features, true); err != nil {
			errs = append(errs, fmt.Errorf("switch %s of interface %s on again: %w", strings.Join(features, ", "), ifname, err))
		}
		errs = append(errs, f.Close())
	}
	if changed {
		errs = append(errs, t.save())
	}
	return errors.Join(errs...)
}

// note describes the change made to an interface; "" if none.
func (t *tags) note(ifname string) string {
	if len(t.off[ifname]) == 0 {
		return ""
	}
	return fmt.Sprintf("%s is off while rules match VLAN tags here", strings.Join(t.off[ifname], " and "))
}

func union(a, b []string) []string {
	all := append(slices.Clone(a), b...)
	slices.Sort(all)
	return slices.Compact(all)
}
