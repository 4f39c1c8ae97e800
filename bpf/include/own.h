/* SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0-only) */
/* Packets sent by this host must not loop: a relay that takes its own output again floods the
 * network. They are recognised by their MAC on the same link, by their address after routers and
 * other relays.
 */
#pragma once

#include "config.h"
#include "maps.h"
#include "parse.h"

/* Whether a filter of map config has a bit, which is in range. */
static __always_inline bool own_filter(const __u64 *filter, __u32 bit)
{
	return shift_right(filter[bit >> 6], bit) & 1;
}

/* The bit of config.own for an address: the last byte of a multiplicative hash. */
static __always_inline __u32 own_bit(__u32 sum)
{
	return (__u32)(sum * 0x9e3779b1U) >> 24;
}

/* Out of line: only for packets whose bit is set. Global, with numbers as arguments, so that the
 * verifier looks at it once, and not in each state of each caller.
 */
__noinline int own_address4(__u32 addr)
{
	struct own_address key = {.address = {[10] = 0xff, [11] = 0xff}};

	*(__u32 *)(key.address + 12) = addr;
	return !!bpf_map_lookup_elem(&own_addresses, &key);
}

/* The halves of the address in network order. */
__noinline int own_address6(__u64 first, __u64 second)
{
	__u64 key[2] = {first, second};

	return !!bpf_map_lookup_elem(&own_addresses, key);
}

/* The last four bytes of a MAC address: the first ones are the vendor's. */
static __always_inline __u32 mac_end(const __u8 *mac)
{
	return *(const __u32 *)(mac + 2);
}

/* The bit of config.own_macs for the end of a MAC address. */
static __always_inline __u32 own_mac_bit(__u32 end)
{
	return (end * 0x9e3779b1U) >> 23;
}

static __always_inline bool same_mac(const __u8 *x, const __u8 *y)
{
	return mac_end(x) == mac_end(y) && *(const __u16 *)x == *(const __u16 *)y;
}

/* The first two and the last four bytes of the MAC address. */
__noinline int own_mac(__u16 begin, __u32 end)
{
	struct own_mac key = {};

	*(__u16 *)key.mac = begin;
	__builtin_memcpy(key.mac + 2, &end, sizeof(end));
	return !!bpf_map_lookup_elem(&own_macs, &key);
}

/* Whether some interface of this host has the frame's source MAC: a copy carries that of its
 * output, which may lead to the LAN of the input.
 */
static __always_inline bool from_own_mac(const struct headers *h)
{
	__u32 end = mac_end(h->eth->h_source);

	if (__builtin_expect(!own_filter(settings.own_macs, own_mac_bit(end)), 1))
		return false;
	return own_mac(*(const __u16 *)h->eth->h_source, end);
}

static __always_inline bool own_packet(const struct headers *h, const struct flow *flow, bool ip4)
{
	const __u32 *words;
	__u32 bit;

	if (flow->flags & FLOW_ALLOW_LOOP)
		return false;
	if (same_mac(h->eth->h_source, flow->input_mac) || from_own_mac(h))
		return true;
	if (ip4) {
		bit = own_bit(h->ip4->saddr);
	} else {
		words = h->ip6->saddr.in6_u.u6_addr32;
		bit = own_bit(words[0] ^ words[1] ^ words[2] ^ words[3]);
	}
	if (__builtin_expect(!own_filter(settings.own, bit), 1))
		return false;
	if (ip4)
		return own_address4(h->ip4->saddr);
	words = h->ip6->saddr.in6_u.u6_addr32;
	return own_address6(words[0] | (__u64)words[1] << 32, words[2] | (__u64)words[3] << 32);
}

/* What own_packet looks at first, of an IPv4 packet: false for nearly all packets of others,
 * whatever the flow's flags.
 */
static __always_inline bool maybe_own4(const struct headers *h, const struct flow *flow)
{
	__u32 end = mac_end(h->eth->h_source);

	return end == mac_end(flow->input_mac) || own_filter(settings.own_macs, own_mac_bit(end)) ||
	       own_filter(settings.own, own_bit(h->ip4->saddr));
}
