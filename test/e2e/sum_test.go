package e2e_test

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"xdpcast/internal/control"
	"xdpcast/internal/labtest"
	"xdpcast/internal/traffic"
)

// sumRounds is the number of events in a run of TestSumRule; XDPCAST_SUM_ROUNDS sets it for a
// longer one, and XDPCAST_SUM_SEED repeats a run.
const sumRounds = 14

// sumWorld is a random set of rules with their events.
type sumWorld struct {
	t    *testing.T
	rand *rand.Rand
	n    *network
	in   *instance
	file string

	paths []string
	outs  [][]string
	last  map[string]control.RuleStatus // at the last quiet moment
}

// TestSumRule applies random events to random rules under traffic, including restarts and kills.
// Whenever no packet is in flight, the matched packets equal, for each output, those sent plus
// those dropped by reason; and no counter of a surviving rule decreases.
func TestSumRule(t *testing.T) {
	rounds, seed := sumRounds, uint64(time.Now().UnixNano())
	for name, set := range map[string]func(uint64){
		"XDPCAST_SUM_ROUNDS": func(n uint64) { rounds = int(n) },
		"XDPCAST_SUM_SEED":   func(n uint64) { seed = n },
	} {
		if text := os.Getenv(name); text != "" {
			n, err := strconv.ParseUint(text, 10, 64)
			if err != nil {
				t.Fatalf("%s=%q: want a number", name, text)
			}
			set(n)
		}
	}
	t.Logf("XDPCAST_SUM_SEED=%d", seed)
	w := &sumWorld{t: t, rand: rand.New(rand.NewPCG(seed, 1)), n: newNetwork(t), last: map[string]control.RuleStatus{}}
	w.in = newInstance(t, w.n.relay)
	w.invent()
	w.write()
	w.in.start("-c", w.file)
	events := []struct {
		name string
		fn   func()
	}{
		{"path", w.otherPath}, {"path", w.otherPath}, {"path", w.otherPath},
		{"mtu", w.otherMTU}, {"output down", w.outputDown}, {"carrier", w.noCarrier}, {"output gone", w.outputGone},
		{"killed", func() { w.restart(syscall.SIGKILL) }}, {"killed", func() { w.restart(syscall.SIGKILL) }},
		{"terminated", func() { w.restart(syscall.SIGTERM) }},
	}
	for round := range rounds {
		event := events[w.rand.IntN(len(events))]
		stream := send(t, w.n.source, traffic.SendConfig{
			Target: target(t, "239.1.1.1:5000%src0"), Groups: len(w.outs), TTL: uint8(1 + w.rand.IntN(3)),
			Size: w.pick(40, 500, 1400, 1472), Rate: traffic.Rate{Value: float64(w.pick(500, 5000, 20_000))}, Burst: together,
		})
		stream.flows(uint64(w.pick(50, 500)))
		event.fn()
		stream.flows(uint64(w.pick(50, 500)))
		stream.stop()
		w.quiet(fmt.Sprintf("round %d, %s", round, event.name))
		if t.Failed() {
			t.Logf("paths %v, outputs %v", w.paths, w.outs)
			return
		}
	}
}

func (w *sumWorld) pick(all ...int) int { return all[w.rand.IntN(len(all))] }

func (w *sumWorld) path() string {
	return []string{"kernel", "afxdp", "fanout"}[w.rand.IntN(3)]
}

// invent makes rules with one to four outputs.
func (w *sumWorld) invent() {
	options := []string{"", ",ttl=8", ",ttl=dec", ",minttl=2", ",src=keep", ",vlan=7", ",vlan=7.8", ",rate=300pps", ",dscp=ef"}
	for i := range 4 {
		var outs []string
		for o := range 1 + w.rand.IntN(4) {
			outs = append(outs, fmt.Sprintf("239.2.%d.%d:6000%%out%d%s", i, o, w.rand.IntN(3), options[w.rand.IntN(len(options))]))
		}
		w.outs = append(w.outs, outs)
		w.paths = append(w.paths, w.path())
	}
}

func (w *sumWorld) write() {
	var b strings.Builder
	b.WriteString("rules:\n")
	for i, outs := range w.outs {
		limit := ""
		if i == 3 {
			limit = ",rate=1kpps"
		}
		fmt.Fprintf(&b, "  - {name: r%d, in: '239.1.1.%d:5000%%in0%s', path: %s, out: ['%s']}\n", i, i+1, limit, w.paths[i], strings.Join(outs, "', '"))
	}
	w.file = w.in.write("sum.yaml", b.String())
}

func (w *sumWorld) otherPath() {
	w.paths[w.rand.IntN(len(w.paths))] = w.path()
	w.write()
	w.in.mustCLI("reload")
}

func (w *sumWorld) output() string { return fmt.Sprintf("out%d", w.rand.IntN(3)) }

func (w *sumWorld) otherMTU() {
	name, mtu := w.output(), w.pick(600, 1400, 1500)
	l, err := w.n.relay.Link(name)
	if err == nil {
		err = w.n.relay.Netlink().LinkSetMTU(l, mtu)
	}
	if err != nil {
		w.t.Fatal(err)
	}
}

func (w *sumWorld) outputDown() {
	name := w.output()
	if err := w.n.relay.SetUp(name, false); err != nil {
		w.t.Fatal(err)
	}
	if err := w.n.relay.SetUp(name, true); err != nil {
		w.t.Fatal(err)
	}
}

func (w *sumWorld) noCarrier() {
	sink := w.n.sinks[w.rand.IntN(3)]
	if err := sink.SetUp("sink0", false); err != nil {
		w.t.Fatal(err)
	}
	if err := sink.SetUp("sink0", true); err != nil {
		w.t.Fatal(err)
	}
}

func (w *sumWorld) outputGone() {
	i := w.rand.IntN(3)
	labtest.RemoveLink(w.n.t, w.n.relay, fmt.Sprintf("out%d", i))
	w.n.connectOutput(i)
}

// restart ends the daemon, checks the counters without one, and starts the next.
func (w *sumWorld) restart(sig syscall.Signal) {
	w.in.running.stop(sig)
	w.in.start("-c", w.file)
}

// quiet waits until the counters add up, as seen by the daemon and without it.
func (w *sumWorld) quiet(when string) {
	w.t.Helper()
	eventually(w.t, when+": the counters add up", func() string {
		for _, r := range w.in.rules() {
			if fault := sumFault(r); fault != "" {
				return fault
			}
		}
		return ""
	})
	now := w.in.rules()
	for _, r := range now {
		if before, ok := w.last[r.Name]; ok && before.ID == r.ID {
			if fault := backwards(before, r); fault != "" {
				w.t.Errorf("%s: %s", when, fault)
			}
		}
		w.last[r.Name] = r
	}
	// Counters also add up while packets wait in a queue.
	eventually(w.t, when+": the counters are the same without the daemon", w.readers)
}

// readers compares what a command reads from the pins with the daemon's counters.
func (w *sumWorld) readers() string {
	w.t.Helper()
	var s control.Stats
	text := w.in.on(w.in.host).mustCLI("stats", "-o", "json")
	if err := json.Unmarshal([]byte(text), &s); err != nil {
		w.t.Fatal(err)
	}
	daemon := w.in.rules()
	for _, r := range s.Rules {
		at := slices.IndexFunc(daemon, func(d control.RuleStatus) bool { return d.Name == r.Name })
		if fault := sumFault(r); fault != "" {
			return fault
		}
		if at < 0 || daemon[at].Matched != r.Matched {
			return fmt.Sprintf("rule %s matched %v, with the daemon %+v", r.Name, r.Matched, daemon)
		}
	}
	return ""
}

// sumFault returns at which output a rule's packets do not add up; "" if all do.
func sumFault(r control.RuleStatus) string {
	for _, o := range r.Outputs {
		sum := o.Sent
		for _, d := range append(slices.Clone(r.Drops), o.Drops...) {
			sum.Packets += d.Packets
			sum.Bytes += d.Bytes
		}
		if sum != r.Matched {
			return fmt.Sprintf("rule %s (%s), output %d: matched %v, accounted for %v: sent %v, dropped %v and %v", r.Name, r.UsedPath, o.Slot, r.Matched, sum, o.Sent, r.Drops, o.Drops)
		}
	}
	return ""
}

// backwards returns which counter has decreased; "" if none has.
func backwards(before, now control.RuleStatus) string {
	if now.Matched.Packets < before.Matched.Packets {
		return fmt.Sprintf("rule %s matched %d, before it were %d", now.Name, now.Matched.Packets, before.Matched.Packets)
	}
	for i := range min(len(before.Outputs), len(now.Outputs)) {
		if now.Outputs[i].Sent.Packets < before.Outputs[i].Sent.Packets {
			return fmt.Sprintf("rule %s, output %d sent %d, before it were %d", now.Name, i, now.Outputs[i].Sent.Packets, before.Outputs[i].Sent.Packets)
		}
		for _, d := range before.Outputs[i].Drops {
			if n := packetsFor(now.Outputs[i].Drops, d.Reason); n < d.Packets {
				return fmt.Sprintf("rule %s, output %d dropped %d for %s, before it were %d", now.Name, i, n, d.Reason, d.Packets)
			}
		}
	}
	return ""
}

func packetsFor(drops []control.Drop, reason string) (n uint64) {
	for _, d := range drops {
		if d.Reason == reason {
			n += d.Packets
		}
	}
	return n
}

// TestPathChangeKeepsCounters moves a rule from each path to each other, with a restart and a kill
// in between: delivered packets stay counted.
func TestPathChangeKeepsCounters(t *testing.T) {
	n := newNetwork(t)
	in := newInstance(t, n.relay)
	write := func(path string) string {
		return in.write("rules.yaml", "rules:\n  - {name: r, in: '239.1.1.1:5000%in0', path: "+path+", out: ['239.2.1.1:6000%out0', '239.2.1.2:6000%out1']}\n")
	}
	in.start("-c", write("kernel"))
	const batch = 200
	sent := uint64(0)
	check := func(when string) {
		t.Helper()
		eventually(t, when+": all are counted", func() string {
			r := in.rule("r")
			if fault := sumFault(r); fault != "" {
				return fault
			}
			for _, o := range r.Outputs {
				if r.Matched.Packets != sent || o.Sent.Packets != sent || len(o.Drops)+len(r.Drops) > 0 {
					return fmt.Sprintf("matched %d, output %d sent %d, dropped %v and %v, want %d and none", r.Matched.Packets, o.Slot, o.Sent.Packets, r.Drops, o.Drops, sent)
				}
			}
			return ""
		})
	}
	for i, path := range []string{"kernel", "afxdp", "fanout", "kernel", "fanout", "afxdp", "kernel"} {
		write(path)
		in.mustCLI("reload")
		in.waitState("r", control.StateActive)
		check("on path " + path + ", before")
		sent += send(t, n.source, traffic.SendConfig{Target: target(t, "239.1.1.1:5000%src0"), TTL: 8, Count: batch, Rate: traffic.Rate{Value: 5000}}).wait()
		check("on path " + path)
		sig := []syscall.Signal{syscall.SIGKILL, syscall.SIGTERM}[i%2]
		in.running.stop(sig)
		in.start("-c", in.dir+"/rules.yaml")
		check("after a restart on path " + path)
	}
}
