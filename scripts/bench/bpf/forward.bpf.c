//go:build ignore

// SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0-only)
/* The least that a forwarder can do, and a forwarder that loses. */
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#include "../../../internal/live/bpf/tag.h"

/* outputs: output -> interface. */
struct {
	__uint(type, BPF_MAP_TYPE_DEVMAP);
	__uint(max_entries, 1); /* as many as there are outputs; set at load */
	__type(key, __u32);
	__type(value, struct bpf_devmap_val);
} outputs SEC(".maps");

/* sockets: queue -> AF_XDP socket of the reference forwarder. */
struct {
	__uint(type, BPF_MAP_TYPE_XSKMAP);
	__uint(max_entries, 64);
	__type(key, __u32);
	__type(value, __u32);
} sockets SEC(".maps");

SEC("xdp.frags")
int redirect(struct xdp_md *ctx)
{
	return bpf_redirect_map(&outputs, 0, 0);
}

SEC("xdp.frags")
int broadcast(struct xdp_md *ctx)
{
	return bpf_redirect_map(&outputs, 0, BPF_F_BROADCAST);
}

/* lossy drops one of the source's frames in a hundred, by their numbers: what hosts say
 * by themselves, as neighbours, must not count.
 */
SEC("xdp.frags")
int lossy(struct xdp_md *ctx)
{
	const __u8 *data = (const __u8 *)(long)ctx->data;
	const struct tag *tag = (const struct tag *)(data + OFF_TAG);

	if (data + LEAST_FRAME <= (const __u8 *)(long)ctx->data_end &&
	    *(const __u16 *)(data + OFF_ETHER_TYPE) == bpf_htons(ETH_P_IP) &&
	    data[OFF_IP_PROTOCOL] == IPPROTO_UDP && tag->seq % 100 == 0)
		return XDP_DROP;
	return bpf_redirect_map(&outputs, 0, 0);
}

SEC("xdp.frags")
int to_socket(struct xdp_md *ctx)
{
	return bpf_redirect_map(&sockets, ctx->rx_queue_index, XDP_PASS);
}

char _license[] SEC("license") = "Dual BSD/GPL";
