package relay

import (
	"slices"
	"testing"

	"xdpcast/internal/labtest"
	"xdpcast/pkg/flow"
	"xdpcast/pkg/loader"
	"xdpcast/pkg/rules"
)

// Each worker has one CPU, whatever numbers the process may use.
func TestSteerTo(t *testing.T) {
	for _, c := range []struct {
		usable  []int
		workers int
		want    []int
	}{
		{[]int{0, 1}, 2, []int{0, 1}},
		{[]int{0, 1, 2, 3}, 2, []int{0, 1}},
		{[]int{2, 4, 7}, 2, []int{2, 7}},
		{[]int{2, 4}, 2, []int{2}},
		{[]int{5}, 1, []int{5}},
		{nil, 4, nil},
	} {
		if got := steerTo(func(cpu int) bool { return slices.Contains(c.usable, cpu) }, c.workers); !slices.Equal(got, c.want) {
			t.Errorf("CPUs %v, %d workers: %v, want %v", c.usable, c.workers, got, c.want)
		}
	}
	if got := steerTo(func(int) bool { return true }, 100); len(got) != loader.MaxSteering {
		t.Errorf("%d CPUs, want %d", len(got), loader.MaxSteering)
	}
}

// A virtual device is steered when asked for, with fewer queues than workers, and in
// native mode.
func TestSteers(t *testing.T) {
	for _, c := range []struct {
		steering Steering
		workers  int
		mode     loader.Mode
		path     rules.Path
		want     bool
	}{
		{SteerOn, 2, loader.ModeNative, rules.PathFanout, true},
		{SteerAuto, 2, loader.ModeNative, rules.PathFanout, false},
		{SteerOff, 2, loader.ModeNative, rules.PathFanout, false},
		{SteerOn, 1, loader.ModeNative, rules.PathFanout, false},
		{SteerOn, 2, loader.ModeGeneric, rules.PathFanout, false},
		{SteerOn, 2, loader.ModeNative, rules.PathKernel, false},
	} {
		p := newPlace(t)
		p.opts.Steering, p.opts.Workers, p.opts.Mode = c.steering, c.workers, c.mode
		r := p.start()
		rule := stream("r", "in0", "239.1.1.1", to("out0", "239.2.2.1"))
		rule.Path = c.path
		r.mustPut(rule)
		var got []flow.Flow
		labtest.Eventually(t, "the rule is in the kernel", func() bool {
			reader, err := loader.OpenReader(p.opts.Loader.PinDir)
			if err != nil {
				t.Fatal(err)
			}
			defer reader.Close()
			got, err = reader.Rules()
			return err == nil && len(got) == 1
		})
		if got[0].Steered != c.want {
			t.Errorf("%+v: steered %v", c, got[0].Steered)
		}
	}
}
