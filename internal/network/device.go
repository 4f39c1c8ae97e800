package network

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/safchain/ethtool"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Device is what a link's driver and the surrounding kernel report beyond a Snapshot: how it
// receives, what it lost, and which other programs handle its packets. The kernel sends no
// notifications about it; it is read on request.
type Device struct {
	Driver string // such as "ice"; empty if the driver does not report one
	Bus    string // of a device on a bus, such as 0000:17:00.0

	// Promiscuous and AllMulticast: the device filters nothing, or no multicast addresses.
	Promiscuous, AllMulticast bool

	// Features are the enabled features, by the names of ethtool -k.
	Features map[string]bool
	// RxRing and RxRingMax are the current and maximum descriptors of a receive ring; 0 if the
	// driver does not report them.
	RxRing, RxRingMax int
	Counters          Counters
	// Statistics are the driver's own counters, by the names of ethtool -S.
	Statistics map[string]uint64
	// Programs are those of traffic control: BPF programs of links and filters, and other filters
	// and qdiscs that may take or modify packets.
	Programs []Program
	// Bridge is set for a bridge, nil for other links.
	Bridge *Bridge
}

// Counters are those that every link has (struct rtnl_link_stats64).
type Counters struct {
	RxPackets, TxPackets, Multicast uint64
	// RxDropped lacked memory or a reader, RxMissed and RxFifo room in the device's ring; TxDropped
	// was dropped before the wire.
	RxDropped, RxMissed, RxFifo, RxErrors, TxDropped, TxErrors uint64
}

// Program is a program or filter of traffic control on a link.
type Program struct {
	Ingress bool   // otherwise egress
	Kind    string // "tcx", or the filter's: "bpf", "u32", "flower"
	ID      uint32 // of a BPF program; 0 for others
	Name    string
}

// Bridge is how a bridge handles groups.
type Bridge struct {
	// Snooping: groups go only to ports with members.
	Snooping bool
	// Querier: the bridge itself sends queries; Heard: another IPv4 querier was heard.
	Querier, Heard bool
}

// ReadDevice reads a link, in the network namespace of the calling thread. Values that a driver
// does not report stay zero. Errors to match: unix.ENODEV.
func ReadDevice(l *Link) (d Device, err error) {
	if err := d.readLink(l); err != nil {
		return d, fmt.Errorf("device %s: %w", l.Name, err)
	}
	e, err := ethtool.NewEthtool()
	if err != nil {
		return d, fmt.Errorf("ethtool socket: %w", err)
	}
	defer e.Close()
	// Virtual devices support few of these, or none; an error means just that.
	if info, err := e.DriverInfo(l.Name); err == nil {
		d.Driver, d.Bus = info.Driver, info.BusInfo
	}
	if d.Bus == "N/A" {
		d.Bus = ""
	}
	if ring, err := e.GetRing(l.Name); err == nil {
		d.RxRing, d.RxRingMax = int(ring.RxPending), int(ring.RxMaxPending)
	}
	d.Statistics, _ = e.Stats(l.Name)
	d.Features = map[string]bool{}
	if all, err := e.Features(l.Name); err == nil {
		for name, on := range all {
			if on {
				d.Features[name] = true
			}
		}
	}
	d.Programs, err = readPrograms(l)
	return d, err
}

// readLink reads the rtnetlink attributes.
func (d *Device) readLink(l *Link) error {
	found, err := netlink.LinkByIndex(l.Index)
	if err != nil {
		return errors.Join(err, unix.ENODEV)
	}
	attrs := found.Attrs()
	d.Promiscuous, d.AllMulticast = attrs.Promisc != 0, attrs.Allmulti != 0
	if s := attrs.Statistics; s != nil {
		d.Counters = Counters{
			RxPackets: s.RxPackets, TxPackets: s.TxPackets, Multicast: s.Multicast,
			RxDropped: s.RxDropped, RxMissed: s.RxMissedErrors, RxFifo: s.RxFifoErrors, RxErrors: s.RxErrors,
			TxDropped: s.TxDropped, TxErrors: s.TxErrors,
		}
	}
	if l.Kind != "bridge" {
		return nil
	}
	c, err := dial(unix.NETLINK_ROUTE)
	if err != nil {
		return err
	}
	err = c.ask(unix.RTM_GETLINK, 0, linkRequest(l.Index), func(data []byte) {
		if b, ok := parseBridge(data); ok {
			d.Bridge = &b
		}
	})
	return errors.Join(err, c.close())
}

// readPrograms lists the programs of traffic control on a link. Filters of the kernel itself are
// recognised by name only.
func readPrograms(l *Link) (all []Program, err error) {
	for _, side := range []struct {
		ingress bool
		attach  ebpf.AttachType
		parent  uint32
	}{
		{true, ebpf.AttachTCXIngress, netlink.HANDLE_MIN_INGRESS}, {false, ebpf.AttachTCXEgress, netlink.HANDLE_MIN_EGRESS},
	} {
		// EINVAL: no tcx before Linux 6.6; EPERM: only root may
		if found, err := link.QueryPrograms(link.QueryOptions{Target: l.Index, Attach: side.attach}); err == nil {
			for _, p := range found.Programs {
				all = append(all, Program{Ingress: side.ingress, Kind: "tcx", ID: uint32(p.ID), Name: programName(uint32(p.ID))})
			}
		}
		filters, err := netlink.FilterList(&netlink.GenericLink{LinkAttrs: netlink.LinkAttrs{Index: l.Index}}, side.parent)
		if err != nil {
			continue // no clsact or ingress qdisc
		}
		for _, f := range filters {
			p := Program{Ingress: side.ingress, Kind: f.Type()}
			if b, ok := f.(*netlink.BpfFilter); ok {
				p.ID, p.Name = uint32(b.Id), b.Name
			}
			all = append(all, p)
		}
	}
	return all, nil
}

// programName is the name of a BPF program, empty if it cannot be read.
func programName(id uint32) string {
	p, err := ebpf.NewProgramFromID(ebpf.ProgramID(id))
	if err != nil {
		return ""
	}
	defer p.Close()
	info, err := p.Info()
	if err != nil {
		return ""
	}
	return info.Name
}

// parseBridge parses the bridge attributes of RTM_NEWLINK (enum IFLA_BR_* of linux/if_link.h).
func parseBridge(data []byte) (b Bridge, ok bool) {
	if len(data) < unix.SizeofIfInfomsg {
		return b, false
	}
	// BRIDGE_QUERIER_IP_OTHER_TIMER of linux/if_bridge.h: there is a querier other than the bridge.
	const otherTimer = 3
	sound, kind := true, ""
	sound = attributes(data[unix.SizeofIfInfomsg:], func(t uint16, value []byte) {
		if t != unix.IFLA_LINKINFO {
			return
		}
		sound = attributes(value, func(t uint16, value []byte) {
			switch t {
			case unix.IFLA_INFO_KIND:
				kind = text(value)
			case unix.IFLA_INFO_DATA:
				sound = attributes(value, func(t uint16, value []byte) {
					switch t {
					case unix.IFLA_BR_MCAST_SNOOPING:
						b.Snooping = firstByte(value) != 0
					case unix.IFLA_BR_MCAST_QUERIER:
						b.Querier = firstByte(value) != 0
					case unix.IFLA_BR_MCAST_QUERIER_STATE:
						sound = attributes(value, func(t uint16, value []byte) {
							b.Heard = b.Heard || t == otherTimer && len(value) == 8 && binary.NativeEndian.Uint64(value) > 0
						}) && sound
					}
				}) && sound
			}
		}) && sound
	}) && sound
	return b, sound && kind == "bridge"
}

func firstByte(value []byte) byte {
	if len(value) == 0 {
		return 0
	}
	return value[0]
}
