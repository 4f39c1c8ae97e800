package e2e_test

import (
	"encoding/binary"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"xdpcast/internal/control"
)

// What the second leg of TestLegAlarms does.
const (
	legWell = iota
	legDiffers
	legLags
	legSilent
	legsLose // both
)

// A broken leg of a merged stream raises its alarm, as an event, in xdpcast health and in xdpcast status, and so does a loss on all legs. The
// alarm ends with the fault; and the stream goes on meanwhile.
func TestLegAlarms(t *testing.T) {
	l := newLegLab(t)
	l.in.start("-c", l.in.write("rules.yaml", "rules:\n- name: cam\n  in: ["+strings.ReplaceAll(legInputs, " ", ", ")+"]\n  merge: rtp,skew=1s,reset=2s\n  out: 239.2.1.1:6000%out0\n"))
	l.in.waitState("cam", control.StateActive)
	var mode atomic.Int32
	stop, done := make(chan struct{}), make(chan error, 1)
	go func() { done <- l.faulty(&mode, stop) }()
	defer func() {
		close(stop)
		if err := <-done; err != nil {
			t.Error(err)
		}
	}()

	events := func() (texts []string) {
		for _, e := range l.in.events() {
			if e.Kind == "stream" && e.Rule == "cam" {
				texts = append(texts, strings.TrimSpace(fmt.Sprintf("%s %s %s", e.Input, e.State, e.Before)))
			}
		}
		return texts
	}
	has := func(want string) {
		t.Helper()
		eventually(t, "an event says "+want, func() string {
			texts := events()
			for _, text := range texts {
				if text == want {
					return ""
				}
			}
			return fmt.Sprintf("%q", texts)
		})
	}
	eventually(t, "both legs are heard", func() string {
		for _, in := range l.in.rule("cam").Inputs {
			if in.Leg == nil || in.Leg.LastSeen == nil {
				return fmt.Sprintf("%+v", in)
			}
		}
		return ""
	})
	if texts := events(); len(texts) != 0 {
		t.Fatalf("events of a stream that is well: %q", texts)
	}
	for _, fault := range []struct {
		mode                int32
		state, input, alarm string
		lasts               bool // for a minute after the fault
	}{
		{legsLose, "lost", "", " numbers came by no input", true},
		{legDiffers, "different", "in[1]", "in[1] delivers packets that differ from those relayed with the same numbers", false},
		{legLags, "behind", "in[1]", "in[1] is ", false},
		{legSilent, "silent", "in[1]", "in[1] is silent for ", false},
	} {
		mode.Store(fault.mode)
		has(strings.TrimSpace(fault.input + " " + fault.state))
		eventually(t, fault.state+": health and status say so", func() string {
			for _, command := range [][]string{{"health", "cam"}, {"status"}} {
				if text := l.in.mustCLI(command...); !strings.Contains(text, fault.alarm) {
					return fmt.Sprintf("%s says\n%s", command[0], text)
				}
			}
			return ""
		})
		before := l.in.rule("cam").Outputs[0].Sent.Packets
		eventually(t, fault.state+": the stream goes on", func() string {
			if now := l.in.rule("cam").Outputs[0].Sent.Packets; now < before+100 {
				return fmt.Sprintf("%d packets sent, then %d", before, now)
			}
			return ""
		})
		mode.Store(legWell)
		if !fault.lasts {
			has(fault.input + " ended " + fault.state)
		}
	}
	for _, alarm := range l.in.rule("cam").Stream.Alarms {
		if !strings.Contains(alarm, " numbers came by no input") { // it lasts a minute, and so may have ended or not
			t.Errorf("alarm at the end: %q", alarm)
		}
	}
}

// faulty sends a thousand numbers a second on both legs, until stop is closed, with the fault of a mode.
func (l *legLab) faulty(mode *atomic.Int32, stop chan struct{}) error {
	const lag = 40_000 // of the 49,151 numbers that a leg may be behind
	ticks := time.NewTicker(time.Millisecond)
	defer ticks.Stop()
	number, last := uint32(0), int32(legWell)
	for {
		select {
		case <-stop:
			return nil
		case <-ticks.C:
		}
		now := mode.Load()
		skip := uint32(0)
		if now != last {
			switch now {
			case legLags: // the first leg gets ahead
				for i := range lag {
					if err := l.legs[0].send(number); err != nil {
						return err
					}
					number++
					if i%100 == 0 {
						time.Sleep(time.Millisecond) // the pace of the stream, not a wait for something
					}
				}
			case legsLose:
				skip = 10
			}
		}
		last = now
		number += skip
		if err := l.legs[0].send(number); err != nil {
			return err
		}
		var err error
		switch now {
		case legDiffers:
			err = l.legs[1].sendOther(number)
		case legLags:
			err = l.legs[1].send(number - lag)
		case legSilent:
		default:
			err = l.legs[1].send(number)
		}
		if err != nil {
			return err
		}
		number++
	}
}

// sendOther sends a packet with a number, and other data than send.
func (s *legSender) sendOther(number uint32) error {
	p := make([]byte, 100)
	p[0], p[1] = 0x80, 96
	binary.BigEndian.PutUint16(p[2:], uint16(number))
	binary.BigEndian.PutUint32(p[8:], 7)
	copy(p[20:], "another picture")
	return unix.Sendto(s.fd, p, 0, &s.to)
}
