package loader

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/cilium/ebpf/link"
)

// dropForeign removes pinned state of another network namespace that no longer serves an interface,
// as left by an ended container, and returns whether it did. It leaves everything else alone. The
// error matches ErrForeignNamespace if the state is in use. The caller holds the lock.
func (l *Loader) dropForeign() (dropped bool, err error) {
	dir := l.opts.PinDir
	head, err := l.header()
	if err != nil {
		return false, nil // adopting it reports the error
	}
	if l.cookie == head.cookie || head.cookie == 0 { // 0: it is too short to say
		return false, nil
	}
	pin, index, err := servedLink(dir)
	if err != nil {
		return false, err
	}
	if index != 0 {
		return false, fmt.Errorf("%w (%s): it relays there, by link %s on the interface with index %d: start xdpcast there, use another pin directory, or end it with unload --all --pin-dir %s",
			ErrForeignNamespace, dir, filepath.Base(pin), index, dir)
	}
	l.log.Warn("pinned state of a network namespace that has no interface of it any more is removed", "dir", dir)
	return true, removePinDir(dir)
}

// Here says whether the state belongs to the calling thread's network namespace: interface indexes
// are meaningful only there.
func (r *Reader) Here() (bool, error) {
	config, err := r.maps.config(r.pinDir)
	if err != nil {
		return false, err
	}
	cookie, err := netnsCookie()
	return cookie == config.NetnsCookie, err
}

// servedLink finds a pinned link that is attached to an interface, in any network namespace; index
// 0 if there is none.
func servedLink(pinDir string) (pin string, index int, err error) {
	entries, err := os.ReadDir(filepath.Join(pinDir, linksDir))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return "", 0, fmt.Errorf("look at pinned links: %w", err)
	}
	for _, e := range entries {
		path := filepath.Join(pinDir, linksDir, e.Name())
		lk, err := link.LoadPinnedLink(path, nil)
		if err != nil {
			return "", 0, fmt.Errorf("open link %s: %w", path, err)
		}
		info, err := lk.Info()
		if err := errors.Join(err, lk.Close()); err != nil {
			return "", 0, fmt.Errorf("link %s: %w", path, err)
		}
		switch {
		case info.XDP() != nil:
			index = int(info.XDP().Ifindex)
		case info.TCX() != nil:
			index = int(info.TCX().Ifindex)
		}
		if index != 0 {
			return path, index, nil
		}
	}
	return "", 0, nil
}
