package relay

import (
	"context"
	"errors"
	"io"
	"math/bits"
	"net"
	"strconv"
	"sync"
	"time"

	"xdpcast/internal/control"
	"xdpcast/internal/tap"
	"xdpcast/pkg/flow"
	"xdpcast/pkg/loader"
)

// Tap implements control.Tapper: it records a rule's packets from the programs in the kernel and
// from the workers.
func (r *Relay) Tap(ctx context.Context, q control.TapQuery, start func() io.Writer) (err error) {
	rule, err := r.Rule(ctx, q.Rule)
	if err != nil {
		return err
	}
	if err := checkSlots(q, len(rule.Outputs)); err != nil {
		return err
	}
	var kernel *loader.Tap
	opened, err := loader.OpenTap(loader.TapOptions{PinDir: r.opts.Loader.PinDir, Rule: q.Rule, Options: q.Options})
	switch {
	case errors.Is(err, loader.ErrNotSupported) && rule.UsedPath != PathName(flow.PathKernel):
		// Workers see all packets of these paths except those dropped by the relay program.
		r.log.Warn("tap without the programs in the kernel", "rule", q.Rule, "error", err)
	case err != nil:
		return control.Wrap(control.KindFailed, err)
	default:
		kernel = opened
		defer func() { err = errors.Join(err, kernel.Close()) }()
	}
	workers, err := r.early.taps.Add(q.Rule, q.Options, kernel == nil)
	if err != nil {
		return control.Wrap(control.KindUnavailable, err)
	}
	defer r.early.taps.Remove(workers)
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() { // an ending daemon does not wait for a tap
		select {
		case <-r.ended:
			cancel()
		case <-ctx.Done():
		}
	}()
	r.log.Info("tap begins", "rule", q.Rule)
	w, err := tap.NewWriter(start(), "xdpcast "+r.opts.Version, tapName, q.Count)
	if err != nil {
		return err
	}
	running, stop := context.WithCancel(ctx)
	var collecting sync.WaitGroup
	collecting.Go(func() { workers.Run(running, w) })
	lost := workers.Lost
	if kernel != nil {
		err = kernel.Run(ctx, w, workers.Lost)
		lost = func() uint64 { return kernel.Lost() + workers.Lost() }
	} else {
		err = flushTap(ctx, w, lost)
	}
	stop()
	collecting.Wait()
	err = errors.Join(err, w.Close(lost()))
	r.log.Info("tap has ended", "rule", q.Rule, "packets", w.Written(), "lost", lost())
	return err
}

// checkSlots checks that the named outputs exist.
func checkSlots(q control.TapQuery, outputs int) error {
	if last := bits.Len64(q.Slots) - 1; q.Slots != tap.AllSlots && last >= outputs {
		return control.Errorf(control.KindInvalid, "rule %s has no slot %d: want 0 to %d", q.Rule, last, outputs-1)
	}
	return nil
}

// flushTap flushes packets from workers, if there is no kernel tap to do so.
func flushTap(ctx context.Context, w *tap.Writer, lost func() uint64) error {
	tick := time.NewTicker(tap.HoldTime)
	defer tick.Stop()
	for {
		if more, err := w.Flush(lost()); err != nil || !more {
			return err
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

// tapName names an interface in the file.
func tapName(index int) string {
	i, err := net.InterfaceByIndex(index)
	if err != nil {
		return "interface " + strconv.Itoa(index)
	}
	return i.Name
}
