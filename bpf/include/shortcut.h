/* SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0-only) */
/* The short way from a packet to its rule: a look at the one or two places of the map
 * shortcuts where the rule would be, found by two multiplications, instead of the flow table's
 * hash and chain.
 *
 * Who is in a place is compared in full, and a rule has a place only while no more specific
 * rule can take its packets: so what is found here is what the flow tables would say. Who has
 * no place is found there. The loader closes this way (shortcut_shift 0) before it changes the
 * tables, and opens it when the places are right again, so that a rule still changes in one
 * write.
 */
#pragma once

#include "maps.h"
#include "parse.h"

#define SHORTCUT_PLACES 2

/* Multipliers of SplitMix64 (Steele, Lea, Flood 2014); pkg/loader has the same. */
#define SHORTCUT_K1 0xbf58476d1ce4e5b9ULL
#define SHORTCUT_K2 0x94d049bb133111ebULL

/* The input's VLANs and port as one word. */
static __always_inline __u64 shortcut_tags(const struct headers *h, __u16 port)
{
	return (__u64)port << 32 | (__u32)h->outer_vlan << 16 | h->vlan;
}

static __always_inline __u64 shortcut_hash(__u64 group, __u32 ifindex, __u64 tags)
{
	return (group ^ (__u64)ifindex << 32) * SHORTCUT_K1 + tags * SHORTCUT_K2;
}

/* The place of a hash: its highest bits, which depend on all others. */
static __always_inline struct shortcut *shortcut_at(const struct config *cfg, __u64 hash)
{
	__u32 at = hash >> (cfg->shortcut_shift & 63);

	return bpf_map_lookup_elem(&shortcuts, &at);
}

/* The second place. */
static __always_inline __u64 shortcut_rehash(__u64 hash)
{
	return (hash ^ hash >> 32) * SHORTCUT_K2;
}

static __always_inline bool same_input(const struct shortcut *s, __u32 ifindex,
				       const struct headers *h, __u16 port)
{
	return s->ifindex == ifindex && s->port == port && s->vlan == h->vlan &&
	       s->outer_vlan == h->outer_vlan;
}

/* The flow entry of an IPv4 packet's rule; NULL: ask the flow tables. */
static __always_inline struct flow *shortcut4(const struct config *cfg, __u32 ifindex,
					      const struct headers *h, __u16 port)
{
	__u32 group = h->ip4->daddr, source = h->ip4->saddr;
	__u64 hash = shortcut_hash(group, ifindex, shortcut_tags(h, port));
	struct shortcut *s;
	int i;

	if (!cfg->shortcut_shift)
		return NULL;
#pragma unroll
	for (i = 0; i < SHORTCUT_PLACES; i++) {
		s = shortcut_at(cfg, hash);
		if (!s)
			return NULL;
		if (*(const __u32 *)s->group == group && s->family == 4 &&
		    same_input(s, ifindex, h, port)) {
			__u32 want = *(const __u32 *)s->source;

			if (!want || want == source)
				return &s->flow;
		}
		hash = shortcut_rehash(hash);
	}
	return NULL;
}

static __always_inline bool same_addr6(const __u64 *a, const __u64 *b)
{
	return !((a[0] ^ b[0]) | (a[1] ^ b[1]));
}

/* The same for IPv6. */
static __always_inline struct flow *shortcut6(const struct config *cfg, __u32 ifindex,
					      const struct headers *h, __u16 port)
{
	struct in6_addr group = h->ip6->daddr, source = h->ip6->saddr;
	const __u64 *to = (const __u64 *)&group, *from = (const __u64 *)&source;
	__u64 hash = shortcut_hash(to[0] ^ to[1], ifindex, shortcut_tags(h, port));
	struct shortcut *s;
	int i;

	if (!cfg->shortcut_shift)
		return NULL;
#pragma unroll
	for (i = 0; i < SHORTCUT_PLACES; i++) {
		s = shortcut_at(cfg, hash);
		if (!s)
			return NULL;
		if (s->family == 6 && same_addr6((const __u64 *)s->group6, to) &&
		    same_input(s, ifindex, h, port)) {
			const __u64 *want = (const __u64 *)s->source6;

			if (!(want[0] | want[1]) || same_addr6(want, from))
				return &s->flow;
		}
		hash = shortcut_rehash(hash);
	}
	return NULL;
}
