package loader

import (
	"fmt"
	"net/netip"
	"sync/atomic"
	"testing"
	"time"

	"xdpcast/internal/labtest"
	"xdpcast/pkg/flow"
	"xdpcast/pkg/packet"
)

// What is read while another process changes the rules is, for each rule, one of the versions that
// were published: rows that the writer frees and uses again are never taken for those of a rule read before.
func TestReadWhileChanging(t *testing.T) {
	labtest.RequireRoot(t)
	opts := stateOptions(t)
	opts.Logger = nil
	l := open(t, opts)
	// Version v of a rule has 1 + (rule+v) % 4 outputs, all with the port 1000 + v. Every third version
	// moves rules to other keys, and thus the table is swapped as well as changed in place.
	const count, most = 24, 40_000
	version := func(v int) (set []*flow.Flow) {
		for i := range count {
			f := &flow.Flow{Name: fmt.Sprintf("r%d", i), In: flow.Input{Index: 1, Group: netip.AddrFrom4([4]byte{239, 1, byte(v / 3 % 2), byte(i)}), Port: 5000}}
			for slot := range 1 + (i+v)%4 {
				f.Out = append(f.Out, flow.Output{Index: 1, MTU: 1500, Rewrite: packet.Rewrite{
					Dst: netip.AddrFrom4([4]byte{239, 2, byte(slot), byte(i)}), Src: netip.AddrFrom4([4]byte{10, 0, 0, 1}), DstPort: uint16(1000 + v),
				}})
			}
			set = append(set, f)
		}
		return set
	}
	var published atomic.Int64
	var ended error
	stop, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for v := 1; v < most; v++ {
			select {
			case <-stop:
				return
			default:
			}
			if ended = l.Sync(version(v)); ended != nil {
				return
			}
			published.Store(int64(v))
		}
	}()
	defer func() {
		close(stop)
		<-done
		if ended != nil {
			t.Error(ended)
		}
	}()
	labtest.Eventually(t, "there are rules", func() bool { return published.Load() > 0 })
	r, err := OpenReader(opts.PinDir)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	reads, began := 0, time.Now()
	for ; time.Since(began) < 3*time.Second || published.Load() < 6; reads++ {
		oldest := int(published.Load())
		all, err := r.Rules()
		if err != nil {
			t.Fatalf("read %d: %v", reads, err)
		}
		if len(all) != count {
			t.Fatalf("read %d: %d rules, want %d", reads, len(all), count)
		}
		for _, f := range all {
			var i int
			if _, err := fmt.Sscanf(f.Name, "r%d", &i); err != nil {
				t.Fatal(err)
			}
			v := int(f.Out[0].DstPort) - 1000
			if v < oldest {
				t.Fatalf("read %d: rule %s is of version %d, though %d was published before the read", reads, f.Name, v, oldest)
			}
			if want := version(v)[i]; fmt.Sprintf("%+v", f.Out) != fmt.Sprintf("%+v", want.Out) || f.In.Group != want.In.Group {
				t.Fatalf("read %d: a rule that never was:\n%+v\nversion %d is:\n%+v", reads, f, v, *want)
			}
		}
	}
	t.Logf("%d reads while %d versions were published", reads, published.Load())
}
