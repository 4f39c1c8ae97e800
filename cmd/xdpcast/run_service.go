package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"xdpcast/internal/forward"
	"xdpcast/internal/hold"
	"xdpcast/internal/nice"
	"xdpcast/internal/notify"
	"xdpcast/internal/relay"
	"xdpcast/pkg/flow"
	"xdpcast/pkg/loader"
	"xdpcast/pkg/membership"
)

// Names of descriptors passed from one daemon to the next, other than those of memberships.
const (
	passedAPI     = "api"
	passedHTTP    = "http"
	passedSecrets = "http.secrets"
	passedRunLock = "lock.run"
	passedPinLock = "lock.pins"
	passedGate    = "fanout.gate"
	passedAFXDP   = "afxdp.state" // the others of the path are passedSocket(0), 1, ...
)

func passedSocket(at int) string { return fmt.Sprintf("afxdp.%d", at) }

// stopPatience is how long the previous daemon may take to end a path.
const stopPatience = 10 * time.Second

// service is the process that started this one, if it speaks sd_notify(3): the service manager,
// "xdpcast hold", or the daemon that this one takes over from.
type service struct {
	log     *slog.Logger
	manager *notify.Manager // nil: none
	kept    []membership.Kept
	rings   *forward.FanoutHandover // kept from an earlier process; nil: none
	store   *notify.Store

	standby *hold.Standby // this process was started as one; nil: it was not
	life    *hold.Life    // the holder watches it; nil: not yet

	passed map[string]*os.File // by the previous daemon, by name
	holder int                 // pipe that is closed when the holder is gone; -1: none
	// taken: the previous daemon was asked to leave a path to this one.
	taken atomic.Bool
}

// connectService connects to the service manager, and takes the descriptors kept from an earlier
// process. A daemon also runs without it: errors are logged. A standby first waits until it is needed, after a call of
// prepare; the error matches io.EOF if it is not.
func connectService(ctx context.Context, log *slog.Logger, prepare func()) (*service, error) {
	s := &service{log: log, passed: map[string]*os.File{}, holder: -1}
	var err error
	if s.manager, err = notify.Connect(); err != nil {
		log.Warn("service manager", "error", err)
	}
	files, err := notify.Received()
	if err != nil {
		log.Warn("descriptors of the service manager", "error", err)
	}
	if i := slices.IndexFunc(files, func(f notify.File) bool { return f.Name == hold.StandbyName }); i >= 0 {
		s.standby = hold.NewStandby(files[i].FD)
		prepare()
		kept, err := s.standby.Wait(ctx)
		if err != nil {
			s.standby.Close()
			return nil, errors.Join(err, s.manager.Close())
		}
		files = append(slices.Delete(files, i, i+1), kept...)
	}
	takesOver := s.manager.TakesOver()
	store, holds := s.manager.Store(len(files)), 0
	for _, f := range files {
		switch {
		case s.manager != nil && membership.IsKept(f.Name):
			s.kept = append(s.kept, membership.Kept{Name: f.Name, FD: f.FD})
			holds++
			continue
		case f.Name == hold.PipeName && s.holder < 0:
			s.holder = f.FD
			continue
		case s.manager != nil && !takesOver && s.keepRing(f):
			holds++
			continue
		case takesOver && s.passed[f.Name] == nil:
			if forward.IsRing(f.Name) {
				holds++
			}
			s.passed[f.Name] = os.NewFile(uintptr(f.FD), f.Name)
			continue
		}
		log.Warn("a descriptor from the service manager is unusable, and closed", "name", f.Name)
		if err := unix.Close(f.FD); err != nil {
			log.Warn("close it", "error", err)
		}
		if f.Name == "" {
			continue
		}
		if err := store.Drop(f.Name); err != nil {
			log.Warn("have it dropped", "error", err)
		}
	}
	s.store = s.manager.Store(holds)
	return s, nil
}

// waitEnded waits until a process that this one has replaced before its end has ended; false: there was none.
func (s *service) waitEnded() bool {
	if s.standby == nil {
		return false
	}
	if err := s.standby.WaitEnded(); err != nil {
		s.log.Warn("wait for the end of the previous daemon", "error", err)
	}
	return true
}

// wantStandby asks the holder for a standby, or declines it.
func (s *service) wantStandby(wanted bool) {
	if s.holder < 0 || !wanted && s.life == nil {
		return
	}
	var err error
	if s.life == nil {
		s.life, err = hold.NewLife()
	}
	if err == nil {
		err = s.life.Ask(s.manager, wanted)
	}
	if err != nil {
		s.log.Warn("no standby: the next daemon relays later, should this one be killed", "error", err)
	}
}

// keepRing takes a descriptor of the fanout path. It returns false if it is none, or a second one of its
// name.
func (s *service) keepRing(f notify.File) bool {
	if s.rings == nil {
		s.rings = &forward.FanoutHandover{}
	}
	return s.rings.Add(f.Name, f.FD)
}

// memberships makes the service manager keep memberships. Without one they can still be handed
// over.
func (s *service) memberships() membership.Options {
	return membership.Options{Keeper: s.store, Kept: s.kept}
}

// take returns the descriptor that the previous daemon passed under a name; nil if none.
func (s *service) take(name string) *os.File {
	f := s.passed[name]
	delete(s.passed, name)
	return f
}

// listener is take for a listening socket.
func (s *service) listener(name string) net.Listener {
	f := s.take(name)
	if f == nil {
		return nil
	}
	l, err := net.FileListener(f)
	if err := errors.Join(err, f.Close()); err != nil {
		s.log.Warn("a descriptor from the previous daemon is not used", "name", name, "error", err)
		return nil
	}
	return l
}

// locks are the previous daemon's.
func (s *service) locks() loader.Locks {
	return loader.Locks{Run: s.take(passedRunLock), Pins: s.take(passedPinLock)}
}

// predecessor is the previous daemon, as relay.Predecessor; nil if there is none.
func (s *service) predecessor() *relay.Predecessor {
	if !s.manager.TakesOver() {
		return nil
	}
	ask := func(what string) error {
		s.taken.Store(true)
		return hold.AskToStop(s.manager, what, stopPatience)
	}
	p := &relay.Predecessor{
		Stop:    func(path flow.Path) error { return ask(relay.PathName(path)) },
		Suspend: ask,
		Prepare: s.prepare,
	}
	for name := range s.passed {
		if forward.IsRing(name) {
			if p.Fanout == nil {
				p.Fanout = &forward.FanoutHandover{}
			}
			f := s.take(name)
			fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 3)
			if err = errors.Join(err, f.Close()); err != nil {
				s.log.Warn("a descriptor from the previous daemon is not used", "name", name, "error", err)
				continue
			}
			p.Fanout.Add(name, fd)
		}
	}
	if f := s.take(passedAFXDP); f != nil {
		p.AFXDP = &forward.AFXDPHandover{State: f}
		for f := s.take(passedSocket(0)); f != nil; f = s.take(passedSocket(len(p.AFXDP.Files))) {
			p.AFXDP.Files = append(p.AFXDP.Files, f)
		}
	}
	if f := s.take(passedGate); f != nil {
		fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 3)
		if err = errors.Join(err, f.Close()); err == nil {
			p.Gate, err = ebpf.NewMapFromFD(fd)
		}
		if err != nil {
			s.log.Warn("the fanout path is taken over with packets lost", "error", err)
		}
	}
	return p
}

// prepare calls a function, with a low priority while the previous daemon forwards: what it needs the CPU for,
// its rings may not hold.
func (s *service) prepare(do func()) {
	if s.manager.TakesOver() && !s.taken.Load() {
		nice.Do(do)
		return
	}
	do()
}

// ready says that the rules are loaded. When it returns, a daemon that takes over has replaced the
// previous one.
func (s *service) ready() {
	if f := s.take(hold.StderrName); f != nil { // the previous daemon has copied everything until now
		fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 3)
		if err = errors.Join(err, f.Close()); err == nil {
			err = hold.KeepStderr(fd)
		}
		if err != nil {
			s.log.Warn("keep the previous daemon's standard error", "error", err)
		}
	}
	s.tell(notify.Ready)
	if s.manager.TakesOver() {
		if err := s.manager.Barrier(); err != nil {
			s.log.Warn("the daemon before", "error", err)
		}
		s.manager.Follow()
		s.log.Info("taken over")
	}
	for name, f := range s.passed {
		s.log.Warn("a descriptor from the previous daemon is unusable, and closed", "name", name)
		if err := f.Close(); err != nil {
			s.log.Warn("close it", "error", err)
		}
	}
	clear(s.passed)
}

// failed reports why the daemon ends, to the daemon that it should have replaced.
func (s *service) failed(err error) {
	if err != nil && s.manager.TakesOver() {
		text, _, _ := strings.Cut(err.Error(), "\n")
		s.tell("STATUS=" + text)
	}
}

// watchHolder calls ended when "xdpcast hold" is gone: it, or its supervisor, starts the next
// daemon.
func (s *service) watchHolder(ended func()) (stop func()) {
	if s.holder < 0 {
		return func() {}
	}
	pipe, err := unix.FcntlInt(uintptr(s.holder), unix.F_DUPFD_CLOEXEC, 3) // the original is passed on
	if err == nil {
		stop, err = hold.Watch(pipe, func() {
			s.log.Error("the process that holds this daemon's descriptors is gone: the daemon ends, or its supervisor could not start the next one")
			ended()
		})
	}
	if err != nil {
		s.log.Warn("watch the holder", "error", err)
		return func() {}
	}
	return stop
}

// tell reports the state to the service manager.
func (s *service) tell(state string) {
	if err := s.manager.Notify(state); err != nil {
		s.log.Warn("service manager", "error", err)
	}
}

func (s *service) close() error {
	err := errors.Join(s.manager.Close(), s.life.Close())
	if s.holder >= 0 {
		err = errors.Join(err, unix.Close(s.holder))
	}
	return err
}
