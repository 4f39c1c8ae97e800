package forward

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"xdpcast/pkg/fanout"
)

// Keeper keeps descriptors open beyond the process, as a service manager does. A path never calls its
// methods concurrently.
type Keeper interface {
	// Keep stores a duplicate of fd under a unique name.
	Keep(name string, fd int) error
	// Drop closes the descriptors stored under these names.
	Drop(names ...string) error
}

// FanoutHandover holds the groups of another process's [Fanout], for one that continues with them: packets
// wait in their rings meanwhile. The zero value has none.
type FanoutHandover struct {
	groups map[groupKey]map[int]int // descriptors by number
	rules  *os.File                 // see keptRules; nil: none
}

// groupName begins the names of a group's descriptors. They are short, since all that a process
// inherits share one environment variable.
const groupName = "f."

// fileName is the name of a group's nth descriptor: f.INDEX.N, or f.INDEXs.N for packets that this
// host sends.
func (k groupKey) fileName(n int) string {
	direction := ""
	if k.fromHost {
		direction = "s"
	}
	return fmt.Sprintf("%s%d%s.%d", groupName, k.index, direction, n)
}

func parseFileName(name string) (key groupKey, n int, ok bool) {
	rest, ours := strings.CutPrefix(name, groupName)
	group, number, dotted := strings.Cut(rest, ".")
	group, key.fromHost = strings.CutSuffix(group, "s")
	index, err := strconv.ParseInt(group, 10, 32)
	key.index = int(index)
	n64, errN := strconv.ParseInt(number, 10, 32)
	n = int(n64)
	return key, n, ours && dotted && err == nil && errN == nil && name == key.fileName(n)
}

// IsRing says whether a descriptor's name is one that a Fanout has given.
func IsRing(name string) bool {
	_, _, ok := parseFileName(name)
	return ok || name == rulesName
}

// Add adds a descriptor by the name that it was passed or kept under, and takes ownership. It returns
// false, and does nothing, if the name is not one that a Fanout has given, or is taken.
func (h *FanoutHandover) Add(name string, fd int) bool {
	if name == rulesName && h.rules == nil {
		h.rules = os.NewFile(uintptr(fd), name)
		return true
	}
	key, n, ok := parseFileName(name)
	if !ok {
		return false
	}
	if _, taken := h.groups[key][n]; taken {
		return false
	}
	if h.groups == nil {
		h.groups = map[groupKey]map[int]int{}
	}
	if h.groups[key] == nil {
		h.groups[key] = map[int]int{}
	}
	h.groups[key][n] = fd
	return true
}

// Each calls do for each descriptor, which the handover keeps, with its name.
func (h *FanoutHandover) Each(do func(name string, fd int)) {
	if h == nil {
		return
	}
	for _, key := range sortedGroups(h.groups) {
		for _, n := range slices.Sorted(maps.Keys(h.groups[key])) {
			do(key.fileName(n), h.groups[key][n])
		}
	}
	if h.rules != nil {
		do(rulesName, int(h.rules.Fd()))
	}
}

// Close closes the descriptors.
func (h *FanoutHandover) Close() error {
	if h == nil {
		return nil
	}
	var errs []error
	for _, files := range h.groups {
		for _, fd := range files {
			errs = append(errs, unix.Close(fd))
		}
	}
	if h.rules != nil {
		errs = append(errs, h.rules.Close())
	}
	h.groups, h.rules = nil, nil
	return errors.Join(errs...)
}

// Discard closes the descriptors, and has keeper drop them.
func (h *FanoutHandover) Discard(keeper Keeper) error {
	if h == nil {
		return nil
	}
	var names []string
	h.Each(func(name string, _ int) { names = append(names, name) })
	err := h.Close()
	if keeper != nil && len(names) > 0 {
		err = errors.Join(err, keeper.Drop(names...))
	}
	return err
}

// duplicates returns duplicates of a group's descriptors.
func (h *FanoutHandover) duplicates(key groupKey) (fds []int, err error) {
	files := h.groups[key]
	for n := range len(files) {
		fd, ok := files[n]
		if ok {
			fd, err = unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 3)
		} else {
			err = fmt.Errorf("descriptor %d of %d is missing", n, len(files))
		}
		if err != nil {
			for _, fd := range fds {
				err = errors.Join(err, unix.Close(fd))
			}
			return nil, err
		}
		fds = append(fds, fd)
	}
	return fds, nil
}

// HandOver returns duplicates of the path's groups, for another process: see FanoutOptions.Inherited. The
// path works on until Suspend. The caller must Close the result.
func (f *Fanout) HandOver() (_ *FanoutHandover, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	h := &FanoutHandover{}
	add := func(name string, fd int) {
		if err != nil {
			return
		}
		if fd, err = unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 3); err == nil {
			h.Add(name, fd)
		}
	}
	for key, g := range f.groups {
		for n, fd := range g.group.Files() {
			add(key.fileName(n), fd)
		}
	}
	if f.rules.file != nil {
		add(rulesName, int(f.rules.file.Fd()))
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("hand the fanout path over: %w", err), h.Close())
	}
	return h, nil
}

// Suspend ends the workers for a process that has what HandOver returned: every packet that they have
// taken has been sent, later ones wait in the rings. The path can then only be closed. Its senders are
// closed only then, since the kernel takes a grace period for each.
func (f *Fanout) Suspend() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.suspended || f.closed {
		return nil
	}
	f.suspended = true
	errs := []error{f.rules.invalidate()}
	for _, g := range f.groups {
		errs = append(errs, g.stop())
	}
	return errors.Join(errs...)
}

// notInherited says why the previous process's groups cannot be used.
type notInherited struct{ cause error }

func (e *notInherited) Error() string {
	return "inherit the rings of the previous daemon: " + e.cause.Error()
}
func (e *notInherited) Unwrap() error { return e.cause }

// inherit maps the group of the previous process; nil if there is none that can be used. That of an
// ended process may be unusable by itself; a running one's are inherited all or not at all.
func (f *Fanout) inherit(key groupKey, opts fanout.Options) (*fanout.Group, error) {
	h := f.opts.Inherited
	if h == nil || h.groups[key] == nil {
		return nil, nil
	}
	fds, err := h.duplicates(key)
	var g *fanout.Group
	if err == nil {
		g, err = fanout.Inherit(opts, fds)
	}
	if err == nil {
		return g, nil
	}
	if f.opts.Suspend != nil {
		return nil, &notInherited{err}
	}
	f.log.Info("the rings of the previous daemon are not inherited", "interface", opts.Interface, "cause", err)
	one := FanoutHandover{groups: map[groupKey]map[int]int{key: h.groups[key]}}
	delete(h.groups, key)
	if err := one.Discard(f.opts.Keeper); err != nil {
		f.log.Warn("close the rings of the previous daemon", "error", err)
	}
	return nil, nil
}

// resume takes the inherited groups over from the previous process.
func (f *Fanout) resume(fresh []*fanoutGroup) error {
	if !slices.ContainsFunc(fresh, func(g *fanoutGroup) bool { return g.inherited }) {
		return nil
	}
	live := f.opts.Suspend != nil
	if live {
		if err := f.opts.Suspend(); err != nil {
			return &notInherited{err}
		}
	}
	since := time.Now().Add(-f.opts.stale).UnixNano()
	for _, g := range fresh {
		if !g.inherited {
			continue
		}
		if live && !f.opts.Own && !g.group.Released() {
			return &notInherited{fmt.Errorf("the previous daemon still uses those of interface %s", g.name)}
		}
		if err := g.group.Resume(); err != nil {
			return &notInherited{err}
		}
		for _, w := range g.workers {
			if !live {
				w.since = since
			}
		}
	}
	return nil
}

// disinherit gives the previous process's groups up: packets go to groups of this path once the gate is
// open, or, without that process, at once.
func (f *Fanout) disinherit(why error) error {
	f.log.Info("the rings of the previous daemon are not inherited", "cause", why)
	if err := f.opts.Inherited.Discard(f.opts.Keeper); err != nil {
		f.log.Warn("close the rings of the previous daemon", "error", err)
	}
	f.opts.Inherited, f.opts.Suspend = nil, nil
	if f.opts.Gate == nil {
		return nil
	}
	gate, err := newGate(f.opts.Gate)
	f.opts.Gate = nil
	if err != nil {
		return err
	}
	closed, err := newFilter(gate)
	if err != nil {
		return err
	}
	old := f.filter
	f.filter, f.gated = closed, true
	return old.close()
}

// settleInherited ends the use of what the previous process has handed over, once this path has its
// groups.
func (f *Fanout) settleInherited(fresh []*fanoutGroup) {
	h, live := f.opts.Inherited, f.opts.Suspend != nil
	f.opts.Inherited, f.opts.Suspend = nil, nil
	if h != nil && !live {
		// The keeper has them already.
		for _, g := range fresh {
			if !g.inherited {
				continue
			}
			g.kept = len(h.groups[g.groupKey])
			for _, fd := range h.groups[g.groupKey] {
				if err := unix.Close(fd); err != nil {
					f.log.Warn("close a descriptor of the previous daemon", "error", err)
				}
			}
			delete(h.groups, g.groupKey)
		}
	}
	if h != nil && !live && f.rules.file == nil {
		f.rules.file, h.rules = h.rules, nil
	}
	if err := h.Discard(f.opts.Keeper); err != nil {
		f.log.Warn("close the rings of the previous daemon", "error", err)
	}
	if f.opts.Gate != nil { // of a process whose groups were inherited
		if err := f.opts.Gate.Close(); err != nil {
			f.log.Warn("close the gate of the previous daemon", "error", err)
		}
		f.opts.Gate = nil
	}
	for _, g := range fresh {
		f.keep(g)
	}
}

// keep has the keeper keep the group's descriptors.
func (f *Fanout) keep(g *fanoutGroup) {
	if f.opts.Keeper == nil || g.kept > 0 {
		return
	}
	for n, fd := range g.group.Files() {
		if err := f.opts.Keeper.Keep(g.fileName(n), fd); err != nil {
			f.log.Warn("the rings of an input end with this process: they are not kept for the next", "interface", g.name, "error", err)
			f.drop(g)
			return
		}
		g.kept++
	}
}

// drop has the keeper drop the group's descriptors.
func (f *Fanout) drop(g *fanoutGroup) {
	var names []string
	for n := range g.kept {
		names = append(names, g.fileName(n))
	}
	g.kept = 0
	if len(names) == 0 {
		return
	}
	if err := f.opts.Keeper.Drop(names...); err != nil {
		f.log.Warn("drop the kept rings of an input", "interface", g.name, "error", err)
	}
}

// defaultStale is the age from which packets that waited for this process are discarded: a stream that
// was stopped for that long does not go on where it was.
const defaultStale = 10 * time.Second

// discards says whether a frame that was received at this time has waited for this process too long.
func (w *fanoutWorker) discards(received int64) bool {
	if w.since == 0 {
		return false
	}
	if received >= w.since {
		w.since = 0
		return false
	}
	if w.discarded.Add(1) == 1 {
		w.log.Warn("packets that waited too long for a daemon are discarded")
	}
	return true
}
