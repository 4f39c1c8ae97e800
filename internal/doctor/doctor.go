// Package doctor reports what stops or slows packets on this host, and the command that cures each
// fault.
//
// Gather reads Facts: the host's network once, counters twice. Everything after it is pure:
// Diagnose runs every check on the facts and makes a Report of them.
package doctor

import (
	"fmt"
	"strings"
)

// Level is the severity of a finding.
type Level uint8

// The levels. A fault stops packets now. A warning may stop or slow them, or reports packets lost
// earlier.
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

// Finding is one result of a check.
type Finding struct {
	// Check is the check's name, stable for scripts.
	Check string `json:"check"`
	Level Level  `json:"level"`
	// Text is the finding in one line.
	Text string `json:"text"`
	// Cure is the command that fixes it or, if no command does, what to do. Empty for OK.
	Cure string `json:"cure,omitempty"`
	// Packets is the number counted between the two readings, for checks that count.
	Packets uint64 `json:"packets,omitempty"`
}

// Section is the findings about one thing.
type Section struct {
	// Kind is "host", "interface" or "rule".
	Kind string `json:"kind"`
	// Name is that of the interface or rule; empty for the host.
	Name     string    `json:"name,omitempty"`
	Findings []Finding `json:"findings"`
	// Verdict says where a rule's packets end.
	Verdict string `json:"verdict,omitempty"`
}

// Title names the section for people.
func (s *Section) Title() string { return strings.TrimSpace(s.Kind + " " + s.Name) }

// Report is the result of Diagnose.
type Report struct {
	Sections []Section `json:"sections"`
	Faults   int       `json:"faults"`
	Warnings int       `json:"warnings"`
}

// add appends a section and counts its findings.
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

// Diagnose runs every check. The requested rule, if any, comes first, then the host, then the
// interfaces.
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
	if f.Host.Process.Elsewhere {
		return r // the daemon's interfaces are others, even if they have the same names
	}
	for i := range f.Interfaces {
		s := Section{Kind: "interface", Name: f.Interfaces[i].Name}
		for _, c := range interfaceChecks {
			s.Findings = append(s.Findings, named(c.name, c.fine, c.run(&f.Interfaces[i]))...)
			if c.name == checkPresent && f.Interfaces[i].Link == nil {
				break // nothing else can be checked
			}
		}
		r.add(s)
	}
	return r
}

// named sets the check's name in its findings; without any it adds one with the text fine.
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

// one returns a list of one finding.
func one(f Finding) []Finding { return []Finding{f} }
