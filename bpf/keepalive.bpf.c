//go:build ignore

// SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0-only)
/* The keepalive program: run by BPF_PROG_RUN on live frames, it writes a frame for each
 * entry of the map probes, and hands it to the stack of the interface that the run names. The
 * kernel counts the frame for the multicast route of its addresses, and sends it nowhere: its
 * TTL is 1, below every threshold (ip_mr_forward of net/ipv4/ipmr.c). No socket takes it: its
 * protocol is 253, for experiments (RFC 3692).
 */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

#define PROBE_LEN 60

struct probe {
	__u8 frame[PROBE_LEN];
};

/* probes: a frame for each. Size: load. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct probe);
} probes SEC(".maps");

/* Set before a run, and counted by it. */
__u32 next = 0;
__u32 limit = 0;

/* The kernel uses a frame's buffer again, with what became of it: each is written as a whole. */
SEC("xdp")
int keepalive(struct xdp_md *ctx)
{
	void *data_end = (void *)(long)ctx->data_end;
	void *data = (void *)(long)ctx->data;
	__u32 at = next;
	struct probe *p;

	if (at >= limit || data + PROBE_LEN > data_end)
		return XDP_DROP;
	p = bpf_map_lookup_elem(&probes, &at);
	if (!p)
		return XDP_DROP;
	next = at + 1;
	__builtin_memcpy(data, p, PROBE_LEN);
	return XDP_PASS;
}

char _license[] SEC("license") = "Dual BSD/GPL";
