//go:build ignore

// SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0-only)
/* The source: run by BPF_PROG_RUN on live frames, it writes each frame anew (the
 * kernel uses a frame's buffer again, with what became of it), and waits in the
 * kernel until the frame is due. So one call sends at any rate, from a few
 * thousand frames a second to all that the CPU can make.
 */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_endian.h>

#include "tag.h"

/* Set at load. Sums are of 16-bit words as the machine reads them (RFC 1071). */
const volatile __u64 header[HEADER_LEN / 8] = {}; /* without group, source port and checksums */
const volatile __u64 ip_sum = 0;		  /* of the IPv4 header without the group */
const volatile __u64 udp_sum = 0;		  /* of all else that the UDP checksum covers */
const volatile __u32 first_group = 0;		  /* of flow 0; the machine's byte order */
const volatile __u32 group_step = 0;		  /* from one flow's group to the next one's */
const volatile __u16 first_port = 0;  /* UDP source port of flow 0; each flow has its own */
const volatile __u32 first_flow = 0;  /* sources share the flows; this one's are */
const volatile __u32 flow_step = 1;   /* first_flow, first_flow + flow_step, ... */
const volatile __u32 flows = 1;	      /* below this */
const volatile __u32 stamp_shift = 0; /* stamps are in 2^this ns */
/* Frames have turns of several lengths, the longest that of the header. */
const volatile __u32 mixed = 0;
const volatile __u32 legs = 0; /* each flow leaves by an interface of its own; 0: all by one */

/* Set before a run. */
__u32 trial = 0;
__u32 stamped = 0;   /* frames carry the time */
__u64 limit = 0;     /* frames to send; what is asked for beyond is not sent */
__u64 interval = 0;  /* between frames, in ns / 2^16; 0 sends as fast as it can */
__u32 batch = 1;     /* frames that are sent at one time */
__u32 first_seq = 0; /* number of each flow's first frame */
__u64 behind = 0;    /* ns that it may be late before it shifts its schedule; 0: it catches up */
/* Numbers at which flow 0 falls silent and at which it speaks again, in turns, ascending; the rest
 * is ~0.
 */
#define MAX_TURNS 64
__u32 turns[MAX_TURNS] = {};

/* What the run did. */
__u64 sent = 0;
__u64 started = 0; /* bpf_ktime_get_ns() at the first frame, */
__u64 ended = 0;   /* and at the last */
__u64 waited = 0;  /* ns spent waiting for frames to be due */
__u64 shifted = 0; /* ns by which it has shifted its schedule */
__u64 late = 0;	   /* ns that the last batch was behind its time */

static __u32 flow = 0; /* the next frame's */
static __u32 seq = 0;
static __u32 turn = 0; /* of turns, the next one */

/* interfaces: flow -> the interface that it leaves by, with legs. */
struct {
	__uint(type, BPF_MAP_TYPE_DEVMAP);
	__uint(max_entries, 1); /* as many as there are flows; set at load */
	__type(key, __u32);
	__type(value, __u32);
} interfaces SEC(".maps");

struct wait {
	__u64 due;
	__u64 now;
};

static long until(__u32 i, void *ctx)
{
	struct wait *w = ctx;

	w->now = bpf_ktime_get_ns();
	return w->now >= w->due;
}

/* pace waits until the frame number n is due. */
static void pace(__u64 n)
{
	struct wait w = {.now = bpf_ktime_get_ns()};
	__u64 before = w.now;

	if (n == 0) {
		started = w.now;
		shifted = 0;
	}
	w.due = started + shifted + (n * interval >> 16);
	late = 0;
	if (w.now < w.due)
		bpf_loop(1 << 23, until, &w, 0);
	else
		late = w.now - w.due;
	if (behind && late > behind)
		shifted += late - behind;
	waited += w.now - before;
	ended = w.now;
}

/* The length of frame number n with mixed: of each 12, 7 have 60 bytes, 4 have 590 and one 1514
 * ("simple IMIX", without the frame check sequence), and no length comes in a row.
 */
static __u32 length_of(__u64 n)
{
	__u32 turn = n * 5 % 12;

	return turn < 7 ? 60 : turn < 11 ? 590 : MIXED_LONGEST;
}

/* write fills in the frame of a flow; len: its length with mixed. */
static void write(void *data, __u32 f, __u32 s, __u32 len)
{
	struct tag *tag = data + OFF_TAG;
	__u32 group = bpf_htonl(first_group + f * group_step);
	__u16 port = bpf_htons(first_port + f);
	__u32 now = stamped ? (__u32)(bpf_ktime_get_ns() >> stamp_shift) : 0;
	__u16 *ip_len = data + OFF_IP_LEN, *udp_len = data + OFF_UDP_LEN;
	__u64 *words = data, ip = ip_sum, udp = udp_sum;
	__u16 check;
	int i;

#pragma unroll
	for (i = 0; i < HEADER_LEN / 8; i++)
		words[i] = header[i];
	if (mixed) {
		ip += (__u16) ~*ip_len;
		udp += 2 * (__u16) ~*udp_len; /* in the pseudo header, too */
		*ip_len = bpf_htons(len - OFF_IP);
		*udp_len = bpf_htons(len - OFF_UDP_SRC);
		ip += *ip_len;
		udp += 2 * *udp_len;
	}
	/* The Ethernet address of a group: its low 23 bits (RFC 1112 section 6.4). */
	*(__u32 *)(data + OFF_MAC_GROUP) = (group & bpf_htonl(0x7fffff)) | bpf_htonl(0x5e000000);
	*(__u32 *)(data + OFF_IP_DST) = group;
	*(__u16 *)(data + OFF_UDP_SRC) = port;
	*(__u16 *)(data + OFF_IP_CHECK) = ~fold(ip + group);
	check = ~fold(udp + group + port + trial + f + s + now);
	*(__u16 *)(data + OFF_UDP_CHECK) = check ? check : 0xffff;
	tag->trial = trial;
	tag->flow = f;
	tag->seq = s;
	tag->stamp = now;
}

/* silent says whether flow 0 leaves a number out, which it takes the time for all the same. */
static int silent(__u32 s)
{
	if (turns[turn % MAX_TURNS] <= s)
		turn++;
	return turn & 1;
}

SEC("xdp")
int source(struct xdp_md *ctx)
{
	void *data = (void *)(long)ctx->data;
	void *data_end = (void *)(long)ctx->data_end;
	__u64 n = sent;
	__u32 f = flow, s = seq, len = 0;

	if (data + LEAST_FRAME > data_end)
		return XDP_ABORTED;
	if (n >= limit)
		return XDP_DROP;
	if (n == 0) {
		f = first_flow;
		s = first_seq;
		turn = 0;
	}
	/* Without a rate the clock is read now and then: it costs as much as the frame. */
	if (n % batch == 0 && (interval || n % 64 == 0))
		pace(n);
	if (mixed) {
		len = length_of(n);
		if (bpf_xdp_adjust_tail(ctx, (int)len - (int)(data_end - data)))
			return XDP_ABORTED;
		data = (void *)(long)ctx->data;
		data_end = (void *)(long)ctx->data_end;
		if (data + LEAST_FRAME > data_end)
			return XDP_ABORTED;
	}
	flow = f + flow_step;
	seq = s;
	if (flow >= flows) {
		flow = first_flow;
		seq++;
	}
	sent = n + 1;
	/* The legs of a number are a batch, whose devices the kernel flushes from the last one that
	 * a frame was redirected to (list_add in bq_enqueue of kernel/bpf/devmap.c).
	 */
	if (legs)
		f = flows - 1 - f;
	if (f == 0 && silent(s))
		return XDP_DROP;
	write(data, f, s, len);
	return legs ? bpf_redirect_map(&interfaces, f, XDP_ABORTED) : XDP_TX;
}

char _license[] SEC("license") = "Dual BSD/GPL";
