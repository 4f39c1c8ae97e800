package labtest

import (
	"context"
	"encoding/binary"
	"errors"
	"net"
	"runtime"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"xdpcast/internal/lab"
)

// Timeout bounds every wait for a condition in a test. It is long, for machines that are busy
// or emulated; nothing waits for its end while all is well.
const Timeout = 2 * time.Minute

// Context returns a context for what a test runs. It ends with the test, or before the deadline of the test binary
// (go test -timeout), so that a program that hangs ends and the test can say which. Nothing shorter is of use: waits have
// Timeout, and a slow machine may take any time for all of a test.
func Context(t *testing.T) context.Context {
	t.Helper()
	const report = 30 * time.Second // for the programs to end, and the log
	deadline, ok := t.Deadline()
	if !ok {
		return t.Context()
	}
	ctx, cancel := context.WithDeadline(t.Context(), deadline.Add(-report))
	t.Cleanup(cancel)
	return ctx
}

// Enter moves the test's goroutine, and what it calls, into the host. The thread
// is thrown away with the goroutine.
func Enter(t testing.TB, h *lab.Host) {
	t.Helper()
	runtime.LockOSThread()
	if err := unix.Setns(h.FD(), unix.CLONE_NEWNET); err != nil {
		t.Fatalf("enter namespace %s: %v", h.Name, err)
	}
}

// Eventually waits until the condition holds.
func Eventually(t testing.TB, what string, condition func() bool) {
	t.Helper()
	for start := time.Now(); time.Since(start) < Timeout; Pause(start, time.Millisecond) {
		if condition() {
			return
		}
	}
	t.Fatalf("timed out waiting until %s", what)
}

// Pause sleeps between two looks at a condition awaited since start: a tenth of that time, so that
// waiting costs little and ends soon, within bounds.
func Pause(start time.Time, least time.Duration) {
	time.Sleep(min(max(least, time.Since(start)/10), 100*time.Millisecond))
}

// Tap sends and receives whole frames on an interface. One goroutine at a time receives; any may send.
type Tap struct {
	t    testing.TB
	fd   int
	name string

	buf, oob []byte // of the last frame; anew for each they would be most of what a test allocates
}

// NewTap opens a tap on an interface of a host. Frames that arrive from then on
// are held for Receive.
func NewTap(t testing.TB, h *lab.Host, ifname string) *Tap {
	t.Helper()
	tap := &Tap{t: t, fd: -1, name: h.Name + "/" + ifname, buf: make([]byte, 65536), oob: make([]byte, 64)}
	Do(t, h, func() error {
		iface, err := net.InterfaceByName(ifname)
		if err != nil {
			return err
		}
		// Protocol 0 receives nothing until it is bound to the interface.
		tap.fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		return errors.Join(
			unix.SetsockoptInt(tap.fd, unix.SOL_PACKET, unix.PACKET_IGNORE_OUTGOING, 1),
			unix.SetsockoptInt(tap.fd, unix.SOL_PACKET, unix.PACKET_AUXDATA, 1),
			unix.SetsockoptInt(tap.fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 256<<20),
			unix.Bind(tap.fd, &unix.SockaddrLinklayer{Protocol: htons(unix.ETH_P_ALL), Ifindex: iface.Index}),
		)
	})
	t.Cleanup(func() { unix.Close(tap.fd) })
	return tap
}

func htons(v uint16) uint16 { return v<<8 | v>>8 }

// Send sends a frame as it is. It waits for room in the device's queue.
func (tap *Tap) Send(frame []byte) {
	tap.t.Helper()
	for start := time.Now(); ; {
		_, err := unix.Write(tap.fd, frame)
		switch {
		case err == nil:
			return
		case err == unix.EINTR:
		case err == unix.ENOBUFS && time.Since(start) < Timeout:
			Pause(start, time.Microsecond)
		default:
			tap.t.Fatalf("send on %s: %v", tap.name, err)
		}
	}
}

// Receive returns the next frame that keep wants, nil if none came before the time-out. One that came in time is returned
// however late the caller gets its CPU. Errors of the socket fail the test, except that the interface is down.
func (tap *Tap) Receive(timeout time.Duration, keep func([]byte) bool) []byte {
	tap.t.Helper()
	for deadline := time.Now().Add(timeout); ; {
		left := time.Until(deadline)
		n, oobn, _, _, err := unix.Recvmsg(tap.fd, tap.buf, tap.oob, unix.MSG_DONTWAIT)
		switch {
		case err == nil:
			if frame := withTag(tap.buf[:n], tap.oob[:oobn]); keep == nil || keep(frame) {
				return append([]byte(nil), frame...)
			}
		case err == unix.EINTR, err == unix.ENETDOWN: // told once; frames may be there
		case err != unix.EAGAIN:
			tap.t.Fatalf("receive on %s: %v", tap.name, err)
		case left <= 0:
			return nil
		default:
			fds := []unix.PollFd{{Fd: int32(tap.fd), Events: unix.POLLIN}}
			if _, err := unix.Poll(fds, int(left.Milliseconds())+1); err != nil && err != unix.EINTR {
				tap.t.Fatalf("wait for a frame on %s: %v", tap.name, err)
			}
		}
	}
}

// ReceiveAny receives the next frame that keep wants on any of the taps, and returns the tap's number, -1 if none came
// before the time-out.
func ReceiveAny(taps []*Tap, timeout time.Duration, keep func([]byte) bool) int {
	fds := make([]unix.PollFd, len(taps))
	for deadline := time.Now().Add(timeout); ; {
		left := time.Until(deadline)
		for i, tap := range taps {
			if tap.Receive(0, keep) != nil {
				return i
			}
			fds[i] = unix.PollFd{Fd: int32(tap.fd), Events: unix.POLLIN}
		}
		if left <= 0 {
			return -1
		}
		_, _ = unix.Poll(fds, int(left.Milliseconds())+1)
	}
}

// withTag puts the outer VLAN tag back, which the kernel takes out of a frame and
// tells beside it (struct tpacket_auxdata in linux/if_packet.h).
func withTag(frame, oob []byte) []byte {
	const (
		vlanValid = 1 << 4 // TP_STATUS_VLAN_VALID
		tci, tpid = 16, 18 // offsets
	)
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil || len(messages) == 0 || len(messages[0].Data) < 20 || len(frame) < 12 {
		return frame
	}
	aux := messages[0].Data
	if binary.NativeEndian.Uint32(aux)&vlanValid == 0 {
		return frame
	}
	tagged := append([]byte(nil), frame[:12]...)
	tagged = binary.BigEndian.AppendUint16(tagged, binary.NativeEndian.Uint16(aux[tpid:]))
	tagged = binary.BigEndian.AppendUint16(tagged, binary.NativeEndian.Uint16(aux[tci:]))
	return append(tagged, frame[12:]...)
}

// Collect returns the next n frames that keep wants, or fails.
func (tap *Tap) Collect(n int, keep func([]byte) bool) [][]byte {
	tap.t.Helper()
	var frames [][]byte
	for len(frames) < n {
		f := tap.Receive(Timeout, keep)
		if f == nil {
			tap.t.Fatalf("%s: %d of %d frames arrived", tap.name, len(frames), n)
		}
		frames = append(frames, f)
	}
	return frames
}
