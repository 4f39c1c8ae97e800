/* SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0-only) */
/* From a packet to its rule: the most specific first, in the order of enum lookup_kind.
 * Kinds that no rule uses are skipped. Most packets take a shortcut, which gives the same
 * answer.
 */
#pragma once

#include "maps.h"
#include "parse.h"
#include "shortcut.h"

static const __u32 zero;

/* The kinds of prefixes of groups. */
#define LOOKUP_IN_PREFIXES(kinds)                                                                  \
	((kinds) & (0xf << LOOKUP_PREFIXES | LOOKUP_BOTH_PORT | LOOKUP_BOTH))

/* The kind with both prefixes that precedes any source with a prefix of groups. */
#define LOOKUP_BOTH_OF(kind)                                                                       \
	((kind) == LOOKUP_PORT ? LOOKUP_BOTH_PORT : (kind) == LOOKUP_ANY ? LOOKUP_BOTH : 0)

/* The rule of an IPv4 packet whose source is in some rule's prefix. Out of line: few rule sets have
 * source prefixes.
 */
static __noinline struct flow *lookup_sources4(const struct flow4 *exact, __u32 source)
{
	struct prefix4 key = {
		.prefixlen = PREFIX4_EXACT + 32,
		.ifindex = exact->ifindex,
		.vlan = exact->vlan,
		.outer_vlan = exact->outer_vlan,
		.port = exact->port,
		.by = PREFIX_BY_SOURCE,
	};
	void *table = bpf_map_lookup_elem(&prefix_tables4, &zero);
	struct flow *flow;

	if (!table)
		return NULL;
	*(__u32 *)key.source = *(const __u32 *)exact->group;
	*(__u32 *)key.group = source;
	flow = bpf_map_lookup_elem(table, &key);
	return flow && flow->path != PATH_NONE ? flow : NULL;
}

/* The rule of an IPv4 packet whose source and group are in prefixes of some rule: the longest
 * source prefix gives the class of rules, and within the class the longest group prefix gives the
 * rule. key is for prefixes of groups, and is restored afterwards, except for the source. Both
 * steps use the same table, in which alone the class's number is valid. Out of line: few rule sets
 * have both.
 */
static __noinline struct flow *lookup_both4(void *table, struct prefix4 *key, __u32 source)
{
	__u32 group = *(__u32 *)key->group;
	struct flow *flow;

	key->by = PREFIX_CLASS;
	*(__u32 *)key->source = 0;
	*(__u32 *)key->group = source;
	flow = bpf_map_lookup_elem(table, key);
	*(__u32 *)key->group = group;
	if (flow) {
		key->by = PREFIX_IN_CLASS;
		*(__u32 *)key->source = flow->rule;
		flow = bpf_map_lookup_elem(table, key);
	}
	key->by = PREFIX_BY_GROUP;
	return flow && flow->path != PATH_NONE ? flow : NULL;
}

/* The rule of an IPv4 packet whose group is in some rule's prefix. Out of line: most rule
 * sets have no prefixes. None matches link-local groups: the prefix of all groups excludes
 * them.
 */
static __noinline struct flow *lookup_prefix4(const struct flow4 *exact, __u32 source, __u32 kinds)
{
	struct prefix4 key = {
		.prefixlen = PREFIX4_EXACT + 32,
		.ifindex = exact->ifindex,
		.vlan = exact->vlan,
		.outer_vlan = exact->outer_vlan,
	};
	void *table = bpf_map_lookup_elem(&prefix_tables4, &zero);
	struct flow *flow;
	__u32 i;

	if (!table ||
	    (*(const __u32 *)exact->group & bpf_htonl(0xffffff00)) == bpf_htonl(0xe0000000))
		return NULL;
	*(__u32 *)key.group = *(const __u32 *)exact->group;
#pragma unroll
	for (i = 0; i < 4; i++) {
		__u32 kind = 1 << i;

		key.port = kind & (LOOKUP_SOURCE_PORT | LOOKUP_PORT) ? exact->port : 0;
		if (kinds & LOOKUP_BOTH_OF(kind)) {
			flow = lookup_both4(table, &key, source);
			if (flow)
				return flow;
		}
		if (!(kinds & (kind << LOOKUP_PREFIXES)))
			continue;
		*(__u32 *)key.source = kind & (LOOKUP_SOURCE_PORT | LOOKUP_SOURCE) ? source : 0;
		flow = bpf_map_lookup_elem(table, &key);
		if (flow)
			return flow;
	}
	return NULL;
}

/* The shortcut of a packet whose rule may be of any port, too. While no rule names a port,
 * it is looked for first.
 */
static __always_inline struct flow *find_any_shortcut(__u32 ifindex, struct headers *h, __u16 port,
						      __u32 kinds, bool ip4)
{
	struct flow *flow;

	if (!(kinds & (LOOKUP_SOURCE_PORT | LOOKUP_PORT)))
		port = 0;
	flow = find_shortcut(ifindex, h, port, ip4);
	if (flow || __builtin_expect(!(kinds & LOOKUP_SOURCE) || !port, 1))
		return flow;
	return find_shortcut(ifindex, h, 0, ip4);
}

static __always_inline struct flow *lookup4(__u32 ifindex, struct headers *h, __u16 port)
{
	struct flow4 key = {
		.ifindex = ifindex,
		.vlan = h->vlan,
		.outer_vlan = h->outer_vlan,
		.port = port,
	};
	__u32 source = h->ip4->saddr;
	__u32 kinds = settings.lookup4;
	struct flow *flow;
	void *table;

	if (!kinds)
		return NULL;
	flow = find_any_shortcut(ifindex, h, port, kinds, true);
	if (flow)
		return flow;
	table = bpf_map_lookup_elem(&flow_tables4, &zero);
	if (!table)
		return NULL;
	*(__u32 *)key.group = h->ip4->daddr;
	if (kinds & LOOKUP_SOURCE_PORT) {
		*(__u32 *)key.source = source;
		flow = bpf_map_lookup_elem(table, &key);
		if (flow)
			return flow;
		*(__u32 *)key.source = 0;
	}
	if (__builtin_expect(kinds & LOOKUP_SOURCES_PORT, 0)) {
		flow = lookup_sources4(&key, source);
		if (flow)
			return flow;
	}
	if (kinds & LOOKUP_PORT) {
		flow = bpf_map_lookup_elem(table, &key);
		if (flow)
			return flow;
	}
	if (__builtin_expect(!(kinds & ~(LOOKUP_SOURCE_PORT | LOOKUP_PORT)), 1))
		return NULL;
	key.port = 0;
	if (kinds & LOOKUP_SOURCE) {
		*(__u32 *)key.source = source;
		flow = bpf_map_lookup_elem(table, &key);
		if (flow)
			return flow;
		*(__u32 *)key.source = 0;
	}
	if (__builtin_expect(kinds & LOOKUP_SOURCES, 0)) {
		flow = lookup_sources4(&key, source);
		if (flow)
			return flow;
	}
	if (kinds & LOOKUP_ANY) {
		flow = bpf_map_lookup_elem(table, &key);
		if (flow)
			return flow;
	}
	if (!LOOKUP_IN_PREFIXES(kinds))
		return NULL;
	key.port = port;
	return lookup_prefix4(&key, source, kinds);
}

/* The same for IPv6. Not a macro, since the verifier reports lines. */
static __noinline struct flow *lookup_sources6(const struct flow6 *exact,
					       const struct in6_addr *source)
{
	struct prefix6 key = {
		.prefixlen = PREFIX6_EXACT + 128,
		.ifindex = exact->ifindex,
		.vlan = exact->vlan,
		.outer_vlan = exact->outer_vlan,
		.port = exact->port,
		.by = PREFIX_BY_SOURCE,
	};
	void *table = bpf_map_lookup_elem(&prefix_tables6, &zero);
	struct flow *flow;

	if (!table)
		return NULL;
	__builtin_memcpy(key.source, exact->group, sizeof(key.source));
	__builtin_memcpy(key.group, source, sizeof(key.group));
	flow = bpf_map_lookup_elem(table, &key);
	return flow && flow->path != PATH_NONE ? flow : NULL;
}

static __noinline struct flow *lookup_both6(void *table, struct prefix6 *key,
					    const struct in6_addr *group,
					    const struct in6_addr *source)
{
	struct flow *flow;

	key->by = PREFIX_CLASS;
	__builtin_memset(key->source, 0, sizeof(key->source));
	*(struct in6_addr *)key->group = *source;
	flow = bpf_map_lookup_elem(table, key);
	*(struct in6_addr *)key->group = *group;
	if (flow) {
		key->by = PREFIX_IN_CLASS;
		*(__u32 *)key->source = flow->rule;
		flow = bpf_map_lookup_elem(table, key);
	}
	key->by = PREFIX_BY_GROUP;
	return flow && flow->path != PATH_NONE ? flow : NULL;
}

static __noinline struct flow *lookup_prefix6(const struct flow6 *exact,
					      const struct in6_addr *source, __u32 kinds)
{
	struct prefix6 key = {
		.prefixlen = PREFIX6_EXACT + 128,
		.ifindex = exact->ifindex,
		.vlan = exact->vlan,
		.outer_vlan = exact->outer_vlan,
	};
	void *table = bpf_map_lookup_elem(&prefix_tables6, &zero);
	struct flow *flow;
	__u32 i;

	/* Multicast of scope 2 and below (RFC 4291 section 2.7). */
	if (!table || (exact->group[0] == 0xff && (exact->group[1] & 0xf) <= 2))
		return NULL;
	__builtin_memcpy(key.group, exact->group, sizeof(key.group));
#pragma unroll
	for (i = 0; i < 4; i++) {
		__u32 kind = 1 << i;

		key.port = kind & (LOOKUP_SOURCE_PORT | LOOKUP_PORT) ? exact->port : 0;
		if (kinds & LOOKUP_BOTH_OF(kind)) {
			flow = lookup_both6(table, &key, (const struct in6_addr *)exact->group,
					    source);
			if (flow)
				return flow;
		}
		if (!(kinds & (kind << LOOKUP_PREFIXES)))
			continue;
		if (kind & (LOOKUP_SOURCE_PORT | LOOKUP_SOURCE))
			__builtin_memcpy(key.source, source, sizeof(key.source));
		else
			__builtin_memset(key.source, 0, sizeof(key.source));
		flow = bpf_map_lookup_elem(table, &key);
		if (flow)
			return flow;
	}
	return NULL;
}

static __always_inline struct flow *lookup6(__u32 ifindex, struct headers *h, __u16 port)
{
	struct flow6 key = {
		.ifindex = ifindex,
		.vlan = h->vlan,
		.outer_vlan = h->outer_vlan,
		.port = port,
	};
	struct in6_addr source;
	__u32 kinds = settings.lookup6;
	struct flow *flow;
	void *table;

	if (!kinds)
		return NULL;
	flow = find_any_shortcut(ifindex, h, port, kinds, false);
	if (flow)
		return flow;
	table = bpf_map_lookup_elem(&flow_tables6, &zero);
	if (!table)
		return NULL;
	source = h->ip6->saddr;
	*(struct in6_addr *)key.group = h->ip6->daddr;
	if (kinds & LOOKUP_SOURCE_PORT) {
		*(struct in6_addr *)key.source = source;
		flow = bpf_map_lookup_elem(table, &key);
		if (flow)
			return flow;
		__builtin_memset(key.source, 0, sizeof(key.source));
	}
	if (__builtin_expect(kinds & LOOKUP_SOURCES_PORT, 0)) {
		flow = lookup_sources6(&key, &source);
		if (flow)
			return flow;
	}
	if (kinds & LOOKUP_PORT) {
		flow = bpf_map_lookup_elem(table, &key);
		if (flow)
			return flow;
	}
	if (__builtin_expect(!(kinds & ~(LOOKUP_SOURCE_PORT | LOOKUP_PORT)), 1))
		return NULL;
	key.port = 0;
	if (kinds & LOOKUP_SOURCE) {
		*(struct in6_addr *)key.source = source;
		flow = bpf_map_lookup_elem(table, &key);
		if (flow)
			return flow;
		__builtin_memset(key.source, 0, sizeof(key.source));
	}
	if (__builtin_expect(kinds & LOOKUP_SOURCES, 0)) {
		flow = lookup_sources6(&key, &source);
		if (flow)
			return flow;
	}
	if (kinds & LOOKUP_ANY) {
		flow = bpf_map_lookup_elem(table, &key);
		if (flow)
			return flow;
	}
	if (!LOOKUP_IN_PREFIXES(kinds))
		return NULL;
	key.port = port;
	return lookup_prefix6(&key, &source, kinds);
}
