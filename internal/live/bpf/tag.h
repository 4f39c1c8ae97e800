/* SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0-only) */
/* What the source writes into a frame and the receiving programs look for: addresses,
 * ports and a tag at the start of the UDP payload. Frames are IPv4 without options or
 * VLAN tags.
 */
#ifndef LIVE_TAG_H
#define LIVE_TAG_H

#include <linux/types.h>

/* Offsets in a frame: Ethernet 14, IPv4 20, UDP 8. */
enum {
	OFF_MAC_GROUP = 2,
	OFF_ETHER_TYPE = 12,
	OFF_IP = 14,
	OFF_IP_LEN = 16,
	OFF_IP_PROTOCOL = 23,
	OFF_IP_CHECK = 24,
	OFF_IP_SRC = 26,
	OFF_IP_DST = 30,
	OFF_UDP_SRC = 34,
	OFF_UDP_DST = 36,
	OFF_UDP_LEN = 38,
	OFF_UDP_CHECK = 40,
	OFF_TAG = 42,
	HEADER_LEN = OFF_UDP_CHECK,
	LEAST_FRAME = OFF_TAG + 16,
};

/* The tag, in the machine's byte order. */
struct tag {
	__u32 trial; /* frames of another one are strays */
	__u32 flow;
	__u32 seq;   /* from 0, each flow its own */
	__u32 stamp; /* the low half of bpf_ktime_get_ns() >> the source's stamp_shift; 0 in frames
			without */
};

/* Limits that the maps are made for. */
#define MAX_OUTPUTS 64
#define MAX_FLOWS 4096

/* Folds a sum of 16-bit and 32-bit words to 16 bits (RFC 1071). */
static inline __u16 fold(__u64 sum)
{
	sum = (sum & 0xffffffff) + (sum >> 32);
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	return (sum & 0xffff) + (sum >> 16);
}

#define MIXED_LONGEST 1514 /* bytes of the longest of mixed frames */

#endif
