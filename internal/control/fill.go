package control

// The functions here replace nil lists by empty ones, so that clients always find a list where one
// is documented.

func orEmpty[T any](s []T) []T {
	if s == nil {
		return []T{}
	}
	return s
}

func (r *Rule) fill() { r.Out = orEmpty(r.Out) }

func (r *RuleStatus) fill() {
	r.Rule.fill()
	r.Drops = orEmpty(r.Drops)
	r.Outputs = orEmpty(r.Outputs)
	r.Inputs = orEmpty(r.Inputs)
	for i := range r.Outputs {
		r.Outputs[i].Drops = orEmpty(r.Outputs[i].Drops)
	}
}

func (s *Status) fill() {
	s.Interfaces = orEmpty(s.Interfaces)
	for i := range s.Interfaces {
		s.Interfaces[i].Roles = orEmpty(s.Interfaces[i].Roles)
	}
	s.Workers = orEmpty(s.Workers)
	for i := range s.Workers {
		s.Workers[i].Lost = orEmpty(s.Workers[i].Lost)
		s.Workers[i].Senders = orEmpty(s.Workers[i].Senders)
	}
	s.Drops = orEmpty(s.Drops)
	s.Warnings = orEmpty(s.Warnings)
}

func (s *Stats) fill() {
	s.Rules = orEmpty(s.Rules)
	for i := range s.Rules {
		s.Rules[i].fill()
	}
	s.Drops = orEmpty(s.Drops)
	s.TransmitDrops = orEmpty(s.TransmitDrops)
	s.ReceiveDrops = orEmpty(s.ReceiveDrops)
}

func (a *ApplyResult) fill() {
	a.Changes = orEmpty(a.Changes)
	for i := range a.Changes {
		a.Changes[i].Rule.fill()
		if a.Changes[i].Old != nil {
			a.Changes[i].Old.fill()
		}
	}
}

func (e *Explanation) fill() {
	e.Candidates = orEmpty(e.Candidates)
	e.Outputs = orEmpty(e.Outputs)
	e.Memberships = orEmpty(e.Memberships)
}

// Fill replaces nil lists by empty ones, as in the API.
func (s *Status) Fill() { s.fill() }

// Fill is Status.Fill.
func (s *Stats) Fill() { s.fill() }
