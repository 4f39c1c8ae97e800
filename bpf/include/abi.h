/* SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0-only) */
/* What the programs and Go share: keys, values and enumerations of the maps.
 *
 * Addresses are byte arrays in network order, so that bpftool prints
 * 239,1,1,1; everything else is in host order. Changing anything here is a new
 * XDPCAST_SCHEMA.
 */
#pragma once

#include <linux/types.h>

#define XDPCAST_SCHEMA 1
#define XDPCAST_MAX_SLOTS 64
#define XDPCAST_NAME_LEN 64

/* How a rule's packets travel. */
enum rule_path {
	PATH_NONE,
	PATH_KERNEL,
};

/* Why a matched packet, or one copy of it, was not sent. */
enum drop_reason {
	DROP_LOOP,	   /* the source MAC is the input interface's own */
	DROP_FRAGMENT,	   /* first fragment of a datagram: the rest carry no port to match */
	DROP_TTL,	   /* the TTL or hop limit would reach 0 */
	DROP_MTU,	   /* longer than the output's MTU */
	DROP_MULTI_BUFFER, /* spread over several buffers: cannot be copied */
	DROP_NOT_READY,	   /* the output has no interface, address or neighbour yet */
	DROP_NO_DEVICE,	   /* the output's row in its devmap is empty */
	DROP_NO_CHECKSUM,  /* IPv6 without a UDP checksum (RFC 8200 section 8.1) */
	DROP_INTERNAL,	   /* the maps contradict each other */
	DROP_REASONS,
};

/* Lookup kinds that some rule uses; the others are skipped. */
enum lookup_kind {
	LOOKUP_ANY4 = 1 << 0,
	LOOKUP_SOURCE4 = 1 << 1,
	LOOKUP_ANY6 = 1 << 2,
	LOOKUP_SOURCE6 = 1 << 3,
};

/* config: one entry, what every part must agree on. */
struct config {
	__u32 schema;	    /* XDPCAST_SCHEMA */
	__u32 lookup_kinds; /* enum lookup_kind, a superset of what the flow tables hold */
	__u64 netns_cookie; /* network namespace that the interface indexes belong to */
	__u32 max_rules;
	__u32 max_outputs;
};

/* Key of an IPv4 flow table. All zero source: any. */
struct flow4 {
	__u32 ifindex;
	__u16 vlan; /* 0: untagged */
	__u16 port;
	__u8 group[4];
	__u8 source[4];
};

/* Key of an IPv6 flow table. */
struct flow6 {
	__u32 ifindex;
	__u16 vlan;
	__u16 port;
	__u8 group[16];
	__u8 source[16];
};

/* Value of a flow table: all that a packet needs of its rule. A rule is changed by
 * replacing this value, which the kernel does at once, so that no packet sees
 * half of a change.
 */
struct flow {
	__u32 rule;	    /* index into rules and rule_stats */
	__u32 first_output; /* index into outputs; slot s is first_output + s */
	__u32 port;	    /* row of ports, with one output */
	__u16 outputs;	    /* 1 to XDPCAST_MAX_SLOTS */
	__u16 min_mtu;	    /* smallest MTU of several outputs; 0 when one is not ready */
	__u8 path;	    /* enum rule_path */
	__u8 pad;
	__u8 input_mac[6];
};

/* What people and a restarted control loop want to know of a rule; no program
 * reads it.
 */
struct rule {
	__u32 first_output;
	__u32 first_stats; /* index into output_stats of slot 0 */
	__u16 outputs;
	__u8 path; /* enum rule_path */
	__u8 pad;
	char name[XDPCAST_NAME_LEN]; /* empty: no rule */
};

enum output_flag {
	OUTPUT_READY = 1 << 0,
	OUTPUT_SOURCE_SET = 1 << 1,    /* write src; else keep the packet's */
	OUTPUT_DSCP_SET = 1 << 2,      /* write dscp; ECN is always kept */
	OUTPUT_CHECKSUM_ZERO = 1 << 3, /* IPv4: send without a UDP checksum */
};

enum ttl_mode {
	TTL_KEEP,
	TTL_DECREMENT,
	TTL_SET,
};

/* How one copy is rewritten. One cache line. */
struct output {
	__u8 dst_mac[6];
	__u8 src_mac[6];
	__u8 dst[16]; /* IPv4: the first four bytes */
	__u8 src[16];
	__u16 dst_port;
	__u16 src_port; /* 0: keep */
	__u32 ifindex;
	__u32 stats; /* index into output_stats: counters outlive a change of address */
	__u16 mtu;   /* bytes of IP packet */
	__u8 flags;  /* enum output_flag */
	__u8 ttl_mode;
	__u8 ttl;
	__u8 dscp;
	__u8 family; /* 4 or 6 */
	__u8 pad;
};

struct rule_stats {
	__u64 packets;	    /* matched, whatever became of them */
	__u64 bytes;	    /* of whole frames */
	__u64 last_seen_ns; /* CLOCK_MONOTONIC, as coarse as the kernel's tick */
};

struct output_stats {
	__u64 packets; /* handed to the device */
	__u64 bytes;
};

struct counter {
	__u64 packets;
	__u64 bytes;
};

/* What a drop is counted for. */
enum drop_scope {
	DROP_RULE,    /* before the packet was copied: it misses every output */
	DROP_OUTPUT,  /* one output's copy */
	DROP_UNKNOWN, /* nobody can tell whose it was; id is 0 */
};

/* Key of rule_drops. */
struct drop_key {
	__u32 id;     /* rule, or stats of an output */
	__u16 scope;  /* enum drop_scope */
	__u16 reason; /* enum drop_reason */
};

/* Key of queriers. */
struct querier_key {
	__u32 ifindex;
	__u32 family; /* 4: IGMP, 6: MLD */
};

/* The multicast querier that an interface last heard from. */
struct querier {
	__u64 packets;	    /* queries, of whatever querier */
	__u64 last_seen_ns; /* CLOCK_MONOTONIC, as coarse as the kernel's tick */
	__u8 address[16];   /* IPv4: the first four bytes; 0.0.0.0 is a switch without one */
	__u32 version;	    /* of the last query: IGMP 1 to 3, MLD 1 or 2 */
	__u32 pad;
};

/* Where the copies of a rule with several outputs go: one for each output, sorted
 * by interface, so that the egress program finds its own.
 */
struct copy {
	__u32 ifindex;
	__u16 slot;
	__u16 same; /* outputs of the rule on this interface; right in the first of them */
};

/* Which of several outputs on one interface is next. */
struct turn {
	__u32 sequence; /* of the frame whose copies are being counted */
	__u32 next;
};

/* What devices did with frames after the programs had returned. */
struct port_stats {
	__u64 transmit_drops;  /* the driver did not take them */
	__u64 redirect_errors; /* the device was down, or the frame too long for it */
};
