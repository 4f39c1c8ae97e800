package relay

import (
	"slices"
	"testing"

	"xdpcast/internal/control"
	"xdpcast/internal/labtest"
	"xdpcast/pkg/rules"
)

// TestRoutesOfABusyLoop: a multicast route that changes is the kernel's at once, however long the
// control loop is busy with other things, and is forwarded in XDP again as it is then.
func TestRoutesOfABusyLoop(t *testing.T) {
	labtest.RequireRoot(t)
	p := newPlace(t)
	p.opts.Mroutes = &rules.Mroute{IPv4: true}
	router := labtest.NewRouter(t, p.host, true, 0)
	for _, name := range []string{"in0", "out0", "out1"} {
		router.AddVIF(name, 1)
	}
	const source, group, name = "10.0.0.2", "239.1.1.1", "mroute/10.0.0.2/239.1.1.1"
	router.Add(source, group, "in0", map[string]uint8{"out0": 1})
	r := p.start()
	defer r.stop()
	forwards := func(what, ifname string) {
		t.Helper()
		labtest.Eventually(t, what, func() bool {
			s, err := r.Rule(t.Context(), name)
			return err == nil && s.State == control.StateActive && s.Outputs[0].Interface == ifname && len(r.loader.HeldRouted()) == 0
		})
	}
	forwards("the route is forwarded in XDP", "out0")

	busy, free := make(chan struct{}), make(chan struct{})
	done := make(chan error, 1)
	go func() {
		done <- r.do(t.Context(), func() error {
			close(busy)
			<-free
			return nil
		})
	}()
	<-busy
	router.Add(source, group, "in0", map[string]uint8{"out1": 1})
	labtest.Eventually(t, "the changed route is held", func() bool { return slices.Equal(r.loader.HeldRouted(), []string{name}) })
	close(free)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	forwards("the changed route is forwarded in XDP", "out1")
}

// TestInterfacesOfRoutes: interfaces of multicast routing have the program before any route names
// them, keep it when the routing daemon ends and when the relay does, and lose it when nothing is
// mirrored any more.
func TestInterfacesOfRoutes(t *testing.T) {
	labtest.RequireRoot(t)
	p := newPlace(t)
	all := rules.Mroute{IPv4: true, Interfaces: []string{"in0", "out0"}}
	p.opts.Mroutes = &all
	r := p.start()
	attached := func(what string, want ...string) {
		t.Helper()
		labtest.Eventually(t, what, func() bool {
			var have []string
			labtest.Do(t, p.host, func() error {
				for _, name := range []string{"in0", "out0", "out1"} {
					l, err := p.host.Link(name)
					if err != nil {
						return err
					}
					if l.Attrs().Xdp != nil && l.Attrs().Xdp.Attached {
						have = append(have, name)
					}
				}
				return nil
			})
			return slices.Equal(have, want)
		})
	}
	attached("no interface is one of multicast routing")
	router := labtest.NewRouter(t, p.host, true, 0)
	for _, name := range []string{"in0", "out0", "out1"} {
		router.AddVIF(name, 1)
	}
	attached("those that are selected", "in0", "out0")
	router.Close()
	if err := r.do(t.Context(), func() error { return r.reconcile(nil) }); err != nil {
		t.Fatal(err)
	}
	attached("the routing daemon has ended", "in0", "out0")
	r.stop()
	attached("the relay has ended", "in0", "out0")
	p.opts.Mroutes = nil
	r = p.start()
	defer r.stop()
	attached("nothing is mirrored")
}
