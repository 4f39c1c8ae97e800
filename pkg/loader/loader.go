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
	// Replace makes Open rebuild pinned state that it cannot take over because of its schema or
	// damage: the caller has the rules and publishes them with Sync, which also switches the
	// interfaces to the new programs. Warnings reports it, and how long packets were not relayed.
	// Counters restart. If false, Open refuses such state and changes nothing.
	Replace bool
	// Later lets Open leave to the first Observe, or Sync that needs it, what no packet waits for: rows that an
	// earlier process has left in the map of copies.
	Later bool
	// Inherited are the locks of a paused Loader that this one replaces. Open owns them.
	Inherited Locks
	// Early was opened with these options before; nil: nothing was. Open takes its locks and its account over.
	Early *Early
	// Logger receives log messages. Nil: discarded.
	Logger *slog.Logger

	definitions *definitions // of the embedded objects, for Open

	programs programSource           // tests substitute another release
	wait     func()                  // waitForPrograms; tests inspect what is kept while it waits
	probes   *kernelProbes           // tests substitute another kernel
	at       func(step string) error // tests return an error to simulate the death of the process there
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
	o.definitions = &definitions{}
	if o.programs == nil {
		o.programs = embedded{known: o.definitions}
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
	// shared: another Loader is paused, and its user-space paths keep counting.
	shared bool
	can    Capabilities

	specs    map[string]*ebpf.MapSpec // for inner maps
	maps     *mapSet
	relay    *ebpf.Program
	egress   *ebpf.Program
	transmit map[string]link.Link // by pin name
	// orphansDue: Observe, or a Sync that changes rules, must clear the rows of broadcasts that no rule has.
	orphansDue bool
	links      map[int]*attachment // by interface index
	tapped     map[int]*tapped     // by interface index
	// tappedPrograms are for interfaces with and without an Ethernet header.
	tappedPrograms map[bool]*ebpf.Program
	attached       map[string]*ebpf.Program // programs run by the links, by pin name

	tables         tables
	own            [4]uint64   // of map config
	ownMACs        [8]uint64   // of map config
	lookups        lookupCount // of the published rules
	extra          int         // number of their flow table entries beyond one each
	both           int         // number of them with takesBoth
	shortcuts      shortcuts   // to them
	rules          map[string]*entry
	places         places      // of the rules
	keep           map[int]int // rules with keepsFromStack by interface index of their input
	steered        int         // number of Steered rules
	plans          uint32      // number of plans made by Sync
	ids            *idAllocator
	outputs, stats *blockAllocator
	broadcasts     map[string]*broadcast
	socketsMu      sync.Mutex // guards the next two: workers set sockets from other goroutines
	socketRows     *idAllocator
	sockets        map[int]uint32  // row of the map xsks by interface index
	devices        map[int]*device // by interface index
	deviceRows     *idAllocator
	streams        map[streamKey]*streamEntry
	streamIDs      *idAllocator
	windows        *blockAllocator // rows of the map stream_windows

	taken taken // the last reading of Refusals

	steerTo       []int // set by SetSteering
	steering      []int // in map config
	steeringKnown bool  // the queues were created or kept by this process
	steeringFault error

	broadcastCursor string // where Observe continues among many devmaps
	routed          routed
	account         *account.Account
	counters        map[string][]openCounters // opened by paths, by rule
	lost            losses

	adopted  bool
	replaced *replacement // set if the previous pinned state could not be taken over
	cookie   uint64       // of the network namespace
	warnings []string
}

// Open takes the lock, and creates the pinned state or adopts that of an earlier process. Adopted
// programs that differ from this binary's are replaced without a gap. The caller must Close the
// Loader; pinned state remains.
//
// Errors to match: ErrLocked, ErrSchema, ErrDamaged, ErrForeignNamespace, ErrNotSupported.
func Open(opts Options) (_ *Loader, err error) {
	if opts, err = opts.withDefaults(); err != nil {
		return nil, err
	}
	defer opts.definitions.forget()
	l := &Loader{opts: opts, log: opts.Logger, shared: opts.Inherited.Pins != nil}
	if opts.Early != nil {
		l.opts.Inherited, l.shared = opts.Early.giveLocks(), false
	}
	l.reset()
	if l.specs, err = opts.definitions.mapSpecs(opts.MaxRules, opts.MaxOutputs); err != nil {
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
	if l.lock.run, err = takeRunLock(l.opts); err != nil {
		return nil, err
	}
	mounted, err := mountBPFFS(opts.PinDir)
	if err != nil {
		return nil, errors.Join(err, l.Close())
	}
	if err := l.open(); err != nil {
		return nil, errors.Join(err, l.Close(), mounted.undo()) // open files keep the mount busy
	}
	if opts.Early != nil {
		opts.Early.follow(l)
	}
	l.warn(warning)
	l.warn(privateMount(opts.PinDir))
	return l, nil
}

// reset discards what was read from pinned state.
func (l *Loader) reset() {
	l.links = map[int]*attachment{}
	l.transmit = map[string]link.Link{}
	l.tapped = map[int]*tapped{}
	l.tappedPrograms = map[bool]*ebpf.Program{}
	l.attached = map[string]*ebpf.Program{}
	l.rules, l.places, l.keep, l.steered = map[string]*entry{}, places{}, map[int]int{}, 0
	l.devices = map[int]*device{}
	l.broadcasts = map[string]*broadcast{}
	l.lookups, l.extra, l.both = lookupCount{}, 0, 0
	l.streams = map[streamKey]*streamEntry{}
	l.sockets = map[int]uint32{}
	l.counters = map[string][]openCounters{}
	l.lost = losses{}
	l.own, l.ownMACs, l.steering = [4]uint64{}, [8]uint64{}, nil
	l.orphansDue = false
}

// warn records a warning; "" is none.
func (l *Loader) warn(warning string) {
	if warning != "" {
		l.log.Warn(warning)
		l.warnings = append(l.warnings, warning)
	}
}

// open creates or adopts the pinned state, depending on what it finds after locking the pin
// directory.
func (l *Loader) open() (err error) {
	if err := sweep(l.opts.PinDir); err != nil {
		return err
	}
	for {
		l.lock.pins, err = takePinLock(l.opts)
		l.opts.Inherited = Locks{} // used up
		if err == nil {
			built, err := l.hasState()
			switch {
			case err != nil:
				return err
			case built:
				return l.takeOver()
			}
			// Another process, or this one, may have removed the directory.
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
	errs = append(errs, l.endMirror(), l.routed.close())
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

// hasState says whether the locked pin directory holds state of this network namespace. It removes
// state of a namespace that is gone.
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

// createHere builds the whole state in the pin directory itself, which is locked and empty. Until
// the mark is removed it counts as empty, so no process ever opens half of it.
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

// create builds the whole state in a separate directory and publishes it with one rename, so no
// process ever opens half of it. The error matches os.ErrExist if the pin directory was created in
// the meantime.
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

// build creates the whole state and pins it in a directory.
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
	if l.relay, err = l.opts.programs.relay(l.maps, l.can, nil); err != nil {
		return err
	}
	if l.egress, err = l.opts.programs.egress(l.maps, l.can, nil); err != nil {
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

// writeConfig writes the config for the published rules and the own addresses.
func (l *Loader) writeConfig() error { return l.writeLookups(l.lookups.kinds()) }

func (l *Loader) writeLookups(kinds lookups) error {
	config := l.config(kinds)
	if err := l.maps.Config.Put(uint32(0), &config); err != nil {
		return fmt.Errorf("write map config: %w", err)
	}
	return nil
}

// config is the wanted content of map config.
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
