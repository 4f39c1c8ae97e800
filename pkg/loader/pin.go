package loader

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Directories below the pin directory, beside the maps.
const (
	programsDir = "programs"
	linksDir    = "links"
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
)

func relayPin(dir string) string { return filepath.Join(dir, programsDir, pinRelay) }

func egressPin(dir string) string { return filepath.Join(dir, programsDir, pinEgress) }

// linkPin is named by index: interface names may hold dots, and are used again.
func linkPin(dir string, index int) string {
	return filepath.Join(dir, linksDir, pinInterface+strconv.Itoa(index))
}

// stagingDir is where a pin directory is built before it is published.
func stagingDir(pinDir string) string {
	return filepath.Clean(pinDir) + "_new_" + strconv.Itoa(os.Getpid())
}

// mountBPFFS mounts a BPF file system for the pin directory when none is there:
// at its parent, as systemd does at /sys/fs/bpf.
func mountBPFFS(pinDir string) error {
	if strings.Contains(filepath.Base(pinDir), ".") {
		return fmt.Errorf("pin directory %q: the BPF file system allows no dot in a name", pinDir)
	}
	parent := filepath.Dir(filepath.Clean(pinDir))
	if mounted, err := isBPFFS(parent); err == nil && mounted {
		return nil
	}
	if err := os.MkdirAll(parent, 0o755); err != nil {
		return fmt.Errorf("make %s: %w", parent, err)
	}
	if err := unix.Mount("bpf", parent, "bpf", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC|unix.MS_RELATIME, "mode=700"); err != nil {
		return fmt.Errorf("mount BPF file system at %s: %w", parent, err)
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

// sweep removes what processes left that died while they were building. The
// caller holds the lock, so nobody is building now.
func sweep(pinDir string) error {
	stale, err := staging(pinDir)
	if err != nil {
		return err
	}
	var errs []error
	for _, dir := range stale {
		errs = append(errs, removePins(dir))
	}
	return errors.Join(errs...)
}

// removePins removes a pin directory and everything in it. The kernel frees
// what nothing else holds; an interface loses its program with its link.
func removePins(dir string) error {
	if err := os.RemoveAll(dir); err != nil {
		return fmt.Errorf("remove pins: %w", err)
	}
	return nil
}

// staging lists the directories in which pinDir is, or was, being built.
func staging(pinDir string) ([]string, error) {
	dirs, err := filepath.Glob(filepath.Clean(pinDir) + "_new_*")
	if err != nil {
		return nil, fmt.Errorf("look for stale pins: %w", err)
	}
	return dirs, nil
}

type pinner interface{ Pin(path string) error }

// repin pins p at path in place of whatever is pinned there, with no moment in
// which nothing is.
func repin(p pinner, path string) error {
	next := path + "_next"
	if err := os.Remove(next); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("remove stale pin: %w", err)
	}
	if err := p.Pin(next); err != nil {
		return fmt.Errorf("pin %s: %w", path, err)
	}
	if err := os.Rename(next, path); err != nil {
		return errors.Join(fmt.Errorf("pin %s: %w", path, err), os.Remove(next))
	}
	return nil
}

// pinAll pins maps, tables and programs into dir.
func (l *Loader) pinAll(dir string) error {
	for _, sub := range []string{programsDir, linksDir} {
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
		// A pinned cilium/ebpf object remembers its path only to unpin itself,
		// which nobody asks of it here.
		if err := p.Pin(path); err != nil {
			return fmt.Errorf("pin %s: %w", path, err)
		}
	}
	return nil
}
