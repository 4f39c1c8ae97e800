package loader

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// Read-only functions for diagnosing a host.

// Probe probes the running kernel, as Open does. The error matches ErrNotSupported if the kernel
// lacks a required feature, and names it; os.ErrPermission if probing was not permitted.
func Probe() (Capabilities, error) {
	switch warning, err := checkCapabilities(); {
	case err != nil:
		return Capabilities{}, err
	case warning != "": // without the warning, the features of the paths' sockets are known
		return Capabilities{}, fmt.Errorf("%s: %w", warning, unix.EPERM)
	}
	return probesOfKernel().run()
}

// PrivateMount is a warning if the BPF file system of a pin directory ends with this process's
// mount namespace; "" if it does not, or if that cannot be determined.
func PrivateMount(pinDir string) string { return privateMount(pinDir) }

// MissingCapabilities names the capabilities missing from a set, one bit each: the required ones,
// and those that only some paths need.
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

// Attachments returns where pinned links attach the relay program.
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

// TappedPrograms returns the ids of the pinned programs that keep packets of PathFanout from the
// host's stack.
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

// pinnedLinks yields the pins of links with a name prefix; none if nothing is pinned.
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
