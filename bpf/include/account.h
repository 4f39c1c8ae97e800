/* SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0-only) */
/* Counting. For each of its rule's outputs, every matched packet ends in exactly one
 * counter: sent_packets of a rule with one output, output_stats of others, or a drop with
 * its reason.
 */
#pragma once

#include "guard.h"
#include "maps.h"

/* Returns the counters of the rule on this CPU; their packet count is unique among the rule's
 * packets on this CPU. The clock is read once a tick: ticks are jiffies, which a program reads
 * without a call.
 */
static __always_inline struct rule_stats *count_match(__u32 rule, __u32 bytes)
{
	struct rule_stats *stats = bpf_map_lookup_elem(&rule_stats, &rule);
	__u64 tick;

	if (!stats)
		return NULL;
	tick = bpf_jiffies64();
	if (__builtin_expect(stats->tick != tick, 0))
		guard_tick(stats, rule, tick);
	stats->packets++;
	stats->bytes += bytes;
	return stats;
}

static __always_inline void count_sent(__u32 output, __u32 bytes)
{
	struct output_stats *stats = bpf_map_lookup_elem(&output_stats, &output);

	if (!stats)
		return;
	stats->packets++;
	stats->bytes += bytes;
}

static __always_inline void count(struct counter *c, __u32 bytes)
{
	c->packets++;
	c->bytes += bytes;
}

/* Counts in rule_drops, whose entries are created by the first count. Global, so that it is
 * verified once.
 */
__noinline int count_rare(__u32 scope, __u32 id, __u32 reason, __u32 packets, __u32 bytes)
{
	struct drop_key key = {.id = id, .scope = scope, .reason = reason};
	struct counter first = {.packets = packets, .bytes = bytes};
	struct counter *c = bpf_map_lookup_elem(&rule_drops, &key);

	if (!c) {
		/* Another CPU may have created the entry first: count in that. */
		if (!bpf_map_update_elem(&rule_drops, &key, &first, BPF_NOEXIST))
			return 0;
		c = bpf_map_lookup_elem(&rule_drops, &key);
		if (!c)
			return 0;
	}
	c->packets += packets;
	c->bytes += bytes;
	return 0;
}

/* Counts a drop; out of line, since no fast path comes here, and global, so that it is verified
 * once.
 */
__noinline int count_drop(__u32 scope, __u32 id, __u32 reason, __u32 bytes)
{
	struct counter *c = bpf_map_lookup_elem(&drops, &reason);

	if (c)
		count(c, bytes);
	count_rare(scope, id, reason, 1, bytes);
	return XDP_DROP;
}

/* Counts a note, which is not a drop, on a rule. */
static __always_inline void count_note(__u32 rule, __u32 note, __u32 packets, __u32 bytes)
{
	count_rare(DROP_NOTE, rule, note, packets, bytes);
}

/* Counts a broadcast datagram that matches no rule: only rules with broadcast=allow match. Returns
 * the PASS verdict. Global, so that it is verified once.
 */
__noinline int count_broadcast(struct xdp_md *ctx)
{
	__u32 kind = PASSED_BROADCAST;
	struct counter *c = bpf_map_lookup_elem(&passed, &kind);

	if (c)
		count(c, bpf_xdp_get_buff_len(ctx));
	return 0;
}

/* The loop guard before the packet tap, after which packets arrive in blocks per input, and no
 * longer in order of arrival. Returns whether a packet was dropped. Global, so that it is verified
 * once.
 */
__noinline int guard_tapped(struct xdp_md *ctx, __u32 rule, __u32 place, __u32 fragment_id,
			    __u32 bytes)
{
	__u64 now = bpf_ktime_get_coarse_ns();
	struct rule_stats *stats;

	if (!guard_returned(ctx, rule, place, fragment_id, now))
		return false;
	stats = bpf_map_lookup_elem(&rule_stats, &rule);
	if (stats) {
		stats->last_seen_ns = now;
		stats->packets++;
		stats->bytes += bytes;
	}
	count_drop(DROP_RULE, rule, DROP_LOOPING, bytes);
	return true;
}
