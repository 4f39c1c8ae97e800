package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/cilium/ebpf"
)

// residentMemory returns the resident memory of a process, in bytes (VmRSS of proc_pid_status(5)).
func residentMemory(pid int) (uint64, error) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, err
	}
	return parseField(string(data), "VmRSS:", "kB", 1024)
}

// parseField finds a number by name in text with lines "name number unit".
func parseField(text, name, unit string, scale uint64) (uint64, error) {
	for line := range strings.Lines(text) {
		fields := strings.Fields(line)
		if len(fields) < 2 || fields[0] != name {
			continue
		}
		if unit != "" && (len(fields) != 3 || fields[2] != unit) {
			return 0, fmt.Errorf("%s %q: want a number of %s", name, line, unit)
		}
		n, err := strconv.ParseUint(fields[1], 10, 63)
		if err != nil {
			return 0, fmt.Errorf("%s: %w", name, err)
		}
		return n * scale, nil
	}
	return 0, fmt.Errorf("no line %s", name)
}

// pinnedMemory returns the memory of the maps pinned in a directory, including their inner maps, in
// bytes.
func pinnedMemory(dir string) (total uint64, err error) {
	seen := map[ebpf.MapID]bool{}
	err = filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
		if err != nil || entry.IsDir() {
			return err
		}
		m, err := ebpf.LoadPinnedMap(path, &ebpf.LoadPinOptions{ReadOnly: true})
		if err != nil {
			return nil // a program or a link
		}
		bytes, err := mapMemory(m, seen)
		total += bytes
		return errors.Join(err, m.Close())
	})
	if err == nil && len(seen) == 0 {
		err = fmt.Errorf("no maps in %s", dir)
	}
	return total, err
}

// mapMemory returns the memory of a map and of inner maps not seen before.
func mapMemory(m *ebpf.Map, seen map[ebpf.MapID]bool) (total uint64, err error) {
	info, err := m.Info()
	if err != nil {
		return 0, err
	}
	id, ok := info.ID()
	if !ok || seen[id] {
		return 0, nil
	}
	seen[id] = true
	if total, err = lockedMemory(m.FD()); err != nil {
		return 0, err
	}
	if m.Type() != ebpf.ArrayOfMaps && m.Type() != ebpf.HashOfMaps {
		return total, nil
	}
	var inner ebpf.MapID
	key := make([]byte, m.KeySize())
	for entries := m.Iterate(); entries.Next(&key, &inner); {
		child, err := ebpf.NewMapFromID(inner)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return 0, err
		}
		bytes, err := mapMemory(child, seen)
		total += bytes
		if err := errors.Join(err, child.Close()); err != nil {
			return 0, err
		}
	}
	return total, nil
}

// lockedMemory is the kernel's figure for the memory of a map (memlock in its fdinfo).
func lockedMemory(fd int) (uint64, error) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/self/fdinfo/%d", fd))
	if err != nil {
		return 0, err
	}
	return parseField(string(data), "memlock:", "", 1)
}
