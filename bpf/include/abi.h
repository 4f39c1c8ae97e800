/* SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0-only) */
/* What the programs and Go share: keys, values and enumerations of the maps.
 *
 * Addresses are byte arrays in network order, so that bpftool prints
 * 239,1,1,1; everything else is in host order. Changing anything here is a new
 * XDPCAST_SCHEMA.
 */
#pragma once

#include <linux/types.h>

#define XDPCAST_SCHEMA 7
#define XDPCAST_MAX_SLOTS 64
#define XDPCAST_NAME_LEN 80
#define XDPCAST_GUESSES 4096   /* a power of two */
#define XDPCAST_MAX_QUEUES 64  /* of an interface, for AF_XDP */
#define XDPCAST_MAX_STEERED 64 /* CPUs that packets are steered to; a power of two */

/* How a rule's packets travel. */
enum rule_path {
	PATH_NONE,
	PATH_KERNEL,
	PATH_AFXDP,  /* to the AF_XDP socket of the interface and queue */
	PATH_FANOUT, /* to the stack, whose packet tap has a PACKET_FANOUT group */
};

/* Why a matched packet, or one copy of it, was not sent. */
enum drop_reason {
	DROP_LOOP,	   /* the source MAC or address is our own */
	DROP_TTL,	   /* below what the output lets pass, or it would reach 0 */
	DROP_MTU,	   /* longer than the output's MTU */
	DROP_MULTI_BUFFER, /* spread over several buffers: cannot be copied */
	DROP_NOT_READY,	   /* the output has no interface or address yet */
	DROP_NO_NEIGHBOUR, /* the output's next hop has not been resolved */
	DROP_NO_DEVICE,	   /* the output's row in its devmap is empty */
	DROP_NO_CHECKSUM,  /* IPv6 without a UDP checksum (RFC 8200 section 8.1) */
	DROP_PORT,	   /* the output's port would leave 1 to 65535 */
	DROP_POLICED,	   /* beyond the rate of the rule or output */
	DROP_NO_SOCKET,	   /* no AF_XDP socket takes the rule's packets */
	DROP_TX_FULL,	   /* user-space paths: the output's queue stayed full */
	DROP_CPU_FULL,	   /* fanout path: the queue to the worker's CPU was full */
	DROP_NO_CARRIER,   /* the output's interface is up and carries nothing */
	DROP_WORKER_LOST,  /* user-space paths: given to a worker that did not forward it */
	DROP_LOOPING,	   /* it has left this host before, and came back by a way that loops */
	/* Of legs, as in enum stream_verdict. DROP_DUPLICATE and DROP_STANDBY are counted in
	 * rule_stats: they are half of all packets.
	 */
	DROP_DUPLICATE,
	DROP_LATE,
	DROP_ASTRAY,
	DROP_OLD_SESSION,
	DROP_CONTENDED,
	DROP_NO_NUMBER,
	DROP_STANDBY,
	DROP_INTERNAL, /* the maps contradict each other, or a frame has no room in front */
	DROP_REASONS,
};

/* Lookup kinds, in their order: the first that finds a rule wins. */
enum lookup_kind {
	LOOKUP_SOURCE_PORT = 1 << 0, /* source, group, port */
	LOOKUP_PORT = 1 << 1,	     /* any source, group, port */
	LOOKUP_SOURCE = 1 << 2,	     /* source, group, any port */
	LOOKUP_ANY = 1 << 3,	     /* any source, group, any port */
	LOOKUP_PREFIXES = 4,	     /* shift: the same four for prefixes, behind all others */
	/* In between: prefixes of sources, each behind the kind of one source and in front
	 * of that of any.
	 */
	LOOKUP_SOURCES_PORT = 1 << 8, /* prefix of sources, group, port */
	LOOKUP_SOURCES = 1 << 9,      /* prefix of sources, group, any port */
	/* And those of prefixes of groups besides, in front of any source and a prefix. */
	LOOKUP_BOTH_PORT = 1 << 10, /* prefix of sources, prefix of groups, port */
	LOOKUP_BOTH = 1 << 11,	    /* prefix of sources, prefix of groups, any port */
};

/* What the longest prefix of a prefix table's key is of. */
enum prefix_by {
	PREFIX_BY_GROUP,
	/* group and source are swapped: source holds the group, and group the prefix of
	 * sources. A flow of PATH_NONE is for sources that no rule takes.
	 */
	PREFIX_BY_SOURCE,
	/* Prefixes of both, in two steps. First group holds the prefix of sources, and the flow's
	 * rule is a number: that of the class of sources that the same rules take.
	 */
	PREFIX_CLASS,
	/* Then source begins with that number, and group is the prefix of groups. PATH_NONE: no
	 * such rule takes it.
	 */
	PREFIX_IN_CLASS,
};

/* What no rule took. */
enum passed_kind {
	PASSED_ALL,
	PASSED_BROADCAST, /* of these, IPv4 UDP in frames to ff:ff:ff:ff:ff:ff */
	PASSED_KINDS,
};

/* Fragments, by what was known of them. */
enum fragment_kind {
	FRAGMENT_FIRST,	 /* carries the ports; of a datagram that a rule takes */
	FRAGMENT_LATER,	 /* its first fragment was seen */
	FRAGMENT_ORPHAN, /* it was not, or too long ago: passed to the stack */
	FRAGMENT_KINDS,
};

/* What is worth knowing of a rule's packets, and is no drop. */
enum note {
	NOTE_MALFORMED,	 /* UDP that ends beyond its packet, or a packet cut short: passed */
	NOTE_ORPHAN,	 /* fragments that came before the first of their datagram: passed */
	NOTE_UNFINISHED, /* the sender left the UDP checksum to a device that was none */
	NOTE_ECHO,	 /* what another sender brought before, more often than that: relayed */
	NOTES,
};

#define OWN_WORDS 4
#define OWN_MAC_WORDS 8

/* config: one entry, what every part must agree on. */
struct config {
	__u32 schema;  /* XDPCAST_SCHEMA; first in every release */
	__u16 lookup4; /* enum lookup_kind, a superset of what the tables hold */
	__u16 lookup6;
	__u64 netns_cookie; /* network namespace that the interface indexes belong to */
	__u32 max_rules;
	__u32 max_outputs;
	__u64 own[OWN_WORDS]; /* a bit for the hash of each own address: most packets need no lookup
			       */
	__u32 steered; /* how many CPUs packets are steered to; 0: they stay where they are */
	__u16 cpu[XDPCAST_MAX_STEERED]; /* their numbers */
	__u32 shortcut_shift; /* 64 less the bits of a slot of shortcuts; 0: they are not used
			       */
	__u64 own_macs[OWN_MAC_WORDS]; /* the same as own, for own MAC addresses */
};

/* Bit of the field from of a key: a flow of what this host sends. The workers behind the
 * packet tap take it, and no program looks such a key up.
 */
enum flow_from {
	FROM_HOST = 1 << 8,
};

/* Key of an IPv4 flow table. All zero source: any; port 0: any. */
struct flow4 {
	__u32 ifindex;
	__u16 vlan;	  /* of the only tag, or of the inner one; 0: untagged */
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
	__u32 prefixlen; /* bits of what follows: PREFIX4_EXACT and those of the group */
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
	FLOW_UNICAST = 1 << 0,	   /* only frames sent to input_mac */
	FLOW_ALLOW_LOOP = 1 << 1,  /* frames of our own, too */
	FLOW_NO_CHECKSUM = 1 << 2, /* IPv6 without a UDP checksum, too */
	FLOW_POLICED = 1 << 3,	   /* by the policer of the rule */
	FLOW_FALLBACK = 1 << 4,	   /* the kernel path serves when no socket does */
	FLOW_LOCAL = 1 << 5,	   /* PATH_FANOUT: the host's own receivers get the packets, too */
	FLOW_STEERED = 1 << 6,	   /* PATH_FANOUT: to a worker's CPU, chosen by flow */
	FLOW_UNGUARDED = 1 << 7,   /* the loop guard does not look at its packets */
	FLOW_TWO_WAY = 1 << 8,	   /* a circle is meant: the loop guard goes by numbers, too */
	FLOW_FINISH = 1 << 9,	   /* UDP checksums may be unfinished, and are finished */
};

/* Value of a flow table: all that a packet needs of its rule. A rule is changed by
 * replacing this value, which the kernel does at once, so that no packet sees
 * half of a change.
 */
struct flow {
	__u32 rule;	    /* index into rules and rule_stats */
	__u32 first_output; /* index into outputs; slot s is first_output + s */
	__u32 device;	    /* row of devices, with one output */
	__u32 sockets;	    /* row of xsks of the input's first queue, with PATH_AFXDP */
	/* One word, which tells at once that nothing of it is needed (relay.bpf.c). */
	__u16 flags;  /* enum flow_flag */
	__u8 path;    /* enum rule_path */
	__u8 routed;  /* not 0: a multicast route of the kernel; packets of at most this TTL are
		       * left to it
		       */
	__u16 stream; /* index into streams; 0: the rule has one input */
	__u8 leg;     /* number of the input among those of its stream */
	__u8 outputs; /* 1 to XDPCAST_MAX_SLOTS */

	__u16 min_mtu; /* smallest MTU of several outputs; 0 when one is not ready */
	__u8 input_mac[6];
};

/* A slot of the map shortcuts: what a rule takes, its flow entry, and with IPv4 how its one
 * output rewrites, all that a packet of most rules needs, in two cache lines side by side.
 */
struct shortcut {
	struct flow flow;
	/* Two words that are compared as such. */
	__u8 group[4];
	__u32 ifindex;
	__u16 vlan;
	__u16 outer_vlan;
	__u16 port;
	__u8 family;	 /* 4 or 6; 0: empty */
	__u8 has_output; /* IPv4: 1: the rule has one output, which is ready and not rare */

	__u8 source[4]; /* all zero: any */
	__u8 reserved[12];

	/* IPv4, with has_output: the first line of the output. IPv6: group and source. */
	__u8 second[64];
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
	OUTPUT_RARE = 1 << 4,	       /* something behind the first cache line is used */
	OUTPUT_PORT_ADD = 1 << 5,      /* rare: dst_port is the packet's and port_shift */
	OUTPUT_PCP_SET = 1 << 6,       /* rare: write pcp */
	OUTPUT_POLICED = 1 << 7,       /* rare: by the policer of the output */
	OUTPUT_ONE_BUFFER = 1 << 8,    /* rare: the device sends no frames of several buffers */
};

enum vlan_mode {
	VLAN_KEEP,
	VLAN_POP,
	VLAN_SET, /* vlan, and outer_vlan unless it is 0, in place of the packet's tags */
};

enum ttl_mode {
	TTL_KEEP,
	TTL_DECREMENT,
	TTL_SET,
};

/* How one copy is rewritten. Two cache lines; most outputs need the first alone. */
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
	__u8 dst_len;	/* bits of dst that are written, the others are the packet's; 0: all */
	__u8 blocked;	/* enum drop_reason, while it is not ready */
	__u8 unused[3];
	__u32 held; /* the first output of a routed flow: not 0, its packets are the kernel's */
	__u8 reserved[40];
};

/* How several inputs become one stream. */
enum stream_kind {
	STREAM_NONE,
	STREAM_FAILOVER,  /* one leg passes at a time */
	STREAM_FIELD,	  /* a number at an offset of the UDP payload */
	STREAM_RTP,	  /* 16 bits; the session is the SSRC */
	STREAM_RFC4175,	  /* RTP with the extended number behind its header */
	STREAM_MOLDUDP64, /* numbers count messages; the session is the session's name */
	STREAM_SINGLE,	  /* one input: every packet passes, and its numbers are watched */
};

/* What becomes of a packet of a leg. */
enum stream_verdict {
	STREAM_PASSED,	    /* the first copy of its number, or the leg that passes */
	STREAM_DUPLICATE,   /* another leg, or this one, has brought the number before */
	STREAM_LATE,	    /* its number is older than what is remembered */
	STREAM_ASTRAY,	    /* its number or session is far from the others, and not confirmed */
	STREAM_OLD_SESSION, /* of the session that the sender has left */
	STREAM_CONTENDED,   /* other CPUs were in the way again and again */
	STREAM_NO_NUMBER,   /* it is not of the rule's format, or too short */
	STREAM_STANDBY,	    /* failover: another leg passes */
	STREAM_VERDICTS,
	STREAM_BEAT, /* without a number of its own: passes; a heartbeat, or RTCP */
};

#define XDPCAST_MAX_LEGS 4
#define XDPCAST_MAX_STREAMS 1024
#define XDPCAST_MAX_WINDOWS 4096
#define STREAM_WORDS 2048 /* of a window's row; each has 32 numbers */

/* What a rule with several inputs, or one that is watched, asks for; only the control program
 * writes it.
 */
struct stream {
	__u64 skew_ns;	   /* what is older than this, or twice this, is never new again */
	__u64 reset_ns;	   /* a sender begins again after so long without a packet that passed */
	__u64 silence_ns;  /* failover: a leg without packets for longer is down */
	__u64 back_ns;	   /* a better leg takes over when it was up for so long; 0: never */
	__u32 first_row;   /* of stream_windows */
	__u32 word_mask;   /* words of the window less 1 */
	__u32 number_mask; /* 2^bits - 1 of a number */
	__u32 bias;	   /* how far back a number is taken to be from the head, at most ... */
	__u32 behind;	   /* ... and how far the window remembers */
	__u32 ahead;	   /* how far forward a number may jump */
	__u32 slack;	   /* numbers of a leg that go on are at most so far apart */
	__u16 offset;	   /* STREAM_FIELD: of the number in the UDP payload */
	__u16 count_offset;
	__u8 kind;	  /* enum stream_kind */
	__u8 width;	  /* of the number in bytes */
	__u8 count_width; /* of how many numbers the packet takes; 0: one */
	__u8 little;	  /* 1: little endian */
	__u8 shift;	  /* 32 less the bits of a number */
	__u8 pass_other;  /* 1: packets without a number pass */
	__u8 watch;	  /* STREAM_FAILOVER, STREAM_SINGLE: the kind of numbers that are watched */
	__u8 pad;
	__u32 clock; /* RTP: timestamps a second; 0: as the payload type says */
	__u32 reserved;
};

/* A leg of a stream: what its last packets were. One CPU takes the packets of a leg as a rule,
 * and writes these lines alone; that several do costs nothing but the accuracy of what is told.
 */
struct stream_leg {
	__u32 session;
	__u32 expected; /* number */
	__u32 candidate_session;
	__u32 candidate;  /* the number expected after one that did not go on */
	__u32 run;	  /* how many have gone on from it since */
	__u32 distrusted; /* 1: it has brought another stream's session */
	__u64 jumped_ns;  /* when the leg's numbers last jumped */
	__u64 history;	  /* bit i: number expected - 1 - i was seen */
	__u64 position;	  /* of the last number */
	__u64 won;	  /* packets that passed */
	__u64 numbers;	  /* that they had */

	__u64 seen_ns; /* the last packet; CLOCK_MONOTONIC, as coarse as the kernel's tick */
	__u64 up_ns;   /* failover: since when there was no silence */
	__u64 lost;    /* numbers that the leg did not bring */
	__u64 doubled;
	__u64 reordered;
	__u64 resets;  /* jumps of its numbers */
	__u64 senders; /* changes of the session */
	__u64 others;  /* packets without a number of their own */
};

/* Where a stream is; the programs write it. All times are of CLOCK_MONOTONIC, as coarse as the
 * kernel's tick.
 */
struct stream_state {
	__u64 head;	  /* the newest position, as it was up to 31 numbers ago */
	__u64 floor;	  /* positions up to here are older than the skew */
	__u64 next_floor; /* the floor after this turn: the newest position when it began */
	__u64 turn_ns;	  /* when the turn began */
	__u64 pass_ns;	  /* the last packet that passed */
	__u64 sessions;	  /* the one that passes and, in the upper half, the one before */
	__u64 session_ns; /* since when it passes; with failover, since when the leg does */
	__u32 epoch;	  /* restarts, twice; odd: one is under way */
	__u32 active;	  /* failover: the leg that passes */

	__u64 start;	   /* position of the first number since the last restart */
	__u64 before;	   /* numbers that there were before that */
	__u64 restarts;	   /* with failover, changes of the leg and the first choice */
	__u32 left;	   /* number up to which the session before has passed */
	__u32 session_leg; /* the leg that brought the session */
	__u64 sample; /* lower half of a position, and a check of the packet that passed there */
	__u32 differ[XDPCAST_MAX_LEGS]; /* of a leg, copies of samples with another check */
	__u8 differs[XDPCAST_MAX_LEGS]; /* 1: the last copy of a sample was one */
	__u32 pad;

	struct stream_leg legs[XDPCAST_MAX_LEGS];
};

/* How steadily a leg comes. Written for samples alone, but for filled. */
struct stream_pulse {
	__u64 timed_ns;	  /* when a packet came that the next is timed from, by the precise clock */
	__u64 jitter_ns;  /* 16 times, as in RFC 3550 section A.8 */
	__u64 gap_ns;	  /* 16 times the mean between two packets; 0: their timestamps are used */
	__u64 lag_ns;	  /* 8 times the mean behind the first copy of a number */
	__u64 filled;	  /* numbers up to next_floor that have passed since that was set */
	__u32 timestamp;  /* of the packet at timed_ns */
	__u32 timed_next; /* the number expected behind it */
	__u64 pad[2];
};

/* Of a stream: what is measured, and decides nothing. */
struct stream_health {
	__u64 sample_ns;   /* when the sample passed, by the precise clock */
	__u64 marked;	   /* numbers up to next_floor that had passed, less those filled then */
	__u64 lost;	   /* numbers up to floor that no leg brought */
	__u32 sample_legs; /* a bit for each leg that has brought the sample */
	__u32 pad;
	__u64 reserved[4];

	struct stream_pulse legs[XDPCAST_MAX_LEGS];
};

/* A token bucket, kept as the time at which it is full again (GCRA, ITU-T I.371):
 * one word, changed by compare and swap. Time is in sixteenths of a nanosecond of
 * CLOCK_MONOTONIC.
 */
struct policer {
	__u64 full;	/* when the bucket is full again */
	__u64 cost;	/* of a packet or byte, in units of 2^-16 of that time */
	__u64 depth;	/* how far full may be ahead of the clock */
	__u64 rate;	/* as it was asked for: packets or bits a second; 0: no policer */
	__u64 burst;	/* packets or bytes */
	__u32 by_bytes; /* 1: cost is of a byte, 0: of a packet */
	__u32 pad;
};

/* Key of fragments: what all fragments of a datagram share. */
struct fragment_key {
	__u32 ifindex;
	__u16 vlan;
	__u16 outer_vlan;
	__u32 id;
	__u32 family; /* 4 or 6 */
	__u8 src[16];
	__u8 dst[16];
};

/* What a first fragment says to those that follow it. */
struct fragment {
	__u64 seen_ns; /* CLOCK_MONOTONIC, as coarse as the kernel's tick */
	__u16 port;
	__u16 verdict; /* of a leg's datagram: enum stream_verdict */
	__u16 pad[2];
};

/* Fragments of a datagram that came before its first one. */
struct orphans {
	__u64 seen_ns; /* the first of them; CLOCK_MONOTONIC, as coarse as the kernel's tick */
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
	__u64 packets; /* matched, whatever became of them */
	__u64 bytes;   /* of whole frames as they came in */
	/* Of a rule with one output, what the kernel path has handed to the device. Of others
	 * output_stats has it.
	 */
	__u64 sent_packets;
	__u64 sent_bytes;
	/* Of the loop guard, see guard.h. */
	__u64 tick;	  /* of the kernel's clock (jiffies) */
	__u64 look_until; /* packets up to which this tick's are looked at */
	/* What follows is written once a tick. */
	__u64 last_seen_ns; /* CLOCK_MONOTONIC, as coarse as the kernel's tick */
	__u64 tick_packets; /* packets when this tick began */
	__u32 pace;	    /* the most packets a tick, slowly forgotten */
	__u32 watched;	    /* ticks for which every packet is still looked at */
	/* Of packets, what went to AF_XDP sockets. */
	__u64 handed_packets;
	__u64 handed_bytes;
	/* Of them, copies that the stream of a leg does not need: DROP_DUPLICATE or DROP_STANDBY.
	 */
	__u64 copies_packets;
	__u64 copies_bytes;
};

#define GUARD_SLOTS 16384 /* a power of two */
#define GUARD_OTHERS 6
#define GUARD_WAYS 4

/* One who sent a content after its first sender had. */
struct guard_other {
	__u32 sender;  /* hash of source MAC, address and port; 0: free */
	__u16 packets; /* that were relayed */
	__u16 soon;    /* of them, soon after the content was relayed before */
};

/* What is remembered of one content: who brought it, and how often since. */
struct guard_slot {
	__u32 signature; /* of some bytes of the payload */
	__u32 seen;	 /* when it was last relayed, in 2^20 ns of CLOCK_MONOTONIC */
	__u32 rule;	 /* that relayed it last */
	__u32 sender;	 /* hash of source MAC and address of the first packet */
	__u32 packets;	 /* of that sender and port */
	__u32 soon;	 /* of them, soon after the content was relayed before */
	__u32 cut;	 /* packets that were dropped as returns */
	__u32 born;	 /* when the first packet came, as seen */
	__u32 early;	 /* a bit for each of others that came so soon after that */
	__u32 arrivals;	 /* packets after the first, of whomever */
	__u32 marked;	 /* arrivals when a mark last came back */
	__u16 steps;	 /* a bit for each mark that came back shortly before */
	__u16 foreign;	 /* packets with another relay's mark, since this one marked */
	__u16 id;	 /* what the first packet had where a mark would be, as in the packet */
	__u16 is_marked; /* 1: it was, at that time: */
	__u32 marked_at; /* as seen */
	__u16 port;	 /* source port of the first packet, as in the packet */
	__u16 sum;	 /* of the payload, from a UDP checksum; 0: not known */
	struct guard_other others[GUARD_OTHERS];
};

/* A way on which packets come back to a rule. */
struct guard_way {
	__u64 first_ns;	   /* CLOCK_MONOTONIC, as coarse as the kernel's tick */
	__u64 last_ns;	   /* 0: free */
	__u64 forgiven_ns; /* when the sender proved to send by itself */
	__u64 packets;	   /* dropped */
	__u64 probe_ns;	   /* when a packet was last let pass, to see whether it comes back */
	__u32 probe;	   /* its signature, while that is not known; else 0 */
	__u32 orphans;	   /* packets in a row that nothing sent before */
	__u32 sender;
	__u32 ifindex; /* they come in on */
	__u32 from;    /* rule that had sent the last one */
	__u8 mac[6];   /* their source MAC */
	__u8 pad[6];
	__u8 source[16]; /* their source; IPv4 as ::ffff:a.b.c.d */
};

/* A rule whose packets come back. */
struct loop {
	__u64 since_ns; /* the first return after none for GUARD_HEAL_NS */
	__u64 last_ns;	/* the last one */
	struct guard_way ways[GUARD_WAYS];
};

/* Of an output of a rule with several. */
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
	DROP_UNKNOWN, /* its rule is not known; id is 0 */
	DROP_NOTE,    /* no drop: a note on a rule; reason is enum note */
};

/* Key of rule_drops. */
struct drop_key {
	__u32 id;     /* rule, or stats of an output */
	__u16 scope;  /* enum drop_scope */
	__u16 reason; /* enum drop_reason */
};

/* What a cell of user_stats counts for, and what. */
enum user_scope {
	USER_FREE,
	USER_RULE,   /* id: rule */
	USER_OUTPUT, /* id: stats of an output */
	USER_TOTAL,  /* id 0: what rules dropped that are gone, and what no rule has */
	USER_INPUT,  /* id: interface, of packets lost on the way to workers */
	USER_DEVICE, /* id: interface, of packets lost behind workers */
	USER_LOOSE,  /* of a rule or output without number */
	USER_HEADER, /* the first cell: packets is how many pages were ever used */
};

enum user_kind {
	USER_MATCHED,
	USER_DELIVERED, /* matched by the relay program, and came to a worker */
	USER_SENT,
	USER_FRAGMENT_FIRST,
	USER_FRAGMENT_LATER,
	USER_FRAGMENT_ORPHAN,
	USER_UNSENT, /* counted as sent, and not taken by the device */
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

/* What the egress program has dropped of the bulk that is being sent: the kernel's
 * tracepoint does not tell it from what the device dropped.
 */
struct egress_drops {
	__u32 ifindex;
	__u32 packets;
};

/* What devices did with frames after the programs had returned. */
struct device_stats {
	__u64 transmit_drops;  /* the driver did not take them */
	__u64 redirect_errors; /* the device was down, or the frame too long for it */
};
