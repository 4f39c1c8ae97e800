// Package events is the log of state changes: a bounded number of events, with consecutive numbers,
// in memory and, the newest of them, in a file. Adding an event never waits for a reader or for the
// file.
package events

import (
	"fmt"
	"strings"
	"time"
)

// Kind is the subject of an event.
type Kind string

// The kinds.
const (
	KindDaemon     Kind = "daemon"     // started, or about to end
	KindRule       Kind = "rule"       // its state: added, active, pending, failed, removed
	KindOutput     Kind = "output"     // the state of one output of a rule
	KindPath       Kind = "path"       // the path of a rule's packets
	KindMembership Kind = "membership" // a group on an interface
	KindInterface  Kind = "interface"  // its link
	KindProgram    Kind = "program"    // the relay program on an interface
	KindNeighbour  Kind = "neighbour"  // the next hop of unicast outputs
	KindQuerier    Kind = "querier"    // the querier on an interface
	KindLoop       Kind = "loop"       // packets of a rule that come back
	KindStream     Kind = "stream"     // what the inputs of a rule bring
	KindReload     Kind = "reload"     // of the daemon's file
	// KindMissed has no number: Count events were discarded before they were read.
	KindMissed Kind = "missed"
)

// Kinds returns all kinds that are logged.
func Kinds() []Kind {
	return []Kind{KindDaemon, KindRule, KindOutput, KindPath, KindMembership, KindInterface, KindProgram, KindNeighbour, KindQuerier, KindLoop, KindStream, KindReload}
}

// Event is one change of state. The kind determines which of the other fields are set.
type Event struct {
	// Number is the previous event's plus one; 0 for KindMissed.
	Number uint64    `json:"number,omitempty"`
	Time   time.Time `json:"time"`
	Kind   Kind      `json:"kind"`

	Rule      string `json:"rule,omitempty"`
	Output    string `json:"output,omitempty"` // an endpoint as in rules
	Input     string `json:"input,omitempty"`  // of several inputs as errors name it: in[1]
	Interface string `json:"interface,omitempty"`
	Group     string `json:"group,omitempty"`   // [SOURCE@]GROUP
	Address   string `json:"address,omitempty"` // of a neighbour or a querier

	// State is the new state, and Before the old one; empty if there was none.
	State  string `json:"state"`
	Before string `json:"before,omitempty"`
	// Cause is the reason in one line.
	Cause string `json:"cause,omitempty"`

	// Count is more than 1 if the event summarizes that many events of one kind and state, which
	// came too fast to log individually: the other fields are those of the first one, and Last
	// names the last one.
	Count uint64 `json:"count,omitempty"`
	Last  string `json:"last,omitempty"`
}

// Subject names the subject of the event: "rule cam1".
func (e *Event) Subject() string {
	var of string
	switch e.Kind {
	case KindRule, KindPath, KindLoop:
		of = e.Rule
		if e.Interface != "" {
			of += " on " + e.Interface
		}
	case KindStream:
		of = e.Rule + " " + e.Input
	case KindOutput:
		of = e.Output + " of rule " + e.Rule
		if e.Interface != "" {
			of += " from " + e.Interface
		}
	case KindMembership:
		of = e.Group + "%" + e.Interface
	case KindInterface, KindProgram:
		of = e.Interface
	case KindNeighbour:
		of = e.Address + " on " + e.Interface
	case KindQuerier:
		of = e.Address + " on " + e.Interface
	}
	return strings.TrimSpace(string(e.Kind) + " " + of)
}

// Text describes the event in one line, without time and number.
func (e *Event) Text() string {
	var b strings.Builder
	if e.Kind == KindMissed {
		fmt.Fprintf(&b, "%d events missed", e.Count)
	} else {
		b.WriteString(e.Subject())
		if e.Count > 1 {
			fmt.Fprintf(&b, " and %d more, the last %s", e.Count-1, e.Last)
		}
		b.WriteString(": " + e.State)
		if e.Before != "" {
			b.WriteString(", was " + e.Before)
		}
	}
	if e.Cause != "" {
		b.WriteString(": " + e.Cause)
	}
	return b.String()
}

// texts are the fields with foreign text.
func (e *Event) texts() []*string {
	return []*string{&e.Rule, &e.Output, &e.Input, &e.Interface, &e.Group, &e.Address, &e.State, &e.Before, &e.Cause, &e.Last}
}

// maxText limits each text of an event, in bytes.
const maxText = 512

// bound truncates long texts.
func (e *Event) bound() {
	for _, text := range e.texts() {
		if len(*text) > maxText {
			*text = strings.ToValidUTF8((*text)[:maxText-3], "") + "..."
		}
	}
}

// size is the approximate memory size of the event, in bytes.
func (e *Event) size() int {
	n := 256
	for _, text := range e.texts() {
		n += len(*text)
	}
	return n
}
