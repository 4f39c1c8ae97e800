package e2e_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"xdpcast/internal/control"
	"xdpcast/internal/labtest"
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
		rules += fmt.Sprintf("- {name: r%d, in: [239.1.1.%d:5000%%in0, 239.101.1.%d:5000%%out2], failover: \"%v,back=%v\", out: 239.2.1.%d:6000%%out0}\n", i, i+1, i+1, silence, 2*silence, i+1)
	}
	in.start("-c", in.write("rules.yaml", rules))
	sink := newArrivalSink(t, n.sinks[0], "sink0", 6000)
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
		source := newLegSource(t, [2]legEnd{
			{n.source, "src0", "10.1.0.2", fmt.Sprintf("239.1.1.%d", i+1)}, {n.sinks[2], "sink0", "10.2.2.2", fmt.Sprintf("239.101.1.%d", i+1)},
		})
		for _, rate := range []int{1_000, 10_000, 100_000} {
			table = append(table, failoverRun(t, in, rule, sink, source, rate, silence))
		}
	}
	t.Logf("longest gaps at the sink, load %s\n%s", load(t), strings.Join(table, "\n"))
}

// failoverRun returns a row of the table.
func failoverRun(t *testing.T, in *instance, rule string, sink *arrivalSink, source *legSource, rate int, silence time.Duration) string {
	t.Helper()
	const flaps, attempts = 5, 10
	phases := []phase{{"undisturbed", time.Second, true}, {"failover", 5 * silence, false}, {"return", 5 * silence, true}}
	for range flaps {
		phases = append(phases, phase{"flapping", 3 * silence, false}, phase{"flapping", 4 * silence, true})
	}
	var of []int // phase of each number
	var up []bool
	for i, p := range phases {
		n := int(p.length * time.Duration(rate) / time.Second)
		of, up = append(of, slices.Repeat([]int{i}, n)...), append(up, slices.Repeat([]bool{p.up}, n)...)
	}
	for range attempts {
		// The better leg is in use after it has been up for twice the silence, without a stall of the machine.
		eventually(t, "the better input of "+rule+" is in use", func() string {
			source.send(t, rate, slices.Repeat([]bool{true}, int(4*silence*time.Duration(rate)/time.Second)))
			if r := in.rule(rule); !r.Inputs[0].Leg.Relayed {
				return fmt.Sprintf("%+v", r.Inputs[0].Leg)
			}
			return ""
		})
		before := in.rule(rule).Stream.Restarts
		sink.reset(t, len(of))
		sent, stalls := source.send(t, rate, up)
		// A machine that stops the source or a queue between the two legs of a number, for longer than the silence, makes
		// the relay change its input: as it should, but not as planned.
		if changes, want := in.rule(rule).Stream.Restarts-before, uint64(2+2*flaps); sent < len(up) || changes != want {
			t.Logf("%d packets/s, silence %v: %d of %d numbers sent, the relay changed its input %d times, want %d: once more", rate, silence, sent, len(up), changes, want)
			continue
		}
		eventually(t, "the last number has arrived", func() string {
			if sink.arrived(t, len(of)-1) == 0 {
				return "it has not"
			}
			return ""
		})
		at, disorder, twice := sink.all(t, len(of))
		if disorder+twice > 0 {
			t.Errorf("%d packets/s, silence %v: %d numbers arrived after later ones, %d twice", rate, silence, disorder, twice)
		}
		gaps := map[string]gap{}
		last := 0
		for number := 1; number < len(at); number++ {
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
		return row + fmt.Sprintf(" %d |", stalls)
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
