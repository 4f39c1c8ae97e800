package e2e_test

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"xdpcast/internal/control"
	"xdpcast/internal/lab"
	"xdpcast/internal/labtest"
	"xdpcast/internal/live"
	"xdpcast/pkg/packet"
)

// phase is a part of a run, during which the better leg sends or not.
type phase struct {
	name   string
	length time.Duration
	up     bool
}

// gap is the time between two arrivals, and how many numbers did not come between.
type gap struct {
	lost   int
	length time.Duration
}

// longer compares by numbers first: time alone may be that of a sender that did not run.
func (g gap) longer(other gap) gap {
	if other.lost > g.lost || other.lost == g.lost && other.length > g.length {
		return other
	}
	return g
}

// TestFailoverLive prints the longest gap that a sink sees, in numbers and in time, when the better of two inputs falls silent, when it returns,
// and while it flaps. Numbers arrive in order and once; times depend on the machine and are not checked.
func TestFailoverLive(t *testing.T) {
	labtest.LongOnly(t, "prints gaps, which are of use on a quiet machine; TestFailoverGaps has them by the program's clock")
	n := newNetwork(t)
	in := newInstance(t, n.relay)
	silences := []time.Duration{10 * time.Millisecond, 30 * time.Millisecond, 100 * time.Millisecond}
	rules := "rules:\n"
	for i, silence := range silences {
		rules += fmt.Sprintf("- {name: r%d, in: [239.1.1.%d:5000%%in0, 239.101.1.%d:5000%%out2], failover: \"%v,back=%v\", out: 239.2.1.1:6000%%out0}\n", i, i+1, i+1, silence, 2*silence)
	}
	in.start("-c", in.write("rules.yaml", rules))
	sink := n.newLegWitness(t)
	table := []string{"| packets/s | silence | undisturbed | failover | return | flapping | stalls of the source |", "|---|---|---|---|---|---|---|"}
	for i, silence := range silences {
		rule := fmt.Sprintf("r%d", i)
		eventually(t, "both inputs of "+rule+" are active", func() string {
			r := in.rule(rule)
			for _, input := range r.Inputs {
				if input.State != control.StateActive {
					return fmt.Sprintf("%+v", input)
				}
			}
			return ""
		})
		source := n.newLegSource(t, netip.AddrFrom4([4]byte{239, 1, 1, byte(i + 1)}))
		for _, rate := range []int{1_000, 10_000, 100_000} {
			table = append(table, failoverRun(t, in, rule, sink, source, rate, silence))
		}
	}
	t.Logf("longest gaps at the sink, load %s\n%s", load(t), strings.Join(table, "\n"))
}

// legSource sends the same numbers on two legs, from one CPU: the frames of a number leave at one time, the better leg first.
type legSource struct {
	*live.Source
	host  *lab.Host
	trial uint32
}

// newLegSource has its better leg on the source's src0, and the other 100 groups further, on sink 2's sink0.
func (n *network) newLegSource(t *testing.T, group netip.Addr) *legSource {
	t.Helper()
	f := packet.Frame{
		DstMAC: packet.MulticastMAC(group), SrcMAC: [6]byte{2, 0, 0, 0, 0, 9}, Src: netip.MustParseAddr("10.1.0.2"), Dst: group,
		DstPort: 5000, TTL: 9, Payload: make([]byte, 100),
	}
	source, err := live.NewSource(live.SourceOptions{Frame: f.Build(), FirstGroup: group, GroupStep: 100 << 16, FirstPort: 7000, Flows: 2, Legs: true, StampShift: 10})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { source.Close() })
	for flow, end := range []lab.End{{Host: n.source, Name: "src0"}, {Host: n.sinks[2], Name: "sink0"}} {
		labtest.Do(t, end.Host, func() error { return source.SetInterface(flow, labtest.Index(t, end.Host, end.Name)) })
	}
	return &legSource{Source: source, host: n.source}
}

// send sends numbers, those of the silences only on the second leg. A time of more than 2 ms during which
// the source does not run shifts its schedule.
func (s *legSource) send(t *testing.T, sink *live.Witness, rate, numbers int, silences ...live.Silence) (sent live.Sent) {
	t.Helper()
	s.trial++
	if err := sink.Expect(s.trial); err != nil {
		t.Fatal(err)
	}
	labtest.Do(t, s.host, func() (err error) {
		if err := live.Pin(0); err != nil {
			return err
		}
		sent, err = s.Send(t.Context(), live.Plan{
			Trial: s.trial, Frames: 2 * numbers, Rate: 2 * float64(rate), Stamped: true, Behind: 2 * time.Millisecond, Silences: silences,
		})
		return err
	})
	return sent
}

// newLegWitness notes when each number of a legSource arrives at sink 0.
func (n *network) newLegWitness(t *testing.T) (sink *live.Witness) {
	t.Helper()
	labtest.Do(t, n.sinks[0], func() (err error) {
		sink, err = live.NewWitness("sink0", live.WitnessOptions{Group: netip.MustParseAddr("239.2.1.1"), Port: 6000, Legs: true, StampShift: 10, Arrivals: 600_000})
		return err
	})
	t.Cleanup(func() { sink.Close() })
	return sink
}

// failoverRun returns a row of the table.
func failoverRun(t *testing.T, in *instance, rule string, sink *live.Witness, source *legSource, rate int, silence time.Duration) string {
	t.Helper()
	const flaps, attempts = 5, 10
	phases := []phase{{"undisturbed", time.Second, true}, {"failover", 5 * silence, false}, {"return", 5 * silence, true}}
	for range flaps {
		phases = append(phases, phase{"flapping", 3 * silence, false}, phase{"flapping", 4 * silence, true})
	}
	var of []int // phase of each number
	var silences []live.Silence
	for i, p := range phases {
		first := uint32(len(of))
		of = append(of, slices.Repeat([]int{i}, int(p.length*time.Duration(rate)/time.Second))...)
		if !p.up {
			silences = append(silences, live.Silence{From: first, To: uint32(len(of))})
		}
	}
	for range attempts {
		// The better leg is in use after it has been up for twice the silence, without a stall of the machine.
		eventually(t, "the better input of "+rule+" is in use", func() string {
			source.send(t, sink, rate, int(4*silence*time.Duration(rate)/time.Second))
			if r := in.rule(rule); !r.Inputs[0].Leg.Relayed {
				return fmt.Sprintf("%+v", r.Inputs[0].Leg)
			}
			return ""
		})
		before := in.rule(rule).Stream.Restarts
		sent := source.send(t, sink, rate, len(of), silences...)
		// A machine that stops the source or a queue between the two legs of a number, for longer than the silence, makes
		// the relay change its input: as it should, but not as planned.
		if changes, want := in.rule(rule).Stream.Restarts-before, uint64(2+2*flaps); changes != want {
			t.Logf("%d packets/s, silence %v: the relay changed its input %d times, want %d: once more", rate, silence, changes, want)
			continue
		}
		var at []time.Duration
		eventually(t, "the last number has arrived", func() (lacks string) {
			var err error
			if at, err = sink.Arrivals(); err != nil {
				t.Fatal(err)
			}
			if at[len(of)-1] == 0 {
				return "it has not"
			}
			return ""
		})
		seen, err := sink.Read()
		if err != nil {
			t.Fatal(err)
		}
		if seen.Reordered+seen.Doubled+seen.Checksum > 0 {
			t.Errorf("%d packets/s, silence %v: %+v, want each number at most once, in order", rate, silence, seen)
		}
		gaps := map[string]gap{}
		last := 0
		for number := 1; number < len(of); number++ {
			if at[number] == 0 {
				continue
			}
			name := phases[of[number]].name
			gaps[name] = gaps[name].longer(gap{number - last - 1, at[number] - at[last]})
			last = number
		}
		row := fmt.Sprintf("| %d | %v |", rate, silence)
		for _, name := range []string{"undisturbed", "failover", "return", "flapping"} {
			row += fmt.Sprintf(" %d lost, %.1f ms |", gaps[name].lost, gaps[name].length.Seconds()*1e3)
		}
		return row + fmt.Sprintf(" %.1f ms |", sent.Shifted.Seconds()*1e3)
	}
	t.Errorf("%d packets/s, silence %v: the machine never let a run pass as planned, in %d attempts", rate, silence, attempts)
	return ""
}

// load is the machine's load of the last minute.
func load(t *testing.T) string {
	t.Helper()
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("%.1f", float64(info.Loads[0])/(1<<16)) // SI_LOAD_SHIFT
}
