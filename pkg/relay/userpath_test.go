package relay

import (
	"net"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"xdpcast/internal/lab"
	"xdpcast/internal/labtest"
	"xdpcast/pkg/control"
	"xdpcast/pkg/forward"
	"xdpcast/pkg/loader"
	"xdpcast/pkg/rules"
	"xdpcast/pkg/traffic"
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
	lost forward.Lost
}

func (l *lossy) Inputs() ([]forward.InputStatus, error) {
	return []forward.InputStatus{{Index: 1, Interface: "in0", Lost: l.lost}, {Index: 2, Interface: "gone0", Lost: l.lost}}, nil
}

// What is lost before a worker is told by interface and path, and with each rule that it
// may concern.
func TestReceiveDropsAreTold(t *testing.T) {
	p := newPlace(t)
	r := p.start()
	r.mustPut(
		onPath(rules.PathAFXDP, stream("a", "in0", "239.1.1.1", to("out0", "239.2.2.1"))),
		onPath(rules.PathKernel, stream("k", "in0", "239.1.1.2", to("out0", "239.2.2.2"))),
	)
	if err := r.do(t.Context(), func() error {
		sockets := r.paths[loader.PathAFXDP]
		sockets.path = &lossy{userPath: sockets.path, lost: forward.Lost{NoFrame: 3, RingFull: 4}}
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
