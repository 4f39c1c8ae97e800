package bpf

import (
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
)

// abiStructs pairs each struct of include/abi.h and include/handover.h with the Go
// type that is written to and read from the maps.
var abiStructs = map[string]reflect.Type{
	"bpf_devmap_val": reflect.TypeFor[RelayBpfDevmapVal](),
	"config":         reflect.TypeFor[RelayConfig](),
	"copy":           reflect.TypeFor[RelayCopy](),
	"counter":        reflect.TypeFor[RelayCounter](),
	"drop_key":       reflect.TypeFor[RelayDropKey](),
	"flow":           reflect.TypeFor[RelayFlow](),
	"flow4":          reflect.TypeFor[RelayFlow4](),
	"flow6":          reflect.TypeFor[RelayFlow6](),
	"fragment":       reflect.TypeFor[RelayFragment](),
	"fragment_key":   reflect.TypeFor[RelayFragmentKey](),
	"guard_other":    reflect.TypeFor[RelayGuardOther](),
	"guard_slot":     reflect.TypeFor[RelayGuardSlot](),
	"guard_way":      reflect.TypeFor[RelayGuardWay](),
	"loop":           reflect.TypeFor[RelayLoop](),
	"own_mac":        reflect.TypeFor[RelayOwnMac](),
	"handover":       reflect.TypeFor[RelayHandover](),
	"orphans":        reflect.TypeFor[RelayOrphans](),
	"output":         reflect.TypeFor[RelayOutput](),
	"output_stats":   reflect.TypeFor[RelayOutputStats](),
	"own_address":    reflect.TypeFor[RelayOwnAddress](),
	"policer":        reflect.TypeFor[RelayPolicer](),
	"device_stats":   reflect.TypeFor[TransmitDeviceStats](),
	"prefix4":        reflect.TypeFor[RelayPrefix4](),
	"prefix6":        reflect.TypeFor[RelayPrefix6](),
	"querier":        reflect.TypeFor[RelayQuerier](),
	"querier_key":    reflect.TypeFor[RelayQuerierKey](),
	"rule":           reflect.TypeFor[RelayRule](),
	"rule_stats":     reflect.TypeFor[RelayRuleStats](),
	"shortcut":       reflect.TypeFor[RelayShortcut](),
	"stream":         reflect.TypeFor[RelayStream](),
	"stream_health":  reflect.TypeFor[RelayStreamHealth](),
	"stream_leg":     reflect.TypeFor[RelayStreamLeg](),
	"stream_pulse":   reflect.TypeFor[RelayStreamPulse](),
	"stream_state":   reflect.TypeFor[RelayStreamState](),
	"egress_drops":   reflect.TypeFor[TransmitEgressDrops](),
	"turn":           reflect.TypeFor[RelayTurn](),
	"user_counter":   reflect.TypeFor[RelayUserCounter](),
}

// abiEnums holds the enumerations with the values that Go knows.
var abiEnums = map[string]map[string]uint64{
	"rule_path": {
		"PATH_NONE":   uint64(RelayRulePathPATH_NONE),
		"PATH_KERNEL": uint64(RelayRulePathPATH_KERNEL),
		"PATH_AFXDP":  uint64(RelayRulePathPATH_AFXDP),
		"PATH_FANOUT": uint64(RelayRulePathPATH_FANOUT),
	},
	"drop_reason": {
		"DROP_LOOP":         uint64(RelayDropReasonDROP_LOOP),
		"DROP_TTL":          uint64(RelayDropReasonDROP_TTL),
		"DROP_MTU":          uint64(RelayDropReasonDROP_MTU),
		"DROP_MULTI_BUFFER": uint64(RelayDropReasonDROP_MULTI_BUFFER),
		"DROP_NOT_READY":    uint64(RelayDropReasonDROP_NOT_READY),
		"DROP_NO_NEIGHBOUR": uint64(RelayDropReasonDROP_NO_NEIGHBOUR),
		"DROP_NO_DEVICE":    uint64(RelayDropReasonDROP_NO_DEVICE),
		"DROP_NO_CHECKSUM":  uint64(RelayDropReasonDROP_NO_CHECKSUM),
		"DROP_PORT":         uint64(RelayDropReasonDROP_PORT),
		"DROP_POLICED":      uint64(RelayDropReasonDROP_POLICED),
		"DROP_NO_SOCKET":    uint64(RelayDropReasonDROP_NO_SOCKET),
		"DROP_TX_FULL":      uint64(RelayDropReasonDROP_TX_FULL),
		"DROP_CPU_FULL":     uint64(RelayDropReasonDROP_CPU_FULL),
		"DROP_NO_CARRIER":   uint64(RelayDropReasonDROP_NO_CARRIER),
		"DROP_WORKER_LOST":  uint64(RelayDropReasonDROP_WORKER_LOST),
		"DROP_LOOPING":      uint64(RelayDropReasonDROP_LOOPING),
		"DROP_DUPLICATE":    uint64(RelayDropReasonDROP_DUPLICATE),
		"DROP_LATE":         uint64(RelayDropReasonDROP_LATE),
		"DROP_ASTRAY":       uint64(RelayDropReasonDROP_ASTRAY),
		"DROP_OLD_SESSION":  uint64(RelayDropReasonDROP_OLD_SESSION),
		"DROP_CONTENDED":    uint64(RelayDropReasonDROP_CONTENDED),
		"DROP_NO_NUMBER":    uint64(RelayDropReasonDROP_NO_NUMBER),
		"DROP_STANDBY":      uint64(RelayDropReasonDROP_STANDBY),
		"DROP_INTERNAL":     uint64(RelayDropReasonDROP_INTERNAL),
		"DROP_REASONS":      uint64(RelayDropReasonDROP_REASONS),
	},
	"stream_kind": {
		"STREAM_NONE":      uint64(RelayStreamKindSTREAM_NONE),
		"STREAM_FAILOVER":  uint64(RelayStreamKindSTREAM_FAILOVER),
		"STREAM_FIELD":     uint64(RelayStreamKindSTREAM_FIELD),
		"STREAM_RTP":       uint64(RelayStreamKindSTREAM_RTP),
		"STREAM_RFC4175":   uint64(RelayStreamKindSTREAM_RFC4175),
		"STREAM_MOLDUDP64": uint64(RelayStreamKindSTREAM_MOLDUDP64),
		"STREAM_SINGLE":    uint64(RelayStreamKindSTREAM_SINGLE),
	},
	"stream_verdict": {
		"STREAM_PASSED":      uint64(RelayStreamVerdictSTREAM_PASSED),
		"STREAM_DUPLICATE":   uint64(RelayStreamVerdictSTREAM_DUPLICATE),
		"STREAM_LATE":        uint64(RelayStreamVerdictSTREAM_LATE),
		"STREAM_ASTRAY":      uint64(RelayStreamVerdictSTREAM_ASTRAY),
		"STREAM_OLD_SESSION": uint64(RelayStreamVerdictSTREAM_OLD_SESSION),
		"STREAM_CONTENDED":   uint64(RelayStreamVerdictSTREAM_CONTENDED),
		"STREAM_NO_NUMBER":   uint64(RelayStreamVerdictSTREAM_NO_NUMBER),
		"STREAM_STANDBY":     uint64(RelayStreamVerdictSTREAM_STANDBY),
		"STREAM_VERDICTS":    uint64(RelayStreamVerdictSTREAM_VERDICTS),
		"STREAM_BEAT":        uint64(RelayStreamVerdictSTREAM_BEAT),
	},
	"lookup_kind": {
		"LOOKUP_SOURCE_PORT": uint64(RelayLookupKindLOOKUP_SOURCE_PORT),
		"LOOKUP_PORT":        uint64(RelayLookupKindLOOKUP_PORT),
		"LOOKUP_SOURCE":      uint64(RelayLookupKindLOOKUP_SOURCE),
		"LOOKUP_ANY":         uint64(RelayLookupKindLOOKUP_ANY),
		"LOOKUP_PREFIXES":    uint64(RelayLookupKindLOOKUP_PREFIXES),

		"LOOKUP_SOURCES_PORT": uint64(RelayLookupKindLOOKUP_SOURCES_PORT),
		"LOOKUP_SOURCES":      uint64(RelayLookupKindLOOKUP_SOURCES),
		"LOOKUP_BOTH_PORT":    uint64(RelayLookupKindLOOKUP_BOTH_PORT),
		"LOOKUP_BOTH":         uint64(RelayLookupKindLOOKUP_BOTH),
	},
	"shortcut_output": {
		"SHORTCUT_NONE":     uint64(RelayShortcutOutputSHORTCUT_NONE),
		"SHORTCUT_OUTPUT":   uint64(RelayShortcutOutputSHORTCUT_OUTPUT),
		"SHORTCUT_PREPARED": uint64(RelayShortcutOutputSHORTCUT_PREPARED),
		"SHORTCUT_LEG":      uint64(RelayShortcutOutputSHORTCUT_LEG),
	},
	"flow_from": {"FROM_HOST": uint64(RelayFlowFromFROM_HOST)},
	"prefix_by": {
		"PREFIX_BY_GROUP":  uint64(RelayPrefixByPREFIX_BY_GROUP),
		"PREFIX_BY_SOURCE": uint64(RelayPrefixByPREFIX_BY_SOURCE),
		"PREFIX_CLASS":     uint64(RelayPrefixByPREFIX_CLASS),
		"PREFIX_IN_CLASS":  uint64(RelayPrefixByPREFIX_IN_CLASS),
	},
	"fragment_kind": {
		"FRAGMENT_FIRST":  uint64(RelayFragmentKindFRAGMENT_FIRST),
		"FRAGMENT_LATER":  uint64(RelayFragmentKindFRAGMENT_LATER),
		"FRAGMENT_ORPHAN": uint64(RelayFragmentKindFRAGMENT_ORPHAN),
		"FRAGMENT_KINDS":  uint64(RelayFragmentKindFRAGMENT_KINDS),
	},
	"flow_flag": {
		"FLOW_UNICAST":     uint64(RelayFlowFlagFLOW_UNICAST),
		"FLOW_ALLOW_LOOP":  uint64(RelayFlowFlagFLOW_ALLOW_LOOP),
		"FLOW_NO_CHECKSUM": uint64(RelayFlowFlagFLOW_NO_CHECKSUM),
		"FLOW_POLICED":     uint64(RelayFlowFlagFLOW_POLICED),
		"FLOW_FALLBACK":    uint64(RelayFlowFlagFLOW_FALLBACK),
		"FLOW_LOCAL":       uint64(RelayFlowFlagFLOW_LOCAL),
		"FLOW_STEERED":     uint64(RelayFlowFlagFLOW_STEERED),
		"FLOW_UNGUARDED":   uint64(RelayFlowFlagFLOW_UNGUARDED),
		"FLOW_TWO_WAY":     uint64(RelayFlowFlagFLOW_TWO_WAY),
		"FLOW_FINISH":      uint64(RelayFlowFlagFLOW_FINISH),
		"FLOW_LONG_WAY":    uint64(RelayFlowFlagFLOW_LONG_WAY),
	},
	"output_flag": {
		"OUTPUT_READY":         uint64(RelayOutputFlagOUTPUT_READY),
		"OUTPUT_SOURCE_SET":    uint64(RelayOutputFlagOUTPUT_SOURCE_SET),
		"OUTPUT_DSCP_SET":      uint64(RelayOutputFlagOUTPUT_DSCP_SET),
		"OUTPUT_CHECKSUM_ZERO": uint64(RelayOutputFlagOUTPUT_CHECKSUM_ZERO),
		"OUTPUT_RARE":          uint64(RelayOutputFlagOUTPUT_RARE),
		"OUTPUT_PORT_ADD":      uint64(RelayOutputFlagOUTPUT_PORT_ADD),
		"OUTPUT_PCP_SET":       uint64(RelayOutputFlagOUTPUT_PCP_SET),
		"OUTPUT_POLICED":       uint64(RelayOutputFlagOUTPUT_POLICED),
		"OUTPUT_ONE_BUFFER":    uint64(RelayOutputFlagOUTPUT_ONE_BUFFER),
		"OUTPUT_ROUTED":        uint64(RelayOutputFlagOUTPUT_ROUTED),
	},
	"vlan_mode": {
		"VLAN_KEEP": uint64(RelayVlanModeVLAN_KEEP),
		"VLAN_POP":  uint64(RelayVlanModeVLAN_POP),
		"VLAN_SET":  uint64(RelayVlanModeVLAN_SET),
	},
	"ttl_mode": {
		"TTL_KEEP":      uint64(RelayTtlModeTTL_KEEP),
		"TTL_DECREMENT": uint64(RelayTtlModeTTL_DECREMENT),
		"TTL_SET":       uint64(RelayTtlModeTTL_SET),
	},
	"drop_scope": {
		"DROP_RULE":    uint64(RelayDropScopeDROP_RULE),
		"DROP_OUTPUT":  uint64(RelayDropScopeDROP_OUTPUT),
		"DROP_UNKNOWN": uint64(RelayDropScopeDROP_UNKNOWN),
		"DROP_NOTE":    uint64(RelayDropScopeDROP_NOTE),
	},
	"passed_kind": {
		"PASSED_ALL":       uint64(RelayPassedKindPASSED_ALL),
		"PASSED_BROADCAST": uint64(RelayPassedKindPASSED_BROADCAST),
		"PASSED_KINDS":     uint64(RelayPassedKindPASSED_KINDS),
	},
	"note": {
		"NOTE_MALFORMED":  uint64(RelayNoteNOTE_MALFORMED),
		"NOTE_ORPHAN":     uint64(RelayNoteNOTE_ORPHAN),
		"NOTE_UNFINISHED": uint64(RelayNoteNOTE_UNFINISHED),
		"NOTE_ECHO":       uint64(RelayNoteNOTE_ECHO),
		"NOTES":           uint64(RelayNoteNOTES),
	},
	"user_scope": {
		"USER_FREE":   uint64(RelayUserScopeUSER_FREE),
		"USER_RULE":   uint64(RelayUserScopeUSER_RULE),
		"USER_OUTPUT": uint64(RelayUserScopeUSER_OUTPUT),
		"USER_TOTAL":  uint64(RelayUserScopeUSER_TOTAL),
		"USER_INPUT":  uint64(RelayUserScopeUSER_INPUT),
		"USER_DEVICE": uint64(RelayUserScopeUSER_DEVICE),
		"USER_LOOSE":  uint64(RelayUserScopeUSER_LOOSE),
		"USER_HEADER": uint64(RelayUserScopeUSER_HEADER),
	},
	"user_kind": {
		"USER_MATCHED":         uint64(RelayUserKindUSER_MATCHED),
		"USER_DELIVERED":       uint64(RelayUserKindUSER_DELIVERED),
		"USER_SENT":            uint64(RelayUserKindUSER_SENT),
		"USER_FRAGMENT_FIRST":  uint64(RelayUserKindUSER_FRAGMENT_FIRST),
		"USER_FRAGMENT_LATER":  uint64(RelayUserKindUSER_FRAGMENT_LATER),
		"USER_FRAGMENT_ORPHAN": uint64(RelayUserKindUSER_FRAGMENT_ORPHAN),
		"USER_UNSENT":          uint64(RelayUserKindUSER_UNSENT),
		"USER_NO_FRAME":        uint64(RelayUserKindUSER_NO_FRAME),
		"USER_RING_FULL":       uint64(RelayUserKindUSER_RING_FULL),
		"USER_RULE_GONE":       uint64(RelayUserKindUSER_RULE_GONE),
		"USER_NOTE":            uint64(RelayUserKindUSER_NOTE),
		"USER_DROP":            uint64(RelayUserKindUSER_DROP),
	},
}

func objects(t testing.TB) map[string]*ebpf.CollectionSpec {
	t.Helper()
	specs := map[string]*ebpf.CollectionSpec{}
	for name, load := range map[string]func() (*ebpf.CollectionSpec, error){"relay": LoadRelay, "egress": LoadEgress, "tapped": LoadTapped, "transmit": LoadTransmit} {
		spec, err := load()
		if err != nil {
			t.Fatalf("read object %s: %v", name, err)
		}
		specs[name] = spec
	}
	return specs
}

// Every struct that Go and the programs share has the same size, and every field
// the same place and size, in each object that knows the struct.
func TestStructLayout(t *testing.T) {
	seen := map[string]bool{}
	for object, spec := range objects(t) {
		for name, goType := range abiStructs {
			var c *btf.Struct
			if err := spec.Types.TypeByName(name, &c); err != nil {
				continue // not used in this object
			}
			seen[name] = true
			compareStruct(t, object+": struct "+name, c, goType)
		}
	}
	for name := range abiStructs {
		if !seen[name] {
			t.Errorf("struct %s is in no object", name)
		}
	}
}

// Structs that abi.h defines are all in abiStructs, so that a new one is compared.
func TestEveryStructIsCompared(t *testing.T) {
	definition := regexp.MustCompile(`(?m)^(struct|enum) (\w+) \{`)
	for _, header := range []string{"include/abi.h", "include/handover.h"} {
		for _, m := range definition.FindAllStringSubmatch(readFile(t, header), -1) {
			known := abiStructs[m[2]] != nil
			if m[1] == "enum" {
				known = abiEnums[m[2]] != nil
			}
			if !known {
				t.Errorf("%s: %s %s is not compared with Go", header, m[1], m[2])
			}
		}
	}
}

func compareStruct(t *testing.T, what string, c *btf.Struct, goType reflect.Type) {
	t.Helper()
	if uintptr(c.Size) != goType.Size() {
		t.Errorf("%s has %d bytes in C, %d in Go", what, c.Size, goType.Size())
	}
	fields := goFields(goType)
	if len(c.Members) != len(fields) {
		t.Errorf("%s has %d fields in C, %d in Go", what, len(c.Members), len(fields))
		return
	}
	for i, member := range c.Members {
		f := fields[i]
		name := strings.ReplaceAll(member.Name, "_", "")
		if !strings.EqualFold(name, f.Name) {
			t.Errorf("%s: field %d is %s in C, %s in Go", what, i, member.Name, f.Name)
		}
		if uintptr(member.Offset.Bytes()) != f.Offset {
			t.Errorf("%s: field %s is at byte %d in C, %d in Go", what, member.Name, member.Offset.Bytes(), f.Offset)
		}
		size, err := btf.Sizeof(member.Type)
		if err != nil {
			t.Fatalf("%s: size of field %s: %v", what, member.Name, err)
		}
		if uintptr(size) != f.Type.Size() {
			t.Errorf("%s: field %s has %d bytes in C, %d in Go", what, member.Name, size, f.Type.Size())
		}
	}
}

// goFields returns the fields but for the marker of the host's layout.
func goFields(goType reflect.Type) (fields []reflect.StructField) {
	for i := range goType.NumField() {
		if f := goType.Field(i); f.Name != "_" {
			fields = append(fields, f)
		}
	}
	return fields
}

// Nothing that the programs and Go compare byte by byte, as keys are, may have
// holes whose content is left to chance.
func TestNoPadding(t *testing.T) {
	for name, goType := range abiStructs {
		var next uintptr
		for _, f := range goFields(goType) {
			if f.Offset != next {
				t.Errorf("struct %s has a hole before %s", name, f.Name)
			}
			next = f.Offset + f.Type.Size()
		}
		if next != goType.Size() {
			t.Errorf("struct %s has a hole at its end", name)
		}
	}
}

func TestEnums(t *testing.T) {
	spec := objects(t)["relay"]
	for name, want := range abiEnums {
		var enum *btf.Enum
		if err := spec.Types.TypeByName(name, &enum); err != nil {
			t.Errorf("enum %s: %v", name, err)
			continue
		}
		got := map[string]uint64{}
		for _, v := range enum.Values {
			got[v.Name] = v.Value
		}
		if !reflect.DeepEqual(got, want) {
			t.Errorf("enum %s is %v in C, %v in Go", name, got, want)
		}
	}
}

func TestMacros(t *testing.T) {
	define := regexp.MustCompile(`(?m)^#define (XDPCAST_\w+)\s+(\S+)`)
	want := map[string]int{"XDPCAST_SCHEMA": Schema, "XDPCAST_MAX_SLOTS": MaxSlots, "XDPCAST_NAME_LEN": NameLen, "XDPCAST_MAX_QUEUES": MaxQueues, "XDPCAST_MAX_STEERED": MaxSteered, "XDPCAST_GUESSES": Guesses,
		"XDPCAST_MAX_LEGS": MaxLegs, "XDPCAST_MAX_STREAMS": MaxStreams, "XDPCAST_MAX_WINDOWS": MaxWindows}
	got := map[string]int{}
	for _, m := range define.FindAllStringSubmatch(readFile(t, "include/abi.h"), -1) {
		value, err := strconv.Atoi(m[2])
		if err != nil {
			t.Errorf("%s: %v", m[1], err)
		}
		got[m[1]] = value
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("abi.h defines %v, Go has %v", got, want)
	}
}

// The objects define a map of one name alike: the loader gives all programs the
// same maps.
func TestObjectsShareMaps(t *testing.T) {
	first := map[string]*ebpf.MapSpec{}
	for object, spec := range objects(t) {
		for name, m := range spec.Maps {
			if strings.HasPrefix(name, ".") {
				continue // constants, each object's own
			}
			other := first[name]
			if other == nil {
				first[name] = m
				continue
			}
			if m.Type != other.Type || m.KeySize != other.KeySize || m.ValueSize != other.ValueSize || m.Flags != other.Flags || m.MaxEntries != other.MaxEntries {
				t.Errorf("%s: map %s is %v, elsewhere %v", object, name, m, other)
			}
		}
	}
}

// Maps that people look at with bpftool carry the types of their keys and values,
// the inner flow tables too.
func TestMapsHaveTypes(t *testing.T) {
	for object, spec := range objects(t) {
		for name, m := range spec.Maps {
			if strings.HasPrefix(name, ".") {
				continue // constants
			}
			if m.InnerMap != nil {
				m = m.InnerMap
			}
			if m.Key == nil || m.Value == nil {
				t.Errorf("%s: map %s has no types", object, name)
			}
		}
	}
	for name, key := range map[string]string{RelayMapFlowTables4: "flow4", RelayMapFlowTables6: "flow6"} {
		inner := objects(t)["relay"].Maps[name].InnerMap
		for _, side := range []struct {
			of   btf.Type
			want string
		}{{inner.Key, key}, {inner.Value, "flow"}} {
			s, ok := btf.UnderlyingType(side.of).(*btf.Struct)
			if !ok || s.Name != side.want || len(s.Members) == 0 {
				t.Errorf("map %s: type is %v, want all of struct %s", name, side.of, side.want)
			}
		}
	}
}

func readFile(t testing.TB, path string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.FromSlash(path))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}
