package main

import (
	"errors"
	"fmt"
	"net/netip"
	"os"

	"xdpcast/internal/lab"
	"xdpcast/internal/live"
)

// mostSinks is the number of sink hosts. More outputs share them, except for subjects that send a
// packet only once per interface.
const mostSinks = 4

// network is a source, a relay and sinks, for one subject:
//
//	source eth0 -- in relay out0 -- eth0 sink 0
//	                        out1 -- eth0 sink 1 ...
//
// or the source connected directly to one sink. A subject with several legs has source interfaces
// eth0, eth1 ... and relay interfaces in, in1 ...
type network struct {
	setup  setup
	dir    string    // for files of the subject
	relay  *lab.Host // nil for a direct connection
	ins    []string  // the relay's interface to each leg of the source
	outs   []string  // the relay's interface to each sink
	source source
	sinks  *sinks

	cleanup cleanup
}

// cleanup is a list of undo functions, run in reverse order.
type cleanup []func() error

func (c *cleanup) add(fn func() error) { *c = append(*c, fn) }

func (c *cleanup) run() error {
	var errs []error
	for i := len(*c) - 1; i >= 0; i-- {
		errs = append(errs, (*c)[i]())
	}
	*c = nil
	return errors.Join(errs...)
}

// relayAddr is the relay's address on the link to a sink.
func relayAddr(sink int) netip.Addr { return netip.AddrFrom4([4]byte{10, 1, byte(sink), 1}) }

// newNetwork creates the network of a subject. The caller closes it.
func newNetwork(s setup, of subject) (_ *network, err error) {
	n := &network{setup: s}
	defer func() {
		if err != nil {
			err = errors.Join(err, n.close())
		}
	}()
	if n.dir, err = os.MkdirTemp("", "xb-"); err != nil { // a short path, since it holds sockets
		return nil, err
	}
	n.cleanup.add(func() error { return os.RemoveAll(n.dir) })
	src, err := n.host("bench-source")
	if err != nil {
		return nil, err
	}
	var sinkHosts []*lab.Host
	for range min(max(mostSinks, of.sinks), s.Outputs) {
		h, err := n.host("bench-sink")
		if err != nil {
			return nil, err
		}
		sinkHosts = append(sinkHosts, h)
	}
	legs, err := n.connect(src, sinkHosts, of)
	if err != nil {
		return nil, err
	}
	if n.sinks, err = newSinks(sinkHosts, s, of.rewrites); err != nil {
		return nil, err
	}
	n.cleanup.add(n.sinks.close)
	if n.source, err = newSource(src, s, legs); err != nil {
		return nil, err
	}
	n.cleanup.add(n.source.close)
	// A veth sends XDP frames only with a program attached.
	return n, src.Do(func() error {
		for _, name := range legs {
			if err := live.Attach(name, n.sinks.objs[0].Sink); err != nil {
				return err
			}
		}
		return nil
	})
}

func (n *network) host(name string) (*lab.Host, error) {
	h, err := lab.NewHost(lab.UniqueName(name))
	if err != nil {
		return nil, err
	}
	n.cleanup.add(h.Close)
	return h, nil
}

// connect returns the source's interfaces.
func (n *network) connect(src *lab.Host, sinkHosts []*lab.Host, of subject) (legs []string, err error) {
	mtu := 0
	if n.setup.Frame > 1514 {
		mtu = mostFrame
	}
	from := lab.End{Host: src, Name: "eth0", Addrs: []string{sourceAddr.String() + "/24"}, Queues: n.setup.Queues}
	if of.direct {
		return []string{from.Name}, lab.Connect(from, lab.End{Host: sinkHosts[0], Name: "eth0", Queues: n.setup.Queues}, mtu)
	}
	if n.relay, err = n.host("bench-relay"); err != nil {
		return nil, err
	}
	for leg := range max(1, of.legs) {
		to := lab.End{Host: n.relay, Name: "in", Addrs: []string{fmt.Sprintf("10.0.%d.2/24", leg)}, Queues: n.setup.Queues}
		if leg > 0 {
			from.Name, from.Addrs = fmt.Sprintf("eth%d", leg), []string{fmt.Sprintf("10.0.%d.1/24", leg)}
			to.Name = fmt.Sprintf("in%d", leg)
		}
		if err := lab.Connect(from, to, mtu); err != nil {
			return nil, err
		}
		legs, n.ins = append(legs, from.Name), append(n.ins, to.Name)
	}
	for i, sink := range sinkHosts {
		name := fmt.Sprintf("out%d", i)
		out := lab.End{Host: n.relay, Name: name, Addrs: []string{relayAddr(i).String() + "/24"}, Queues: n.setup.Queues}
		if err := lab.Connect(out, lab.End{Host: sink, Name: "eth0", Queues: n.setup.Queues}, mtu); err != nil {
			return nil, err
		}
		n.outs = append(n.outs, name)
	}
	return legs, nil
}

// out is the relay's interface for an output.
func (n *network) out(output int) string { return n.outs[output%len(n.outs)] }

func (n *network) close() error { return n.cleanup.run() }

// batch is the largest number of frames that the source may send at once. A veth queues 256, and
// copies to outputs on one sink arrive together.
func (n *network) batch() int {
	const most, held = 32, 256
	sinks := len(n.sinks.objs)
	perSink := (n.setup.Outputs + sinks - 1) / sinks
	return max(1, min(most, held/2/perSink))
}
