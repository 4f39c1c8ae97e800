package rules

import (
	"errors"
	"fmt"
	"strconv"
	"unicode/utf8"
)

// Classes of errors, for errors.Is. They say what kind of thing is wrong; the wrapping FieldError
// says where, and what would be valid.
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

// maxFaults limits the faults in one error: it stays readable, and a broken set of 100,000 rules
// does not make a message of megabytes.
const maxFaults = 100

// maxQuoted limits, in bytes, how much of a value a message repeats.
const maxQuoted = 120

// FieldError is one fault in one field. Its text is one line, for any value.
type FieldError struct {
	Rule  string // name of the rule, "#4" for the fourth of a set if it has no name, "" outside a rule
	Field string // "name", "in", "in.source", "out[2].ttl" (slot 2), "path"; from ParseInput and ParseOutput only the part: "port"
	Value string // the given value; "" if there was none
	Want  string // what would be valid
	Err   error  // class of the fault, one of the Err variables, or nil
}

// Error is `rule "cam1": out[0].port "0": want 1 to 65535`, or, without a value, `rule "cam1": name
// missing: write ...`.
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

// Unwrap returns the class of the fault.
func (e *FieldError) Unwrap() error { return e.Err }

// FileError is a fault in a rule file.
type FileError struct {
	File string // as given to ParseFile
	Line int    // from 1; 0 if the fault has no line
	Err  error
}

// Error is `FILE:LINE: fault`.
func (e *FileError) Error() string {
	if e.Line == 0 {
		return e.File + ": " + e.Err.Error()
	}
	return e.File + ":" + strconv.Itoa(e.Line) + ": " + e.Err.Error()
}

// Unwrap returns the fault.
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

// faultList holds the first faults found and counts the rest.
type faultList struct {
	faults []fault
	hidden int
	ignore func(fault) bool // faults to omit; may be nil
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

// join is nil if there is no fault.
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
