/* SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0-only) */
/* Packets sent by this host must not loop: a relay that takes its own output again floods the
 * network. They are recognised by their MAC on the same link, by their address after routers and
 * other relays.
 */
#pragma once

#include "maps.h"
#include "parse.h"

static __always_inline bool same_mac(const __u8 *x, const __u8 *y)
{
	/* The last bytes first: the first ones are the vendor's. */
	return *(const __u32 *)(x + 2) == *(const __u32 *)(y + 2) &&
	       *(const __u16 *)x == *(const __u16 *)y;
}

/* The bit of config.own for an address: the last byte of a multiplicative hash. */
static __always_inline __u32 own_bit(__u32 sum)
{
	return (__u32)(sum * 0x9e3779b1U) >> 24;
}

/* Out of line: only for packets whose bit is set. */
static __noinline bool own_address4(__u32 addr)
{
	struct own_address key = {.address = {[10] = 0xff, [11] = 0xff}};

	*(__u32 *)(key.address + 12) = addr;
	return bpf_map_lookup_elem(&own_addresses, &key);
}

static __noinline bool own_address6(const struct in6_addr *addr)
{
	return bpf_map_lookup_elem(&own_addresses, addr);
}

/* The bit of config.own_macs for a MAC address: of its last four bytes, since the first ones are
 * the vendor's.
 */
static __always_inline __u32 own_mac_bit(const __u8 *mac)
{
	return (*(const __u32 *)(mac + 2) * 0x9e3779b1U) >> 23;
}

static __noinline bool own_mac(const __u8 *mac)
{
	struct own_mac key = {};

	__builtin_memcpy(key.mac, mac, sizeof(key.mac));
	return bpf_map_lookup_elem(&own_macs, &key);
}

/* Whether some interface of this host has the frame's source MAC: a copy carries that of its
 * output, which may lead to the LAN of the input.
 */
static __always_inline bool from_own_mac(const struct config *cfg, const struct headers *h)
{
	__u32 bit = own_mac_bit(h->eth->h_source);

	if (__builtin_expect(
		    !(cfg->own_macs[(bit >> 6) & (OWN_MAC_WORDS - 1)] & 1ULL << (bit & 63)), 1))
		return false;
	return own_mac(h->eth->h_source);
}

static __always_inline bool own_packet(const struct config *cfg, const struct headers *h,
				       const struct flow *flow, bool ip4)
{
	struct in6_addr addr;
	__u32 bit;

	if (flow->flags & FLOW_ALLOW_LOOP)
		return false;
	if (same_mac(h->eth->h_source, flow->input_mac) || from_own_mac(cfg, h))
		return true;
	if (ip4) {
		bit = own_bit(h->ip4->saddr);
	} else {
		addr = h->ip6->saddr;
		bit = own_bit(addr.in6_u.u6_addr32[0] ^ addr.in6_u.u6_addr32[1] ^
			      addr.in6_u.u6_addr32[2] ^ addr.in6_u.u6_addr32[3]);
	}
	if (__builtin_expect(!(cfg->own[(bit >> 6) & (OWN_WORDS - 1)] & 1ULL << (bit & 63)), 1))
		return false;
	return ip4 ? own_address4(h->ip4->saddr) : own_address6(&addr);
}
