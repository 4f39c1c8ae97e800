package main

import (
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"xdpcast/pkg/control"
)

func statusCommand(now func() time.Time) *cli.Command {
	return &cli.Command{
		Name:  "status",
		Usage: "show the daemon and its interfaces",
		Flags: []cli.Flag{pinDirFlag(), outputFlag()},
		Action: func(c *cli.Context) error {
			if err := showArgs(c, 0, 0); err != nil {
				return err
			}
			status, err := client(c).Status(c.Context)
			if errors.Is(err, control.ErrNotRunning) {
				return explainNotRunning(c, err, now())
			}
			if err != nil {
				return err
			}
			return show(c, status, func(w io.Writer) error { return statusText(w, status, now()) })
		},
	}
}

// explainNotRunning adds to the error what goes on without a daemon.
func explainNotRunning(c *cli.Context, notRunning error, now time.Time) error {
	s, err := kernelStats(c.String("pin-dir"), now)
	if err != nil {
		return notRunning
	}
	return fmt.Errorf("%w; the kernel goes on relaying %d rules without it, but holds no memberships: see \"xdpcast stats\"", notRunning, len(s.Rules))
}

func statusText(w io.Writer, s control.Status, now time.Time) error {
	ready := "ready"
	if !s.Ready {
		ready = "not ready: the rules are not in yet"
	}
	head := newTable("version", s.Version)
	head.add("state", fmt.Sprintf("%s, pid %d, up %s", ready, s.PID, age(now.Sub(s.Started))))
	head.add("file", orDash(s.Config))
	head.add("pins", fmt.Sprintf("%s, schema %d", s.PinDir, s.Schema))
	head.add("rules", fmt.Sprintf("%d: %d active, %d pending, %d failed", s.Rules, s.Active, s.Pending, s.Failed))
	head.add("passed", fmt.Sprintf("%s packets, %s that no rule matched", humanCount(s.Passed.Packets), humanBytes(s.Passed.Bytes)))
	for _, warning := range s.Warnings {
		head.add("warning", warning)
	}
	if err := head.write(w); err != nil {
		return err
	}
	if len(s.Interfaces) > 0 {
		fmt.Fprintln(w)
		if err := interfaceTable(w, s.Interfaces); err != nil {
			return err
		}
	}
	return dropTable(w, s.Drops)
}

func interfaceTable(w io.Writer, interfaces []control.InterfaceStatus) error {
	t := newTable("INTERFACE", ">INDEX", "MODE", "ROLES", ">PROGRAM", ">LINK", ">JOINED", ">FAILED", ">LEFT", ">UNSENT", "NOTE")
	for _, i := range interfaces {
		t.add(i.Name, orNone(i.Index), orDash(i.Mode), orDash(strings.Join(i.Roles, "+")), orNone(int(i.ProgramID)), orNone(int(i.LinkID)),
			humanCount(i.JoinsSucceeded), humanCount(i.JoinsFailed), humanCount(i.LeavesSucceeded), humanCount(i.TransmitDrops), i.Note)
	}
	return t.write(w)
}

// orNone shows a kernel's number, which is never 0.
func orNone(n int) string {
	if n == 0 {
		return "-"
	}
	return strconv.Itoa(n)
}
