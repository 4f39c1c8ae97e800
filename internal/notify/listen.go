package notify

import (
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// Limits of a message: systemd's, and the kernel's SCM_MAX_FD.
const (
	maxMessage     = 4096
	maxDescriptors = 253
)

// Listener is the service manager's side of the protocol: it receives what services send with
// Manager.
type Listener struct {
	conn *net.UnixConn
	addr string
}

// Message is a notification of a process. The receiver owns Files.
type Message struct {
	PID, UID int // of the process, as reported by the kernel
	Lines    []string
	Files    []int
	// Cut says that descriptors are missing: this process's limit is reached.
	Cut bool
}

// Listen listens at a path, or at an abstract address that begins with @. Any user may send there:
// check Message.PID and UID. A path remains if the process dies, and is replaced.
func Listen(addr string) (*Listener, error) {
	if strings.HasPrefix(addr, "/") {
		if err := os.Remove(addr); err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, fmt.Errorf("socket for notifications: %w", err)
		}
	}
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: addr, Net: "unixgram"})
	if err != nil {
		return nil, fmt.Errorf("socket for notifications: %w", err)
	}
	l := &Listener{conn: conn, addr: addr}
	raw, err := conn.SyscallConn()
	if err == nil {
		var option error
		err = raw.Control(func(fd uintptr) { option = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_PASSCRED, 1) })
		err = errors.Join(err, option)
	}
	if err == nil && strings.HasPrefix(addr, "/") {
		err = os.Chmod(addr, 0o666) // a service may have changed its user
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("socket for notifications: %w", err), l.Close())
	}
	return l, nil
}

// Addr is the value of NOTIFY_SOCKET for senders.
func (l *Listener) Addr() string { return l.addr }

// Mark makes this process send itself a message, which Receive returns after everything that was sent before. It may
// wait for Receive.
func (l *Listener) Mark(line string) error {
	_, err := l.conn.WriteToUnix([]byte(line), &net.UnixAddr{Name: l.addr, Net: "unixgram"})
	return err
}

// Close ends Receive, and removes the path.
func (l *Listener) Close() error {
	err := l.conn.Close()
	if strings.HasPrefix(l.addr, "/") {
		err = errors.Join(err, os.Remove(l.addr))
	}
	return err
}

// Receive waits for a message. The error matches net.ErrClosed after Close.
func (l *Listener) Receive() (m Message, err error) {
	text, oob := make([]byte, maxMessage), make([]byte, unix.CmsgSpace(maxDescriptors*4)+unix.CmsgSpace(unix.SizeofUcred))
	n, oobn, flags, _, err := l.conn.ReadMsgUnix(text, oob) // descriptors are closed on exec
	if err != nil {
		return m, err
	}
	m.Lines = strings.Split(strings.TrimRight(string(text[:n]), "\n"), "\n")
	m.Cut = flags&unix.MSG_CTRUNC != 0
	parts, err := syscall.ParseSocketControlMessage(oob[:oobn])
	if err != nil {
		return m, fmt.Errorf("notification: %w", err)
	}
	for i := range parts {
		switch parts[i].Header.Type {
		case unix.SCM_RIGHTS:
			fds, err := syscall.ParseUnixRights(&parts[i])
			m.Files = append(m.Files, fds...)
			if err != nil {
				m.Close()
				return m, fmt.Errorf("notification: %w", err)
			}
		case unix.SCM_CREDENTIALS:
			who, err := syscall.ParseUnixCredentials(&parts[i])
			if err != nil {
				m.Close()
				return m, fmt.Errorf("notification: %w", err)
			}
			m.PID, m.UID = int(who.Pid), int(who.Uid)
		}
	}
	return m, nil
}

// Value returns the value of a key in a message; ok is false if it is missing.
func (m *Message) Value(key string) (value string, ok bool) {
	for _, line := range m.Lines {
		if k, v, found := strings.Cut(line, "="); found && k == key {
			return v, true
		}
	}
	return "", false
}

// Is says whether a message has a line, such as Ready.
func (m *Message) Is(line string) bool {
	for _, l := range m.Lines {
		if l == line {
			return true
		}
	}
	return false
}

// Close closes the descriptors.
func (m *Message) Close() {
	for _, fd := range m.Files {
		_ = unix.Close(fd) // the sender has its own copy
	}
	m.Files = nil
}
