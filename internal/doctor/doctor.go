// Package doctor says what keeps packets from moving, or from moving fast, on this host, and
// the command that cures each fault.
//
// Gather reads Facts: the host's network once, counters twice. Everything behind it is pure:
// Diagnose runs every check on the facts and makes a Report of them.
package doctor

import (
	"fmt"
	"strings"
)

// Level says how bad a finding is.
type Level uint8

// The levels. A fault keeps packets from moving now. A warning may, or slows them down, or
// speaks of packets lost earlier.
const (
	OK Level = iota
	Warning
	Fault
)

func (l Level) String() string {
	switch l {
	case Warning:
		return "warning"
	case Fault:
		return "fault"
	default:
		return "ok"
	}
}

// MarshalText implements encoding.TextMarshaler.
func (l Level) MarshalText() ([]byte, error) { return []byte(l.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (l *Level) UnmarshalText(text []byte) error {
	for _, known := range []Level{OK, Warning, Fault} {
		if known.String() == string(text) {
			*l = known
			return nil
		}
	}
	return fmt.Errorf("level %q: want ok, warning or fault", text)
}

// Finding is what one check says.
type Finding struct {
	// Check is the check's name, stable for scripts.
	Check string `json:"check"`
	Level Level  `json:"level"`
	// Text says in one line what was found.
	Text string `json:"text"`
	// Cure is the command that cures it, or where no command does, what to do. Empty for OK.
	Cure string `json:"cure,omitempty"`
	// Packets is how many were counted between the two readings, where the check counts.
	Packets uint64 `json:"packets,omitempty"`
}

// Section is the findings on one thing.
type Section struct {
	// Kind is "host", "interface" or "rule".
	Kind string `json:"kind"`
	// Name is the interface's or the rule's; empty for the host.
	Name     string    `json:"name,omitempty"`
	Findings []Finding `json:"findings"`
	// Verdict says of a rule where its packets end.
	Verdict string `json:"verdict,omitempty"`
}

// Title names the section for people.
func (s *Section) Title() string { return strings.TrimSpace(s.Kind + " " + s.Name) }

// Report is what the doctor says.
type Report struct {
	Sections []Section `json:"sections"`
	Faults   int       `json:"faults"`
	Warnings int       `json:"warnings"`
}

// add appends a section and counts what is in it.
func (r *Report) add(s Section) {
	for _, f := range s.Findings {
		switch f.Level {
		case Fault:
			r.Faults++
		case Warning:
			r.Warnings++
		}
	}
	r.Sections = append(r.Sections, s)
}

// Diagnose runs every check. The rule comes first where one is asked for, then its interfaces.
func Diagnose(f *Facts) Report {
	r := Report{Sections: []Section{}}
	if f.Rule != nil {
		r.add(follow(f))
	}
	host := Section{Kind: "host"}
	for _, c := range hostChecks {
		host.Findings = append(host.Findings, named(c.name, c.fine, c.run(&f.Host))...)
	}
	r.add(host)
	for i := range f.Interfaces {
		s := Section{Kind: "interface", Name: f.Interfaces[i].Name}
		for _, c := range interfaceChecks {
			s.Findings = append(s.Findings, named(c.name, c.fine, c.run(&f.Interfaces[i]))...)
			if c.name == checkPresent && f.Interfaces[i].Link == nil {
				break // there is nothing to look at
			}
		}
		r.add(s)
	}
	return r
}

// named gives findings the name of their check, which has one at least.
func named(check, fine string, found []Finding) []Finding {
	if len(found) == 0 {
		found = []Finding{{Text: fine}}
	}
	for i := range found {
		found[i].Check = check
	}
	return found
}

// fault and warning make a finding with its cure.
func fault(cure, format string, args ...any) Finding {
	return Finding{Level: Fault, Text: fmt.Sprintf(format, args...), Cure: cure}
}

func warning(cure, format string, args ...any) Finding {
	return Finding{Level: Warning, Text: fmt.Sprintf(format, args...), Cure: cure}
}

// one is a list of one finding.
func one(f Finding) []Finding { return []Finding{f} }
