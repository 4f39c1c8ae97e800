package events

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// clock is a time that tests set.
type clock struct{ ns atomic.Int64 }

func (c *clock) now() time.Time          { return time.Unix(1_700_000_000, c.ns.Load()).UTC() }
func (c *clock) advance(d time.Duration) { c.ns.Add(int64(d)) }

func testLog(t *testing.T, path string) (*Log, *clock) {
	t.Helper()
	c := &clock{}
	return Open(Options{File: path, Now: c.now}), c
}

// run runs the log until the test ends or stop is called.
func run(t *testing.T, l *Log) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		l.Run(ctx)
	}()
	stop = func() {
		cancel()
		<-done
	}
	t.Cleanup(stop)
	return stop
}

func ruleEvent(i int, state string) Event {
	return Event{Kind: KindRule, Rule: fmt.Sprintf("r%05d", i), State: state, Cause: "because"}
}

// all are the events that a reader finds now.
func all(r *Reader) (found []Event) {
	buf := make([]Event, 0, 100)
	for {
		next := r.Next(buf)
		if len(next) == 0 {
			return found
		}
		found = append(found, next...)
	}
}

// checkRow wants numbers that grow by one.
func checkRow(t *testing.T, found []Event) {
	t.Helper()
	for i := 1; i < len(found); i++ {
		if found[i].Number != found[i-1].Number+1 {
			t.Fatalf("event %d comes after %d", found[i].Number, found[i-1].Number)
		}
	}
}

func TestNumbersGrowByOne(t *testing.T) {
	l, _ := testLog(t, "")
	for i := range 500 {
		l.Add(ruleEvent(i, "active"))
	}
	r := l.ReadAfter(0)
	if got := all(r); len(got) != 0 {
		t.Errorf("%d events before they are shown", len(got))
	}
	l.show(false)
	got := all(r)
	checkRow(t, got)
	if len(got) != 500 || got[0].Number != 1 || got[499].Rule != "r00499" {
		t.Errorf("%d events, the first %+v, the last %+v", len(got), got[0], got[len(got)-1])
	}
	if got := all(l.ReadAfter(498)); len(got) != 2 || got[0].Number != 499 {
		t.Errorf("after 498: %+v", got)
	}
}

// TestStorm: 12,000 rules that change at once have 1,000 events of their own, and one for the rest;
// an interface that changes meanwhile has its own in any case.
func TestStorm(t *testing.T) {
	l, c := testLog(t, "")
	for i := range 12_000 {
		l.Add(ruleEvent(i, "pending"))
	}
	l.Add(Event{Kind: KindInterface, Interface: "eth1", State: "no_carrier"})
	l.release()
	l.show(false)
	r := l.ReadAfter(0)
	got := all(r)
	checkRow(t, got)
	if len(got) != burst+2 {
		t.Fatalf("%d events, want %d", len(got), burst+2)
	}
	if got[burst].Interface != "eth1" {
		t.Errorf("%+v, want that of the interface", got[burst])
	}
	sum := got[burst+1]
	if sum.Count != 12_000-burst || sum.Rule != "r01000" || sum.Last != "rule r11999" || sum.State != "pending" || sum.Cause != "because" {
		t.Errorf("the sum is %+v", sum)
	}
	want := "rule r01000 and 10999 more, the last rule r11999: pending: because"
	if sum.Text() != want {
		t.Errorf("%q, want %q", sum.Text(), want)
	}
	// They come back: nothing is left of the burst but what 2 seconds bring.
	c.advance(2 * time.Second)
	for i := range 12_000 {
		l.Add(ruleEvent(i, "active"))
	}
	l.release()
	l.show(false)
	got = all(r)
	if len(got) != 2*perSecond+1 || got[2*perSecond].Count != 12_000-2*perSecond {
		t.Errorf("%d events, the last %+v", len(got), got[len(got)-1])
	}
	if n := l.Counts()[KindRule]; n != 24_000 {
		t.Errorf("%d changes are counted, want 24,000", n)
	}
}

// TestSumKeepsOrder: a change that comes while others are held is not told before them.
func TestSumKeepsOrder(t *testing.T) {
	l, c := testLog(t, "")
	for i := range burst + 1 {
		l.Add(ruleEvent(i, "pending"))
	}
	c.advance(time.Hour)
	l.Add(ruleEvent(burst, "active"))
	l.release()
	l.show(false)
	got := all(l.ReadAfter(burst))
	if len(got) != 2 || got[0].State != "pending" || got[1].State != "active" || got[0].Count != 0 {
		t.Errorf("%+v", got)
	}
}

// TestRandom: whatever is added and read in whatever order, every reader gets every number once, or is
// told how many it missed.
func TestRandom(t *testing.T) {
	rnd := rand.New(rand.NewPCG(1, 2))
	l, c := testLog(t, filepath.Join(t.TempDir(), "events"))
	type state struct {
		r    *Reader
		next uint64
	}
	readers := make([]state, 5)
	for i := range readers {
		readers[i] = state{l.ReadAfter(0), 1}
	}
	kinds := Kinds()
	for range 3_000 {
		for range rnd.IntN(20) {
			e := ruleEvent(rnd.IntN(5), []string{"active", "pending", "failed"}[rnd.IntN(3)])
			e.Kind = kinds[rnd.IntN(len(kinds))]
			if rnd.IntN(50) == 0 {
				e.Cause = strings.Repeat("x", rnd.IntN(2000))
			}
			if rnd.IntN(10) == 0 {
				l.Sum(e)
			} else {
				l.Add(e)
			}
		}
		c.advance(time.Duration(rnd.IntN(int(10 * time.Second))))
		if rnd.IntN(3) == 0 {
			l.release()
		}
		if rnd.IntN(2) == 0 {
			l.show(false)
		}
		if rnd.IntN(100) > 2 {
			continue
		}
		s := &readers[rnd.IntN(len(readers))]
		for _, e := range s.r.Next(make([]Event, 0, 2+rnd.IntN(3000))) {
			switch {
			case e.Kind == KindMissed:
				s.next += e.Count
			case e.Number != s.next:
				t.Fatalf("event %d, want %d", e.Number, s.next)
			default:
				s.next++
			}
		}
	}
	if l.last < 2*Kept {
		t.Fatalf("only %d events", l.last)
	}
	if kept := l.last - l.first + 1; kept != Kept {
		t.Errorf("%d are kept", kept)
	}
	_ = l.file.close()
}

// TestConcurrency has many add while others read, some of them slowly. Numbers have no gap that
// was not told.
func TestConcurrency(t *testing.T) {
	const adders, each = 8, 4_000
	l := Open(Options{File: filepath.Join(t.TempDir(), "events")})
	stop := run(t, l)
	var reading sync.WaitGroup
	for i := range 4 {
		reading.Go(func() {
			r, next := l.ReadAfter(0), uint64(1)
			for r.Wait(context.Background()) {
				for _, e := range r.Next(make([]Event, 0, 2+i*100)) {
					if e.Kind == KindMissed {
						next += e.Count
						continue
					}
					if e.Number != next {
						t.Errorf("event %d, want %d", e.Number, next)
						return
					}
					next++
				}
			}
			if last := l.Last(); next != last+1 {
				t.Errorf("reader %d ends before event %d, the last is %d", i, next, last)
			}
		})
	}
	var adding sync.WaitGroup
	for a := range adders {
		adding.Go(func() {
			for i := range each {
				l.Add(Event{Kind: Kinds()[a], State: "s", Rule: fmt.Sprint(i)})
			}
		})
	}
	adding.Wait()
	stop()
	reading.Wait()
	sum := uint64(0)
	for _, n := range l.Counts() {
		sum += n
	}
	if sum != adders*each {
		t.Errorf("%d changes are counted, want %d", sum, adders*each)
	}
}

// TestMemoryIsBounded: events with the longest texts are fewer, not larger.
func TestMemoryIsBounded(t *testing.T) {
	l, c := testLog(t, "")
	long := strings.Repeat("ü", 10_000)
	for range 2 * Kept {
		c.advance(time.Second)
		l.Add(Event{Kind: KindOutput, Rule: long, Output: long, Interface: long, Group: long, Address: long, State: long, Before: long, Cause: long})
	}
	l.show(false)
	got := all(l.ReadAfter(0))
	bytes := 0
	for i := range got {
		bytes += got[i].size()
	}
	if bytes > maxBytes || bytes < maxBytes/2 || got[0].Kind != KindMissed || len(got[1].Rule) > maxText {
		t.Errorf("%d events of %d bytes, texts of %d", len(got), bytes, len(got[1].Rule))
	}
	checkRow(t, got[1:])
}

// TestRestart: the last 1,000 events are there after a restart, and numbers go on growing.
func TestRestart(t *testing.T) {
	path := filepath.Join(t.TempDir(), "run", "events")
	var last []Event
	for life := range 5 {
		l, c := testLog(t, path)
		kept := all(l.ReadAfter(0))
		if life > 0 && kept[0].Kind == KindMissed {
			kept = kept[1:]
		}
		if diff := cmp.Diff(last, kept); diff != "" {
			t.Fatalf("life %d (-before +after):\n%s", life, diff)
		}
		for i := range 700 {
			c.advance(time.Minute)
			l.Add(ruleEvent(i, fmt.Sprint(life)))
			if i%100 == 0 {
				l.show(false)
			}
		}
		l.show(false)
		_ = l.file.close()
		last = all(l.ReadAfter(0))
		last = last[max(0, len(last)-Saved):]
		if n := uint64(700 * (life + 1)); last[len(last)-1].Number != n {
			t.Fatalf("the last number is %d, want %d", last[len(last)-1].Number, n)
		}
	}
	info, err := os.Stat(path)
	if err != nil || info.Mode() != 0o600 {
		t.Errorf("%v, %v", info, err)
	}
}

// TestKilled: what a reader has seen is in the file at any moment, so that no number is given twice.
func TestKilled(t *testing.T) {
	path := filepath.Join(t.TempDir(), "events")
	l := Open(Options{File: path})
	run(t, l)
	r, seen := l.ReadAfter(0), uint64(0)
	for i := range 300 {
		l.Add(ruleEvent(i, "active"))
		if i%10 != 0 {
			continue
		}
		r.Wait(t.Context())
		for _, e := range r.Next(make([]Event, 0, 300)) {
			seen = e.Number
		}
		// As a process that starts after a kill finds it.
		if again := Open(Options{File: path}); again.Last() < seen {
			t.Fatalf("event %d was seen, %d are in the file", seen, again.Last())
		}
	}
}

func TestBrokenFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "events")
	good := `{"number":7,"time":"2026-01-02T03:04:05Z","kind":"rule","rule":"a","state":"active"}` + "\n"
	for text, want := range map[string][]uint64{
		"":                                nil,
		"garbage\n":                       nil,
		good:                              {7},
		good + `{"number":8,"time":"202`:  {7},
		"\x00\xff\n" + good:               {7},
		good + good:                       {7}, // begins anew
		`{"number":0,"kind":"rule"}`:      nil,
		`{"number":18446744073709551615}`: nil,
		strings.Replace(good, "7", "5", 1) + good: {7},
		strings.Repeat("x", 1<<20) + "\n" + good:  nil, // no line of ours is so long
	} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		l := Open(Options{File: path})
		var got []uint64
		for _, e := range all(l.ReadAfter(l.first - 1)) {
			got = append(got, e.Number)
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%.100q (-want +got):\n%s", text, diff)
		}
	}
	// What is no file is not waited for, and nothing is lost of what is new.
	l := Open(Options{File: t.TempDir()})
	l.Add(ruleEvent(1, "active"))
	l.show(false)
	if l.Last() != 1 {
		t.Error("an event is not shown where it cannot be saved")
	}
}

func TestMissed(t *testing.T) {
	l, c := testLog(t, "")
	for i := range Kept + 300 {
		c.advance(time.Second)
		l.Add(ruleEvent(i, "active"))
	}
	l.show(false)
	r := l.ReadAfter(100)
	got := all(r)
	if got[0].Kind != KindMissed || got[0].Count != 200 || got[1].Number != 301 || len(got) != Kept+1 {
		t.Errorf("%+v, %+v, %d events", got[0], got[1], len(got))
	}
	got = all(l.ReadAfter(1_000_000))
	if got[0].Kind != KindMissed || got[0].Cause == "" || got[1].Number != 301 {
		t.Errorf("%+v, %+v", got[0], got[1])
	}
	if n := l.Before(c.now().Add(-10*time.Second + 1)); n != Kept+290 {
		t.Errorf("before 10 seconds ago: %d", n)
	}
	if n := l.Before(time.Time{}); n != 300 {
		t.Errorf("before all times: %d", n)
	}
}

func TestNil(t *testing.T) {
	var l *Log
	l.Add(Event{})
	l.Sum(Event{})
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if r := l.ReadAfter(0); r.Wait(ctx) || len(r.Next(make([]Event, 0, 9))) > 0 || l.Last()+l.Before(time.Now())+uint64(len(l.Counts())) > 0 {
		t.Error("nothing has events")
	}
}

func TestText(t *testing.T) {
	for _, tt := range []struct {
		e    Event
		want string
	}{
		{Event{Kind: KindRule, Rule: "cam1", State: "pending", Before: "active", Cause: "interface eth1 not found"}, "rule cam1: pending, was active: interface eth1 not found"},
		{Event{Kind: KindOutput, Rule: "cam1", Output: "239.2.2.2:6000%eth1", State: "active"}, "output 239.2.2.2:6000%eth1 of rule cam1: active"},
		{Event{Kind: KindMembership, Interface: "eth0", Group: "239.1.1.1", State: "joined"}, "membership 239.1.1.1%eth0: joined"},
		{Event{Kind: KindNeighbour, Interface: "eth0", Address: "10.0.0.1", State: "resolved"}, "neighbour 10.0.0.1 on eth0: resolved"},
		{Event{Kind: KindReload, State: "failed", Cause: "x"}, "reload: failed: x"},
		{Event{Kind: KindMissed, Count: 3}, "3 events missed"},
	} {
		if got := tt.e.Text(); got != tt.want {
			t.Errorf("%q, want %q", got, tt.want)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add(`{"number":7,"time":"2026-01-02T03:04:05Z","kind":"rule","rule":"a","state":"active"}` + "\n")
	f.Fuzz(func(t *testing.T, text string) {
		found := parse(strings.NewReader(text))
		checkRow(t, found)
		for i := range found {
			if found[i].size() > 256+9*maxText || found[i].Number == 0 {
				t.Fatalf("%+v", found[i])
			}
		}
		again := parse(strings.NewReader(string(encode(found))))
		if diff := cmp.Diff(found, again); len(found) > 0 && diff != "" {
			t.Fatal(diff)
		}
	})
}

// BenchmarkAdd is what an event costs the loop.
func BenchmarkAdd(b *testing.B) {
	l := Open(Options{})
	e := ruleEvent(1, "active")
	b.ReportAllocs()
	for b.Loop() {
		l.Add(e)
	}
}

// TestMissedAreCountedOnce: whatever is added, shown and read in whatever order, a reader sees or misses
// each event once, in order, also those that were discarded before they were shown.
func TestMissedAreCountedOnce(t *testing.T) {
	t.Parallel()
	for seed := range uint64(20) {
		random := rand.New(rand.NewPCG(seed, 1))
		l, clock := testLog(t, "")
		r := l.ReadAfter(0)
		var added, seen, missed uint64
		read := func(buf []Event) (more bool) {
			all := r.Next(buf[:0])
			for i := range all {
				e := &all[i]
				if e.Kind == KindMissed {
					if missed += e.Count; e.Cause != "" || e.Count == 0 {
						t.Fatalf("seed %d: %+v", seed, e)
					}
				} else if seen++; e.Number != seen+missed {
					t.Fatalf("seed %d: event %d after %d seen and %d missed", seed, e.Number, seen-1, missed)
				}
			}
			return len(all) > 0
		}
		for range 30 {
			switch random.IntN(3) {
			case 0:
				for range []int{1, 100, Kept - 1, Kept, Kept + 1, 3 * Kept}[random.IntN(6)] {
					clock.advance(time.Second) // so that none is summarized
					l.Add(Event{Kind: KindRule, State: "active"})
					added++
				}
			case 1:
				l.show(false)
				if before := l.Before(time.Time{}); before > l.Last() {
					t.Fatalf("seed %d: the event before all is %d, of %d", seed, before, l.Last())
				}
			case 2:
				read(make([]Event, 2+random.IntN(2*Kept)))
			}
		}
		l.show(true)
		for buf := make([]Event, Kept); read(buf); {
		}
		if seen+missed != added || l.Last() != added {
			t.Errorf("seed %d: %d seen and %d missed of %d", seed, seen, missed, added)
		}
	}
}
