//go:build interop

package interop

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"xdpcast/internal/labtest"
)

// TestRouterSoak: under traffic receivers join and leave at random, sources start and stop, a link is
// cut and restored, and routing daemons and relays are killed: after each event all relays have the
// routes of their kernels, and a continuing stream is complete. Under make soak it runs for long.
func TestRouterSoak(t *testing.T) {
	t.Parallel() // alongside TestAssert
	length := max(15*time.Second, labtest.SoakTime())
	ctx := labtest.Context(t)
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 1))
	n := newTriangle(ctx, t, true)
	defer func() {
		if t.Failed() {
			n.tell()
		}
	}()
	n.neighbours()
	s := n.stream(ctx, triangleGroup)
	s.during(ctx, joining, 1, func() { s.comesBy(ctx, "ab", 0, 1) })

	const groups = 8
	group := func(i int) netip.AddrPort { return netip.MustParseAddrPort(fmt.Sprintf("239.1.3.%d:5000", i+1)) }
	var members [groups]*net.UDPConn
	var sends [groups]func(uint32)
	var sending [groups]atomic.Bool
	for i := range sends {
		sends[i] = sender(t, n.source, group(i))
	}
	var wg sync.WaitGroup
	running, stop := context.WithCancel(ctx)
	defer wg.Wait()
	defer stop()
	wg.Go(func() {
		tick := time.NewTicker(10 * time.Millisecond)
		defer tick.Stop()
		for number := uint32(0); running.Err() == nil; number++ {
			for i := range sends {
				if sending[i].Load() {
					sends[i](number)
				}
			}
			<-tick.C
		}
	})
	up := true
	cut := func() {
		up = !up
		for _, h := range n.hosts[:2] {
			if err := h.SetUp("ab", up); err != nil {
				t.Fatal(err)
			}
		}
		if up {
			n.shortRoute(ctx)
			n.neighbours()
		}
	}
	kinds := []struct {
		what  string
		share int
		do    func()
	}{
		{"a receiver joins or leaves", 12, func() {
			i := random.IntN(groups)
			if members[i] == nil {
				members[i] = member(t, n.receiver, group(i))
				return
			}
			if err := members[i].Close(); err != nil {
				t.Fatal(err)
			}
			members[i] = nil
		}},
		{"a source begins or ends", 6, func() {
			i := random.IntN(groups)
			sending[i].Store(!sending[i].Load())
		}},
		{"a path is cut or comes back", 2, cut},
		{"a relay is killed", 2, func() {
			n.relays[random.IntN(len(n.relays))].restart(ctx, t, time.Duration(random.IntN(6000))*time.Millisecond)
		}},
		{"a routing daemon is killed", 1, func() {
			if !up {
				cut() // the other path depends on the rendezvous point alone
			}
			n.routers[1].kill()
			time.Sleep(time.Duration(random.IntN(2000)) * time.Millisecond) // no daemon during this time
			n.routers[1].start()
			n.neighbours()
		}},
	}
	total := 0
	for _, k := range kinds {
		total += k.share
	}
	counts, checks := map[string]int{}, 0
	tell := func() { t.Logf("%d times the routes agreed; %v", checks, counts) }
	defer tell()
	began, told := time.Now(), time.Now()
	for time.Since(began) < length {
		for range 1 + random.IntN(4) {
			at := random.IntN(total)
			for _, k := range kinds {
				if at -= k.share; at < 0 {
					k.do()
					counts[k.what]++
					break
				}
			}
			time.Sleep(time.Duration(random.IntN(200)) * time.Millisecond) // events come in bursts
		}
		s.settled(t, "the stream is whole")
		n.agrees(ctx, "check")
		checks++
		if time.Since(told) > time.Minute {
			tell()
			told = time.Now()
		}
	}
}
