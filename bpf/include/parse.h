/* SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0-only) */
/* From a frame to its headers. Nothing here decides anything: a frame that is
 * not UDP over IP, or not whole, is simply not ours.
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

#define MAX_VLAN_TAGS 2
#define VLAN_VID_MASK 0x0fff

#define IP_MF 0x2000
#define IP_OFFSET 0x1fff

struct vlan_hdr {
	__be16 tci;
	__be16 proto;
};

struct headers {
	struct ethhdr *eth;
	union {
		void *l3;
		struct iphdr *ip4;
		struct ipv6hdr *ip6;
	};
	struct udphdr *udp;
	__u32 l3_offset;
	__u32 l3_len;  /* bytes of IP packet, without padding behind it */
	__u16 vlan;    /* VLAN of the outer tag; 0: none, or a priority tag */
	bool fragment; /* first of several */
};

static __always_inline bool is_vlan(__be16 proto)
{
	return proto == bpf_htons(ETH_P_8021Q) || proto == bpf_htons(ETH_P_8021AD);
}

/* Ethernet and up to two VLAN tags. Returns the EtherType in network order, 0
 * when the frame is too short.
 */
static __always_inline __be16 parse_eth(void *data, void *data_end, struct headers *h)
{
	struct ethhdr *eth = data;
	struct vlan_hdr *tag = (void *)(eth + 1);
	__be16 proto;
	int i;

	if ((void *)(eth + 1) > data_end)
		return 0;
	h->eth = eth;
	h->vlan = 0;
	h->l3_offset = sizeof(*eth);
	proto = eth->h_proto;
#pragma unroll
	for (i = 0; i < MAX_VLAN_TAGS; i++) {
		if (!is_vlan(proto))
			break;
		if ((void *)(tag + 1) > data_end)
			return 0;
		if (!h->vlan)
			h->vlan = bpf_ntohs(tag->tci) & VLAN_VID_MASK;
		proto = tag->proto;
		h->l3_offset += sizeof(*tag);
		tag++;
	}
	h->l3 = tag;
	return proto;
}

/* UDP behind h->l3 at the given distance, with l3_len bytes of IP packet. */
static __always_inline bool parse_udp(void *data_end, struct headers *h, __u32 l3_header_len)
{
	struct udphdr *udp = h->l3 + l3_header_len;
	__u32 len;

	if ((void *)(udp + 1) > data_end)
		return false;
	h->udp = udp;
	len = bpf_ntohs(udp->len);
	/* The length of a first fragment's datagram goes beyond the fragment. */
	if (len < sizeof(*udp) || (!h->fragment && l3_header_len + len > h->l3_len))
		return false;
	return true;
}

static __always_inline bool parse_ip4(void *data_end, struct headers *h)
{
	struct iphdr *ip = h->l3;
	__u32 header_len;
	__u16 frag;

	if ((void *)(ip + 1) > data_end || ip->version != 4 || ip->protocol != IPPROTO_UDP)
		return false;
	header_len = ip->ihl * 4;
	if (header_len < sizeof(*ip))
		return false;
	frag = bpf_ntohs(ip->frag_off);
	/* Later fragments have no ports. */
	if (frag & IP_OFFSET)
		return false;
	h->fragment = frag & IP_MF;
	h->l3_len = bpf_ntohs(ip->tot_len);
	if (h->l3_len < header_len + sizeof(struct udphdr))
		return false;
	return parse_udp(data_end, h, header_len);
}

static __always_inline bool parse_ip6(void *data_end, struct headers *h)
{
	struct ipv6hdr *ip = h->l3;

	if ((void *)(ip + 1) > data_end || ip->version != 6 || ip->nexthdr != IPPROTO_UDP)
		return false;
	h->fragment = false;
	h->l3_len = sizeof(*ip) + bpf_ntohs(ip->payload_len);
	return parse_udp(data_end, h, sizeof(*ip));
}
