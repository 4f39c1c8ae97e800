//go:build ignore

// SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0-only)
/* The fate of redirected frames after the programs have returned: the kernel only reports it
 * through tracepoints. Optional: without BTF in the kernel the relay works and these counters stay
 * empty.
 */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>

#include "abi.h"
#include "bulk.h"

/* The fields of the kernel's structs that are used; their offsets are relocated. */
struct net {
	__u64 net_cookie;
} __attribute__((preserve_access_index));

typedef struct {
	struct net *net;
} __attribute__((preserve_access_index)) possible_net_t;

struct net_device {
	int ifindex;
	possible_net_t nd_net;
} __attribute__((preserve_access_index));

/* device_stats: output interface -> frames lost after the programs. The loader creates an entry for
 * each output interface.
 */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_HASH);
	__uint(max_entries, 1024);
	__type(key, __u32);
	__type(value, struct device_stats);
} device_stats SEC(".maps");

/* device_rows: row of devices -> ifindex, which a tracepoint does not get. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1024);
	__type(key, __u32);
	__type(value, __u32);
} device_rows SEC(".maps");

/* The network namespace of the interfaces: the tracepoints fire for devices of all namespaces. Set
 * at load.
 */
const volatile __u64 netns_cookie = 0;

/* The id of the map devices; set at load. */
const volatile __u32 devices_id = 0;

/* cpu_drops: one entry, frames lost on their way to the CPUs that they were steered to. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} cpu_drops SEC(".maps");

/* The id of the map cpus; set at load. */
const volatile __u32 cpus_id = 0;

/* The driver's answer to a bulk of frames for one device. */
SEC("tp_btf/xdp_devmap_xmit")
int BPF_PROG(devmap_xmit, const struct net_device *from, const struct net_device *to, int sent,
	     int dropped, int err)
{
	struct egress_drops *own;
	struct device_stats *stats;
	__u32 ifindex, key = 0, by_program = 0;

	if (dropped <= 0 || to->nd_net.net->net_cookie != netns_cookie)
		return 0;
	ifindex = to->ifindex;
	own = bpf_map_lookup_elem(&egress_drops, &key);
	if (own && own->ifindex == ifindex) {
		by_program = own->packets;
		own->packets = 0;
	}
	if (by_program >= (__u32)dropped)
		return 0;
	stats = bpf_map_lookup_elem(&device_stats, &ifindex);
	if (stats)
		stats->transmit_drops += dropped - by_program;
	return 0;
}

/* A redirect through devices that the kernel refused: the device is down, or the frame too long for
 * it.
 */
SEC("tp_btf/xdp_redirect_err")
int BPF_PROG(redirect_err, const struct net_device *dev, const void *prog, const void *target,
	     int err, __u32 map_type, __u32 map_id, __u32 row)
{
	struct device_stats *stats;
	__u32 *ifindex;

	if (map_id != devices_id)
		return 0;
	ifindex = bpf_map_lookup_elem(&device_rows, &row);
	if (!ifindex)
		return 0;
	stats = bpf_map_lookup_elem(&device_stats, ifindex);
	if (stats)
		stats->redirect_errors++;
	return 0;
}

static __always_inline int cpu_drop(__u32 map_id, __u32 drops)
{
	__u32 key = 0;
	__u64 *sum;

	if (map_id != cpus_id || !drops)
		return 0;
	sum = bpf_map_lookup_elem(&cpu_drops, &key);
	if (sum)
		*sum += drops;
	return 0;
}

/* A queue to a CPU had no room for some frames of a bulk. */
SEC("tp_btf/xdp_cpumap_enqueue")
int BPF_PROG(cpumap_enqueue, int map_id, unsigned int processed, unsigned int drops, int to_cpu)
{
	return cpu_drop(map_id, drops);
}

/* The CPU had no memory for the packets of some frames. */
SEC("tp_btf/xdp_cpumap_kthread")
int BPF_PROG(cpumap_kthread, int map_id, unsigned int processed, unsigned int drops, int sched)
{
	return cpu_drop(map_id, drops);
}

char _license[] SEC("license") = "Dual BSD/GPL";
