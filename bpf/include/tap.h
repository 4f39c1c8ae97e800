/* SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0-only) */
/* What the tap programs and Go share. None of it is pinned: it ends with who taps. */
#pragma once

#include <linux/types.h>

#define TAP_FLOWS 16 /* of a rule on one interface */
#define TAP_HEAD 256 /* more than all headers that are rewritten: Ethernet, tags, IP, UDP */
#define TAP_DROPS 64

/* The flows of the tapped rule on an interface. */
struct tap_flows {
	__u32 n;
	__u32 rule[TAP_FLOWS]; /* index into rule_stats */
};

/* A copy that was not sent, or a packet that was not relayed. */
struct tap_drop {
	__u32 id;     /* rule, or stats of an output */
	__u16 scope;  /* enum drop_scope */
	__u16 reason; /* enum drop_reason */
};

enum tap_flag {
	/* A frame as it came in: head, and data behind its place in it. */
	TAP_IN = 1 << 0,
	/* Data is a frame as it is sent. */
	TAP_OUT = 1 << 1,
	/* Dropped: another input of the stream has brought it, or passes. */
	TAP_COPY = 1 << 2,
	/* Of the egress program: a copy. Without TAP_OUT it was dropped, and has no MAC addresses.
	 */
	TAP_EGRESS = 1 << 3,
};

/* One run of a program. The frame as the program has left it follows, cut to what was asked for.
 */
struct tap_record {
	__u64 time_ns; /* CLOCK_MONOTONIC */
	__u32 rule;    /* TAP_IN: that took the frame */
	__u32 output;  /* TAP_EGRESS and TAP_OUT: stats of the output */
	__u32 ifindex; /* it came in on, or leaves by */
	__u32 length;  /* of the frame as the program has left it */
	__u32 grown;   /* bytes that it was longer than before; negative: shorter */
	__u32 captured;
	__u16 head_bytes;
	__u8 flags; /* enum tap_flag */
	__u8 drops;
	__u32 pad;
	/* Of what follows, only head_bytes of head are there where there are no drops, and only
	 * the drops that there are.
	 */
	__u8 head[TAP_HEAD]; /* TAP_IN: the frame's first bytes before it was rewritten */
	struct tap_drop drop[TAP_DROPS];
};
