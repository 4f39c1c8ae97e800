package e2e_test

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"xdpcast/internal/control"
	"xdpcast/internal/lab"
	"xdpcast/internal/labtest"
)

// arrival is a number that reached a sink, and when its kernel received the packet.
type arrival struct {
	number uint32
	at     time.Duration // since the epoch
}

// arrivalSink records what arrives, in its order, with the kernel's timestamps.
type arrivalSink struct {
	mu   sync.Mutex // guards all
	all  []arrival
	done chan struct{}
}

func newArrivalSink(t *testing.T, h *lab.Host, ifname, group string) *arrivalSink {
	t.Helper()
	conn := labtest.Listen(t, h, ifname, netip.MustParseAddrPort(group))
	raw, err := conn.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var optErr error
	if err := raw.Control(func(fd uintptr) {
		optErr = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_TIMESTAMPNS, 1)
	}); err != nil || optErr != nil {
		t.Fatal(err, optErr)
	}
	s := &arrivalSink{done: make(chan struct{})}
	go s.run(t, conn)
	t.Cleanup(func() {
		conn.Close()
		<-s.done
	})
	return s
}

func (s *arrivalSink) run(t *testing.T, conn *net.UDPConn) {
	defer close(s.done)
	b, control := make([]byte, 2048), make([]byte, 256)
	for {
		n, length, _, _, err := conn.ReadMsgUDPAddrPort(b, control)
		if err != nil {
			return
		}
		messages, err := unix.ParseSocketControlMessage(control[:length])
		if err != nil || n < 16 || len(messages) != 1 || len(messages[0].Data) < int(unsafe.Sizeof(unix.Timespec{})) {
			t.Errorf("%d bytes with control messages %+v (%v): want a number and a timestamp", n, messages, err)
			return
		}
		var at unix.Timespec
		copy(unsafe.Slice((*byte)(unsafe.Pointer(&at)), unsafe.Sizeof(at)), messages[0].Data)
		s.mu.Lock()
		s.all = append(s.all, arrival{binary.BigEndian.Uint32(b[12:]), time.Duration(at.Nano())})
		s.mu.Unlock()
	}
}

// take returns what has arrived, and forgets it.
func (s *arrivalSink) take() []arrival {
	s.mu.Lock()
	defer s.mu.Unlock()
	all := s.all
	s.all = nil
	return all
}

func (s *arrivalSink) last() (number uint32, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.all) == 0 {
		return 0, false
	}
	return s.all[len(s.all)-1].number, true
}

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

// paced calls send with each number at a rate, on one CPU, so that packets of one leg cannot overtake those of the other.
// It catches up for at most 2 ms.
func paced(rate int, count uint32, send func(number uint32) error) error {
	var err error
	labtest.OnOneCPU(func() {
		due := time.Now()
		for n := range count {
			if late := time.Since(due); late > 2*time.Millisecond {
				due = due.Add(late)
			}
			time.Sleep(time.Until(due)) // the pace of the stream, not a wait for something
			if err = send(n); err != nil {
				return
			}
			due = due.Add(time.Second / time.Duration(rate))
		}
	})
	return err
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
	table := []string{"| packets/s | silence | undisturbed | failover | return | flapping |"}
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
		sink := newArrivalSink(t, n.sinks[0], "sink0", fmt.Sprintf("239.2.1.%d:6000", i+1))
		legs := [2]*legSender{
			newLegSender(t, n.source, "src0", fmt.Sprintf("239.1.1.%d:5000", i+1)), newLegSender(t, n.sinks[2], "sink0", fmt.Sprintf("239.101.1.%d:5000", i+1)),
		}
		for _, rate := range []int{1_000, 10_000} {
			table = append(table, failoverRun(t, in, rule, sink, legs, rate, silence))
		}
	}
	t.Logf("longest gaps at the sink, load %s\n%s", load(t), strings.Join(table, "\n"))
}

// failoverRun returns a row of the table.
func failoverRun(t *testing.T, in *instance, rule string, sink *arrivalSink, legs [2]*legSender, rate int, silence time.Duration) string {
	t.Helper()
	const flaps, attempts = 5, 10
	phases := []phase{{"undisturbed", time.Second, true}, {"failover", 5 * silence, false}, {"return", 5 * silence, true}}
	for range flaps {
		phases = append(phases, phase{"flapping", 3 * silence, false}, phase{"flapping", 4 * silence, true})
	}
	var of []int // phase of each number
	for i, p := range phases {
		of = append(of, slices.Repeat([]int{i}, int(p.length*time.Duration(rate)/time.Second))...)
	}
	for range attempts {
		// The better leg is in use after it has been up for twice the silence.
		both := func(number uint32) error {
			if err := legs[0].send(number); err != nil {
				return err
			}
			return legs[1].send(number)
		}
		if err := paced(rate, uint32(int(4*silence*time.Duration(rate)/time.Second)), both); err != nil {
			t.Fatal(err)
		}
		eventually(t, "the better input of "+rule+" is in use", func() string {
			if r := in.rule(rule); !r.Inputs[0].Leg.Relayed {
				return fmt.Sprintf("%+v", r.Inputs[0].Leg)
			}
			return ""
		})
		before := in.rule(rule).Stream.Restarts
		sink.take()
		if err := paced(rate, uint32(len(of)), func(number uint32) error {
			if phases[of[number]].up {
				return both(number)
			}
			return legs[1].send(number)
		}); err != nil {
			t.Fatal(err)
		}
		eventually(t, "the last number has arrived", func() string {
			if last, ok := sink.last(); !ok || last != uint32(len(of))-1 {
				return fmt.Sprintf("%d, %v", last, ok)
			}
			return ""
		})
		// A machine that stops the sender or a queue between the two legs of a number, for longer than the silence, makes
		// the relay change its input: as it should, but not as planned.
		if changes, want := in.rule(rule).Stream.Restarts-before, uint64(2+2*flaps); changes != want {
			t.Logf("%d packets/s, silence %v: the relay changed its input %d times, want %d: once more", rate, silence, changes, want)
			sink.take()
			continue
		}
		gaps := map[string]gap{}
		all := sink.take()
		for i, a := range all[1:] {
			if a.number <= all[i].number {
				t.Errorf("%d packets/s, silence %v: number %d arrived after %d", rate, silence, a.number, all[i].number)
			}
			name := phases[of[a.number]].name
			gaps[name] = gaps[name].longer(gap{int(a.number-all[i].number) - 1, a.at - all[i].at})
		}
		row := fmt.Sprintf("| %d | %v |", rate, silence)
		for _, name := range []string{"undisturbed", "failover", "return", "flapping"} {
			row += fmt.Sprintf(" %d lost, %.1f ms |", gaps[name].lost, gaps[name].length.Seconds()*1e3)
		}
		return row
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
