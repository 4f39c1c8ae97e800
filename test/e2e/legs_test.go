package e2e_test

import (
	"encoding/binary"
	"fmt"
	"math"
	"net"
	"net/netip"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"xdpcast/internal/control"
	"xdpcast/internal/lab"
	"xdpcast/internal/labtest"
)

// legSender sends RTP packets to a group on an interface. The number is the sequence number and, so
// that a sink can tell rounds of it apart, also follows the header in full.
type legSender struct {
	fd int
	to unix.SockaddrInet4
}

func newLegSender(t testing.TB, h *lab.Host, ifname, target string) *legSender {
	t.Helper()
	to := netip.MustParseAddrPort(target)
	s := &legSender{to: unix.SockaddrInet4{Port: int(to.Port()), Addr: to.Addr().As4()}}
	labtest.Do(t, h, func() (err error) {
		i, err := net.InterfaceByName(ifname)
		if err != nil {
			return err
		}
		if s.fd, err = unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0); err != nil {
			return os.NewSyscallError("socket", err)
		}
		return os.NewSyscallError("setsockopt", unix.SetsockoptIPMreqn(s.fd, unix.IPPROTO_IP, unix.IP_MULTICAST_IF, &unix.IPMreqn{Ifindex: int32(i.Index)}))
	})
	t.Cleanup(func() { unix.Close(s.fd) })
	return s
}

func (s *legSender) send(number uint32) error {
	p := make([]byte, 100)
	p[0], p[1] = 0x80, 96
	binary.BigEndian.PutUint16(p[2:], uint16(number))
	binary.BigEndian.PutUint32(p[8:], 7)
	binary.BigEndian.PutUint32(p[12:], number)
	for {
		err := unix.Sendto(s.fd, p, 0, &s.to)
		if err != unix.ENOBUFS && err != unix.EINTR && err != unix.EAGAIN {
			return err
		}
		runtime.Gosched()
	}
}

// numberSink counts how often each number arrives.
type numberSink struct {
	seen  []atomic.Uint32
	total atomic.Int64
	wrong atomic.Int64
}

func newNumberSink(t testing.TB, h *lab.Host, ifname, group string, numbers int) *numberSink {
	t.Helper()
	s := &numberSink{seen: make([]atomic.Uint32, numbers)}
	conn := labtest.Listen(t, h, ifname, netip.MustParseAddrPort(group))
	done := make(chan struct{})
	go func() {
		defer close(done)
		b := make([]byte, 2048)
		for {
			n, err := conn.Read(b)
			if err != nil {
				return
			}
			number := uint32(numbers)
			if n == 100 {
				number = binary.BigEndian.Uint32(b[12:])
			}
			if int(number) >= numbers {
				s.wrong.Add(1)
				continue
			}
			s.seen[number].Add(1)
			s.total.Add(1)
		}
	}()
	t.Cleanup(func() {
		conn.Close()
		<-done
	})
	return s
}

// legLab has a source on in0 and another on out2, and a sink on out0.
type legLab struct {
	*network
	in   *instance
	legs [2]*legSender
}

func newLegLab(t *testing.T) *legLab {
	n := newNetwork(t)
	return &legLab{network: n, in: newInstance(t, n.relay), legs: [2]*legSender{
		newLegSender(t, n.source, "src0", "239.1.1.1:5000"), newLegSender(t, n.sinks[2], "sink0", "239.101.1.1:5000"),
	}}
}

const legInputs = "239.1.1.1:5000%in0 239.101.1.1:5000%out2"

// lostOn says whether a leg loses a number: one in 50, by a hash of both.
func lostOn(leg int, number uint32) bool {
	x := (uint64(number)*2 + uint64(leg) + 1) * 0x9e3779b97f4a7c15
	x ^= x >> 29
	return x*0xbf58476d1ce4e5b9>>32%50 == 0
}

// A stream on two legs that each lose one packet in 50, one 200 packets behind the other, leaves
// with every number once, whatever happens to the relay in the meantime.
func TestLegsMerge(t *testing.T) {
	rules := func(outputs, more string) string {
		return "rules:\n- name: cam\n  in: [" + strings.ReplaceAll(legInputs, " ", ", ") + "]\n  out: " + outputs + "\n" + more
	}
	const one, two, merge = "239.2.1.1:6000%out0", "[239.2.1.1:6000%out0, 239.2.1.2:6000%out1]", "  merge: rtp,skew=2s,reset=4s\n"
	reload := func(text string) func(*testing.T, *legLab, int) {
		return func(t *testing.T, l *legLab, n int) {
			l.in.write("rules.yaml", text)
			l.in.running.signal(syscall.SIGHUP)
			l.in.running.waitLog("msg=reloaded", n)
		}
	}
	tests := []struct {
		name    string
		disturb []func(*testing.T, *legLab, int)
	}{
		{"undisturbed", nil},
		{"killed and upgraded", []func(*testing.T, *legLab, int){
			func(t *testing.T, l *legLab, _ int) {
				l.in.running.stop(syscall.SIGKILL)
				l.in.start("-c", l.in.dir+"/rules.yaml")
			},
			func(t *testing.T, l *legLab, _ int) {
				l.in.running.stop(syscall.SIGTERM)
				l.in.mustCLI("upgrade")
				l.in.start("-c", l.in.dir+"/rules.yaml")
			},
		}},
		{"outputs, options and paths change", []func(*testing.T, *legLab, int){
			reload(rules(two, merge)), reload(rules(one, "  merge: rtp,skew=3s,reset=6s\n")), reload(rules(one, merge+"  path: fanout\n")),
			reload(rules(one, merge+"  path: afxdp\n")), reload(rules(one, merge)),
		}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			l := newLegLab(t)
			l.in.start("-c", l.in.write("rules.yaml", rules(one, merge)))
			l.in.waitState("cam", control.StateActive)
			numbers := labtest.Soak(70_000, 10_000_000) // more than one round of the sequence number
			sink := newNumberSink(t, l.sinks[0], "sink0", "239.2.1.1:6000", numbers)
			sent := l.sendBoth(sink, numbers, time.Duration(labtest.Soak(40, 10))*time.Microsecond)
			for i, disturb := range tt.disturb {
				for sent.past[0].Load() < int64(i+1)*int64(numbers)/int64(len(tt.disturb)+2) {
					time.Sleep(time.Millisecond)
				}
				disturb(t, l, i+1)
			}
			if err := sent.Wait(); err != nil {
				t.Fatal(err)
			}
			dropped := l.checkOnce(t, sink, sent, numbers)
			l.checkLegs(t, numbers, dropped, tt.disturb == nil)
		})
	}
}

// sending is what sendBoth does: past are the numbers that each leg is done with, and late those that the first has lost
// and the second sends so much later that the relay may drop them: a machine that lets it send a few hundred numbers a
// second makes the legs seconds apart.
type sending struct {
	errgroup.Group
	past [2]atomic.Int64
	late atomic.Int64
}

// sendBoth sends all numbers on both legs, each from a CPU of its own, in whose context the relay then runs. The second is
// 200 numbers behind the first or more, but not twice that. A number takes pace.
func (l *legLab) sendBoth(sink *numberSink, numbers int, pace time.Duration) *sending {
	const lag, queued, every, late = 200, 64, 50, time.Second // half of the skew
	s := &sending{}
	begin, given := time.Now(), atomic.Int64{}
	times := make([]atomic.Int64, numbers/every+1) // when the first leg came to a number
	// due waits until a leg may send number i.
	due := func(leg, i int) {
		for leg == 1 && s.past[0].Load() < int64(min(i+lag, numbers)) || leg == 0 && s.past[1].Load() < int64(i-2*lag) {
			time.Sleep(20 * time.Microsecond)
		}
		if i%every != 0 {
			return
		}
		if leg == 0 {
			time.Sleep(time.Until(begin.Add(time.Duration(i) * pace))) // the pace of the stream, not a wait for something
			times[i/every].Store(int64(time.Since(begin)))
		}
		// A machine that cannot keep up must not be given more than its queues hold. Packets lost anyway are not
		// waited for again.
		for late := time.Now(); sink.total.Load() < given.Load()-queued; time.Sleep(200 * time.Microsecond) {
			if time.Since(late) > time.Second {
				given.Store(sink.total.Load())
			}
		}
	}
	for leg := range s.past {
		s.Go(func() error {
			defer s.past[leg].Store(math.MaxInt64) // after an error, too: the other must not wait
			runtime.LockOSThread()                 // never unlocked: the thread ends with its CPU
			labtest.PinThread(leg)
			for i := range numbers {
				due(leg, i)
				if !lostOn(leg, uint32(i)) {
					if leg == 0 || lostOn(0, uint32(i)) {
						given.Add(1)
					}
					if err := l.legs[leg].send(uint32(i)); err != nil {
						return fmt.Errorf("leg %d: %w", leg, err)
					}
					if leg == 1 && lostOn(0, uint32(i)) && int64(time.Since(begin))-times[i/every].Load() > int64(late) {
						s.late.Add(1)
					}
				}
				s.past[leg].Store(int64(i + 1))
			}
			return nil
		})
	}
	return s
}

// queueDrops is how many packets the queues of this lab have dropped: those of the interfaces, whose counters
// do not include what the relay program drops, and of the sink's socket. A machine that lets neither run for long
// loses packets there, before or after the relay.
func (l *legLab) queueDrops(t *testing.T) (n uint64) {
	t.Helper()
	for _, h := range []*lab.Host{l.source, l.relay, l.sinks[0], l.sinks[1], l.sinks[2]} {
		links, err := h.Netlink().LinkList()
		if err != nil {
			t.Fatal(err)
		}
		for _, link := range links {
			if s := link.Attrs().Statistics; s != nil {
				n += s.RxDropped + s.TxDropped
			}
		}
	}
	labtest.Do(t, l.sinks[0], func() error {
		sockets, err := os.ReadFile("/proc/thread-self/net/udp")
		for line := range strings.Lines(string(sockets)) {
			fields := strings.Fields(line)
			drops, _ := strconv.ParseUint(fields[len(fields)-1], 10, 64) // the header's is none
			n += drops
		}
		return err
	})
	return n
}

// checkOnce waits for all numbers that some leg carried, and finds duplicate and missing ones. It returns how many
// packets queues have dropped or were sent late: as many numbers may be missing.
func (l *legLab) checkOnce(t *testing.T, sink *numberSink, sent *sending, numbers int) (dropped int) {
	t.Helper()
	want := int64(0)
	for i := range uint32(numbers) {
		if !lostOn(0, i) || !lostOn(1, i) {
			want++
		}
	}
	last, since := int64(0), time.Now()
	eventually(t, "all numbers have come", func() string {
		n := sink.total.Load()
		if n >= want {
			return ""
		}
		dropped = int(l.queueDrops(t)) + int(sent.late.Load())
		if n != last {
			last, since = n, time.Now()
		} else if n+int64(dropped) >= want && time.Since(since) > time.Second {
			return ""
		}
		var first []uint32
		for i := range uint32(numbers) {
			if sink.seen[i].Load() == 0 && (!lostOn(0, i) || !lostOn(1, i)) && len(first) < 10 {
				first = append(first, i)
			}
		}
		return fmt.Sprintf("%d of %d, without %v; %d packets were dropped by queues, or sent late; the relay has dropped %v", n, want, first, dropped, l.in.rule("cam").Drops)
	})
	dropped = int(l.queueDrops(t)) + int(sent.late.Load())
	twice, missing := 0, 0
	for i := range uint32(numbers) {
		switch n := sink.seen[i].Load(); {
		case n > 1:
			twice++
		case n == 0 && (!lostOn(0, i) || !lostOn(1, i)):
			missing++
		case n == 1 && lostOn(0, i) && lostOn(1, i):
			t.Errorf("number %d was not sent", i)
		}
	}
	if twice > 0 || missing > dropped || sink.wrong.Load() > 0 {
		t.Errorf("%d numbers came twice, %d did not come, %d were none; %d packets were dropped by queues, or sent late", twice, missing, sink.wrong.Load(), dropped)
	}
	if dropped > 0 {
		t.Logf("this machine has dropped %d packets in queues, or sent them late; %d numbers are missing, of %d", dropped, missing, numbers)
	}
	return dropped
}

// checkLegs compares the relay's report on its inputs with what was sent, but for packets that queues have dropped.
func (l *legLab) checkLegs(t *testing.T, numbers, dropped int, undisturbed bool) {
	t.Helper()
	r := l.in.rule("cam")
	if len(r.Inputs) != 2 || r.Stream == nil {
		t.Fatalf("%d inputs, stream %v", len(r.Inputs), r.Stream)
	}
	lost, both := [2]int{}, 0
	for i := range uint32(numbers) {
		for leg := range lost {
			if lostOn(leg, i) {
				lost[leg]++
			}
		}
		if lostOn(0, i) && lostOn(1, i) {
			both++
		}
	}
	won := 0.0
	for i, in := range r.Inputs {
		if in.Leg == nil || in.State != control.StateActive {
			t.Fatalf("input %d: %+v", i, in)
		}
		// The first and last packets may be among those lost.
		if n := int(in.Leg.Lost); n > lost[i]+dropped || n < lost[i]-5 {
			t.Errorf("input %d lacks %d numbers, want %d", i, n, lost[i])
		}
		won += in.Leg.Share
	}
	if won < 0.999 || won > 1.001 {
		t.Errorf("the inputs have brought %v of all", won)
	}
	if n := int(r.Stream.Lost); n > both+dropped {
		t.Errorf("%d numbers are lost on all inputs, want %d: %+v", n, both, r.Stream)
	}
	if !undisturbed || dropped > 0 {
		return // changed outputs restart their counters; which packets were dropped is unknown
	}
	sum := uint64(0)
	eventually(t, "all packets are counted", func() string { // duplicates may still be on their way
		r = l.in.rule("cam")
		if sum = r.Outputs[0].Sent.Packets; r.Matched.Packets == uint64(2*numbers-lost[0]-lost[1]) {
			return ""
		}
		return fmt.Sprintf("%d packets matched, of %d", r.Matched.Packets, 2*numbers-lost[0]-lost[1])
	})
	eventually(t, "what is lost on all inputs is told, once it is older than the skew", func() string {
		if n := int(l.in.rule("cam").Stream.Lost); n > both || n < both-3 {
			return fmt.Sprintf("%d numbers, want %d", n, both)
		}
		return ""
	})
	for _, d := range r.Drops {
		sum += d.Packets
		if d.Reason != "duplicate" {
			t.Errorf("%d packets are dropped, reason %s", d.Packets, d.Reason)
		}
	}
	if sum != r.Matched.Packets {
		t.Errorf("%d packets matched; %d are accounted for", r.Matched.Packets, sum)
	}
	if text := l.in.mustCLI("health", "cam"); !strings.Contains(text, "239.101.1.1:5000%out2") {
		t.Errorf("health says\n%s", text)
	}
}
