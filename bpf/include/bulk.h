/* SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0-only) */
/* Shared by the egress program and the tracepoint after it, which run successively on one CPU for
 * each bulk of frames to a device (bq_xmit_all of kernel/bpf/devmap.c).
 */
#pragma once

#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

#include "abi.h"

/* egress_drops: one entry, frames that the egress program dropped from the current bulk. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct egress_drops);
} egress_drops SEC(".maps");
