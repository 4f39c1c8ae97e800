/* SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0-only) */
/* Between the egress program and the tracepoint behind it, which run one after the other
 * on one CPU for each bulk of frames to a device (bq_xmit_all of kernel/bpf/devmap.c).
 */
#pragma once

#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

#include "abi.h"

/* egress_drops: one entry, what the egress program dropped of the bulk in hand. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct egress_drops);
} egress_drops SEC(".maps");
