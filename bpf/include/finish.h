/* SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0-only) */
/* A local stack that sends over a virtual device (veth) leaves the UDP checksum to the
 * device: the field holds the sum of the pseudo header (CHECKSUM_PARTIAL). XDP has no
 * such offload, and an incremental update of that sum would be wrong. So the relay program
 * finishes it, on inputs where it may happen. A finished checksum that equals the sum by
 * chance (1 of 65,536) is computed anew and comes out the same.
 */
#pragma once

#include "parse.h"
#include "rewrite.h"

#define FINISH_STEP 16
#define FINISH_STEPS 256 /* a page, which no frame in one buffer is longer than */

/* Keeps the compiler from moving additions to the end of the packet, which the verifier
 * does not take.
 */
#define OPAQUE(p) asm volatile("" : "+r"(p))

/* The sum of the pseudo header (RFC 768; RFC 8200 section 8.1), without length; 0 for
 * what cannot be.
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

/* Finishes the checksum of a whole datagram, whose headers are at these offsets. Returns 0,
 * and changes nothing, when it is finished, or when the datagram goes on in another
 * buffer. Global, so that it is verified once.
 */
__noinline int finish_checksum(struct xdp_md *ctx, __u32 l3, __u32 at)
{
	void *data_end = (void *)(long)ctx->data_end;
	void *data = (void *)(long)ctx->data;
	void *p = data + (at & 0xff), *next;
	struct udphdr *udp = p;
	__u32 len, i;
	__u64 sum;
	__u16 check;

	if (p + sizeof(*udp) > data_end || !udp->check)
		return 0;
	sum = pseudo_header(data + (l3 & 0x1f), data_end);
	if (!sum || fold(sum + udp->len) != udp->check)
		return 0;
	/* The checksum field holds the sum of the pseudo header. */
	sum = 0;
	len = bpf_ntohs(udp->len);
	for (i = 0; i < FINISH_STEPS && len >= FINISH_STEP; i++) {
		const __u32 *word = p;

		next = p + FINISH_STEP;
		OPAQUE(next);
		if (next > data_end)
			return 0;
		sum += (__u64)word[0] + word[1] + word[2] + word[3];
		p = next;
		len -= FINISH_STEP;
	}
	for (i = 0; i < FINISH_STEP / 2 && len >= 2; i++) {
		next = p + 2;
		OPAQUE(next);
		if (next > data_end)
			return 0;
		sum += *(const __u16 *)p;
		p = next;
		len -= 2;
	}
	if (len > 1)
		return 0;
	if (len) {
		next = p + 1;
		OPAQUE(next);
		if (next > data_end)
			return 0;
		sum += bpf_htons((__u16)(*(const __u8 *)p << 8));
	}
	check = ~fold((sum & 0xffffffff) + (sum >> 32));
	udp->check = check ? check : 0xffff; /* RFC 768: a computed zero is sent as all ones */
	return 1;
}
