//go:build ignore

// SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0-only)
/* The sink: says of every frame of the source which output it came from, whether it
 * is addressed as it should be, whether it follows the one before it in its flow,
 * and how long it took. Nothing passes.
 */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_endian.h>

#include "../../../internal/live/bpf/tag.h"

/* Set at load. */
const volatile __u32 rewritten = 0; /* outputs are told by their port; else by the sink */
const volatile __u32 this_sink = 0; /* its number; of the output that has not been rewritten */
const volatile __u32 outputs = 1;   /* of the rule */
const volatile __u32 flows = 1;
const volatile __u32 first_out = 0;   /* group of output 0; output n has the next but n */
const volatile __u16 out_port = 0;    /* and its port */
const volatile __u32 first_group = 0; /* what the source sends to, */
const volatile __u32 last_group = 0;
const volatile __u16 port = 0;

/* Set before a run. */
__u32 trial = 0;
__u32 ordered = 0; /* check the order of each flow */
__u32 timed = 0;   /* frames carry the time */

/* A histogram of nanoseconds: each power of two in 32 equal steps. */
#define STEP_BITS 5
#define STEPS (1 << STEP_BITS)
#define BUCKETS ((32 - STEP_BITS + 1) * STEPS)

struct histogram {
	__u64 buckets[BUCKETS];
};

/* What arrived at an output. */
struct arrived {
	__u64 packets;
	__u64 bytes;
	__u64 missing; /* numbers that were passed over */
	__u64 late;    /* numbers that had been passed over or seen */
	__u64 last;    /* about when the last one came, of bpf_ktime_get_ns() */
};

/* What is not what it should be, of all outputs. */
struct wrong {
	__u64 address; /* not the destination of an output */
	__u64 stray;   /* of an earlier trial */
};

struct next {
	__u32 trial;
	__u32 seq;
};

/* arrived_at: output -> what arrived there. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, MAX_OUTPUTS);
	__type(key, __u32);
	__type(value, struct arrived);
} arrived_at SEC(".maps");

/* wrongs: one entry. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct wrong);
} wrongs SEC(".maps");

/* latency: one entry, in ns from the source's program to this one. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct histogram);
} latency SEC(".maps");

/* expected: output * flows + flow -> what comes next. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, MAX_OUTPUTS); /* times flows; set at load */
	__type(key, __u32);
	__type(value, struct next);
} expected SEC(".maps");

static __u32 bucket(__u32 ns)
{
	__u32 octave = 0, v = ns;

	if (v < STEPS)
		return v;
	if (v >> 16) {
		octave += 16;
		v >>= 16;
	}
	if (v >> 8) {
		octave += 8;
		v >>= 8;
	}
	if (v >> 4) {
		octave += 4;
		v >>= 4;
	}
	if (v >> 2) {
		octave += 2;
		v >>= 2;
	}
	octave += v >> 1;
	octave -= STEP_BITS;
	return octave * STEPS + (ns >> octave);
}

static void time_it(__u32 ns)
{
	struct histogram *h;
	__u32 zero = 0, b = bucket(ns);

	h = bpf_map_lookup_elem(&latency, &zero);
	if (h && b < BUCKETS)
		h->buckets[b]++;
}

/* follow checks the number of a frame. A flow keeps to one queue and one worker, so
 * that no other CPU writes its entry.
 */
static void follow(struct arrived *a, const struct tag *tag, __u32 output)
{
	__u32 key = output * flows + tag->flow;
	struct next *n = bpf_map_lookup_elem(&expected, &key);

	if (!n)
		return;
	if (n->trial != tag->trial) {
		n->trial = tag->trial;
		n->seq = 0;
	}
	if (tag->seq < n->seq) {
		a->late++;
		return;
	}
	a->missing += tag->seq - n->seq;
	n->seq = tag->seq + 1;
}

/* output_of returns the output that a frame came from, MAX_OUTPUTS for none. */
static __u32 output_of(void *data)
{
	__u32 dst = bpf_ntohl(*(__u32 *)(data + OFF_IP_DST));
	__u16 to = bpf_ntohs(*(__u16 *)(data + OFF_UDP_DST));
	__u32 n;

	if (!rewritten)
		return dst >= first_group && dst <= last_group && to == port ? this_sink
									     : MAX_OUTPUTS;
	n = dst - first_out;
	return n < outputs && to == out_port + n ? n : MAX_OUTPUTS;
}

SEC("xdp.frags")
int sink(struct xdp_md *ctx)
{
	void *data = (void *)(long)ctx->data;
	void *data_end = (void *)(long)ctx->data_end;
	struct arrived *a;
	struct wrong *w;
	struct tag *tag;
	__u32 output, zero = 0;

	if (data + LEAST_FRAME > data_end)
		return XDP_DROP;
	/* Hosts also talk about themselves. */
	if (*(__u16 *)(data + OFF_ETHER_TYPE) != bpf_htons(0x0800) ||
	    *(__u8 *)(data + OFF_IP_PROTOCOL) != 17)
		return XDP_DROP;
	w = bpf_map_lookup_elem(&wrongs, &zero);
	if (!w)
		return XDP_DROP;
	tag = data + OFF_TAG;
	output = output_of(data);
	a = bpf_map_lookup_elem(&arrived_at, &output);
	if (!a || tag->flow >= flows) {
		w->address++;
		return XDP_DROP;
	}
	if (tag->trial != trial) {
		w->stray++;
		return XDP_DROP;
	}
	a->packets++;
	a->bytes += bpf_xdp_get_buff_len(ctx);
	if (ordered)
		follow(a, tag, output);
	/* The clock costs as much as all else. */
	if (!timed && a->packets >= 64 && a->packets % 64)
		return XDP_DROP;
	a->last = bpf_ktime_get_ns();
	if (timed)
		time_it((__u32)a->last - tag->stamp);
	return XDP_DROP;
}

char _license[] SEC("license") = "Dual BSD/GPL";
