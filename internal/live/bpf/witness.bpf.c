//go:build ignore

// SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0-only)
/* The witness: keeps account of the numbers of each flow of the source, exactly: which
 * came, which came again, which came behind a higher one, and for how long none came.
 * Frames of the source end here; all others pass.
 *
 * The interface has one receive queue, so that no two CPUs run this at once.
 */
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_endian.h>

#include "tag.h"

/* Set at load. */
const volatile __u32 flows = 1;
const volatile __u32 stamp_shift = 0; /* of the source */
const volatile __u32 group = 0;	      /* destination of the frames; the machine's byte order */
const volatile __u16 port = 0;
const volatile __u32 legs = 0; /* all flows count as one: a number may come on any */

/* Set before a run. */
__u32 trial = 0;

/* Numbers of a flow that are kept, back from the highest. */
#define WINDOW_BITS 24
#define WINDOW (1 << WINDOW_BITS)
#define WORDS (WINDOW / 64)

/* What came of a flow. */
struct stream {
	__u64 packets;	 /* with numbers that had not come before */
	__u64 doubled;	 /* with numbers that had */
	__u64 reordered; /* of packets: behind a higher number */
	__u64 forgotten; /* too far behind to tell which of these they are */
	__u64 last;	 /* when the last one came, of bpf_ktime_get_ns() */
	__u64 longest;	 /* ns for which none came although one had been sent */
	__u32 highest;	 /* number */
	__u32 trial;	 /* to which all this belongs */
};

/* What is not as it should be, of all flows. */
struct wrong {
	__u64 checksum; /* of the IPv4 header, or UDP's */
	__u64 address;	/* not the destination of the frames, or no flow */
	__u64 stray;	/* of another trial */
};

/* streams: flow -> what came of it. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1); /* as many as there are flows; set at load */
	__type(key, __u32);
	__type(value, struct stream);
} streams SEC(".maps");

/* seen: flow * WORDS + a number's word -> a bit for each number that came. A number has the
 * bits of its value modulo WINDOW.
 */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, WORDS); /* times flows; set at load */
	__type(key, __u32);
	__type(value, __u64);
} seen SEC(".maps");

/* wrongs: one entry. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct wrong);
} wrongs SEC(".maps");

/* arrivals: a number of flow 0 -> when it came first, of bpf_ktime_get_ns(). */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1); /* as many as are wanted; set at load */
	__type(key, __u32);
	__type(value, __u64);
} arrivals SEC(".maps");

static __u64 *word_of(__u32 flow, __u32 seq)
{
	__u32 key = flow * WORDS + seq % WINDOW / 64;

	return bpf_map_lookup_elem(&seen, &key);
}

struct advance {
	__u32 flow;
	__u32 from; /* a number in the first word */
};

/* clear forgets the numbers in the words that a higher number is about to take. */
static long clear(__u32 i, void *ctx)
{
	struct advance *a = ctx;
	__u64 *word = word_of(a->flow, a->from + i * 64);

	if (word)
		*word = 0;
	return 0;
}

/* advance makes a number the highest. */
static void advance(struct stream *s, __u32 flow, __u32 seq, int first)
{
	struct advance a = {.flow = flow, .from = first ? 0 : s->highest / 64 * 64 + 64};
	__u32 words = first ? seq / 64 + 1 : seq / 64 - s->highest / 64;

	/* Of the words below the window only the bits modulo it matter. */
	if (words > WORDS) {
		a.from += (words - WORDS) * 64;
		words = WORDS;
	}
	bpf_loop(words, clear, &a, 0);
	s->highest = seq;
}

/* gap notes how long the flow stood still before a packet: since the last one, but not since
 * before this one was sent if it is the next.
 */
static void gap(struct stream *s, __u32 seq, __u32 stamp, __u64 now)
{
	__u64 still = now - s->last;
	__u64 under_way = (__u64)((__u32)(now >> stamp_shift) - stamp) << stamp_shift;

	if (seq == s->highest + 1 && under_way < still)
		still = under_way;
	if (still > s->longest)
		s->longest = still;
}

static void follow(struct stream *s, __u32 flow, const struct tag *tag)
{
	__u64 now = bpf_ktime_get_ns();
	__u32 seq = tag->seq;
	int first = s->trial != tag->trial;
	__u64 bit = 1ULL << seq % 64, *word, *at;

	if (first) {
		__builtin_memset(s, 0, sizeof(*s));
		s->trial = tag->trial;
		advance(s, flow, seq, 1);
	} else if (seq > s->highest) {
		gap(s, seq, tag->stamp, now);
		advance(s, flow, seq, 0);
	} else if (s->highest - seq > WINDOW - 64) {
		s->forgotten++;
		return;
	}
	s->last = now;
	word = word_of(flow, seq);
	if (!word)
		return;
	if (*word & bit) {
		s->doubled++;
		return;
	}
	*word |= bit;
	s->packets++;
	if (seq < s->highest)
		s->reordered++;
	at = bpf_map_lookup_elem(&arrivals, &seq);
	if (at && flow == 0)
		*at = now;
}

/* intact says whether both checksums are right. The payload behind the tag is zero. */
static int intact(void *data)
{
	__u32 pseudo = bpf_htons(IPPROTO_UDP) + *(__u16 *)(data + OFF_UDP_LEN);

	return fold(bpf_csum_diff(0, 0, data + OFF_IP, OFF_UDP_SRC - OFF_IP, 0)) == 0xffff &&
	       fold(bpf_csum_diff(0, 0, data + OFF_IP_SRC, LEAST_FRAME - OFF_IP_SRC, pseudo)) ==
		       0xffff;
}

SEC("xdp.frags")
int witness(struct xdp_md *ctx)
{
	void *data = (void *)(long)ctx->data;
	void *data_end = (void *)(long)ctx->data_end;
	struct stream *s;
	struct wrong *w;
	struct tag *tag;
	__u32 flow, zero = 0;

	if (data + LEAST_FRAME > data_end)
		return XDP_PASS;
	/* Hosts also talk about themselves. */
	if (*(__u16 *)(data + OFF_ETHER_TYPE) != bpf_htons(ETH_P_IP) ||
	    *(__u8 *)(data + OFF_IP_PROTOCOL) != IPPROTO_UDP)
		return XDP_PASS;
	w = bpf_map_lookup_elem(&wrongs, &zero);
	if (!w)
		return XDP_ABORTED;
	tag = data + OFF_TAG;
	flow = legs ? 0 : tag->flow;
	s = bpf_map_lookup_elem(&streams, &flow);
	if (!s || *(__u32 *)(data + OFF_IP_DST) != bpf_htonl(group) ||
	    *(__u16 *)(data + OFF_UDP_DST) != bpf_htons(port)) {
		w->address++;
		return XDP_PASS;
	}
	if (!intact(data)) {
		w->checksum++;
		return XDP_DROP;
	}
	if (tag->trial != trial) {
		w->stray++;
		return XDP_DROP;
	}
	follow(s, flow, tag);
	return XDP_DROP;
}

char _license[] SEC("license") = "Dual BSD/GPL";
