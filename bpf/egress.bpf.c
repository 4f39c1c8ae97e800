//go:build ignore

// SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0-only)
/* The egress program: runs in the devmaps' rows, on each copy of a frame.
 *
 * The kernel collects the frames for a device and runs one program on all of them,
 * that of the first: rows must never hold different programs for one device. So
 * there is only one egress program, which finds a copy's output by itself: by the
 * interface it leaves by and, if a rule has several outputs on that interface, by
 * counting. The copies of one frame reach it successively, in the order of the rows,
 * on one CPU.
 */
#include "account.h"
#include "bulk.h"
#include "rewrite_rare.h"
#include "handover.h"
#include "maps.h"

/* Steps that halve XDPCAST_MAX_SLOTS to nothing. */
#define SEARCH_STEPS 7

/* The first of n copies, sorted by interface, that is not below the interface. */
static __noinline __u32 lower_bound(__u32 first, __u32 n, __u32 ifindex)
{
	__u32 low = 0, high = n;
	int i;

	for (i = 0; i < SEARCH_STEPS && low < high; i++) {
		__u32 middle = (low + high) / 2;
		__u32 index = first + middle;
		struct copy *c = bpf_map_lookup_elem(&copies, &index);

		if (!c)
			break;
		if (c->ifindex < ifindex)
			low = middle + 1;
		else
			high = middle;
	}
	return low;
}

static __always_inline bool is_first_on(const struct copy *copy, __u32 ifindex)
{
	return copy && copy->ifindex == ifindex && copy->same;
}

/* The first copy of the rule for the interface. The position where it last was is verified first,
 * and only if that fails a search is needed.
 */
static __always_inline struct copy *find_copy(const struct handover *from, __u32 ifindex,
					      __u32 *index)
{
	__u32 first = from->first_output, at = (first + ifindex) & (XDPCAST_GUESSES - 1);
	__u32 *guess = bpf_map_lookup_elem(&guesses, &at);
	struct copy *copy;

	if (guess) {
		*index = *guess;
		if (*index - first < from->outputs) {
			copy = bpf_map_lookup_elem(&copies, index);
			if (is_first_on(copy, ifindex))
				return copy;
		}
	}
	*index = first + lower_bound(first, from->outputs, ifindex);
	copy = bpf_map_lookup_elem(&copies, index);
	if (!is_first_on(copy, ifindex))
		return NULL;
	if (guess)
		*guess = *index;
	return copy;
}

/* The output of this copy; NULL if the maps contradict each other. */
static __always_inline struct output *find_output(const struct handover *from, __u32 ifindex)
{
	__u32 index;
	struct copy *copy = find_copy(from, ifindex, &index);

	if (!copy)
		return NULL;
	if (copy->same > 1) {
		struct turn *turn = bpf_map_lookup_elem(&turns, &index);
		__u16 same = copy->same;

		if (!turn)
			return NULL;
		if (turn->sequence != from->sequence) {
			turn->sequence = from->sequence;
			turn->next = 0;
		}
		if (turn->next >= same)
			return NULL;
		index += turn->next++;
		copy = bpf_map_lookup_elem(&copies, &index);
		if (!copy)
			return NULL;
	}
	index = from->first_output + copy->slot;
	return bpf_map_lookup_elem(&outputs, &index);
}

/* Rewrites a copy for its output. Returns REWRITTEN, or why it must be dropped. */
static __always_inline __u32 rewrite_copy(struct xdp_md *ctx, const struct handover *from,
					  const struct output *o, __u32 bytes)
{
	struct offsets at = {.l3 = from->l3_offset, .udp = from->udp_offset};
	struct headers h;

	if (bytes > (__u32)o->mtu + FRAME_ROOM)
		return DROP_MTU;
	if (o->flags & OUTPUT_ROUTED)
		return route_frame((void *)(long)ctx->data, (void *)(long)ctx->data_end, o)
			       ? REWRITTEN
			       : DROP_INTERNAL;
	if (__builtin_expect(o->flags & OUTPUT_RARE, 0))
		return rewrite_rare(ctx, o, at.l3, at.udp, bytes);
	if (!find_headers(ctx, &at, &h))
		return DROP_INTERNAL;
	return rewrite_headers(ctx, &h, o, false);
}

/* A copy ends here, and not at the device. */
static __always_inline int drop_copy(__u32 ifindex)
{
	__u32 key = 0;
	struct egress_drops *drops = bpf_map_lookup_elem(&egress_drops, &key);

	if (!drops)
		return XDP_DROP;
	if (drops->ifindex != ifindex) {
		drops->ifindex = ifindex;
		drops->packets = 0;
	}
	drops->packets++;
	return XDP_DROP;
}

SEC("xdp.frags/devmap")
int egress(struct xdp_md *ctx)
{
	void *data_end = (void *)(long)ctx->data_end;
	void *data = (void *)(long)ctx->data;
	__u32 bytes = data_end - data;
	struct handover from;
	struct output *o;
	__u32 ifindex, reason;

	if (data + sizeof(from) > data_end)
		return XDP_PASS;
	from = *(const struct handover *)data;
	if (from.mark != HANDOVER_MARK)
		return XDP_PASS; /* of a rule with one output: rewritten already */
	ifindex = ctx->egress_ifindex;
	o = find_output(&from, ifindex);
	if (!o) {
		count_drop(DROP_UNKNOWN, 0, DROP_INTERNAL, bytes);
		return drop_copy(ifindex);
	}
	if (!(o->flags & OUTPUT_READY)) {
		count_drop(DROP_OUTPUT, o->stats, o->blocked, bytes);
		return drop_copy(ifindex);
	}
	reason = rewrite_copy(ctx, &from, o, bytes);
	if (reason == DROP_MTU)
		return drop_copy(ifindex); /* counted by the relay program */
	if (reason != REWRITTEN) {
		count_drop(DROP_OUTPUT, o->stats, reason, bytes);
		return drop_copy(ifindex);
	}
	count_sent(o->stats, bytes);
	return XDP_PASS;
}

char _license[] SEC("license") = "Dual BSD/GPL";
