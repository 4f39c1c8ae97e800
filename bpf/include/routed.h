/* SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0-only) */
/* Flows that mirror an entry of the kernel's multicast forwarding cache. The relay forwards
 * only packets that it forwards exactly as the kernel would (ip_mr_forward of net/ipv4/ipmr.c,
 * ip6_mr_forward of net/ipv6/ip6mr.c); every other packet is left to the kernel, one by one.
 */
#pragma once

#include "maps.h"
#include "own.h"
#include "parse.h"
#include "rewrite.h"

/* mirror: one row, an AF_XDP socket of the daemon that mirrors the cache. No frame is sent to it:
 * the kernel empties the row as the process ends, however it ends.
 */
struct {
	__uint(type, BPF_MAP_TYPE_XSKMAP);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u32);
} mirror SEC(".maps");

/* routed_until: one entry, the CLOCK_MONOTONIC time in nanoseconds until which routed flows match
 * the kernel's cache. The daemon that mirrors it extends this periodically: it may also hang.
 */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} routed_until SEC(".maps");

/* Whether the daemon has ended, or hangs: the kernel then forwards alone. */
static __always_inline bool mirror_ended(void)
{
	__u64 *until = bpf_map_lookup_elem(&routed_until, &zero);

	return !bpf_map_lookup_elem(&mirror, &zero) || !until || bpf_ktime_get_coarse_ns() > *until;
}

/* Whether the kernel has, or may have, changed a flow's entry and the daemon has yet to follow.
 * The daemon sets this in the memory of the map outputs (pkg/loader/routed.go).
 */
static __always_inline bool route_held(const struct flow *flow)
{
	__u32 first = flow->first_output;
	const struct output *o = bpf_map_lookup_elem(&outputs, &first);

	return !o || *(const volatile __u32 *)&o->held;
}

/* A header with a valid checksum and no options: the kernel drops invalid ones and processes
 * options.
 */
static __always_inline bool plain_ip4(const struct iphdr *ip)
{
	const __u32 *words = (const __u32 *)ip;
	__u64 sum = 0;
	int i;

	if (ip->ihl != sizeof(*ip) / 4)
		return false;
#pragma unroll
	for (i = 0; i < (int)sizeof(*ip) / 4; i++)
		sum += words[i];
	return fold(sum) == 0xffff;
}

/* Whether the frame was sent to the group's MAC address: RFC 1112 section 6.4, RFC 2464
 * section 7.
 */
static __always_inline bool to_group_mac(const struct headers *h, bool ip4)
{
	const __u8 *mac = h->eth->h_dest;
	__u32 low = (__u32)mac[2] << 24 | (__u32)mac[3] << 16 | (__u32)mac[4] << 8 | mac[5];

	if (ip4)
		return mac[0] == 0x01 && mac[1] == 0x00 &&
		       low == (0x5e000000 | (bpf_ntohl(h->ip4->daddr) & 0x7fffff));
	return mac[0] == 0x33 && mac[1] == 0x33 &&
	       low == bpf_ntohl(h->ip6->daddr.in6_u.u6_addr32[3]);
}

/* Whether the kernel forwards a packet without tags of a routed flow: if its TTL is not above the
 * thresholds of all outputs, an output would fragment it or answer with an error, it has padding,
 * which the kernel trims, or this host sent it.
 */
static __always_inline int kernel_routes(struct xdp_md *ctx, const struct flow *flow, __u32 l3_len,
					 __u32 bytes, bool ip4)
{
	void *data_end = (void *)(long)ctx->data_end;
	void *data = (void *)(long)ctx->data;
	struct headers h = {.eth = data, .l3 = data + ETH_HLEN};
	struct udphdr *udp = (void *)(h.ip6 + 1);

	if (!flow)
		return true;
	if (ip4) {
		if ((void *)(h.ip4 + 1) > data_end || !plain_ip4(h.ip4) ||
		    h.ip4->ttl <= flow->routed)
			return true;
	} else if ((void *)(udp + 1) > data_end || h.ip6->nexthdr != IPPROTO_UDP || !udp->check ||
		   h.ip6->hop_limit <= flow->routed) {
		return true;
	}
	return route_held(flow) || mirror_ended() || ETH_HLEN + l3_len != bytes ||
	       l3_len > flow->min_mtu || !to_group_mac(&h, ip4) || own_packet(&h, flow, ip4);
}

/* Global functions, so that the verifier looks at them once: they find the headers anew. */
__noinline int kernel_routes4(struct xdp_md *ctx, const struct flow *flow, __u32 l3_len,
			      __u32 bytes)
{
	return kernel_routes(ctx, flow, l3_len, bytes, true);
}

__noinline int kernel_routes6(struct xdp_md *ctx, const struct flow *flow, __u32 l3_len,
			      __u32 bytes)
{
	return kernel_routes(ctx, flow, l3_len, bytes, false);
}
