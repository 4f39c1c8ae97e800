package main

import (
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"xdpcast/internal/control"
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

// explainNotRunning adds to the error what keeps working without a daemon.
func explainNotRunning(c *cli.Context, notRunning error, now time.Time) error {
	s, err := kernelStats(c.String("pin-dir"), now)
	if err != nil {
		return notRunning
	}
	return fmt.Errorf("%w; the kernel keeps relaying %d rules without it, but holds no memberships: see \"xdpcast stats\"", notRunning, len(s.Rules))
}

func statusText(w io.Writer, s control.Status, now time.Time) error {
	ready := "ready"
	if !s.Ready {
		ready = "not ready: the rules are not loaded yet"
	}
	head := newTable("version", s.Version)
	head.add("state", fmt.Sprintf("%s, pid %d, up %s", ready, s.PID, age(now.Sub(s.Started))))
	head.add("file", orDash(s.Config))
	head.add("pins", fmt.Sprintf("%s, schema %d", s.PinDir, s.Schema))
	head.add("rules", fmt.Sprintf("%d: %d active, %d pending, %d failed", s.Rules, s.Active, s.Pending, s.Failed))
	if m := s.Mroutes; m != nil {
		head.add("routes", fmt.Sprintf("%s: %d forwarded in XDP, %d left to the kernel", plural(m.Entries, "multicast route"), m.Accelerated, m.Entries-m.Accelerated))
	}
	head.add("passed", fmt.Sprintf("%s packets, %s that no rule matched", humanCount(s.Passed.Packets), humanBytes(s.Passed.Bytes)))
	if u := s.Unconfirmed; u != nil {
		head.add("unconfirmed", fmt.Sprintf("%s, undone in %s without \"xdpcast confirm\"", doneBy(u.What, u.UID), age(u.Until.Sub(now))))
	}
	for _, warning := range s.Warnings {
		head.add("warning", warning)
	}
	if err := head.write(w); err != nil {
		return err
	}
	if err := leftTable(w, s.Mroutes); err != nil {
		return err
	}
	if len(s.Interfaces) > 0 {
		fmt.Fprintln(w)
		if err := interfaceTable(w, s.Interfaces); err != nil {
			return err
		}
	}
	if len(s.Workers) > 0 {
		if err := workerTables(w, s.Workers); err != nil {
			return err
		}
	}
	return dropTable(w, s.Drops)
}

// leftTable has a line for each reason why multicast routes are left to the kernel.
func leftTable(w io.Writer, m *control.MrouteStatus) error {
	if m == nil || len(m.Left) == 0 {
		return nil
	}
	fmt.Fprintln(w)
	t := newTable(">ROUTES LEFT", "FIRST", "REASON")
	for _, l := range m.Left {
		t.add(strconv.Itoa(l.Entries), l.First, l.Reason)
	}
	return t.write(w)
}

// workerTables has a line for each worker of the user-space paths, with the kernel's counters, and
// one for each of its output interfaces.
func workerTables(w io.Writer, workers []control.Worker) error {
	t := newTable("WORKER ON", "PATH", ">QUEUE", "STATE", "MODE", "WAKEUP", ">RECEIVED", ">RING FULL", ">NO FRAME", ">RULE GONE",
		">RX INVALID", ">TX INVALID", ">FILL EMPTY", ">TX EMPTY", ">FAILURES", "CAUSE")
	senders := newTable("WORKER ON", ">QUEUE", "SENDS ON", ">TX QUEUE", "MODE", "STATE", ">LOST", "CAUSE")
	for i := range workers {
		o := &workers[i]
		row := append([]string{o.Interface, o.Path, strconv.Itoa(o.Queue), o.State, workerMode(o)}, receiveCells(o)...)
		t.add(append(row, humanCount(o.Failures), o.Cause)...)
		for _, s := range o.Senders {
			queue := "-"
			if s.Queue >= 0 {
				queue = strconv.Itoa(s.Queue)
			}
			senders.add(o.Interface, strconv.Itoa(o.Queue), s.Interface, queue, s.Mode, s.State, humanCount(s.Lost), s.Cause)
		}
	}
	fmt.Fprintln(w)
	if err := t.write(w); err != nil || len(senders.rows) == 1 {
		return err
	}
	fmt.Fprintln(w)
	return senders.write(w)
}

func workerMode(o *control.Worker) string {
	switch {
	case o.Group != 0:
		return fmt.Sprintf("%s, group %d", o.Mode, o.Group)
	case o.Socket != nil && o.Socket.MultiBuffer:
		return o.Mode + ", multi-buffer"
	}
	return orDash(o.Mode)
}

// receiveCells are received and lost packets of a worker; a dash if the path has no such counter.
func receiveCells(o *control.Worker) []string {
	lost := map[string]uint64{}
	for _, l := range o.Lost {
		lost[l.Reason] = l.Packets
	}
	full, received := humanCount(lost["ring_full"]), humanCount(o.Received)
	s := o.Socket
	if s == nil {
		return []string{"-", received, full, "-", "-", "-", "-", "-", "-"}
	}
	return []string{wakeup(s), received, full, humanCount(lost["no_frame"]), humanCount(lost["rule_gone"]),
		humanCount(s.RXInvalidDescs), humanCount(s.TXInvalidDescs), humanCount(s.RXFillRingEmpty), humanCount(s.TXRingEmpty)}
}

// wakeup lists the directions in which the kernel needs wakeups.
func wakeup(s *control.SocketStatus) string {
	switch {
	case s.RXNeedWakeup && s.TXNeedWakeup:
		return "rx+tx"
	case s.RXNeedWakeup:
		return "rx"
	case s.TXNeedWakeup:
		return "tx"
	}
	return "no"
}

func interfaceTable(w io.Writer, interfaces []control.InterfaceStatus) error {
	t := newTable("INTERFACE", ">INDEX", "STATE", "MODE", "ROLES", ">PROGRAM", ">LINK", ">JOINED", ">FAILED", ">LEFT", ">UNSENT", "NOTE")
	for _, i := range interfaces {
		t.add(i.Name, orNone(i.Index), orDash(i.Link), orDash(i.Mode), orDash(strings.Join(i.Roles, "+")), orNone(int(i.ProgramID)), orNone(int(i.LinkID)),
			humanCount(i.JoinsSucceeded), humanCount(i.JoinsFailed), humanCount(i.LeavesSucceeded), humanCount(i.TransmitDrops), interfaceNote(i))
	}
	return t.write(w)
}

// interfaceNote is a hint about an interface.
func interfaceNote(i control.InterfaceStatus) string {
	if i.Master == "" {
		return i.Note
	}
	return strings.TrimSuffix("port of "+i.Master+"; "+i.Note, "; ")
}

// orNone formats an id of the kernel, which is never 0.
func orNone(n int) string {
	if n == 0 {
		return "-"
	}
	return strconv.Itoa(n)
}
