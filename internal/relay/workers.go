package relay

import (
	"cmp"
	"errors"
	"slices"

	"xdpcast/internal/control"
	"xdpcast/internal/forward"
	"xdpcast/internal/plan"
	"xdpcast/pkg/flow"
)

// workerStatus is the state of the workers of the user-space paths.
type workerStatus struct {
	workers []control.Worker
	lost    []control.ReceiveDrop
}

// status reads the state of the workers, by interface, path and queue. With an error, it is
// partial.
func (u userPaths) status(nameOf func(index int) string) (s workerStatus, err error) {
	var errs []error
	for kind, p := range u {
		switch path := p.path.(type) {
		case interface {
			Inputs() ([]forward.InputStatus, error)
		}:
			inputs, err := path.Inputs()
			errs = append(errs, err)
			for i := range inputs {
				s.addInput(plan.PathName(kind), &inputs[i], nameOf)
			}
		case interface {
			Groups() ([]forward.GroupStatus, error)
		}:
			groups, err := path.Groups()
			errs = append(errs, err)
			for i := range groups {
				s.addGroup(plan.PathName(kind), &groups[i])
			}
		}
	}
	slices.SortFunc(s.workers, func(a, b control.Worker) int {
		return cmp.Or(cmp.Compare(a.Interface, b.Interface), cmp.Compare(a.Path, b.Path), cmp.Compare(a.Queue, b.Queue))
	})
	slices.SortFunc(s.lost, func(a, b control.ReceiveDrop) int {
		return cmp.Or(cmp.Compare(a.Interface, b.Interface), cmp.Compare(a.Path, b.Path), cmp.Compare(a.Reason, b.Reason))
	})
	return s, errors.Join(errs...)
}

// unsent is what devices refused after a path had counted it as sent, by interface.
func (u userPaths) unsent() map[int]uint64 {
	if path, ok := u[flow.PathAFXDP].path.(interface{ Unsent() map[int]uint64 }); ok {
		return path.Unsent()
	}
	return nil
}

func (s *workerStatus) addInput(path string, in *forward.InputStatus, nameOf func(index int) string) {
	for i := range in.Workers {
		s.workers = append(s.workers, afxdpWorker(path, in.Interface, &in.Workers[i], nameOf))
	}
	missing := func(queue int, err error) {
		s.workers = append(s.workers, control.Worker{
			Interface: in.Interface, Path: path, Queue: queue, State: control.WorkerMissing, Cause: err.Error(),
			Lost: []control.Loss{}, Senders: []control.WorkerSender{},
		})
	}
	for _, m := range in.Missing {
		missing(m.Queue, m.Err)
	}
	if in.Error != nil && len(in.Missing)+len(in.Workers) == 0 {
		missing(0, in.Error)
	}
	s.drop(in.Interface, path, losses(in.Lost))
}

func (s *workerStatus) drop(ifname, path string, lost []control.Loss) {
	for _, l := range lost {
		at := slices.IndexFunc(s.lost, func(d control.ReceiveDrop) bool {
			return d.Interface == ifname && d.Path == path && d.Reason == l.Reason
		})
		if at >= 0 { // of another group on the interface
			s.lost[at].Packets += l.Packets
			continue
		}
		s.lost = append(s.lost, control.ReceiveDrop{Interface: ifname, Path: path, Loss: l})
	}
}

// losses converts lost packets to the API, without reasons that have none.
func losses(l forward.Lost) []control.Loss {
	all := []control.Loss{{Reason: "no_frame", Packets: l.NoFrame}, {Reason: "ring_full", Packets: l.RingFull}, {Reason: "rule_gone", Packets: l.Unclaimed}}
	return slices.DeleteFunc(all, func(l control.Loss) bool { return l.Packets == 0 })
}

func afxdpWorker(path, ifname string, q *forward.QueueStatus, nameOf func(index int) string) control.Worker {
	w := control.Worker{
		Interface: ifname, Path: path, Queue: q.Queue, State: control.StateActive, Cause: q.LastError, Failures: q.Failures,
		Mode: copyMode(q.ZeroCopy), Received: q.Received,
		Lost: losses(forward.Lost{NoFrame: q.Socket.RXDropped, RingFull: q.Socket.RXRingFull, Unclaimed: q.Unclaimed.Packets}),
		Socket: &control.SocketStatus{
			MultiBuffer: q.MultiBuffer, FrameSize: q.FrameSize, RXNeedWakeup: q.WakeRX, TXNeedWakeup: q.WakeTX,
			RXDropped: q.Socket.RXDropped, RXInvalidDescs: q.Socket.RXInvalid, TXInvalidDescs: q.Socket.TXInvalid,
			RXRingFull: q.Socket.RXRingFull, RXFillRingEmpty: q.Socket.FillRingEmpty, TXRingEmpty: q.Socket.TXRingEmpty,
		},
		Senders: make([]control.WorkerSender, 0, len(q.Senders)),
	}
	switch {
	case q.Gone || q.Stopped:
		w.State = control.StateFailed
	case q.Down:
		w.State = control.WorkerDown
	}
	for _, o := range q.Senders {
		sender := control.WorkerSender{
			Interface: nameOf(o.Index), Queue: o.Queue, Mode: copyMode(o.ZeroCopy), State: control.StateActive, Cause: o.Cause, Lost: o.Lost,
		}
		if o.Queue < 0 {
			sender.Mode = "packet"
		}
		if o.Failed {
			sender.State = control.WorkerDown
		}
		w.Senders = append(w.Senders, sender)
	}
	return w
}

func copyMode(zeroCopy bool) string {
	if zeroCopy {
		return "zero-copy"
	}
	return "copy"
}

func (s *workerStatus) addGroup(path string, g *forward.GroupStatus) {
	var sum forward.Lost
	for i := range g.Workers {
		lost := forward.Lost{RingFull: g.Workers[i].Dropped}
		sum.RingFull += lost.RingFull
		number := i
		if g.FromHost { // after those for arriving packets, so that all differ
			number += len(g.Workers)
		}
		s.workers = append(s.workers, control.Worker{
			Interface: g.Interface, Path: path, Queue: number, State: control.StateActive, Failures: g.Workers[i].Failures,
			Mode: g.Mode.String(), Group: g.GroupID, Received: g.Workers[i].Received, Lost: losses(lost),
			Senders: []control.WorkerSender{},
		})
	}
	s.drop(g.Interface, path, losses(sum))
}

// workerStatus reads the state of the workers. Errors are logged: they must not hide the rest.
func (r *Relay) workerStatus() workerStatus {
	s, err := r.tables.paths.status(r.nameOf)
	if err != nil {
		r.log.Warn("status of workers", "error", err)
	}
	return s
}

// receiveDrops are those of a rule's interfaces, on its path.
func receiveDrops(p *plan.RulePlan, all []control.ReceiveDrop) []control.ReceiveDrop {
	drops := []control.ReceiveDrop{}
	for _, d := range all {
		if slices.ContainsFunc(p.Flows, func(f *plan.FlowPlan) bool {
			return f.Publish && f.Flow.Path != flow.PathKernel && f.In.Name == d.Interface && plan.PathName(f.Flow.Path) == d.Path
		}) {
			drops = append(drops, d)
		}
	}
	return drops
}
