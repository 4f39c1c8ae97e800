package web

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"runtime"
	"slices"
	"sync"
	"testing"
	"time"

	"xdpcast/internal/labtest"
)

var began = time.Unix(1_700_000_000, 0)

func (p *pastRates) of(name string) []float64 {
	var all []float64
	for range p.Taken - len(p.Rates[name]) {
		all = append(all, 0)
	}
	for _, v := range p.Rates[name] {
		all = append(all, float64(v))
	}
	return all
}

// TestHistory: the rates of each rule follow its counter, step by step.
func TestHistory(t *testing.T) {
	h := newHistory(historyStep)
	at := began
	step := func(d time.Duration, packets map[string]uint64) {
		at = at.Add(d)
		h.add(at, packets)
	}
	want := func(name string, rates ...float64) {
		t.Helper()
		if got := h.tell().of(name); !slices.Equal(got, rates) {
			t.Errorf("%s: %v, want %v", name, got, rates)
		}
	}
	step(0, map[string]uint64{"a": 1000, "gone": 5})
	want("a")
	step(5*time.Second, map[string]uint64{"a": 1500, "gone": 5})
	want("a", 100)
	// A new rule starts at zero; readings are not quite on time.
	step(4900*time.Millisecond, map[string]uint64{"a": 1500 + 49, "new": 490})
	want("a", 100, 10)
	want("new", 0, 100)
	want("gone", 0, 0)
	step(time.Second, map[string]uint64{"a": 1549}) // too soon
	// Skipped steps share the average rate.
	step(14*time.Second, map[string]uint64{"a": 1549 + 150, "new": 490})
	want("a", 100, 10, 10, 10, 10)
	want("new", 0, 100, 0, 0, 0)
	// A new rule of the same name.
	step(5*time.Second, map[string]uint64{"a": 0, "new": 490})
	want("a", 100, 10, 10, 10, 10, 0)
	// After a long time all rates are too old.
	step(historySteps*historyStep+time.Second, map[string]uint64{"a": 9})
	want("a")
	if m := h.tell(); m.Step != 5 || m.Taken != 0 || len(m.Rates) != 0 {
		t.Errorf("%+v", m)
	}
}

// TestHistoryRandom: for random changes, the last steps equal those of an unbounded list.
func TestHistoryRandom(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	h := newHistory(historyStep)
	at, packets, all, taken := began, map[string]uint64{}, map[string][]float64{}, 0
	h.add(at, packets)
	for range 500 {
		at = at.Add(historyStep)
		taken++
		now := map[string]uint64{}
		for i := range 5 {
			name := fmt.Sprint("r", i)
			before, known := packets[name]
			if r.IntN(20) == 0 { // it is removed, and returns as a new rule
				delete(all, name)
				continue
			}
			if !known {
				all[name] = make([]float64, taken-1)
			}
			n := uint64(r.IntN(3) * 5)
			now[name] = before + n
			all[name] = append(all[name], float64(n)/5)
		}
		packets = now
		h.add(at, packets)
		m := h.tell()
		for i := range 5 {
			name := fmt.Sprint("r", i)
			want := all[name]
			if want == nil {
				want = make([]float64, taken)
			}
			if want = want[max(0, taken-historySteps):]; !slices.Equal(m.of(name), want) {
				t.Fatalf("%s: %v, want %v", name, m.of(name), want)
			}
		}
	}
}

// TestHistoryMemory: 10,000 rules take at most 5 MB, and with more than historyRules nothing is kept.
func TestHistoryMemory(t *testing.T) {
	used := func() uint64 {
		var m runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	packets := map[string]uint64{}
	for i := range 10_000 {
		packets[fmt.Sprintf("rule%05d", i)] = uint64(i)
	}
	before := used()
	h := newHistory(historyStep)
	for i := range 2 * historySteps {
		h.add(began.Add(time.Duration(i)*historyStep), packets)
	}
	if more := used() - before; more > 5<<20 {
		t.Errorf("%d kB", more>>10)
	} else {
		t.Logf("%d kB", more>>10)
	}
	for i := range historyRules {
		packets[fmt.Sprintf("more%05d", i)] = 0
	}
	h.add(began.Add(3*historySteps*historyStep), packets)
	if m := h.tell(); len(h.rules) != 0 || m.Taken != 0 {
		t.Errorf("%d rules, %d steps are kept", len(h.rules), m.Taken)
	}
	runtime.KeepAlive(packets)
}

// TestHistoryIsTold: the first message to a page has the rates from before the page was opened, as
// has a poll that requests them; later messages do not. While the relay does not count, the page
// gets everything else.
func TestHistoryIsTold(t *testing.T) {
	var mu sync.Mutex
	packets, failing := uint64(0), true
	ctx, cancel := context.WithCancel(context.Background())
	h := &hub{o: Options{Context: ctx, Backend: &relay{}}, pages: map[chan []byte]bool{}, history: newHistory(time.Millisecond)}
	var running sync.WaitGroup
	running.Go(func() {
		h.history.run(ctx, func(context.Context) (map[string]uint64, error) {
			mu.Lock()
			defer mu.Unlock()
			if failing {
				failing = false
				return nil, errors.New("the relay is busy")
			}
			packets += 7
			return map[string]uint64{"a": packets}, nil
		})
	})
	defer running.Wait()
	defer cancel()
	labtest.Eventually(t, "there is a history", func() bool { return len(h.history.tell().Rates["a"]) > 3 })
	s, err := h.read(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	page := make(chan []byte, 2)
	h.pages[page] = false
	h.tell(s)
	h.tell(s)
	var first, second live
	for i, m := range []*live{&first, &second} {
		if err := json.Unmarshal(<-page, m); err != nil {
			t.Fatalf("message %d: %v", i, err)
		}
	}
	if first.History == nil || len(first.History.Rates["a"]) < 3 || second.History != nil {
		t.Errorf("%+v, %+v", first.History, second.History)
	}
	url := serve(t, h)
	for query, want := range map[string]bool{"": false, "?history": true} {
		var m live
		if _, text := ask(t, http.MethodGet, url+query, nil); json.Unmarshal([]byte(text), &m) != nil || (m.History != nil) != want {
			t.Errorf("%q: %s", query, text)
		}
	}
}
