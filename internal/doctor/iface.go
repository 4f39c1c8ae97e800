package doctor

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	"xdpcast/internal/control"
	"xdpcast/internal/network"
	"xdpcast/pkg/packet"
)

const checkPresent = "link"

// interfaceChecks are the checks of an interface. If the first finds it absent, the others are
// skipped.
var interfaceChecks = [...]struct {
	name, fine string
	run        func(*Interface) []Finding
}{
	{checkPresent, "up, with carrier", present},
	{"program", "the relay program is attached for every rule", program},
	{"native", "nothing keeps programs from running in the driver", native},
	{"transmit", "no output that redirected frames would miss", transmit},
	{"queues", "no input on a single queue", queues},
	{"ring", "no receive ring that is too small", ring},
	{"lost", "no packet lost in the device", lost},
	{"interrupts", "no interrupts crowded on one CPU", interrupts},
	{"lro", "no datagrams merged by the device", lro},
	{"gro", "no datagrams merged before the path fanout", gro},
	{"vlan", "no VLAN tag that rules would miss", vlan},
	{"filter", "no group that the device would filter out", filter},
	{"querier", "no group without a querier", querier},
	{"igmp", "no old IGMP or MLD version in the way", igmp},
	{"mtu", "no output with a smaller MTU", mtu},
	{"programs", "no programs of others in traffic control", programs},
	{"checksums", "no unfinished checksums", checksums},
	{"macvlan", "no macvlan device that copies would miss", macvlan},
}

func present(i *Interface) []Finding {
	l := i.Link
	switch {
	case l == nil:
		return one(fault("ip link", "interface %s not found", i.Name))
	case !l.Up:
		return one(fault("ip link set dev "+i.Name+" up", "interface %s is down", i.Name))
	case !l.Carrier:
		return one(fault("ip link show dev "+i.Name+"; ethtool "+i.Name, "interface %s has no carrier: look at the cable, or the other end", i.Name))
	}
	return nil
}

// foreign is an XDP program other than the relay's; its id is 0 for none.
func (i *Interface) foreign() network.XDP {
	for _, x := range i.Link.XDP {
		if x.Program != i.Program {
			return x
		}
	}
	return network.XDP{}
}

func program(i *Interface) []Finding {
	if x := i.foreign(); x.Program != 0 {
		kind := "xdpdrv"
		if x.Generic {
			kind = "xdpgeneric"
		}
		cure := fmt.Sprintf("ip link set dev %s %s off (or, of a BPF link: bpftool link detach id ID)", i.Name, kind)
		if i.Program == 0 && i.Wanted {
			return one(fault(cure, "another XDP program, id %d, is on %s: rules take the path fanout, or wait", x.Program, i.Name))
		}
		return one(warning(cure, "another XDP program, id %d, is on %s", x.Program, i.Name))
	}
	if i.Program == 0 && i.Wanted {
		return one(fault("xdpcast status", "the relay program is not on %s: %s", i.Name, cmp.Or(i.Note, "no daemon has attached it")))
	}
	return nil
}

// native reports why a program does not run in the driver.
func native(i *Interface) []Finding {
	f := i.Link.Features
	switch {
	case i.Program == 0 && i.foreign().Program != 0, !i.Link.Ethernet && !i.Input:
		return nil
	case f.Known && !f.Native:
		return one(warning("a network card, or a virtual device, with native XDP; see docs/kernels.md",
			"the driver of %s%s has no native XDP: its packets take the slower generic mode or a path in user space", i.Name, driverText(i)))
	case i.Mode == "generic":
		return one(warning(genericCure(i), "XDP runs in generic mode on %s, which is slower and cannot copy: %s", i.Name, cmp.Or(i.Note, "it was attached with --mode generic, or native mode was refused then")))
	}
	return nil
}

func driverText(i *Interface) string {
	if d := i.Device[1].Driver; d != "" {
		return " (" + d + ")"
	}
	return ""
}

// genericCure guesses why the driver refused native mode.
func genericCure(i *Interface) string {
	switch {
	case i.Device[1].Features["rx-lro"]:
		return fmt.Sprintf("ethtool -K %s lro off, then ip link set dev %s down, and up again", i.Name, i.Name)
	case strings.Contains(i.Note, "too few queues"):
		return fmt.Sprintf("ethtool -L %s rx N, as many as the peer has transmit queues; then ip link set dev %s down, and up again", i.Name, i.Name)
	case i.Link.MTU > 3498: // a page less headroom, skb_shared_info and headers
		return fmt.Sprintf("ip link set dev %s mtu 1500 where no longer packets come; then ip link set dev %s down, and up again", i.Name, i.Name)
	}
	return fmt.Sprintf("xdpcast unload -i %s, then restart xdpcast with --mode native, which says why it is refused", i.Name)
}

func transmit(i *Interface) []Finding {
	f := i.Link.Features
	if !i.Output || !f.Known || f.Transmit || !i.Link.Ethernet {
		return nil
	}
	if i.Link.Kind == "veth" {
		return one(warning("at the peer, in its namespace: ethtool -K PEER gro on", "%s does not send redirected frames, since its peer has neither generic receive offload nor an XDP program: the path kernel cannot use it", i.Name))
	}
	return one(warning("leave path: auto, which takes another path", "the driver of %s%s does not send redirected frames: the path kernel cannot use it", i.Name, driverText(i)))
}

func queues(i *Interface) []Finding {
	if !i.Input || !i.Link.Hardware || i.Link.Queues != 1 || i.CPUs < 2 {
		return nil
	}
	return one(warning(fmt.Sprintf("ethtool -L %s combined %d", i.Name, i.CPUs), "%s receives on one queue, so that one of %d CPUs does all the work", i.Name, i.CPUs))
}

// missed counts packets that found the receive ring full.
func missed(d *network.Device) uint64 { return d.Counters.RxMissed + d.Counters.RxFifo }

func ring(i *Interface) []Finding {
	before, now := &i.Device[0], &i.Device[1]
	if !i.Input || now.RxRing == 0 || now.RxRing >= now.RxRingMax || missed(now) == 0 {
		return nil
	}
	cure := fmt.Sprintf("ethtool -G %s rx %d", i.Name, now.RxRingMax)
	if n := missed(now) - missed(before); n > 0 {
		return one(fault(cure, "the receive ring of %s has %d of %d descriptors, and %d packets found no room in %v", i.Name, now.RxRing, now.RxRingMax, n, i.Apart))
	}
	return one(warning(cure, "the receive ring of %s has %d of %d descriptors, and %d packets have found no room since it came up", i.Name, now.RxRing, now.RxRingMax, missed(now)))
}

// lostWords occur in the names of drivers' counters of packets lost on receive.
var lostWords = []string{"drop", "discard", "miss", "no_buf", "nobuf", "no_dma", "fifo", "overrun", "overflow", "out_of_buffer", "alloc_fail"}

// isLost reports whether a driver's counter counts packets lost on receive.
func isLost(name string) bool {
	name = strings.ToLower(name)
	if !strings.Contains(name, "rx") || strings.Contains(name, "xdp_drop") || strings.Contains(name, "filter") {
		return false // programs drop on purpose, and so do filters
	}
	return slices.ContainsFunc(lostWords, func(word string) bool { return strings.Contains(name, word) })
}

// lost names the counters that show packets lost in the device.
func lost(i *Interface) []Finding {
	var growing, past []string
	note := func(name string, before, now uint64) {
		switch {
		case now > before:
			growing = append(growing, fmt.Sprintf("%s +%d", name, now-before))
		case now > 0:
			past = append(past, fmt.Sprintf("%s %d", name, now))
		}
	}
	before, now := &i.Device[0], &i.Device[1]
	note("rx_missed_errors", before.Counters.RxMissed, now.Counters.RxMissed)
	note("rx_fifo_errors", before.Counters.RxFifo, now.Counters.RxFifo)
	note("rx_errors", before.Counters.RxErrors, now.Counters.RxErrors)
	note("tx_dropped", before.Counters.TxDropped, now.Counters.TxDropped)
	note("tx_errors", before.Counters.TxErrors, now.Counters.TxErrors)
	for _, name := range sortedKeys(now.Statistics) {
		if isLost(name) {
			note(name, before.Statistics[name], now.Statistics[name])
		}
	}
	cure := "ethtool -S " + i.Name + " | grep -iE 'drop|miss|err|fifo'"
	switch {
	case len(growing) > 0:
		return one(fault(cure, "%s loses packets: in %v, %s", i.Name, i.Apart, strings.Join(growing, ", ")))
	case len(past) > 0:
		return one(warning(cure, "%s has lost packets since it came up, none in the last %v: %s", i.Name, i.Apart, strings.Join(past, ", ")))
	}
	return nil
}

func interrupts(i *Interface) []Finding {
	if !i.Input || len(i.Interrupts) < 2 || i.CPUs < 2 {
		return nil
	}
	first := i.Interrupts[0]
	if strings.ContainsAny(first, ",-") || slices.ContainsFunc(i.Interrupts, func(cpus string) bool { return cpus != first }) {
		return nil
	}
	return one(warning("systemctl start irqbalance, or echo CPU > /proc/irq/N/smp_affinity_list for each of "+i.Name+" in /proc/interrupts",
		"all %d interrupts of %s go to CPU %s", len(i.Interrupts), i.Name, first))
}

func lro(i *Interface) []Finding {
	if !i.Input || !i.Device[1].Features["rx-lro"] {
		return nil
	}
	return one(fault("ethtool -K "+i.Name+" lro off", "large receive offload is on at %s: the device merges packets, drivers refuse native XDP with it, and datagrams lose their borders", i.Name))
}

// gro: packets of the kernel path and of AF_XDP never reach GRO.
func gro(i *Interface) (found []Finding) {
	if !i.Input || !i.Fanout && i.Mode != "generic" {
		return nil
	}
	for _, name := range []string{"rx-udp-gro-forwarding", "rx-gro-list"} {
		if i.Device[1].Features[name] {
			found = append(found, warning("ethtool -K "+i.Name+" "+name+" off", "%s is on at %s: datagrams are merged before the path fanout gets them, and divided again", name, i.Name))
		}
	}
	return found
}

func vlan(i *Interface) (found []Finding) {
	ids := map[int]bool{}
	for _, in := range i.Inputs {
		if in.VLAN.ID != 0 {
			ids[int(in.VLAN.ID)] = true
		}
	}
	if len(ids) == 0 {
		return nil
	}
	features := i.Device[1].Features
	for _, name := range network.TagFeatures() {
		if features[name] {
			found = append(found, fault("ethtool -K "+i.Name+" rxvlan off", "%s strips VLAN tags before XDP sees them (%s), and rules there match tags", i.Name, name))
		}
	}
	if features["rx-vlan-filter"] && !i.Device[1].Promiscuous && i.Link.Hardware {
		found = append(found, warning("ethtool -K "+i.Name+" rx-vlan-filter off", "%s takes only frames of VLANs that have a device on it (rx-vlan-filter), and rules there match tags", i.Name))
	}
	return found
}

// filter finds groups that the device is not set to receive: those of rules with join=none, and
// those of prefixes, which are not joined.
func filter(i *Interface) []Finding {
	d := &i.Device[1]
	if !i.Input || d.Promiscuous || d.AllMulticast || i.Receives == nil || !i.Link.Ethernet {
		return nil
	}
	var hidden []string
	for _, in := range i.Inputs {
		if !in.JoinNone || in.FromHost || !in.Address.IsMulticast() || in.Len == 0 && i.Receives[packet.MulticastMAC(in.Address)] {
			continue
		}
		hidden = append(hidden, in.String())
	}
	if len(hidden) == 0 {
		return nil
	}
	return one(warning("ip link set dev "+i.Name+" allmulticast on",
		"%s does not receive the groups of %s, which no rule joins: a network card filters them out", i.Name, some(hidden)))
}

// some shortens a list.
func some(all []string) string {
	const most = 3
	if len(all) > most {
		return fmt.Sprintf("%s and %d more", strings.Join(all[:most], ", "), len(all)-most)
	}
	return strings.Join(all, ", ")
}

// querier: without one, snooping switches and bridges forget the members of a group.
func querier(i *Interface) []Finding {
	if b := i.Master; b != nil && b.Snooping && !b.Querier && !b.Heard {
		return one(warning("ip link set dev "+i.MasterName+" type bridge mcast_querier 1",
			"bridge %s snoops without a querier: memberships expire after some minutes, and streams end", i.MasterName))
	}
	if i.Joined == 0 {
		return nil
	}
	for _, m := range []struct {
		name      string
		multicast *control.Multicast
	}{{"IGMP", i.IGMP}, {"MLD", i.MLD}} {
		if m.multicast != nil && m.multicast.Querier == "" && m.multicast.Version != "" {
			return one(warning("enable the IGMP querier of the switch or router (ip igmp snooping querier); between two hosts there is none, and need not be",
				"no %s querier was heard on %s: behind a snooping switch, streams end some minutes after they begin", m.name, i.Name))
		}
	}
	return nil
}

func igmp(i *Interface) (found []Finding) {
	sources := ""
	for _, in := range i.Inputs {
		if in.Source.IsValid() && in.Address.IsMulticast() {
			sources = in.String()
		}
	}
	for _, v := range []struct {
		protocol, sysctl, setting string
		forced, needed            int
	}{
		{"IGMP", "net.ipv4.conf.", ".force_igmp_version", i.ForcedIGMP, 3},
		{"MLD", "net.ipv6.conf.", ".force_mld_version", i.ForcedMLD, 2},
	} {
		if v.forced == 0 || v.forced >= v.needed {
			continue
		}
		level := warning
		effect := "no source can be named in a membership"
		if sources != "" {
			level, effect = fault, "the network is not told of the source of "+sources+", and what every sender sends there comes"
		}
		found = append(found, level(fmt.Sprintf("sysctl -w %s%s%s=0", v.sysctl, i.ForcedBy, v.setting),
			"%sv%d is forced on %s: %s", v.protocol, v.forced, i.Name, effect))
	}
	if len(found) == 0 && sources != "" && i.IGMPVersion > 0 && i.IGMPVersion < 3 {
		found = append(found, warning("have the querier speak IGMPv3 (ip igmp version 3)",
			"the querier on %s speaks IGMPv%d, which has no sources: the network is not told of the source of %s", i.Name, i.IGMPVersion, sources))
	}
	return found
}

func mtu(i *Interface) (found []Finding) {
	if n := i.TooLong[1] - i.TooLong[0]; i.TooLong[1] > 0 {
		cure := raiseMTU(i.Link, max(9000, i.Link.MTU)) + ", and on the path behind it"
		if n > 0 {
			found = append(found, fault(cure, "%d copies in %v were too long for %s (MTU %d), reason mtu", n, i.Apart, i.Name, i.Link.SendMTU()))
		} else {
			found = append(found, warning(cure, "%d copies have been too long for %s (MTU %d), reason mtu; none in the last %v", i.TooLong[1], i.Name, i.Link.SendMTU(), i.Apart))
		}
	}
	if out := i.SmallestOutput; out != nil && out.SendMTU() < i.Link.MTU {
		found = append(found, warning(raiseMTU(out, i.Link.MTU),
			"%s takes in packets of %d bytes, and %s sends %d: longer ones are dropped, reason mtu", i.Name, i.Link.MTU, out.Name, out.SendMTU()))
	}
	if i.Output && i.Link.PeerUnread != "" {
		found = append(found, warning("give the daemon CAP_NET_ADMIN in the peer's user namespace, or the peer of "+i.Name+" its MTU",
			"the MTU of the peer of %s cannot be read (%s): if it is smaller, a copy that is too long takes others of its bulk with it", i.Name, i.Link.PeerUnread))
	}
	return found
}

// raiseMTU is the command that lets a link send longer frames. The MTU of a veth's peer counts,
// too.
func raiseMTU(l *network.Link, mtu int) string {
	if l.SendMTU() < l.MTU {
		return fmt.Sprintf("ip link set mtu %d at the peer of %s, in its network namespace", mtu, l.Name)
	}
	return fmt.Sprintf("ip link set dev %s mtu %d", l.Name, mtu)
}

// programs reports programs of traffic control: redirected frames bypass them, memberships and the
// path fanout do not.
func programs(i *Interface) (found []Finding) {
	for _, p := range i.Device[1].Programs {
		what := p.Kind
		if p.Name != "" {
			what += " program " + p.Name
		}
		if p.ID != 0 {
			what += fmt.Sprintf(" (id %d)", p.ID)
		}
		side, effect := "egress", "it does not see packets of the path kernel and AF_XDP, and may drop IGMP reports"
		if p.Ingress {
			side, effect = "ingress", "it sees what no rule takes alone, and may keep IGMP queries from the kernel"
		}
		if p.Ingress && !i.Input || !p.Ingress && !i.Output && !i.Input {
			continue
		}
		found = append(found, warning(fmt.Sprintf("tc filter show dev %s %s; bpftool net show dev %s", i.Name, side, i.Name),
			"traffic control at the %s of %s has %s: %s", side, i.Name, what, effect))
	}
	return found
}

func checksums(i *Interface) []Finding {
	if i.Unfinished[1] == i.Unfinished[0] {
		return nil
	}
	cure := "at the sender: ethtool -K DEVICE tx off; or csum=zero on the outputs"
	return one(warning(cure, "%d packets in %v came to %s with unfinished checksums, from a sender on this host: native XDP cannot finish them", i.Unfinished[1]-i.Unfinished[0], i.Apart, i.Name))
}

func macvlan(i *Interface) []Finding {
	if !i.Output || len(i.Above) == 0 {
		return nil
	}
	return one(warning(fmt.Sprintf("ip link add link %s name relay0 type macvlan mode bridge; ip link set dev relay0 up, and send on relay0", i.Name),
		"copies sent on %s do not reach the devices on it: %s", i.Name, some(i.Above)))
}
