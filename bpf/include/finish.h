/* SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0-only) */
/* A local stack that sends over a virtual device (veth) leaves the UDP checksum to the device: the
 * field holds the sum of the pseudo header (CHECKSUM_PARTIAL). XDP has no such offload, and an
 * incremental update of that sum would be wrong. So the relay program completes it, on inputs where
 * it may occur. A complete checksum that equals the sum by chance (1 in 65,536) is recomputed with
 * the same result and not noted.
 */
#pragma once

#include "parse.h"
#include "rewrite.h"

/* Blocks of the long steps, and of the short ones after them; no frame in one buffer is longer than
 * a page.
 */
#define FINISH_BLOCK 256
#define FINISH_BLOCKS 16
#define FINISH_STEP 16
#define FINISH_MASK 0xfff

/* The sum of the pseudo header (RFC 768; RFC 8200 section 8.1), without length; 0 for impossible
 * headers.
 */
static __always_inline __u64 pseudo_header(const void *l3, const void *data_end)
{
	const struct iphdr *ip4 = l3;
	const struct ipv6hdr *ip6 = l3;
	__u64 sum = (__u32)bpf_htons(IPPROTO_UDP);
	int i;

	if ((const void *)(ip4 + 1) > data_end)
		return 0;
	if (ip4->version == 4)
		return sum + ip4->saddr + ip4->daddr;
	if ((const void *)(ip6 + 1) > data_end)
		return 0;
#pragma unroll
	for (i = 0; i < 4; i++)
		sum += (__u64)ip6->saddr.in6_u.u6_addr32[i] + ip6->daddr.in6_u.u6_addr32[i];
	return sum;
}

/* The rest of a datagram, of len bytes; NULL if fewer than want are in this buffer. Computed from
 * lengths whose values the verifier does not know: it verifies each step below once, and not for
 * each path to it.
 */
static __always_inline const void *finish_at(const struct udphdr *udp, __u32 len, __u32 want,
					     const void *data_end)
{
	const void *p = (const void *)udp + ((bpf_ntohs(udp->len) - len) & FINISH_MASK);
	const void *next = p + want;

	OPAQUE(next);
	return next > data_end ? NULL : p;
}

/* Completes the checksum of an unfragmented datagram with headers at these offsets. Returns 0, and
 * changes nothing, if it is already complete, or if the datagram continues in another buffer.
 * Global, so that it is verified once.
 */
__noinline int finish_checksum(struct xdp_md *ctx, __u32 l3, __u32 at)
{
	void *data_end = (void *)(long)ctx->data_end;
	void *data = (void *)(long)ctx->data;
	struct udphdr *udp = data + (at & 0xff);
	const __u32 *word;
	const void *p;
	__u32 len, i;
	__u64 sum;
	__u16 check;

	if ((void *)(udp + 1) > data_end || !udp->check)
		return 0;
	sum = pseudo_header(data + (l3 & 0x1f), data_end);
	if (!sum || fold(sum + udp->len) != udp->check)
		return 0;
	/* The checksum field holds the sum of the pseudo header. */
	sum = 0;
	len = bpf_ntohs(udp->len);
	if (len > FINISH_MASK)
		return 0;
	for (i = 0; i < FINISH_BLOCKS && len >= FINISH_BLOCK; i++) {
		p = finish_at(udp, len, FINISH_BLOCK, data_end);
		if (!p)
			return 0;
		sum += (__u32)bpf_csum_diff(NULL, 0, (void *)p, FINISH_BLOCK, 0);
		len -= FINISH_BLOCK;
	}
	for (i = 0; i < FINISH_BLOCK / FINISH_STEP && len >= FINISH_STEP; i++) {
		word = finish_at(udp, len, FINISH_STEP, data_end);
		if (!word)
			return 0;
		sum += (__u64)word[0] + word[1] + word[2] + word[3];
		len -= FINISH_STEP;
	}
	for (i = 0; i < FINISH_STEP / 2 && len >= 2; i++) {
		p = finish_at(udp, len, 2, data_end);
		if (!p)
			return 0;
		sum += *(const __u16 *)p;
		len -= 2;
	}
	if (len > 1)
		return 0;
	if (len) {
		p = finish_at(udp, len, 1, data_end);
		if (!p)
			return 0;
		sum += bpf_htons((__u16)(*(const __u8 *)p << 8));
	}
	check = ~fold((sum & 0xffffffff) + (sum >> 32));
	if (!check)
		check = 0xffff; /* RFC 768: a computed zero is sent as all ones */
	if (check == udp->check)
		return 0;
	udp->check = check;
	return 1;
}
