package loader

import (
	"testing"

	"github.com/google/go-cmp/cmp"

	"xdpcast/internal/lab"
	"xdpcast/internal/labtest"
	"xdpcast/pkg/flow"
)

func TestRefusals(t *testing.T) {
	one, two := takenKey{"one", 1, 0}, takenKey{"two", 2, 0}
	reading := func(refused uint64, outputs map[takenKey]takenOutput) taken {
		return taken{map[int]uint64{7: refused}, outputs}
	}
	for _, tt := range []struct {
		name        string
		before, now taken
		want        []Refusal
	}{
		{name: "nothing", before: reading(0, nil), now: reading(0, nil)},
		{
			name:   "all refused",
			before: reading(5, map[takenKey]takenOutput{one: {7, 100, 0}}),
			now:    reading(105, map[takenKey]takenOutput{one: {7, 200, 0}}),
			want:   []Refusal{{7, 100, 100}},
		},
		{
			name:   "all copies skipped",
			before: reading(0, map[takenKey]takenOutput{one: {7, 10, 1}}),
			now:    reading(0, map[takenKey]takenOutput{one: {7, 10, 101}}),
			want:   []Refusal{{7, 100, 100}},
		},
		{
			name:   "one rule's refused, the other's copies skipped",
			before: reading(0, map[takenKey]takenOutput{one: {7, 0, 0}, two: {7, 0, 0}}),
			now:    reading(50, map[takenKey]takenOutput{one: {7, 50, 0}, two: {7, 0, 30}}),
			want:   []Refusal{{7, 80, 80}},
		},
		{
			name:   "some on their way",
			before: reading(0, map[takenKey]takenOutput{one: {7, 0, 0}}),
			now:    reading(950, map[takenKey]takenOutput{one: {7, 1000, 0}}),
			want:   []Refusal{{7, 1000, 950}},
		},
		{
			name:   "a full queue",
			before: reading(0, map[takenKey]takenOutput{one: {7, 0, 0}}),
			now:    reading(900, map[takenKey]takenOutput{one: {7, 1000, 0}}),
		},
		{
			name:   "too few",
			before: reading(0, map[takenKey]takenOutput{one: {7, 0, 0}}),
			now:    reading(15, map[takenKey]takenOutput{one: {7, 15, 0}}),
		},
		{
			name:   "just enough",
			before: reading(0, map[takenKey]takenOutput{one: {7, 0, 0}}),
			now:    reading(16, map[takenKey]takenOutput{one: {7, 16, 0}}),
			want:   []Refusal{{7, 16, 16}},
		},
		{
			name:   "of another rule by that name",
			before: reading(0, map[takenKey]takenOutput{one: {7, 0, 0}}),
			now:    reading(0, map[takenKey]takenOutput{{"one", 9, 0}: {7, 0, 100}}),
		},
		{
			name:   "the output has another interface",
			before: reading(0, map[takenKey]takenOutput{one: {8, 0, 0}}),
			now:    reading(0, map[takenKey]takenOutput{one: {7, 0, 100}}),
		},
		{
			name:   "counted from zero again",
			before: reading(500, map[takenKey]takenOutput{one: {7, 500, 0}}),
			now:    reading(100, map[takenKey]takenOutput{one: {7, 100, 0}}),
		},
		{
			name: "not asked before",
			now:  reading(100, map[takenKey]takenOutput{one: {7, 100, 0}}),
		},
	} {
		if diff := cmp.Diff(tt.want, refusals(tt.before, tt.now)); diff != "" {
			t.Errorf("%s (-want +got):\n%s", tt.name, diff)
		}
	}
}

// A veth whose peer cannot receive redirected frames refuses all of them, of one output and of
// several; one that can is not reported, whatever it sends.
func TestRefusalsOfDevice(t *testing.T) {
	t.Parallel()
	const frames = 20
	n := newLab(t, 2)
	l := open(t, testOptions(t))
	attachAll(t, l, append(n.out, n.in)...)
	mute, fine := n.out[0], n.out[1]
	labtest.Do(t, n.sinks[0], func() error { return lab.SetGRO("eth0", false) })
	sync1(t, l,
		flow.Flow{Name: "one", In: input(n.in, "239.1.1.1", "", 5000), Out: []flow.Output{output(mute, "239.2.2.1", "10.1.0.1", 6000)}},
		flow.Flow{Name: "several", In: input(n.in, "239.1.1.2", "", 5000), Out: []flow.Output{output(mute, "239.2.2.2", "10.1.0.1", 6000), output(fine, "239.2.2.3", "10.1.1.1", 6000)}},
	)
	indexes := []int{mute.Index, fine.Index}
	source, sink := labtest.NewTap(t, n.source, "eth0"), labtest.NewTap(t, n.sinks[1], "eth0")
	send := func() {
		t.Helper()
		for range frames {
			for _, group := range []string{"239.1.1.1", "239.1.1.2"} {
				source.Send(sourceFrame(n, group, 5000, nil).Build())
			}
		}
		sink.Collect(frames, isUDP)
	}
	check := func(what string, want []Refusal) {
		t.Helper()
		got, err := l.Refusals(indexes)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", what, diff)
		}
	}
	check("first call", nil)
	send()
	check("refusing", []Refusal{{mute.Index, 2 * frames, 2 * frames}})
	check("no frames since", nil)
	labtest.Do(t, n.sinks[0], func() error { return lab.SetGRO("eth0", true) })
	send()
	check("able again", nil)
}
