package e2e_test

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"xdpcast/internal/control"
	"xdpcast/internal/labtest"
)

// TestMrouteStorm: routes change 5,000 times per second, and the daemon's delay is bounded: a
// change that follows takes effect soon, and the daemon then forwards the routes that were made,
// with their outputs. Under make soak it runs for long.
func TestMrouteStorm(t *testing.T) {
	n := newNetwork(t)
	router := labtest.NewRouter(t, n.relay, true, 0)
	outputs := []string{"out0", "out1", "out2"}
	for _, name := range append([]string{"in0"}, outputs...) {
		router.AddVIF(name, 1)
	}
	in := newInstance(t, n.relay)
	in.start("--mroute", "--mroute-family", "ipv4", "--log-level", "error", "--max-rules", "2048", "--max-outputs", "8192")
	const (
		rate   = 5000 // changes per second
		routes = 1000
		limit  = 5 * time.Second // tens of milliseconds on an idle machine
	)
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 1))
	made := map[string]string{} // outputs by rule
	var lags []time.Duration
	changes, spent := 0, time.Duration(0)
	for round, start := 0, time.Now(); round < 2 || time.Since(start) < labtest.SoakTime(); round++ {
		began := time.Now()
		for i := range rate {
			source := fmt.Sprintf("10.1.%d.%d", random.IntN(routes)/250, 1+random.IntN(250))
			name := "mroute/" + source + "/" + routedGroup
			if random.IntN(4) == 0 {
				if made[name] != "" {
					router.Delete(source, routedGroup, "in0")
					delete(made, name)
				}
			} else {
				to, names := map[string]uint8{}, []string{}
				for _, name := range outputs {
					if random.IntN(2) == 0 {
						to[name] = 1
						names = append(names, name)
					}
				}
				router.Add(source, routedGroup, "in0", to)
				made[name] = strings.Join(append(names, ""), " ")
				if len(names) == 0 {
					made[name] = "none"
				}
			}
			changes++
			if ahead := time.Duration(i)*time.Second/rate - time.Since(began); ahead > time.Millisecond {
				time.Sleep(ahead)
			}
		}
		spent += time.Since(began)
		changed := time.Now()
		router.Add(routedSource, "239.9.9.9", "in0", map[string]uint8{"out0": 1})
		in.waitRoute("mroute/"+routedSource+"/239.9.9.9", control.StateActive, 1)
		lags = append(lags, time.Since(changed))
		router.Delete(routedSource, "239.9.9.9", "in0")
		eventually(t, "the routes that are mirrored are those that were made", func() string {
			have := map[string]string{}
			for _, r := range in.rules() {
				to := []string{}
				for _, o := range r.Outputs {
					to = append(to, o.Interface)
				}
				slices.Sort(to)
				have[r.Name] = strings.Join(append(to, ""), " ")
				if r.State == control.StatePending && strings.Contains(r.Reason, "no outputs") {
					have[r.Name] = "none"
				} else if r.State != control.StateActive {
					return fmt.Sprintf("%s is %s: %s", r.Name, r.State, r.Reason)
				}
			}
			for name, to := range made {
				if have[name] != to {
					return fmt.Sprintf("%s goes to %q, want %q", name, have[name], to)
				}
			}
			if len(have) != len(made) {
				return fmt.Sprintf("%d routes, want %d", len(have), len(made))
			}
			return ""
		})
	}
	slices.Sort(lags)
	t.Logf("%.0f changes a second; the last was in force after %v in the middle, %v at most", float64(changes)/spent.Seconds(), lags[len(lags)/2], lags[len(lags)-1])
	if lags[len(lags)/2] > limit {
		t.Errorf("in force after %v, want at most %v", lags[len(lags)/2], limit)
	}
}
