package loader

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"xdpcast/internal/lockfile"
)

// Directories below the pin directory, next to the maps.
const (
	programsDir   = "programs"
	linksDir      = "links"
	broadcastsDir = "broadcasts"
)

// Names of pins. bpffs allows no dots.
const (
	pinRelay       = "relay"
	pinEgress      = "egress"
	pinInterface   = "if"
	pinTapped      = "tapped"
	pinDevmapXmit  = "devmap_xmit"
	pinRedirectErr = "redirect_err"
	pinCPUEnqueue  = "cpumap_enqueue"
	pinCPUThread   = "cpumap_kthread"

	pinTappedEthernet = "tapped"
	pinTappedBare     = "tapped_bare" // for interfaces without an Ethernet header
)

func relayPin(dir string) string { return filepath.Join(dir, programsDir, pinRelay) }

func egressPin(dir string) string { return filepath.Join(dir, programsDir, pinEgress) }

// broadcastPin is the pin of a devmap, named by its id.
func broadcastPin(dir string, id ebpf.MapID) string {
	return filepath.Join(dir, broadcastsDir, strconv.FormatUint(uint64(id), 10))
}

// linkPin is the pin of a link, named by interface index: interface names may contain dots, and are
// reused.
func linkPin(dir string, index int) string {
	return filepath.Join(dir, linksDir, pinInterface+strconv.Itoa(index))
}

// pinBuilding is a directory in a pin directory under construction. It distinguishes the remains of
// a dead process from a pin directory with a similar name.
const pinBuilding = "building"

// stagingMark separates the name of a pin directory and the number of a staging directory.
const stagingMark = "_new_"

// pinUnfinished is a directory in a pin directory that is built in place, because it was prepared
// for a user who may not create one next to it.
const pinUnfinished = "unfinished"

// unbuilt says whether a pin directory is empty, or contains only the remains of a process that
// died while building.
func unbuilt(dir string) (bool, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return false, err
	}
	return len(entries) == 0 || slices.ContainsFunc(entries, func(e os.DirEntry) bool { return e.Name() == pinUnfinished }), nil
}

// newStaging creates a directory in which a pin directory is built before it is published, and
// locks it against sweep.
func newStaging(pinDir string) (*os.File, error) {
	for n := os.Getpid(); ; n++ { // a process of another PID namespace may have the same PID
		dir := pinDir + stagingMark + strconv.Itoa(n)
		err := os.Mkdir(dir, 0o700)
		if errors.Is(err, os.ErrExist) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("make pin directory: %w", err)
		}
		lock, err := lockfile.TakeDir(dir)
		if err == nil {
			if err = os.Mkdir(filepath.Join(dir, pinBuilding), 0o700); err == nil {
				return lock, nil
			}
			err = errors.Join(err, lock.Close())
		}
		return nil, errors.Join(fmt.Errorf("make pin directory: %w", err), removePinDir(dir))
	}
}

// mounted is the result of mountBPFFS.
type mounted struct {
	at           string // "" if there was a BPF file system
	parent, made string // the lowest and the topmost directory created for it; "" for none
}

// mountBPFFS mounts a BPF file system for the pin directory if there is none: at its parent, as
// systemd does at /sys/fs/bpf. A mount hides what is below it, so the parent must be /sys/fs/bpf,
// or a directory called bpf that is new or empty.
func mountBPFFS(pinDir string) (m mounted, err error) {
	if strings.Contains(filepath.Base(pinDir), ".") {
		return m, fmt.Errorf("pin directory %q: the BPF file system allows no dot in a name", pinDir)
	}
	parent := filepath.Dir(pinDir)
	if is, err := isBPFFS(parent); err == nil && is {
		return m, nil
	}
	if err := mayMount(pinDir, parent); err != nil {
		return m, err
	}
	m.parent, m.made = parent, topmostAbsent(parent)
	if err := os.MkdirAll(parent, 0o755); err != nil {
		return m, errors.Join(fmt.Errorf("make %s: %w", parent, err), m.undo())
	}
	if err := unix.Mount("bpf", parent, "bpf", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC|unix.MS_RELATIME, "mode=700"); err != nil {
		if errors.Is(err, unix.EPERM) {
			err = fmt.Errorf("%w: needs CAP_SYS_ADMIN, or a BPF file system that is mounted there before", err)
		}
		return m, errors.Join(fmt.Errorf("mount BPF file system at %s: %w", parent, err), m.undo())
	}
	m.at = parent
	return m, nil
}

// bpffsDir is where BPF file systems are mounted by convention.
const bpffsDir = "/sys/fs/bpf"

func mayMount(pinDir, parent string) error {
	if parent == bpffsDir {
		return nil
	}
	refuse := func(why string) error {
		return fmt.Errorf("pin directory %s: %s is no BPF file system, and none is mounted over it, as %s: want one below %s, or mount one first (mount -t bpf bpf DIR)",
			pinDir, parent, why, bpffsDir)
	}
	if filepath.Base(parent) != filepath.Base(bpffsDir) {
		return refuse("it is not called bpf")
	}
	entries, err := os.ReadDir(parent)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return nil
	case err != nil:
		return fmt.Errorf("pin directory %s: %w", pinDir, err)
	case len(entries) > 0:
		return refuse("it is not empty")
	}
	return nil
}

// topmostAbsent is the first missing directory on the way to dir, "" if all exist.
func topmostAbsent(dir string) (absent string) {
	for ; ; dir = filepath.Dir(dir) {
		if _, err := os.Lstat(dir); !errors.Is(err, os.ErrNotExist) {
			return absent
		}
		absent = dir
	}
}

// undo reverts the mount, and removes the directories created for it if they are empty.
func (m mounted) undo() error {
	if m.at != "" {
		if err := unix.Unmount(m.at, 0); err != nil {
			return fmt.Errorf("unmount %s: %w", m.at, err)
		}
	}
	for dir := m.parent; m.made != ""; dir = filepath.Dir(dir) {
		if err := os.Remove(dir); err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil // others have put something there
		}
		if dir == m.made {
			break
		}
	}
	return nil
}

func isBPFFS(path string) (bool, error) {
	var fs unix.Statfs_t
	if err := unix.Statfs(path, &fs); err != nil {
		return false, fmt.Errorf("statfs %s: %w", path, err)
	}
	return uint32(fs.Type) == unix.BPF_FS_MAGIC, nil
}

// sweep removes the remains of processes that died while building. Directories under construction
// are locked.
func sweep(pinDir string) error {
	stale, err := staging(pinDir)
	if err != nil {
		return err
	}
	var errs []error
	for _, dir := range stale {
		lock, err := lockfile.TakeDir(dir)
		var held *lockfile.HeldError
		if errors.As(err, &held) || errors.Is(err, os.ErrNotExist) {
			continue // its builder is alive, or done
		}
		if err != nil {
			errs = append(errs, err)
			continue
		}
		errs = append(errs, removePinDir(dir), lock.Close())
	}
	return errors.Join(errs...)
}

// removePinDir removes a pin directory and everything in it. The directory stays, empty, if this
// process may not remove it because it was prepared or mounted by someone else.
func removePinDir(dir string) error {
	if err := emptyPinDir(dir); err != nil {
		return err
	}
	err := os.Remove(dir)
	for _, stays := range []error{unix.ENOENT, unix.EACCES, unix.EPERM, unix.EBUSY, unix.EROFS} {
		if errors.Is(err, stays) {
			return nil
		}
	}
	if err != nil {
		return fmt.Errorf("remove pins: %w", err)
	}
	return nil
}

// emptyPinDir removes everything in a pin directory, the mark of an unfinished one last.
func emptyPinDir(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("remove pins: %w", err)
	}
	var errs []error
	for _, e := range entries {
		if e.Name() != pinUnfinished {
			errs = append(errs, removePins(filepath.Join(dir, e.Name())))
		}
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	return removePins(filepath.Join(dir, pinUnfinished))
}

// removePins removes pins and everything below them. The kernel frees objects without other
// references; an interface loses its program with its link.
func removePins(dir string) error {
	if err := os.RemoveAll(dir); err != nil {
		return fmt.Errorf("remove pins: %w", err)
	}
	return nil
}

// staging lists the staging directories of pinDir.
func staging(pinDir string) (dirs []string, err error) {
	parent, prefix := filepath.Dir(pinDir), filepath.Base(pinDir)+stagingMark
	entries, err := os.ReadDir(parent)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if errors.Is(err, os.ErrPermission) && os.Geteuid() != 0 {
		return nil, nil // nor can this user have built there
	}
	if err != nil {
		return nil, fmt.Errorf("look for stale pins: %w", err)
	}
	for _, e := range entries {
		number, ok := strings.CutPrefix(e.Name(), prefix)
		if _, err := strconv.Atoi(number); !ok || err != nil {
			continue
		}
		dir := filepath.Join(parent, e.Name())
		if _, err := os.Lstat(filepath.Join(dir, pinBuilding)); err == nil {
			dirs = append(dirs, dir)
		}
	}
	return dirs, nil
}

type pinner interface{ Pin(path string) error }

// repin pins p at path, replacing the existing pin without a gap.
func repin(p pinner, path string) error {
	if err := pinNext(p, path); err != nil {
		return err
	}
	if err := os.Rename(nextPin(path), path); err != nil {
		return errors.Join(fmt.Errorf("pin %s: %w", path, err), os.Remove(nextPin(path)))
	}
	return nil
}

// nextPin is the temporary path of a replacement pin.
func nextPin(path string) string { return path + "_next" }

// pinNext is the first half of repin.
func pinNext(p pinner, path string) error {
	if err := os.Remove(nextPin(path)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("remove stale pin: %w", err)
	}
	if err := p.Pin(nextPin(path)); err != nil {
		return fmt.Errorf("pin %s: %w", path, err)
	}
	return nil
}

// pinAll pins maps, tables and programs into dir.
func (l *Loader) pinAll(dir string) error {
	for _, sub := range []string{programsDir, linksDir, broadcastsDir} {
		if err := os.Mkdir(filepath.Join(dir, sub), 0o700); err != nil {
			return fmt.Errorf("make pin directory: %w", err)
		}
	}
	pins := map[string]pinner{
		relayPin(dir):  l.relay,
		egressPin(dir): l.egress,
	}
	for kind := range tableKinds {
		pins[filepath.Join(dir, tableNames[kind].pin)] = l.tables[kind]
	}
	for name, m := range l.maps.byName() {
		pins[filepath.Join(dir, name)] = m
	}
	for path, p := range pins {
		// A pinned cilium/ebpf object remembers its path only to unpin itself, which is not used
		// here.
		if err := p.Pin(path); err != nil {
			return fmt.Errorf("pin %s: %w", path, err)
		}
	}
	return nil
}
