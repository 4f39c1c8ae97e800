/* SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0-only) */
/* Later fragments carry no ports. The first one records its port in the map fragments,
 * and the others are then looked up like any packet, so that a rule changed in between
 * applies to them, too.
 *
 * A fragment whose first one was not seen, because it came out of order, was lost, or
 * was evicted from the map by 16,384 other datagrams, passes to the stack and is
 * counted.
 */
#pragma once

#include "account.h"
#include "maps.h"
#include "parse.h"

/* How long the port of a first fragment is valid. Identifications are reused: at 10,000 fragmented
 * datagrams a second of one flow after 6.5 s.
 */
const volatile __u64 fragment_timeout_ns = 2000000000;

static __always_inline void count_fragment(__u32 kind, __u32 bytes)
{
	struct counter *c = bpf_map_lookup_elem(&fragment_stats, &kind);

	if (c)
		count(c, bytes);
}

static __always_inline void fragment_key(struct fragment_key *key, __u32 ifindex,
					 const struct headers *h, bool ip4)
{
	__builtin_memset(key, 0, sizeof(*key));
	key->ifindex = ifindex;
	key->vlan = h->vlan;
	key->outer_vlan = h->outer_vlan;
	key->id = h->fragment_id;
	if (ip4) {
		key->family = 4;
		*(__u32 *)key->src = h->ip4->saddr;
		*(__u32 *)key->dst = h->ip4->daddr;
	} else {
		key->family = 6;
		*(struct in6_addr *)key->src = h->ip6->saddr;
		*(struct in6_addr *)key->dst = h->ip6->daddr;
	}
}

/* Records a fragment whose first one was not seen. If that arrives later, its rule can note that
 * the datagram is lost: see claim_orphans.
 */
static __noinline int keep_orphan(const struct fragment_key *key, __u32 bytes)
{
	struct orphans first = {.seen_ns = bpf_ktime_get_coarse_ns(), .packets = 1, .bytes = bytes};
	struct orphans *have;

	if (!key)
		return 0;
	have = bpf_map_lookup_elem(&orphans, key);
	if (!have || first.seen_ns - have->seen_ns > fragment_timeout_ns)
		return bpf_map_update_elem(&orphans, key, &first, BPF_ANY);
	__sync_fetch_and_add(&have->packets, 1);
	__sync_fetch_and_add(&have->bytes, bytes);
	return 0;
}

static __always_inline void orphan(__u32 ifindex, const struct headers *h, __u32 bytes, bool ip4)
{
	struct fragment_key key;

	count_fragment(FRAGMENT_ORPHAN, bytes);
	fragment_key(&key, ifindex, h, ip4);
	keep_orphan(&key, bytes);
}

static __noinline int note_orphans(const struct fragment_key *key, __u32 rule)
{
	struct orphans *have;
	__u32 packets, bytes;
	__u64 seen_ns;

	if (!key)
		return 0;
	have = bpf_map_lookup_elem(&orphans, key);
	if (!have)
		return 0;
	packets = have->packets;
	bytes = have->bytes;
	seen_ns = have->seen_ns;
	if (!bpf_map_delete_elem(&orphans, key) &&
	    bpf_ktime_get_coarse_ns() - seen_ns <= fragment_timeout_ns)
		count_note(rule, NOTE_ORPHAN, packets, bytes);
	return 0;
}

/* A first fragment has arrived: its rule notes the fragments before it. */
static __always_inline void claim_orphans(__u32 ifindex, const struct headers *h, __u32 rule,
					  bool ip4)
{
	struct fragment_key key;

	fragment_key(&key, ifindex, h, ip4);
	note_orphans(&key, rule);
}

/* The port of a later fragment's datagram, 0 if unknown. */
static __always_inline __u16 fragment_port(__u32 ifindex, const struct headers *h, bool ip4)
{
	struct fragment_key key;
	struct fragment *first;

	fragment_key(&key, ifindex, h, ip4);
	first = bpf_map_lookup_elem(&fragments, &key);
	if (!first || bpf_ktime_get_coarse_ns() - first->seen_ns > fragment_timeout_ns)
		return 0;
	return first->port;
}

static __noinline int keep_fragment(const struct fragment_key *key, __u16 port)
{
	struct fragment value = {.seen_ns = bpf_ktime_get_coarse_ns(), .port = port};

	return bpf_map_update_elem(&fragments, key, &value, BPF_ANY);
}

static __always_inline void remember_fragment(__u32 ifindex, const struct headers *h, bool ip4)
{
	struct fragment_key key;

	if (!h->udp)
		return;
	fragment_key(&key, ifindex, h, ip4);
	keep_fragment(&key, bpf_ntohs(h->udp->dest));
}

/* Records the verdict on the first fragment, or returns the recorded one. */
static __noinline int first_verdict(const struct fragment_key *key, bool set, __u32 verdict)
{
	struct fragment *first = key ? bpf_map_lookup_elem(&fragments, key) : NULL;

	if (!first)
		return verdict;
	if (set)
		first->verdict = verdict;
	return first->verdict;
}

/* The verdict on a fragment of a leg: that of the first fragment, which has the number. verdict is
 * that of the first.
 */
static __always_inline __u32 fragment_verdict(__u32 ifindex, const struct headers *h, bool ip4,
					      __u32 verdict)
{
	struct fragment_key key;

	fragment_key(&key, ifindex, h, ip4);
	return first_verdict(&key, h->udp != NULL, verdict);
}
