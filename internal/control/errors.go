package control

import (
	"context"
	"errors"
	"fmt"
	"net/http"
)

// Kind classifies an error for programs.
type Kind string

// The kinds, each with the HTTP status that carries it.
const (
	KindInvalid     Kind = "invalid"     // 400: the request, or a rule in it, is wrong (405 for a wrong method)
	KindForbidden   Kind = "forbidden"   // 403: the peer may not do this
	KindNotFound    Kind = "not_found"   // 404: no such rule, or no such endpoint
	KindConflict    Kind = "conflict"    // 409: a rule of that name or input exists already
	KindTooLarge    Kind = "too_large"   // 413: the body is over MaxBody
	KindFailed      Kind = "failed"      // 500: the request was valid, but failed
	KindUnavailable Kind = "unavailable" // 503: try again: starting, stopping or too busy
)

// Error is an error with a kind. The server sends the kind of the first Error in a chain
// (KindFailed without one) and the whole chain's text; the client returns an Error, so that
// errors.Is(err, ErrNotFound) works on both sides.
type Error struct {
	Kind Kind
	Msg  string // one line; the kind's default text if empty

	cause error
}

// One error per kind, to match with errors.Is and to wrap:
//
//	fmt.Errorf("rule %q: %w", name, control.ErrNotFound)
var (
	ErrInvalid     error = &Error{Kind: KindInvalid}
	ErrForbidden   error = &Error{Kind: KindForbidden}
	ErrNotFound    error = &Error{Kind: KindNotFound}
	ErrConflict    error = &Error{Kind: KindConflict}
	ErrTooLarge    error = &Error{Kind: KindTooLarge}
	ErrFailed      error = &Error{Kind: KindFailed}
	ErrUnavailable error = &Error{Kind: KindUnavailable}
)

// ErrNotRunning is the error of every method of Client if no daemon listens.
var ErrNotRunning = errors.New("no xdpcast is running")

// ErrListening is the error of Listen if another daemon has the socket.
var ErrListening = errors.New("another xdpcast is listening")

// Wrap adds a kind to err and keeps its text. It returns nil for nil.
func Wrap(kind Kind, err error) error {
	if err == nil {
		return nil
	}
	return &Error{Kind: kind, Msg: err.Error(), cause: err}
}

// Errorf is Wrap around fmt.Errorf.
func Errorf(kind Kind, format string, args ...any) error {
	return Wrap(kind, fmt.Errorf(format, args...))
}

func (e *Error) Error() string {
	if e.Msg != "" {
		return e.Msg
	}
	switch e.Kind {
	case KindNotFound:
		return "not found"
	case KindTooLarge:
		return "too large"
	case KindConflict:
		return "exists already"
	default:
		return string(e.Kind)
	}
}

// Unwrap returns the error passed to Wrap.
func (e *Error) Unwrap() error { return e.cause }

// Is matches the Err variables by kind.
func (e *Error) Is(target error) bool {
	t, ok := target.(*Error)
	return ok && t.Msg == "" && t.Kind == e.Kind
}

// kindOf returns the kind that the server reports for err.
func kindOf(err error) Kind {
	var e *Error
	switch {
	case errors.As(err, &e) && e.status() != 0:
		return e.Kind
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return KindUnavailable
	default:
		return KindFailed
	}
}

// status returns the HTTP status of the error's kind, 0 for an unknown kind.
func (e *Error) status() int {
	switch e.Kind {
	case KindInvalid:
		return http.StatusBadRequest
	case KindForbidden:
		return http.StatusForbidden
	case KindNotFound:
		return http.StatusNotFound
	case KindConflict:
		return http.StatusConflict
	case KindTooLarge:
		return http.StatusRequestEntityTooLarge
	case KindFailed:
		return http.StatusInternalServerError
	case KindUnavailable:
		return http.StatusServiceUnavailable
	default:
		return 0
	}
}
