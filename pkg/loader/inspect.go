package loader

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// What those ask who look at a host, and change nothing.

// Probe finds out what the running kernel has, as Open does. The error matches ErrNotSupported
// where it lacks what the relay needs, and names it; os.ErrPermission where it could not be found out.
func Probe() (Capabilities, error) {
	switch warning, err := checkCapabilities(); {
	case err != nil:
		return Capabilities{}, err
	case warning != "": // what sockets of the paths can do is not known without
		return Capabilities{}, fmt.Errorf("%s: %w", warning, unix.EPERM)
	}
	return probesOfKernel().run()
}

// PrivateMount is a warning when the BPF file system of a pin directory ends with this
// process's mount namespace; "" when it does not, or that cannot be known.
func PrivateMount(pinDir string) string { return privateMount(pinDir) }

// MissingCapabilities names the capabilities that a set, a bit for each, lacks: those that
// nothing works without, and those that some paths need.
func MissingCapabilities(effective uint64) (needs, optional []string) {
	for _, c := range needed {
		if !c.in(effective) {
			needs = append(needs, c.name)
		}
	}
	if !capNetRaw.in(effective) {
		optional = append(optional, capNetRaw.name)
	}
	return needs, optional
}

// Attachments returns where the pinned links hold the relay program.
func (r *Reader) Attachments() (all []Attachment, err error) {
	for path, err := range pinnedLinks(r.pinDir, pinInterface) {
		if err != nil {
			return nil, err
		}
		a, err := adoptLink(path)
		if errors.Is(err, unix.ENODEV) {
			continue // its interface is gone
		}
		if err != nil {
			return nil, err
		}
		all = append(all, a.Attachment)
		if err := a.link.Close(); err != nil {
			return nil, err
		}
	}
	return all, nil
}

// TappedPrograms returns the ids of the programs that keep packets of PathFanout from the
// host's stack, as far as they are pinned in a directory.
func TappedPrograms(pinDir string) (map[uint32]bool, error) {
	ids := map[uint32]bool{}
	for path, err := range pinnedLinks(pinDir, pinTapped) {
		if err != nil {
			return nil, err
		}
		lk, _, err := openTCX(path)
		if errors.Is(err, unix.ENODEV) {
			continue
		}
		if err != nil {
			return nil, err
		}
		info, err := lk.Info()
		if err := errors.Join(err, lk.Close()); err != nil {
			return nil, fmt.Errorf("read link %s: %w", path, err)
		}
		ids[uint32(info.Program)] = true
	}
	return ids, nil
}

// pinnedLinks yields the pins of links whose names begin so; none where nothing is pinned.
func pinnedLinks(pinDir, prefix string) func(yield func(string, error) bool) {
	return func(yield func(string, error) bool) {
		entries, err := os.ReadDir(filepath.Join(pinDir, linksDir))
		if errors.Is(err, os.ErrNotExist) {
			return
		}
		if err != nil {
			yield("", fmt.Errorf("look for pinned links: %w", err))
			return
		}
		for _, e := range entries {
			if strings.HasPrefix(e.Name(), prefix) && !yield(filepath.Join(pinDir, linksDir, e.Name()), nil) {
				return
			}
		}
	}
}
