package membership

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"xdpcast/internal/lab"
	"xdpcast/internal/labtest"
)

// store is a Keeper like systemd's: full, it drops in silence.
type store struct {
	t     testing.TB
	room  int
	fds   map[string][]int
	fault error
}

func newStore(t testing.TB) *store {
	s := &store{t: t, room: 1 << 20, fds: map[string][]int{}}
	t.Cleanup(func() { _ = s.Drop(slices.Collect(maps.Keys(s.fds))...) })
	return s
}

func (s *store) Keep(name string, fd int) error {
	if s.fault != nil {
		return s.fault
	}
	if len(s.fds) >= s.room {
		return nil
	}
	if len(s.fds[name]) > 0 {
		s.t.Errorf("%s is kept already", name)
	}
	s.add(name, fd)
	return nil
}

func (s *store) add(name string, fd int) {
	kept, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		s.t.Fatal(err)
	}
	s.fds[name] = append(s.fds[name], kept)
}

func (s *store) Drop(names ...string) error {
	for _, name := range names {
		for _, fd := range s.fds[name] {
			unix.Close(fd)
		}
		delete(s.fds, name)
	}
	return s.fault
}

func (s *store) Sync() error { return s.fault }

// back is what the next process gets.
func (s *store) back() (kept []Kept) {
	for name, fds := range s.fds {
		for _, fd := range fds {
			own, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
			if err != nil {
				s.t.Fatal(err)
			}
			kept = append(kept, Kept{name, own})
		}
	}
	return kept
}

// life is one process's manager.
type keeperLife struct {
	*Manager
	log *bytes.Buffer
	sys *faultSystem
}

// start makes a manager on the bench's host with what the store gives back.
func (b bench) start(t testing.TB, s *store) *keeperLife {
	t.Helper()
	l := &keeperLife{log: &bytes.Buffer{}, sys: &faultSystem{System: hostSystem{Kernel(), b.host}}}
	l.Manager = New(Options{System: l.sys, Keeper: s, Kept: s.back(), Logger: slog.New(slog.NewTextHandler(l.log, nil))})
	return l
}

// restore restores in the host's namespace.
func (b bench) restore(t testing.TB, l *keeperLife) (all []Status) {
	t.Helper()
	labtest.Do(t, b.host, func() error {
		all = l.Restore(func(index int) (string, uint64, bool) {
			for _, name := range []string{"eth0", "eth1"} {
				if link, err := b.host.Link(name); err == nil && link.Attrs().Index == index {
					return name, 0, true
				}
			}
			return "", 0, false
		})
		return nil
	})
	checkCounters(t, l.Manager)
	return all
}

func (b bench) parse(t testing.TB, all ...string) (list []Membership) {
	t.Helper()
	for _, what := range all {
		list = append(list, b.membership(t, "eth0", what))
	}
	return list
}

// manyKinds needs several sockets of each family, and several layers.
func (b bench) manyKinds(t testing.TB) (list []Membership) {
	for i := range 45 {
		list = append(list, b.membership(t, "eth0", fmt.Sprintf("239.1.1.%d", i)), b.membership(t, "eth1", fmt.Sprintf("239.1.2.%d", i)))
	}
	for i := range 25 {
		list = append(list, b.membership(t, "eth0", fmt.Sprintf("10.9.0.%d@232.1.1.1", i+1)))
	}
	for i := range 70 {
		list = append(list, b.membership(t, "eth0", fmt.Sprintf("fd00::%x@ff3e::1", i+1)))
	}
	return append(list, b.parse(t, "ff1e::1", "ff1e::2", "232.1.1.1", "10.9.0.1@239.1.1.1")...)
}

// noLeave checks that no leave of these was sent from eth0 since the capture began: the kernel
// reports changes together, those before a sentinel with it or before it.
func (b bench) noLeave(t testing.TB, c *capture, of []Membership) {
	t.Helper()
	watched := map[key]bool{}
	for _, ms := range of {
		watched[ms.key()] = true
	}
	for _, what := range []string{"239.255.255.250", "ff1e::ffff:250"} {
		ms := b.membership(t, "eth0", what)
		m := b.manager(t)
		mustJoin(t, m, ms)
		for seen := false; !seen; {
			for _, r := range c.next().Records {
				r.Sources = slices.DeleteFunc(r.Sources, func(from netip.Addr) bool { return !watched[Membership{Group: r.Group, Source: from}.key()] })
				if (watched[Membership{Group: r.Group}.key()] && r.Type == "CHANGE_TO_INCLUDE_MODE" || len(r.Sources) > 0) && (r.Type == "CHANGE_TO_INCLUDE_MODE" || r.Type == "BLOCK_OLD_SOURCES") {
					t.Errorf("left on the wire: %+v", r)
				}
				seen = seen || r.Group == ms.Group
			}
		}
		mustLeave(t, m, ms)
	}
}

// What one manager holds the next takes over, with no leave on the wire, and can leave.
func TestRestore(t *testing.T) {
	b := newBench(t)
	s := newStore(t)
	first := b.start(t, s)
	if got := b.restore(t, first); len(got) != 0 {
		t.Errorf("restored %v from nothing", got)
	}
	all := b.manyKinds(t)
	mustJoin(t, first.Manager, all...)
	mustLeave(t, first.Manager, all[7], all[50], all[100], all[130])
	want, state := first.List(), b.kernelState(t)
	var held []Membership
	for _, st := range want {
		held = append(held, st.Membership)
	}
	for _, orderly := range []bool{true, false, true} {
		c := b.capture(t, "eth0")
		if err := first.Close(); err != nil { // a process that is killed does no more
			t.Error(err)
		}
		if diff := cmp.Diff(state, b.kernelState(t), compareAddrs); diff != "" {
			t.Errorf("kernel state between two lives, - wanted + found:\n%s", diff)
		}
		next := b.start(t, s)
		got := b.restore(t, next)
		if diff := cmp.Diff(want, got, compareAddrs, cmp.Comparer(func(a, b time.Time) bool { return a.Sub(b).Abs() < time.Minute })); diff != "" {
			t.Errorf("restored, - wanted + found:\n%s", diff)
		}
		if !orderly {
			extra := b.parse(t, "239.1.1.200", "10.9.0.99@232.1.1.1")
			mustJoin(t, next.Manager, extra...)
			mustLeave(t, next.Manager, extra...)
		}
		next.Settle()
		if diff := cmp.Diff(state, b.kernelState(t), compareAddrs); diff != "" {
			t.Errorf("kernel state, - wanted + found:\n%s", diff)
		}
		if orderly {
			b.noLeave(t, c, held)
		}
		if strings.Contains(next.log.String(), "WARN") {
			t.Errorf("log:\n%s", next.log)
		}
		first = next
	}
	for _, st := range want {
		mustLeave(t, first.Manager, st.Membership)
	}
	b.checkState(t)
	if got := slices.Collect(maps.Keys(s.fds)); !slices.Equal(got, []string{ledgerName}) {
		t.Errorf("kept after leaving all: %v", got)
	}
	first.Close()
}

// Whatever came back wrong, the groups that are wanted are held throughout, and in the end
// they alone.
func TestRestoreFromDamage(t *testing.T) {
	b := newBench(t)
	wanted := b.parse(t, "239.1.1.1", "239.1.1.2", "10.9.0.5@232.1.1.1", "ff1e::1", "fd00::5@ff3e::1")
	for i := range 30 {
		wanted = append(wanted, b.membership(t, "eth0", fmt.Sprintf("239.1.3.%d", i)))
	}
	patch := func(at int64, with ...byte) func(*testing.T, *store) {
		return func(t *testing.T, s *store) {
			if _, err := unix.Pwrite(s.fds[ledgerName][0], with, at); err != nil {
				t.Fatal(err)
			}
		}
	}
	truncate := func(size int64) func(*testing.T, *store) {
		return func(t *testing.T, s *store) {
			if err := unix.Ftruncate(s.fds[ledgerName][0], size); err != nil {
				t.Fatal(err)
			}
		}
	}
	other := func(host *lab.Host, family, kind int) func(*testing.T, *store) {
		return func(t *testing.T, s *store) {
			labtest.Do(t, host, func() error {
				fd, err := unix.Socket(family, kind, 0)
				if err == nil {
					s.add("m.77", fd)
					err = unix.Close(fd)
				}
				return err
			})
		}
	}
	for _, tt := range []struct {
		name   string
		damage func(*testing.T, *store)
		log    string
	}{
		{"no ledger", func(_ *testing.T, s *store) { _ = s.Drop(ledgerName) }, "helper sockets came back without the record of their groups: these are joined again before the sockets are closed"},
		{"nothing", func(_ *testing.T, s *store) { _ = s.Drop(slices.Collect(maps.Keys(s.fds))...) }, ""},
		{"a future version", patch(16, 2), "it has version 2, this xdpcast reads 1"},
		{"other records", patch(20, 128), "its records have 128 bytes, want 64"},
		{"another file", patch(0, 'X'), "it has the wrong magic"},
		{"a flipped bit", patch(64+24, 0xff), "record 0: its checksum is wrong"},
		{"truncated", truncate(64 * 5), "it has 4 records, want 256"},
		{"torn", truncate(100), "it has 100 bytes, want records of 64 after a header of as many"},
		{"empty", truncate(0), "it has 0 bytes"},
		{"two ledgers", func(_ *testing.T, s *store) { s.add(ledgerName, s.fds[ledgerName][0]) }, "there is another one"},
		{"a socket is missing", func(_ *testing.T, s *store) { _ = s.Drop("m.2") }, `helper sockets did not come back, and their groups are joined again (does the service manager keep as many? see FileDescriptorStoreMax= of the service)" sockets=1 memberships=1 "came back"=`},
		{"sockets are missing", func(_ *testing.T, s *store) { _ = s.Drop("m.1", "m.2", "m.3") }, "sockets=3 memberships="},
		{"another's socket", other(b.host, unix.AF_INET, unix.SOCK_STREAM), `name=m.77 error="it is not a UDP socket"`},
		{"a socket of another namespace", other(b.peer, unix.AF_INET, unix.SOCK_DGRAM), `name=m.77 error="it belongs to another network namespace"`},
		{"a socket that the ledger does not know", other(b.host, unix.AF_INET, unix.SOCK_DGRAM), `sockets=1 error="the record does not mention it"`},
		{"a socket twice", func(_ *testing.T, s *store) { s.add("m.78", s.fds["m.1"][0]) }, "is closed"},
		{"another name", func(_ *testing.T, s *store) { s.add("m.x", s.fds["m.1"][0]) }, `name=m.x error="its name is not one of ours"`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := newStore(t)
			first := b.start(t, s)
			b.restore(t, first)
			mustJoin(t, first.Manager, wanted...)
			if strings.Contains(first.log.String(), "WARN") {
				t.Errorf("log of the first:\n%s", first.log)
			}
			state := b.kernelState(t)
			c := b.capture(t, "eth0")
			lasts := tt.name != "nothing" && !strings.Contains(tt.name, "missing")
			tt.damage(t, s)
			kept := s.back() // before the first process ends
			first.Close()
			next := &keeperLife{log: &bytes.Buffer{}}
			next.Manager = New(Options{System: hostSystem{Kernel(), b.host}, Keeper: s, Kept: kept, Logger: slog.New(slog.NewTextHandler(next.log, nil))})
			defer next.Close()
			held := map[Membership]bool{}
			for _, st := range b.restore(t, next) {
				held[st.Membership] = true
			}
			for _, ms := range wanted {
				if !held[ms] {
					mustJoin(t, next.Manager, ms)
				}
			}
			next.Settle()
			if diff := cmp.Diff(state, b.kernelState(t), compareAddrs); diff != "" {
				t.Errorf("kernel state, - wanted + found:\n%s", diff)
			}
			if lasts {
				b.noLeave(t, c, wanted)
			}
			if !strings.Contains(next.log.String(), tt.log) || tt.log == "" && strings.Contains(next.log.String(), "WARN") {
				t.Errorf("log, want %q:\n%s", tt.log, next.log)
			}
			// What it has made of it is sound for the next.
			next.Close()
			third := b.start(t, s)
			defer third.Close()
			if got := b.restore(t, third); len(got) != len(wanted) || strings.Contains(third.log.String(), "WARN") {
				t.Errorf("the third process took over %d of %d; log:\n%s", len(got), len(wanted), third.log)
			}
		})
	}
}

// The kernel says of sockets of before that they hold what an interface that was made anew with
// the same index does not.
func TestRestoreAfterTheInterfaceWasMadeAnew(t *testing.T) {
	b := newBench(t)
	s := newStore(t)
	first := b.start(t, s)
	b.restore(t, first)
	wanted := b.parse(t, "239.1.1.1", "10.9.0.5@232.1.1.1", "ff1e::1")
	mustJoin(t, first.Manager, wanted...)
	first.Close()
	index := labtest.Index(t, b.host, "eth0")
	labtest.RemoveLink(t, b.host, "eth0")
	labtest.Connect(t, lab.End{Host: b.host, Name: "eth0", Index: index, Addrs: []string{"10.0.0.1/24"}}, lab.End{Host: b.peer, Name: "eth0"})
	labtest.Eventually(t, "eth0 is up", func() bool { return labtest.Running(b.host, "eth0") && b.linkLocal(t, "eth0").IsValid() })
	next := b.start(t, s)
	if got := b.restore(t, next); len(got) != 0 {
		t.Errorf("restored %v", got)
	}
	mustJoin(t, next.Manager, wanted...)
	next.Settle()
	b.checkState(t, "eth0 239.1.1.1 1", "eth0 10.9.0.5@232.1.1.1 1/0", "eth0 232.1.1.1 1", "eth0 ff1e::1 1")
	next.Close()
	labtest.RemoveLink(t, b.host, "eth0")
	third := b.start(t, s)
	if got := b.restore(t, third); len(got) != 0 || !strings.Contains(third.log.String(), "is gone") {
		t.Errorf("restored %v; log:\n%s", got, third.log)
	}
	third.Settle()
	if got := slices.Collect(maps.Keys(s.fds)); !slices.Equal(got, []string{ledgerName}) {
		t.Errorf("kept: %v", got)
	}
	third.Close()
}

// errDied is what a system call of a process panics with that dies in it.
var errDied = errors.New("died")

// dyingSystem makes a process die before a call, or right after it.
type dyingSystem struct {
	System
	calls *int
}

func (s dyingSystem) die() {
	if *s.calls--; *s.calls < 0 {
		panic(errDied)
	}
}

func (s dyingSystem) Setsockopt(fd, level, option int, value []byte) error {
	s.die()
	defer s.die()
	return s.System.Setsockopt(fd, level, option, value)
}

func (s dyingSystem) Socket(family int) (int, error) {
	s.die()
	return s.System.Socket(family)
}

type dyingStore struct {
	*store
	calls *int
}

func (s dyingStore) Keep(name string, fd int) error {
	dyingSystem{calls: s.calls}.die()
	defer dyingSystem{calls: s.calls}.die()
	return s.store.Keep(name, fd)
}

func (s dyingStore) Drop(names ...string) error {
	dyingSystem{calls: s.calls}.die()
	defer dyingSystem{calls: s.calls}.die()
	return s.store.Drop(names...)
}

// Wherever a process dies, the next one takes over what is wanted still, joins what is not
// held, leaves the rest, and the kernel holds what is wanted alone. What the process held that
// is wanted still was held all the time.
func TestRestoreWhereverTheProcessDies(t *testing.T) {
	b := newBench(t)
	s := newStore(t)
	r := rand.New(rand.NewPCG(7, 7))
	var universe []Membership
	for i := range 30 {
		universe = append(universe, b.parse(t, fmt.Sprintf("239.1.1.%d", i), fmt.Sprintf("ff1e::%x", i+1), fmt.Sprintf("10.9.0.%d@232.1.1.%d", i%15+1, i/15), fmt.Sprintf("fd00::%x@ff3e::1", i+1))...)
	}
	want := map[Membership]bool{}
	for round := range labtest.Soak(25, 500) {
		for _, ms := range universe {
			if r.IntN(6) == 0 {
				want[ms] = !want[ms]
			}
		}
		calls := r.IntN(150)
		if round%5 == 0 {
			calls = 1 << 30
		}
		var open []int // of this process
		held := b.process(t, s, &calls, &open, want)
		if calls >= 0 { // it did not die
			truth := &model{refs: map[Membership]int{}}
			for ms, wanted := range want {
				if wanted {
					truth.refs[ms] = 1
				}
			}
			got := b.kernelState(t)
			if diff := cmp.Diff(slices.Sorted(maps.Keys(held)), truth.keys(), compareAddrs); diff != "" {
				t.Fatalf("round %d: held, + wanted:\n%s", round, diff)
			}
			if diff := cmp.Diff(truth.kernelState().Filters, got.Filters, compareAddrs); diff != "" {
				t.Fatalf("round %d: kernel state, - wanted + found:\n%s", round, diff)
			}
			for ms := range truth.refs {
				if got.Users[kernelGroup{ms.Index, ms.Group}] == 0 {
					t.Fatalf("round %d: %v is not held", round, ms)
				}
			}
		}
		for _, fd := range open {
			unix.Close(fd)
		}
	}
}

func (m *model) keys() []string {
	var keys []string
	for ms := range m.refs {
		keys = append(keys, ms.String())
	}
	slices.Sort(keys)
	return keys
}

// recordingSystem notes the descriptors that are open.
type recordingSystem struct {
	System
	open *[]int
}

func (s recordingSystem) Socket(family int) (int, error) {
	fd, err := s.System.Socket(family)
	if err == nil {
		*s.open = append(*s.open, fd)
	}
	return fd, err
}

func (s recordingSystem) Close(fd int) error {
	*s.open = slices.DeleteFunc(*s.open, func(o int) bool { return o == fd })
	return s.System.Close(fd)
}

// process is the life of one process, which ends after so many calls. It returns what it holds
// in the end; open are the descriptors that the kernel closes for it.
func (b bench) process(t *testing.T, s *store, calls *int, open *[]int, want map[Membership]bool) (held map[string]bool) {
	t.Helper()
	kept := s.back()
	for _, d := range kept {
		*open = append(*open, d.FD)
	}
	m := New(Options{System: recordingSystem{dyingSystem{hostSystem{Kernel(), b.host}, calls}, open}, Keeper: dyingStore{s, calls}, Kept: kept})
	defer func() {
		if died := recover(); died != nil && died != errDied {
			panic(died)
		}
		if m.keep != nil {
			*open = append(slices.DeleteFunc(*open, func(fd int) bool { return fd == m.keep.ledger.fd }), m.keep.ledger.fd)
		}
	}()
	holds := map[Membership]bool{}
	labtest.Do(t, b.host, func() (err error) {
		defer func() {
			if recover() != nil {
				err = nil
			}
		}()
		for _, st := range m.Restore(func(int) (string, uint64, bool) { return "eth0", 0, true }) {
			holds[st.Membership] = true
		}
		for ms, wanted := range want {
			if wanted && !holds[ms] {
				if err := m.Join(ms); err != nil {
					return err
				}
				holds[ms] = true
			}
		}
		for ms := range holds {
			if !want[ms] {
				delete(holds, ms)
				if err := m.Leave(ms); err != nil {
					return err
				}
			}
		}
		m.Settle()
		return nil
	})
	held = map[string]bool{}
	for ms := range holds {
		held[ms.String()] = true
	}
	return held
}

// A store that takes nothing is said once, and memberships end with the process as without.
func TestKeeperThatFails(t *testing.T) {
	b := newBench(t)
	for _, tt := range []struct {
		name  string
		fails func(s *store)
	}{
		{"from the start", func(s *store) { s.fault = unix.ECONNREFUSED }},
		{"later", func(*store) {}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := newStore(t)
			tt.fails(s)
			l := b.start(t, s)
			b.restore(t, l)
			s.fault = unix.ECONNREFUSED
			for i := range 65 {
				mustJoin(t, l.Manager, b.membership(t, "eth0", fmt.Sprintf("239.1.1.%d", i)))
			}
			if n := strings.Count(l.log.String(), "they are not kept for the next"); n != 1 || !strings.Contains(l.log.String(), "connection refused") {
				t.Errorf("said %d times:\n%s", n, l.log)
			}
			l.Close()
			b.checkState(t)
		})
	}
}

// Names of all sockets fit into one variable of the environment.
func TestNamesAreShort(t *testing.T) {
	const sockets, most = 8192, 128 << 10 // FileDescriptorStoreMax= of the unit, MAX_ARG_STRLEN
	k := &keeping{last: 1<<31 - 1 - sockets}
	length := len("LISTEN_FDNAMES=") + len(ledgerName)
	for range sockets {
		length += len(k.name()) + 1
	}
	if length > most {
		t.Errorf("%d bytes, want at most %d", length, most)
	}
}

func FuzzLedger(f *testing.F) {
	l, err := newLedger()
	if err != nil {
		f.Fatal(err)
	}
	for i, what := range []string{"239.1.1.1", "10.9.0.5@232.1.1.1", "ff1e::1", "fd00::5@ff3e::1"} {
		ms := parseMembership("eth0", 7, what)
		if _, err := l.add(&holding{cookie: uint64(i + 1), layer: i % 2, index: 7, group: ms.Group, source: ms.Source, since: time.Unix(0, int64(i))}); err != nil {
			f.Fatal(err)
		}
	}
	data := make([]byte, 64*8)
	if _, err := unix.Pread(l.fd, data, 0); err != nil {
		f.Fatal(err)
	}
	if err := l.close(); err != nil {
		f.Fatal(err)
	}
	data[len(ledgerMagic)+8], data[len(ledgerMagic)+9] = 7, 0
	if held, _, err := parseLedger(data); err != nil || len(held) != 4 {
		f.Fatalf("%d records, %v", len(held), err)
	}
	f.Add(data)
	f.Fuzz(func(t *testing.T, data []byte) {
		if len(data) < ledgerRecord || len(data)%ledgerRecord != 0 {
			return
		}
		held, free, err := parseLedger(data)
		if err != nil {
			if held != nil || free != nil {
				t.Error("an error and a value")
			}
			return
		}
		if len(held)+len(free) != len(data)/ledgerRecord-1 {
			t.Errorf("%d records and %d free ones in %d bytes", len(held), len(free), len(data))
		}
		for _, h := range held {
			raw := encodeHolding(&h)
			if !bytes.Equal(raw[:], data[(h.slot+1)*ledgerRecord:(h.slot+2)*ledgerRecord]) {
				t.Errorf("record %d is not what it was: %+v", h.slot, h)
			}
			if err := h.membership().validate(); err != nil {
				t.Error(err)
			}
			if _, ok := netip.AddrFromSlice(h.group.AsSlice()); !ok {
				t.Errorf("group %v", h.group)
			}
		}
	})
}
