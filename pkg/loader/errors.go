package loader

import (
	"errors"
	"fmt"

	"xdpcast/bpf"
)

// Errors to match with errors.Is.
var (
	// ErrLocked: another process owns the pin directory.
	ErrLocked = errors.New("another xdpcast owns the pin directory")
	// ErrSchema: the pinned state has the layout of another release, and cannot be migrated or has
	// not been yet.
	ErrSchema = errors.New("pinned state has another schema")
	// ErrDamaged: the pinned state is inconsistent or incomplete.
	ErrDamaged = errors.New("pinned state is damaged")
	// ErrForeignNamespace: the pinned state belongs to another network namespace.
	ErrForeignNamespace = errors.New("pinned state belongs to another network namespace")
	// ErrNotSupported: the kernel lacks a required feature.
	ErrNotSupported = errors.New("not supported by this kernel")
	// ErrNotLoaded: no pinned state exists.
	ErrNotLoaded = errors.New("nothing is loaded")
	// ErrFull: a map is full.
	ErrFull = errors.New("no room left")
)

// BusyError says that an interface has a foreign XDP program.
type BusyError struct {
	Interface string
	// Program names that program: its id and, if known, its name.
	Program string
	Err     error
}

func (e *BusyError) Error() string {
	return fmt.Sprintf("interface %s already has an XDP program (%s), which is left alone: detach it first", e.Interface, e.Program)
}

func (e *BusyError) Unwrap() error { return e.Err }

// AttachError says that no mode of XDP works on an interface.
type AttachError struct {
	Interface string
	Mode      Mode
	Err       error
}

func (e *AttachError) Error() string {
	return fmt.Sprintf("attach to interface %s (mode %s): %v", e.Interface, e.Mode, e.Err)
}

func (e *AttachError) Unwrap() error { return e.Err }

// RuleError names a rule that could not be written to the kernel.
type RuleError struct {
	Rule string
	Err  error
}

func (e *RuleError) Error() string { return fmt.Sprintf("rule %s: %v", e.Rule, e.Err) }

func (e *RuleError) Unwrap() error { return e.Err }

// damaged wraps a fault of a pin directory's state, with advice.
func damaged(dir string, err error) error {
	return fmt.Errorf("%w (%s): %w; %s", ErrDamaged, dir, err, unloadHint(dir))
}

// schemaError is the error for a pin directory with another schema.
func schemaError(dir string, schema uint32) error {
	hint := "\"xdpcast run\" and \"xdpcast upgrade\" migrate it"
	switch {
	case schema > bpf.Schema:
		hint = "it was made by a newer release: run that one again, or \"xdpcast run\", which replaces it; " + unloadHint(dir)
	case schemas[schema] == nil:
		hint = "it was made by a release that is too old to be migrated: \"xdpcast run\" replaces it; " + unloadHint(dir)
	}
	return fmt.Errorf("%w (%s): it has %d, this xdpcast has %d; %s", ErrSchema, dir, schema, bpf.Schema, hint)
}

// unloadHint is advice on the command that removes any pinned state.
func unloadHint(dir string) string {
	command := "xdpcast unload --all"
	if dir != DefaultPinDir {
		command += " --pin-dir " + dir
	}
	return fmt.Sprintf("%q removes it, and ends its relaying", command)
}

func foreignError(dir string) error {
	return fmt.Errorf("%w (%s): start xdpcast there, or use another pin directory", ErrForeignNamespace, dir)
}
