/* SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0-only) */
/* If a device has fewer receive queues than the fanout path has workers, flows are spread over the
 * workers' CPUs, and PACKET_FANOUT_CPU gives each to the worker there.
 */
#pragma once

#include "config.h"
#include "fragment.h"
#include "maps.h"
#include "parse.h"

static const __u32 zero;

static __always_inline __u32 mix(__u32 hash, __u32 word)
{
	hash ^= word;
	hash *= 0x9e3779b1U;
	return hash ^ hash >> 15;
}

/* The same for all packets of a flow, fragments included. Later fragments carry no ports:
 * the destination port is the one recorded from the first, and the source port is left out.
 */
static __always_inline __u32 flow_hash(const struct headers *h, __u16 port, bool ip4)
{
	__u32 hash = port, i;

	if (ip4)
		return mix(mix(mix(0, hash), h->ip4->saddr), h->ip4->daddr);
#pragma unroll
	for (i = 0; i < 4; i++) {
		hash = mix(hash, h->ip6->saddr.in6_u.u6_addr32[i]);
		hash = mix(hash, h->ip6->daddr.in6_u.u6_addr32[i]);
	}
	return hash;
}

/* Out of line, since only rules of the fanout path come here. A CPU without a queue leaves
 * the packet on this one.
 */
__noinline int to_cpu(__u32 hash)
{
	__u32 at;

	if (!settings.steered)
		return XDP_PASS;
	at = (__u64)hash * settings.steered >> 32;
	return bpf_redirect_map(&cpus, settings.cpu[at & (XDPCAST_MAX_STEERED - 1)], XDP_PASS);
}

static __noinline int steer(__u32 ifindex, const struct headers *h, bool ip4)
{
	__u16 port = h->udp ? bpf_ntohs(h->udp->dest) : fragment_port(ifindex, h, ip4);

	return to_cpu(flow_hash(h, port, ip4));
}
