package forward

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"runtime/debug"
	"slices"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"xdpcast/pkg/flow"
	"xdpcast/pkg/loader"
)

// keptRules are the rules of a path in a file without a name that the Keeper keeps with the rings: should this process
// be killed, the next one forwards with them before it has read anything else ([ContinueFanout]).
//
// The file begins with a header, little-endian: magic, whether the rest is valid, its length, and the time of
// CLOCK_BOOTTIME at which a living process last said so. A change of rules invalidates it first, so that a
// process that is killed at any moment leaves rules that were in force, or none.
type keptRules struct {
	file    *os.File // nil until rules are kept
	valid   bool
	changed time.Time // since when it is not
	stamped time.Time
	failed  bool // logged
	macs    [][6]byte
}

// rulesName is the name of their descriptor.
const rulesName = groupName + "rules"

const (
	rulesMagic  = "xdpcast\x01"
	offsetValid = len(rulesMagic)
	offsetSize  = offsetValid + 4
	offsetStamp = offsetSize + 4
	rulesHeader = offsetStamp + 8

	// keepAfter is how long rules must not have changed: of many changes, one after another, each costs nothing.
	keepAfter = 100 * time.Millisecond
	// stampEvery is how often a living process says so; rulesAge is the age from which rules are not used: the host may have
	// changed much since.
	stampEvery = 3 * time.Second
	rulesAge   = stampEvery + defaultStale
	// mostKept bounds the time for writing and reading them: 10 us a rule.
	mostKept = 4096
	// notSoon is longer than any wait.
	notSoon = time.Hour
)

// errNoRules says that the process before has kept no rules, or was killed while they changed.
var errNoRules = errors.New("no rules are kept")

// FanoutRules are what a process's [Fanout] forwarded when it ended.
type FanoutRules struct {
	Program string // the file that the process ran
	State   uint32 // the pinned state in which it counted: loader.Loader.StateID
	Flows   []flow.Flow
	Counts  map[string]loader.CounterIDs // of the flows, by name
	Own     []netip.Addr
	OwnMACs [][6]byte
	Links   []keptLink // the interfaces of the flows
}

// keptLink identifies an interface.
type keptLink struct {
	Index int
	Name  string
	MAC   net.HardwareAddr
}

// changeRules invalidates the kept rules unless they are these.
func (f *Fanout) changeRules(rules []flow.Flow, own []netip.Addr) error {
	want := slices.DeleteFunc(slices.Clone(rules), func(r flow.Flow) bool { return r.Path != flow.PathFanout })
	if f.set.given.has(want, own) {
		return nil
	}
	return f.rules.invalidate()
}

func (f *Fanout) changeMACs(macs [][6]byte) {
	if slices.Equal(macs, f.rules.macs) {
		return
	}
	if err := f.rules.invalidate(); err != nil {
		f.log.Warn("kept rules of the fanout path", "error", err)
	}
	f.rules.macs = slices.Clone(macs)
}

func (k *keptRules) invalidate() error {
	k.valid, k.changed = false, time.Now()
	if k.file == nil {
		return nil
	}
	return k.putUint32(offsetValid, 0)
}

func (k *keptRules) putUint32(offset int, v uint32) error {
	_, err := k.file.WriteAt(binary.LittleEndian.AppendUint32(nil, v), int64(offset))
	if err != nil {
		return fmt.Errorf("kept rules: %w", err)
	}
	return nil
}

func (k *keptRules) close() error {
	if k.file == nil {
		return nil
	}
	err := k.file.Close()
	k.file = nil
	return err
}

// KeepRules has the keeper keep the rules in force, once they have not changed for a while, with the pinned state of
// this loader.Loader.StateID. It returns whether rules are kept, if only those before a change that is just over, and when it
// wants to be called again; errors are logged.
func (f *Fanout) KeepRules(state func() (uint32, error)) (kept bool, again time.Duration) {
	f.mu.Lock()
	defer f.mu.Unlock()
	k, now := &f.rules, time.Now()
	if f.closed || f.suspended || f.opts.Keeper == nil {
		return false, notSoon
	}
	var err error
	switch wait := k.changed.Add(keepAfter).Sub(now); {
	case k.valid && now.Sub(k.stamped) < stampEvery:
		return true, stampEvery - now.Sub(k.stamped)
	case k.valid:
		err = k.stamp(now)
	case len(f.set.given.rules) == 0 || len(f.set.given.rules) > mostKept:
		return false, notSoon
	case wait > 0:
		return k.file != nil, wait
	default:
		err = f.writeRules(state, now)
	}
	if err != nil {
		if !k.failed {
			f.log.Warn("rules of the fanout path are not kept for the next daemon, which relays them later", "error", err)
		}
		k.failed = true
		return false, rulesAge
	}
	k.failed = false
	return true, stampEvery
}

func (k *keptRules) stamp(now time.Time) error {
	at, err := sinceBoot()
	if err == nil {
		_, err = k.file.WriteAt(binary.LittleEndian.AppendUint64(nil, uint64(at)), int64(offsetStamp))
	}
	k.stamped = now
	return err
}

// sinceBoot is the time of CLOCK_BOOTTIME.
func sinceBoot() (time.Duration, error) {
	var now unix.Timespec
	err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &now)
	return time.Duration(now.Nano()), err
}

func (f *Fanout) writeRules(state func() (uint32, error), now time.Time) error {
	k := &f.rules
	r, err := f.rulesInForce(state)
	if err != nil {
		return err
	}
	text, err := json.Marshal(r)
	if err != nil {
		return err
	}
	fresh := k.file == nil
	if fresh {
		fd, err := unix.MemfdCreate("xdpcast-rules", unix.MFD_CLOEXEC)
		if err != nil {
			return err
		}
		k.file = os.NewFile(uintptr(fd), rulesName)
	}
	header := make([]byte, rulesHeader)
	copy(header, rulesMagic)
	binary.LittleEndian.PutUint32(header[offsetSize:], uint32(len(text)))
	if _, err := k.file.WriteAt(append(header, text...), 0); err != nil {
		return err
	}
	if err := k.stamp(now); err != nil {
		return err
	}
	if err := k.putUint32(offsetValid, 1); err != nil {
		return err
	}
	if fresh {
		if err := f.opts.Keeper.Keep(rulesName, int(k.file.Fd())); err != nil {
			return errors.Join(err, k.close())
		}
	}
	k.valid = true
	return nil
}

func (f *Fanout) rulesInForce(state func() (uint32, error)) (*FanoutRules, error) {
	f.set.mu.Lock()
	defer f.set.mu.Unlock()
	r := &FanoutRules{Flows: f.set.given.rules, Own: f.set.given.own, OwnMACs: f.rules.macs, Counts: map[string]loader.CounterIDs{}}
	var err error
	if r.State, err = state(); err != nil {
		return nil, err
	}
	if r.Program, err = ownProgram(); err != nil {
		return nil, err
	}
	for _, rule := range f.set.table.rules {
		if id, first, ok := rule.open.IDs(); ok {
			r.Counts[rule.rule.Name] = loader.CounterIDs{Rule: id, FirstOutput: first}
		}
	}
	r.Links, err = r.links()
	return r, err
}

// ownProgram identifies the file that this process runs.
func ownProgram() (string, error) {
	info, err := os.Stat("/proc/self/exe")
	if err != nil {
		return "", err
	}
	s, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return "", errors.New("stat of the program: unknown type")
	}
	return fmt.Sprintf("%d:%d:%d:%d", s.Dev, s.Ino, s.Size, s.Mtim.Nano()), nil
}

// links reads the interfaces of the flows that exist.
func (r *FanoutRules) links() (links []keptLink, err error) {
	used := map[int]bool{}
	for i := range r.Flows {
		used[r.Flows[i].In.Index] = true
		for _, o := range r.Flows[i].Out {
			used[o.Index] = true
		}
	}
	all, err := net.Interfaces()
	if err != nil {
		return nil, err
	}
	for _, i := range all {
		if used[i.Index] {
			links = append(links, keptLink{i.Index, i.Name, i.HardwareAddr})
		}
	}
	return links, nil
}

// Rules reads the rules that the process before has kept, if this process can forward with them: it runs the same
// file, the interfaces are the same ones, and that process lived a few seconds ago.
func (h *FanoutHandover) Rules() (*FanoutRules, error) {
	if h == nil || h.rules == nil {
		return nil, errNoRules
	}
	info, err := h.rules.Stat()
	if err != nil {
		return nil, err
	}
	const most = 64 << 20
	if info.Size() < int64(rulesHeader) || info.Size() > most {
		return nil, fmt.Errorf("%d bytes of rules: want %d to %d", info.Size(), rulesHeader, most)
	}
	text := make([]byte, info.Size())
	if _, err := h.rules.ReadAt(text, 0); err != nil {
		return nil, err
	}
	header, text := text[:rulesHeader], text[rulesHeader:]
	if string(header[:offsetValid]) != rulesMagic {
		return nil, errors.New("kept by another release")
	}
	if binary.LittleEndian.Uint32(header[offsetValid:]) != 1 {
		return nil, errNoRules
	}
	size := int(binary.LittleEndian.Uint32(header[offsetSize:]))
	if size > len(text) {
		return nil, fmt.Errorf("%d bytes of rules, want %d", len(text), size)
	}
	now, err := sinceBoot()
	if err != nil {
		return nil, err
	}
	if age := now - time.Duration(binary.LittleEndian.Uint64(header[offsetStamp:])); age < 0 || age > rulesAge {
		return nil, fmt.Errorf("kept %v ago: want at most %v", age.Round(time.Second), rulesAge)
	}
	r := &FanoutRules{}
	if err := json.Unmarshal(text[:size], r); err != nil {
		return nil, fmt.Errorf("rules: %w", err)
	}
	return r, r.fit(h)
}

// fit says why this process cannot forward with the rules and the groups of a handover.
func (r *FanoutRules) fit(h *FanoutHandover) error {
	program, err := ownProgram()
	if err != nil {
		return err
	}
	if r.Program != program {
		return errors.New("kept by another program")
	}
	if len(r.Flows) == 0 {
		return errNoRules
	}
	for i := range r.Flows {
		if h.groups[groupOf(r.Flows[i].In)] == nil {
			return fmt.Errorf("rule %s has no kept ring", r.Flows[i].Name)
		}
	}
	links, err := r.links()
	if err != nil {
		return err
	}
	if !slices.EqualFunc(links, r.Links, func(a, b keptLink) bool {
		return a.Index == b.Index && a.Name == b.Name && slices.Equal(a.MAC, b.MAC)
	}) {
		return errors.New("the interfaces have changed")
	}
	return nil
}

// ContinueFanout opens the path with the rules and the groups of a process that has ended: it forwards as that did,
// beginning with the packets in the rings, when ContinueFanout returns. On an error the groups are closed.
func ContinueFanout(opts FanoutOptions, r *FanoutRules) (*Fanout, error) {
	f, err := OpenFanout(opts)
	if err != nil {
		return nil, errors.Join(err, opts.Inherited.Close())
	}
	f.mu.Lock()
	f.set.SetOwnMACs(r.OwnMACs)
	f.rules.macs = r.OwnMACs
	if err = f.sync(r.Flows, r.Own); err == nil && f.rules.file != nil {
		f.rules.valid = true // it still holds them
	}
	f.mu.Unlock()
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// Clone returns duplicates of all descriptors.
func (h *FanoutHandover) Clone() (_ *FanoutHandover, err error) {
	other := &FanoutHandover{}
	h.Each(func(name string, fd int) {
		if err != nil {
			return
		}
		if fd, err = unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 3); err == nil {
			other.Add(name, fd)
		}
	})
	if err != nil {
		return nil, errors.Join(fmt.Errorf("duplicate the rings: %w", err), other.Close())
	}
	return other, nil
}

// PrepareFanout makes a later ContinueFanout in this process faster: it opens a path, and reads the host's interfaces, for which
// features of the kernel are probed and code is read once. Errors are those of ContinueFanout.
func PrepareFanout() {
	if f, err := OpenFanout(FanoutOptions{}); err == nil {
		_ = f.Close()
	}
	_, _ = net.Interfaces()
	_, _ = ownProgram()
	// The table of descriptors has room for what comes: it grows by a grace period.
	for _, number := range []int{4096, 1024, 256} {
		if fd, err := unix.FcntlInt(0, unix.F_DUPFD_CLOEXEC, number); err == nil {
			_ = unix.Close(fd)
			break
		}
	}
	debug.FreeOSMemory()
}
