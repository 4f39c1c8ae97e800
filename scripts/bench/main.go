// Command bench measures the kernel path beside the kernel's own redirect of the
// same frames: what the relay's work costs. Everything runs in namespaces of its
// own, source, relay and sinks on one machine.
//
// The source is BPF_PROG_RUN with live frames, the sinks are XDP programs that
// count and drop. Subjects take turns, so that a change of the machine's pace
// meets all of them; the ratio of the medians is what counts.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintf(os.Stderr, "bench: %v\n", err)
		os.Exit(1)
	}
}

type options struct {
	outputs []int
	size    int
	frames  int
	rounds  int
}

func run(args []string) error {
	flags := flag.NewFlagSet("bench", flag.ContinueOnError)
	var o options
	outputs := flags.String("outputs", "1,4,16", "numbers of outputs to measure")
	flags.IntVar(&o.size, "size", 128, "bytes of an Ethernet frame, 60 to 1514")
	flags.IntVar(&o.frames, "frames", 2_000_000, "copies a measurement")
	flags.IntVar(&o.rounds, "rounds", 7, "measurements of each subject")
	if err := flags.Parse(args); err != nil {
		return err
	}
	for s := range strings.SplitSeq(*outputs, ",") {
		n, err := strconv.Atoi(s)
		if err != nil || n < 1 || n > 64 {
			return fmt.Errorf("outputs %q: want numbers from 1 to 64 with commas between", *outputs)
		}
		o.outputs = append(o.outputs, n)
	}
	if o.size < 60 || o.size > 1514 || o.frames < 1 || o.rounds < 1 {
		return errors.New("want size 60 to 1514, and at least one frame and round")
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintf(w, "outputs\tbare Mcopies/s\txdpcast Mcopies/s\tratio\tspread bare\tspread xdpcast\tns a copy\t\n")
	for _, n := range o.outputs {
		r, err := compare(ctx, o, n)
		if err != nil {
			return fmt.Errorf("%d outputs: %w", n, err)
		}
		fmt.Fprintf(w, "%d\t%.3f\t%.3f\t%.3f\t%.1f%%\t%.1f%%\t%+.1f\t\n", n, r.bare.median/1e6, r.ours.median/1e6,
			r.ours.median/r.bare.median, r.bare.spread*100, r.ours.spread*100, 1e9/r.ours.median-1e9/r.bare.median)
	}
	return w.Flush()
}

type figure struct{ median, spread float64 }

// summarize returns the median, and half the distance of the outer quartiles as a
// part of it.
func summarize(rates []float64) figure {
	slices.Sort(rates)
	n := len(rates)
	median := rates[n/2]
	return figure{median: median, spread: (rates[n*3/4] - rates[n/4]) / 2 / median}
}

type result struct{ bare, ours figure }

// compare measures both subjects in turns.
func compare(ctx context.Context, o options, outputs int) (r result, err error) {
	var bare, ours []float64
	err = inLab(outputs, o.size, func(l *benchLab) error {
		for range o.rounds + 1 {
			for _, s := range []struct {
				attach func() (func() error, error)
				rates  *[]float64
			}{{l.attachBare, &bare}, {l.attachRelay, &ours}} {
				if err := ctx.Err(); err != nil {
					return err
				}
				detach, err := s.attach()
				if err != nil {
					return err
				}
				rate, err := l.measureAgain(o.frames / outputs)
				if err := errors.Join(err, detach()); err != nil {
					return err
				}
				*s.rates = append(*s.rates, rate)
			}
		}
		return nil
	})
	if err != nil {
		return r, err
	}
	// The first of each warms up.
	return result{summarize(bare[1:]), summarize(ours[1:])}, nil
}
