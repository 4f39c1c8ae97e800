/* SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0-only) */
/* The loop guard: detects and drops packets that this host has sent and that come back to it
 * through other relays, reflectors or switches. docs/decisions/0017-loop-guard.md has the
 * reasons; pkg/packet/guard.go is the twin in Go.
 *
 * No rewriting changes the payload, so its signature identifies a packet that was relayed
 * before, whatever its addresses, ports and tags are now. Packets with a repeated payload leave
 * with a mark in a field without meaning there: the IPv4 identification, or the IPv6 flow label.
 * Several different marks that come back prove a loop. No number of senders, and no repetition,
 * does.
 *
 * Rules with an intended loop (FLOW_TWO_WAY) are also cut by likelihood: a return has another
 * sender than the first packet (source MAC and address), and each relayed packet comes back, so
 * returns outnumber the packets of the first sender. In other rules such packets are noted, and
 * relayed.
 *
 * Most packets of a fast rule are not inspected: the first of each tick are, and all while the
 * rule's rate multiplies, as it does in a loop.
 */
#pragma once

#include "maps.h"
#include "parse.h"

/* Packets of a rule that are inspected in each tick of the kernel (1 to 10 ms), on each CPU. Tests
 * set it at load.
 */
const volatile __u32 guard_budget = 64;

/* Makes this host's marks unique. Set at load. */
const volatile __u32 guard_secret = 0;

/* Ticks for which every packet is inspected when the rate multiplies. */
const volatile __u32 guard_watch = 64;

/* How long a payload is remembered after it was relayed, in 2^20 ns: slower loops are not
 * found.
 */
const volatile __u32 guard_window = 512;

/* A sender within this time (2^20 ns) of the first packet, and within GUARD_EARLY packets, may have
 * been first.
 */
const volatile __u32 guard_race = 512;

#define GUARD_RETURNS 6 /* so many packets of another sender are returns ... */
#define GUARD_EARLY 32
#define GUARD_MOST 0xffff
#define GUARD_RATIO 4	    /* ... if they are this many times those of the first */
#define GUARD_STEPS 4	    /* marks of a content, one after the other; a power of two */
#define GUARD_STRIDE 0x4040 /* between them: no sender that counts meets two soon */
#define GUARD_PROOF 0xe880  /* a bit for each value of steps with three bits or four: a loop ... */
#define GUARD_NEAR 16	    /* ... if there were no more packets between two */
#define GUARD_ASKS 2	/* so many packets of a further sender, and one more of the first: mark */
#define GUARD_ALONE 8	/* so many of the only one, with FLOW_TWO_WAY */
#define GUARD_FOREIGN 8 /* so many with another relay's marks, and none of it cut: mark anew */
#define GUARD_SELF 32	/* so many more than were sent: the sender sends by itself */

#define GUARD_SOON 64	/* 2^20 ns: a loop's returns mostly come within so long */
#define GUARD_FRESH 64	/* 2^20 ns: a content that came twice keeps its slot */
#define GUARD_LATE 256	/* 2^20 ns: no return takes so long ... */
#define GUARD_ORPHANS 4 /* ... and so many that do are sent by themselves */

#define GUARD_TAIL_MASK 0x7fff

#define GUARD_HEAL_NS 10000000000ULL   /* a loop is over when nothing came back for so long */
#define GUARD_MEMORY_NS 60000000000ULL /* its way is remembered for so long */

#define GUARD_PROBE_NS 2000000000ULL /* how often a packet is let pass, to see whether ... */
#define GUARD_BACK_NS 512000000ULL   /* ... it comes back within so long */

/* Multipliers of SplitMix64 (Steele, Lea, Flood 2014). */
#define GUARD_K1 0xbf58476d1ce4e5b9ULL
#define GUARD_K2 0x94d049bb133111ebULL

/* A packet as seen by the guard. */
struct guard_packet {
	__u64 now_ns;
	__u32 signature;
	__u32 sender; /* of guard_sender */
	__u32 rule;
	__u32 ifindex;
	__u8 mac[6];
	__u16 port; /* source port, as in the packet; 0 in later fragments */
	__u8 source[16];
	__u16 mark;	 /* where a mark would be, as in the packet */
	__u16 can_bear;	 /* 1: the packet is whole and can be marked */
	__u8 outputs;	 /* of the rule */
	__u8 by_numbers; /* 1: the numbers of senders tell a loop, too */
	__u16 sum;	 /* of guard_sum; 0 without a checksum */
};

/* What guard_slot says of a packet: to be relayed, dropped, or marked and relayed. */
enum guard_verdict {
	GUARD_PASS,
	GUARD_CUT,
	GUARD_MARK,	/* the mark is above */
	GUARD_ECHO = 4, /* relayed, and likely a return */
};

#define GUARD_MARK_SHIFT 8

/* A tick of the clock has passed for a rule on this CPU. Global, so that it is verified
 * once.
 */
__noinline int guard_tick(struct rule_stats *stats, __u32 rule, __u64 tick)
{
	__u64 packets;
	__u32 n;

	if (!stats)
		return 0;
	packets = stats->packets - stats->tick_packets;
	n = packets > 1 << 28 ? 1 << 28 : packets;
	stats->tick_packets = stats->packets;
	if (n > 2 * stats->pace + guard_budget || bpf_map_lookup_elem(&loops, &rule))
		stats->watched = guard_watch;
	else if (stats->watched)
		stats->watched--;
	stats->pace = n > stats->pace ? n : stats->pace - (stats->pace >> 8);
	stats->tick = tick;
	stats->last_seen_ns = bpf_ktime_get_coarse_ns();
	stats->look_until = stats->watched ? ~0ULL : stats->packets + guard_budget;
	return 0;
}

/* Whether to inspect this packet. */
static __always_inline bool guard_looks(const struct rule_stats *stats)
{
	return stats->packets <= stats->look_until;
}

static __always_inline __u32 guard_hash(__u64 a, __u64 b)
{
	return (a * GUARD_K1 + b * GUARD_K2) >> 32;
}

/* Identifies the sender of a packet: its MAC and address, hashed. Never 0. */
static __always_inline __u32 guard_sender(const struct headers *h, bool ip4)
{
	const __u16 *mac = (const __u16 *)h->eth->h_source;
	__u64 low = (__u32)mac[2] << 16 | mac[1], source;

	if (ip4) {
		source = h->ip4->saddr;
	} else {
		const struct in6_addr *a = &h->ip6->saddr;

		source = ((__u64)a->in6_u.u6_addr32[0] << 32 | a->in6_u.u6_addr32[1]) ^
			 ((__u64)a->in6_u.u6_addr32[2] << 32 | a->in6_u.u6_addr32[3]) * GUARD_K2;
	}
	return guard_hash(source, low << 16 | mac[0]) | 1;
}

/* The sum of the payload: the UDP checksum without the addresses and ports, which relays change
 * (RFC 768; RFC 1624 for the arithmetic).
 */
static __always_inline __u16 guard_sum(const struct headers *h, bool ip4)
{
	const __u32 *ports = (const __u32 *)h->udp;
	__u64 sum = (__u16)~h->udp->check;

	sum += (__u32) ~*ports;
	if (ip4) {
		sum += (__u32)~h->ip4->saddr;
		sum += (__u32)~h->ip4->daddr;
	} else {
		int i;

#pragma unroll
		for (i = 0; i < 4; i++) {
			sum += (__u32)~h->ip6->saddr.in6_u.u6_addr32[i];
			sum += (__u32)~h->ip6->daddr.in6_u.u6_addr32[i];
		}
	}
	sum = (sum & 0xffff) + ((sum >> 16) & 0xffff) + (sum >> 32);
	sum = (sum & 0xffff) + (sum >> 16);
	return (sum & 0xffff) + (sum >> 16);
}

/* The signature of a datagram: of its length, its first 16 bytes and its last 8. */
static __noinline __u32 guard_signature(const struct udphdr *udp, const void *data_end)
{
	const __u32 *payload = (const void *)(udp + 1);
	__u32 len = bpf_ntohs(udp->len), i;
	const void *tail;
	__u64 hash = len;

#pragma unroll
	for (i = 1; i <= 4; i++) {
		if (len < sizeof(*udp) + 4 * i || (const void *)(payload + i) > data_end)
			break;
		hash = (hash ^ payload[i - 1]) * GUARD_K1;
		hash ^= hash >> 32;
	}
	/* The verifier tracks packet pointers for 64 kB. */
	tail = (const void *)udp + ((len - 8) & GUARD_TAIL_MASK);
	if (len < 2 * sizeof(*udp) || len - 8 > GUARD_TAIL_MASK || tail + 8 > data_end) {
		const __u8 *end = (const void *)udp + ((len - 3) & GUARD_TAIL_MASK);

		if (len < sizeof(*udp) + 3 || len - 3 > GUARD_TAIL_MASK ||
		    (const void *)(end + 3) > data_end)
			return guard_hash(hash, 1);
		return guard_hash(hash, (__u32)end[0] << 16 | end[1] << 8 | end[2]);
	}
	hash = (hash ^ ((const __u32 *)tail)[0]) * GUARD_K1;
	hash ^= hash >> 32;
	return guard_hash(hash, ((const __u32 *)tail)[1]);
}

/* A later fragment has no UDP header. Routers and relays keep its identification and length, and
 * its offset in IPv4; in IPv6 its last bytes are used instead.
 */
static __always_inline __u32 guard_fragment(const struct headers *h, const void *data_end, bool ip4)
{
	__u64 whole = (__u64)h->fragment_id << 32 | h->l3_len;
	const void *tail;

	if (ip4)
		return guard_hash(whole, h->ip4->frag_off);
	tail = h->l3 + ((h->l3_len - 8) & GUARD_TAIL_MASK);
	if (h->l3_len - 8 > GUARD_TAIL_MASK || tail + 8 > data_end)
		return guard_hash(whole, 1);
	return guard_hash(whole, *(const __u32 *)tail ^ *(const __u32 *)(tail + 4) * GUARD_K2);
}

/* Whether a packet's payload is that of a slot. Relays may drop the checksum. */
static __always_inline bool guard_same(const struct guard_slot *slot, const struct guard_packet *p)
{
	return slot->signature == p->signature && (slot->sum == p->sum || !slot->sum || !p->sum);
}

/* The loop path of a sender back to a rule; NULL if none is known. */
static __always_inline struct guard_way *guard_way_of(struct loop *loop, __u32 sender)
{
	int i;

#pragma unroll
	for (i = 0; i < GUARD_WAYS; i++)
		if (loop->ways[i].last_ns && loop->ways[i].sender == sender)
			return &loop->ways[i];
	return NULL;
}

/* The entry for a new loop path: a free one, or the least recently used. */
static __always_inline struct guard_way *guard_oldest_way(struct loop *loop)
{
	struct guard_way *oldest = &loop->ways[0];
	int i;

#pragma unroll
	for (i = 1; i < GUARD_WAYS; i++)
		if (loop->ways[i].last_ns < oldest->last_ns)
			oldest = &loop->ways[i];
	return oldest;
}

/* The index of a sender and its port among the others of a slot: its own, or a replacement: the
 * entry with the fewest packets, early senders last. Global, so that it is verified once.
 */
__noinline int guard_other_of(struct guard_slot *slot, __u32 sender, __u32 seen)
{
	__u32 i, at = 0, fewest = ~0U;

	if (!slot)
		return 0;
#pragma unroll
	for (i = 0; i < GUARD_OTHERS; i++) {
		__u32 packets = slot->others[i].packets | (slot->early >> i & 1) << 31;

		if (slot->others[i].sender == sender)
			return i;
		if (packets < fewest) {
			fewest = packets;
			at = i;
		}
	}
	at &= 7;
	if (at >= GUARD_OTHERS)
		return 0;
	slot->others[at].sender = sender;
	slot->others[at].packets = 0;
	slot->others[at].soon = 0;
	slot->early &= ~(1U << at);
	if (seen - slot->born <= guard_race && slot->arrivals <= GUARD_EARLY)
		slot->early |= 1U << at;
	return at;
}

/* The lowest packet count of a sender that may have been first, ignoring the one at index not.
 * Global, so that it is verified once.
 */
__noinline int guard_fewest(const struct guard_slot *slot, __u32 fewest, __u32 not )
{
	__u32 i;

	if (!slot)
		return fewest;
#pragma unroll
	for (i = 0; i < GUARD_OTHERS; i++)
		if (slot->early >> i & 1 && i != not &&slot->others[i].packets < fewest)
			fewest = slot->others[i].packets;
	return fewest;
}

/* Drops a packet that came back on a known loop path. */
static __always_inline void guard_cut(struct loop *loop, struct guard_way *way,
				      struct guard_slot *slot, const struct guard_packet *p)
{
	if (!loop->since_ns || p->now_ns - loop->last_ns > GUARD_HEAL_NS)
		loop->since_ns = p->now_ns;
	loop->last_ns = p->now_ns;
	way->last_ns = p->now_ns;
	way->ifindex = p->ifindex;
	way->from = slot->rule;
	__sync_fetch_and_add(&way->packets, 1);
	slot->cut++;
}

static const struct loop guard_no_loop;

/* Records a loop path. */
static __noinline void guard_found(struct guard_slot *slot, const struct guard_packet *p)
{
	__u32 rule = p->rule;
	struct loop *loop = bpf_map_lookup_elem(&loops, &rule);
	struct guard_way *way;

	if (!loop) {
		bpf_map_update_elem(&loops, &rule, &guard_no_loop, BPF_NOEXIST);
		loop = bpf_map_lookup_elem(&loops, &rule);
		if (!loop)
			return;
	}
	way = guard_oldest_way(loop);
	way->sender = p->sender;
	way->first_ns = p->now_ns;
	way->forgiven_ns = 0;
	way->packets = 0;
	way->probe_ns = p->now_ns;
	way->probe = 0;
	way->orphans = 0;
	__builtin_memcpy(way->mac, p->mac, sizeof(way->mac));
	__builtin_memcpy(way->source, p->source, sizeof(way->source));
	guard_cut(loop, way, slot, p);
}

/* Whether a loop path was recently found to be none. */
static __always_inline bool guard_forgiven(const struct guard_way *way, __u64 now)
{
	return way && way->forgiven_ns && now - way->forgiven_ns < GUARD_MEMORY_NS;
}

/* The verdict on a packet on a known loop path: usually GUARD_CUT. Occasionally one passes as a
 * probe (GUARD_PASS), and if it does not come back the path is forgotten. So is one on which more
 * packets come than were sent. GUARD_MARK: the path is not, or no longer, known.
 */
static __always_inline __u32 guard_known(struct loop *loop, struct guard_way *way,
					 struct guard_slot *slot, const struct guard_packet *p)
{
	__u32 seen = p->now_ns >> 20;

	if (!way || p->now_ns - way->last_ns >= GUARD_MEMORY_NS || guard_forgiven(way, p->now_ns))
		return GUARD_MARK;
	way->orphans = seen - slot->seen > GUARD_LATE ? way->orphans + 1 : 0;
	if (way->orphans >= GUARD_ORPHANS ||
	    slot->cut > GUARD_SELF + GUARD_RATIO * p->outputs * (slot->arrivals + 1)) {
		way->forgiven_ns = p->now_ns;
		way->orphans = 0;
		return GUARD_MARK;
	}
	if (way->probe && p->now_ns - way->probe_ns > GUARD_BACK_NS) {
		way->probe = 0;
		way->last_ns = 0;
		return GUARD_MARK;
	}
	if (way->probe == p->signature) {
		way->probe = 0;
	} else if (!way->probe && p->now_ns - way->probe_ns > GUARD_PROBE_NS) {
		way->probe = p->signature;
		way->probe_ns = p->now_ns;
		slot->seen = seen;
		slot->rule = p->rule;
		slot->arrivals++;
		return GUARD_PASS;
	}
	guard_cut(loop, way, slot, p);
	return GUARD_CUT;
}

/* The mark of a payload for a step: the next step is for a packet that came back with this one. */
static __always_inline __u16 guard_mark(__u32 signature, __u32 step)
{
	return guard_hash(signature, guard_secret) + (step & (GUARD_STEPS - 1)) * GUARD_STRIDE;
}

/* Which of this host's marks a packet carries; GUARD_STEPS: none, or the payload was not marked
 * recently.
 */
static __always_inline __u32 guard_step(const struct guard_slot *slot, const struct guard_packet *p)
{
	__u32 i, step = GUARD_STEPS;

	if (!p->can_bear || !slot->is_marked ||
	    (__u32)(p->now_ns >> 20) - slot->marked_at > guard_window)
		return GUARD_STEPS;
#pragma unroll
	for (i = 0; i < GUARD_STEPS; i++)
		if (guard_mark(p->signature, i) == p->mark)
			step = i;
	return forget(step);
}

/* A packet came back with a mark. Returns whether that proves a loop. */
static __always_inline bool guard_back(struct guard_slot *slot, __u32 step)
{
	if (slot->arrivals - slot->marked > GUARD_NEAR)
		slot->steps = 0;
	slot->steps |= 1 << (step & (GUARD_STEPS - 1));
	slot->marked = slot->arrivals;
	slot->foreign = 0;
	return GUARD_PROOF >> (slot->steps & 0xf) & 1;
}

/* Whether a payload has repeated often enough to be marked: from, and the 63 packets after it, the
 * 256th to the 319th, the 2048th to the 2111th.
 */
static __always_inline bool guard_asks(__u32 packets, __u32 from)
{
	return packets - from < 64 || packets - 256 < 64 || packets - 2048 < 64;
}

/* The packet's payload is in the slot: returns whether the packet is a return, to be dropped.
 *
 * A packet with a mark of this host has looped, and leaves with the next mark. A mark of another
 * relay, recognised because it differs from the first packet's value, is left for that relay to
 * find.
 */
static __noinline __u32 guard_again(struct guard_slot *slot, const struct guard_packet *p)
{
	__u32 rule = p->rule, seen = p->now_ns >> 20, packets, fewest, at, known;
	__u32 returns = GUARD_RETURNS, ratio = GUARD_RATIO, soon;
	struct loop *loop = bpf_map_lookup_elem(&loops, &rule);
	struct guard_way *way = NULL;
	__u32 step = guard_step(slot, p), next = 0;
	bool many, found, asks;

	if (loop) {
		way = guard_way_of(loop, p->sender);
		known = guard_known(loop, way, slot, p);
		if (known != GUARD_MARK)
			return known;
	}
	slot->arrivals++;
	if (!slot->sum)
		slot->sum = p->sum;
	soon = seen - slot->seen <= GUARD_SOON;
	if (p->sender == slot->sender) {
		if (p->port == slot->port) {
			slot->packets++;
			slot->soon += soon;
		}
		packets = slot->packets;
		soon = slot->soon;
		fewest = guard_fewest(slot, packets, GUARD_OTHERS);
		asks = slot->others[0].sender ? guard_asks(soon, GUARD_ASKS + 1)
					      : p->by_numbers && guard_asks(packets, GUARD_ALONE);
	} else {
		struct guard_other *o;

		/* By rule, unless counts matter: one packet each to several rules is no return. */
		at = guard_other_of(
			slot,
			guard_hash(p->sender,
				   (p->by_numbers ? 0 : (__u64)p->rule << 16) | p->port) |
				1,
			seen);
		if (at >= GUARD_OTHERS)
			return GUARD_PASS;
		o = &slot->others[at];
		if (o->packets < GUARD_MOST) {
			o->packets++;
			o->soon += soon;
		}
		packets = o->packets;
		soon = o->soon;
		fewest = guard_fewest(slot, slot->packets, at);
		asks = guard_asks(packets, GUARD_ASKS);
		/* Once a rule loops, other paths need fewer returns. */
		if (slot->cut || (loop && p->now_ns - loop->last_ns < GUARD_HEAL_NS)) {
			returns = 2;
			ratio = 1;
		}
	}
	many = soon >= returns && soon > ratio * fewest;
	found = many && p->by_numbers;
	if (step < GUARD_STEPS) {
		found = guard_back(slot, step) || found;
		asks = true;
		next = step + 1;
	} else if (p->mark != slot->id && slot->foreign < GUARD_FOREIGN) {
		slot->foreign++;
		asks = false;
	} else if (asks) {
		slot->foreign = 0;
	}
	if (found && !guard_forgiven(way, p->now_ns)) {
		guard_found(slot, p);
		return GUARD_CUT;
	}
	slot->seen = seen;
	slot->rule = p->rule;
	if (!asks || !p->can_bear)
		return many && !p->by_numbers ? GUARD_ECHO : GUARD_PASS;
	slot->is_marked = 1;
	slot->marked_at = seen;
	return (__u32)guard_mark(p->signature, next) << GUARD_MARK_SHIFT | GUARD_MARK;
}

/* Whether a payload keeps repeating, or has just repeated. */
static __always_inline bool guard_counts(const struct guard_slot *slot, __u32 seen)
{
	__u32 age = seen - slot->seen;

	return (slot->arrivals > 1 && age <= guard_window) ||
	       (slot->arrivals && age <= GUARD_FRESH);
}

/* Remembers a packet, unless its payload is in the slot: then it returns whether the packet is a
 * return, to be dropped. Global, so that it is verified once.
 */
__noinline int guard_slot(const struct guard_packet *p)
{
	struct guard_slot *slot;
	__u32 at, seen;

	if (!p)
		return GUARD_PASS;
	at = p->signature & (GUARD_SLOTS - 1);
	seen = p->now_ns >> 20;
	slot = bpf_map_lookup_elem(&guard_slots, &at);
	if (!slot)
		return GUARD_PASS;
	/* Another payload must not displace one being counted: it gets the next slot. */
	if (!guard_same(slot, p) && guard_counts(slot, seen)) {
		at ^= 1;
		slot = bpf_map_lookup_elem(&guard_slots, &at);
		if (!slot)
			return GUARD_PASS;
	}
	if (seen - slot->seen <= guard_window && guard_same(slot, p))
		return guard_again(slot, p);
	if (guard_counts(slot, seen))
		return GUARD_PASS;
	__builtin_memset(slot, 0, sizeof(*slot));
	slot->signature = p->signature;
	slot->seen = seen;
	slot->rule = p->rule;
	slot->sender = p->sender;
	slot->packets = 1;
	slot->born = seen;
	slot->port = p->port;
	slot->sum = p->sum;
	slot->id = p->mark;
	return GUARD_PASS;
}

#define GUARD_TWO_WAY 0x80
#define GUARD_PART 0x40 /* it is a fragment */

/* The positions of a packet's headers, and its outputs: the offset of IP, of UDP (0: a later
 * fragment), the family with the flags above, and the number of outputs, one byte each.
 */
static __always_inline __u32 guard_place(const struct headers *h, bool ip4, const struct flow *flow)
{
	__u32 flags = (flow->flags & FLOW_TWO_WAY ? GUARD_TWO_WAY : 0) |
		      (h->part == PART_WHOLE ? 0 : GUARD_PART);

	return h->l3_offset | udp_offset(h) << 8 | (flags | (ip4 ? 4 : 6)) << 16 |
	       flow->outputs << 24;
}

/* Defined in account.h. */
__noinline int count_rare(__u32 scope, __u32 id, __u32 reason, __u32 packets, __u32 bytes);

/* Returns whether a packet left this host before and came back on a loop path; otherwise it
 * remembers the packet, and notes it if it likely did. Global, so that it is verified once, and not
 * for each path to here; the bounds are for the verifier, the packet is already parsed.
 */
__noinline int guard_returned(struct xdp_md *ctx, __u32 rule, __u32 place, __u32 fragment_id,
			      __u64 now)
{
	void *data_end = (void *)(long)ctx->data_end;
	void *data = (void *)(long)ctx->data;
	struct guard_packet p = {.now_ns = now, .rule = rule, .ifindex = ctx->ingress_ifindex};
	struct headers h = {.eth = data, .fragment_id = fragment_id};
	bool ip4 = (place >> 16 & 0x3f) == 4;
	__u32 verdict;

	if ((void *)(h.eth + 1) > data_end)
		return false;
	p.outputs = place >> 24;
	p.can_bear = !fragment_id && !(place >> 16 & GUARD_PART);
	/* No sender reuses a fragment's identification so soon (RFC 6864, RFC 8200): a repeat is as
	 * good as marks, which fragments cannot carry.
	 */
	p.by_numbers = place >> 16 & GUARD_TWO_WAY || !(place >> 8 & 0xff);
	h.l3 = data + (place & 0x1f);
	if (ip4) {
		if ((void *)(h.ip4 + 1) > data_end)
			return false;
		h.l3_len = bpf_ntohs(h.ip4->tot_len);
		p.mark = h.ip4->id;
		p.source[10] = p.source[11] = 0xff;
		*(__u32 *)(p.source + 12) = h.ip4->saddr;
		p.sender = guard_sender(&h, true);
	} else {
		if ((void *)(h.ip6 + 1) > data_end)
			return false;
		h.l3_len = sizeof(*h.ip6) + bpf_ntohs(h.ip6->payload_len);
		p.mark = ((__u16 *)h.ip6)[1]; /* the lower 16 bits of the flow label */
		*(struct in6_addr *)p.source = h.ip6->saddr;
		p.sender = guard_sender(&h, false);
	}
	__builtin_memcpy(p.mac, h.eth->h_source, sizeof(p.mac));
	if (place >> 8 & 0xff) {
		h.udp = data + (place >> 8 & 0xff);
		if ((void *)(h.udp + 1) > data_end)
			return false;
		p.port = h.udp->source;
		p.signature = guard_signature(h.udp, data_end);
		if (h.udp->check)
			p.sum = guard_sum(&h, ip4);
	} else {
		p.signature = guard_fragment(&h, data_end, ip4);
	}
	verdict = guard_slot(&p);
	if ((verdict & GUARD_MARK) && ip4) {
		__u64 sum = (__u16)~h.ip4->check + (__u16)~h.ip4->id;

		h.ip4->id = verdict >> GUARD_MARK_SHIFT;
		sum += h.ip4->id;
		sum = (sum & 0xffff) + (sum >> 16);
		h.ip4->check = ~((sum & 0xffff) + (sum >> 16));
	} else if (verdict & GUARD_MARK) {
		((__u16 *)h.ip6)[1] = verdict >> GUARD_MARK_SHIFT;
	}
	if (verdict == GUARD_ECHO)
		count_rare(DROP_NOTE, rule, NOTE_ECHO, 1, bpf_xdp_get_buff_len(ctx));
	return verdict == GUARD_CUT;
}
