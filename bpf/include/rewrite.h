/* SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0-only) */
/* Rewrites one copy of a packet for its output. Checksums are updated incrementally (RFC 1624,
 * equation 3), so that a wrong one stays wrong and the receiver detects it. Package packet is the
 * twin in Go.
 */
#pragma once

#include "abi.h"
#include "parse.h"

#define ECN_MASK 0x03

/* Folds a sum of 16-bit and 32-bit words in network order, less than 2^48, to 16 bits: the
 * product's upper 16 bits are the sum of its three words and of the carries out of them. Twin:
 * TestFoldByProduct of package packet.
 */
static __always_inline __u16 fold(__u64 sum)
{
	return sum * 0x0001000100010001ULL >> 48;
}

/* The change of a sum when a word changes. */
static __always_inline __u64 delta16(__u16 from, __u16 to)
{
	return (__u64)(__u16)~from + to;
}

static __always_inline __u64 delta32(__u32 from, __u32 to)
{
	return (__u64)(__u32)~from + to;
}

static __always_inline __u32 word(const __u8 *bytes, int i)
{
	return ((const __u32 *)bytes)[i];
}

/* The destination port of a copy, 0 if out of range. rare is a constant in each caller, here and
 * below: rare features cost most outputs nothing.
 */
static __always_inline __u16 new_port(const struct udphdr *udp, const struct output *o, bool rare)
{
	__s32 port;

	if (!rare || !(o->flags & OUTPUT_PORT_ADD))
		return o->dst_port;
	port = bpf_ntohs(udp->dest) + o->port_shift;
	return port > 0 && port <= 0xffff ? port : 0;
}

/* Writes the ports and the checksum; addresses is the change of the pseudo header's
 * sum, and flags are the output's: the compiler would read them again after each write to the
 * packet.
 */
static __always_inline void rewrite_udp(struct udphdr *udp, const struct output *o, __u16 flags,
					__u16 port, __u64 addresses)
{
	__be16 dst_port = bpf_htons(port);
	__u64 sum = (__u16)~udp->check + addresses + delta16(udp->dest, dst_port);
	__u16 check;

	udp->dest = dst_port;
	if (o->src_port) {
		__be16 src_port = bpf_htons(o->src_port);

		sum += delta16(udp->source, src_port);
		udp->source = src_port;
	}
	if (!udp->check)
		return; /* sent without one: stays so */
	if (flags & OUTPUT_CHECKSUM_ZERO) {
		udp->check = 0;
		return;
	}
	check = ~fold(sum);
	udp->check = check ? check : 0xffff; /* RFC 768: a computed zero is sent as all ones */
}

/* The outgoing TTL or hop limit; 0 if the packet ends here. */
static __always_inline __u8 new_ttl(const struct output *o, __u8 ttl, bool rare)
{
	if (rare && ttl < o->min_ttl)
		return 0;
	switch (o->ttl_mode) {
	case TTL_SET:
		return o->ttl;
	case TTL_DECREMENT:
		return ttl ? ttl - 1 : 0;
	default:
		return ttl;
	}
}

/* Both MACs at once, as two words: struct ethhdr is packed, and the compiler would copy it byte
 * by byte.
 */
static __always_inline void rewrite_mac(struct ethhdr *eth, const struct output *o)
{
	const void *from = o->dst_mac; /* of which the compiler does not know that it is aligned */

	_Static_assert(__builtin_offsetof(struct output, src_mac) == 6, "MACs lie as in a frame");
	*(__u64 *)eth = *(const __u64 *)from;
	((__u32 *)eth)[2] = ((const __u32 *)from)[2];
}

/* Bits of a prefix that lie in its 32-bit word i, as a mask in network order. */
static __always_inline __u32 prefix_mask(__u32 len, __u32 i)
{
	__u32 bits = len > 32 * i ? len - 32 * i : 0;

	if (bits >= 32)
		return ~0U;
	return bits ? bpf_htonl(~0U << (32 - bits)) : 0;
}

/* The end of the destination MAC of a group that depends on the packet (RFC 1112 section 6.4, RFC
 * 2464 section 7); last is the last word of the address.
 */
static __always_inline void rewrite_group_mac(struct ethhdr *eth, const struct output *o,
					      __u32 last)
{
	const __u8 *b = (const __u8 *)&last;

	if (!(o->dst_mac[0] & 1))
		return; /* unicast: the neighbour's */
	eth->h_dest[2] = o->family == 4 ? 0x5e : b[0];
	eth->h_dest[3] = o->family == 4 ? b[1] & 0x7f : b[1];
	eth->h_dest[4] = b[2];
	eth->h_dest[5] = b[3];
}

/* What the kernel allows a frame beyond the MTU: Ethernet and one tag (xdp_ok_fwd_dev and
 * is_skb_forwardable). A longer one costs others: a driver may drop a whole bulk with the frame
 * that it refuses.
 */
#define FRAME_ROOM (ETH_HLEN + 4)

/* Compared with the MTU: not more for any frame that fits with the tags it has. */
static __always_inline __u32 frame_size(__u32 l3_offset, __u32 bytes)
{
	return bytes - (l3_offset < FRAME_ROOM ? l3_offset : FRAME_ROOM);
}

/* Whether the outgoing frame is too long for the output's device: including pushed or kept tags,
 * and trailing bytes after the IP packet.
 */
static __always_inline bool too_long(const struct output *o, __u32 l3_offset, __u32 bytes)
{
	__u32 header = l3_offset;

	if (o->vlan_mode == VLAN_POP)
		header = ETH_HLEN;
	else if (o->vlan_mode == VLAN_SET)
		header = ETH_HLEN + (o->outer_vlan ? 2 : 1) * sizeof(struct vlan_hdr);
	return bytes - l3_offset + header > (__u32)o->mtu + FRAME_ROOM;
}

/* Fragments of two senders that leave with one address may have equal identifications: each
 * sender's get new ones, the same for all fragments of a datagram.
 */
static __always_inline __u16 merged_id(__u16 id, __u32 source)
{
	return id ^ (__u16)(source * 0x9e3779b1U >> 16);
}

/* Both rewrites return REWRITTEN, or the reason why the packet is dropped; the packet is then
 * unchanged. whole: it is known to be no fragment; a constant in each caller, like rare.
 */
#define REWRITTEN ((__u32)-1)

static __always_inline __u32 rewrite_ip4(struct headers *h, const struct output *o, bool whole,
					 bool rare)
{
	struct iphdr *ip = h->ip4;
	__u16 *ttl_word = (__u16 *)&ip->ttl;
	__u16 *tos_word = (__u16 *)ip;
	__u8 ttl = new_ttl(o, ip->ttl, rare);
	__u32 dst = word(o->dst, 0);
	__u16 old, port = 0, flags = o->flags;
	__u64 addresses, sum, id = 0;

	if (!ttl)
		return DROP_TTL;
	if (h->udp) {
		port = new_port(h->udp, o, rare);
		if (rare && !port)
			return DROP_PORT;
	}
	if (rare && o->dst_len) {
		__u32 mask = prefix_mask(o->dst_len, 0);

		dst = (dst & mask) | (ip->daddr & ~mask);
	}
	addresses = delta32(ip->daddr, dst);
	ip->daddr = dst;
	if (flags & OUTPUT_SOURCE_SET) {
		__u32 src = word(o->src, 0);

		addresses += delta32(ip->saddr, src);
		if (!whole && __builtin_expect(ip->frag_off & bpf_htons(IP_MF | IP_OFFSET), 0)) {
			old = ip->id;
			ip->id = merged_id(old, ip->saddr);
			id = delta16(old, ip->id);
		}
		ip->saddr = src;
	}
	sum = (__u16)~ip->check + addresses + id;
	if (ttl != ip->ttl) {
		old = *ttl_word;
		ip->ttl = ttl;
		sum += delta16(old, *ttl_word);
	}
	if (flags & OUTPUT_DSCP_SET) {
		old = *tos_word;
		ip->tos = o->dscp << 2 | (ip->tos & ECN_MASK);
		sum += delta16(old, *tos_word);
	}
	ip->check = ~fold(sum);
	if (h->udp)
		rewrite_udp(h->udp, o, flags, port, addresses);
	rewrite_mac(h->eth, o);
	if (rare && o->dst_len)
		rewrite_group_mac(h->eth, o, dst);
	return REWRITTEN;
}

static __always_inline __u64 rewrite_addr6(struct in6_addr *addr, const __u8 *to)
{
	__u64 delta = 0;
	int i;

#pragma unroll
	for (i = 0; i < 4; i++) {
		delta += delta32(addr->in6_u.u6_addr32[i], word(to, i));
		addr->in6_u.u6_addr32[i] = word(to, i);
	}
	return delta;
}

static __always_inline __u32 rewrite_ip6(struct headers *h, const struct output *o, bool rare)
{
	struct ipv6hdr *ip = h->ip6;
	__u8 ttl = new_ttl(o, ip->hop_limit, rare);
	__u64 addresses = 0;
	__u16 port = 0;

	if (!ttl)
		return DROP_TTL;
	if (h->udp) {
		port = new_port(h->udp, o, rare);
		if (rare && !port)
			return DROP_PORT;
	}
	if (rare && o->dst_len) {
		__u32 i;

#pragma unroll
		for (i = 0; i < 4; i++) {
			__u32 *to = &ip->daddr.in6_u.u6_addr32[i],
			      mask = prefix_mask(o->dst_len, i);
			__u32 dst = (word(o->dst, i) & mask) | (*to & ~mask);

			addresses += delta32(*to, dst);
			*to = dst;
		}
	} else {
		addresses = rewrite_addr6(&ip->daddr, o->dst);
	}
	if (o->flags & OUTPUT_SOURCE_SET)
		addresses += rewrite_addr6(&ip->saddr, o->src);
	ip->hop_limit = ttl;
	if (o->flags & OUTPUT_DSCP_SET) {
		/* The traffic class lies across the first two bytes. */
		__u8 *b = (__u8 *)ip;

		b[0] = (b[0] & 0xf0) | o->dscp >> 2;
		b[1] = (o->dscp & 0x03) << 6 | (b[1] & 0x3f);
	}
	if (h->udp)
		rewrite_udp(h->udp, o, o->flags, port, addresses);
	rewrite_mac(h->eth, o);
	if (rare && o->dst_len)
		rewrite_group_mac(h->eth, o, ip->daddr.in6_u.u6_addr32[3]);
	return REWRITTEN;
}

/* Rewrites a frame of a routed flow for an output: the MACs, and a TTL one less. The relay program
 * has checked the rest (routed.h). False if the frame ends in front of the header's end.
 */
static __always_inline bool route_frame(void *data, void *data_end, const struct output *o)
{
	struct ethhdr *eth = data;
	struct iphdr *ip4 = (void *)(eth + 1);
	struct ipv6hdr *ip6 = (void *)(eth + 1);
	__u32 check;

	if (o->family == 4) {
		if ((void *)(ip4 + 1) > data_end)
			return false;
		ip4->ttl--;
		check = ip4->check + (__u32)bpf_htons(0x0100);
		ip4->check = check + (check >= 0xffff); /* ip_decrease_ttl of include/net/ip.h */
	} else {
		if ((void *)(ip6 + 1) > data_end)
			return false;
		ip6->hop_limit--;
	}
	rewrite_mac(eth, o);
	return true;
}
