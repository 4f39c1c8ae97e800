/* SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0-only) */
/* Rewrites a copy for any output: used by the egress program, and by the relay program for a single
 * output with rare features.
 */
#pragma once

#include "buffers.h"
#include "police.h"
#include "rewrite.h"

#define PCP_MASK 0xf000 /* priority and drop eligible indicator */

/* The offsets of a frame's headers; udp 0: a later fragment, which has none. */
struct offsets {
	__u32 l3;
	__u32 udp;
};

static __always_inline __be16 tci(const struct output *o, __u16 vlan, __u16 old)
{
	__u16 priority = o->flags & OUTPUT_PCP_SET ? o->pcp << 13 | (old & 0x1000) : old & PCP_MASK;

	return bpf_htons(priority | vlan);
}

/* Writes the priority into the existing tags. */
static __always_inline void set_priority(void *data, void *data_end, const struct output *o,
					 __u32 tags)
{
	struct vlan_hdr *tag = data + sizeof(struct ethhdr);
	__u32 i;

#pragma unroll
	for (i = 0; i < MAX_VLAN_TAGS; i++) {
		if (i >= tags || (void *)(tag + 1) > data_end)
			return;
		tag->tci = tci(o, bpf_ntohs(tag->tci) & VLAN_VID_MASK, bpf_ntohs(tag->tci));
		tag++;
	}
}

/* Replaces the tags of a frame by those of its output: the bytes between the MACs and IP. The MACs
 * are left undefined. False if there is not enough headroom.
 */
static __always_inline bool retag(struct xdp_md *ctx, const struct output *o, struct offsets *at)
{
	void *data_end = (void *)(long)ctx->data_end;
	void *data = (void *)(long)ctx->data;
	__u32 have = (at->l3 - sizeof(struct ethhdr)) / sizeof(struct vlan_hdr);
	__u32 want = o->vlan_mode == VLAN_POP ? 0 : o->outer_vlan ? 2 : 1;
	__u16 first = 0, last = 0;
	struct vlan_hdr *tag;
	__be16 *proto;
	int delta;

	if (o->vlan_mode == VLAN_KEEP) {
		if (o->flags & OUTPUT_PCP_SET)
			set_priority(data, data_end, o, have);
		return true;
	}
	tag = data + sizeof(struct ethhdr);
	if ((void *)(tag + MAX_VLAN_TAGS) > data_end)
		return false;
	if (have) {
		first = bpf_ntohs(tag[0].tci);
		last = have > 1 ? bpf_ntohs(tag[1].tci) : first;
	}
	delta = (int)(have - want) * (int)sizeof(struct vlan_hdr);
	if (delta && bpf_xdp_adjust_head(ctx, delta))
		return false;
	data = (void *)(long)ctx->data;
	data_end = (void *)(long)ctx->data_end;
	at->l3 -= delta;
	if (at->udp)
		at->udp -= delta;
	proto = data + 2 * ETH_ALEN;
	tag = (void *)(proto + 1);
	if ((void *)(tag + MAX_VLAN_TAGS) > data_end)
		return false;
	if (want == 2) {
		*proto = bpf_htons(ETH_P_8021AD);
		tag[0].tci = tci(o, o->outer_vlan, first);
		proto = &tag[0].proto;
		tag++;
	}
	if (want) {
		*proto = bpf_htons(ETH_P_8021Q);
		tag->tci = tci(o, o->vlan, last);
		proto = &tag->proto;
	}
	*proto = bpf_htons(o->family == 4 ? ETH_P_IP : ETH_P_IPV6);
	return true;
}

/* Finds the headers again; the bounds are for the verifier, the relay program has parsed the
 * frame.
 */
static __always_inline bool find_headers(struct xdp_md *ctx, const struct offsets *at,
					 struct headers *h)
{
	void *data_end = (void *)(long)ctx->data_end;
	void *data = (void *)(long)ctx->data;

	if (data + sizeof(struct ethhdr) > data_end)
		return false;
	h->eth = data;
	h->l3 = data + (at->l3 & 0x1f);
	h->udp = NULL;
	if (at->udp) {
		h->udp = data + (at->udp & 0xff);
		if ((void *)(h->udp + 1) > data_end)
			return false;
	}
	return true;
}

static __always_inline __u32 rewrite_headers(struct xdp_md *ctx, struct headers *h,
					     const struct output *o, bool rare)
{
	void *data_end = (void *)(long)ctx->data_end;

	if (o->family == 4) {
		if ((void *)(h->ip4 + 1) > data_end)
			return DROP_INTERNAL;
		if (bpf_ntohs(h->ip4->tot_len) > o->mtu)
			return DROP_MTU;
		return rewrite_ip4(h, o, false, rare);
	}
	if ((void *)(h->ip6 + 1) > data_end)
		return DROP_INTERNAL;
	if (sizeof(*h->ip6) + bpf_ntohs(h->ip6->payload_len) > o->mtu)
		return DROP_MTU;
	return rewrite_ip6(h, o, rare);
}

/* Rewrites a copy for an output with rare features. Returns REWRITTEN, or the
 * drop reason; the frame may then be changed, too. Global, so that it is verified
 * once.
 */
__noinline int rewrite_rare(struct xdp_md *ctx, const struct output *o, __u32 l3, __u32 udp,
			    __u32 bytes)
{
	struct offsets at = {.l3 = l3, .udp = udp};
	struct headers h;
	__u32 reason;

	if (!o)
		return DROP_INTERNAL;
	if (too_long(o, l3, bytes))
		return DROP_MTU;
	/* A copy always has one buffer. Other frames in several the kernel would drop without
	 * counting them.
	 */
	if (o->flags & OUTPUT_ONE_BUFFER && bytes != first_buffer(ctx))
		return DROP_MULTI_BUFFER;
	if (!retag(ctx, o, &at) || !find_headers(ctx, &at, &h))
		return DROP_INTERNAL;
	reason = rewrite_headers(ctx, &h, o, true);
	if (reason != REWRITTEN)
		return reason;
	if (o->flags & OUTPUT_POLICED && !conforms(o->policer, bytes))
		return DROP_POLICED;
	return REWRITTEN;
}
