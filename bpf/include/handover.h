/* SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0-only) */
/* How the relay program tells the egress program which rule a copy belongs to: in place of
 * the two MAC addresses, which every copy overwrites anyway. Unlike packet metadata this
 * needs no driver support, no headroom and no helper call, and it is cloned with the
 * frame.
 */
#pragma once

#include <linux/if_ether.h>
#include <linux/types.h>

/* Occupies the first source-MAC byte. Real source MACs never have the group bit, so its absence
 * means "already rewritten".
 */
#define HANDOVER_MARK 0xff

struct handover {
	__u32 first_output;
	__u8 l3_offset;
	__u8 outputs;
	__u8 mark;
	__u8 udp_offset; /* 0: a later fragment, without UDP */
	__u32 sequence;	 /* equal in all copies of a frame, different in the next frame */
};

_Static_assert(sizeof(struct handover) == 2 * ETH_ALEN, "takes the place of the two MAC addresses");
_Static_assert(__builtin_offsetof(struct handover, mark) == ETH_ALEN, "marks the source MAC");
