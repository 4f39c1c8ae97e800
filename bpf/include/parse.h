/* SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0-only) */
/* From a frame to its headers. No decisions are made here: a frame that is not UDP over IP, or
 * incomplete, is simply not ours.
 */
#pragma once

#include <stdbool.h>
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/udp.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#include "abi.h"

/* Hides a pointer's value from the compiler and keeps it from moving arithmetic on it, which the
 * verifier rejects.
 */
#define OPAQUE(p) asm volatile("" : "+r"(p))

/* Shifts by the lower 6 bits of n: the instruction does so, where C would need a mask. */
static __always_inline __u64 shift_right(__u64 x, __u64 n)
{
	asm("%0 >>= %1" : "+r"(x) : "r"(n));
	return x;
}

#define MAX_VLAN_TAGS 2
#define VLAN_VID_MASK 0x0fff

#define IP_MF 0x2000
#define IP_OFFSET 0x1fff

struct vlan_hdr {
	__be16 tci;
	__be16 proto;
};

/* Which part of a datagram a packet is. */
enum part {
	PART_WHOLE,
	PART_FIRST, /* first of several fragments */
	PART_LATER, /* without ports */
};

struct headers {
	struct ethhdr *eth;
	union {
		void *l3;
		struct iphdr *ip4;
		struct ipv6hdr *ip6;
	};
	struct udphdr *udp; /* NULL in later fragments */
	__u32 l3_offset;
	__u32 l3_len;	   /* bytes of IP packet, without trailing padding */
	__u32 fragment_id; /* unless PART_WHOLE */
	__u16 vlan; /* VLAN of the only tag, or of the inner one; 0: none, or a priority tag */
	__u16 outer_vlan;	     /* of the outer of two tags */
	__u8 part;		     /* enum part */
	const struct output *output; /* the rule's only output, if in the shortcut */
};

/* Returns x, with a value unknown to the verifier: it tracks each constant separately, through all
 * code that follows, and so would verify everything once for each number of tags and kind of
 * extension headers.
 */
__noinline int forget(int x)
{
	asm volatile("" : "+r"(x));
	return x;
}

/* The same where a call costs too much; any is a number that the verifier does not know. */
#define FORGET(x, any) asm volatile("%0 += %1\n\t%0 -= %1" : "+r"(x) : "r"((__u64)(any)))

/* The offset of UDP in the frame; 0 in later fragments. */
static __always_inline __u32 udp_offset(const struct headers *h)
{
	return h->udp ? (void *)h->udp - (void *)h->eth : 0;
}

static __always_inline bool is_vlan(__be16 proto)
{
	return proto == bpf_htons(ETH_P_8021Q) || proto == bpf_htons(ETH_P_8021AD);
}

/* Up to two VLAN tags at h->l3_offset. Returns the EtherType after them in network order, 0 if the
 * frame is too short.
 */
static __always_inline __be16 parse_tags(struct vlan_hdr *tag, void *data_end, __be16 proto,
					 struct headers *h)
{
	int i;

	h->vlan = 0;
	h->outer_vlan = 0;
#pragma unroll
	for (i = 0; i < MAX_VLAN_TAGS; i++) {
		if (!is_vlan(proto))
			break;
		if ((void *)(tag + 1) > data_end)
			return 0;
		h->outer_vlan = h->vlan;
		h->vlan = bpf_ntohs(tag->tci) & VLAN_VID_MASK;
		proto = tag->proto;
		h->l3_offset += sizeof(*tag);
		tag++;
	}
	h->l3 = tag;
	return proto;
}

/* Ethernet and up to two VLAN tags. Returns the EtherType in network order, 0 if the frame is too
 * short.
 */
static __always_inline __be16 parse_eth(void *data, void *data_end, struct headers *h)
{
	struct ethhdr *eth = data;
	__u64 offset;
	__be16 proto;

	if ((void *)(eth + 1) > data_end)
		return 0;
	h->eth = eth;
	h->l3_offset = sizeof(*eth);
	h->vlan = 0;
	h->outer_vlan = 0;
	proto = eth->h_proto;
	if (__builtin_expect(is_vlan(proto), 0)) {
		proto = parse_tags(data + (forget(sizeof(*eth)) & 0x1f), data_end, proto, h);
		h->outer_vlan = forget(h->outer_vlan);
	}
	/* Even without tags: one state to verify, and not one more. */
	offset = h->l3_offset;
	FORGET(offset, proto);
	h->l3_offset = offset & 0x1f;
	h->l3 = data + h->l3_offset;
	return proto;
}

/* l3_len of UDP that exceeds its packet: longer than any frame. */
#define MALFORMED 0x7fffffff

/* UDP at the given distance from h->l3, in l3_len bytes of IP packet. If malformed, it gets the
 * length MALFORMED, so that its rule can note it.
 */
static __always_inline bool parse_udp(void *data_end, struct headers *h, __u32 l3_header_len)
{
	struct udphdr *udp = h->l3 + l3_header_len;
	__u32 len;

	if ((void *)(udp + 1) > data_end)
		return false;
	h->udp = udp;
	len = bpf_ntohs(udp->len);
	/* A first fragment's datagram is longer than the fragment. */
	if (len < sizeof(*udp) || (h->part == PART_WHOLE && l3_header_len + len > h->l3_len))
		h->l3_len = MALFORMED;
	return true;
}

static __always_inline bool parse_ip4(void *data_end, struct headers *h)
{
	struct iphdr *ip = h->l3;
	__u32 header_len;
	__be16 frag;

	if ((void *)(ip + 1) > data_end || ip->version != 4 || ip->protocol != IPPROTO_UDP)
		return false;
	header_len = ip->ihl * 4;
	if (header_len < sizeof(*ip))
		return false;
	h->l3_len = bpf_ntohs(ip->tot_len);
	h->part = PART_WHOLE;
	h->fragment_id = 0;
	frag = ip->frag_off & bpf_htons(IP_MF | IP_OFFSET);
	if (__builtin_expect(frag != 0, 0)) {
		h->fragment_id = ip->id;
		h->part = forget(PART_FIRST);
		if (frag & bpf_htons(IP_OFFSET)) {
			h->part = forget(PART_LATER);
			h->udp = NULL;
			return h->l3_len > header_len && h->l3 + header_len <= data_end;
		}
	}
	if (h->l3_len < header_len + sizeof(struct udphdr))
		h->l3_len = MALFORMED;
	return parse_udp(data_end, h, header_len);
}

/* The number of extension headers that are parsed (RFC 8200 section 4), and their length: handover
 * has one byte for the offset of UDP.
 */
#define MAX_EXTENSIONS 4
#define MAX_EXTENSION_BYTES 160

struct fragment_hdr { /* RFC 8200 section 4.5 */
	__u8 nexthdr;
	__u8 reserved;
	__be16 offset; /* of 8 bytes in the upper 13 bits; the last bit: more fragments */
	__be32 id;
};

#define IP6_MF 1
#define IP6_OFFSET 0xfff8

/* The headers between the IPv6 header and UDP. Returns the length of all headers before UDP, 0 if
 * something else follows. Out of line: rare.
 */
static __noinline __u32 walk_extensions(void *l3, void *data_end, __u32 next, struct headers *h)
{
	__u32 len = forget(sizeof(struct ipv6hdr)) & 0xff;
	int i;

	for (i = 0; i < MAX_EXTENSIONS && next != IPPROTO_UDP; i++) {
		struct ipv6_opt_hdr *ext = l3 + len;

		if (len > sizeof(struct ipv6hdr) + MAX_EXTENSION_BYTES - 8 ||
		    (void *)ext + 8 > data_end)
			return 0;
		if (next == IPPROTO_FRAGMENT) {
			struct fragment_hdr *frag = (void *)ext;

			if (h->part != PART_WHOLE)
				return 0;
			h->fragment_id = frag->id;
			next = frag->nexthdr;
			len += sizeof(*frag);
			if (frag->offset & bpf_htons(IP6_OFFSET)) {
				/* The beginning of the first fragment, which alone has it: UDP, or
				 * options before it.
				 */
				h->part = PART_LATER;
				return next == IPPROTO_UDP || next == IPPROTO_DSTOPTS ? len : 0;
			}
			if (frag->offset & bpf_htons(IP6_MF))
				h->part = PART_FIRST;
			continue;
		}
		if (next != IPPROTO_HOPOPTS && next != IPPROTO_DSTOPTS)
			return 0;
		next = ext->nexthdr;
		len += (ext->hdrlen + 1) * 8;
	}
	return next == IPPROTO_UDP && len <= sizeof(struct ipv6hdr) + MAX_EXTENSION_BYTES ? len : 0;
}

static __always_inline bool parse_ip6(void *data_end, struct headers *h)
{
	struct ipv6hdr *ip = h->l3;
	__u32 len = sizeof(*ip);

	if ((void *)(ip + 1) > data_end || ip->version != 6)
		return false;
	h->part = PART_WHOLE;
	h->fragment_id = 0;
	h->l3_len = sizeof(*ip) + bpf_ntohs(ip->payload_len);
	if (__builtin_expect(ip->nexthdr != IPPROTO_UDP, 0)) {
		len = walk_extensions(ip, data_end, ip->nexthdr, h);
		if (!len || len > sizeof(*ip) + MAX_EXTENSION_BYTES || len >= h->l3_len)
			return false;
		len = forget(len) & 0xff;
		h->part = forget(h->part);
		if (h->part == PART_LATER) {
			h->udp = NULL;
			return true;
		}
	}
	return parse_udp(data_end, h, len);
}
