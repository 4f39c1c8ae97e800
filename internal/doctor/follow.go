package doctor

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"

	"xdpcast/internal/control"
	"xdpcast/pkg/rules"
)

// follow traces a rule's packets from the card to the wire. Its findings are in the order of the
// packets' path, and the verdict says where the path ends.
func follow(f *Facts) Section {
	w := way{r: f.Rule, daemon: f.Host.Daemon != nil}
	w.inputs, _ = rules.ParseInputs(w.now().In) // Gather reports an error
	w.state()
	for _, bad := range namespace(&f.Host) {
		w.elsewhere = true
		w.add("namespace", 0, bad)
	}
	if !slices.ContainsFunc(w.inputs, func(in rules.Input) bool { return in.FromHost }) {
		w.card()
		w.memberships()
	}
	w.matched()
	w.dropped()
	w.noted()
	w.workers()
	w.outputs()
	w.wire()
	return Section{Kind: "rule", Name: f.Rule.Name, Findings: w.found, Verdict: w.verdict()}
}

// way collects the findings along the path.
type way struct {
	r      *Rule
	daemon bool
	// elsewhere: the interfaces that were looked at are of another namespace than the daemon's.
	elsewhere bool
	inputs    []rules.Input // of the rule
	found     []Finding
	// end is where packets end, in words: the first point found.
	end string
}

func (w *way) now() *control.RuleStatus { return &w.r.Status[1] }

func (w *way) add(check string, packets uint64, f Finding) {
	f.Check, f.Packets = check, packets
	w.found = append(w.found, f)
}

// ends records where packets end, unless they end earlier.
func (w *way) ends(format string, args ...any) {
	if w.end == "" {
		w.end = fmt.Sprintf(format, args...)
	}
}

// groups are the addresses of the inputs.
func (w *way) groups() string {
	return w.each(func(in rules.Input) string { return in.Address.String() })
}

// interfaces are the interfaces of the inputs, as the rule names them.
func (w *way) interfaces() string {
	return w.each(func(in rules.Input) string { return in.Interface })
}

func (w *way) each(text func(rules.Input) string) string {
	var all []string
	for _, in := range w.inputs {
		if s := text(in); !slices.Contains(all, s) {
			all = append(all, s)
		}
	}
	return strings.Join(all, " and ")
}

func fine(format string, args ...any) Finding { return Finding{Text: fmt.Sprintf(format, args...)} }

// grown is the increase of a counter; one that ran backwards is a new counter.
func grown(before, now uint64) uint64 {
	if now < before {
		return now
	}
	return now - before
}

func (w *way) state() {
	s := w.now()
	switch s.State {
	case control.StateActive:
		text := "active on the path " + s.UsedPath
		if e := w.r.Explained; e != nil && e.PathReason != "" {
			text += ": " + strings.TrimPrefix(e.PathReason, "path "+e.Path+": ")
		}
		w.add("state", 0, fine("%s", text))
	case control.StateLooping:
		w.add("state", 0, fault("xdpcast explain "+w.r.Name, "its packets come back to it: %s", s.Reason))
	default:
		w.add("state", 0, fault("xdpcast rule show "+w.r.Name, "%s: %s", s.State, s.Reason))
		if s.UsedPath == "" {
			w.ends("at the rule, which is not active: %s", s.Reason)
		}
	}
}

// card checks the inputs.
func (w *way) card() {
	if len(w.r.Inputs) == 0 {
		w.add("input", 0, fault("ip link", "no interface matches %s", w.interfaces()))
		w.ends("before the host: no interface matches %s", w.interfaces())
	}
	for _, i := range w.r.Inputs {
		if w.elsewhere {
			break
		}
		if bad := present(i); len(bad) > 0 {
			w.add("input", 0, bad[0])
			if len(w.r.Inputs) == 1 {
				w.ends("before the host: %s", bad[0].Text)
			}
			continue
		}
		for _, f := range slices.Concat(program(i), lost(i), vlan(i), filter(i)) {
			w.add("input", 0, f)
		}
		n := grown(i.Device[0].Counters.RxPackets, i.Device[1].Counters.RxPackets)
		switch {
		case n > 0:
			w.add("card", n, fine("%s received %d packets of all kinds in %v", i.Name, n, w.r.Apart))
		case w.count() > 0: // the driver does not count packets that programs take
			w.add("card", 0, fine("%s does not count what XDP takes", i.Name))
		default:
			w.add("card", 0, warning("ethtool -S "+i.Name, "%s received nothing at all in %v", i.Name, w.r.Apart))
		}
	}
}

func (w *way) memberships() {
	if !slices.ContainsFunc(w.inputs, func(in rules.Input) bool { return in.Address.IsMulticast() }) {
		return
	}
	if !w.daemon {
		w.add("membership", 0, fault("systemctl start xdpcast", "no daemon runs: the group is not joined, and the network may not deliver it"))
		return
	}
	if len(w.r.Groups) == 0 {
		w.add("membership", 0, fine("the rule joins no group"))
	}
	for _, g := range w.r.Groups {
		name := g.Group
		if g.Source != "" {
			name = g.Source + "@" + name
		}
		switch {
		case g.State != control.GroupJoined:
			w.add("membership", 0, fault("xdpcast group show "+g.Group, "%s is not joined on %s: %s", name, g.Interface, cmp.Or(g.Cause, g.State)))
		case g.Querier == "" && g.Version != "":
			w.add("membership", 0, fine("%s is joined on %s by %s; no querier was heard there, which a switch that snoops needs", name, g.Interface, g.Version))
		default:
			w.add("membership", 0, fine("%s is joined on %s by %s, querier %s", name, g.Interface, g.Version, g.Querier))
		}
	}
}

// count is the number of packets that matched between the readings.
func (w *way) count() uint64 {
	return grown(w.r.Status[0].Matched.Packets, w.now().Matched.Packets)
}

func (w *way) matched() {
	if n := w.count(); n > 0 {
		w.add("matched", n, fine("%d packets matched in %v", n, w.r.Apart))
		return
	}
	last := "none has since the rule came"
	if t := w.now().LastSeen; t != nil {
		last = fmt.Sprintf("the last one did %v ago", time.Since(*t).Round(time.Second))
	}
	if len(w.r.Seen) == 0 {
		cure := "have the sender send to " + w.groups() + ", and its TTL be large enough; xdpcast discover -i " + strings.ReplaceAll(w.interfaces(), " and ", " -i ") + " lists what comes"
		w.add("matched", 0, fault(cure, "no packet matched in %v: %s", w.r.Apart, last))
		w.ends("before the host: nothing that the rule takes came in on %s within %v", w.interfaces(), w.r.Apart)
		return
	}
	var streams []string
	for _, s := range w.r.Seen {
		streams = append(streams, fmt.Sprintf("%s (%d packets)", s.Stream, s.Packets))
	}
	cure := fmt.Sprintf("xdpcast rule del %s; xdpcast rule add %s --in %s ...", w.r.Name, w.r.Name, w.r.Seen[0].Stream)
	w.add("matched", 0, fault(cure, "no packet matched in %v: %s. What comes in instead: %s", w.r.Apart, last, some(streams)))
	w.ends("at the flow table: packets for %s come in on %s, and the rule takes %s, not %s", w.groups(), w.r.Seen[0].Interface, w.now().In, w.r.Seen[0].Stream)
}

// cures maps drop reasons to cures, in which RULE and DEVICE are replaced.
var cures = map[string]string{
	"loop":         "find the host that sends the relay's packets back; or loop=allow on the input, if that is intended",
	"looping":      "xdpcast rule show RULE names the path that they take: break it",
	"ttl":          "raise the sender's TTL, or write ttl=N instead of ttl=dec on the output",
	"mtu":          "ip link set dev DEVICE mtu N on the output's interface, or shorter packets at the sender",
	"multi_buffer": "a smaller MTU on the input, ethtool -K DEVICE lro off, or path: fanout",
	"not_ready":    "xdpcast rule show RULE shows what the output waits for",
	"no_neighbour": "ip neigh show: the next hop does not answer ARP or ND; ping it",
	"port":         "a smaller shift of the port in the output",
	"policed":      "a higher rate= of the rule or output",
	"no_socket":    "systemctl start xdpcast: a rule of the path afxdp needs the daemon",
	"tx_full":      "xdpcast status: the device's queue is full; more queues, or --afxdp-frames N",
	"cpu_full":     "run with more --fanout-workers, or --fanout-steer off",
	"no_device":    "ip link: the output's device is down, gone, or does not send redirected frames",
	"no_carrier":   "the output's cable, or the other end",
	"worker_lost":  "xdpcast status, RING FULL: the worker does not keep up; --afxdp-cpus, or path: kernel",
	"no_checksum":  "csum=any on the input takes IPv6 without a UDP checksum",
	"duplicate":    "nothing: another input received the number first",
	"standby":      "nothing: another input is active",
	"late":         "xdpcast health: inputs further apart than skew=; a larger one, or inputs that are closer",
	"astray":       "xdpcast health: which input's numbers jump, or has another sender?",
	"old_session":  "xdpcast health: which input still receives the previous sender?",
	"no_number":    "another merge= format, or other=pass",
	"contended":    "please report it, with the output of xdpcast doctor",
	"internal":     "please report it, with the output of xdpcast doctor",
}

// growth returns the increase of each reason.
func growth(before, now []control.Drop) (grew []control.Drop) {
	old := map[string]uint64{}
	for _, d := range before {
		old[d.Reason] = d.Packets
	}
	for _, d := range now {
		if n := grown(old[d.Reason], d.Packets); n > 0 {
			grew = append(grew, control.Drop{Reason: d.Reason, Counter: control.Counter{Packets: n}})
		}
	}
	return grew
}

// cure is the cure for a reason, for this rule.
func (w *way) cure(reason, device string) string {
	c := strings.ReplaceAll(cures[reason], "RULE", w.r.Name)
	return strings.ReplaceAll(c, "DEVICE", cmp.Or(device, w.interfaces()))
}

func (w *way) dropped() {
	for _, d := range growth(w.r.Status[0].Drops, w.now().Drops) {
		if !d.Lost() {
			continue
		}
		w.add("dropped", d.Packets, fault(w.cure(d.Reason, ""), "%d packets were dropped before they were copied, reason %s", d.Packets, d.Reason))
		if d.Packets >= w.count() {
			w.ends("in the relay, before any copy: reason %s", d.Reason)
		}
	}
}

// noted reports packets that came again from another sender, perhaps in a loop.
func (w *way) noted() {
	for _, d := range growth(w.r.Status[0].Notes, w.now().Notes) {
		if d.Reason == "echo" {
			w.add("noted", d.Packets, warning("xdpcast tap "+w.r.Name+" shows the MAC address of who sends them; loop=two-way on the input drops them if they are the rule's own, resent",
				"%d packets came again from another sender, reason echo, and were relayed: perhaps a host resends what the rule sends", d.Packets))
		}
	}
}

// workers reports packets lost before a path in user space.
func (w *way) workers() {
	old := map[string]uint64{}
	for _, l := range w.r.Lost[0] {
		old[key(l.Path, l.Interface, l.Reason)] = l.Packets
	}
	for _, l := range w.r.Lost[1] {
		n := grown(old[key(l.Path, l.Interface, l.Reason)], l.Packets)
		if n == 0 || l.Path != w.now().UsedPath || !slices.ContainsFunc(w.r.Inputs, func(i *Interface) bool { return i.Name == l.Interface }) {
			continue
		}
		w.add("workers", n, fault(w.cure("worker_lost", ""), "%d packets of the path %s were lost on %s before a worker had them, reason %s", n, l.Path, l.Interface, l.Reason))
	}
}

func (w *way) outputs() {
	left, ended := 0, ""
	for slot, o := range w.now().Outputs {
		check := fmt.Sprintf("output %d", slot)
		var before control.OutputStatus
		if slot < len(w.r.Status[0].Outputs) {
			before = w.r.Status[0].Outputs[slot]
		}
		sent := grown(before.Sent.Packets, o.Sent.Packets)
		drops := growth(before.Drops, o.Drops)
		if o.State != control.StateActive {
			w.add(check, 0, fault("xdpcast rule show "+w.r.Name, "%s is %s: %s", o.Output, o.State, cmp.Or(o.Reason, w.now().Reason)))
		}
		for _, d := range drops {
			w.add(check, d.Packets, fault(w.cure(d.Reason, o.Interface), "%d copies for %s were dropped, reason %s", d.Packets, o.Output, d.Reason))
			ended = fmt.Sprintf("at the outputs: reason %s", d.Reason)
		}
		switch {
		case sent > 0:
			left++
			w.add(check, sent, fine("%d copies left for %s", sent, o.Output))
		case w.count() > 0 && len(drops) == 0:
			w.add(check, 0, fault("xdpcast rule show "+w.r.Name, "no copy left for %s", o.Output))
			ended = "at the outputs: nothing was sent"
		case len(drops) == 0:
			w.add(check, 0, fine("nothing to send to %s", o.Output))
		}
	}
	if left == 0 && ended != "" {
		w.ends("%s", ended)
	}
}

// wire reports what devices did with the frames they were given.
func (w *way) wire() {
	old := map[string]uint64{}
	for _, u := range w.r.Unsent[0] {
		old[key(u.Interface, u.Reason)] = u.Packets
	}
	for _, u := range w.r.Unsent[1] {
		n := grown(old[key(u.Interface, u.Reason)], u.Packets)
		if n == 0 || !slices.ContainsFunc(w.r.Outputs, func(i *Interface) bool { return i.Name == u.Interface }) {
			continue
		}
		w.add("wire", n, fault("ethtool -g "+u.Interface+"; ethtool -G "+u.Interface+" tx N; xdpcast doctor -i "+u.Interface,
			"%s did not take %d frames, of all rules, reason %s", u.Interface, n, u.Reason))
		w.ends("at the device %s, which did not take them", u.Interface)
	}
	seen := map[string]bool{}
	for _, i := range w.r.Outputs {
		if w.elsewhere || seen[i.Name] {
			continue
		}
		seen[i.Name] = true
		if bad := present(i); len(bad) > 0 {
			w.add("wire", 0, bad[0])
			continue
		}
		for _, f := range slices.Concat(transmit(i), mtu(i), macvlan(i)) {
			w.add("wire", 0, f)
		}
		w.transmitted(i)
	}
}

// transmitted compares the copies handed to a device with the device's own count.
func (w *way) transmitted(i *Interface) {
	var sent uint64
	for slot, o := range w.now().Outputs {
		if o.Interface == i.Name && slot < len(w.r.Status[0].Outputs) {
			sent += grown(w.r.Status[0].Outputs[slot].Sent.Packets, o.Sent.Packets)
		}
	}
	tx := grown(i.Device[0].Counters.TxPackets, i.Device[1].Counters.TxPackets)
	switch {
	case sent == 0:
	case tx == 0:
		w.add("wire", 0, warning("ethtool -S "+i.Name, "%s counts no packet that left, while %d copies were handed to it: not every driver counts what XDP sends", i.Name, sent))
	default:
		w.add("wire", tx, fine("%s sent %d packets of all kinds", i.Name, tx))
	}
}

func (w *way) verdict() string {
	if w.end != "" {
		return "packets end " + w.end
	}
	through, copies := w.count(), uint64(0)
	if through == 0 {
		return "nothing came"
	}
	for _, d := range growth(w.r.Status[0].Drops, w.now().Drops) {
		through -= min(through, d.Packets)
		if !d.Lost() {
			copies += d.Packets
		}
	}
	text := fmt.Sprintf("%d packets in %v went the whole way, from %s to the wire", through, w.r.Apart, w.interfaces())
	if copies > 0 {
		text += fmt.Sprintf("; %d more had come by another input before", copies)
	}
	if slices.ContainsFunc(w.found, func(f Finding) bool { return f.Level == Fault && strings.HasPrefix(f.Check, "output ") }) {
		text += "; not on every output: see the faults"
	}
	return text
}
