package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"xdpcast/internal/control"
	"xdpcast/internal/hold"
	"xdpcast/internal/notify"
	"xdpcast/internal/privilege"
	"xdpcast/internal/relay"
)

// upgrader replaces this daemon with the binary now at its path.
type upgrader struct {
	ctx     context.Context // ends with the daemon
	service *service
	relay   *relay.Relay
	path    string // of the binary
	api     *control.Listener
	web     webListener
	listen  *listenConfig

	one      sync.Mutex // held during an upgrade
	replaced bool       // by a successor
}

// programPath is the path of the program: the name it was called by, if that still refers to this
// program, since a release may be installed behind a symbolic link.
func programPath() string {
	self, err := os.Executable()
	if err != nil {
		return os.Args[0]
	}
	called, err := exec.LookPath(os.Args[0])
	if err != nil {
		return self
	}
	if called, err = filepath.Abs(called); err != nil {
		return self
	}
	a, errA := os.Stat(called)
	b, errB := os.Stat(self)
	if errA != nil || errB != nil || !os.SameFile(a, b) {
		return self
	}
	return called
}

// upgrade returns when the new daemon has taken over, or has failed and this one continues.
func (u *upgrader) upgrade(ctx context.Context, timeout time.Duration) (result control.UpgradeResult, err error) {
	if !u.one.TryLock() {
		return result, control.Errorf(control.KindConflict, "an upgrade is in progress")
	}
	defer u.one.Unlock()
	return u.replace(ctx, timeout)
}

// replace is upgrade for a caller that holds one.
func (u *upgrader) replace(ctx context.Context, timeout time.Duration) (result control.UpgradeResult, err error) {
	if os.Getpid() == 1 {
		return result, control.Errorf(control.KindConflict, "this daemon is the first process of its container, which would end with it: start it by \"xdpcast hold -- xdpcast run ...\"")
	}
	if u.service.manager.TakesOver() {
		return result, control.Errorf(control.KindUnavailable, "this daemon is still taking over from another one")
	}
	log := u.service.log
	log.Info("upgrade", "binary", u.path, "timeout", timeout)
	started := time.Now()
	resumeAPI, resumeWeb := u.api.Pause(), u.web.pause(ctx)
	resume := func() { resumeAPI(); resumeWeb() }
	err = u.relay.HandOver(ctx, func(h *relay.Handed) error {
		files, duplicates, err := u.files(h)
		defer closeAll(duplicates)
		if err != nil {
			return err
		}
		ambient, err := privilege.Ambient()
		if err != nil {
			return err
		}
		result.PID, err = hold.Replace(u.ctx, hold.Replacement{
			Command: append([]string{u.path}, os.Args[1:]...), Env: os.Environ(), Files: files, Ambient: ambient,
			Outer: u.service.manager, Timeout: timeout, Log: log,
			Stop: func(what string) error {
				if what == "" {
					return h.End()
				}
				return h.Stop(what)
			},
			Beat: func() { u.service.tell(notify.Watchdog) },
		})
		if err == nil {
			u.api.Leave() // before this daemon ends, which it does once this returns
		}
		return err
	})
	if err != nil {
		resume()
		log.Error("upgrade failed, this daemon continues", "error", err)
		return result, control.Errorf(control.KindFailed, "%w; this daemon continues", err)
	}
	u.replaced = true
	result.Took = time.Since(started).Round(time.Millisecond).String()
	log.Info("upgraded", "pid", result.PID, "took", result.Took)
	return result, nil
}

// restartsOnTerm says whether SIGTERM asks a process with this command line, a daemon below "xdpcast hold", to
// restart.
func restartsOnTerm(args []string) bool {
	if os.Getenv(hold.RestartVariable) == "" || len(args) == 0 {
		return false
	}
	_, command := takeFlags(args[1:], newApp(time.Now).Flags)
	return len(command) > 0 && command[0] == runCommand().Name
}

// restartOnSignal replaces this daemon, as an upgrade does, on the first signal, and lets it end by end if that
// fails, and on the second: the holder then starts the next one. An upgrade in progress is as good if it
// succeeds.
func (u *upgrader) restartOnSignal(ctx context.Context, signals <-chan os.Signal, end func()) {
	select {
	case <-ctx.Done():
		return
	case <-signals:
	}
	failed := make(chan error, 1)
	go func() {
		u.one.Lock()
		defer u.one.Unlock()
		var err error
		if !u.replaced {
			_, err = u.replace(ctx, control.DefaultUpgradeTimeout)
		}
		failed <- err
	}()
	select {
	case err := <-failed:
		if err == nil {
			return
		}
		u.service.log.Error("SIGTERM: the daemon cannot replace itself, and ends", "error", err)
	case <-signals:
	}
	end()
}

// upgradeOnSignal upgrades on each signal. Errors are logged.
func (u *upgrader) upgradeOnSignal(ctx context.Context, signals <-chan os.Signal) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-signals:
		}
		if _, err := u.upgrade(ctx, control.DefaultUpgradeTimeout); err != nil {
			u.service.log.Error("SIGUSR2", "error", err)
		}
	}
}

// files are the descriptors for the new daemon: those that h owns, and duplicates, to be closed also after
// an error.
func (u *upgrader) files(h *relay.Handed) (files, duplicates []notify.File, err error) {
	add := func(name string, fd int, failed error) {
		if failed == nil {
			fd, failed = unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 3)
		}
		if failed != nil {
			err = errors.Join(err, fmt.Errorf("hand over %s: %w", name, failed))
			return
		}
		duplicates = append(duplicates, notify.File{Name: name, FD: fd})
	}
	of := func(name string, l any) {
		conn, ok := l.(syscall.Conn)
		if !ok {
			return
		}
		raw, failed := conn.SyscallConn()
		if failed == nil {
			failed = raw.Control(func(fd uintptr) { add(name, int(fd), nil) })
		}
		if failed != nil {
			add(name, -1, failed)
		}
	}
	of(passedAPI, u.api.UnixListener)
	if u.web.raw != nil {
		of(passedHTTP, u.web.raw.TCPListener)
	}
	secrets, failed := u.listen.pass()
	if failed != nil {
		add(passedSecrets, -1, failed)
	} else if secrets != nil {
		add(passedSecrets, int(secrets.Fd()), nil)
		err = errors.Join(err, secrets.Close())
	}
	add(passedRunLock, int(h.Locks.Run.Fd()), nil)
	add(passedPinLock, int(h.Locks.Pins.Fd()), nil)
	if h.Gate != nil {
		add(passedGate, h.Gate.FD(), nil)
	}
	if u.service.holder >= 0 {
		add(hold.PipeName, u.service.holder, nil)
	}
	for _, d := range h.Memberships {
		files = append(files, notify.File{Name: d.Name, FD: d.FD})
	}
	// Not duplicates: a queue is bound until all are closed.
	if h.AFXDP != nil {
		files = append(files, notify.File{Name: passedAFXDP, FD: int(h.AFXDP.State.Fd())})
		for i, f := range h.AFXDP.Files {
			files = append(files, notify.File{Name: passedSocket(i), FD: int(f.Fd())})
		}
	}
	h.Fanout.Each(func(name string, fd int) { files = append(files, notify.File{Name: name, FD: fd}) })
	return append(files, duplicates...), duplicates, err
}

func closeAll(files []notify.File) {
	for _, f := range files {
		_ = unix.Close(f.FD) // a duplicate
	}
}
