package relay

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"

	"xdpcast/internal/control"
	"xdpcast/internal/forward"
	"xdpcast/internal/lab"
	"xdpcast/internal/labtest"
	"xdpcast/internal/traffic"
	"xdpcast/pkg/flow"
	"xdpcast/pkg/rules"
	"xdpcast/pkg/xsk"
)

// onPath makes a rule take a path.
func onPath(path rules.Path, rule rules.Rule) rules.Rule {
	rule.Path = path
	return rule
}

// connectQueues makes an interface with several queues.
func (p *place) connectQueues(name, cidr, peerCIDR string, queues int) {
	p.t.Helper()
	labtest.Connect(p.t, lab.End{Host: p.host, Name: name, Addrs: []string{cidr}, Queues: queues},
		lab.End{Host: p.peer, Name: name, Addrs: []string{peerCIDR}, Queues: queues})
}

// workers are those that the status lists, without what changes with every packet.
func (r *running) workers() []control.Worker {
	r.t.Helper()
	s, err := r.Status(r.t.Context())
	if err != nil {
		r.t.Fatal(err)
	}
	return s.Workers
}

// workerList is a line for each: "in0 afxdp 0 active".
func (r *running) workerList() (all []string) {
	for _, w := range r.workers() {
		all = append(all, strings.Join([]string{w.Interface, w.Path, string(rune('0' + w.Queue)), w.State}, " "))
	}
	return all
}

func (r *running) waitWorkers(want ...string) {
	r.t.Helper()
	var last []string
	defer func() {
		if r.t.Failed() {
			r.t.Logf("workers: %q", last)
		}
	}()
	labtest.Eventually(r.t, "the workers are "+strings.Join(want, ", "), func() bool {
		last = r.workerList()
		return slices.Equal(last, want)
	})
}

// The status tells of every worker: how it receives and sends, and why a queue has none.
func TestWorkersAreTold(t *testing.T) {
	p := newPlace(t)
	p.connectQueues("in1", "10.9.0.1/24", "10.9.0.2/24", 2)
	var other *xsk.Socket
	labtest.Do(t, p.host, func() error {
		in1, err := net.InterfaceByName("in1")
		if err != nil {
			return err
		}
		other = holdQueue(t, in1.Index, 1)
		return nil
	})
	r := p.start()
	if got := r.workers(); len(got) != 0 {
		t.Errorf("workers without rules: %v", got)
	}
	r.mustPut(
		onPath(rules.PathAFXDP, stream("a", "in1", "239.1.1.1", to("out0", "239.2.2.1"), to("out1", "239.2.2.2"))),
		onPath(rules.PathFanout, stream("f", "in0", "239.1.1.2", to("out0", "239.2.2.3"))),
	)
	all := r.workers()
	fanout, afxdp := all[:len(all)-2], all[len(all)-2:]
	for i, w := range fanout {
		if w.Interface != "in0" || w.Path != "fanout" || w.Queue != i || w.State != control.StateActive || w.Group == 0 || w.Mode == "" || w.Socket != nil {
			t.Errorf("%+v", w)
		}
	}
	if len(fanout) == 0 {
		t.Error("no worker of path fanout")
	}
	want := control.Worker{
		Interface: "in1", Path: "afxdp", State: control.StateActive, Mode: "copy", Lost: []control.Loss{},
		Socket: &control.SocketStatus{MultiBuffer: true, FrameSize: 2048, TXNeedWakeup: true},
		Senders: []control.WorkerSender{
			{Interface: "out0", Mode: "copy", State: control.StateActive}, {Interface: "out1", Mode: "copy", State: control.StateActive},
		},
	}
	afxdp[0].Socket.TXRingEmpty = 0 // counts how often the kernel looked
	if d := cmp.Diff(want, afxdp[0]); d != "" {
		t.Errorf("worker of path afxdp (-want +got):\n%s", d)
	}
	if w := afxdp[1]; w.State != control.WorkerMissing || w.Queue != 1 || !strings.Contains(w.Cause, "another socket has it") {
		t.Errorf("%+v: want the queue missing, and why", w)
	}
	if err := other.Close(); err != nil {
		t.Fatal(err)
	}
	labtest.Eventually(t, "the queue gets its worker", func() bool {
		w := r.workers()[len(fanout)+1]
		return w.State == control.StateActive && w.Cause == ""
	})
	_, stop := p.sends("239.1.1.1:5000%in1", traffic.SendConfig{Count: 100})
	labtest.Eventually(t, "all are counted", func() bool {
		all := r.workers()[len(fanout):]
		return all[0].Received+all[1].Received == 100
	})
	stop()
}

// holdQueue is another program that has a queue.
func holdQueue(t *testing.T, index, queue int) *xsk.Socket {
	t.Helper()
	umem, err := xsk.NewUMEM(xsk.UMEMOptions{Frames: 64})
	if err != nil {
		t.Fatal(err)
	}
	frames, err := umem.NewFrames(64)
	if err != nil {
		t.Fatal(err)
	}
	s, err := xsk.Open(frames, index, queue, xsk.Options{NoTX: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
		if err := umem.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

// lossy is a path of which a test says what was lost.
type lossy struct {
	userPath
	lost   forward.Lost
	unsent map[int]uint64
}

func (l *lossy) Unsent() map[int]uint64 { return l.unsent }

func (l *lossy) Inputs() ([]forward.InputStatus, error) {
	return []forward.InputStatus{{Index: 1, Interface: "in0", Lost: l.lost}, {Index: 2, Interface: "gone0", Lost: l.lost}}, nil
}

// What is lost before a worker is told by interface and path, and with each rule that it
// may concern; what a device did not take, by interface.
func TestReceiveDropsAreTold(t *testing.T) {
	p := newPlace(t)
	r := p.start()
	r.mustPut(
		onPath(rules.PathAFXDP, stream("a", "in0", "239.1.1.1", to("out0", "239.2.2.1"))),
		onPath(rules.PathKernel, stream("k", "in0", "239.1.1.2", to("out0", "239.2.2.2"))),
	)
	if err := r.do(t.Context(), func() error {
		sockets := r.tables.paths[flow.PathAFXDP]
		sockets.path = &lossy{
			userPath: sockets.path, lost: forward.Lost{NoFrame: 3, RingFull: 4},
			unsent: map[int]uint64{r.network.Link("out0").Index: 5},
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	drop := func(ifname, reason string, n uint64) control.ReceiveDrop {
		return control.ReceiveDrop{Interface: ifname, Path: "afxdp", Loss: control.Loss{Reason: reason, Packets: n}}
	}
	here := []control.ReceiveDrop{drop("in0", "no_frame", 3), drop("in0", "ring_full", 4)}
	s, err := r.Stats(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	want := append([]control.ReceiveDrop{drop("gone0", "no_frame", 3), drop("gone0", "ring_full", 4)}, here...)
	if d := cmp.Diff(want, s.ReceiveDrops); d != "" {
		t.Errorf("statistics (-want +got):\n%s", d)
	}
	if want := []control.TransmitDrop{{Interface: "out0", Reason: "afxdp", Packets: 5}}; !slices.Equal(s.TransmitDrops, want) {
		t.Errorf("transmit drops %+v, want %+v", s.TransmitDrops, want)
	}
	for name, want := range map[string][]control.ReceiveDrop{"a": here, "k": {}} {
		rule, err := r.Rule(t.Context(), name)
		if err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(want, rule.ReceiveDrops); d != "" {
			t.Errorf("rule %s (-want +got):\n%s", name, d)
		}
	}
}

// relaysAll sends numbered packets of 8 groups through the rules of follow, each of which
// must come out once.
func (p *place) relaysAll(name string, size int) {
	p.t.Helper()
	p.t.(*testing.T).Run(name, func(t *testing.T) {
		var to []*traffic.Receiver
		for i := range followed {
			to = append(to, receives(t, p.peer, fmt.Sprintf("239.2.2.%d:6000%%outq", i+1)))
		}
		target, err := traffic.ParseTarget("239.1.1.1:5000%in1")
		if err != nil {
			t.Fatal(err)
		}
		const count = 25 // all of them fit the rings
		var s *traffic.Sender
		labtest.Do(t, p.peer, func() (err error) {
			s, err = traffic.NewSender(traffic.SendConfig{Target: target, Groups: followed, TTL: 16, Size: size, Count: count * followed, Rate: traffic.Rate{Value: 10_000}})
			return err
		})
		defer s.Close()
		if err := s.Run(t.Context()); err != nil {
			t.Fatal(err)
		}
		for i, r := range to {
			labtest.Eventually(t, fmt.Sprintf("the packets of group %d have arrived", i), func() bool { return r.Report().Total.Received >= count })
			if c := r.Report().Total; c.Received != count || c.Lost+c.Duplicated+c.Corrupt != 0 {
				t.Errorf("group %d: %+v, want %d packets", i, c, count)
			}
		}
	})
}

const followed = 8

// follow starts a relay whose rules take groups on path afxdp from in1 to outq, both with
// up to two queues, while packets of another group flow until the test ends.
func (p *place) follow() *running {
	p.t.Helper()
	p.connectQueues("in1", "10.9.0.1/24", "10.9.0.2/24", 2)
	p.connectQueues("outq", "10.10.0.1/24", "10.10.0.2/24", 2)
	// Attached with all queues: a veth does not run the program on those that it gets
	// later (docs/operations.md).
	p.opts.Interfaces = []string{"in1"}
	r := p.start()
	p.queues(1)
	p.t.Cleanup(func() {
		if !p.t.Failed() {
			return
		}
		if s, err := r.Stats(context.Background()); err == nil {
			p.t.Logf("drops %+v, lost before workers %+v", s.Drops, s.ReceiveDrops)
		}
	})
	for i := range followed {
		r.mustPut(onPath(rules.PathAFXDP, stream(fmt.Sprintf("r%d", i), "in1", fmt.Sprintf("239.1.1.%d", i+1), to("outq", fmt.Sprintf("239.2.2.%d", i+1)))))
	}
	r.mustPut(onPath(rules.PathAFXDP, stream("background", "in1", "239.1.3.1", to("outq", "239.2.3.1"))))
	sent, _ := p.sends("239.1.3.1:5000%in1", traffic.SendConfig{Rate: traffic.Rate{Value: 500}})
	labtest.Eventually(p.t, "packets flow", func() bool { return sent() > 100 })
	return r
}

// queues gives in1 so many receive queues, and outq so many transmit queues.
func (p *place) queues(n int) {
	p.t.Helper()
	near := func() {
		labtest.Do(p.t, p.host, func() error {
			return errors.Join(lab.SetChannels("in1", n, 2), lab.SetChannels("outq", 2, n))
		})
	}
	// A veth with a program receives on as many queues as its peer sends on.
	far := func() { labtest.Do(p.t, p.peer, func() error { return lab.SetChannels("in1", 2, n) }) }
	if n == 1 {
		far()
		near()
	} else {
		near()
		far()
	}
}

// Queues that are added while packets flow get workers, by the kernel's announcement
// alone.
func TestQueuesAreFollowed(t *testing.T) {
	p := newPlace(t)
	r := p.follow()
	r.waitWorkers("in1 afxdp 0 active")
	p.relaysAll("one queue", 0)
	before := labtest.Held()
	p.queues(2)
	r.waitWorkers("in1 afxdp 0 active", "in1 afxdp 1 active")
	labtest.Eventually(t, "each worker has a transmit queue", func() bool {
		all := r.workers()
		return len(all[0].Senders) == 1 && len(all[1].Senders) == 1 && all[0].Senders[0].Queue == 0 && all[1].Senders[0].Queue == 1
	})
	p.relaysAll("two queues", 0)
	for _, rule := range r.rulesOf() {
		r.mustDelete(rule)
	}
	r.waitWorkers()
	if held := labtest.Held(); held.Rings >= before.Rings {
		t.Errorf("with two queues closed %+v are held, with one open %+v", held, before)
	}
}

// rulesOf names all rules.
func (r *running) rulesOf() (names []string) {
	r.t.Helper()
	all, err := r.Rules(r.t.Context())
	if err != nil {
		r.t.Fatal(err)
	}
	for _, rule := range all {
		names = append(names, rule.Name)
	}
	return names
}

func (r *running) mustDelete(name string) {
	r.t.Helper()
	if err := r.DeleteRule(r.t.Context(), name); err != nil {
		r.t.Fatal(err)
	}
}

// setMTU sets the MTU of an interface of the relay, and then that of its other end.
func (p *place) setMTU(name string, mtu int) {
	p.t.Helper()
	for _, h := range []*lab.Host{p.host, p.peer} {
		link, err := h.Link(name)
		if err == nil {
			err = h.Netlink().LinkSetMTU(link, mtu)
		}
		if err != nil {
			p.t.Fatal(err)
		}
	}
}

// The MTU of input and output changes while packets flow, and either goes down and up:
// afterwards every packet of the new size is relayed.
func TestInterfaceChangesAreFollowed(t *testing.T) {
	p := newPlace(t)
	r := p.follow()
	for _, mtu := range []int{9000, 3000, 1500, 9000} {
		p.setMTU("outq", mtu)
		p.setMTU("in1", mtu)
		labtest.Eventually(t, "the rules know the MTU", func() bool { return r.mtuOf("r0") == mtu })
		p.relaysAll(fmt.Sprintf("MTU %d", mtu), mtu-28)
	}
	for _, name := range []string{"in1", "outq"} {
		if err := p.host.SetUp(name, false); err != nil {
			t.Fatal(err)
		}
		if name == "in1" {
			r.waitWorkers("in1 afxdp 0 down")
		} else {
			labtest.Eventually(t, "the sender says so", func() bool {
				all := r.workers()
				return len(all) == 1 && (len(all[0].Senders) == 0 || all[0].Senders[0].State == control.WorkerDown)
			})
		}
		if err := p.host.SetUp(name, true); err != nil {
			t.Fatal(err)
		}
		labtest.Eventually(t, "both ends are up", func() bool {
			for _, h := range []*lab.Host{p.host, p.peer} {
				link, err := h.Link(name)
				if err != nil {
					t.Fatal(err)
				}
				if link.Attrs().OperState != netlink.OperUp {
					return false
				}
			}
			return true
		})
		labtest.Eventually(t, "all is active", func() bool {
			all := r.workers()
			return len(all) == 1 && all[0].State == control.StateActive && len(all[0].Senders) == 1 && all[0].Senders[0].State == control.StateActive
		})
		p.relaysAll(name+" down and up", 0)
	}
}

// mtuOf is the MTU that the first output of a rule in the kernel goes by.
func (r *running) mtuOf(name string) (mtu int) {
	r.t.Helper()
	if err := r.do(r.t.Context(), func() error {
		for _, rule := range r.loader.Rules() {
			if rule.Name == name {
				mtu = int(rule.Out[0].MTU)
			}
		}
		return nil
	}); err != nil {
		r.t.Fatal(err)
	}
	return mtu
}
