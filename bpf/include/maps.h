/* SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0-only) */
/* The maps of the relay and egress programs. Sizes marked "load" are set by the loader; all maps
 * are pinned under their name here.
 */
#pragma once

#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

#include "abi.h"
#include "handover.h"

/* Mentioning a type here includes its full definition in the object's BTF: for Go, and for the keys
 * and values of inner maps, which are otherwise only declared.
 */
#define EXPORT_TYPE(kind, name) const kind name *export_##name __attribute__((unused))
EXPORT_TYPE(struct, flow4);
EXPORT_TYPE(struct, flow6);
EXPORT_TYPE(struct, prefix4);
EXPORT_TYPE(struct, prefix6);
EXPORT_TYPE(struct, flow);
EXPORT_TYPE(struct, handover);
EXPORT_TYPE(struct, guard_way);
EXPORT_TYPE(struct, guard_other);
EXPORT_TYPE(struct, stream_leg);
EXPORT_TYPE(struct, stream_pulse);
EXPORT_TYPE(enum, stream_kind);
EXPORT_TYPE(enum, stream_verdict);
EXPORT_TYPE(enum, rule_path);
EXPORT_TYPE(enum, drop_reason);
EXPORT_TYPE(enum, drop_scope);
EXPORT_TYPE(enum, lookup_kind);
EXPORT_TYPE(enum, prefix_by);
EXPORT_TYPE(enum, flow_from);
EXPORT_TYPE(enum, output_flag);
EXPORT_TYPE(enum, ttl_mode);
EXPORT_TYPE(enum, vlan_mode);
EXPORT_TYPE(enum, flow_flag);
EXPORT_TYPE(enum, shortcut_output);
EXPORT_TYPE(enum, fragment_kind);
EXPORT_TYPE(enum, note);
EXPORT_TYPE(enum, passed_kind);
EXPORT_TYPE(enum, user_scope);
EXPORT_TYPE(enum, user_kind);

/* config: schema, sizes and the lookup kinds in use. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct config);
} config SEC(".maps");

/* The template of the flow tables. A table is replaced as a whole, so its size follows the number
 * of rules.
 */
struct flow_table4 {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1024);
	__type(key, struct flow4);
	__type(value, struct flow);
};

struct flow_table6 {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1024);
	__type(key, struct flow6);
	__type(value, struct flow);
};

/* flow_tables4: its only entry is the current IPv4 flow table. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__uint(max_entries, 1);
	__type(key, __u32);
	__array(values, struct flow_table4);
} flow_tables4 SEC(".maps");

/* flow_tables6: its only entry is the current IPv6 flow table. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__uint(max_entries, 1);
	__type(key, __u32);
	__array(values, struct flow_table6);
} flow_tables6 SEC(".maps");

struct prefix_table4 {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(max_entries, 1024);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct prefix4);
	__type(value, struct flow);
};

struct prefix_table6 {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(max_entries, 1024);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct prefix6);
	__type(value, struct flow);
};

/* prefix_tables4: its only entry is the current IPv4 prefix table. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__uint(max_entries, 1);
	__type(key, __u32);
	__array(values, struct prefix_table4);
} prefix_tables4 SEC(".maps");

/* prefix_tables6: its only entry is the current IPv6 prefix table. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__uint(max_entries, 1);
	__type(key, __u32);
	__array(values, struct prefix_table6);
} prefix_tables6 SEC(".maps");

/* shortcuts: slot by hash -> input and flow entry of a rule, in addition to the flow tables. Size:
 * load. BPF_F_MMAPABLE aligns its values to a page: those of other arrays begin 56 bytes into a
 * cache line (struct bpf_array of Linux 6.18), so each would span one line more.
 */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct shortcut);
} shortcuts SEC(".maps");

/* fragments: datagrams whose first fragment was seen; LRU. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 16384);
	__type(key, struct fragment_key);
	__type(value, struct fragment);
} fragments SEC(".maps");

/* orphans: datagrams whose first fragment has not arrived; LRU. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 4096);
	__type(key, struct fragment_key);
	__type(value, struct orphans);
} orphans SEC(".maps");

/* fragment_stats: kind of fragment -> packets and bytes. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, FRAGMENT_KINDS);
	__type(key, __u32);
	__type(value, struct counter);
} fragment_stats SEC(".maps");

/* own_addresses: unicast addresses of this host, for the loop check. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 65536);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct own_address);
	__type(value, __u8);
} own_addresses SEC(".maps");

/* own_macs: MAC addresses of this host's interfaces, for the loop check. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 65536);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct own_mac);
	__type(value, __u8);
} own_macs SEC(".maps");

/* guard_slots: index by signature -> a relayed payload, and its senders. CPUs share it without a
 * lock: simultaneous counts may be lost, which only delays detection.
 */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, GUARD_SLOTS);
	__type(key, __u32);
	__type(value, struct guard_slot);
} guard_slots SEC(".maps");

/* loops: rule -> the paths on which its packets came back. Entries are created by the first loop
 * and removed with the rule.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 4096);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, __u32);
	__type(value, struct loop);
} loops SEC(".maps");

/* streams: stream of a rule with several inputs -> its settings. 0 is no stream. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, XDPCAST_MAX_STREAMS);
	__type(key, __u32);
	__type(value, struct stream);
} streams SEC(".maps");

/* stream_states: stream -> its state, and that of its legs. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, XDPCAST_MAX_STREAMS);
	__type(key, __u32);
	__type(value, struct stream_state);
} stream_states SEC(".maps");

/* stream_health: stream -> what is measured of it and its legs. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, XDPCAST_MAX_STREAMS);
	__type(key, __u32);
	__type(value, struct stream_health);
} stream_health SEC(".maps");

/* A row of a window: words of 32 bits block number and a bit for each of the block's 32
 * numbers.
 */
struct stream_window {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, STREAM_WORDS);
	__type(key, __u32);
	__type(value, __u64);
};

/* stream_windows: row -> words, which numbers of a stream have passed. A stream has one or more
 * rows; rows are created with the streams, as each takes 16 KiB.
 */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__uint(max_entries, XDPCAST_MAX_WINDOWS);
	__type(key, __u32);
	__array(values, struct stream_window);
} stream_windows SEC(".maps");

/* policers: rule, or max_rules + stats of an output -> token bucket. Size: load. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct policer);
} policers SEC(".maps");

/* xsks: row of an interface + queue -> AF_XDP socket. */
struct {
	__uint(type, BPF_MAP_TYPE_XSKMAP);
	__uint(max_entries, 64 * XDPCAST_MAX_QUEUES);
	__type(key, __u32);
	__type(value, __u32);
} xsks SEC(".maps");

/* cpus: CPU -> length of the queue to it, for steering. Size: load. */
struct {
	__uint(type, BPF_MAP_TYPE_CPUMAP);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct bpf_cpumap_val);
} cpus SEC(".maps");

/* rules: rule -> name, path and outputs. Size: load. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct rule);
} rules SEC(".maps");

/* outputs: first output + slot -> rewrite. Size: load. Mmapable like shortcuts. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct output);
} outputs SEC(".maps");

/* devices: output interfaces of rules with one output. */
struct {
	__uint(type, BPF_MAP_TYPE_DEVMAP);
	__uint(max_entries, 1024);
	__type(key, __u32);
	__type(value, struct bpf_devmap_val);
} devices SEC(".maps");

struct slots {
	__uint(type, BPF_MAP_TYPE_DEVMAP);
	__uint(max_entries, XDPCAST_MAX_SLOTS);
	__type(key, __u32);
	__type(value, struct bpf_devmap_val);
};

/* broadcast: first output of a rule with several -> the rule's devmap of slots.
 * Size: load.
 */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__uint(max_entries, 1);
	__type(key, __u32);
	__array(values, struct slots);
} broadcast SEC(".maps");

/* copies: first output + position -> where a copy goes, sorted by interface.
 * Size: load.
 */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct copy);
} copies SEC(".maps");

/* guesses: where the egress program last found the copy for an interface. CPUs share it: a guess is
 * verified before use, and may have any value.
 */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, XDPCAST_GUESSES);
	__type(key, __u32);
	__type(value, __u32);
} guesses SEC(".maps");

/* turns: first output + first position of an interface -> which of several outputs
 * on it is next. Size: load.
 */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct turn);
} turns SEC(".maps");

/* rule_stats: rule -> packets matched, and sent by its only output. Size: load. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct rule_stats);
} rule_stats SEC(".maps");

/* output_stats: stats of one of several outputs -> packets sent. Size: load. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct output_stats);
} output_stats SEC(".maps");

/* passed: enum passed_kind -> packets that matched no rule. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, PASSED_KINDS);
	__type(key, __u32);
	__type(value, struct counter);
} passed SEC(".maps");

/* kept: one entry, packets that rules of the fanout path kept from the host's stack. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct counter);
} kept SEC(".maps");

/* drops: reason -> packets and bytes of all rules; always exact. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, DROP_REASONS);
	__type(key, __u32);
	__type(value, struct counter);
} drops SEC(".maps");

/* rule_drops: the same by rule and output. Entries are created by the first drop; if it is full,
 * further drops are only in drops.
 */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_HASH);
	__uint(max_entries, 8192);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct drop_key);
	__type(value, struct counter);
} rule_drops SEC(".maps");

/* user_stats: counters of the user-space paths, in cells that workers map into their memory;
 * package account owns them. Size: load.
 */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__uint(map_flags, BPF_F_MMAPABLE);
	__type(key, __u32);
	__type(value, struct user_counter);
} user_stats SEC(".maps");

/* queriers: interface and family -> the querier there. Entries are created by the first query and
 * removed when the program is detached.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 2048);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct querier_key);
	__type(value, struct querier);
} queriers SEC(".maps");
