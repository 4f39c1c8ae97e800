package main

import (
	"context"
	"errors"
	"net"

	"github.com/cilium/ebpf"

	"xdpcast/bpf"
	"xdpcast/internal/live"
)

// direct connects the source to the sink: the ceiling of both.
func direct() subject {
	return subject{
		name: "none", what: "source to sink with nothing between", direct: true, most: setup{Outputs: 1},
		start: func(context.Context, *network, options) (*running, error) { return &running{stop: nothing}, nil },
	}
}

// lossy loses one frame in a hundred, to prove that the bench detects it.
func lossy() subject {
	return subject{
		name: "lossy", what: "XDP redirect that drops one frame in 100", most: setup{Outputs: 1},
		start: func(_ context.Context, n *network, _ options) (*running, error) {
			return startXDP(n, func(o *forwardObjects) *ebpf.Program { return o.Lossy })
		},
	}
}

// redirect is the minimum work of a forwarder to one output.
func redirect() subject {
	return subject{
		name: "redirect", what: "bare XDP redirect, nothing rewritten", most: setup{Outputs: 1},
		start: func(_ context.Context, n *network, _ options) (*running, error) {
			return startXDP(n, func(o *forwardObjects) *ebpf.Program { return o.Redirect })
		},
	}
}

// broadcast is the minimum work of a forwarder to several outputs.
func broadcast() subject {
	return subject{
		name: "broadcast", what: "bare XDP broadcast through a devmap, nothing rewritten",
		start: func(_ context.Context, n *network, _ options) (*running, error) {
			return startXDP(n, func(o *forwardObjects) *ebpf.Program { return o.Broadcast })
		},
	}
}

// startXDP attaches a program of bpf/forward.bpf.c to the relay's input, and also to its outputs: a
// veth sends XDP frames only with a program attached.
func startXDP(n *network, choose func(*forwardObjects) *ebpf.Program) (*running, error) {
	objs, err := attachXDP(n, choose)
	if err != nil {
		return nil, err
	}
	return &running{stop: objs.Close}, nil
}

// attachXDP is startXDP, but returns the programs, which the caller closes.
func attachXDP(n *network, choose func(*forwardObjects) *ebpf.Program) (*forwardObjects, error) {
	spec, err := loadForward()
	if err != nil {
		return nil, err
	}
	// A broadcast visits every possible entry.
	spec.Maps["outputs"].MaxEntries = uint32(n.setup.Outputs)
	objs := new(forwardObjects)
	if err := spec.LoadAndAssign(objs, nil); err != nil {
		return nil, err
	}
	err = n.relay.Do(func() error {
		for output := range n.setup.Outputs {
			i, err := net.InterfaceByName(n.out(output))
			if err != nil {
				return err
			}
			if err := objs.Outputs.Put(uint32(output), &bpf.RelayBpfDevmapVal{Ifindex: uint32(i.Index)}); err != nil {
				return err
			}
		}
		for _, name := range append([]string{"in"}, n.outs...) {
			if err := live.Attach(name, choose(objs)); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return nil, errors.Join(err, objs.Close())
	}
	return objs, nil
}
