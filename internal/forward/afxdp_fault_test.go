package forward

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"xdpcast/internal/lab"
	"xdpcast/internal/labtest"
	"xdpcast/pkg/flow"
	"xdpcast/pkg/loader"
	"xdpcast/pkg/packet"
)

// A worker that panics leaves its packets to the fallback, and restarts.
func TestAFXDPWorkerStartsAgain(t *testing.T) {
	b := newXDPBench(t, 1, 1, 0)
	b.openWith(t, AFXDPOptions{})
	r := xdpRule("r", b.in, "239.1.1.1", 5000, sendTo(b.out[0], "239.2.2.1", 6000))
	r.Fallback = true
	b.sync(t, r)
	source := openSender(t, b.source, iface(t, b.source, "eth0").Index)
	c := catch(t, b.sinks[0], "eth0")
	w := b.path.inputs[b.in.Index].workers[0]
	w.mu.Lock()
	claims := w.claims
	w.claims = nil // out of range at the first frame
	w.mu.Unlock()
	sendFrames(t, source, [][]byte{numbered(0, 0).Build()})
	labtest.Eventually(t, "the worker has failed", func() bool { return w.failures.Load() > 0 })
	w.mu.Lock()
	w.claims = claims
	w.mu.Unlock()
	for n := range 20 {
		f := numbered(0, n).Build()
		sendFrames(t, source, [][]byte{f})
		receive(t, c, [][]byte{expect(t, r.Out[0], f)}) // on one path or the other
	}
	n := uint64(21)
	labtest.Eventually(t, "the worker serves again", func() bool {
		f := numbered(0, int(n)).Build()
		sendFrames(t, source, [][]byte{f})
		receive(t, c, [][]byte{expect(t, r.Out[0], f)})
		n++
		return b.path.Stats(nil)[0].Outputs[0].Sent.Packets > 0
	})
	s := b.adds(t, "r", n)
	if got := s.Outputs[0].Drops[loader.Internal].Packets; got != 1 {
		t.Errorf("drops %v: want the frame of the failure, internal", s.Outputs[0].Drops)
	}
	status := b.inputs(t)[0].Workers[0]
	if status.Failures != 1 || !strings.Contains(status.LastError, "panic") {
		t.Errorf("%+v", status)
	}
}

// An interface that is input and output sends through its receiving socket; one that
// becomes an input takes its queue back from the sender that uses it.
func TestAFXDPBothWays(t *testing.T) {
	b := newXDPBench(t, 1, 1, 0)
	b.open(t)
	there := xdpRule("there", b.in, "239.1.1.1", 5000, sendTo(b.out[0], "239.2.2.1", 6000))
	back := xdpRule("back", b.out[0], "239.3.3.3", 5000, sendTo(b.in, "239.4.4.4", 6000))
	hairpin := xdpRule("hairpin", b.in, "239.5.5.5", 5000, sendTo(b.in, "239.6.6.6", 6000))
	left, right := catch(t, b.source, "eth0"), catch(t, b.sinks[0], "eth0")
	source := openSender(t, b.source, iface(t, b.source, "eth0").Index)
	sink := openSender(t, b.sinks[0], iface(t, b.sinks[0], "eth0").Index)
	f1, f2 := udpFrame("239.1.1.1", "10.0.0.1", 100, nil), udpFrame("239.5.5.5", "10.0.0.1", 100, nil)
	f3 := udpFrame("239.3.3.3", "10.0.0.1", 100, nil)

	b.sync(t, there, hairpin)
	sendFrames(t, source, [][]byte{f1})
	receive(t, right, [][]byte{expect(t, there.Out[0], f1)})
	sendFrames(t, source, [][]byte{f2})
	receive(t, left, [][]byte{expect(t, hairpin.Out[0], f2)})
	for _, s := range b.inputs(t)[0].Workers[0].Senders {
		if s.Queue != 0 {
			t.Errorf("%+v: want queue 0", s)
		}
	}
	b.sync(t, there, back, hairpin)
	sendFrames(t, source, [][]byte{f1})
	receive(t, right, [][]byte{expect(t, there.Out[0], f1)})
	sendFrames(t, sink, [][]byte{f3})
	receive(t, left, [][]byte{expect(t, back.Out[0], f3)})
	for _, in := range b.inputs(t) {
		if in.Error != nil || len(in.Workers) != 1 {
			t.Errorf("%+v", in)
		}
		for _, s := range in.Workers[0].Senders {
			if (s.Queue == 0) != (s.Index == in.Index) {
				t.Errorf("input %d: %+v", in.Index, s)
			}
		}
	}
	b.adds(t, "there", 2)
	b.adds(t, "back", 1)
	b.adds(t, "hairpin", 1)
}

// Added queues get workers and senders. The kernel removes only queues without a
// socket.
func TestAFXDPQueues(t *testing.T) {
	b := newXDPBench(t, 0, 2, 0)
	b.sinks = append(b.sinks, labtest.Host(t, "snk"))
	labtest.Connect(t, lab.End{Host: b.relay, Name: "out0", Queues: 2}, lab.End{Host: b.sinks[0], Name: "eth0", Queues: 2})
	b.out = append(b.out, iface(t, b.relay, "out0"))
	b.attach(t, b.out[0])
	b.open(t)
	r := xdpRule("r", b.in, "239.1.1.1", 5000, sendTo(b.out[0], "239.2.2.1", 6000))
	near := func(rx, tx int) {
		t.Helper()
		labtest.Do(t, b.relay, func() error { return errors.Join(lab.SetChannels("in", rx, 2), lab.SetChannels("out0", 2, tx)) })
	}
	// A veth with a program receives on as many queues as its peer sends on: the peer's
	// are added after its own, and removed before.
	far := func(tx int) {
		t.Helper()
		labtest.Do(t, b.source, func() error { return lab.SetChannels("eth0", 2, tx) })
	}
	// by returns the transmit queue of each worker's sender.
	by := func() (queues []int) {
		b.sync(t, r)
		for i, w := range b.inputs(t)[0].Workers {
			if w.Queue != i || len(w.Senders) != 1 {
				t.Fatalf("%+v", w)
			}
			queues = append(queues, w.Senders[0].Queue)
		}
		return queues
	}
	matched := uint64(0)
	relays := func(rx, tx int, want ...int) {
		t.Helper()
		if got := by(); !slices.Equal(got, want) {
			t.Fatalf("%d receive and %d transmit queues: workers send on %v, want %v", rx, tx, got, want)
		}
		if got, want := len(b.path.claimed), rx+min(rx, tx); got != want {
			t.Errorf("%d receive and %d transmit queues: %d are claimed, want %d", rx, tx, got, want)
		}
		t.Run(fmt.Sprintf("%d receive, %d transmit", rx, tx), func(t *testing.T) {
			const frames = 1000
			c := countOn(t, b.sinks[0])
			b.load(t, 50, frames, c.total.Load)
			exactly(t, c, frames)
			matched += frames
			b.adds(t, "r", matched)
		})
	}
	far(1)
	near(1, 1)
	relays(1, 1, 0)
	near(2, 1)
	far(2)
	relays(2, 1, 0, -1)
	near(2, 2)
	relays(2, 2, 0, 1)
	far(1)
	for name, rx := range map[string]int{"in": 1, "out0": 2} {
		if err := b.relay.Do(func() error { return lab.SetChannels(name, rx, 3-rx) }); !errors.Is(err, unix.EINVAL) {
			t.Errorf("remove a queue of %s: %v, want %v", name, err, unix.EINVAL)
		}
	}
	b.sync(t)
	if len(b.path.claimed) != 0 {
		t.Errorf("without rules, %d queues are claimed", len(b.path.claimed))
	}
	labtest.Eventually(t, "the queues can be removed", func() bool {
		return b.relay.Do(func() error { return errors.Join(lab.SetChannels("in", 1, 2), lab.SetChannels("out0", 2, 1)) }) == nil
	})
	matched = 0
	relays(1, 1, 0)
}

// labInterface is an interface that need not exist.
func labInterface(index int) *net.Interface {
	return &net.Interface{Index: index, MTU: 1500, HardwareAddr: net.HardwareAddr{2, 0, 0, 0, 0, byte(index)}}
}

// An input that is down recovers by itself; one that does not exist is pending.
func TestAFXDPPending(t *testing.T) {
	b := newXDPBench(t, 1, 1, 0)
	b.open(t)
	r := xdpRule("r", b.in, "239.1.1.1", 5000, sendTo(b.out[0], "239.2.2.1", 6000))
	if err := b.relay.SetUp("in", false); err != nil {
		t.Fatal(err)
	}
	b.sync(t, r)
	b.up(t, "in", b.source)
	if b.path.Pending() {
		t.Errorf("still pending: %v", b.inputs(t)[0].Error)
	}
	source, c := openSender(t, b.source, iface(t, b.source, "eth0").Index), catch(t, b.sinks[0], "eth0")
	f := numbered(0, 0).Build()
	sendFrames(t, source, [][]byte{f})
	receive(t, c, [][]byte{expect(t, r.Out[0], f)})

	gone := r
	gone.In.Index = 4711
	b.sync(t, gone)
	if in := b.inputs(t)[0]; !b.path.Pending() || !errors.Is(in.Error, unix.ENODEV) || len(in.Workers) != 0 {
		t.Errorf("pending %v, %+v", b.path.Pending(), in)
	}
}

// A frame whose rule's number was reused by another rule is forwarded by its addresses.
func TestHandedOver(t *testing.T) {
	set := NewSet(1)
	e, err := set.NewEngine(3, 0, func(int) (Sender, error) { return nil, unix.ENODEV })
	if err != nil {
		t.Fatal(err)
	}
	link := labInterface(3)
	rules := []flow.Flow{
		xdpRule("a", link, "239.1.1.1", 5000, sendTo(labInterface(4), "239.2.2.1", 6000)),
		xdpRule("b", link, "239.1.1.2", 5000, sendTo(labInterface(4), "239.2.2.2", 6000)),
		xdpRule("c", link, "239.1.0.0", 0, sendTo(labInterface(4), "239.2.2.3", 6000)),
	}
	rules[2].In.Len = 16
	if err := set.Update(rules, nil, map[string]uint32{"a": 10, "b": 20, "c": 30}); err != nil {
		t.Fatal(err)
	}
	e.Begin()
	defer e.End()
	frame := udpFrame("239.1.1.1", "10.0.0.1", 3000, nil)
	parts := packet.Fragment(udpFrame("239.1.1.1", "10.0.0.1", 3000, nil), 7, 1000)
	for _, c := range []struct {
		name   string
		frame  []byte
		number byte
		mark   byte
		want   string
	}{
		{"its number", frame, 10, handoverMark, "a"},
		{"the number of another", frame, 20, handoverMark, "a"},
		{"a number that is not known", frame, 99, handoverMark, "a"},
		{"a rule that wants it, too", frame, 30, handoverMark, "c"},
		{"a later fragment before the first", parts[1], 10, handoverMark, "a"},
		{"a later fragment with an old number", parts[1], 99, handoverMark, ""},
		{"a first fragment with an old number", parts[0], 99, handoverMark, "a"},
		{"a later fragment behind it", parts[1], 99, handoverMark, "a"},
		{"not from the program", frame, 10, 2, ""},
	} {
		f := bytes.Clone(c.frame)
		f[0], f[1], f[2], f[3], f[6] = c.number, 0, 0, 0, c.mark
		h, ok := packet.Parse(f)
		if !ok {
			t.Fatal("does not parse")
		}
		got := ""
		if r := e.handedOver(3, f, &h, 1); r != nil {
			got = r.Name()
		}
		if got != c.want {
			t.Errorf("%s: rule %q, want %q", c.name, got, c.want)
		}
	}
	if err := set.Remove(e); err != nil {
		t.Error(err)
	}
}

// If a packet must fit into one frame, a worker gets larger frames with a larger MTU.
func TestAFXDPLargerFrames(t *testing.T) {
	b := newXDPBench(t, 1, 1, 1500)
	b.openWith(t, AFXDPOptions{CheckOwnership: true, oneFrame: true})
	setMTU := func(h *lab.Host, name string) {
		t.Helper()
		link, err := h.Link(name)
		if err == nil {
			err = h.Netlink().LinkSetMTU(link, 3400)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	r := xdpRule("r", b.in, "239.1.1.1", 5000, sendTo(b.out[0], "239.2.2.1", 6000))
	b.sync(t, r)
	if w := b.inputs(t)[0].Workers[0]; w.FrameSize != 2048 || w.MultiBuffer {
		t.Errorf("%+v", w)
	}
	setMTU(b.source, "eth0")
	setMTU(b.sinks[0], "eth0")
	setMTU(b.relay, "in")
	setMTU(b.relay, "out0")
	r.Out[0].MTU = 3400
	b.sync(t, r)
	if w := b.inputs(t)[0].Workers[0]; w.FrameSize != 4096 {
		t.Errorf("%+v", w)
	}
	source, c := openSender(t, b.source, iface(t, b.source, "eth0").Index), catch(t, b.sinks[0], "eth0")
	f := udpFrame("239.1.1.1", "10.0.0.1", 3300, nil)
	sendFrames(t, source, [][]byte{f})
	receive(t, c, [][]byte{expect(t, r.Out[0], f)})
	b.adds(t, "r", 1)
}
