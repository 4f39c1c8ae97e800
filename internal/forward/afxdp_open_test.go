package forward

import (
	"errors"
	"fmt"
	"testing"

	"golang.org/x/sys/unix"

	"xdpcast/pkg/xsk"
)

// A queue is tried as often as requested, regardless of options that the kernel or missing
// capabilities refuse: each is dropped once.
func TestAFXDPOpenTries(t *testing.T) {
	for _, old := range []bool{false, true} {
		for _, unprivileged := range []bool{false, true} {
			for _, tries := range []int{1, 2, 3} {
				for busy := range 4 {
					t.Run(fmt.Sprintf("old %v, unprivileged %v, %d tries, busy %d times", old, unprivileged, tries, busy), func(t *testing.T) {
						var wasBusy int
						var last xsk.Options
						open := func(o xsk.Options) (*xsk.Socket, error) {
							last = o
							switch {
							case old && o.TXBudget != 0:
								return nil, unix.ENOPROTOOPT
							case unprivileged && o.SendBuffer != 0:
								return nil, unix.EPERM
							case wasBusy < busy:
								wasBusy++
								return nil, &xsk.BindError{Err: unix.EBUSY}
							}
							return &xsk.Socket{}, nil
						}
						s, err := tryOpen(open, xsk.Options{TXBudget: 1, SendBuffer: 1}, tries)
						if want := busy < tries; (s != nil) != want || (err == nil) != want || !want && !errors.Is(err, unix.EBUSY) {
							t.Errorf("socket %v, error %v, want a socket: %v", s != nil, err, want)
						}
						if want := min(busy, tries); wasBusy != want {
							t.Errorf("found busy %d times, want %d", wasBusy, want)
						}
						if (last.TXBudget == 0) != old || (last.SendBuffer == 0) != unprivileged {
							t.Errorf("last tried with %+v", last)
						}
					})
				}
			}
		}
	}
}

// Errors that are not about an option end the tries.
func TestAFXDPOpenGivesUp(t *testing.T) {
	for _, refusal := range []error{unix.ENOPROTOOPT, unix.EPERM, unix.ENODEV} {
		calls := 0
		_, err := tryOpen(func(xsk.Options) (*xsk.Socket, error) { calls++; return nil, refusal }, xsk.Options{}, 3)
		if !errors.Is(err, refusal) || calls != 1 {
			t.Errorf("%v: %v after %d calls", refusal, err, calls)
		}
	}
}
