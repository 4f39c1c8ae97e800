/* SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0-only) */
/* Counting. Every packet that matched ends in exactly one place for each of the
 * rule's outputs: sent_packets of a rule with one, output_stats of others, or a drop with its
 * reason.
 */
#pragma once

#include "guard.h"
#include "maps.h"

/* Returns the counters of the rule on this CPU; their packets are a number that the
 * rule's next packet on this CPU does not get. The clock is read once a tick: it goes on with
 * jiffies, which a program reads without a call.
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

/* Counts in rule_drops, whose entries come with the first count. Global, so that it is
 * verified once.
 */
__noinline int count_rare(__u32 scope, __u32 id, __u32 reason, __u32 packets, __u32 bytes)
{
	struct drop_key key = {.id = id, .scope = scope, .reason = reason};
	struct counter first = {.packets = packets, .bytes = bytes};
	struct counter *c = bpf_map_lookup_elem(&rule_drops, &key);

	if (!c) {
		/* Another CPU may make the entry first: then count in its. */
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

/* Counts a drop; out of line, since no fast path comes here, and global, so that it
 * is verified once.
 */
__noinline int count_drop(__u32 scope, __u32 id, __u32 reason, __u32 bytes)
{
	struct counter *c = bpf_map_lookup_elem(&drops, &reason);

	if (c)
		count(c, bytes);
	count_rare(scope, id, reason, 1, bytes);
	return XDP_DROP;
}

/* Notes something of a rule's packets that is no drop. */
static __always_inline void count_note(__u32 rule, __u32 note, __u32 packets, __u32 bytes)
{
	count_rare(DROP_NOTE, rule, note, packets, bytes);
}

/* Counts a broadcast datagram that no rule takes: rules take it with broadcast=allow alone. Returns
 * what passes. Global, so that it is verified once.
 */
__noinline int count_broadcast(struct xdp_md *ctx)
{
	__u32 kind = PASSED_BROADCAST;
	struct counter *c = bpf_map_lookup_elem(&passed, &kind);

	if (c)
		count(c, bpf_xdp_get_buff_len(ctx));
	return 0;
}

/* The loop guard in front of the packet tap, behind which packets come in blocks of each
 * input, and no more in the order of their arrival. Says whether a packet was dropped.
 * Global, so that it is verified once.
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
