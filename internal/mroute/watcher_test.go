package mroute

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"xdpcast/internal/lab"
	"xdpcast/internal/labtest"
)

func TestMain(m *testing.M) { labtest.Main(m) }

// world is a router with its watcher.
type world struct {
	host    *lab.Host
	watcher *Watcher
	seen    map[Key]*Entry  // from Changes alone
	made    map[string]bool // sources of entries that a test has added
}

func newWorld(t *testing.T, opts Options) *world {
	w := &world{host: labtest.Host(t, "mr"), seen: map[Key]*Entry{}, made: map[string]bool{}}
	for i := range 4 {
		labtest.Connect(t, lab.End{Host: w.host, Name: fmt.Sprintf("eth%d", i)}, lab.End{Host: labtest.Host(t, "peer"), Name: "eth0"})
	}
	labtest.Enter(t, w.host)
	var err error
	if w.watcher, err = Open(opts); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(w.watcher.Close(), w.watcher.Close()); err != nil {
			t.Error(err)
		}
		if _, err := w.watcher.Changes(); !errors.Is(err, os.ErrClosed) {
			t.Errorf("changes after the end: %v", err)
		}
	})
	return w
}

// follow applies the changes.
func (w *world) follow(t *testing.T) {
	t.Helper()
	changes, err := w.watcher.Changes()
	if err != nil {
		t.Fatal(err)
	}
	for key, e := range changes {
		if e == nil {
			delete(w.seen, key)
			continue
		}
		w.seen[key] = e
	}
}

// asked is the kernel's current state.
func (w *world) asked(t *testing.T) map[Key]*Entry {
	t.Helper()
	found := map[Key]*Entry{}
	for _, family := range []uint8{familyIPv4, familyIPv6} {
		if err := dump(family, w.watcher.opts.Tables, found); err != nil {
			t.Fatal(err)
		}
	}
	return found
}

// agree waits until the reported changes add up to the kernel's state.
func (w *world) agree(t *testing.T, what string) {
	t.Helper()
	labtest.Eventually(t, what+": the changes that were told are the cache", func() bool {
		w.follow(t)
		want := w.asked(t)
		if len(want) != len(w.seen) || len(w.watcher.Entries()) != len(want) {
			return false
		}
		for key, e := range want {
			if w.seen[key] == nil || !w.seen[key].Equal(e) {
				return false
			}
		}
		return true
	})
}

func sourceOf(i int) string { return fmt.Sprintf("10.1.%d.%d", i/250, 1+i%250) }

// TestFollows: whatever a daemon does, the watcher reports the kernel's state, even after lost
// notifications.
func TestFollows(t *testing.T) {
	labtest.RequireRoot(t)
	for _, c := range []struct {
		name string
		room int
	}{{"all announced", 0}, {"announcements lost", 1}} {
		t.Run(c.name, func(t *testing.T) {
			w := newWorld(t, Options{IPv4: true, IPv6: true, Tables: []uint32{Main, 100}, room: c.room})
			seed := rand.Uint64()
			t.Logf("seed %d", seed)
			random := rand.New(rand.NewPCG(seed, 1))
			routers := []*labtest.Router{labtest.NewRouter(t, w.host, true, 0), labtest.NewRouter(t, w.host, true, 100), labtest.NewRouter(t, w.host, false, 0)}
			interfaces := []string{"eth0", "eth1", "eth2", "eth3"}
			for _, r := range routers {
				for _, name := range interfaces {
					r.AddVIF(name, 1)
				}
			}
			for step := range 60 {
				for range random.IntN(40) {
					at := random.IntN(len(routers))
					r := routers[at]
					source, group := sourceOf(random.IntN(60)), "239.1.1.1"
					if at == 2 {
						source, group = fmt.Sprintf("fd00::%x", 1+random.IntN(60)), "ff0e::1"
					}
					outputs := map[string]uint8{}
					for _, name := range interfaces[1:] {
						if random.IntN(2) == 0 {
							outputs[name] = uint8(1 + random.IntN(3))
						}
					}
					r.Add(source, group, "eth0", outputs)
					if random.IntN(3) == 0 {
						r.Delete(source, group, "eth0")
					}
				}
				switch random.IntN(8) {
				case 0:
					r := routers[random.IntN(len(routers))]
					r.DeleteVIF("eth3")
					w.agree(t, fmt.Sprintf("step %d, an interface left the router", step))
					r.AddVIF("eth3", 1)
				case 1:
					w.watcher.Resync()
				}
				w.agree(t, fmt.Sprintf("step %d", step))
			}
			for i, r := range routers {
				r.Close()
				w.agree(t, fmt.Sprintf("daemon %d ended", i))
			}
			if len(w.seen) != 0 {
				t.Errorf("entries without a daemon: %v", w.seen)
			}
		})
	}
}

// TestManyEntries: 10,000 entries are all reported, and do not slow a change.
func TestManyEntries(t *testing.T) {
	labtest.RequireRoot(t)
	w := newWorld(t, Options{IPv4: true})
	r := labtest.NewRouter(t, w.host, true, 0)
	for _, name := range []string{"eth0", "eth1"} {
		r.AddVIF(name, 1)
	}
	const n = 10000
	for i := range n {
		r.Add(sourceOf(i), "239.1.1.1", "eth0", map[string]uint8{"eth1": 1})
	}
	w.agree(t, "all are added")
	r.Delete(sourceOf(5), "239.1.1.1", "eth0")
	labtest.Eventually(t, "one change is told", func() bool {
		changes, err := w.watcher.Changes()
		if err != nil {
			t.Fatal(err)
		}
		if len(changes) > 1 {
			t.Fatalf("%d changes for one", len(changes))
		}
		return len(changes) == 1
	})
}

// TestChangesASecond: at 5,000 changes a second the watcher lags behind the cache by a bounded
// time, and in the end both agree. Under make soak it runs for long, and compares both
// repeatedly.
func TestChangesASecond(t *testing.T) {
	labtest.RequireRoot(t)
	w := newWorld(t, Options{IPv4: true})
	r := labtest.NewRouter(t, w.host, true, 0)
	for _, name := range []string{"eth0", "eth1", "eth2"} {
		r.AddVIF(name, 1)
	}
	const (
		rate   = 5000 // changes a second
		routes = 2000
	)
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 1))
	lags, told := []time.Duration{}, 0
	for round, start := 0, time.Now(); round < 4 || time.Since(start) < labtest.SoakTime(); round++ {
		began := time.Now()
		for i := range rate {
			source := sourceOf(random.IntN(routes))
			if random.IntN(4) == 0 {
				if w.deleted(source) {
					r.Delete(source, "239.1.1.1", "eth0")
				}
			} else {
				r.Add(source, "239.1.1.1", "eth0", map[string]uint8{[]string{"eth1", "eth2"}[random.IntN(2)]: 1})
				w.made[source] = true
			}
			// As the relay's loop does, follow on every signal.
			select {
			case <-w.watcher.Changed():
				told++
				w.follow(t)
			default:
			}
			if ahead := time.Duration(i)*time.Second/rate - time.Since(began); ahead > time.Millisecond {
				time.Sleep(ahead)
			}
		}
		// The marker is announced after all of these changes.
		changed := time.Now()
		marker := fmt.Sprintf("10.9.0.%d", 1+round%250)
		r.Add(marker, "239.9.9.9", "eth0", map[string]uint8{"eth1": 1})
		key := Key{Source: netip.MustParseAddr(marker), Group: netip.MustParseAddr("239.9.9.9")}
		labtest.Eventually(t, "the last change is told", func() bool {
			w.follow(t)
			return w.seen[key] != nil
		})
		lags = append(lags, time.Since(changed))
		r.Delete(marker, "239.9.9.9", "eth0")
		w.agree(t, fmt.Sprintf("round %d", round))
	}
	slices.Sort(lags)
	t.Logf("the last of %d changes was told after %v at most, %v in the middle; Changed told %d times", rate, lags[len(lags)-1], lags[len(lags)/2], told)
	if most := lags[len(lags)/2]; most > time.Second {
		t.Errorf("%v behind the cache, want at most 1s", most)
	}
}

// deleted reports whether an entry exists that is about to be deleted.
func (w *world) deleted(source string) bool {
	was := w.made[source]
	delete(w.made, source)
	return was
}

// TestHold: an entry is held as soon as its notification arrives, without a call of Changes, and
// released only for the state that Changes returned last; a new one is not held. Lost notifications
// hold all entries.
func TestHold(t *testing.T) {
	labtest.RequireRoot(t)
	held := make(chan Key, 100)
	w := newWorld(t, Options{IPv4: true, Hold: func(key Key) { held <- key }})
	r := labtest.NewRouter(t, w.host, true, 0)
	for _, name := range []string{"eth0", "eth1", "eth2"} {
		r.AddVIF(name, 1)
	}
	key := func(source string) Key {
		return Key{Source: netip.MustParseAddr(source), Group: netip.MustParseAddr("239.1.1.1")}
	}
	holds := func(what string, want Key) {
		t.Helper()
		select {
		case got := <-held:
			if got != want {
				t.Fatalf("%s: %v is held, want %v", what, got, want)
			}
		case <-time.After(labtest.Timeout):
			t.Fatalf("%s: %v is not held", what, want)
		}
	}
	settled := func() (released []Key) {
		w.watcher.Settled(slices.Values([]Key{key("10.0.0.5"), key("10.0.0.6")}), func(k Key) { released = append(released, k) })
		return released
	}
	add := func(source, output string) { r.Add(source, "239.1.1.1", "eth0", map[string]uint8{output: 1}) }
	add("10.0.0.5", "eth1")
	add("10.0.0.6", "eth1")
	w.agree(t, "two entries")
	if len(held) != 0 {
		t.Errorf("%v is held, which is new", <-held)
	}
	add("10.0.0.5", "eth2")
	holds("another output", key("10.0.0.5"))
	if got := settled(); !slices.Equal(got, []Key{key("10.0.0.6")}) {
		t.Errorf("before the change was told: released %v", got)
	}
	w.follow(t)
	if got := settled(); len(got) != 2 {
		t.Errorf("after the change was told: released %v", got)
	}
	r.Delete("10.0.0.5", "239.1.1.1", "eth0")
	holds("deleted", key("10.0.0.5"))
	w.agree(t, "one entry")
	// Lose notifications: from here on the socket's buffer is small, and the lock keeps it from being read.
	if err := w.watcher.raw.Control(func(fd uintptr) {
		if err := unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUF, 1); err != nil {
			t.Error(err)
		}
	}); err != nil {
		t.Fatal(err)
	}
	w.watcher.mu.Lock()
	for range 200 {
		add("10.0.0.7", "eth1")
		r.Delete("10.0.0.7", "239.1.1.1", "eth0")
	}
	w.watcher.mu.Unlock()
	labtest.Eventually(t, "an entry that nothing was heard of is held", func() bool {
		select {
		case got := <-held:
			return got == key("10.0.0.6")
		default:
			return false
		}
	})
	if got := settled(); len(got) != 0 {
		t.Errorf("after announcements were lost: released %v", got)
	}
	w.agree(t, "all was read again")
	if got := settled(); !slices.Contains(got, key("10.0.0.6")) {
		t.Errorf("after all was read again: released %v", got)
	}
}

// TestInterfaces: the interfaces that a routing daemon uses are reported for both families,
// including those of an earlier daemon, until they are removed.
func TestInterfaces(t *testing.T) {
	labtest.RequireRoot(t)
	w := newWorld(t, Options{IPv4: true, IPv6: true})
	index := func(name string) int { return labtest.Index(t, w.host, name) }
	told := func(what string, want ...int) {
		t.Helper()
		slices.Sort(want)
		labtest.Eventually(t, what, func() bool { return slices.Equal(w.watcher.Interfaces(), want) })
	}
	told("none")
	r := labtest.NewRouter(t, w.host, true, 0)
	r.AddVIF("eth1", 1)
	told("one", index("eth1"))
	six := labtest.NewRouter(t, w.host, false, 0)
	six.AddVIF("eth2", 1)
	told("one of each family", index("eth1"), index("eth2"))
	other, err := Open(Options{IPv4: true, IPv6: true})
	if err != nil {
		t.Fatal(err)
	}
	if got := other.Interfaces(); !slices.Equal(got, []int{index("eth1"), index("eth2")}) {
		t.Errorf("another watcher tells %v", got)
	}
	if err := other.Close(); err != nil {
		t.Error(err)
	}
	r.Close()
	six.Close()
	told("those of before", index("eth1"), index("eth2"))
	gone, stays := index("eth1"), index("eth2")
	l, err := w.host.Link("eth1")
	if err != nil {
		t.Fatal(err)
	}
	if err := w.host.Netlink().LinkDel(l); err != nil {
		t.Fatal(err)
	}
	told(fmt.Sprintf("without interface %d", gone), stays)
}

// TestOtherTables: tables that were not requested are not reported.
func TestOtherTables(t *testing.T) {
	labtest.RequireRoot(t)
	w := newWorld(t, Options{IPv4: true})
	other := labtest.NewRouter(t, w.host, true, 7)
	mine := labtest.NewRouter(t, w.host, true, 0)
	for _, r := range []*labtest.Router{other, mine} {
		r.AddVIF("eth0", 1)
		r.AddVIF("eth1", 1)
	}
	other.Add("10.0.0.7", "239.1.1.7", "eth0", map[string]uint8{"eth1": 1})
	mine.Add("10.0.0.1", "239.1.1.1", "eth0", map[string]uint8{"eth1": 1})
	w.agree(t, "one table")
	if len(w.seen) != 1 {
		t.Errorf("entries: %v", w.seen)
	}
}

// BenchmarkKeepalive measures the cost of a frame that the kernel counts for a route, for this many
// routes per run. Small runs show the fixed cost of a run.
func BenchmarkKeepalive(b *testing.B) {
	labtest.RequireRoot(b)
	host, peer := labtest.Host(b, "ka"), labtest.Host(b, "peer")
	labtest.Connect(b, lab.End{Host: host, Name: "eth0"}, lab.End{Host: peer, Name: "eth0"})
	labtest.Connect(b, lab.End{Host: host, Name: "eth1"}, lab.End{Host: peer, Name: "eth1"})
	r := labtest.NewRouter(b, host, true, 0)
	r.AddVIF("eth0", 1)
	r.AddVIF("eth1", 1)
	labtest.Enter(b, host)
	k, err := NewKeepalive()
	if err != nil {
		b.Fatal(err)
	}
	defer k.Close()
	const most = 10_000
	probes := make([]Probe, most)
	for i := range probes {
		r.Add(sourceOf(i), "239.1.1.1", "eth0", map[string]uint8{"eth1": 1})
		probes[i] = Probe{Source: netip.MustParseAddr(sourceOf(i)), Group: netip.MustParseAddr("239.1.1.1"), Input: labtest.Index(b, host, "eth0")}
	}
	for _, n := range []int{1, 64, most} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			labtest.Enter(b, host) // each b.Run has its own goroutine
			before, sent := r.Packets(sourceOf(0), "239.1.1.1"), uint64(0)
			for b.Loop() {
				if err := k.Send(probes[:n]); err != nil {
					b.Fatal(err)
				}
				sent++
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(sent)/float64(n), "ns/frame")
			if counted := r.Packets(sourceOf(0), "239.1.1.1") - before; counted != sent {
				b.Errorf("%d frames counted, %d sent", counted, sent)
			}
		})
	}
}
