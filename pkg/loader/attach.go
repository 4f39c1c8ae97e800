package loader

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// Mode is an XDP attach mode.
type Mode uint8

// The modes: native runs in the driver; generic in the stack, on any device but slower, and only
// with one output per rule. Auto tries native, then generic.
const (
	ModeAuto Mode = iota
	ModeNative
	ModeGeneric
)

func (m Mode) String() string {
	switch m {
	case ModeNative:
		return "native"
	case ModeGeneric:
		return "generic"
	default:
		return "auto"
	}
}

// ParseMode parses the output of String.
func ParseMode(s string) (Mode, error) {
	for _, m := range []Mode{ModeAuto, ModeNative, ModeGeneric} {
		if s == m.String() {
			return m, nil
		}
	}
	return 0, fmt.Errorf("mode %q: want native, generic or auto", s)
}

// Attachment is the relay program on one interface.
type Attachment struct {
	Index     int
	Interface string
	Mode      Mode // native or generic
	// Fallback is why native mode was refused; nil if it was not tried.
	Fallback  error
	LinkID    uint32
	ProgramID uint32
}

type attachment struct {
	Attachment
	link link.Link
}

// Attach attaches the relay program to an interface, or confirms that it is attached, in whatever
// mode it then runs. It never evicts another program.
//
// Errors to match: *BusyError, *AttachError.
func (l *Loader) Attach(index int, mode Mode) (Attachment, error) {
	if a := l.links[index]; a != nil {
		_, err := a.info()
		if err == nil {
			return a.Attachment, nil
		}
		if !errors.Is(err, unix.ENODEV) {
			return Attachment{}, err
		}
		if err := l.forgetLink(index); err != nil {
			return Attachment{}, err
		}
	}
	a, err := l.attach(index, mode)
	if err != nil {
		return Attachment{}, err
	}
	if a.Fallback != nil {
		l.log.Warn("XDP runs in generic mode, which is slower; native mode is tried again while the interface is down or has no carrier", "interface", a.Interface, "native", a.Fallback)
	} else {
		l.log.Info("attached", "interface", a.Interface, "mode", a.Mode.String())
	}
	return a, nil
}

// attach attaches to an interface without an attachment.
func (l *Loader) attach(index int, mode Mode) (Attachment, error) {
	iface, err := net.InterfaceByIndex(index)
	if err != nil {
		return Attachment{}, fmt.Errorf("interface with index %d: %w", index, err)
	}
	lk, used, fallback, err := l.attachXDP(iface, mode)
	if err != nil {
		return Attachment{}, err
	}
	if err := repin(lk, linkPin(l.opts.PinDir, index)); err != nil {
		return Attachment{}, errors.Join(err, lk.Close())
	}
	a := &attachment{link: lk, Attachment: Attachment{Index: index, Interface: iface.Name, Mode: used, Fallback: fallback}}
	if err := a.fillIDs(); err != nil {
		return Attachment{}, errors.Join(err, lk.Close(), removePins(linkPin(l.opts.PinDir, index)))
	}
	l.links[index] = a
	return a.Attachment, nil
}

// TryNative reattaches a relay program that runs in generic mode: in native mode, otherwise in
// generic mode again. The kernel allows only one mode at a time on an interface (dev_xdp_attach in
// net/core/dev.c), so packets meet no program for a moment: call it while the interface carries
// none.
//
// Errors to match: *BusyError, *AttachError; the program is then no longer attached.
func (l *Loader) TryNative(index int) (Attachment, error) {
	a := l.links[index]
	if a == nil || a.Mode != ModeGeneric {
		return l.Attach(index, ModeAuto)
	}
	delete(l.links, index)
	if err := errors.Join(a.release(), removePins(linkPin(l.opts.PinDir, index)), a.link.Close()); err != nil {
		return Attachment{}, err
	}
	now, err := l.attach(index, ModeAuto)
	if err == nil && now.Mode == ModeNative {
		l.log.Info("native mode instead of generic", "interface", now.Interface)
	}
	return now, err
}

// attachXDP returns the link, the mode used, and why native mode was refused.
func (l *Loader) attachXDP(iface *net.Interface, mode Mode) (link.Link, Mode, error, error) {
	modes := []Mode{mode}
	if mode == ModeAuto {
		modes = []Mode{ModeNative, ModeGeneric}
	}
	var refused error
	for _, m := range modes {
		flags := link.XDPDriverMode
		if m == ModeGeneric {
			flags = link.XDPGenericMode
		}
		lk, err := link.AttachXDP(link.XDPOptions{Program: l.relay, Interface: iface.Index, Flags: flags})
		switch {
		case err == nil:
			return lk, m, refused, nil
		case errors.Is(err, unix.EBUSY), errors.Is(err, unix.EEXIST):
			return nil, 0, nil, &BusyError{Interface: iface.Name, Program: programOn(iface.Index), Err: err}
		case errors.Is(err, unix.EPERM), errors.Is(err, unix.ENODEV):
			return nil, 0, nil, &AttachError{Interface: iface.Name, Mode: m, Err: err}
		}
		if refused != nil {
			err = errors.Join(refused, err)
		}
		refused = fmt.Errorf("%s: %w", m, explainRefusal(err))
	}
	return nil, 0, nil, &AttachError{Interface: iface.Name, Mode: mode, Err: refused}
}

// explainRefusal adds the usual reason for a driver's error.
func explainRefusal(err error) error {
	switch {
	case errors.Is(err, unix.ENOSPC):
		return fmt.Errorf("%w (too few queues: a veth needs as many receive queues as its peer has transmit queues)", err)
	case errors.Is(err, unix.ERANGE), errors.Is(err, unix.EINVAL):
		return fmt.Errorf("%w (often: the MTU is too large for XDP on this driver, or LRO is on)", err)
	case errors.Is(err, unix.EOPNOTSUPP):
		return fmt.Errorf("%w (the driver has no XDP)", err)
	default:
		return err
	}
}

// programOn names the XDP program of an interface, for messages.
func programOn(index int) string {
	lk, err := netlink.LinkByIndex(index)
	if err != nil || lk.Attrs().Xdp == nil || lk.Attrs().Xdp.ProgId == 0 {
		return "program unknown"
	}
	id := lk.Attrs().Xdp.ProgId
	p, err := ebpf.NewProgramFromID(ebpf.ProgramID(id))
	if err != nil {
		return fmt.Sprintf("program id %d", id)
	}
	defer p.Close()
	info, err := p.Info()
	if err != nil || info.Name == "" {
		return fmt.Sprintf("program id %d", id)
	}
	return fmt.Sprintf("program %s, id %d", info.Name, id)
}

func (a *attachment) fillIDs() error {
	info, err := a.link.Info()
	if err != nil {
		return fmt.Errorf("link of interface %s: %w", a.Interface, err)
	}
	a.LinkID, a.ProgramID = uint32(info.ID), uint32(info.Program)
	return nil
}

// Detach detaches the relay program from an interface. It is no error if it is not attached, or the
// interface is gone.
func (l *Loader) Detach(index int) error {
	a := l.links[index]
	if a == nil {
		return nil
	}
	delete(l.links, index)
	return errors.Join(a.release(), removePins(linkPin(l.opts.PinDir, index)), a.link.Close(), l.dropQueriers(index))
}

// release detaches the program now. Without it the kernel does so some time after the last pin and
// file descriptor of the link are gone.
func (a *attachment) release() error {
	if err := a.link.Detach(); err != nil && !errors.Is(err, unix.ENOLINK) && !errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("detach from interface %s: %w", a.Interface, err)
	}
	return nil
}

// Attachments returns where the relay program is attached, by index.
func (l *Loader) Attachments() []Attachment {
	all := make([]Attachment, 0, len(l.links))
	for _, a := range l.links {
		all = append(all, a.Attachment)
	}
	slices.SortFunc(all, func(a, b Attachment) int { return a.Index - b.Index })
	return all
}

// adoptLinks takes over pinned links, and removes those of removed interfaces.
func (l *Loader) adoptLinks(paths []string) error {
	for _, path := range paths {
		a, err := adoptLink(path)
		if errors.Is(err, unix.ENODEV) {
			l.log.Info("interface of a pinned link is gone", "pin", path)
			if err := removePins(path); err != nil {
				return err
			}
			continue
		}
		if err != nil {
			return err
		}
		l.links[a.Index] = a
	}
	return nil
}

// adoptLink opens a pinned link. The error matches ENODEV if its interface is gone.
func adoptLink(path string) (_ *attachment, err error) {
	lk, err := link.LoadPinnedLink(path, nil)
	if err != nil {
		return nil, linkError(path, err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, lk.Close())
		}
	}()
	info, err := lk.Info()
	if err != nil {
		return nil, fmt.Errorf("link %s: %w", path, err)
	}
	xdp := info.XDP()
	if xdp == nil {
		return nil, damaged(filepath.Dir(filepath.Dir(path)), fmt.Errorf("pin %s is not an XDP link", path))
	}
	if xdp.Ifindex == 0 {
		return nil, fmt.Errorf("link %s: %w", path, unix.ENODEV)
	}
	dev, err := netlink.LinkByIndex(int(xdp.Ifindex))
	if err != nil {
		return nil, fmt.Errorf("interface with index %d of link %s: %w", xdp.Ifindex, path, unix.ENODEV)
	}
	mode := ModeNative
	if dev.Attrs().Xdp != nil && dev.Attrs().Xdp.AttachMode == nl.XDP_ATTACHED_SKB {
		mode = ModeGeneric
	}
	return &attachment{link: lk, Attachment: Attachment{
		Index: int(xdp.Ifindex), Interface: dev.Attrs().Name, Mode: mode,
		LinkID: uint32(info.ID), ProgramID: uint32(info.Program),
	}}, nil
}

// linkError is why a pinned link cannot be opened. Without an errno from the kernel it is no link.
func linkError(path string, err error) error {
	var errno unix.Errno
	if !errors.As(err, &errno) {
		return damaged(filepath.Dir(filepath.Dir(path)), err)
	}
	return fmt.Errorf("open link %s: %w", path, err)
}

// Unload detaches the relay program everywhere and removes all pins. The error matches ErrNotLoaded
// if there is nothing to unload, ErrLocked if another process owns the pins.
func Unload(opts Options) (err error) {
	if opts, err = opts.withDefaults(); err != nil {
		return err
	}
	stale, err := staging(opts.PinDir)
	if err != nil {
		return err
	}
	empty, err := unbuilt(opts.PinDir)
	if errors.Is(err, os.ErrNotExist) && len(stale) == 0 {
		return fmt.Errorf("%w in %s", ErrNotLoaded, opts.PinDir)
	}
	var lock locks
	defer func() { err = errors.Join(err, lock.Close()) }()
	if lock.run, err = takeRunLock(opts); err != nil {
		return err
	}
	if lock.pins, err = takePinLock(opts); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	err = errors.Join(releaseLinks(opts.PinDir), sweep(opts.PinDir), removePinDir(opts.PinDir))
	if err == nil && empty && len(stale) == 0 {
		err = fmt.Errorf("%w in %s", ErrNotLoaded, opts.PinDir)
	}
	return err
}

// releaseLinks detaches the program from all interfaces now. Of the pinned state it needs only the
// links, so state of any schema can be unloaded.
func releaseLinks(pinDir string) error {
	pins, err := os.ReadDir(filepath.Join(pinDir, linksDir))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("look for pinned links: %w", err)
	}
	var errs []error
	for _, pin := range pins {
		path := filepath.Join(pinDir, linksDir, pin.Name())
		switch {
		case strings.HasPrefix(pin.Name(), pinInterface):
			a, err := adoptLink(path)
			if err != nil {
				continue // its interface is gone, or it is not a link: removing the pin is enough
			}
			errs = append(errs, a.release(), a.link.Close())
		case strings.HasPrefix(pin.Name(), pinTapped):
			lk, _, err := openTCX(path)
			if err != nil {
				continue // as above
			}
			errs = append(errs, releaseTCX(lk), lk.Close())
		}
	}
	return errors.Join(errs...)
}
