/* SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0-only) */
/* Watching for multicast queriers: a host that hears none keeps its memberships, but a
 * snooping switch between it and the source may forget them. Queries are counted and left to
 * the stack, which answers them.
 *
 * It recognises the queries on which Linux acts (igmp_heard_query and igmp6_event_query),
 * except that it ignores the checksum and the Router Alert option, which older queriers
 * omit.
 */
#pragma once

#include "maps.h"
#include "parse.h"

#define IGMP_QUERY 0x11 /* RFC 3376 section 4 */
#define MLD_QUERY 130	/* RFC 3810 section 5 */

/* The first eight bytes of IGMP (RFC 2236 section 2), and how those of MLD begin. */
struct group_message {
	__u8 type;
	__u8 code;
	__be16 checksum;
	__be32 rest;
};

/* The IGMP version of a query of this length, 0 for a malformed one (RFC 3376 section 7.1). The
 * code is the maximum response time, which IGMPv1 lacks.
 */
static __always_inline __u32 igmp_version(__u32 len, __u8 code)
{
	if (len == 8)
		return code ? 2 : 1;
	return len >= 12 ? 3 : 0;
}

/* The same for MLD (RFC 3810 section 8.1). */
static __always_inline __u32 mld_version(__u32 len)
{
	if (len == 24)
		return 1;
	return len >= 28 ? 2 : 0;
}

/* The IGMP version of the packet if it is a query, otherwise 0. */
static __always_inline __u32 parse_query4(void *data_end, const struct headers *h, __u32 bytes,
					  struct querier *from)
{
	struct iphdr *ip = h->l3;
	struct group_message *m;
	__u32 header_len, len;

	if ((void *)(ip + 1) > data_end || ip->version != 4 || ip->protocol != IPPROTO_IGMP)
		return 0;
	header_len = ip->ihl * 4;
	len = bpf_ntohs(ip->tot_len);
	if (header_len < sizeof(*ip) || len < header_len || h->l3_offset + len > bytes)
		return 0;
	if (ip->frag_off & bpf_htons(IP_MF | IP_OFFSET))
		return 0;
	m = h->l3 + header_len;
	if ((void *)(m + 1) > data_end || m->type != IGMP_QUERY)
		return 0;
	*(__u32 *)from->address = ip->saddr;
	return igmp_version(len - header_len, m->code);
}

/* The MLD version of the packet if it is a query, otherwise 0. Queries have a
 * hop-by-hop header, a link-local source address and hop limit 1 (RFC 3810 sections 5
 * and 5.1.14).
 */
static __always_inline __u32 parse_query6(void *data_end, const struct headers *h, __u32 bytes,
					  struct querier *from)
{
	struct ipv6hdr *ip = h->l3;
	struct ipv6_opt_hdr *hop = (void *)(ip + 1);
	struct group_message *m;
	__u32 hop_len, len;

	if ((void *)(hop + 1) > data_end || ip->version != 6 || ip->nexthdr != IPPROTO_HOPOPTS ||
	    hop->nexthdr != IPPROTO_ICMPV6)
		return 0;
	if (ip->hop_limit != 1 ||
	    (ip->saddr.in6_u.u6_addr16[0] & bpf_htons(0xffc0)) != bpf_htons(0xfe80))
		return 0;
	hop_len = (hop->hdrlen + 1) * 8;
	len = bpf_ntohs(ip->payload_len);
	if (len < hop_len || h->l3_offset + sizeof(*ip) + len > bytes)
		return 0;
	m = (void *)hop + hop_len;
	if ((void *)(m + 1) > data_end || m->type != MLD_QUERY)
		return 0;
	*(struct in6_addr *)from->address = ip->saddr;
	return mld_version(len - hop_len);
}

/* Several CPUs may see queries of one interface at once. The count is exact. An address never mixes
 * two queriers: the differing halves of MLD queriers' addresses, and IPv4 addresses, are written
 * atomically.
 */
static __always_inline void count_querier(__u32 ifindex, __u32 family, const struct querier *from)
{
	struct querier_key key = {.ifindex = ifindex, .family = family};
	struct querier *to = bpf_map_lookup_elem(&queriers, &key);

	if (!to) {
		/* Another CPU may have created the entry first: count in that. */
		if (!bpf_map_update_elem(&queriers, &key, from, BPF_NOEXIST))
			return;
		to = bpf_map_lookup_elem(&queriers, &key);
		if (!to)
			return;
	}
	__sync_fetch_and_add(&to->packets, 1);
	*(__u64 *)to->address = *(__u64 *)from->address;
	*(__u64 *)(to->address + 8) = *(__u64 *)(from->address + 8);
	to->version = from->version;
	to->last_seen_ns = from->last_seen_ns;
}

/* Counts a packet if it is a query. It parses the frame again: out of line, and apart from the
 * path of UDP packets. Queries in a VLAN belong to another network, where no group of a rule is
 * joined.
 */
__noinline int count_query(struct xdp_md *ctx)
{
	void *data_end = (void *)(long)ctx->data_end;
	void *data = (void *)(long)ctx->data;
	struct querier from = {.packets = 1};
	__u32 bytes = bpf_xdp_get_buff_len(ctx);
	struct headers h;
	__u32 family;
	__be16 proto;

	proto = parse_eth(data, data_end, &h);
	if (proto == bpf_htons(ETH_P_IP)) {
		family = 4;
		from.version = parse_query4(data_end, &h, bytes, &from);
	} else if (proto == bpf_htons(ETH_P_IPV6)) {
		family = 6;
		from.version = parse_query6(data_end, &h, bytes, &from);
	} else {
		return 0;
	}
	if (!from.version || h.vlan)
		return 0;
	from.last_seen_ns = bpf_ktime_get_coarse_ns();
	count_querier(ctx->ingress_ifindex, family, &from);
	return 0;
}
