/* SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0-only) */
/* Policing by token buckets shared by all CPUs. */
#pragma once

#include <stdbool.h>

#include "maps.h"

/* A CPU that loses against others this often drops the packet: it was one of many at the same
 * instant.
 */
#define POLICE_TRIES 8

/* Whether a packet is within the rate. Out of line: most rules have none; global, so
 * that it is verified once.
 */
__noinline int conforms(__u32 policer, __u32 bytes)
{
	struct policer *p = bpf_map_lookup_elem(&policers, &policer);
	__u64 now = bpf_ktime_get_ns() << 4, cost;
	int i;

	if (!p)
		return false;
	cost = (p->by_bytes ? bytes * p->cost : p->cost) >> 16;
	for (i = 0; i < POLICE_TRIES; i++) {
		__u64 full = *(volatile __u64 *)&p->full;
		__u64 next = (full > now ? full : now) + cost;

		if (next - now > p->depth)
			return false;
		if (__sync_val_compare_and_swap(&p->full, full, next) == full)
			return true;
	}
	return false;
}
