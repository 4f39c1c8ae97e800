/* SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0-only) */
/* Keys, values and enumerations of the maps, shared by the programs and Go.
 *
 * Addresses are byte arrays in network order, so that bpftool prints 239,1,1,1;
 * everything else is in host order. Any change here needs a new XDPCAST_SCHEMA.
 */
#pragma once

#include <linux/types.h>

#define XDPCAST_SCHEMA 7
#define XDPCAST_MAX_SLOTS 64
#define XDPCAST_NAME_LEN 80
#define XDPCAST_GUESSES 4096   /* a power of two */
#define XDPCAST_MAX_QUEUES 64  /* of an interface, for AF_XDP */
#define XDPCAST_MAX_STEERED 64 /* CPUs that packets are steered to; a power of two */

/* The path that forwards a rule's packets. */
enum rule_path {
	PATH_NONE,
	PATH_KERNEL,
	PATH_AFXDP,  /* to the AF_XDP socket of the interface and queue */
	PATH_FANOUT, /* to the stack, whose packet tap has a PACKET_FANOUT group */
};

/* Why a matched packet, or one copy of it, was not sent. */
enum drop_reason {
	DROP_LOOP,	   /* the source MAC or address is our own */
	DROP_TTL,	   /* below the output's minimum, or would become 0 */
	DROP_MTU,	   /* longer than the output's MTU */
	DROP_MULTI_BUFFER, /* in several buffers: cannot be copied */
	DROP_NOT_READY,	   /* the output has no interface or address yet */
	DROP_NO_NEIGHBOUR, /* the output's next hop has not been resolved */
	DROP_NO_DEVICE,	   /* the output's row in its devmap is empty */
	DROP_NO_CHECKSUM,  /* IPv6 without a UDP checksum (RFC 8200 section 8.1) */
	DROP_PORT,	   /* the output's port would leave 1 to 65535 */
	DROP_POLICED,	   /* beyond the rate of the rule or output */
	DROP_NO_SOCKET,	   /* no AF_XDP socket takes the rule's packets */
	DROP_TX_FULL,	   /* user-space paths: the output's queue stayed full */
	DROP_CPU_FULL,	   /* fanout path: the queue to the worker's CPU was full */
	DROP_NO_CARRIER,   /* the output's interface is up but has no carrier */
	DROP_WORKER_LOST,  /* user-space paths: handed to a worker that did not forward it */
	DROP_LOOPING,	   /* sent by this host before and returned through a loop */
	/* Of legs, as in enum stream_verdict. rule_stats counts DROP_DUPLICATE and DROP_STANDBY:
	 * they are half of all packets.
	 */
	DROP_DUPLICATE,
	DROP_LATE,
	DROP_ASTRAY,
	DROP_OLD_SESSION,
	DROP_CONTENDED,
	DROP_NO_NUMBER,
	DROP_STANDBY,
	DROP_INTERNAL, /* the maps contradict each other, or a frame lacks headroom */
	DROP_REASONS,
};

/* Lookup kinds in lookup order: the first that finds a rule wins. */
enum lookup_kind {
	LOOKUP_SOURCE_PORT = 1 << 0, /* source, group, port */
	LOOKUP_PORT = 1 << 1,	     /* any source, group, port */
	LOOKUP_SOURCE = 1 << 2,	     /* source, group, any port */
	LOOKUP_ANY = 1 << 3,	     /* any source, group, any port */
	LOOKUP_PREFIXES = 4,	     /* shift: the same four for group prefixes, after all others */
	/* Source prefixes: each after the same kind with one source, before that with any. */
	LOOKUP_SOURCES_PORT = 1 << 8, /* prefix of sources, group, port */
	LOOKUP_SOURCES = 1 << 9,      /* prefix of sources, group, any port */
	/* Source and group prefixes: before any source with a group prefix. */
	LOOKUP_BOTH_PORT = 1 << 10, /* prefix of sources, prefix of groups, port */
	LOOKUP_BOTH = 1 << 11,	    /* prefix of sources, prefix of groups, any port */
};

/* What the prefix of a prefix table's key matches. */
enum prefix_by {
	PREFIX_BY_GROUP,
	/* Swapped: source holds the group, group the source prefix. A flow of PATH_NONE marks
	 * sources that no rule matches.
	 */
	PREFIX_BY_SOURCE,
	/* Prefixes of both, in two steps. First, group holds the source prefix, and the flow's
	 * rule is the id of a class: sources that the same rules match.
	 */
	PREFIX_CLASS,
	/* Then source begins with the class id, and group holds the group prefix. PATH_NONE: no
	 * such rule matches.
	 */
	PREFIX_IN_CLASS,
};

/* Packets that no rule matches. */
enum passed_kind {
	PASSED_ALL,
	PASSED_BROADCAST, /* of these, IPv4 UDP in frames to ff:ff:ff:ff:ff:ff */
	PASSED_KINDS,
};

/* Fragments, by what is known of their datagram. */
enum fragment_kind {
	FRAGMENT_FIRST,	 /* carries the ports; a rule matches the datagram */
	FRAGMENT_LATER,	 /* its first fragment was seen */
	FRAGMENT_ORPHAN, /* it was not, or it has expired: passed to the stack */
	FRAGMENT_KINDS,
};

/* Per-rule observations that are no drops. */
enum note {
	NOTE_MALFORMED,	 /* UDP that ends beyond its packet, or a packet cut short: passed */
	NOTE_ORPHAN,	 /* fragments received before the first one: passed */
	NOTE_UNFINISHED, /* UDP checksum left incomplete for an offload that did not happen */
	NOTE_ECHO,	 /* a payload another sender sent before, above its rate: relayed */
	NOTES,
};

#define OWN_WORDS 4
#define OWN_MAC_WORDS 8

/* Value of config, one entry: settings shared by programs and control plane. */
struct config {
	__u32 schema;  /* XDPCAST_SCHEMA; the first field in every release */
	__u16 lookup4; /* enum lookup_kind, a superset of what the tables hold */
	__u16 lookup6;
	__u64 netns_cookie; /* network namespace that the interface indexes belong to */
	__u32 max_rules;
	__u32 max_outputs;
	__u64 own[OWN_WORDS]; /* a bit for the hash of each own address: a lookup saved */
	__u32 steered;	      /* number of CPUs that packets are steered to; 0: no steering */
	__u16 cpu[XDPCAST_MAX_STEERED]; /* their ids */
	__u32 shortcut_shift;		/* 64 minus the bits of a shortcut index; 0: off */
	__u64 own_macs[OWN_MAC_WORDS];	/* the same as own, for own MAC addresses */
};

/* Bit of a key's field from: the flow matches packets that this host sends. The workers of
 * the packet tap handle it; no program looks up such a key.
 */
enum flow_from {
	FROM_HOST = 1 << 8,
};

/* Key of an IPv4 flow table. All zero source: any; port 0: any. */
struct flow4 {
	__u32 ifindex;
	__u16 vlan;	  /* the only or the inner tag; 0: untagged */
	__u16 outer_vlan; /* 0: no second tag */
	__u16 port;
	__u16 from; /* enum flow_from */
	__u8 group[4];
	__u8 source[4];
};

/* Key of an IPv6 flow table. */
struct flow6 {
	__u32 ifindex;
	__u16 vlan;
	__u16 outer_vlan;
	__u16 port;
	__u16 from;
	__u8 group[16];
	__u8 source[16];
};

/* Key of an IPv4 prefix table. Everything before the group is exact. */
struct prefix4 {
	__u32 prefixlen; /* PREFIX4_EXACT plus the bits of the group */
	__u32 ifindex;
	__u16 vlan;
	__u16 outer_vlan;
	__u16 port;
	__u16 by; /* enum prefix_by, and FROM_HOST */
	__u8 source[4];
	__u8 group[4];
};

/* Key of an IPv6 prefix table. */
struct prefix6 {
	__u32 prefixlen;
	__u32 ifindex;
	__u16 vlan;
	__u16 outer_vlan;
	__u16 port;
	__u16 by;
	__u8 source[16];
	__u8 group[16];
};

#define PREFIX4_EXACT 128
#define PREFIX6_EXACT 224

enum flow_flag {
	FLOW_UNICAST = 1 << 0,	   /* match only frames sent to input_mac */
	FLOW_ALLOW_LOOP = 1 << 1,  /* match the host's own frames, too */
	FLOW_NO_CHECKSUM = 1 << 2, /* relay IPv6 without a UDP checksum, too */
	FLOW_POLICED = 1 << 3,	   /* the rule has a policer */
	FLOW_FALLBACK = 1 << 4,	   /* use the kernel path if no socket is bound */
	FLOW_LOCAL = 1 << 5,	   /* PATH_FANOUT: the host's receivers get the packets, too */
	FLOW_STEERED = 1 << 6,	   /* PATH_FANOUT: to the worker's CPU that the flow hashes to */
	FLOW_UNGUARDED = 1 << 7,   /* not checked by the loop guard */
	FLOW_TWO_WAY = 1 << 8,	   /* an intended loop: the loop guard compares numbers, too */
	FLOW_FINISH = 1 << 9,	   /* complete UDP checksums that offload left incomplete */
	FLOW_LONG_WAY = 1 << 10,   /* a leg whose numbers plain_next (stream.h) does not read */
};

/* Value of a flow table: everything a packet needs of its rule. A rule changes by
 * replacing this value, which is atomic: no packet sees half of a change.
 */
struct flow {
	__u32 rule;	    /* index into rules and rule_stats */
	__u32 first_output; /* index into outputs; slot s is first_output + s */
	__u32 device;	    /* row of devices, if there is one output */
	__u32 sockets;	    /* PATH_AFXDP: row in xsks of the input's first queue */
	/* Read as one word: 0 rules out all of these at once (relay.bpf.c). */
	__u16 flags;  /* enum flow_flag */
	__u8 path;    /* enum rule_path */
	__u8 routed;  /* not 0: mirrors a multicast route of the kernel, which forwards packets up
		       * to this TTL itself
		       */
	__u16 stream; /* index into streams; 0: the rule has one input */
	__u8 leg;     /* index of the input in its stream */
	__u8 outputs; /* 1 to XDPCAST_MAX_SLOTS */

	__u16 min_mtu; /* smallest MTU of several outputs; 0 while one is not ready */
	__u8 input_mac[6];
};

/* What a slot of the map shortcuts holds of a rule's output; IPv4. */
enum shortcut_output {
	SHORTCUT_NONE,	   /* nothing */
	SHORTCUT_OUTPUT,   /* the only output, which is ready and not rare */
	SHORTCUT_PREPARED, /* the same, and nothing rare in the flow: send_prepared (relay.bpf.c) */
	SHORTCUT_LEG, /* the same, but that the flow is a leg that plain_next judges: send_leg */
};

/* A slot of the map shortcuts: key, flow entry and, for IPv4, the rewrite of a single output:
 * all that packets of most rules need, in two adjacent cache lines.
 */
struct shortcut {
	struct flow flow;
	/* Compared as two words. */
	__u8 group[4];
	__u32 ifindex;
	__u16 vlan;
	__u16 outer_vlan;
	__u16 port;
	__u8 family;	 /* 4 or 6; 0: empty */
	__u8 has_output; /* enum shortcut_output */

	__u8 source[4]; /* all zero: any */
	/* SHORTCUT_PREPARED and SHORTCUT_LEG: the output's rewrite, as far as it is the same for
	 * all packets (plain.h).
	 */
	__u32 ip_sum;
	__u16 udp_sum;
	__be16 dst_port;
	__be16 src_port; /* 0: keep */
	__u8 ttl_or;
	__u8 ttl_sub;

	/* IPv4 with has_output: the output's first cache line. IPv6: group and source. */
	__u8 second[64];
};

/* For bpftool and a restarted control loop; no program reads it. */
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
	OUTPUT_SOURCE_SET = 1 << 1,    /* write src; otherwise keep the packet's */
	OUTPUT_DSCP_SET = 1 << 2,      /* write dscp; ECN is always kept */
	OUTPUT_CHECKSUM_ZERO = 1 << 3, /* IPv4: send without a UDP checksum */
	OUTPUT_RARE = 1 << 4,	       /* uses the second cache line */
	OUTPUT_PORT_ADD = 1 << 5,      /* rare: add port_shift to the packet's port */
	OUTPUT_PCP_SET = 1 << 6,       /* rare: write pcp */
	OUTPUT_POLICED = 1 << 7,       /* rare: the output has a policer */
	OUTPUT_ONE_BUFFER = 1 << 8,    /* rare: the device cannot send multi-buffer frames */
	OUTPUT_ROUTED = 1 << 9, /* of a multicast route: the egress program calls route_frame */
};

enum vlan_mode {
	VLAN_KEEP,
	VLAN_POP,
	VLAN_SET, /* vlan, and outer_vlan unless it is 0, replaces the packet's tags */
};

enum ttl_mode {
	TTL_KEEP,
	TTL_DECREMENT,
	TTL_SET,
};

/* How one copy is rewritten. Two cache lines; most outputs need only the first. */
struct output {
	__u8 dst_mac[6];
	__u8 src_mac[6];
	__u8 dst[16]; /* IPv4: the first four bytes */
	__u8 src[16];
	__u16 dst_port;
	__u16 src_port; /* 0: keep */
	__u32 ifindex;
	__u32 stats; /* index into output_stats: counters survive an address change */
	__u16 mtu;   /* bytes of the IP packet */
	__u16 flags; /* enum output_flag */
	__u8 ttl_mode;
	__u8 ttl;
	__u8 dscp;
	__u8 family; /* 4 or 6 */

	__s32 port_shift;
	__u32 policer; /* index into policers */
	__u16 vlan;
	__u16 outer_vlan;
	__u8 vlan_mode; /* enum vlan_mode */
	__u8 pcp;	/* 0 to 7 */
	__u8 min_ttl;	/* 0: any */
	__u8 dst_len;	/* bits of dst to write, the rest stay the packet's; 0: all */
	__u8 blocked;	/* enum drop_reason while the output is not ready */
	__u8 unused[3];
	__u32 held; /* first output of a routed flow: nonzero leaves its packets to the kernel */
	__u8 reserved[40];
};

/* How several inputs are merged into one stream. */
enum stream_kind {
	STREAM_NONE,
	STREAM_FAILOVER,  /* one leg passes at a time */
	STREAM_FIELD,	  /* a number at an offset of the UDP payload */
	STREAM_RTP,	  /* 16 bits; the session is the SSRC */
	STREAM_RFC4175,	  /* RTP with the extended number after its header */
	STREAM_MOLDUDP64, /* numbers count messages; the session is the session name */
	STREAM_SINGLE,	  /* one input: every packet passes; numbers are only monitored */
};

/* The verdict on a leg's packet. */
enum stream_verdict {
	STREAM_PASSED,	    /* the first copy of its number, or from the active leg */
	STREAM_DUPLICATE,   /* the number has been received, on this leg or another */
	STREAM_LATE,	    /* its number is older than the window */
	STREAM_ASTRAY,	    /* its number or session is far off and not yet confirmed */
	STREAM_OLD_SESSION, /* of the sender's previous session */
	STREAM_CONTENDED,   /* lost every compare-and-swap to other CPUs */
	STREAM_NO_NUMBER,   /* not in the rule's format, or too short */
	STREAM_STANDBY,	    /* failover: another leg is active */
	STREAM_VERDICTS,
	STREAM_BEAT, /* a heartbeat or RTCP, without a number of its own: passes */
};

#define XDPCAST_MAX_LEGS 4
#define XDPCAST_MAX_STREAMS 1024
#define XDPCAST_MAX_WINDOWS 4096
#define STREAM_WORDS 2048 /* per row of a window; each holds 32 numbers */

/* Settings of a rule with several inputs, or with monitored numbers; written only by the
 * control plane.
 */
struct stream {
	__u64 skew_ns;	   /* numbers older than this to twice this never pass again */
	__u64 reset_ns;	   /* silence after which a sender may restart its numbers */
	__u64 silence_ns;  /* failover: a leg silent for longer is down */
	__u64 back_ns;	   /* a better leg takes over once up for this long; 0: never */
	__u32 first_row;   /* of stream_windows */
	__u32 word_mask;   /* words of the window minus 1 */
	__u32 number_mask; /* 2^bits - 1 of a number */
	__u32 bias;	   /* how far behind the head a number may be read as ... */
	__u32 behind;	   /* ... and how far back the window reaches */
	__u32 ahead;	   /* how far ahead of the head a number may be */
	__u32 slack;	   /* largest gap between consecutive numbers of a leg */
	__u16 offset;	   /* STREAM_FIELD: offset of the number in the UDP payload */
	__u16 count_offset;
	__u8 kind;	  /* enum stream_kind */
	__u8 width;	  /* of the number, in bytes */
	__u8 count_width; /* of the field with the packet's count of numbers; 0: one each */
	__u8 little;	  /* 1: little endian */
	__u8 shift;	  /* 32 minus the bits of a number */
	__u8 pass_other;  /* 1: packets without a number pass */
	__u8 watch;	  /* STREAM_FAILOVER, STREAM_SINGLE: format of the monitored numbers */
	__u8 pad;
	__u32 clock; /* RTP: timestamp ticks per second; 0: from the payload type */
	__u32 reserved;
};

/* Receive state of one leg. Usually one CPU receives a leg and is the only writer; several
 * writers cost only the accuracy of the counters.
 */
struct stream_leg {
	__u32 session;
	__u32 expected; /* number; while run has steady set, the one after position's */
	__u32 candidate_session;
	__u32 candidate;  /* number expected after one that jumped */
	__u32 run;	  /* struct stream_run (stream.h): how many in a row have followed it */
	__u32 distrusted; /* 1: it carried another stream's session */
	__u64 jumped_ns;  /* when the leg's numbers last jumped */
	__u64 history;	  /* bit i: number expected - 1 - i was seen */
	__u64 position;	  /* position of the last number */
	__u64 won;	  /* packets that passed */
	__u64 numbers;	  /* numbers those packets carried, if they may carry several */

	__u64 seen_ns; /* the last packet; CLOCK_MONOTONIC, tick resolution */
	__u64 up_ns;   /* failover: up without silence since */
	__u64 lost;    /* numbers missing on the leg */
	__u64 doubled;
	__u64 reordered;
	__u64 resets;  /* jumps of its numbers */
	__u64 senders; /* changes of the session */
	__u64 others;  /* packets without their own number */
};

/* State of a stream; written by the programs. All times are CLOCK_MONOTONIC at tick
 * resolution.
 */
struct stream_state {
	__u64 head;	  /* the newest position, up to 31 numbers behind */
	__u64 floor;	  /* positions up to this one are older than the skew */
	__u64 next_floor; /* the floor after this turn: the newest position when it began */
	__u64 turn_ns;	  /* when the turn began */
	__u64 pass_ns;	  /* the last packet that passed */
	__u64 sessions;	  /* lower half: the active session; upper half: the previous one */
	__u64 session_ns; /* active since; with failover, the active leg's time */
	__u32 epoch;	  /* twice the restarts; odd: one is in progress */
	__u32 active;	  /* failover: the active leg */

	__u64 start;	   /* position of the first number since the last restart */
	__u64 before;	   /* numbers before that restart */
	__u64 restarts;	   /* with failover, changes of the active leg, and its first choice */
	__u32 left;	   /* number up to which the previous session passed */
	__u32 session_leg; /* the leg that introduced the session */
	__u64 sample; /* lower half of a position, and a checksum of the packet that passed there */
	__u32 differ[XDPCAST_MAX_LEGS]; /* per leg: copies of samples whose checksum differs */
	__u8 differs[XDPCAST_MAX_LEGS]; /* 1: the last copy of a sample differed */
	__u32 sample_waits;		/* 1: for a leg's copy; no other sample is taken */

	struct stream_leg legs[XDPCAST_MAX_LEGS];
};

/* Timing of a leg. Written only for samples, except filled. */
struct stream_pulse {
	__u64 timed_ns;	  /* arrival of the packet that the next is timed from, precise clock */
	__u64 jitter_ns;  /* times 16, as in RFC 3550 section A.8 */
	__u64 gap_ns;	  /* 16 times the mean gap between packets; 0: use their timestamps */
	__u64 lag_ns;	  /* 8 times the mean delay after the first copy of a number */
	__u64 filled;	  /* numbers up to next_floor that passed after it was set */
	__u32 timestamp;  /* of the packet at timed_ns */
	__u32 timed_next; /* the number expected after it */
	__u64 pad[2];
};

/* Measurements of a stream; no verdict depends on them. */
struct stream_health {
	__u64 sample_ns;   /* when the sample passed, precise clock */
	__u64 marked;	   /* numbers up to next_floor that had passed, minus filled at that time */
	__u64 lost;	   /* numbers up to floor missing on all legs */
	__u32 sample_legs; /* a bit for each leg that has carried the sample */
	__u32 pad;
	__u64 reserved[4];

	struct stream_pulse legs[XDPCAST_MAX_LEGS];
};

/* A token bucket, stored as the time when it is full again (GCRA, ITU-T I.371): one word,
 * updated by compare-and-swap. Time is in sixteenths of a nanosecond of CLOCK_MONOTONIC.
 */
struct policer {
	__u64 full;	/* when the bucket is full again */
	__u64 cost;	/* per packet or byte, in 2^-16 units of that time */
	__u64 depth;	/* the most that full may be ahead of the clock */
	__u64 rate;	/* as configured: packets or bits per second; 0: no policer */
	__u64 burst;	/* packets or bytes */
	__u32 by_bytes; /* 1: cost is per byte, 0: per packet */
	__u32 pad;
};

/* Key of fragments: the fields that all fragments of a datagram share. */
struct fragment_key {
	__u32 ifindex;
	__u16 vlan;
	__u16 outer_vlan;
	__u32 id;
	__u32 family; /* 4 or 6 */
	__u8 src[16];
	__u8 dst[16];
};

/* Recorded from a first fragment for the later ones. */
struct fragment {
	__u64 seen_ns; /* CLOCK_MONOTONIC, tick resolution */
	__u16 port;
	__u16 verdict; /* of a leg's datagram: enum stream_verdict */
	__u16 pad[2];
};

/* Fragments received before the first one of their datagram. */
struct orphans {
	__u64 seen_ns; /* the earliest; CLOCK_MONOTONIC, tick resolution */
	__u32 packets;
	__u32 bytes;
};

/* Key of own_addresses: an IPv4 address as ::ffff:a.b.c.d. */
struct own_address {
	__u8 address[16];
};

/* Key of own_macs. */
struct own_mac {
	__u8 mac[6];
	__u8 pad[2];
};

struct rule_stats {
	__u64 packets; /* matched, including dropped ones */
	__u64 bytes;   /* of whole frames as received */
	/* With one output, what the kernel path handed to the device; otherwise output_stats
	 * counts it.
	 */
	__u64 sent_packets;
	__u64 sent_bytes;
	/* For the loop guard (guard.h). */
	__u64 tick;	  /* of the kernel's clock (jiffies) */
	__u64 look_until; /* packet count up to which this tick's are checked */
	/* The fields below are written once a tick. */
	__u64 last_seen_ns; /* CLOCK_MONOTONIC, tick resolution */
	__u64 tick_packets; /* packets when this tick began */
	__u32 pace;	    /* most packets per tick, decaying slowly */
	__u32 watched;	    /* remaining ticks in which every packet is checked */
	/* Those of packets redirected to AF_XDP sockets. */
	__u64 handed_packets;
	__u64 handed_bytes;
	/* Those of packets dropped with DROP_DUPLICATE or DROP_STANDBY. */
	__u64 copies_packets;
	__u64 copies_bytes;
};

#define GUARD_SLOTS 16384 /* a power of two */
#define GUARD_OTHERS 6
#define GUARD_WAYS 4

/* A sender of a payload that another sender sent first. */
struct guard_other {
	__u32 sender;  /* hash of source MAC, address and port; 0: free */
	__u16 packets; /* relayed */
	__u16 soon;    /* of these, soon after the payload was last relayed */
};

/* State of one payload: its senders, and how often each sent it. */
struct guard_slot {
	__u32 signature; /* hash of some bytes of the payload */
	__u32 seen;	 /* when last relayed, in units of 2^20 ns of CLOCK_MONOTONIC */
	__u32 rule;	 /* rule that relayed it last */
	__u32 sender;	 /* hash of the first packet's source MAC and address */
	__u32 packets;	 /* from that sender and port */
	__u32 soon;	 /* of these, soon after the payload was last relayed */
	__u32 cut;	 /* packets dropped as returned */
	__u32 born;	 /* when the first packet arrived, unit as seen */
	__u32 early;	 /* a bit for each of others that arrived soon after born */
	__u32 arrivals;	 /* packets after the first, from any sender */
	__u32 marked;	 /* value of arrivals when a mark last returned */
	__u16 steps;	 /* a bit for each mark that returned recently */
	__u16 foreign;	 /* packets with another relay's mark since this one marked */
	__u16 id;	 /* the first packet's field that a mark would replace, network order */
	__u16 is_marked; /* 1: marked, at marked_at */
	__u32 marked_at; /* unit as seen */
	__u16 port;	 /* source port of the first packet, network order */
	__u16 sum;	 /* sum of the payload, derived from a UDP checksum; 0: unknown */
	struct guard_other others[GUARD_OTHERS];
};

/* A path by which packets return to a rule. */
struct guard_way {
	__u64 first_ns;	   /* CLOCK_MONOTONIC, tick resolution */
	__u64 last_ns;	   /* 0: free */
	__u64 forgiven_ns; /* when its sender was found to be an origin */
	__u64 packets;	   /* dropped */
	__u64 probe_ns;	   /* when a packet was last let through, to see whether it returns */
	__u32 probe;	   /* that packet's signature until the result is known; otherwise 0 */
	__u32 orphans;	   /* packets in a row that this host had not sent */
	__u32 sender;
	__u32 ifindex; /* interface they arrive on */
	__u32 from;    /* rule that sent the last one */
	__u8 mac[6];   /* their source MAC */
	__u8 pad[6];
	__u8 source[16]; /* their source; IPv4 as ::ffff:a.b.c.d */
};

/* A rule whose packets return. */
struct loop {
	__u64 since_ns; /* the first return after none for GUARD_HEAL_NS */
	__u64 last_ns;	/* the last return */
	struct guard_way ways[GUARD_WAYS];
};

/* Counters of an output of a rule with several. */
struct output_stats {
	__u64 packets; /* handed to the device */
	__u64 bytes;
};

struct counter {
	__u64 packets;
	__u64 bytes;
};

/* What a drop is counted against. */
enum drop_scope {
	DROP_RULE,    /* before the packet was copied: it misses every output */
	DROP_OUTPUT,  /* one output's copy */
	DROP_UNKNOWN, /* the rule is unknown; id is 0 */
	DROP_NOTE,    /* no drop: a note on a rule; reason is enum note */
};

/* Key of rule_drops. */
struct drop_key {
	__u32 id;     /* rule, or stats of an output */
	__u16 scope;  /* enum drop_scope */
	__u16 reason; /* enum drop_reason */
};

/* What a cell of user_stats counts, and for which object. */
enum user_scope {
	USER_FREE,
	USER_RULE,   /* id: rule */
	USER_OUTPUT, /* id: stats of an output */
	USER_TOTAL,  /* id 0: drops of removed rules, and counts without a rule */
	USER_INPUT,  /* id: interface, of packets lost before the workers */
	USER_DEVICE, /* id: interface, of packets lost after the workers */
	USER_LOOSE,  /* a rule or output without an id */
	USER_HEADER, /* the first cell: packets is the number of pages ever used */
};

enum user_kind {
	USER_MATCHED,
	USER_DELIVERED, /* matched by the relay program and received by a worker */
	USER_SENT,
	USER_FRAGMENT_FIRST,
	USER_FRAGMENT_LATER,
	USER_FRAGMENT_ORPHAN,
	USER_UNSENT, /* counted as sent, but refused by the device */
	USER_NO_FRAME,
	USER_RING_FULL,
	USER_RULE_GONE,
	USER_NOTE = 16, /* and enum note */
	USER_DROP = 32, /* and enum drop_reason */
};

/* A cell of user_stats. */
struct user_counter {
	__u32 id;
	__u8 scope;   /* enum user_scope */
	__u8 kind;    /* enum user_kind */
	__u16 writer; /* path << 14 | worker */
	__u64 packets;
	__u64 bytes;
	__u64 last_seen_ns; /* CLOCK_MONOTONIC */
};

/* Key of queriers. */
struct querier_key {
	__u32 ifindex;
	__u32 family; /* 4: IGMP, 6: MLD */
};

/* The multicast querier last heard on an interface. */
struct querier {
	__u64 packets;	    /* queries, from any querier */
	__u64 last_seen_ns; /* CLOCK_MONOTONIC, tick resolution */
	__u8 address[16];   /* IPv4: the first four bytes; 0.0.0.0: a switch without an address */
	__u32 version;	    /* of the last query: IGMP 1 to 3, MLD 1 or 2 */
	__u32 pad;
};

/* One output of a rule with several, sorted by interface so that the egress program finds
 * its own.
 */
struct copy {
	__u32 ifindex;
	__u16 slot;
	__u16 same; /* outputs of the rule on this interface; valid in the first of them */
};

/* Next of several outputs on one interface. */
struct turn {
	__u32 sequence; /* of the frame being copied */
	__u32 next;
};

/* Frames of the current bulk that the egress program dropped: the kernel's tracepoint does
 * not tell them from those the device dropped.
 */
struct egress_drops {
	__u32 ifindex;
	__u32 packets;
};

/* Frames that devices refused after the programs returned. */
struct device_stats {
	__u64 transmit_drops;  /* the driver refused them */
	__u64 redirect_errors; /* the device was down, or the frame too long for it */
};
