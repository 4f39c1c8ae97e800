/* SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0-only) */
/* Plain packets: whole UDP datagrams over IPv4 without options, in untagged frames. Their headers
 * are at fixed offsets, so one bounds check and few comparisons find them, and the compiler keeps
 * them in registers. For any other frame parse_plain returns false, and parse.h does the work;
 * for a plain one both give the same.
 */
#pragma once

#include "parse.h"

#define PLAIN_IP 0x45 /* version 4, and a header of 5 words */

/* Parses a frame of so many bytes in all its buffers. */
static __always_inline bool parse_plain(void *data, void *data_end, __u32 bytes, struct headers *h)
{
	struct ethhdr *eth = data;
	struct iphdr *ip = (void *)(eth + 1);
	struct udphdr *udp = (void *)(ip + 1);
	__u32 udp_len;

	if ((void *)(udp + 1) > data_end)
		return false;
	/* As a whole word: struct ethhdr is packed. */
	if (((const __be16 *)data)[ETH_ALEN] != bpf_htons(ETH_P_IP) ||
	    *(const __u8 *)ip != PLAIN_IP || ip->protocol != IPPROTO_UDP ||
	    ip->frag_off & bpf_htons(IP_MF | IP_OFFSET))
		return false;
	*h = (struct headers){
		.eth = eth,
		.ip4 = ip,
		.udp = udp,
		.l3_offset = sizeof(*eth),
		.l3_len = bpf_ntohs(ip->tot_len),
		.part = PART_WHOLE,
	};
	udp_len = bpf_ntohs(udp->len);
	return udp_len >= sizeof(*udp) && sizeof(*ip) + udp_len <= h->l3_len &&
	       sizeof(*eth) + h->l3_len <= bytes;
}
