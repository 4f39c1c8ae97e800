// Package loader manages the relay in the kernel: it loads the BPF programs, attaches them to
// interfaces, and keeps the maps in step with a set of resolved rules. All of it is pinned, so
// packets keep flowing when the process ends, and the next process takes over.
//
// Only one Loader at a time changes a pin directory (ensured by a lock file); Readers need no lock.
// The methods of a Loader are not safe for concurrent use, except where noted. Indexes are
// interface indexes; bytes are of whole frames; addresses and ports in Go types are in host order.
package loader

import (
	"cmp"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"sync"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"xdpcast/bpf"
	"xdpcast/internal/account"
)

// Defaults of Options.
const (
	DefaultPinDir     = "/sys/fs/bpf/xdpcast"
	DefaultRunDir     = "/run/xdpcast"
	DefaultMaxRules   = 16384
	DefaultMaxOutputs = 65536
)

// Options are the location and size of the pinned state.
type Options struct {
	// PinDir is a directory directly below a BPF file system. If none is mounted, Open mounts one
	// over /sys/fs/bpf or a directory called bpf that is new or empty, and over no other. Empty:
	// DefaultPinDir. Its name must not contain a dot.
	PinDir string
	// RunDir holds the lock file; no other user may write there. Empty: DefaultRunDir.
	RunDir string
	// MaxRules and MaxOutputs size the maps when the state is created; adopted state keeps its
	// sizes. 0: the defaults.
	MaxRules, MaxOutputs uint32
	// Replace has Open make the state anew where what is pinned cannot be taken over, because of
	// its schema or since it is damaged: the caller has the rules, and brings them in by Sync,
	// with which the interfaces go over. Warnings says so, and for how long packets were not
	// relayed. Counters begin anew. Otherwise Open refuses such state, and changes nothing.
	Replace bool
	// Inherited are the locks of a Loader that is at rest: this one takes its place. Open owns them.
	Inherited Locks
	// Logger receives log messages. Nil: discarded.
	Logger *slog.Logger

	programs programSource           // tests replace it to stand for another release
	wait     func()                  // waitForPrograms; tests look at what holds meanwhile
	probes   *kernelProbes           // tests replace it to stand for another kernel
	at       func(step string) error // tests have the process die there, with an error
}

// step is a point at which a process may die, for tests.
func (o Options) step(name string) error {
	if o.at == nil {
		return nil
	}
	return o.at(name)
}

// Absolute returns the options with absolute paths and defaults filled in.
func (o Options) Absolute() (Options, error) {
	for path, def := range map[*string]string{&o.PinDir: DefaultPinDir, &o.RunDir: DefaultRunDir} {
		abs, err := filepath.Abs(cmp.Or(*path, def))
		if err != nil {
			return o, fmt.Errorf("path %s: %w", *path, err)
		}
		*path = abs
	}
	return o, nil
}

func (o Options) withDefaults() (Options, error) {
	o, err := o.Absolute()
	if err != nil {
		return o, err
	}
	if o.MaxRules == 0 {
		o.MaxRules = DefaultMaxRules
	}
	if o.MaxOutputs == 0 {
		o.MaxOutputs = DefaultMaxOutputs
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.probes == nil {
		o.probes = probesOfKernel()
	}
	if o.programs == nil {
		o.programs = embedded{}
	}
	if o.wait == nil {
		o.wait = waitForPrograms
	}
	return o, nil
}

// Loader owns the pinned state of one pin directory.
type Loader struct {
	opts Options
	log  *slog.Logger
	lock locks
	// shared: another Loader rests, whose paths still count.
	shared bool
	can    Capabilities

	specs    map[string]*ebpf.MapSpec // for the maps inside maps
	maps     *mapSet
	relay    *ebpf.Program
	egress   *ebpf.Program
	transmit map[string]link.Link // by the name of the pin
	links    map[int]*attachment  // by interface index
	tapped   map[int]*tapped      // by interface index
	// tappedPrograms are for interfaces with and without an Ethernet header.
	tappedPrograms map[bool]*ebpf.Program
	attached       map[string]*ebpf.Program // by the name of the pin: what links run

	tables         tables
	own            [4]uint64   // of map config
	ownMACs        [8]uint64   // of map config
	lookups        lookupCount // of the rules in force
	extra          int         // entries of theirs in the flow tables besides one each
	both           int         // how many have takesBoth
	shortcuts      shortcuts   // to them
	rules          map[string]*entry
	plans          uint64 // how often Sync has compared
	ids            *idAllocator
	outputs, stats *blockAllocator
	broadcasts     map[string]*broadcast
	socketsMu      sync.Mutex // around the next two: workers of other goroutines set sockets
	socketRows     *idAllocator
	sockets        map[int]uint32  // row of the map xsks by interface index
	devices        map[int]*device // by interface index
	deviceRows     *idAllocator
	streams        map[streamKey]*streamEntry
	streamIDs      *idAllocator
	windows        *blockAllocator // rows of the map stream_windows

	taken taken // as Refusals last read it

	steerTo       []int // as SetSteering says
	steering      []int // as map config says
	steeringKnown bool  // the queues were made by this process, or left by it
	steeringFault error

	fanCursor string // where Observe goes on among many devmaps
	routed    routed
	account   *account.Account
	counters  map[string][]openCounters // that paths have opened, by rule
	lost      losses

	adopted  bool
	replaced *replacement // what was pinned could not be taken over
	cookie   uint64       // of the network namespace
	warnings []string
}

// Open takes the lock, and creates the pinned state or adopts that of an earlier process. Adopted
// programs that differ from this binary's are replaced without a gap. The caller must Close the
// Loader; pinned state remains.
//
// Errors to match: ErrLocked, ErrSchema, ErrForeignNamespace, ErrNotSupported.
func Open(opts Options) (_ *Loader, err error) {
	if opts, err = opts.withDefaults(); err != nil {
		return nil, err
	}
	l := &Loader{opts: opts, log: opts.Logger, shared: opts.Inherited.Pins != nil}
	l.reset()
	if l.specs, err = mapSpecs(opts.MaxRules, opts.MaxOutputs); err != nil {
		return nil, err
	}
	warning, err := checkCapabilities()
	if err != nil {
		return nil, err
	}
	if l.can, err = opts.probes.run(); err != nil {
		return nil, err
	}
	l.cookie, err = netnsCookie()
	if err != nil {
		return nil, err
	}
	if l.lock.run, err = takeRunLock(opts); err != nil {
		return nil, err
	}
	mounted, err := mountBPFFS(opts.PinDir)
	if err != nil {
		return nil, errors.Join(err, l.Close())
	}
	if err := l.open(); err != nil {
		return nil, errors.Join(err, l.Close(), mounted.undo()) // what is open keeps the mount
	}
	l.warn(warning)
	l.warn(privateMount(opts.PinDir))
	return l, nil
}

// reset forgets what was read of pinned state.
func (l *Loader) reset() {
	l.links = map[int]*attachment{}
	l.transmit = map[string]link.Link{}
	l.tapped = map[int]*tapped{}
	l.tappedPrograms = map[bool]*ebpf.Program{}
	l.attached = map[string]*ebpf.Program{}
	l.rules = map[string]*entry{}
	l.devices = map[int]*device{}
	l.broadcasts = map[string]*broadcast{}
	l.lookups, l.extra = lookupCount{}, 0
	l.streams = map[streamKey]*streamEntry{}
	l.sockets = map[int]uint32{}
	l.counters = map[string][]openCounters{}
	l.lost = losses{}
	l.own, l.ownMACs, l.steering = [4]uint64{}, [8]uint64{}, nil
}

// warn keeps a warning, "" for none.
func (l *Loader) warn(warning string) {
	if warning != "" {
		l.log.Warn(warning)
		l.warnings = append(l.warnings, warning)
	}
}

// open makes or adopts the pinned state, whichever is right once the pin directory is
// locked.
func (l *Loader) open() (err error) {
	if err := sweep(l.opts.PinDir); err != nil {
		return err
	}
	for {
		l.lock.pins, err = takePinLock(l.opts)
		l.opts.Inherited = Locks{} // it is used up
		if err == nil {
			built, err := l.hasState()
			switch {
			case err != nil:
				return err
			case built:
				return l.takeOver()
			}
			// Another process may have removed the directory, or this one.
			same, err := isAt(l.lock.pins, l.opts.PinDir)
			if err != nil {
				return err
			}
			if same {
				return l.createHere()
			}
			if err := l.lock.dropPins(); err != nil {
				return err
			}
			continue
		}
		if !errors.Is(err, os.ErrNotExist) {
			return err
		}
		if err := l.create(); !errors.Is(err, os.ErrExist) {
			return err
		}
		// Another process, with another run directory, was faster.
		if err := l.closeState(); err != nil {
			return err
		}
	}
}

// Close closes every file descriptor and releases the lock. Programs, maps and links stay pinned
// and keep working.
func (l *Loader) Close() error { return errors.Join(l.closeState(), l.lock.Close()) }

// closeState is Close without the locks.
func (l *Loader) closeState() error {
	var errs []error
	for _, a := range l.links {
		errs = append(errs, a.link.Close())
	}
	for _, t := range l.transmit {
		errs = append(errs, t.Close())
	}
	errs = append(errs, l.closeTapped(), l.closeAttached(), l.relay.Close(), l.egress.Close(), l.tables.Close())
	if l.account != nil {
		errs = append(errs, l.account.Close())
	}
	errs = append(errs, l.routed.close())
	if l.maps != nil {
		errs = append(errs, l.maps.Close())
	}
	l.links, l.transmit, l.relay, l.egress = map[int]*attachment{}, map[string]link.Link{}, nil, nil
	l.maps, l.account, l.warnings = nil, nil, nil
	return errors.Join(errs...)
}

// Adopted says whether Open found pinned state and took it over.
func (l *Loader) Adopted() bool { return l.adopted }

// Capabilities returns the kernel's optional features, as found by Open.
func (l *Loader) Capabilities() Capabilities { return l.can }

// Warnings describes degraded functions, one line each.
func (l *Loader) Warnings() []string {
	return slices.Concat(l.warnings, l.replaced.warnings(), l.tappedWarnings(), l.steeringWarnings(), l.accountWarnings())
}

// Limits returns the maximum number of rules and outputs.
func (l *Loader) Limits() (rules, outputs uint32) {
	return l.maps.Rules.MaxEntries(), l.maps.Outputs.MaxEntries()
}

// hasState says whether the pin directory, which is locked, holds state of this network
// namespace. State of one that is gone is removed.
func (l *Loader) hasState() (bool, error) {
	if dropped, err := l.dropForeign(); dropped || err != nil {
		return false, err
	}
	nothing, err := unbuilt(l.opts.PinDir)
	if errors.Is(err, os.ErrNotExist) {
		return false, nil
	}
	return !nothing, err
}

// createHere builds the whole state in the pin directory itself, which is locked and holds none.
// Until the mark is removed it counts as empty, so that no process ever opens half of it.
func (l *Loader) createHere() (err error) {
	dir := l.opts.PinDir
	if err := emptyPinDir(dir); err != nil {
		return err
	}
	mark := filepath.Join(dir, pinUnfinished)
	if err := os.Mkdir(mark, 0o700); err != nil {
		return fmt.Errorf("pin directory: %w", err)
	}
	if err := l.build(dir); err != nil {
		return errors.Join(err, emptyPinDir(dir))
	}
	if err := os.Remove(mark); err != nil {
		return errors.Join(fmt.Errorf("publish %s: %w", dir, err), emptyPinDir(dir))
	}
	l.log.Debug("pinned state made", "dir", dir)
	return nil
}

// create builds the whole state in a directory of its own and publishes it with
// one rename, so that no process ever opens half of it. The error matches os.ErrExist when
// the pin directory has appeared meanwhile.
func (l *Loader) create() (err error) {
	if l.lock.pins, err = newStaging(l.opts.PinDir); err != nil {
		return err
	}
	building := l.lock.pins.Name()
	defer func() {
		if err != nil {
			err = errors.Join(err, removePinDir(building), l.lock.pins.Close())
			l.lock.pins = nil
		}
	}()
	if err := l.build(building); err != nil {
		return err
	}
	if err := unix.Renameat2(unix.AT_FDCWD, building, unix.AT_FDCWD, l.opts.PinDir, unix.RENAME_NOREPLACE); err != nil {
		return fmt.Errorf("publish %s: %w", l.opts.PinDir, err)
	}
	if err := os.Remove(filepath.Join(l.opts.PinDir, pinBuilding)); err != nil {
		l.log.Warn("mark the pin directory as built", "error", err)
	}
	l.log.Debug("pinned state made", "dir", l.opts.PinDir)
	return nil
}

// build makes the whole state and pins it in a directory.
func (l *Loader) build(building string) (err error) {
	if l.maps, err = newMaps(l.opts); err != nil {
		return err
	}
	if err := errors.Join(l.openAccount(), l.openRouted()); err != nil {
		return err
	}
	if err := l.firstTables(); err != nil {
		return err
	}
	l.shortcuts = newShortcuts(l.maps.Shortcuts.MaxEntries(), true)
	if err := l.writeConfig(); err != nil {
		return err
	}
	if l.relay, err = l.opts.programs.relay(l.maps, l.can); err != nil {
		return err
	}
	if l.egress, err = l.opts.programs.egress(l.maps, l.can); err != nil {
		return err
	}
	if err := l.pinAll(building); err != nil {
		return err
	}
	l.attachTransmit(building)
	l.resetAllocators()
	return nil
}

func (l *Loader) resetAllocators() {
	l.ids = newIDAllocator(l.maps.Rules.MaxEntries())
	l.outputs = newBlockAllocator(l.maps.Outputs.MaxEntries())
	l.stats = newBlockAllocator(l.maps.OutputStats.MaxEntries())
	l.deviceRows = newIDAllocator(l.maps.Devices.MaxEntries())
	l.socketRows = newIDAllocator(l.maps.Xsks.MaxEntries() / bpf.MaxQueues)
	l.streamIDs = newIDAllocator(l.maps.Streams.MaxEntries())
	l.streamIDs.next = 1 // 0 is no stream
	l.windows = newBlockAllocator(l.maps.StreamWindows.MaxEntries())
}

// writeConfig writes what the rules in force and the own addresses ask for.
func (l *Loader) writeConfig() error { return l.writeLookups(l.lookups.kinds()) }

func (l *Loader) writeLookups(kinds lookups) error {
	config := l.config(kinds)
	if err := l.maps.Config.Put(uint32(0), &config); err != nil {
		return fmt.Errorf("write map config: %w", err)
	}
	return nil
}

// config is what the map config is to hold.
func (l *Loader) config(kinds lookups) bpf.RelayConfig {
	config := bpf.RelayConfig{
		Schema:      bpf.Schema,
		Lookup4:     uint16(kinds),
		Lookup6:     uint16(kinds >> 16),
		Own:         l.own,
		OwnMacs:     l.ownMACs,
		NetnsCookie: l.cookie,
		MaxRules:    l.maps.Rules.MaxEntries(),
		MaxOutputs:  l.maps.Outputs.MaxEntries(),
		Steered:     uint32(len(l.steering)),

		ShortcutShift: l.shortcuts.shiftInForce(),
	}
	for i, cpu := range l.steering {
		config.Cpu[i] = uint16(cpu)
	}
	return config
}

// netnsCookie identifies the network namespace of the calling thread
// (SO_NETNS_COOKIE, Linux 5.14).
func netnsCookie() (uint64, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, fmt.Errorf("socket: %w", err)
	}
	defer unix.Close(fd)
	cookie, err := unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
	if err != nil {
		return 0, fmt.Errorf("network namespace cookie: %w", err)
	}
	return cookie, nil
}
