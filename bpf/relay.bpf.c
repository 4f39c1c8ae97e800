//go:build ignore

// SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0-only)
/* The relay program: on every input and output interface. A packet that some
 * rule wants goes to the rule's outputs; everything else passes untouched.
 */
#include "account.h"
#include "handover.h"
#include "maps.h"
#include "parse.h"
#include "query.h"
#include "rewrite.h"

static const __u32 zero;

/* The rule of an IPv4 packet, source-specific first. */
static __always_inline struct flow *lookup4(__u32 ifindex, const struct headers *h, __u32 kinds)
{
	struct flow4 key = {
		.ifindex = ifindex,
		.vlan = h->vlan,
		.port = bpf_ntohs(h->udp->dest),
	};
	struct flow *flow;
	void *table;

	if (!(kinds & (LOOKUP_SOURCE4 | LOOKUP_ANY4)))
		return NULL;
	table = bpf_map_lookup_elem(&flow_tables4, &zero);
	if (!table)
		return NULL;
	*(__u32 *)key.group = h->ip4->daddr;
	if (kinds & LOOKUP_SOURCE4) {
		*(__u32 *)key.source = h->ip4->saddr;
		flow = bpf_map_lookup_elem(table, &key);
		if (flow)
			return flow;
		*(__u32 *)key.source = 0;
	}
	if (kinds & LOOKUP_ANY4)
		return bpf_map_lookup_elem(table, &key);
	return NULL;
}

static __always_inline struct flow *lookup6(__u32 ifindex, const struct headers *h, __u32 kinds)
{
	struct flow6 key = {
		.ifindex = ifindex,
		.vlan = h->vlan,
		.port = bpf_ntohs(h->udp->dest),
	};
	struct flow *flow;
	void *table;

	if (!(kinds & (LOOKUP_SOURCE6 | LOOKUP_ANY6)))
		return NULL;
	table = bpf_map_lookup_elem(&flow_tables6, &zero);
	if (!table)
		return NULL;
	*(struct in6_addr *)key.group = h->ip6->daddr;
	if (kinds & LOOKUP_SOURCE6) {
		*(struct in6_addr *)key.source = h->ip6->saddr;
		flow = bpf_map_lookup_elem(table, &key);
		if (flow)
			return flow;
		__builtin_memset(key.source, 0, sizeof(key.source));
	}
	if (kinds & LOOKUP_ANY6)
		return bpf_map_lookup_elem(table, &key);
	return NULL;
}

static __always_inline bool own_mac(const struct ethhdr *eth, const struct flow *flow)
{
	const __u16 *a = (const __u16 *)eth->h_source;
	const __u16 *b = (const __u16 *)flow->input_mac;

	return a[0] == b[0] && a[1] == b[1] && a[2] == b[2];
}

/* One output: the frame itself is rewritten and sent on. */
static __always_inline int send_one(struct headers *h, const struct flow *flow, __u32 bytes,
				    bool ip4)
{
	__u32 id = flow->rule, first = flow->first_output;
	struct output *o = bpf_map_lookup_elem(&outputs, &first);
	int verdict;

	if (!o)
		return count_drop(DROP_RULE, id, DROP_INTERNAL, bytes);
	if (!(o->flags & OUTPUT_READY))
		return count_drop(DROP_OUTPUT, o->stats, DROP_NOT_READY, bytes);
	if (h->l3_len > o->mtu)
		return count_drop(DROP_OUTPUT, o->stats, DROP_MTU, bytes);
	if (!(ip4 ? rewrite_ip4(h, o) : rewrite_ip6(h, o)))
		return count_drop(DROP_OUTPUT, o->stats, DROP_TTL, bytes);
	verdict = bpf_redirect_map(&ports, flow->port, XDP_DROP);
	if (verdict != XDP_REDIRECT)
		return count_drop(DROP_OUTPUT, o->stats, DROP_NO_DEVICE, bytes);
	count_sent(o->stats, bytes);
	return verdict;
}

/* Counts the copies that no egress program will see: of outputs that are not ready,
 * which have no row, and those too long for their output, whose row the kernel may
 * skip.
 */
__noinline int count_missing(__u32 first, __u32 n, __u32 l3_len, __u32 bytes)
{
	__u32 slot;

	for (slot = 0; slot < XDPCAST_MAX_SLOTS && slot < n; slot++) {
		__u32 index = first + slot;
		struct output *o = bpf_map_lookup_elem(&outputs, &index);

		if (!o)
			continue;
		if (!(o->flags & OUTPUT_READY))
			count_drop(DROP_OUTPUT, o->stats, DROP_NOT_READY, bytes);
		else if (l3_len > o->mtu)
			count_drop(DROP_OUTPUT, o->stats, DROP_MTU, bytes);
	}
	return 0;
}

/* Several outputs: the kernel clones the frame for each row of the rule's
 * devmap, and the egress program rewrites each copy.
 */
static __always_inline int send_many(struct xdp_md *ctx, struct headers *h, const struct flow *flow,
				     __u32 bytes, __u32 sequence)
{
	struct handover *to = (struct handover *)h->eth;
	__u32 id = flow->rule, first = flow->first_output;
	void *slots = bpf_map_lookup_elem(&fanout, &first);

	if (!slots)
		return count_drop(DROP_RULE, id, DROP_INTERNAL, bytes);
	/* The kernel's clone leaves the further buffers of a frame behind. */
	if (bytes != (__u32)(ctx->data_end - ctx->data))
		return count_drop(DROP_RULE, id, DROP_MULTI_BUFFER, bytes);
	if (h->l3_len > flow->min_mtu)
		count_missing(first, flow->outputs, h->l3_len, bytes);
	to->first_output = first;
	to->l3_offset = h->l3_offset;
	to->outputs = flow->outputs;
	to->mark = HANDOVER_MARK;
	to->udp_offset = (void *)h->udp - (void *)h->eth;
	to->sequence = sequence;
	return bpf_redirect_map(slots, 0, BPF_F_BROADCAST);
}

/* A packet with its rule. ip4 is a constant in each caller, so that the family is
 * decided once.
 */
static __always_inline int forward(struct xdp_md *ctx, struct headers *h, const struct flow *flow,
				   bool ip4)
{
	__u32 bytes = bpf_xdp_get_buff_len(ctx);
	__u32 id = flow->rule, sequence;

	/* A packet cut short is for the stack to refuse. */
	if ((__u64)h->l3_offset + h->l3_len > bytes)
		return XDP_PASS;
	sequence = count_match(id, bytes);
	if (own_mac(h->eth, flow))
		return count_drop(DROP_RULE, id, DROP_LOOP, bytes);
	if (h->fragment)
		return count_drop(DROP_RULE, id, DROP_FRAGMENT, bytes);
	if (!ip4 && !h->udp->check)
		return count_drop(DROP_RULE, id, DROP_NO_CHECKSUM, bytes);
	if (flow->path != PATH_KERNEL)
		return count_drop(DROP_RULE, id, DROP_INTERNAL, bytes);
	if (flow->outputs == 1)
		return send_one(h, flow, bytes, ip4);
	return send_many(ctx, h, flow, bytes, sequence);
}

/* What is no whole UDP packet is for the stack; queries are counted on the way.
 * The compiler is told that this is rare, to keep it out of the way of the rest.
 */
static __always_inline int not_udp(struct xdp_md *ctx)
{
	count_query(ctx);
	return XDP_PASS;
}

static __always_inline int relay_packet(struct xdp_md *ctx)
{
	void *data_end = (void *)(long)ctx->data_end;
	void *data = (void *)(long)ctx->data;
	struct headers h;
	struct config *cfg;
	struct flow *flow;
	__be16 proto;

	cfg = bpf_map_lookup_elem(&config, &zero);
	if (!cfg)
		return XDP_PASS;
	proto = parse_eth(data, data_end, &h);
	if (proto == bpf_htons(ETH_P_IP)) {
		if (__builtin_expect(!parse_ip4(data_end, &h), 0))
			return not_udp(ctx);
		flow = lookup4(ctx->ingress_ifindex, &h, cfg->lookup_kinds);
		return flow ? forward(ctx, &h, flow, true) : XDP_PASS;
	}
	if (proto == bpf_htons(ETH_P_IPV6)) {
		if (__builtin_expect(!parse_ip6(data_end, &h), 0))
			return not_udp(ctx);
		flow = lookup6(ctx->ingress_ifindex, &h, cfg->lookup_kinds);
		return flow ? forward(ctx, &h, flow, false) : XDP_PASS;
	}
	return XDP_PASS;
}

SEC("xdp.frags")
int relay(struct xdp_md *ctx)
{
	int verdict = relay_packet(ctx);

	if (verdict == XDP_PASS) {
		struct counter *c = bpf_map_lookup_elem(&passed, &zero);

		if (c)
			count(c, bpf_xdp_get_buff_len(ctx));
	}
	return verdict;
}

char _license[] SEC("license") = "Dual BSD/GPL";
