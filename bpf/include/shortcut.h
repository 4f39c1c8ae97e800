/* SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0-only) */
/* The short way from a packet to its rule: one or two slots of the map shortcuts, found by
 * two multiplications, instead of the flow table's hash and chain.
 *
 * Each slot stores the full key, and a rule has a slot only while no more specific rule can
 * take its packets: a hit equals what the flow tables would return. Rules without a slot fall
 * back to the flow tables. pkg/loader/shortcut.go disables shortcuts (shortcut_shift 0) before
 * it changes the tables and enables them once the slots agree again, so a rule still changes
 * in one write.
 */
#pragma once

#include "config.h"
#include "maps.h"
#include "parse.h"

#define SHORTCUT_SLOTS 2

/* Multipliers of SplitMix64 (Steele, Lea, Flood 2014); pkg/loader has the same. */
#define SHORTCUT_K1 0xbf58476d1ce4e5b9ULL
#define SHORTCUT_K2 0x94d049bb133111ebULL

/* The input's VLANs and port as one word. */
static __always_inline __u64 shortcut_tags(const struct headers *h, __u16 port)
{
	return (__u64)port << 32 | (__u32)h->outer_vlan << 16 | h->vlan;
}

/* input is the group, with the interface in its upper half. */
static __always_inline __u64 shortcut_hash(__u64 input, __u64 tags)
{
	return input * SHORTCUT_K1 + tags * SHORTCUT_K2;
}

/* The slot of a hash: its highest bits, which depend on all others. */
static __always_inline struct shortcut *shortcut_at(__u64 hash)
{
	__u32 at = shift_right(hash, settings.shortcut_shift);

	return bpf_map_lookup_elem(&shortcuts, &at);
}

/* The hash of the second slot. */
static __always_inline __u64 shortcut_rehash(__u64 hash)
{
	return (hash ^ hash >> 32) * SHORTCUT_K2;
}

/* A word of a slot, which is aligned to 8 bytes. Through a pointer of another type, since the
 * compiler reads fields of 4 bytes in halves.
 */
static __always_inline __u64 shortcut_word(const struct shortcut *s, __u32 offset)
{
	const void *at = s;

	return *(const __u64 *)(at + offset);
}

/* Whether a slot's family, VLANs and port are these. */
static __always_inline bool same_tags(const struct shortcut *s, __u64 tags, __u64 family)
{
	__u64 have = shortcut_word(s, __builtin_offsetof(struct shortcut, vlan));

	/* The uppermost byte is has_output. */
	return have << 8 == (family << 48 | tags) << 8;
}

static __always_inline bool same_addresses4(const struct shortcut *s, __u64 input, __u32 source)
{
	__u32 want = *(const __u32 *)s->source;

	return shortcut_word(s, __builtin_offsetof(struct shortcut, group)) == input &&
	       (!want || want == source);
}

static __always_inline bool same_addr6(const __u64 *a, const __u64 *b)
{
	return !((a[0] ^ b[0]) | (a[1] ^ b[1]));
}

static __always_inline bool same_addresses6(const struct shortcut *s, const __u64 *group,
					    const __u64 *source)
{
	const __u64 *have = (const __u64 *)s->second, *want = have + 2;

	return same_addr6(have, group) && (!(want[0] | want[1]) || same_addr6(want, source));
}

_Static_assert(__builtin_offsetof(struct shortcut, ifindex) == 36, "one word with the group");
_Static_assert(__builtin_offsetof(struct shortcut, family) ==
		       __builtin_offsetof(struct shortcut, vlan) + 6,
	       "one word with VLANs and port");
_Static_assert(__builtin_offsetof(struct shortcut, second) == 64, "begins a cache line");
_Static_assert(__builtin_offsetof(struct output, port_shift) == 64, "what fits in there");

/* The slot of a packet's rule; NULL: use the flow tables. ip4 is a constant in each caller. */
static __always_inline struct shortcut *find_slot(__u32 ifindex, const struct headers *h,
						  __u16 port, bool ip4)
{
	__u64 tags = shortcut_tags(h, port), input, hash;
	struct in6_addr group6, source6;
	struct shortcut *s;
	int i;

	if (!settings.shortcut_shift)
		return NULL;
	if (ip4) {
		input = h->ip4->daddr;
	} else {
		group6 = h->ip6->daddr;
		source6 = h->ip6->saddr;
		input = *(const __u64 *)&group6 ^ *((const __u64 *)&group6 + 1);
	}
	input ^= (__u64)ifindex << 32;
#pragma unroll
	for (i = 0; i < SHORTCUT_SLOTS; i++) {
		/* Most rules have their first slot: the hash is computed again rather than kept. */
		OPAQUE(input);
		OPAQUE(tags);
		hash = shortcut_hash(input, tags);
		s = shortcut_at(i ? shortcut_rehash(hash) : hash);
		if (!s)
			return NULL;
		if (same_tags(s, tags, ip4 ? 4 : 6) &&
		    (ip4 ? same_addresses4(s, input, h->ip4->saddr)
			 : s->ifindex == ifindex && same_addresses6(s, (const __u64 *)&group6,
								    (const __u64 *)&source6)))
			return s;
	}
	return NULL;
}

/* The only output of an IPv4 rule with has_output. */
static __always_inline const struct output *slot_output(const struct shortcut *s)
{
	return (const struct output *)s->second;
}

/* The flow entry in the slot of a packet's rule, and its only output in h if the slot has it; NULL:
 * no slot.
 */
static __always_inline struct flow *find_shortcut(__u32 ifindex, struct headers *h, __u16 port,
						  bool ip4)
{
	struct shortcut *s = find_slot(ifindex, h, port, ip4);

	h->output = NULL;
	if (!s)
		return NULL;
	if (ip4 && s->has_output)
		h->output = slot_output(s);
	return &s->flow;
}
