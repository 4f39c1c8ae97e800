package fanout

import (
	"errors"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"xdpcast/internal/labtest"
)

// faults makes one call of a system fail.
type faults struct {
	failAt int // the first call is number 1
	err    error
	calls  int
	failed bool
}

func (f *faults) hit() error {
	f.calls++
	if f.calls != f.failAt {
		return nil
	}
	f.failed = true
	return f.err
}

// system is the kernel, except for the call that fails. Calls that release something
// are made anyway.
func (f *faults) system() *system {
	k := kernel()
	s := *k
	s.socket = func(domain, kind, protocol int) (int, error) {
		if err := f.hit(); err != nil {
			return -1, err
		}
		return k.socket(domain, kind, protocol)
	}
	s.setInt = func(fd, level, option, value int) error {
		return errors.Join(f.hit(), k.setInt(fd, level, option, value))
	}
	s.getInt = func(fd, level, option int) (int, error) {
		if err := f.hit(); err != nil {
			return 0, err
		}
		return k.getInt(fd, level, option)
	}
	s.setFilter = func(fd int, program []unix.SockFilter) error {
		return errors.Join(f.hit(), k.setFilter(fd, program))
	}
	s.setRing = func(fd int, ring *unix.TpacketReq3) error { return errors.Join(f.hit(), k.setRing(fd, ring)) }
	s.setFrames = func(fd int, ring *unix.TpacketReq) error { return errors.Join(f.hit(), k.setFrames(fd, ring)) }
	s.setFanout = func(fd int, args fanoutArgs) error {
		if err := f.hit(); err != nil {
			return err
		}
		return k.setFanout(fd, args)
	}
	s.mmap = func(fd, size int) ([]byte, error) {
		if err := f.hit(); err != nil {
			return nil, err
		}
		return k.mmap(fd, size)
	}
	s.seals = func(fd int) (int, error) {
		if err := f.hit(); err != nil {
			return 0, err
		}
		return k.seals(fd)
	}
	s.namespace = func(fd int) (uint64, error) {
		if err := f.hit(); err != nil {
			return 0, err
		}
		return k.namespace(fd)
	}
	s.munmap = func(memory []byte) error { return errors.Join(k.munmap(memory), f.hit()) }
	s.bind = func(fd int, address unix.Sockaddr) error { return errors.Join(f.hit(), k.bind(fd, address)) }
	s.getsockname = func(fd int) (unix.Sockaddr, error) {
		if err := f.hit(); err != nil {
			return nil, err
		}
		return k.getsockname(fd)
	}
	s.eventfd = func() (int, error) {
		if err := f.hit(); err != nil {
			return -1, err
		}
		return k.eventfd()
	}
	s.statistics = func(fd int) (*unix.TpacketStatsV3, error) {
		if err := f.hit(); err != nil {
			return nil, err
		}
		return k.statistics(fd)
	}
	s.memory = func(size int) (int, error) {
		if err := f.hit(); err != nil {
			return -1, err
		}
		return k.memory(size)
	}
	s.close = func(fd int) error { return errors.Join(k.close(fd), f.hit()) }
	return &s
}

func faultOptions(t *testing.T) Options {
	labtest.RequireRoot(t)
	opts := modeOptions(t, ModeEBPF, 3)
	opts.Interface, opts.Index, opts.Blocks = "lo", 1, 2
	return opts
}

// faultsOf returns faultOptions, optionally with frame rings.
func faultsOf(t *testing.T, ring int) Options {
	opts := faultOptions(t)
	if ring > 0 {
		opts.Mode, opts.Steering, opts.Frames = ModeHash, nil, ring
	}
	return opts
}

// Whichever call of Open fails, the error names the step, and nothing is left.
func TestOpenFails(t *testing.T) { eachRing(t, testOpenFails) }

func testOpenFails(t *testing.T, ring int) {
	h := labtest.Host(t, "flt")
	labtest.Enter(t, h)
	opts := faultsOf(t, ring)
	before := labtest.Held()
	steps := map[Step]int{}
	for i := 1; ; i++ {
		f := &faults{failAt: i, err: unix.EPERM}
		g, err := open(opts, f.system())
		if !f.failed {
			if err != nil {
				t.Fatal(err)
			}
			f.failAt = 0
			if err := g.Close(); err != nil {
				t.Error(err)
			}
			break
		}
		var failure *Error
		if !errors.As(err, &failure) || !errors.Is(err, unix.EPERM) || g != nil {
			t.Fatalf("call %d: %v, %v", i, g, err)
		}
		group := " group "
		if failure.GroupID < 0 {
			group = " new group "
		}
		if text := err.Error(); !strings.HasPrefix(text, "PACKET_FANOUT"+group) ||
			!strings.Contains(text, "(mode "+opts.Mode.String()+") on lo: "+string(failure.Step)+": operation not permitted") {
			t.Errorf("call %d: %s", i, text)
		}
		if after := labtest.Held(); after != before {
			t.Fatalf("call %d, %s: holds %+v, want %+v", i, failure.Step, after, before)
		}
		steps[failure.Step]++
	}
	want := map[Step]int{
		StepState: 2, StepSocket: 3, StepDropAll: 3, StepVersion: 3, StepVnetHeader: 3, StepRing: 3, StepMap: 3, StepBind: 3,
		StepHardware: 3, StepJoin: 3, StepGroupID: 3, StepEventFD: 3, StepSteering: 1, StepFilter: 3,
	}
	if ring > 0 {
		for _, step := range []Step{StepSocket, StepDropAll, StepVersion, StepVnetHeader, StepRing, StepMap, StepBind, StepJoin, StepFilter} {
			want[step] += 3
		}
	}
	if diff := cmp.Diff(want, steps); diff != "" {
		t.Error(diff)
	}
}

// Whichever call of Close fails, everything is closed.
func TestCloseFails(t *testing.T) { eachRing(t, testCloseFails) }

func testCloseFails(t *testing.T, ring int) {
	h := labtest.Host(t, "flt")
	labtest.Enter(t, h)
	opts := faultsOf(t, ring)
	before := labtest.Held()
	for i := 1; ; i++ {
		f := &faults{err: unix.EIO}
		g, err := open(opts, f.system())
		if err != nil {
			t.Fatal(err)
		}
		f.calls, f.failAt = 0, i
		err = g.Close()
		if after := labtest.Held(); after != before {
			t.Fatalf("call %d: holds %+v, want %+v", i, after, before)
		}
		if !f.failed {
			break
		}
		var failure *Error
		if !errors.As(err, &failure) || !errors.Is(err, unix.EIO) || failure.Step != StepStats && failure.Step != StepClose {
			t.Errorf("call %d: %v", i, err)
		}
	}
}

// A filter that fails on a later worker is removed from the earlier ones.
func TestSetFilterFails(t *testing.T) {
	labtest.Enter(t, labtest.Host(t, "flt"))
	f := &faults{err: unix.ENOMEM}
	opts := faultOptions(t)
	opts.Filter = Filter{Classic: portFilter(5000)}
	sys := f.system()
	set := sys.setFilter
	attached := map[int]uint32{} // the port that each socket's filter keeps
	sys.setFilter = func(fd int, program []unix.SockFilter) error {
		if err := set(fd, program); err != nil {
			return err
		}
		if at := skipLen + 3; len(program) > at {
			attached[fd] = program[at].K
		}
		return nil
	}
	g, err := open(opts, sys)
	if err != nil {
		t.Fatal(err)
	}
	defer g.Close()
	f.calls, f.failAt = 0, 3
	if err := g.SetFilter(Filter{Classic: portFilter(6000)}); !errors.Is(err, unix.ENOMEM) {
		t.Errorf("error is %v", err)
	}
	for fd, port := range attached {
		if port != 5000 {
			t.Errorf("socket %d has the filter for port %d", fd, port)
		}
	}
}

// Kernels before 6.13 return EINVAL for an interface that is down; a wrong group id
// from the kernel is detected.
func TestJoinAnswers(t *testing.T) {
	labtest.Enter(t, labtest.Host(t, "flt"))
	opts := Options{Interface: "lo", Index: 1, Workers: 2, Blocks: 2}
	for _, test := range []struct {
		pending int
		want    error
	}{{int(unix.ENETDOWN), unix.ENETDOWN}, {0, unix.EINVAL}} {
		sys := *kernel()
		sys.setFanout = func(int, fanoutArgs) error { return unix.EINVAL }
		sys.getInt = func(int, int, int) (int, error) { return test.pending, nil }
		if _, err := open(opts, &sys); !errors.Is(err, test.want) {
			t.Errorf("pending %d: %v", test.pending, err)
		}
	}
	sys := *kernel()
	ids := 0
	sys.getInt = func(int, int, int) (int, error) { ids++; return ids, nil }
	if _, err := open(opts, &sys); err == nil || !strings.Contains(err.Error(), "group 1 (mode cpu) on lo: read group id: the kernel says 2, must be 1") {
		t.Errorf("error is %v", err)
	}
}

func TestWaitFails(t *testing.T) {
	labtest.Enter(t, labtest.Host(t, "flt"))
	sys := *kernel()
	answers := []error{unix.EINTR, unix.ENOMEM}
	sys.poll = func([]unix.PollFd, int) (int, error) {
		err := answers[0]
		answers = answers[1:]
		return -1, err
	}
	g, err := open(Options{Interface: "lo", Index: 1, Blocks: 2, Filter: Filter{Classic: keep(0)}}, &sys)
	if err != nil {
		t.Fatal(err)
	}
	defer g.Close()
	var failure *Error
	if _, err := g.Workers()[0].Wait(); !errors.Is(err, unix.ENOMEM) || !errors.As(err, &failure) || failure.Step != StepReceive {
		t.Errorf("error is %v", err)
	}
}
