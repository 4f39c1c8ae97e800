package loader

import "xdpcast/pkg/flow"

import "slices"

// Refusal is an output interface that refused frames of the kernel path: its driver does not send
// redirected frames. If the kernel reports that beforehand (Features), Refusals are not needed.
type Refusal struct {
	Index int // of the interface
	// Frames is how many frames were sent to the interface between two calls of Refusals, and
	// Refused how many of them it did not take.
	Frames, Refused uint64
}

// An interface refuses if it refused at least refusalFrames and took less than a tenth
// (refusalShare). A device that can send but has a full queue takes more, and frames in flight
// between two counters look taken.
const (
	refusalFrames = 16
	refusalShare  = 10
)

// Refusals returns which of the given interfaces refused frames since the last call for them,
// sorted by index. The first call for an interface, and for a rule, only records its counters.
// Frames of rules that are not on the kernel path do not count. It reads the counters of every rule
// that sends on the interfaces, some microseconds each.
func (l *Loader) Refusals(indexes []int) ([]Refusal, error) {
	asked := make(map[int]bool, len(indexes))
	for _, index := range indexes {
		asked[index] = true
	}
	now, err := l.readTaken(asked)
	if err != nil {
		return nil, err
	}
	found := refusals(l.taken, now)
	l.taken = now
	return found, nil
}

// taken is a reading of the frames sent to interfaces and refused by them.
type taken struct {
	refused map[int]uint64 // by interface index
	outputs map[takenKey]takenOutput
}

type takenKey struct {
	rule string
	id   uint32
	slot int
}

type takenOutput struct {
	index         int
	sent, skipped uint64
}

// readTaken reads the interfaces' counters after those of the rules: a frame refused in between is
// never missing among the frames sent.
func (l *Loader) readTaken(asked map[int]bool) (t taken, err error) {
	t = taken{map[int]uint64{}, map[takenKey]takenOutput{}}
	if len(asked) == 0 {
		return t, nil
	}
	var names []string
	for name, e := range l.rules {
		if e.rule.Path == flow.PathKernel && slices.ContainsFunc(e.rule.Out, func(o flow.Output) bool { return asked[o.Index] }) {
			names = append(names, name)
		}
	}
	stats, err := l.StatsOf(names)
	if err != nil {
		return t, err
	}
	for i := range stats.Rules {
		r := &stats.Rules[i]
		for slot := range r.Outputs {
			if o := &r.Outputs[slot]; o.Rule.Ready && asked[o.Rule.Index] {
				t.outputs[takenKey{r.Name, r.ID, slot}] = takenOutput{o.Rule.Index, o.Sent.Packets, o.Drops[NoDevice].Packets}
			}
		}
	}
	devices, err := readDevices(l.maps.DeviceStats)
	if err != nil {
		return t, err
	}
	for _, p := range devices {
		if asked[p.Index] {
			t.refused[p.Index] = p.TransmitDrops + p.RedirectRefused
		}
	}
	return t, nil
}

// refusals compares two readings.
func refusals(before, now taken) (found []Refusal) {
	since := map[int]*Refusal{}
	for index, refused := range now.refused {
		if was, ok := before.refused[index]; ok && refused >= was {
			since[index] = &Refusal{Index: index, Refused: refused - was}
		}
	}
	for key, o := range now.outputs {
		was, ok := before.outputs[key]
		r := since[o.index]
		if !ok || r == nil || was.index != o.index || o.sent < was.sent || o.skipped < was.skipped {
			continue
		}
		r.Frames += o.sent - was.sent + o.skipped - was.skipped
		r.Refused += o.skipped - was.skipped
	}
	for _, r := range since {
		// New rules have sent, too.
		r.Frames = max(r.Frames, r.Refused)
		if r.Refused >= refusalFrames && r.Frames-r.Refused < r.Frames/refusalShare {
			found = append(found, *r)
		}
	}
	slices.SortFunc(found, func(a, b Refusal) int { return a.Index - b.Index })
	return found
}
