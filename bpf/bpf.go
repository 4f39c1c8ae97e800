// Package bpf holds the compiled BPF programs and the Go types of their ABI, as
// bpf2go generates them from the C beside this file. Package loader is their
// only user; the words are explained in include/abi.h and include/maps.h.
//
// Generate through `make generate`, which sets the compiler flags.
package bpf

//go:generate go tool bpf2go -go-package bpf -target bpfel -type flow4 -type flow6 -type flow -type handover -type rule_path -type drop_reason -type drop_scope -type lookup_kind -type prefix_by -type flow_from -type output_flag -type ttl_mode -type prefix4 -type prefix6 -type vlan_mode -type flow_flag -type fragment_kind -type passed_kind -type note -type user_scope -type user_kind -type shortcut -type shortcut_output -type guard_way -type guard_other -type stream_kind -type stream_verdict -type stream_leg -type stream_pulse Relay relay.bpf.c -- -Iinclude
//go:generate go tool bpf2go -go-package bpf -target bpfel -no-global-types Egress egress.bpf.c -- -Iinclude
//go:generate go tool bpf2go -go-package bpf -target bpfel Keepalive keepalive.bpf.c -- -Iinclude
//go:generate go tool bpf2go -go-package bpf -target bpfel Transmit transmit.bpf.c -- -Iinclude
//go:generate go tool bpf2go -go-package bpf -target bpfel -no-global-types Tapped tapped.bpf.c -- -Iinclude
//go:generate go tool bpf2go -go-package bpf -target bpfel -no-global-types -type tap_record -type tap_drop -type tap_flag -type tap_flows Tap tap.bpf.c -- -Iinclude

// Constants of include/abi.h that are macros there; a test holds them equal.
const (
	// Schema is the version of the maps' layout and meaning.
	Schema = 7
	// MaxQueues is the most queues of an interface that can have AF_XDP sockets.
	MaxQueues = 64
	// Guesses is the size of the map guesses.
	Guesses = 4096
	// MaxSteered is the most CPUs that packets are steered to.
	MaxSteered = 64
	// MaxSlots is the most outputs that a rule can have.
	MaxSlots = 64
	// MaxLegs is the most inputs that a rule can have.
	MaxLegs = 4
	// MaxStreams is the size of the maps of streams, and MaxWindows that of the map stream_windows.
	MaxStreams = 1024
	MaxWindows = 4096
	// NameLen is the room for a rule's name, its final NUL included.
	NameLen = 80
)
