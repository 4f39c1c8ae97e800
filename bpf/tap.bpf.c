//go:build ignore

// SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0-only)
/* The tap: tracing programs (fentry, fexit) on the relay and egress programs, loaded
 * only while a tap runs. The traced programs are not changed, and know nothing of
 * them.
 *
 * The account identifies a frame's rule: if a rule's counter grows while the relay
 * program runs, the packet belongs to that rule; if an output's counter grows, it was
 * sent by that output. The programs run from entry to exit on one CPU, and the
 * counters are per CPU.
 */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>
#include <stdbool.h>

#include "maps.h"
#include "tap.h"

static const __u32 zero;

EXPORT_TYPE(struct, tap_record);
EXPORT_TYPE(struct, tap_drop);
EXPORT_TYPE(enum, tap_flag);

/* The fields of the kernel's structs that are used; their offsets are relocated. */
struct net_device {
	int ifindex;
} __attribute__((preserve_access_index));

struct xdp_rxq_info {
	struct net_device *dev;
} __attribute__((preserve_access_index));

struct xdp_txq_info {
	struct net_device *dev;
} __attribute__((preserve_access_index));

struct xdp_buff {
	void *data;
	void *data_end;
	struct xdp_rxq_info *rxq;
	struct xdp_txq_info *txq;
} __attribute__((preserve_access_index));

/* What to record. Set at load. */
const volatile bool want_in = true;
const volatile bool want_dropped = true;
const volatile __u64 want_slots = 0; /* one bit each */
const volatile __u32 sample = 1;     /* one packet in this many, by rule and CPU */
const volatile __u32 snap = 1;	     /* bytes of a frame; at most TAP_MAX_SNAP */

/* The length of a record in the ring must fit 16 bits, including overhead. */
#define TAP_MAX_SNAP 0xf000

/* tapped_flows: interface -> flows of the rule. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 4096);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, __u32);
	__type(value, struct tap_flows);
} tapped_flows SEC(".maps");

/* tapped_outputs: stats of an output of the rule -> its slot. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 65536);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, __u32);
	__type(value, __u32);
} tapped_outputs SEC(".maps");

/* tap_events: a ring for each CPU. Only this type of map lets the kernel copy frames from all of
 * their buffers at once.
 */
struct {
	__uint(type, BPF_MAP_TYPE_PERF_EVENT_ARRAY);
	__type(key, __u32);
	__type(value, __u32);
} tap_events SEC(".maps");

/* tap_lost: one entry, packets for which the ring had no room. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} tap_lost SEC(".maps");

/* The values of a rule's counters when the relay program began. */
struct tap_before {
	__u64 packets;
	__u64 bytes;
	__u64 copies;
	__u64 handed;
};

/* From the entry of the relay program to its exit. */
struct tap_relay {
	struct tap_flows flows; /* n is 0: the frame is not of interest */
	struct tap_before before[TAP_FLOWS];
	__u32 length; /* of the frame's first buffer */
};

/* From the entry of the egress program to its exit. */
struct tap_egress {
	__u32 n; /* outputs of the tapped rule on the interface; 0: not a frame of it */
	__u32 stats[XDPCAST_MAX_SLOTS];
	__u64 packets[XDPCAST_MAX_SLOTS];
};

/* relay_run: one entry, the run of the relay program on this CPU. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct tap_relay);
} relay_run SEC(".maps");

/* egress_run: one entry, the run of the egress program on this CPU. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct tap_egress);
} egress_run SEC(".maps");

/* tap_records: the current record, 0 of the relay program and 1 of the egress program. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 2);
	__type(key, __u32);
	__type(value, struct tap_record);
} tap_records SEC(".maps");

enum { OF_RELAY, OF_EGRESS };

static __always_inline struct tap_record *record_of(__u32 which)
{
	return bpf_map_lookup_elem(&tap_records, &which);
}

static __always_inline void write_record(struct xdp_buff *xdp, struct tap_record *r)
{
	__u32 captured = r->length, key = 0, size;
	__u64 *lost;

	/* The incoming frame may be longer by its tags. */
	if (captured > snap + 8)
		captured = snap + 8;
	captured &= 0xffff;
	r->captured = captured;
	r->pad = 0;
	r->time_ns = bpf_ktime_get_ns();
	size = __builtin_offsetof(struct tap_record, head) + r->head_bytes;
	if (r->drops)
		size = __builtin_offsetof(struct tap_record, drop) +
		       r->drops * sizeof(struct tap_drop);
	if (size > sizeof(*r))
		return;
	if (!bpf_xdp_output(xdp, &tap_events, BPF_F_CURRENT_CPU | (__u64)captured << 32, r, size))
		return;
	lost = bpf_map_lookup_elem(&tap_lost, &key);
	if (lost)
		*lost += (r->flags & (TAP_IN | TAP_OUT)) == (TAP_IN | TAP_OUT) ? 2 : 1;
}

/* The loops are callbacks of bpf_loop (Linux 5.17), whose body the verifier checks once, rather
 * than each path through all iterations.
 */
static long note_before(__u32 i, void *unused)
{
	struct tap_relay *t = bpf_map_lookup_elem(&relay_run, &zero);
	struct rule_stats *s;
	__u32 id;

	if (!t || i >= TAP_FLOWS || i >= t->flows.n)
		return 1;
	id = t->flows.rule[i];
	s = bpf_map_lookup_elem(&rule_stats, &id);
	if (!s)
		return 0;
	t->before[i].packets = s->packets;
	t->before[i].bytes = s->bytes;
	t->before[i].copies = s->copies_packets;
	t->before[i].handed = s->handed_packets;
	return 0;
}

SEC("fentry/relay")
int BPF_PROG(relay_entry, struct xdp_buff *xdp)
{
	struct tap_relay *t = bpf_map_lookup_elem(&relay_run, &zero);
	struct tap_record *r = record_of(OF_RELAY);
	__u32 ifindex = xdp->rxq->dev->ifindex, head;
	struct tap_flows *flows;

	if (!t || !r)
		return 0;
	t->flows.n = 0;
	flows = bpf_map_lookup_elem(&tapped_flows, &ifindex);
	if (!flows)
		return 0;
	t->flows = *flows;
	bpf_loop(TAP_FLOWS, note_before, NULL, 0);
	t->length = xdp->data_end - xdp->data;
	r->drops = 0;
	r->head_bytes = 0;
	head = t->length;
	if (head > TAP_HEAD)
		head = TAP_HEAD;
	if ((want_in || want_dropped) && !bpf_probe_read_kernel(r->head, head, xdp->data))
		r->head_bytes = head;
	return 0;
}

static __always_inline void note_drop(__u32 which, __u32 scope, __u32 id, __u32 reason)
{
	struct tap_record *r = record_of(which);
	__u32 at;

	if (!r || r->drops >= TAP_DROPS || scope == DROP_UNKNOWN)
		return;
	at = r->drops & (TAP_DROPS - 1);
	r->drop[at].id = id;
	r->drop[at].scope = scope;
	r->drop[at].reason = reason;
	r->drops++;
}

SEC("fentry/count_drop")
int BPF_PROG(relay_drop, __u32 scope, __u32 id, __u32 reason)
{
	note_drop(OF_RELAY, scope, id, reason);
	return 0;
}

SEC("fentry/count_drop")
int BPF_PROG(egress_drop, __u32 scope, __u32 id, __u32 reason)
{
	note_drop(OF_EGRESS, scope, id, reason);
	return 0;
}

/* Whether the egress program still has to rewrite the frame. */
static __always_inline bool handed_over(struct xdp_buff *xdp)
{
	__u8 mark = 0;

	bpf_probe_read_kernel(&mark, sizeof(mark),
			      xdp->data + __builtin_offsetof(struct handover, mark));
	return mark == HANDOVER_MARK;
}

/* The fate of a packet of the tapped rule in a run of the relay program. */
struct relay_found {
	__u64 bytes; /* 0: it belonged to another rule */
	__u32 packets;
	__u32 rule;
	bool handed;
	bool copy;
};

static long find_flow(__u32 i, struct relay_found *found)
{
	struct tap_relay *t = bpf_map_lookup_elem(&relay_run, &zero);
	struct rule_stats *s;
	__u32 id;

	if (!t || i >= TAP_FLOWS || i >= t->flows.n)
		return 1;
	id = t->flows.rule[i];
	s = bpf_map_lookup_elem(&rule_stats, &id);
	if (!s || s->packets == t->before[i].packets)
		return 0;
	found->bytes = s->bytes - t->before[i].bytes;
	found->packets = s->packets;
	found->rule = id;
	found->handed = s->handed_packets != t->before[i].handed;
	found->copy = s->copies_packets != t->before[i].copies;
	return 1;
}

SEC("fexit/relay")
int BPF_PROG(relay_exit, struct xdp_buff *xdp, int verdict)
{
	struct tap_relay *t = bpf_map_lookup_elem(&relay_run, &zero);
	struct tap_record *r = record_of(OF_RELAY);
	struct relay_found found = {};
	__u8 flags;

	if (!t || !r || !t->flows.n)
		return 0;
	bpf_loop(TAP_FLOWS, find_flow, &found, 0);
	t->flows.n = 0;
	/* The same number as that used by the egress program. */
	if (!found.bytes || (sample > 1 && found.packets % sample))
		return 0;
	flags = found.copy ? TAP_COPY : 0;
	if (want_in || (want_dropped && (flags || r->drops)))
		flags |= TAP_IN;
	if (want_slots & 1 && verdict == XDP_REDIRECT && !found.handed && !handed_over(xdp))
		flags |= TAP_OUT;
	if (!(flags & (TAP_IN | TAP_OUT)))
		return 0;
	if (!(flags & TAP_IN))
		r->head_bytes = 0;
	r->flags = flags;
	r->ifindex = xdp->rxq->dev->ifindex;
	r->rule = found.rule;
	r->output = 0;
	r->grown = (__u32)(xdp->data_end - xdp->data) - t->length;
	r->length = found.bytes + r->grown;
	write_record(xdp, r);
	return 0;
}

/* The outputs of a frame that the egress program will rewrite. */
struct egress_outputs {
	__u32 first;
	__u32 outputs;
	__u32 ifindex;
};

static long note_output(__u32 slot, const struct egress_outputs *of)
{
	struct tap_egress *t = bpf_map_lookup_elem(&egress_run, &zero);
	__u32 index = of->first + slot, stats, n;
	struct output_stats *s;
	struct output *o;

	if (!t || slot >= of->outputs)
		return 1;
	o = bpf_map_lookup_elem(&outputs, &index);
	if (!o || o->ifindex != of->ifindex)
		return 0;
	stats = o->stats;
	s = bpf_map_lookup_elem(&output_stats, &stats);
	n = t->n;
	if (!s || n >= XDPCAST_MAX_SLOTS)
		return 0;
	t->stats[n] = stats;
	t->packets[n] = s->packets;
	t->n = n + 1;
	return 0;
}

SEC("fentry/egress")
int BPF_PROG(egress_entry, struct xdp_buff *xdp)
{
	struct tap_egress *t = bpf_map_lookup_elem(&egress_run, &zero);
	struct tap_record *r = record_of(OF_EGRESS);
	struct egress_outputs of = {};
	struct handover from = {};
	struct output *o;

	if (!t || !r)
		return 0;
	t->n = 0;
	if (bpf_probe_read_kernel(&from, sizeof(from), xdp->data) || from.mark != HANDOVER_MARK)
		return 0;
	of.first = from.first_output;
	o = bpf_map_lookup_elem(&outputs, &of.first);
	if (!o || !bpf_map_lookup_elem(&tapped_outputs, &o->stats))
		return 0;
	if (sample > 1 && from.sequence % sample)
		return 0;
	of.outputs = from.outputs;
	of.ifindex = xdp->txq->dev->ifindex;
	bpf_loop(XDPCAST_MAX_SLOTS, note_output, &of, 0);
	r->drops = 0;
	return 0;
}

static __always_inline bool slot_wanted(__u32 stats)
{
	__u32 *slot = bpf_map_lookup_elem(&tapped_outputs, &stats);

	return slot && want_slots >> (*slot & 63) & 1;
}

/* The output that sent the copy. */
struct egress_found {
	__u32 stats;
	bool sent;
};

static long find_output(__u32 i, struct egress_found *found)
{
	struct tap_egress *t = bpf_map_lookup_elem(&egress_run, &zero);
	struct output_stats *s;
	__u32 stats;

	if (!t || i >= XDPCAST_MAX_SLOTS || i >= t->n)
		return 1;
	stats = t->stats[i];
	s = bpf_map_lookup_elem(&output_stats, &stats);
	if (!s || s->packets == t->packets[i])
		return 0;
	found->stats = stats;
	found->sent = true;
	return 1;
}

SEC("fexit/egress")
int BPF_PROG(egress_exit, struct xdp_buff *xdp, int verdict)
{
	struct tap_egress *t = bpf_map_lookup_elem(&egress_run, &zero);
	struct tap_record *r = record_of(OF_EGRESS);
	struct egress_found found = {};

	if (!t || !r || !t->n)
		return 0;
	r->flags = 0;
	r->output = 0;
	if (verdict == XDP_PASS) {
		r->drops = 0;
		bpf_loop(XDPCAST_MAX_SLOTS, find_output, &found, 0);
		if (found.sent && slot_wanted(found.stats)) {
			r->flags = TAP_EGRESS | TAP_OUT;
			r->output = found.stats;
		}
	} else if (want_dropped && r->drops) {
		r->flags = TAP_EGRESS;
	}
	t->n = 0;
	if (!r->flags)
		return 0;
	r->rule = 0;
	r->head_bytes = 0;
	r->grown = 0;
	r->ifindex = xdp->txq->dev->ifindex;
	r->length = xdp->data_end - xdp->data;
	write_record(xdp, r);
	return 0;
}

char _license[] SEC("license") = "Dual BSD/GPL";
