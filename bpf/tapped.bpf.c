//go:build ignore

// SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0-only)
/* The tapped program: at the start of traffic control (tcx ingress) on inputs of the fanout path.
 * There the packet taps already have their packets, but the stack does not
 * (__netif_receive_skb_core of net/core/dev.c): it drops packets that the workers take, so that no
 * receiver, bridge or multicast route of the host gets them. It needs no XDP on the interface, and
 * decides like the relay program.
 */
#include <linux/if_packet.h>
#include <linux/pkt_cls.h>

#include "fragment.h"
#include "lookup.h"
#include "own.h"

/* The length of the link-layer header: 0 on devices without one (tun, WireGuard). Set at
 * load.
 */
const volatile __u32 link_header = ETH_HLEN;

/* The maximum length of all headers before UDP and its payload: with one tag, since the kernel has
 * removed the other.
 */
#define HEADERS                                                                                    \
	(ETH_HLEN + sizeof(struct vlan_hdr) + sizeof(struct ipv6hdr) + MAX_EXTENSION_BYTES +       \
	 sizeof(struct udphdr))

/* Pulls the headers into the linear part of the buffer, where they nearly always are. */
static __always_inline void show_headers(struct __sk_buff *skb)
{
	__u32 shown = skb->data_end - skb->data;

	if (__builtin_expect(shown < HEADERS && shown < skb->len, 0))
		bpf_skb_pull_data(skb, skb->len < HEADERS ? skb->len : HEADERS);
}

/* Everything before IP, as parse_eth would see it in a frame with all its tags. Returns the
 * EtherType in network order, 0 for frames that the relay program does not take.
 */
static __always_inline __be16 parse_link(struct __sk_buff *skb, void *data, void *data_end,
					 struct headers *h)
{
	struct ethhdr *eth = data;
	__be16 proto = skb->protocol;
	__u32 tags, start = link_header;

	if (link_header) {
		if ((void *)(eth + 1) > data_end)
			return 0;
		/* A buffer copied by generic XDP has no mac_len (Linux 6.18): its data then begins
		 * after the Ethernet header.
		 */
		if (eth->h_proto != proto)
			start = 0;
	}
	h->l3_offset = start;
	proto = parse_tags(data + start, data_end, proto, h);
	/* The kernel has removed the outer one. */
	if (skb->vlan_present) {
		tags = (h->l3_offset - start) / sizeof(struct vlan_hdr);
		if (tags == MAX_VLAN_TAGS)
			return 0;
		if (tags)
			h->outer_vlan = skb->vlan_tci & VLAN_VID_MASK;
		else
			h->vlan = skb->vlan_tci & VLAN_VID_MASK;
	}
	return proto;
}

/* Whether a frame was sent to the MAC address of the flow's input. */
static __always_inline bool to_input(struct __sk_buff *skb, const struct flow *flow)
{
	__u64 room = 0;
	__u8 *mac = (__u8 *)&room + 2; /* where same_mac may read words */

	if (!link_header)
		return true;
	return !bpf_skb_load_bytes_relative(skb, 0, mac, ETH_ALEN, BPF_HDR_START_MAC) &&
	       same_mac(mac, flow->input_mac);
}

/* Whether a rule of the fanout path takes a packet and keeps it from the host. */
static __always_inline bool ours(struct __sk_buff *skb, struct headers *h, bool ip4)
{
	__u32 ifindex = skb->ifindex;
	struct flow *flow;
	__u16 port;

	port = h->udp ? bpf_ntohs(h->udp->dest) : fragment_port(ifindex, h, ip4);
	if (!port && !h->udp)
		return false;
	flow = ip4 ? lookup4(ifindex, h, port) : lookup6(ifindex, h, port);
	if (!flow || flow->path != PATH_FANOUT)
		return false;
	if ((__u64)h->l3_offset + h->l3_len > skb->len)
		return false;
	if (flow->flags & FLOW_UNICAST && !to_input(skb, flow))
		return false;
	/* The relay program, which checks this otherwise, may not be attached. */
	if (h->part == PART_FIRST)
		remember_fragment(ifindex, h, ip4);
	return !(flow->flags & FLOW_LOCAL);
}

static __always_inline bool taken(struct __sk_buff *skb)
{
	struct headers h;
	void *data, *data_end;
	__be16 proto;

	/* Packets between processes of this host: no packet tap has seen them. */
	if (skb->pkt_type == PACKET_LOOPBACK)
		return false;
	show_headers(skb);
	data = (void *)(long)skb->data;
	data_end = (void *)(long)skb->data_end;
	proto = parse_link(skb, data, data_end, &h);
	if (proto == bpf_htons(ETH_P_IP))
		return parse_ip4(data_end, &h) && ours(skb, &h, true);
	if (proto == bpf_htons(ETH_P_IPV6))
		return parse_ip6(data_end, &h) && ours(skb, &h, false);
	return false;
}

SEC("tcx/ingress")
int tapped(struct __sk_buff *skb)
{
	struct counter *c;

	if (!taken(skb))
		return TC_ACT_UNSPEC; /* the next program, if there is one */
	c = bpf_map_lookup_elem(&kept, &zero);
	if (c)
		count(c, skb->len);
	return TC_ACT_SHOT;
}

char _license[] SEC("license") = "Dual BSD/GPL";
