//go:build ignore

// SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0-only)
/* The relay program, attached to every input and output interface. A packet that matches a rule
 * goes to the rule's outputs; everything else passes unchanged.
 */
#include "account.h"
#include "buffers.h"
#include "config.h"
#include "rewrite_rare.h"
#include "finish.h"
#include "fragment.h"
#include "guard.h"
#include "handover.h"
#include "lookup.h"
#include "own.h"
#include "plain.h"
#include "query.h"
#include "routed.h"
#include "steer.h"
#include "stream.h"

/* Redirects a rewritten frame to the device. */
static __always_inline int redirect_one(const struct flow *flow, const struct output *o,
					struct rule_stats *stats, __u32 bytes)
{
	int verdict = bpf_redirect_map(&devices, flow->device, XDP_DROP);

	if (verdict != XDP_REDIRECT)
		return count_drop(DROP_OUTPUT, o->stats, DROP_NO_DEVICE, bytes);
	stats->sent_packets++;
	stats->sent_bytes += bytes;
	return verdict;
}

/* The only output of a rule, if its shortcut has no copy of it. NULL: the output is not served by
 * the fast path, and verdict is the result for the packet.
 */
static __always_inline const struct output *find_one(struct xdp_md *ctx, struct headers *h,
						     const struct flow *flow,
						     struct rule_stats *stats, __u32 bytes,
						     int *verdict)
{
	__u32 first = flow->first_output, reason;
	struct output *o = bpf_map_lookup_elem(&outputs, &first);

	if (!o) {
		*verdict = count_drop(DROP_RULE, flow->rule, DROP_INTERNAL, bytes);
		return NULL;
	}
	if (!(o->flags & OUTPUT_READY)) {
		*verdict = count_drop(DROP_OUTPUT, o->stats, o->blocked, bytes);
		return NULL;
	}
	if (__builtin_expect(!(o->flags & OUTPUT_RARE), 1))
		return o;
	if (frame_size(h->l3_offset, bytes) > o->mtu &&
	    (h->l3_len > o->mtu || too_long(o, h->l3_offset, bytes))) {
		*verdict = count_drop(DROP_OUTPUT, o->stats, DROP_MTU, bytes);
		return NULL;
	}
	reason = rewrite_rare(ctx, o, h->l3_offset, udp_offset(h), bytes);
	*verdict = reason == REWRITTEN ? redirect_one(flow, o, stats, bytes)
				       : count_drop(DROP_OUTPUT, o->stats, reason, bytes);
	return NULL;
}

/* One output: the frame itself is rewritten and sent. */
static __always_inline int send_one(struct xdp_md *ctx, struct headers *h, const struct flow *flow,
				    struct rule_stats *stats, __u32 bytes, bool ip4)
{
	const struct output *o = h->output;
	__u32 reason;
	int verdict;

	if (!o) {
		o = find_one(ctx, h, flow, stats, bytes, &verdict);
		if (!o)
			return verdict;
	}
	/* The tags stay unchanged. */
	if (__builtin_expect(frame_size(h->l3_offset, bytes) > o->mtu, 0) &&
	    (h->l3_len > o->mtu || bytes > (__u32)o->mtu + FRAME_ROOM))
		return count_drop(DROP_OUTPUT, o->stats, DROP_MTU, bytes);
	reason = ip4 ? rewrite_ip4(h, o, false, false) : rewrite_ip6(h, o, false);
	if (reason != REWRITTEN)
		return count_drop(DROP_OUTPUT, o->stats, reason, bytes);
	return redirect_one(flow, o, stats, bytes);
}

/* Counts the copies that no egress program will see: of outputs that are not ready,
 * which have no row, and those too long for their output, whose row the kernel may
 * skip.
 */
__noinline int count_missing(__u32 first, __u32 n, __u32 l3_len, __u32 l3_offset, __u32 bytes)
{
	__u32 slot;

	for (slot = 0; slot < XDPCAST_MAX_SLOTS && slot < n; slot++) {
		__u32 index = first + slot;
		struct output *o = bpf_map_lookup_elem(&outputs, &index);

		if (!o)
			continue;
		if (!(o->flags & OUTPUT_READY))
			count_drop(DROP_OUTPUT, o->stats, o->blocked, bytes);
		else if (l3_len > o->mtu || bytes > (__u32)o->mtu + FRAME_ROOM ||
			 too_long(o, l3_offset, bytes))
			count_drop(DROP_OUTPUT, o->stats, DROP_MTU, bytes);
	}
	return 0;
}

/* Tells the egress program, or a user-space path, which rule this packet belongs to. */
static __always_inline void hand_over(struct headers *h, const struct flow *flow, __u32 sequence)
{
	struct handover *to = (struct handover *)h->eth;

	to->first_output = flow->first_output;
	to->l3_offset = h->l3_offset;
	to->outputs = flow->outputs;
	to->mark = HANDOVER_MARK;
	to->udp_offset = udp_offset(h);
	to->sequence = sequence;
}

/* Several outputs: the kernel clones the frame for each row of the rule's
 * devmap, and the egress program rewrites each copy.
 */
static __always_inline int send_many(struct xdp_md *ctx, struct headers *h, const struct flow *flow,
				     __u32 bytes, __u32 sequence)
{
	__u32 id = flow->rule, first = flow->first_output;
	void *slots = bpf_map_lookup_elem(&broadcast, &first);

	if (!slots)
		return count_drop(DROP_RULE, id, DROP_INTERNAL, bytes);
	/* The kernel's clone drops all but the first buffer of a frame. */
	if (bytes != first_buffer(ctx))
		return count_drop(DROP_RULE, id, DROP_MULTI_BUFFER, bytes);
	if (frame_size(h->l3_offset, bytes) > flow->min_mtu)
		count_missing(first, flow->outputs, h->l3_len, h->l3_offset, bytes);
	hand_over(h, flow, sequence);
	return bpf_redirect_map(slots, 0, BPF_F_BROADCAST);
}

/* AF_XDP sockets take frames in several buffers (Linux 6.6). Set at load. */
const volatile bool socket_multi_buffer = true;

/* Redirects to the AF_XDP socket of the interface and queue. Returns false if the kernel path
 * should serve the packet.
 */
static __always_inline bool to_socket(struct xdp_md *ctx, struct headers *h,
				      const struct flow *flow, __u32 bytes,
				      struct rule_stats *stats, int *verdict)
{
	__u32 queue = ctx->rx_queue_index;

	/* The kernel would drop it without counting it. */
	if (!socket_multi_buffer && bytes != first_buffer(ctx)) {
		if (flow->flags & FLOW_FALLBACK)
			return false;
		*verdict = count_drop(DROP_RULE, flow->rule, DROP_MULTI_BUFFER, bytes);
		return true;
	}
	if (flow->path == PATH_AFXDP && queue < XDPCAST_MAX_QUEUES) {
		*verdict = bpf_redirect_map(&xsks, flow->sockets + queue, XDP_DROP);
		if (*verdict == XDP_REDIRECT) {
			stats->handed_packets++;
			stats->handed_bytes += bytes;
			hand_over(h, flow, stats->packets);
			return true;
		}
	}
	if (flow->flags & FLOW_FALLBACK)
		return false;
	*verdict = count_drop(DROP_RULE, flow->rule,
			      flow->path == PATH_AFXDP ? DROP_NO_SOCKET : DROP_INTERNAL, bytes);
	return true;
}

/* Whether a packet of one of several inputs continues. Otherwise it is counted: copies of another
 * input's packets in stats.
 */
static __always_inline bool leg_passes(struct xdp_md *ctx, __u32 ifindex, const struct headers *h,
				       const struct flow *flow, struct rule_stats *stats,
				       __u32 bytes, __u64 now, bool ip4)
{
	__u32 v = STREAM_PASSED;

	if (h->udp) {
		v = judge_next(ctx, flow->stream, flow->leg, udp_offset(h), now);
		if (__builtin_expect(v == STREAM_VERDICTS, 0))
			v = judge_leg(ctx, flow->stream, flow->leg, udp_offset(h), now);
	}
	if (__builtin_expect(h->part != PART_WHOLE, 0))
		v = fragment_verdict(ifindex, h, ip4, v);
	if (v == STREAM_PASSED)
		return true;
	if (v == STREAM_DUPLICATE || v == STREAM_STANDBY) {
		stats->copies_packets++;
		stats->copies_bytes += bytes;
	} else {
		count_drop(DROP_RULE, flow->rule, DROP_DUPLICATE + v - STREAM_DUPLICATE, bytes);
	}
	return false;
}

/* The same on the fanout path, where workers match packets and count only those that reach them.
 */
static __always_inline bool tapped_leg_passes(struct xdp_md *ctx, __u32 ifindex,
					      const struct headers *h, const struct flow *flow,
					      __u32 bytes, bool ip4)
{
	__u32 id = flow->rule;
	struct rule_stats *stats = bpf_map_lookup_elem(&rule_stats, &id);

	if (!stats)
		return false;
	if (leg_passes(ctx, ifindex, h, flow, stats, bytes, bpf_ktime_get_coarse_ns(), ip4))
		return true;
	stats->packets++;
	stats->bytes += bytes;
	return false;
}

/* Passes a packet that matches no rule, unchanged. */
#define NOT_OURS (-1)

/* Leaves a packet to forward. */
#define NOT_PLAIN (-2)

/* The word of a flow entry that begins with flags, on a little-endian machine, for the kernel path;
 * and the mask of its bits for everything rare.
 */
#define FLOW_PLAIN ((__u64)PATH_KERNEL << 16)
#define FLOW_PLAIN_MASK                                                                            \
	(0xffffffff0000ULL /* path, routed and stream */ | FLOW_UNICAST | FLOW_POLICED |           \
	 FLOW_FINISH | FLOW_LONG_WAY)

_Static_assert(__builtin_offsetof(struct flow, flags) == 16, "begins a word");
_Static_assert(__builtin_offsetof(struct flow, path) == 18, "follows flags");
_Static_assert(__builtin_offsetof(struct flow, routed) == 19, "follows path");
_Static_assert(__builtin_offsetof(struct flow, stream) == 20, "follows routed");

/* Whether a flow is on another path than the kernel's, a leg or routed, or has one of the flags
 * above: for most flows one comparison excludes all of these.
 */
static __always_inline bool is_rare(const struct flow *flow)
{
	/* As one word, which the compiler would read in halves through a field of 2 bytes. */
	const __u64 *words = (const void *)flow;

	return (words[2] & FLOW_PLAIN_MASK) != FLOW_PLAIN;
}

/* The same, but for legs. */
static __always_inline bool is_odd(const struct flow *flow)
{
	return (*(const __u32 *)&flow->flags & (__u32)FLOW_PLAIN_MASK) != (__u32)FLOW_PLAIN;
}

/* One output of a routed flow. */
static __always_inline int route_one(struct xdp_md *ctx, const struct flow *flow,
				     struct rule_stats *stats, __u32 bytes)
{
	__u32 first = flow->first_output;
	const struct output *o = bpf_map_lookup_elem(&outputs, &first);

	if (!o)
		return count_drop(DROP_RULE, flow->rule, DROP_INTERNAL, bytes);
	if (!(o->flags & OUTPUT_READY))
		return count_drop(DROP_OUTPUT, o->stats, o->blocked, bytes);
	if (__builtin_expect(o->flags & OUTPUT_ONE_BUFFER, 0) && bytes != first_buffer(ctx))
		return count_drop(DROP_OUTPUT, o->stats, DROP_MULTI_BUFFER, bytes);
	if (!route_frame((void *)(long)ctx->data, (void *)(long)ctx->data_end, o))
		return count_drop(DROP_OUTPUT, o->stats, DROP_INTERNAL, bytes);
	return redirect_one(flow, o, stats, bytes);
}

/* A packet with its rule. ip4 is a constant in each caller, so that the family is
 * decided once.
 */
static __always_inline int forward(struct xdp_md *ctx, __u32 ifindex, struct headers *h,
				   const struct flow *flow, __u32 bytes, bool ip4)
{
	__u32 id = flow->rule;
	bool rare = is_rare(flow), own;
	struct rule_stats *stats;
	int verdict;

	/* The stack refuses a truncated packet, and ignores one for another host's
	 * MAC.
	 */
	if (__builtin_expect((__u64)h->l3_offset + h->l3_len > bytes, 0)) {
		if (flow->path != PATH_FANOUT)
			count_note(id, NOTE_MALFORMED, 1, bytes);
		return NOT_OURS;
	}
	if (__builtin_expect(rare, 0) && is_odd(flow)) {
		if (flow->flags & FLOW_UNICAST && !same_mac(h->eth->h_dest, flow->input_mac))
			return NOT_OURS;
		/* The kernel removes a priority tag. */
		if (flow->routed && (h->l3_offset != ETH_HLEN ||
				     (ip4 ? kernel_routes4(ctx, flow, h->l3_len, bytes)
					  : kernel_routes6(ctx, flow, h->l3_len, bytes))))
			return NOT_OURS;
	}
	if (__builtin_expect(h->part != PART_WHOLE, 0)) {
		remember_fragment(ifindex, h, ip4);
		if (flow->path != PATH_FANOUT) {
			count_fragment(h->udp ? FRAGMENT_FIRST : FRAGMENT_LATER, bytes);
			if (h->udp)
				claim_orphans(ifindex, h, id, ip4);
		}
	}
	/* Of a routed flow kernel_routes has looked. */
	own = !(rare && flow->routed) && own_packet(h, flow, ip4);
	/* The workers at the packet tap do and count everything below. */
	if (__builtin_expect(rare, 0) && flow->path == PATH_FANOUT) {
		if (!own && !(flow->flags & (FLOW_UNGUARDED | FLOW_LOCAL)) &&
		    guard_tapped(ctx, id, guard_place(h, ip4, flow), h->fragment_id, bytes))
			return XDP_DROP;
		if (flow->stream && !tapped_leg_passes(ctx, ifindex, h, flow, bytes, ip4))
			return XDP_DROP;
		return flow->flags & FLOW_STEERED ? steer(ifindex, h, ip4) : XDP_PASS;
	}
	stats = count_match(id, bytes);
	if (!stats)
		return count_drop(DROP_UNKNOWN, 0, DROP_INTERNAL, bytes);
	if (own)
		return count_drop(DROP_RULE, id, DROP_LOOP, bytes);
	if (__builtin_expect(guard_looks(stats), 0) && !(flow->flags & FLOW_UNGUARDED) &&
	    guard_returned(ctx, id, guard_place(h, ip4, flow), h->fragment_id, stats->last_seen_ns))
		return count_drop(DROP_RULE, id, DROP_LOOPING, bytes);
	if (!ip4 && h->udp && !h->udp->check && !(flow->flags & FLOW_NO_CHECKSUM))
		return count_drop(DROP_RULE, id, DROP_NO_CHECKSUM, bytes);
	if (__builtin_expect(rare, 0) && flow->stream &&
	    !leg_passes(ctx, ifindex, h, flow, stats, bytes, stats->last_seen_ns, ip4))
		return XDP_DROP;
	if (__builtin_expect(rare, 0) && is_odd(flow)) {
		if (flow->flags & FLOW_POLICED && !conforms(id, bytes))
			return count_drop(DROP_RULE, id, DROP_POLICED, bytes);
		if (flow->path != PATH_KERNEL && to_socket(ctx, h, flow, bytes, stats, &verdict))
			return verdict;
		if (flow->flags & FLOW_FINISH && h->part == PART_WHOLE &&
		    finish_checksum(ctx, h->l3_offset, udp_offset(h)))
			count_note(id, NOTE_UNFINISHED, 1, bytes);
		if (flow->routed && flow->outputs == 1)
			return route_one(ctx, flow, stats, bytes);
	}
	if (flow->outputs > 1)
		return send_many(ctx, h, flow, bytes, stats->packets);
	return send_one(ctx, h, flow, stats, bytes, ip4);
}

/* For tests: a rule's tick need not have begun. */
const volatile bool plain_test_any_tick = false;

/* The counters of a rule on this CPU; NULL for the first packets of each tick, which begin it, and
 * which the loop guard inspects.
 */
static __always_inline struct rule_stats *steady_stats(const struct flow *flow)
{
	__u32 id = flow->rule;
	struct rule_stats *stats = bpf_map_lookup_elem(&rule_stats, &id);

	if (!stats || (stats->tick != bpf_jiffies64() && !plain_test_any_tick) ||
	    stats->packets < stats->look_until)
		return NULL;
	return stats;
}

/* A plain packet of another host, of a slot that is SHORTCUT_PREPARED; or NOT_PLAIN. */
static __always_inline int send_prepared(struct headers *h, const struct shortcut *s, __u32 bytes)
{
	const struct output *o = slot_output(s);
	__u32 ttl = prepared_ttl(s, h);
	struct rule_stats *stats;

	if (frame_size(h->l3_offset, bytes) > o->mtu || ttl - 1 > 254)
		return NOT_PLAIN;
	stats = steady_stats(&s->flow);
	if (!stats)
		return NOT_PLAIN;
	stats->packets++;
	stats->bytes += bytes;
	rewrite_prepared(h, s, ttl);
	return redirect_one(&s->flow, o, stats, bytes);
}

/* A plain packet of a leg, for its rule's counters; XDP_PASS if it continues. */
static __always_inline int plain_leg(struct xdp_md *ctx, struct headers *h,
				     const struct shortcut *s, struct rule_stats *stats,
				     __u32 bytes)
{
	__u32 v = plain_next(ctx, &s->flow, h->eth, sizeof(*h->eth) + sizeof(*h->ip4), stats);

	if (__builtin_expect(v == STREAM_VERDICTS, 0))
		return NOT_PLAIN;
	stats->packets++;
	stats->bytes += bytes;
	if (v == STREAM_PASSED)
		return XDP_PASS;
	stats->copies_packets++;
	stats->copies_bytes += bytes;
	return XDP_DROP;
}

/* The same as send_prepared for a slot that is SHORTCUT_LEG. */
static __always_inline int send_leg(struct xdp_md *ctx, struct headers *h, const struct shortcut *s,
				    __u32 bytes)
{
	const struct output *o = slot_output(s);
	struct rule_stats *stats;
	int verdict;

	if (frame_size(h->l3_offset, bytes) > o->mtu || prepared_ttl(s, h) - 1 > 254)
		return NOT_PLAIN;
	stats = steady_stats(&s->flow);
	if (!stats)
		return NOT_PLAIN;
	verdict = plain_leg(ctx, h, s, stats, bytes);
	if (verdict != XDP_PASS)
		return verdict;
	OPAQUE(s); /* the TTL once more, rather than in a register until here */
	rewrite_prepared(h, s, prepared_ttl(s, h));
	return redirect_one(&s->flow, slot_output(s), stats, bytes);
}

/* The short way of most packets: plain ones, of rules and outputs with nothing rare, found by their
 * shortcut; and those of merged streams that plain_next judges. Returns NOT_PLAIN for all others,
 * before it has counted or changed anything: relay_packet then begins anew. So it only saves
 * instructions.
 */
static __always_inline int plain_packet(struct xdp_md *ctx, __u32 ifindex, void *data,
					void *data_end, __u32 bytes)
{
	struct headers h; /* in registers: no function that is called gets its address */
	const struct output *o;
	struct rule_stats *stats;
	struct shortcut *s;
	__u32 reason;
	int verdict;

	if (!parse_plain(data, data_end, bytes, &h))
		return NOT_PLAIN;
	s = find_slot(ifindex, &h, bpf_ntohs(h.udp->dest), true);
	if (!s)
		return NOT_PLAIN;
	if (s->has_output == SHORTCUT_PREPARED && __builtin_expect(!maybe_own4(&h, &s->flow), 1))
		return send_prepared(&h, s, bytes);
	if (s->has_output == SHORTCUT_LEG && __builtin_expect(!maybe_own4(&h, &s->flow), 1))
		return send_leg(ctx, &h, s, bytes);
	/* Found again, so that the compiler keeps no pointers for this in the above. */
	OPAQUE(data);
	h.eth = data;
	h.ip4 = data + sizeof(*h.eth);
	h.udp = (void *)(h.ip4 + 1);
	h.l3_len = bpf_ntohs(h.ip4->tot_len);
	if (is_odd(&s->flow) || (!s->has_output && s->flow.outputs == 1))
		return NOT_PLAIN;
	o = slot_output(s);
	if (s->has_output && frame_size(h.l3_offset, bytes) > o->mtu)
		return NOT_PLAIN;
	if (own_packet(&h, &s->flow, true))
		return NOT_PLAIN;
	stats = steady_stats(&s->flow);
	if (!stats)
		return NOT_PLAIN;
	if (s->flow.stream) {
		verdict = plain_leg(ctx, &h, s, stats, bytes);
		if (verdict != XDP_PASS)
			return verdict;
	} else {
		stats->packets++;
		stats->bytes += bytes;
	}
	if (!s->has_output) {
		OPAQUE(ctx);
		return send_many(ctx, &h, &s->flow, bytes, stats->packets);
	}
	reason = rewrite_ip4(&h, o, true, false);
	if (reason != REWRITTEN)
		return count_drop(DROP_OUTPUT, o->stats, reason, bytes);
	return redirect_one(&s->flow, o, stats, bytes);
}

/* The rule of a packet. */
static __always_inline struct flow *lookup(struct xdp_md *ctx, __u32 ifindex, struct headers *h,
					   __u32 bytes, bool ip4)
{
	__u16 port;

	if (__builtin_expect(!h->udp, 0)) {
		port = fragment_port(ifindex, h, ip4);
		if (!port) {
			orphan(ifindex, h, bytes, ip4);
			return NULL;
		}
	} else {
		port = bpf_ntohs(h->udp->dest);
	}
	return ip4 ? lookup4(ifindex, h, port) : lookup6(ifindex, h, port);
}

/* Incomplete or non-UDP packets go to the stack; queries are counted. Marked as unlikely, so that
 * the compiler keeps it off the fast path.
 */
static __always_inline int not_udp(struct xdp_md *ctx)
{
	count_query(ctx);
	return NOT_OURS;
}

static __always_inline bool is_broadcast(const struct ethhdr *eth)
{
	const __u16 *to = (const __u16 *)eth->h_dest;

	return (to[0] & to[1] & to[2]) == 0xffff;
}

static __always_inline int relay_packet(struct xdp_md *ctx, __u32 bytes)
{
	void *data_end = (void *)(long)ctx->data_end;
	void *data = (void *)(long)ctx->data;
	struct headers h;
	struct flow *flow;
	/* Once: an address inside the context must not be kept. */
	__u32 ifindex = ctx->ingress_ifindex;
	__be16 proto;
	int verdict;

	verdict = plain_packet(ctx, ifindex, data, data_end, bytes);
	if (__builtin_expect(verdict != NOT_PLAIN, 1))
		return verdict;
	/* All anew, so that the compiler keeps no registers for it in the above, and the verifier
	 * no ranges.
	 */
	OPAQUE(ctx);
	bytes = bpf_xdp_get_buff_len(ctx) & MALFORMED;
	data_end = (void *)(long)ctx->data_end;
	data = (void *)(long)ctx->data;
	ifindex = ctx->ingress_ifindex;
	proto = parse_eth(data, data_end, &h);
	if (proto == bpf_htons(ETH_P_IP)) {
		if (__builtin_expect(!parse_ip4(data_end, &h), 0))
			return not_udp(ctx);
		flow = lookup(ctx, ifindex, &h, bytes, true);
		if (flow)
			return forward(ctx, ifindex, &h, flow, bytes, true);
		if (__builtin_expect(is_broadcast(h.eth), 0))
			count_broadcast(ctx);
		return NOT_OURS;
	}
	if (proto == bpf_htons(ETH_P_IPV6)) {
		if (__builtin_expect(!parse_ip6(data_end, &h), 0))
			return not_udp(ctx);
		flow = lookup(ctx, ifindex, &h, bytes, false);
		return flow ? forward(ctx, ifindex, &h, flow, bytes, false) : NOT_OURS;
	}
	return NOT_OURS;
}

SEC("xdp.frags")
int relay(struct xdp_md *ctx)
{
	/* First, while nothing else is in registers. Masked, so that the verifier knows that a
	 * packet of MALFORMED bytes is longer.
	 */
	__u32 bytes = bpf_xdp_get_buff_len(ctx) & MALFORMED;
	int verdict = relay_packet(ctx, bytes);
	struct counter *c;

	if (verdict != NOT_OURS)
		return verdict;
	c = bpf_map_lookup_elem(&passed, &zero); /* PASSED_ALL */
	if (c)
		count(c, bytes);
	return XDP_PASS;
}

char _license[] SEC("license") = "Dual BSD/GPL";
