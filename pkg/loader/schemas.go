package loader

import (
	"encoding/binary"
	"fmt"
	"unsafe"

	"xdpcast/bpf"
)

// schema is the layout of pinned state written by another release, where it differs from this
// release's (bpf/include/abi.h). A change of the layout adds the previous one here: see decision
// 0023.
type schema struct {
	// then has the old names of renamed maps, by current name.
	then map[string]string
	// anew are the maps whose layout or meaning changed. The others are taken over unchanged: both
	// releases' programs work on them, so nothing in them can be lost.
	anew []string
	// flow is the size of a flow table entry in bytes, and flowOf decodes one.
	flow   int
	flowOf func([]byte) bpf.RelayFlow
	// rule is the size of an entry of rule_stats in words, and counted how many of its first words
	// are used: packets, bytes, the time of the last packet, and then handed and copies, two each.
	rule, counted int
	// internal is the value of DROP_INTERNAL, the last one of enum drop_reason.
	internal uint32
}

// schemas are those that this release migrates, by number. They share the keys of flow tables, the
// handover between relay and egress program, and all maps that no entry lists.
var schemas = map[uint32]*schema{
	4: {
		then: namesBefore6,
		anew: append([]string{bpf.RelayMapDrops, bpf.RelayMapRuleDrops}, anewBefore7...),
		flow: 32, flowOf: flowBefore7,
		rule: 3, counted: 3,
		internal: 13,
	},
	5: {
		then: namesBefore6,
		anew: append([]string{bpf.RelayMapDrops, bpf.RelayMapRuleDrops, bpf.RelayMapGuardSlots}, anewBefore7...),
		flow: 32, flowOf: flowBefore7,
		rule: 7, counted: 5,
		internal: 16,
	},
	6: {
		anew: anewBefore7,
		flow: 36, flowOf: flowBefore7,
		rule: 9, counted: 7,
		internal: uint32(Internal),
	},
}

var namesBefore6 = map[string]string{
	bpf.RelayMapDevices:        "ports",
	bpf.RelayMapBroadcast:      "fanout",
	bpf.TransmitMapDeviceStats: "port_stats",
	bpf.TransmitMapDeviceRows:  "port_rows",
}

// Before schema 7, flow entries were longer, maps that programs read for each packet were not
// cache-line aligned, and packets sent by a rule's only output were counted in output_stats.
var anewBefore7 = []string{
	bpf.RelayMapConfig, bpf.RelayMapFlowTables4, bpf.RelayMapFlowTables6, bpf.RelayMapPrefixTables4, bpf.RelayMapPrefixTables6,
	bpf.RelayMapShortcuts, bpf.RelayMapOutputs, bpf.RelayMapRuleStats, bpf.RelayMapPassed,
}

// flowBefore7 decodes a flow entry of schema 6, or a shorter one of earlier schemas.
func flowBefore7(b []byte) bpf.RelayFlow {
	var old struct {
		Rule, FirstOutput, Device   uint32
		Outputs, MinMtu             uint16
		Path, Flags                 uint8
		InputMac                    [6]uint8
		Sockets                     uint32
		Finish, Routed, TwoWay, Leg uint8
		Stream                      uint16
		_                           [2]uint8
	}
	copy((*[unsafe.Sizeof(old)]byte)(unsafe.Pointer(&old))[:], b)
	f := bpf.RelayFlow{
		Rule: old.Rule, FirstOutput: old.FirstOutput, Device: old.Device, Sockets: old.Sockets,
		Flags: uint16(old.Flags), Path: old.Path, Routed: old.Routed, Stream: old.Stream, Leg: old.Leg,
		Outputs: uint8(min(old.Outputs, bpf.MaxSlots+1)), MinMtu: old.MinMtu, InputMac: old.InputMac,
	}
	if old.TwoWay != 0 {
		f.Flags |= uint16(bpf.RelayFlowFlagFLOW_TWO_WAY)
	}
	if old.Finish != 0 {
		f.Flags |= uint16(bpf.RelayFlowFlagFLOW_FINISH)
	}
	return f
}

// header is the start of map config, which is the same in every release.
type header struct {
	schema               uint32
	cookie               uint64 // of the network namespace
	maxRules, maxOutputs uint32
}

const headerSize = 24

// readHeader decodes it from an entry of map config. An unknown schema may have its number alone.
func readHeader(config []byte) (h header, err error) {
	n := binary.NativeEndian
	if len(config) >= 4 {
		h.schema = n.Uint32(config)
	}
	if len(config) >= headerSize {
		return header{h.schema, n.Uint64(config[8:]), n.Uint32(config[16:]), n.Uint32(config[20:])}, nil
	}
	if h.schema == bpf.Schema || schemas[h.schema] != nil || len(config) < 4 {
		return h, fmt.Errorf("an entry of map config has %d bytes, want at least %d", len(config), headerSize)
	}
	return h, nil
}
