package rules

// fromHost checks an input of packets sent by this host itself: they need no membership, and pass
// only the packet tap.
func (e end) fromHost(in Input, accept Acceptance, path Path) {
	const field = ".from"
	switch {
	case !in.FromHost:
	case path != PathAuto && path != PathFanout:
		e.fault(nil, field, "host", "path auto or fanout: packets that this host sends do not pass path "+path.String())
	case accept.Join != JoinDefault:
		e.fault(nil, field, "host", "no join: packets that this host sends need no membership")
	case accept.Local:
		e.fault(nil, field, "host", "no local: the host's receivers get its packets anyway")
	case in.Address.IsValid() && !in.Multicast() && !accept.Broadcast:
		e.fault(nil, field, "host", "a multicast group, or broadcast=allow")
	}
}
