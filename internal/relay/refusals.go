package relay

import (
	"fmt"
	"log/slog"

	"xdpcast/internal/network"
	"xdpcast/internal/plan"
	"xdpcast/pkg/flow"
	"xdpcast/pkg/loader"
)

// refusals finds interfaces that do not send redirected frames although no driver says so (before
// Linux 6.3): by the frames that they refused.
type refusals struct {
	ask func(indexes []int) ([]loader.Refusal, error) // loader.Refusals
	log *slog.Logger
	// answers are the findings, with the links as they were then: a link that changed since may
	// send.
	answers map[network.LinkID]string
	links   map[network.LinkID]*network.Link
}

func newRefusals(ask func([]int) ([]loader.Refusal, error), log *slog.Logger) *refusals {
	return &refusals{ask: ask, log: log, answers: map[network.LinkID]string{}, links: map[network.LinkID]*network.Link{}}
}

// observe checks the outputs of the kernel path whose drivers do not report support, and returns
// whether an answer changed.
func (r *refusals) observe(p *plan.Plan, now *network.Snapshot) (changed bool, err error) {
	for id, link := range r.links {
		if now.ByIndex(id.Index) != link {
			delete(r.links, id)
			delete(r.answers, id)
			changed = true
		}
	}
	indexes := silentOutputs(p, now)
	if len(indexes) == 0 {
		return changed, nil
	}
	found, err := r.ask(indexes)
	if err != nil {
		return changed, fmt.Errorf("frames that interfaces refused: %w", err)
	}
	for _, f := range found {
		link := now.ByIndex(f.Index)
		if link == nil || r.links[link.LinkID] != nil {
			continue
		}
		r.links[link.LinkID] = link
		r.answers[link.LinkID] = fmt.Sprintf("it refused %d of %d frames", f.Refused, f.Frames)
		r.log.Warn("interface does not send redirected frames", "interface", link.Name, "refused", f.Refused, "frames", f.Frames)
		changed = true
	}
	return changed, nil
}

// silentOutputs are the indexes of outputs of flows on the kernel path whose drivers do not report
// whether they send redirected frames.
func silentOutputs(p *plan.Plan, now *network.Snapshot) (indexes []int) {
	silent := map[int]bool{}
	for _, l := range now.Links() {
		if l.Ethernet && !l.Features.Known {
			silent[l.Index] = true
		}
	}
	if len(silent) == 0 {
		return nil
	}
	seen := map[int]bool{}
	for _, r := range p.Rules {
		for _, f := range r.Flows {
			if !f.Publish || f.Flow.Path != flow.PathKernel {
				continue
			}
			for i := range f.Flow.Out {
				if index := f.Flow.Out[i].Index; f.Flow.Out[i].Ready && silent[index] && !seen[index] {
					seen[index] = true
					indexes = append(indexes, index)
				}
			}
		}
	}
	return indexes
}
