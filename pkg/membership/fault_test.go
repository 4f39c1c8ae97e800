package membership

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

// faultSystem makes chosen calls fail, instead of making them.
type faultSystem struct {
	System
	fail  map[string]error // by call: socket, join, leave, name, close
	times int              // how many calls still fail
	calls []string
}

// fault arms the system: the next n calls of a kind fail with err.
func (s *faultSystem) fault(call string, n int, err error) {
	s.fail, s.times, s.calls = map[string]error{call: err}, n, nil
}

func (s *faultSystem) answer(call string) error {
	s.calls = append(s.calls, call)
	if err := s.fail[call]; err != nil && s.times > 0 {
		s.times--
		return err
	}
	return nil
}

func (s *faultSystem) Socket(family int) (int, error) {
	if err := s.answer("socket"); err != nil {
		return -1, err
	}
	return s.System.Socket(family)
}

func (s *faultSystem) Setsockopt(fd, level, option int, value []byte) error {
	call := "leave"
	if option == unix.MCAST_JOIN_GROUP || option == unix.MCAST_JOIN_SOURCE_GROUP {
		call = "join"
	}
	if err := s.answer(call); err != nil {
		return err
	}
	return s.System.Setsockopt(fd, level, option, value)
}

func (s *faultSystem) InterfaceName(fd, index int) (string, error) {
	if err := s.answer("name"); err != nil {
		return "", err
	}
	return s.System.InterfaceName(fd, index)
}

func (s *faultSystem) Close(fd int) error {
	err := s.System.Close(fd) // the descriptor is gone in any case
	return errors.Join(s.answer("close"), err)
}

// faultBench is a bench whose manager's system calls can be made to fail.
type faultBench struct {
	bench
	*testing.T
	sys     *faultSystem
	m       *Manager
	log     *bytes.Buffer
	sockets int
}

func newFaultBench(t *testing.T, b bench) *faultBench {
	f := &faultBench{bench: b, T: t, log: &bytes.Buffer{}, sockets: openSockets()}
	f.sys = &faultSystem{System: hostSystem{Kernel(), b.host}}
	f.m = New(Options{System: f.sys, Logger: slog.New(slog.NewTextHandler(f.log, nil))})
	t.Cleanup(func() {
		f.m.Close()
		if got := openSockets(); got != f.sockets {
			t.Errorf("%d sockets leaked", got-f.sockets)
		}
		checkCounters(t, f.m)
		b.checkState(t)
	})
	return f
}

var faultKinds = []string{"239.1.1.1", "10.9.0.5@232.1.1.1", "ff1e::1", "fd00::5@ff3e::1"}

// TestFirstJoinFails: whatever fails, nothing is recorded, nothing leaks, the
// counters add up and a retry succeeds.
func TestFirstJoinFails(t *testing.T) {
	b := newBench(t)
	for _, what := range faultKinds {
		for _, test := range []struct {
			call      string
			err       error
			transient bool
			text      string
		}{
			{"socket", unix.EMFILE, true, "too many open files"},
			{"socket", unix.EPERM, false, "operation not permitted"},
			{"socket", unix.ENOBUFS, true, "no buffer space available"},
			{"join", unix.ENOBUFS, true, "no buffer space available"},
			{"join", unix.ENOMEM, true, "cannot allocate memory"},
			{"join", unix.EADDRINUSE, false, "address already in use"},
			{"join", unix.EADDRNOTAVAIL, false, "cannot assign requested address"},
			{"join", unix.ENODEV, true, "no such device (is the MTU too small for IPv"},
			{"join", unix.ENETDOWN, true, "network is down"},
			{"join", unix.EPERM, false, "operation not permitted"},
		} {
			t.Run(what+"/"+test.call+"/"+test.err.Error(), func(t *testing.T) {
				f := newFaultBench(t, b)
				ms := b.membership(t, "eth0", what)
				f.sys.fault(test.call, 1, test.err)
				err := f.m.Join(ms)
				var join *JoinError
				if !errors.As(err, &join) || join.Membership != ms || !errors.Is(err, test.err) ||
					!strings.HasPrefix(err.Error(), "join "+ms.String()+": ") || !strings.Contains(err.Error(), test.text) {
					t.Errorf("error is %v", err)
				}
				var socket *HelperSocketError
				if is := errors.As(err, &socket); is != (test.call == "socket") {
					t.Errorf("HelperSocketError is %v for %v", is, err)
				}
				if Transient(err) != test.transient {
					t.Errorf("transient is %v for %v", !test.transient, err)
				}
				if openSockets() != f.sockets {
					t.Error("a socket is left")
				}
				b.checkState(t)
				checkNothingHeld(t, f.m)
				want := []Counters{{Interface: "eth0", Joins: Attempts{1, 0, 1}}}
				if diff := cmp.Diff(want, f.m.Counters()); diff != "" {
					t.Error(diff)
				}

				mustJoin(t, f.m, ms)
				want = []Counters{{Interface: "eth0", Joins: Attempts{2, 1, 1}, Memberships: 1, HelperSockets: 1}}
				if diff := cmp.Diff(want, f.m.Counters()); diff != "" {
					t.Error(diff)
				}
				mustLeave(t, f.m, ms)
				checkNothingHeld(t, f.m)
			})
		}
	}
}

// TestLaterJoinFails: the socket of earlier groups stays, and stays usable.
func TestLaterJoinFails(t *testing.T) {
	b := newBench(t)
	for _, pair := range [][2]string{
		{"239.1.1.1", "239.1.1.2"},
		{"10.9.0.5@232.1.1.1", "10.9.0.5@232.1.1.2"},
		{"10.9.0.5@232.1.1.1", "10.9.0.6@232.1.1.1"},
		{"fd00::5@ff3e::1", "fd00::6@ff3e::1"},
	} {
		t.Run(pair[1], func(t *testing.T) {
			f := newFaultBench(t, b)
			first, second := b.membership(t, "eth0", pair[0]), b.membership(t, "eth0", pair[1])
			mustJoin(t, f.m, first)
			state := b.kernelState(t)

			f.sys.fault("join", 1, unix.EPERM)
			if err := f.m.Join(second); !errors.Is(err, unix.EPERM) {
				t.Errorf("error is %v", err)
			}
			f.checkUnchanged(state)

			// Refused by the socket with room and by a fresh one: a true failure.
			f.sys.fault("join", 2, unix.ENOBUFS)
			if err := f.m.Join(second); !errors.Is(err, unix.ENOBUFS) {
				t.Errorf("error is %v", err)
			}
			f.checkUnchanged(state)

			// Refused, and no other socket to be had.
			f.sys.fault("join", 1, unix.ENOBUFS)
			f.sys.fail["socket"], f.sys.times = unix.EMFILE, 2
			if err := f.m.Join(second); !errors.Is(err, unix.EMFILE) {
				t.Errorf("error is %v", err)
			}
			f.checkUnchanged(state)

			f.sys.fault("", 0, nil)
			mustJoin(t, f.m, second)
			mustLeave(t, f.m, first, second)
			checkNothingHeld(t, f.m)
			want := []Counters{{Interface: "eth0", Joins: Attempts{5, 2, 3}, Leaves: Attempts{2, 2, 0}}}
			if diff := cmp.Diff(want, f.m.Counters()); diff != "" {
				t.Error(diff)
			}
		})
	}
}

// checkUnchanged checks that there is still one membership on one socket.
func (f *faultBench) checkUnchanged(want kernelState) {
	f.Helper()
	if got := openSockets() - f.sockets; got != 1 {
		f.Errorf("%d helper sockets, want 1", got)
	}
	if got := len(f.m.List()); got != 1 {
		f.Errorf("%d memberships recorded, want 1", got)
	}
	if diff := cmp.Diff(want, f.kernelState(f.T), compareAddrs); diff != "" {
		f.Errorf("kernel state changed:\n%s", diff)
	}
	checkCounters(f.T, f.m)
}

// TestLeaveFails: a warning; the record is gone, the group can be joined again
// (on another socket, since this one may hold it still), and the socket that
// the kernel would not take it from goes with its last group.
func TestLeaveFails(t *testing.T) {
	b := newBench(t)
	for _, pair := range [][2]string{
		{"239.1.1.1", "239.1.1.2"},
		{"10.9.0.5@232.1.1.1", "10.9.0.5@232.1.1.2"},
		{"10.9.0.5@232.1.1.1", "10.9.0.6@232.1.1.1"},
		{"ff1e::1", "ff1e::2"},
		{"fd00::5@ff3e::1", "fd00::6@ff3e::1"},
	} {
		t.Run(pair[1], func(t *testing.T) {
			f := newFaultBench(t, b)
			stays, goes := b.membership(t, "eth0", pair[0]), b.membership(t, "eth0", pair[1])
			mustJoin(t, f.m, stays, goes)

			f.sys.fault("leave", 1, unix.EPERM)
			err := f.m.Leave(goes)
			var leave *LeaveError
			if !errors.As(err, &leave) || leave.Membership != goes || !errors.Is(err, unix.EPERM) ||
				err.Error() != "leave "+goes.String()+": operation not permitted" {
				t.Errorf("error is %v", err)
			}
			if !strings.Contains(f.log.String(), "level=WARN") || !strings.Contains(f.log.String(), goes.String()) {
				t.Errorf("log is %q", f.log)
			}
			if list := f.m.List(); len(list) != 1 || list[0].Membership != stays {
				t.Errorf("recorded: %v", list)
			}
			checkCounters(t, f.m)

			mustJoin(t, f.m, goes)
			if got := openSockets() - f.sockets; got != 2 {
				t.Errorf("%d helper sockets, want the old and a new one", got)
			}
			mustLeave(t, f.m, goes, stays)
			b.checkState(t)
			checkNothingHeld(t, f.m)
			want := []Counters{{Interface: "eth0", Joins: Attempts{3, 3, 0}, Leaves: Attempts{3, 2, 1}}}
			if diff := cmp.Diff(want, f.m.Counters()); diff != "" {
				t.Error(diff)
			}
		})
	}
}

// TestLastLeaveFails: the socket is closed, and so the group is left.
func TestLastLeaveFails(t *testing.T) {
	b := newBench(t)
	for _, what := range faultKinds {
		t.Run(what, func(t *testing.T) {
			f := newFaultBench(t, b)
			ms := b.membership(t, "eth0", what)
			mustJoin(t, f.m, ms)
			f.sys.fault("leave", 1, unix.EADDRNOTAVAIL)
			if err := f.m.Leave(ms); !errors.Is(err, unix.EADDRNOTAVAIL) {
				t.Errorf("error is %v", err)
			}
			if openSockets() != f.sockets {
				t.Error("a socket is left")
			}
			b.checkState(t)
			checkNothingHeld(t, f.m)
		})
	}
}

// TestUndoFails: when a first source's join fails half-way and cannot be undone,
// the socket takes no more, and the group is joined on another.
func TestUndoFails(t *testing.T) {
	b := newBench(t)
	f := newFaultBench(t, b)
	first, second := b.membership(t, "eth0", "10.9.0.5@232.1.1.1"), b.membership(t, "eth0", "10.9.0.5@232.1.1.2")
	mustJoin(t, f.m, first)
	f.sys.fault("join", 2, unix.ENOBUFS)
	f.sys.fail["leave"] = unix.EPERM
	mustJoin(t, f.m, second)
	if diff := cmp.Diff([]string{"join", "leave", "socket", "join"}, f.sys.calls); diff != "" {
		t.Error(diff)
	}
	if !strings.Contains(f.log.String(), "undoing a failed join failed") {
		t.Errorf("log is %q", f.log)
	}
	mustLeave(t, f.m, first)
	mustJoin(t, f.m, first)
	if got := openSockets() - f.sockets; got != 1 {
		t.Errorf("%d helper sockets, want 1: the stale one is empty", got)
	}
	mustLeave(t, f.m, first, second)
	checkNothingHeld(t, f.m)
}

// TestRefreshFails: what cannot be joined again is returned and forgotten; a
// leave that fails does not matter.
func TestRefreshFails(t *testing.T) {
	b := newBench(t)
	f := newFaultBench(t, b)
	asm := b.membership(t, "eth0", "232.1.1.1")
	one, two := b.membership(t, "eth0", "10.9.0.5@232.1.1.1"), b.membership(t, "eth0", "10.9.0.6@232.1.1.1")
	mustJoin(t, f.m, asm, one, one, two)

	f.sys.fault("leave", 1, unix.EPERM)
	if failed := f.m.Refresh(one.Index, 0); failed != nil {
		t.Errorf("failed: %v", failed)
	}
	b.checkState(t, "eth0 232.1.1.1 2", "eth0 10.9.0.5@232.1.1.1 1/0", "eth0 10.9.0.6@232.1.1.1 1/0")

	f.sys.fault("join", 1, unix.EPERM)
	failed := f.m.Refresh(one.Index, 0)
	if len(failed) != 1 || failed[0].Membership != one || !errors.Is(failed[0], unix.EPERM) {
		t.Errorf("failed: %v", failed)
	}
	b.checkState(t, "eth0 232.1.1.1 2", "eth0 10.9.0.6@232.1.1.1 1/0")
	want := []Counters{{
		Interface: "eth0", Joins: Attempts{7, 6, 1}, Leaves: Attempts{4, 3, 1},
		Memberships: 2, HelperSockets: 2,
	}}
	if diff := cmp.Diff(want, f.m.Counters()); diff != "" {
		t.Error(diff)
	}
	mustJoin(t, f.m, one)
	mustLeave(t, f.m, asm, one)

	f.sys.fault("join", 1, unix.EPERM)
	if failed := f.m.Refresh(one.Index, 0); len(failed) != 1 {
		t.Errorf("failed: %v", failed)
	}
	checkNothingHeld(t, f.m)
	if failed := f.m.Refresh(one.Index, 0); failed != nil {
		t.Errorf("failed with nothing to refresh: %v", failed)
	}
}

// TestLookupFails: the kernel says ENODEV, and it cannot be found out whether
// there is an interface.
func TestLookupFails(t *testing.T) {
	b := newBench(t)
	f := newFaultBench(t, b)
	f.sys.fault("name", 1, unix.EPERM)
	err := f.m.Join(parseMembership("eth7", 9999, "239.1.1.1"))
	var notFound *InterfaceNotFoundError
	if !errors.Is(err, unix.ENODEV) || errors.As(err, &notFound) {
		t.Errorf("error is %v", err)
	}
	checkNothingHeld(t, f.m)
}

func TestCloseOfSocketFails(t *testing.T) {
	b := newBench(t)
	f := newFaultBench(t, b)
	ms := b.membership(t, "eth0", "239.1.1.1")
	f.sys.fault("close", 3, unix.EIO)
	for range 2 {
		mustJoin(t, f.m, ms)
		mustLeave(t, f.m, ms)
	}
	mustJoin(t, f.m, ms)
	f.m.DropInterface(ms.Index, 0)
	if got := strings.Count(f.log.String(), "closing a helper socket failed"); got != 3 {
		t.Errorf("%d warnings, want 3: %s", got, f.log)
	}
	checkNothingHeld(t, f.m)
}

// TestRefusedByOneSocket: what one socket refuses for what it holds, or may still hold,
// another one takes; any other error is the caller's.
func TestRefusedByOneSocket(t *testing.T) {
	b := newBench(t)
	for errno, elsewhere := range map[unix.Errno]bool{
		unix.ENOBUFS: true, unix.ENOMEM: true, unix.EADDRINUSE: true, unix.EADDRNOTAVAIL: true,
		unix.EPERM: false, unix.EINVAL: false, unix.EINTR: false,
	} {
		for _, pair := range [][2]string{
			{"239.1.1.1", "239.1.1.2"}, {"ff1e::1", "ff1e::2"},
			{"10.9.0.5@232.1.1.1", "10.9.0.6@232.1.1.1"}, // the group is on the socket already
		} {
			t.Run(fmt.Sprint(errno.Error(), " ", pair[1]), func(t *testing.T) {
				f := newFaultBench(t, b)
				first, second := b.membership(t, "eth0", pair[0]), b.membership(t, "eth0", pair[1])
				mustJoin(t, f.m, first)
				f.sys.fault("join", 1, errno)
				err := f.m.Join(second)
				sockets := openSockets() - f.sockets
				switch {
				case elsewhere && (err != nil || sockets != 2):
					t.Errorf("%v with %d sockets, want that a second one takes it", err, sockets)
				case !elsewhere && (!errors.Is(err, errno) || sockets != 1):
					t.Errorf("%v with %d sockets, want the error and one", err, sockets)
				}
				f.sys.fault("", 0, nil)
				if err := f.m.Close(); err != nil {
					t.Error(err)
				}
			})
		}
	}
}
