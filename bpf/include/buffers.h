/* SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0-only) */
/* Frames in several buffers, which programs get since Linux 5.18. */
#pragma once

#include <linux/bpf.h>
#include <linux/types.h>

#include <bpf/bpf_helpers.h>

/* The length of a frame's first buffer in bytes. bpf_xdp_get_buff_len returns that of all buffers;
 * the loader replaces it by this if the kernel lacks it.
 */
static __always_inline __u32 first_buffer(struct xdp_md *ctx)
{
	return ctx->data_end - ctx->data;
}
