package demo

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"xdpcast/internal/lab"
)

// process is a process held by a pidfd (pidfd_open(2), Linux 5.3): unlike a PID, that never refers
// to another one.
type process struct {
	pid int
	fd  int
}

// openProcess returns the process that currently has the PID. The caller must close it.
func openProcess(pid int) (*process, error) {
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return nil, fmt.Errorf("process %d: %w", pid, err)
	}
	return &process{pid: pid, fd: fd}, nil
}

func (p *process) close() { unix.Close(p.fd) }

func (p *process) ended() bool { return p.endsWithin(0) }

// endsWithin waits until the process has ended, and returns whether it has: a pidfd is then
// readable. After an error that is not known.
func (p *process) endsWithin(d time.Duration) bool {
	for deadline := time.Now().Add(d); ; {
		left := max(0, time.Until(deadline))
		fds := []unix.PollFd{{Fd: int32(p.fd), Events: unix.POLLIN}}
		n, err := unix.Poll(fds, int(left.Milliseconds()))
		switch {
		case errors.Is(err, unix.EINTR), err == nil && n == 0 && left >= time.Millisecond:
		default:
			return err == nil && fds[0].Revents&unix.POLLIN != 0
		}
	}
}

// stop asks the process to end. One that does not within that time is killed, which is an error.
func (p *process) stop(patience time.Duration) error {
	if err := unix.PidfdSendSignal(p.fd, unix.SIGTERM, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("end process %d: %w", p.pid, err)
	}
	if p.endsWithin(patience) {
		return nil
	}
	if err := unix.PidfdSendSignal(p.fd, unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("kill process %d: %w", p.pid, err)
	}
	p.endsWithin(patience)
	return fmt.Errorf("process %d did not end within %v and was killed", p.pid, patience)
}

// listenerOf returns the PID of the process that listens on a unix socket (SO_PEERCRED, unix(7)), 0
// if none does.
func listenerOf(socket string) (int, error) {
	conn, err := net.DialTimeout("unix", socket, time.Second)
	if errors.Is(err, unix.ECONNREFUSED) || errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("who listens on %s: %w", socket, err)
	}
	defer conn.Close()
	raw, err := conn.(*net.UnixConn).SyscallConn()
	if err != nil {
		return 0, fmt.Errorf("who listens on %s: %w", socket, err)
	}
	var cred *unix.Ucred
	var credErr error
	if err := raw.Control(func(fd uintptr) {
		cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); err != nil || credErr != nil {
		return 0, fmt.Errorf("who listens on %s: %w", socket, errors.Join(err, credErr))
	}
	return int(cred.Pid), nil
}

// insider is a process that runs in a namespace of the lab.
type insider struct {
	pid       int
	name      string
	namespace string
}

// processesIn finds processes in the namespaces of a lab. Those that end meanwhile are omitted.
func processesIn(p places) ([]insider, error) {
	spaces := map[string]os.FileInfo{}
	for _, host := range labHosts() {
		info, err := os.Stat(filepath.Join(lab.RunDir, p.namespace(host)))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		spaces[p.namespace(host)] = info
	}
	dirs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return nil, err
	}
	var all []insider
	for _, dir := range dirs {
		info, err := os.Stat(filepath.Join(dir, "ns/net"))
		if err != nil {
			continue
		}
		for name, space := range spaces {
			if !os.SameFile(info, space) {
				continue
			}
			pid, _ := strconv.Atoi(filepath.Base(dir)) // digits, by the pattern
			comm, _ := os.ReadFile(filepath.Join(dir, "comm"))
			all = append(all, insider{pid, strings.TrimSpace(string(comm)), name})
		}
	}
	return all, nil
}
