package rules

import (
	"errors"
	"fmt"
	"strconv"
	"unicode/utf8"
)

// Classes of fault, for errors.Is. They say what kind of thing is wrong; the
// FieldError that carries one says where and what would be right.
var (
	ErrDuplicateName   = errors.New("duplicate rule name")
	ErrDuplicateInput  = errors.New("duplicate input")
	ErrDuplicateOutput = errors.New("duplicate output")
	ErrLoop            = errors.New("forwarding loop")
	ErrFamily          = errors.New("address families mixed")
	ErrLinkLocal       = errors.New("link-local multicast is never forwarded")
	ErrNeedSource      = errors.New("source-specific group without a source")
	ErrTooManyOutputs  = errors.New("too many outputs")
)

// maxFaults bounds the list of one error: it stays readable, and a broken set of
// 100,000 rules must not make a message of megabytes.
const maxFaults = 100

// maxQuoted bounds, in bytes, what a message repeats of a value.
const maxQuoted = 120

// FieldError is one fault in one field. Its text is one line, whatever the
// value holds.
type FieldError struct {
	Rule  string // name of the rule, "#4" for the fourth of a set when it has none, "" when there is no rule yet
	Field string // "name", "in", "in.source", "out[2].ttl" (slot 2), "path"; from ParseInput and ParseOutput the part alone: "port"
	Value string // what was given; "" when nothing was
	Want  string // what would be right
	Err   error  // class of the fault, one of the Err variables, or nil
}

// Error is `rule "cam1": out[0].port "0": want 1 to 65535`, or, when nothing
// was given, `rule "cam1": name missing: write ...`.
func (e *FieldError) Error() string {
	rule := ""
	if e.Rule != "" {
		rule = "rule " + quote(e.Rule) + ": "
	}
	if e.Value == "" {
		return rule + e.Field + " missing: write " + e.Want
	}
	return rule + e.Field + " " + quote(e.Value) + ": want " + e.Want
}

// Unwrap gives the class of the fault to errors.Is.
func (e *FieldError) Unwrap() error { return e.Err }

// FileError is a fault in a file of rules.
type FileError struct {
	File string // as given to ParseFile
	Line int    // from 1; 0 when the fault is not in one line
	Err  error
}

// Error is `FILE:LINE: fault`.
func (e *FileError) Error() string {
	if e.Line == 0 {
		return e.File + ": " + e.Err.Error()
	}
	return e.File + ":" + strconv.Itoa(e.Line) + ": " + e.Err.Error()
}

// Unwrap gives the fault to errors.Is and errors.As.
func (e *FileError) Unwrap() error { return e.Err }

// quote quotes a value for a message: on one line, printable, bounded.
func quote(s string) string {
	if len(s) <= maxQuoted {
		return strconv.Quote(s)
	}
	n := maxQuoted
	for n > 0 && !utf8.RuneStart(s[n]) {
		n--
	}
	return strconv.Quote(s[:n] + "...")
}

// fault is a FieldError with the index of its rule in the set.
type fault struct {
	rule int // index of the rule
	err  *FieldError
}

// faultList holds the first faults found and counts those beyond.
type faultList struct {
	faults []fault
	hidden int
	ignore func(fault) bool // faults to leave out; may be nil
}

func (l *faultList) add(f fault) {
	if l.ignore != nil && l.ignore(f) {
		return
	}
	if len(l.faults) == maxFaults {
		l.hidden++
		return
	}
	l.faults = append(l.faults, f)
}

// join is nil when there is no fault.
func (l *faultList) join() error {
	var errs []error
	for _, f := range l.faults {
		errs = append(errs, f.err)
	}
	if l.hidden > 0 {
		errs = append(errs, moreFaults(l.hidden))
	}
	return errors.Join(errs...)
}

func moreFaults(n int) error { return fmt.Errorf("and %d more", n) }
