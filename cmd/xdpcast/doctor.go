package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/urfave/cli/v2"

	"xdpcast/internal/control"
	"xdpcast/internal/doctor"
)

func doctorCommand(now func() time.Time) *cli.Command {
	return &cli.Command{
		Name:      "doctor",
		Usage:     "report what stops or slows packets, and how to fix it",
		ArgsUsage: "[RULE]",
		Description: "Checks the host and the interfaces that rules use, or with --interface others, too. With RULE it follows\n" +
			"that rule's packets from the card to the wire, and says where they stop. Counters are read twice, --for apart.\n" +
			"Each finding has the command that fixes it. A fault stops packets; a warning may stop or slows them, or\n" +
			"reports earlier losses.\n" +
			"It also works without a daemon: from the state pinned in the kernel, or only for the network cards.\n\n" +
			"Exit codes: 0 no fault, 1 a fault (with --strict a warning, too) or an error, 2 wrong usage, also for an unknown RULE.",
		Flags: []cli.Flag{
			&cli.StringSliceFlag{Name: "interface", Aliases: []string{"i"}, Usage: "also check `IFACE` (repeatable)"},
			&cli.DurationFlag{Name: "for", Usage: "`TIME` between two readings of the counters", Value: 2 * time.Second},
			&cli.BoolFlag{Name: "strict", Usage: "exit code 1 for warnings, too"},
			&cli.BoolFlag{Name: "all", Aliases: []string{"a"}, Usage: "also show passed checks"},
			pinDirFlag(),
			outputFlag(),
		},
		Action: func(c *cli.Context) error { return diagnose(c, now) },
	}
}

func diagnose(c *cli.Context, now func() time.Time) error {
	if err := showArgs(c, 0, 1); err != nil {
		return err
	}
	apart := c.Duration("for")
	if apart < minInterval || apart > time.Hour {
		return usagef("--for %v: want %v to 1h", apart, minInterval)
	}
	daemon := client(c)
	facts, err := doctor.Gather(c.Context, doctor.Options{
		Daemon: daemon, PinDir: c.String("pin-dir"), Interfaces: c.StringSlice("interface"), Rule: c.Args().First(), Apart: apart,
		Root: os.DirFS("/"),
		Stats: func(ctx context.Context) (control.Stats, error) {
			s, err := daemon.Stats(ctx)
			return orKernel(c, s, err, now())
		},
	})
	if errors.Is(err, doctor.ErrNoRule) {
		return usagef("%w: \"xdpcast rule list\" lists the rules", err)
	}
	if err != nil {
		return withRootHint(err)
	}
	report := doctor.Diagnose(facts)
	if missing := missingCapabilities(needsOf(c)); missing != "" {
		fmt.Fprintf(c.App.ErrWriter, "xdpcast: warning: some checks are skipped without %s (see capabilities(7))\n", missing)
	}
	if err := show(c, report, func(w io.Writer) error { return reportText(w, report, c.Bool("all")) }); err != nil {
		return err
	}
	if report.Faults > 0 || c.Bool("strict") && report.Warnings > 0 {
		return cli.Exit("", exitFailed) // the report says why
	}
	return nil
}

// reportText prints faults and warnings with their cures, and with all also passed checks.
func reportText(w io.Writer, r doctor.Report, all bool) error {
	for _, s := range r.Sections {
		fmt.Fprintf(w, "%s\n", printable(s.Title()))
		fine := 0
		for _, f := range s.Findings {
			if f.Level == doctor.OK && !all && s.Kind != "rule" {
				fine++
				continue
			}
			fmt.Fprintf(w, "  %-7s  %-12s  %s\n", f.Level, printable(f.Check), printable(f.Text))
			if f.Cure != "" {
				fmt.Fprintf(w, "  %-7s  %-12s  cure: %s\n", "", "", printable(f.Cure))
			}
		}
		if fine > 0 {
			fmt.Fprintf(w, "  %-7s  %s\n", "ok", plural(fine, "check"))
		}
		if s.Verdict != "" {
			fmt.Fprintf(w, "  %s\n", printable(s.Verdict))
		}
		fmt.Fprintln(w)
	}
	_, err := fmt.Fprintf(w, "%s, %s\n", plural(r.Faults, "fault"), plural(r.Warnings, "warning"))
	return err
}
