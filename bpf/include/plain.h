/* SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0-only) */
/* Plain packets: whole UDP datagrams over IPv4 without options, in untagged frames. Their headers
 * are at fixed offsets, so one bounds check and few comparisons find them, and the compiler keeps
 * them in registers. For any other frame parse_plain returns false, and parse.h does the work;
 * for a plain one both give the same.
 */
#pragma once

#include "rewrite.h"
#include "shortcut.h"

/* The bytes of a frame that make it plain, on a little-endian machine: 12 to 14 are the EtherType,
 * version 4 and a header of 5 words; 20, 21 and 23 offset, flag of more fragments, and protocol.
 */
#define PLAIN_TYPE_AT 12
#define PLAIN_TYPE 0x450008
#define PLAIN_TYPE_MASK 0xffffff
#define PLAIN_PART_AT 20
#define PLAIN_PART (IPPROTO_UDP << 24)
#define PLAIN_PART_MASK 0xff00ff3f
#define PLAIN_HEADERS (sizeof(struct iphdr) + sizeof(struct udphdr))

/* Parses a frame of so many bytes in all its buffers. */
static __always_inline bool parse_plain(void *data, void *data_end, __u32 bytes, struct headers *h)
{
	struct ethhdr *eth = data;
	struct iphdr *ip = (void *)(eth + 1);
	struct udphdr *udp = (void *)(ip + 1);
	__u64 type;

	if ((void *)(udp + 1) > data_end)
		return false;
	type = *(const __u64 *)(data + PLAIN_TYPE_AT);
	if ((type & PLAIN_TYPE_MASK) != PLAIN_TYPE ||
	    (*(const __u32 *)(data + PLAIN_PART_AT) & PLAIN_PART_MASK) != PLAIN_PART)
		return false;
	*h = (struct headers){
		.eth = eth,
		.ip4 = ip,
		.udp = udp,
		.l3_offset = sizeof(*eth),
		.l3_len = bpf_ntohs((__u16)(type >> 32)),
		.part = PART_WHOLE,
	};
	/* The datagram fills the packet, and the frame has all of it; one comparison for this and
	 * for what is shorter than its headers.
	 */
	return h->l3_len - PLAIN_HEADERS <= (__u64)bytes - sizeof(*eth) - PLAIN_HEADERS &&
	       bpf_ntohs(udp->len) == h->l3_len - sizeof(*ip);
}

/* The TTL of a copy for a prepared output, not in 1 to 255 if the packet ends here: ttl_or makes it
 * 255, from which ttl_sub sets any value; otherwise ttl_sub is 1 or 0.
 */
static __always_inline __u32 prepared_ttl(const struct shortcut *s, const struct headers *h)
{
	return (h->ip4->ttl | s->ttl_or) - s->ttl_sub;
}

/* Rewrites a frame for a prepared output, as rewrite_ip4 would. The checksums: HC' = HC + m - m'
 * (RFC 1624, equation 2), of which the slot has all but the packet's own source, ports and TTL. A
 * sum that is not zero folds to 1 to 0xffff, as a UDP checksum must be; ip_sum is one more, so
 * that one less is 0 to 0xfffe, as equation 3 gives for IP. Both sums are positive.
 */
static __always_inline void rewrite_prepared(struct headers *h, const struct shortcut *s, __u32 ttl)
{
	const struct output *o = slot_output(s);
	struct iphdr *ip = h->ip4;
	struct udphdr *udp = h->udp;
	__u64 from = ip->saddr, sum;
	__u16 check = udp->check;

	sum = s->ip_sum + from + ip->check + ip->ttl - ttl;
	ip->ttl = ttl;
	ip->check = fold(sum) - 1;
	ip->saddr = word(o->src, 0);
	ip->daddr = word(o->dst, 0);
	sum = s->udp_sum + from + check;
	if (s->src_port) {
		sum += udp->source;
		udp->source = s->src_port;
	}
	udp->dest = s->dst_port;
	if (check)
		udp->check = fold(sum);
	rewrite_mac(h->eth, o);
}
