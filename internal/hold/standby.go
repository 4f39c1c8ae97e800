package hold

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"xdpcast/internal/notify"
)

// A standby is a second process of the holder's command, started while the first works. It prepares all that it can
// without the first one's descriptors, waits, and gets them when the first one dies: as soon as that can do nothing any more, not
// when the kernel has torn it down. So it goes on sooner by two execs, the runtime's start, and the grace periods of the
// sockets that the kernel closes for the dead process.
//
// A process that wants one gives the holder the read end of a pipe (Life). The protocol on the standby's socket, StandbyName,
// are packets of one line: names, separated by colons, with as many descriptors; then startLine. Finally endedLine, when the dead
// process has been reaped: until then its listening sockets, for example, may exist. At the end of the socket the standby
// is not needed.

// StandbyName is the name of a standby's descriptor, and makes a process one.
const StandbyName = "standby"

const (
	startLine = "start"
	endedLine = "ended"
	// mostAtOnce is the number of descriptors in a packet; the kernel's limit is SCM_MAX_FD, 253.
	mostAtOnce = 128
)

// standbyVariable is the notification with which a process asks for a standby, with the read end of its Life, or declines it.
const standbyVariable = "X_XDPCAST_STANDBY="

// standbyAfter is how long a process must have worked before its standby is started, which takes some of its CPU time, and
// standbyRetry the pause after one that has ended by itself.
const (
	standbyAfter = time.Second
	standbyRetry = 10 * time.Second
)

// Life tells the holder of the end of this process: the kernel closes the write end of a pipe.
type Life struct{ pipe [2]int }

// firstClosed is the number of the write end: the kernel closes the files of a killed process from the highest number on
// (task work is a stack: kernel/task_work.c), and does so once no thread of it runs in user space any more (do_exit: exit_mm, then
// exit_files). Only what the next process waits for, too, has a higher one: see loader.ReleaseFirst.
const firstClosed = 6144

// NewLife makes the pipe. A process that is killed closes it before other files below descriptor 6144, or three quarters of a lower
// limit.
func NewLife() (*Life, error) {
	l := &Life{}
	if err := unix.Pipe2(l.pipe[:], unix.O_CLOEXEC); err != nil {
		return nil, fmt.Errorf("pipe: %w", err)
	}
	var limit unix.Rlimit
	least := firstClosed
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err == nil {
		least = int(min(limit.Cur/4*3, firstClosed))
	}
	// With a lower number the holder just hears of it later.
	if high, err := unix.FcntlInt(uintptr(l.pipe[1]), unix.F_DUPFD_CLOEXEC, least); err == nil {
		_ = unix.Close(l.pipe[1])
		l.pipe[1] = high
	}
	return l, nil
}

// Ask asks the holder, m, for a standby, or declines it.
func (l *Life) Ask(m *notify.Manager, wanted bool) error {
	if !wanted {
		return m.Notify(standbyVariable + "0")
	}
	return m.Notify(standbyVariable+"1", l.pipe[0])
}

// Close closes the pipe.
func (l *Life) Close() error {
	if l == nil {
		return nil
	}
	return errors.Join(unix.Close(l.pipe[0]), unix.Close(l.pipe[1]))
}

// Standby is the process's side of a standby.
type Standby struct {
	fd   int
	once sync.Once
}

// NewStandby takes over the descriptor called StandbyName.
func NewStandby(fd int) *Standby { return &Standby{fd: fd} }

// Wait waits for the descriptors of the process that this one replaces, which is dying: it runs nothing any more, and the
// kernel is about to close its files. The error matches io.EOF if there is nothing to do for this process: the context has
// ended, or the holder does not need it.
func (s *Standby) Wait(ctx context.Context) (files []notify.File, err error) {
	defer context.AfterFunc(ctx, func() { _ = unix.Shutdown(s.fd, unix.SHUT_RD) })()
	for {
		line, fds, err := s.receive()
		if err == nil && line == startLine && len(fds) == 0 {
			return files, nil
		}
		names := strings.Split(line, ":")
		if err == nil && len(names) != len(fds) {
			err = fmt.Errorf("%d names of %d descriptors from the holder", len(names), len(fds))
		}
		for i, fd := range fds {
			if err == nil {
				files = append(files, notify.File{Name: names[i], FD: fd})
			} else {
				_ = unix.Close(fd)
			}
		}
		if err != nil {
			for _, f := range files {
				_ = unix.Close(f.FD)
			}
			return nil, err
		}
	}
}

// WaitEnded waits until the process that this one replaces has ended, or the holder has. Then nothing more comes.
func (s *Standby) WaitEnded() error {
	defer s.Close()
	switch line, fds, err := s.receive(); {
	case errors.Is(err, io.EOF):
		return nil
	case err != nil:
		return err
	case line != endedLine || len(fds) > 0:
		return fmt.Errorf("the holder sent %q, want %q", line, endedLine)
	}
	return nil
}

// Close closes the socket.
func (s *Standby) Close() { s.once.Do(func() { _ = unix.Close(s.fd) }) }

func (s *Standby) receive() (line string, fds []int, err error) {
	text, oob := make([]byte, 64<<10), make([]byte, unix.CmsgSpace(mostAtOnce*4))
	var n, oobn, flags int
	for {
		n, oobn, flags, _, err = unix.Recvmsg(s.fd, text, oob, unix.MSG_CMSG_CLOEXEC)
		if !errors.Is(err, unix.EINTR) {
			break
		}
	}
	if err != nil {
		return "", nil, fmt.Errorf("receive from the holder: %w", err)
	}
	if n == 0 {
		return "", nil, io.EOF
	}
	parts, err := syscall.ParseSocketControlMessage(oob[:oobn])
	for i := range parts {
		some, failed := syscall.ParseUnixRights(&parts[i])
		fds, err = append(fds, some...), errors.Join(err, failed)
	}
	if err == nil && flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0 {
		err = errors.New("descriptors from the holder have not come: this process may have no more open (ulimit -n)")
	}
	return string(text[:n]), fds, err
}

// standby is the holder's side of one.
type standby struct {
	pid, fd int
}

// sendTimeout is how long a standby may take to receive.
const sendTimeout = 2 * time.Second

func (h *holder) startStandby() (*standby, error) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("socket pair: %w", err)
	}
	s := &standby{fd: pair[0]}
	limit := unix.NsecToTimeval(int64(sendTimeout))
	if err := unix.SetsockoptTimeval(s.fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &limit); err != nil {
		return nil, errors.Join(fmt.Errorf("socket pair: %w", err), unix.Close(pair[0]), unix.Close(pair[1]))
	}
	process, err := h.launch([]notify.File{{Name: PipeName, FD: h.pipe[0]}, {Name: StandbyName, FD: pair[1]}})
	if err := errors.Join(err, unix.Close(pair[1])); err != nil {
		return nil, errors.Join(err, unix.Close(pair[0]))
	}
	s.pid = process.Pid
	return s, nil
}

// send sends the standby a line with descriptors.
func (s *standby) send(line string, fds ...int) error {
	var rights []byte
	if len(fds) > 0 {
		rights = unix.UnixRights(fds...)
	}
	for {
		err := unix.Sendmsg(s.fd, []byte(line), rights, nil, unix.MSG_NOSIGNAL)
		if !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// give passes the descriptors on: the process begins.
func (s *standby) give(files []notify.File) error {
	for some := range slices.Chunk(files, mostAtOnce) {
		names, fds := make([]string, len(some)), make([]int, len(some))
		for i, f := range some {
			names[i], fds[i] = f.Name, f.FD
		}
		if err := s.send(strings.Join(names, ":"), fds...); err != nil {
			return fmt.Errorf("pass the descriptors on: %w", err)
		}
	}
	if err := s.send(startLine); err != nil {
		return fmt.Errorf("start it: %w", err)
	}
	return nil
}

// end kills it.
func (s *standby) end() {
	_ = unix.Kill(s.pid, unix.SIGKILL) // or it has ended, and is about to be reaped
	s.close()
}

func (s *standby) close() {
	if s.fd >= 0 {
		_ = unix.Close(s.fd)
		s.fd = -1
	}
}

// exe is the file that a process runs.
func exe(pid int) string { return fmt.Sprintf("/proc/%d/exe", pid) }

// runs says whether a process runs a file that is still where it was: a program is replaced by a rename.
func runs(pid int, program os.FileInfo) bool {
	is, err := os.Stat(exe(pid))
	if err != nil || program == nil || !os.SameFile(program, is) {
		return false
	}
	path, err := os.Readlink(exe(pid))
	return err == nil && !strings.HasSuffix(path, " (deleted)")
}
