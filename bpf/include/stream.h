/* SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0-only) */
/* Several inputs of one stream, its legs. Either each packet has a number and the first copy of
 * a number passes (merge), or one leg passes at a time (failover). docs/decisions/0018 has the
 * reasons; pkg/packet/stream.go is the twin in Go.
 *
 * Packets are never held back and no lock is taken: CPUs with copies of one number at the same
 * time decide by compare-and-swap on the number's word of the window.
 *
 * A number is extended to a 64-bit position, which does not wrap: the one with these lower bits
 * nearest to the head, the newest position so far. A sender that restarts gets positions ahead of
 * all used ones, so nothing has to be cleared.
 */
#pragma once

#include "maps.h"
#include "parse.h"

/* Tests set the time: pass_ns of state 0, which no stream uses, is then the clock, and turn_ns the
 * precise clock.
 */
const volatile bool stream_test_clock = false;

/* For a test that must fail: claims numbers without atomics, slowly. */
const volatile bool stream_test_broken = false;

#define STREAM_BLOCK_BITS 5	    /* log2 of the numbers per word */
#define STREAM_NEWER_BLOCKS 0x10000 /* blocks ahead up to this: newer; beyond: old, wrapped */
#define STREAM_TRIES 16		    /* attempts of a compare-and-swap */
#define STREAM_CONFIRM 3	    /* packets in a row that confirm a jump or a session */
#define STREAM_JUMP 1024	    /* a number further ahead than this is a jump */
#define STREAM_MAX_OFFSET 511	    /* bytes of UDP payload before a number */
#define STREAM_PLAIN_BEHIND 49151   /* behind of a window of one row */
#define STREAM_RTP_HEADER 12
#define STREAM_SAMPLES 26		/* one packet in 2^(32 - 26) is compared with its copies: */
#define STREAM_CHECKED 64		/* length and this many bytes of payload */
#define STREAM_SAMPLE_PASSED 0x80	/* flag on a leg: it carried the first copy */
#define STREAM_SAMPLE_NS 2000000000ULL	/* time that a sample waits for the copies on all legs */
#define STREAM_MAX_JITTER 1000000000ULL /* ns; larger deviations count as a pause */

#define READ_ONCE(x) (*(volatile typeof(x) *)&(x))
#define WRITE_ONCE(x, v) (*(volatile typeof(x) *)&(x) = (v))

/* The field run of a leg. With distrusted it is one word: a single comparison recognizes an
 * ordinary next packet (leg_is_steady). Earlier programs of this schema wrote run alone.
 */
struct stream_run {
	__u8 run;   /* how many in a row have followed a jump */
	__u8 timed; /* 1: timed_ns of stream_pulse is set, so the next number is timed */
	/* stream_steady(epoch): the leg goes on from position, and expected is out of date until
	 * stream_resume. Or 0.
	 */
	__u16 steady;
};

static __always_inline struct stream_run *stream_run(struct stream_leg *l)
{
	return (struct stream_run *)&l->run;
}

/* What plain_next needs of the settings of a stream with one number a packet at a fixed offset, and
 * a window of one row. With them it need not look the settings up: judge_leg copies them to each
 * leg of a merged or watched stream, to up_ns, which only failover uses. The tops of at and flags
 * are the signs of the lower half and of the whole word: the cheapest flags.
 */
struct stream_plain {
	__u16 row; /* of stream_windows; PLAIN_WATCHED: every packet passes */
	__u16 at;  /* from the UDP header to the 4 bytes that the number is, or is in; PLAIN_RTP */
	__u16 least; /* UDP length of a packet that has the number; PLAIN_NEVER: not plain */
	__u16 flags;
};

#define PLAIN_WATCHED 0xffff /* beyond all rows */
#define PLAIN_RTP 0x8000
#define PLAIN_NEVER 0xffff  /* a UDP header and an IP header have no such length together */
#define PLAIN_LITTLE 0x8000 /* little-endian */
#define PLAIN_SHORT 1	    /* the number has 16 bits, otherwise 32 */

static __always_inline struct stream_plain *stream_plain(struct stream_leg *l)
{
	return (struct stream_plain *)&l->up_ns;
}

_Static_assert(sizeof(struct stream_plain) == sizeof(__u64), "in the place of up_ns");
_Static_assert(XDPCAST_MAX_WINDOWS <= PLAIN_WATCHED, "no row is PLAIN_WATCHED");

/* The fields of a packet. */
struct stream_number {
	__u32 raw; /* its number */
	__u32 session;
	__u32 count;	 /* numbers that it carries */
	__u32 timestamp; /* RTP */
	__u32 type;	 /* RTP payload type; 127: unknown */
};

/* A packet of a leg, while it is judged. */
struct stream_packet {
	const struct stream *s;
	struct stream_state *st;
	struct stream_leg *l;
	struct stream_health *h;
	struct stream_pulse *pulse; /* of the leg */
	__u64 now;
	__s64 quiet; /* ns since a packet passed */
	/* A consistent snapshot of the stream: see stream_look. */
	__u64 head;
	__u64 sessions;
	__u32 epoch;
	union {
		struct stream_number number;
		struct {
			__u32 raw;
			__u32 session;
			__u32 count;
			__u32 timestamp;
			__u32 type;
		};
	};
	bool first;   /* the leg's first in this tick of the kernel's clock */
	__u32 stream; /* index into streams */
	__u32 leg;
	__u32 format; /* enum stream_kind: format of the numbers */
	bool sure;    /* the number continues the leg's sequence */
};

static __always_inline __u64 stream_clock(void)
{
	struct stream_state *clock;

	if (!stream_test_clock)
		return bpf_ktime_get_coarse_ns();
	clock = bpf_map_lookup_elem(&stream_states, &zero);
	return clock ? READ_ONCE(clock->pass_ns) : 0;
}

static __always_inline __u64 stream_precise_clock(void)
{
	struct stream_state *clock;

	if (!stream_test_clock)
		return bpf_ktime_get_ns();
	clock = bpf_map_lookup_elem(&stream_states, &zero);
	return clock ? READ_ONCE(clock->turn_ns) : 0;
}

/* Timestamp ticks per second of static payload types (RFC 3551 section 6); 0 for others. */
static __always_inline __u32 rtp_clock(__u32 type)
{
	__u64 bit = 1ULL << (type & 63);

	if (type > 34)
		return 0;
	if (bit & (1ULL << 14 | 3ULL << 25 | 1ULL << 28 | 15ULL << 31))
		return 90000;
	if (bit & (1ULL << 0 | 7ULL << 3 | 7ULL << 7 | 3ULL << 12 | 1ULL << 15 | 1ULL << 18))
		return 8000;
	return bit & 3ULL << 10 ? 44100 : 0;
}

/* RTP (RFC 3550 section 5.1); with RFC 4175 the high half of the number follows the header. */
static __always_inline __u32 rtp_number(__u32 format, __u8 *p, void *data_end, __u32 len,
					struct stream_number *n)
{
	__u32 at = STREAM_RTP_HEADER;

	if ((void *)(p + STREAM_RTP_HEADER) > data_end || len < STREAM_RTP_HEADER ||
	    (p[0] & 0xc0) != 0x80)
		return STREAM_NO_NUMBER;
	/* RTCP on the same port (RFC 5761 section 4) has a length instead of the number. */
	if (p[1] >= 192 && p[1] <= 223)
		return STREAM_BEAT;
	n->raw = bpf_ntohs(*(__be16 *)(p + 2));
	n->timestamp = bpf_ntohl(*(__be32 *)(p + 4));
	n->session = bpf_ntohl(*(__be32 *)(p + 8));
	n->type = p[1] & 0x7f;
	if (format == STREAM_RTP)
		return STREAM_PASSED;
	at += 4 * (p[0] & 0xf); /* contributing sources */
	if (p[0] & 0x10) {	/* header extension: RFC 3550 section 5.3.1 */
		__u8 *extension = p + (at & 0x7f);

		if ((void *)(extension + 4) > data_end)
			return STREAM_NO_NUMBER;
		at += 4 + 4 * bpf_ntohs(*(__be16 *)(extension + 2));
	}
	if (at > STREAM_MAX_OFFSET || at + 2 > len)
		return STREAM_NO_NUMBER;
	p += at & STREAM_MAX_OFFSET;
	if ((void *)(p + 2) > data_end)
		return STREAM_NO_NUMBER;
	n->raw |= (__u32)bpf_ntohs(*(__be16 *)p) << 16;
	return STREAM_PASSED;
}

/* MoldUDP64 1.00: session of 10 bytes, number of the first message, count of messages. */
static __always_inline __u32 moldudp64_number(__u8 *p, void *data_end, __u32 len,
					      struct stream_number *n)
{
	if ((void *)(p + 20) > data_end || len < 20)
		return STREAM_NO_NUMBER;
	n->count = bpf_ntohs(*(__be16 *)(p + 18));
	/* A heartbeat and the end of a session carry the number of the next message. */
	if (n->count == 0 || n->count == 0xffff)
		return STREAM_BEAT;
	n->session =
		*(__u32 *)p * 0x9e3779b1U ^ *(__u32 *)(p + 4) * 0x85ebca6bU ^ *(__u16 *)(p + 8);
	n->raw = bpf_ntohl(*(__be32 *)(p + 14)); /* the lower half */
	return STREAM_PASSED;
}

/* Reads an unsigned field of 1, 2, 4 or 8 bytes; of 8, the lower half. False if the packet is
 * too short.
 */
static __always_inline bool read_field(__u8 *p, void *data_end, __u32 len, __u32 offset,
				       __u32 width, bool little, __u32 *value)
{
	if (offset > STREAM_MAX_OFFSET || offset + width > len)
		return false;
	p += offset & STREAM_MAX_OFFSET;
	if (width == 8) {
		if ((void *)(p + 8) > data_end)
			return false;
		*value = little ? *(__u32 *)p : *(__u32 *)(p + 4);
	} else if (width == 4) {
		if ((void *)(p + 4) > data_end)
			return false;
		*value = *(__u32 *)p;
	} else if (width == 2) {
		if ((void *)(p + 2) > data_end)
			return false;
		*value = *(__u16 *)p;
		if (!little)
			*value = bpf_ntohs(*value);
		return true;
	} else {
		if ((void *)(p + 1) > data_end)
			return false;
		*value = *p;
		return true;
	}
	if (!little)
		*value = bpf_ntohl(*value);
	return true;
}

static __always_inline __u32 field_number(const struct stream *s, __u8 *p, void *data_end,
					  __u32 len, struct stream_number *n)
{
	if (s->count_width) {
		if (!read_field(p, data_end, len, s->count_offset, s->count_width, s->little,
				&n->count))
			return STREAM_NO_NUMBER;
		if (!n->count)
			return STREAM_BEAT;
	}
	if (!read_field(p, data_end, len, s->offset, s->width, s->little, &n->raw))
		return STREAM_NO_NUMBER;
	return STREAM_PASSED;
}

/* The number of a packet of a format. udp is the header, up to whose end the packet reaches. */
static __always_inline __u32 stream_number(const struct stream *s, __u32 format,
					   const struct udphdr *udp, void *data_end,
					   struct stream_number *n)
{
	__u32 len = bpf_ntohs(udp->len) - sizeof(*udp);
	__u8 *p = (void *)(udp + 1);

	if (format == STREAM_FIELD)
		return field_number(s, p, data_end, len, n);
	if (format == STREAM_MOLDUDP64)
		return moldudp64_number(p, data_end, len, n);
	return rtp_number(format, p, data_end, len, n);
}

/* Whether a number is the expected one, apart from slack for lost or reordered ones.
 */
static __always_inline bool goes_on(const struct stream *s, __u32 raw, __u32 expected)
{
	return ((raw - expected + s->slack) & s->number_mask) <= 2 * s->slack;
}

/* The number after those of a packet. */
static __always_inline __u32 number_after(const struct stream_packet *n)
{
	return (n->raw + n->count) & n->s->number_mask;
}

/* Handles a number that does not continue the leg's sequence. Returns whether it is one of several
 * in a row, from which the leg then continues.
 */
static __noinline bool stream_jump(const struct stream_packet *n)
{
	struct stream_leg *l = n->l;
	__u32 next = n->raw + n->count;

	if (n->session == l->candidate_session && goes_on(n->s, n->raw, l->candidate)) {
		l->candidate = next;
		if (++stream_run(l)->run < STREAM_CONFIRM)
			return false;
		if (!l->history)
			; /* its first numbers */
		else if (l->session != n->session)
			l->senders++;
		else
			l->resets++;
		l->session = n->session;
		l->expected = number_after(n);
		l->history = 1;
		l->jumped_ns = n->now;
		stream_run(l)->run = 0;
		return true;
	}
	l->candidate_session = n->session;
	l->candidate = next;
	stream_run(l)->run = 0;
	return false;
}

/* Counts lost, repeated and reordered numbers of a leg, with a bit for each of its last 64 numbers.
 * The number continues the leg's sequence.
 */
static __always_inline void stream_count(const struct stream *s, struct stream_leg *l,
					 const struct stream_packet *n)
{
	__u32 ahead = (n->raw - l->expected) & s->number_mask, back;
	__u64 bit;

	if (__builtin_expect(ahead <= s->slack, 1)) {
		l->lost += ahead;
		l->history = ahead < 63 ? l->history << (ahead + 1) | 1 : 1;
		l->expected = number_after(n);
		return;
	}
	back = (l->expected - 1 - n->raw) & s->number_mask;
	bit = 1ULL << (back & 63);
	/* With several numbers per packet, which of them were seen is unknown. */
	if (back > 63 || s->count_width) {
		l->reordered++;
	} else if (l->history & bit) {
		l->doubled++;
	} else {
		l->history |= bit;
		l->reordered++;
		if (l->lost)
			l->lost--;
	}
}

/* Interarrival jitter of a leg (RFC 3550 section A.8). Reading the precise clock costs as much as
 * everything else, so only two packets in a row are timed per tick of the kernel's clock.
 */
static __noinline void stream_jitter(const struct stream_packet *n, bool follows)
{
	struct stream_pulse *l = n->pulse;
	__u32 clock = n->format == STREAM_RFC4175 ? 90000 : n->s->clock;
	__s32 stamps = n->timestamp - l->timestamp;
	__u64 now = stream_precise_clock();
	__s64 by = now - l->timed_ns, due;

	if (!clock)
		clock = rtp_clock(n->type);
	if (follows) {
		if (clock) {
			/* At most 2^31 * 10^9, which 63 bits hold. */
			due = (__u64)(stamps < 0 ? -(__s64)stamps : stamps) * 1000000000ULL / clock;
			if (stamps < 0)
				due = -due;
			l->gap_ns = 0;
		} else {
			if (!l->gap_ns)
				l->gap_ns = by << 4;
			due = l->gap_ns >> 4;
		}
		by -= due;
		if (!clock)
			l->gap_ns += by;
		if (by < 0)
			by = -by;
		if (by <= (__s64)STREAM_MAX_JITTER)
			l->jitter_ns += by - ((l->jitter_ns + 8) >> 4);
	}
	l->timed_ns = n->first ? now : 0;
	stream_run(n->l)->timed = n->first;
	l->timestamp = n->timestamp;
	l->timed_next = n->raw + n->count;
}

/* Tracks the numbers of a leg. Returns whether this one continues the sequence. */
static __always_inline bool stream_follow(const struct stream_packet *n)
{
	struct stream_leg *l = n->l;
	bool follows;

	if (__builtin_expect(n->session != l->session || !goes_on(n->s, n->raw, l->expected), 0))
		return stream_jump(n);
	if (stream_run(l)->run)
		stream_run(l)->run = 0;
	stream_count(n->s, l, n);
	follows = n->pulse->timed_ns && n->pulse->timed_next == n->raw;
	if (__builtin_expect(n->first || follows, 0))
		stream_jitter(n, follows);
	return true;
}

/* Reads a consistent snapshot of the stream. False while other CPUs restart it.
 */
static __always_inline bool stream_look(struct stream_packet *n)
{
	struct stream_state *st = n->st;
	int i;

	/* A restart on another CPU takes some ten reads. */
	for (i = 0; i < 64; i++) {
		n->epoch = READ_ONCE(st->epoch);
		n->quiet = n->now - READ_ONCE(st->pass_ns);
		n->sessions = READ_ONCE(st->sessions);
		n->head = READ_ONCE(st->head);
		if (!(n->epoch & 1) && READ_ONCE(st->epoch) == n->epoch)
			return true;
	}
	return false;
}

/* The newest position: the head, or a later one of its block, for which the head is not updated. */
static __always_inline __u64 stream_newest(const struct stream_state *st, __u64 head)
{
	__u64 newest = head;
	int i;

	for (i = 0; i < XDPCAST_MAX_LEGS; i++) {
		__u64 p = READ_ONCE(st->legs[i].position);

		if (p > newest && p >> STREAM_BLOCK_BITS == head >> STREAM_BLOCK_BITS)
			newest = p;
	}
	return newest;
}

/* How many numbers a leg has brought: a counter of its own only where a packet may have several. */
static __always_inline __u64 stream_numbers(const struct stream *s, const struct stream_leg *l)
{
	return s->count_width ? READ_ONCE(l->numbers) : READ_ONCE(l->won);
}

/* Counts what has passed up to the newest position, which becomes next_floor. */
static __always_inline void stream_mark(const struct stream_packet *n, __u64 position)
{
	__u64 marked = 0;
	int i;

	for (i = 0; i < XDPCAST_MAX_LEGS; i++)
		marked += stream_numbers(n->s, &n->st->legs[i]) - READ_ONCE(n->h->legs[i].filled);
	n->h->marked = marked;
	WRITE_ONCE(n->st->next_floor, position);
}

/* Counts the numbers up to next_floor, the new floor, that are missing on all legs. */
static __always_inline void stream_settle(const struct stream_packet *n)
{
	__u64 expected = n->st->before, passed = n->h->marked;
	__u64 floor = n->st->next_floor;
	int i;

	if (floor >= n->st->start)
		expected += floor + 1 - n->st->start;
	for (i = 0; i < XDPCAST_MAX_LEGS; i++)
		passed += READ_ONCE(n->h->legs[i].filled);
	n->h->lost = expected > passed ? expected - passed : 0;
}

/* Restarts the stream for a restarted or new sender. Returns the packet's new position, ahead of
 * all used ones; 0 if another CPU was first, which invalidates the decision.
 */
static __noinline __u64 stream_restart(const struct stream_packet *n)
{
	const struct stream *s = n->s;
	struct stream_state *st = n->st;
	struct stream_leg *l = n->l;
	__u64 lap = (__u64)s->number_mask + 1, head, p, floor;
	bool back = n->sessions >> 32 == n->session;

	/* An odd epoch keeps other CPUs from reading or restarting. */
	if (__sync_val_compare_and_swap(&st->epoch, n->epoch, n->epoch + 1) != n->epoch)
		return 0;
	head = READ_ONCE(st->head);
	p = (head & ~(__u64)s->number_mask) + n->raw;
	if (p < head + 64)
		p += lap;
	if (p < head + 64)
		p += lap;
	if (st->start)
		st->before += stream_newest(st, head) + 1 - st->start;
	st->start = p;
	/* Numbers before the first one have not been seen either. */
	floor = p - s->behind - 1;
	if ((__u32)n->sessions != n->session) {
		/* A previous session that returns continues where it stopped. */
		if (back && (__s64)(n->now - st->session_ns) < 4 * (__s64)s->reset_ns)
			floor = p + ((__s32)((st->left - n->raw) << s->shift) >> s->shift);
		/* The head may lag by the rest of its block. */
		st->left = ((__u32)head | 31) & s->number_mask;
		st->session_ns = n->now;
		st->session_leg = n->leg;
		WRITE_ONCE(st->sessions, n->sessions << 32 | n->session);
	}
	WRITE_ONCE(st->floor, floor);
	stream_mark(n, floor);
	WRITE_ONCE(st->turn_ns, n->now);
	WRITE_ONCE(st->head, p);
	/* Before the epoch ends: another CPU, with a copy of this number, would take the silence
	 * before it for one after it, and restart again.
	 */
	WRITE_ONCE(st->pass_ns, n->now);
	st->restarts++;
	__sync_fetch_and_add(&st->epoch, 1);
	l->session = n->session;
	l->expected = number_after(n);
	l->jumped_ns = n->now;
	return p;
}

/* A packet of another session than the stream is in, or its first one. Returns STREAM_PASSED when
 * the stream is to change to it.
 */
static __noinline __u32 stream_session(const struct stream_packet *n)
{
	const struct stream *s = n->s;
	struct stream_state *st = n->st;
	__u32 beyond = (n->raw - st->left) & s->number_mask, by;
	bool before = n->sessions >> 32 == n->session;

	if (!n->epoch || n->quiet > (__s64)s->reset_ns)
		return STREAM_PASSED;
	/* Late copies of the previous session, until their leg reaches the new one. */
	if (!n->sure || n->l->distrusted ||
	    (__s64)(n->now - st->session_ns) <= 2 * (__s64)s->skew_ns)
		return before ? STREAM_OLD_SESSION : STREAM_ASTRAY;
	if (!before)
		return STREAM_PASSED;
	/* A leg on which it continues proves that the new session is another stream's: distrust
	 * the leg that introduced it until it returns.
	 */
	if (beyond <= STREAM_CONFIRM || beyond > s->number_mask / 2)
		return STREAM_OLD_SESSION;
	by = st->session_leg;
	if (by < XDPCAST_MAX_LEGS && by != n->leg)
		st->legs[by].distrusted = 1;
	return STREAM_PASSED;
}

/* Identifies the block of a position in its word. A restart with 32-bit numbers moves 2^32
 * positions ahead: the lower half of block numbers repeats after 32 of them, and a word that was
 * not used since would say that the new sender's numbers had passed. What the upper half adds tells
 * them apart.
 */
static __always_inline __u32 stream_block(__u64 p)
{
	return (__u32)(p >> STREAM_BLOCK_BITS) +
	       (__u32)(p >> (32 + STREAM_BLOCK_BITS)) * 0x9e3779b1U;
}

/* The first to claim a position passes. */
static __always_inline __u32 stream_claim(__u64 *word, __u64 p)
{
	__u32 block = stream_block(p);
	__u64 bit = 1ULL << (p & 31);
	int i;

	for (i = 0; i < STREAM_TRIES; i++) {
		__u64 old = READ_ONCE(*word), new;
		__s32 newer = (__u32)(old >> 32) - block;

		if (!newer) {
			if (old & bit)
				return STREAM_DUPLICATE;
			new = old | bit;
		} else if (newer > 0 && newer < STREAM_NEWER_BLOCKS) {
			return STREAM_LATE;
		} else {
			new = (__u64)block << 32 | bit;
		}
		if (stream_test_broken) {
			int wait;

			for (wait = 0; wait < 32; wait++)
				bpf_ktime_get_ns();
			WRITE_ONCE(*word, new);
			return STREAM_PASSED;
		}
		if (__sync_val_compare_and_swap(word, old, new) == old)
			return STREAM_PASSED;
	}
	return STREAM_CONTENDED;
}

/* The word of the window that a position belongs to. */
static __always_inline __u64 *stream_word(const struct stream *s, __u64 p)
{
	__u32 word = p >> STREAM_BLOCK_BITS & s->word_mask;
	__u32 row = s->first_row + word / STREAM_WORDS, at = word % STREAM_WORDS;
	void *window = bpf_map_lookup_elem(&stream_windows, &row);

	return window ? bpf_map_lookup_elem(window, &at) : NULL;
}

static __always_inline __u32 stream_claim_at(const struct stream *s, __u64 p)
{
	__u64 *word = stream_word(s, p);

	return word ? stream_claim(word, p) : STREAM_NO_NUMBER;
}

/* Updates the head once per word, so that it is written once in 32 packets. */
static __noinline void stream_advance(struct stream_state *st, __u64 p)
{
	int i;

	for (i = 0; i < STREAM_TRIES; i++) {
		__u64 head = READ_ONCE(st->head);

		if (p >> STREAM_BLOCK_BITS <= head >> STREAM_BLOCK_BITS)
			return;
		if (__sync_val_compare_and_swap(&st->head, head, p) == head)
			return;
	}
}

/* Whether a packet is the next sample, or a copy of it: compare_copy is due. */
static __always_inline bool stream_sampled(const struct stream_state *st, __u64 position,
					   bool passed)
{
	if (__builtin_expect((__u32)position * 0x9e3779b1U >> STREAM_SAMPLES, 1))
		return false;
	return passed ? !READ_ONCE(st->sample_waits)
		      : READ_ONCE(st->sample) >> 32 == (__u32)position;
}

/* Whether a leg with traffic has yet to carry the sample. */
static __always_inline bool stream_awaits(const struct stream_state *st,
					  const struct stream_health *h, __u64 now)
{
	__u32 i;

	for (i = 0; i < XDPCAST_MAX_LEGS; i++)
		if (!(h->sample_legs & 1 << i) &&
		    READ_ONCE(st->legs[i].seen_ns) + STREAM_SAMPLE_NS > now)
			return true;
	return false;
}

/* At a turn of the floor: expires positions older than the skew. */
static __always_inline void stream_turn(const struct stream_packet *n)
{
	const struct stream *s = n->s;
	struct stream_state *st = n->st;
	__u64 turn = READ_ONCE(st->turn_ns);

	if ((__s64)(n->now - turn) <= (__s64)s->skew_ns)
		return;
	if (__sync_val_compare_and_swap(&st->turn_ns, turn, n->now) != turn)
		return;
	if (n->h->sample_ns + STREAM_SAMPLE_NS <= n->now || !stream_awaits(st, n->h, n->now))
		WRITE_ONCE(st->sample_waits, 0);
	stream_settle(n);
	WRITE_ONCE(st->floor, n->now - turn > 2 * s->skew_ns ? READ_ONCE(st->head)
							     : READ_ONCE(st->next_floor));
	stream_mark(n, stream_newest(st, READ_ONCE(st->head)));
}

/* Once a tick. pass_ns is set last: from then on the floors stay as they are in this tick, which
 * stream_next relies on.
 */
static __always_inline void stream_tick(const struct stream_packet *n)
{
	if ((__s64)(n->now - READ_ONCE(n->st->pass_ns)) <= 0)
		return;
	stream_turn(n);
	WRITE_ONCE(n->st->pass_ns, n->now);
}

/* Whether a sender restarts: the stream was silent, and this leg's numbers jumped at about the time
 * when the silence began. A leg that lags, or was paused with the whole machine, has not jumped
 * then and waits longer.
 */
static __always_inline bool stream_begins(const struct stream_packet *n, bool jumps)
{
	const struct stream *s = n->s;

	if (!n->sure || n->l->jumped_ns + 2 * s->skew_ns >= READ_ONCE(n->st->pass_ns))
		return n->quiet > (__s64)s->reset_ns;
	return jumps && n->quiet > 4 * (__s64)s->reset_ns;
}

/* Finds the position of a packet of the stream's session. */
static __always_inline __u32 stream_place(struct stream_packet *n, __u64 *position)
{
	const struct stream *s = n->s;
	__s64 d = (__s64)((n->raw - (__u32)n->head + s->bias) & s->number_mask) - s->bias;

	*position = n->head + d;
	if (__builtin_expect(d <= (__s64)s->ahead && d >= -(__s64)s->behind &&
				     (d <= STREAM_JUMP || n->sure) &&
				     (d > 0 || *position > READ_ONCE(n->st->floor)),
			     1))
		return STREAM_PASSED;
	if (!stream_begins(n, true))
		return d > 0 ? STREAM_ASTRAY : STREAM_LATE;
	*position = stream_restart(n);
	n->sure = true;
	return *position ? STREAM_PASSED : STREAM_CONTENDED;
}

/* Finds the position of a packet of another session. */
static __always_inline __u32 stream_change(struct stream_packet *n, __u64 *position)
{
	__u32 v = stream_session(n);

	if (v != STREAM_PASSED)
		return v;
	*position = stream_restart(n);
	n->sure = true;
	if (!*position)
		return STREAM_CONTENDED;
	return *position > READ_ONCE(n->st->floor) ? STREAM_PASSED : STREAM_LATE;
}

/* Compares a copy with the sample of its number: they differ if legs carry different streams. Its
 * delay after the first copy is the leg's lag. Global, so that it is verified once.
 */
__noinline int compare_copy(struct xdp_md *ctx, __u32 stream, __u32 leg, __u32 udp_at,
			    __u64 position)
{
	struct stream_state *st = bpf_map_lookup_elem(&stream_states, &stream);
	struct stream_health *h = bpf_map_lookup_elem(&stream_health, &stream);
	void *data_end = (void *)(long)ctx->data_end;
	void *data = (void *)(long)ctx->data;
	bool passed = leg & STREAM_SAMPLE_PASSED;
	struct udphdr *udp = data + (udp_at & 0xff);
	__u8 *p = (void *)(udp + 1);
	__u64 now, check, sample;
	struct stream_pulse *l;
	__u8 differs;
	__u32 i, len;

	leg &= ~STREAM_SAMPLE_PASSED;
	if (!st || !h || leg >= XDPCAST_MAX_LEGS || (void *)(udp + 1) > data_end)
		return 0;
	sample = READ_ONCE(st->sample);
	if (!passed && sample >> 32 != (__u32)position)
		return 0;
	now = stream_precise_clock();
	/* Bounded once more: Linux 6.1 forgets it of what is kept on the stack across a call. */
	OPAQUE(leg);
	leg &= XDPCAST_MAX_LEGS - 1;
	l = &h->legs[leg];
	len = bpf_ntohs(udp->len) - sizeof(*udp);
	check = len;
	for (i = 8; i <= STREAM_CHECKED && i <= len; i += 8, p += 8) {
		if ((void *)(p + 8) > data_end)
			return 0; /* the rest is in another buffer */
		check = (check ^ *(__u64 *)p) * 0x9e3779b97f4a7c15ULL;
	}
	check >>= 32;
	if (passed) {
		h->sample_ns = now;
		h->sample_legs = 1 << leg;
		WRITE_ONCE(st->sample, position << 32 | check);
		WRITE_ONCE(st->sample_waits, stream_awaits(st, h, stream_clock()));
		l->lag_ns -= l->lag_ns >> 3;
		return 0;
	}
	differs = (__u32)sample != (__u32)check;
	st->differ[leg] += differs;
	st->differs[leg] = differs;
	if (h->sample_legs & 1 << leg)
		return 0; /* twice */
	h->sample_legs |= 1 << leg;
	WRITE_ONCE(st->sample_waits, stream_awaits(st, h, stream_clock()));
	now -= READ_ONCE(h->sample_ns);
	if (now < STREAM_SAMPLE_NS)
		l->lag_ns += now - (l->lag_ns >> 3);
	return 0;
}

_Static_assert(__builtin_offsetof(struct stream_leg, run) == 16, "begins a word");
_Static_assert(__builtin_offsetof(struct stream_leg, distrusted) == 20, "ends the word");

/* What steady of a leg is in an epoch: never 0, and different when it is odd. Later epochs with the
 * same value are restarts away, which take longer than the tick that the leg was seen in.
 */
static __always_inline __u16 stream_steady(__u32 epoch)
{
	return epoch << 2 | 3;
}

static __always_inline struct stream_plain plain_settings(const struct stream *s)
{
	bool merges = s->kind != STREAM_SINGLE;
	__u32 format = merges ? s->kind : s->watch;
	struct stream_plain f = {.row = merges ? s->first_row : PLAIN_WATCHED,
				 .least = PLAIN_NEVER};

	if (merges && s->word_mask != STREAM_WORDS - 1)
		return f;
	if (format == STREAM_RTP) {
		f.at = PLAIN_RTP;
		f.least = 0;
	} else if (format == STREAM_FIELD && !s->count_width) {
		f.at = sizeof(struct udphdr) + s->offset;
		f.least = f.at + s->width;
		if (s->number_mask == 0xffff)
			f.flags = PLAIN_SHORT;
		if (s->little)
			f.flags |= PLAIN_LITTLE;
		else
			f.at = f.least - 4; /* the 4 bytes end with the number */
	}
	return f;
}

/* Marks a leg as steady, if it goes on from the packet. */
static __always_inline void stream_steadies(const struct stream_packet *n)
{
	if (n->l->expected != number_after(n))
		return;
	*stream_plain(n->l) = plain_settings(n->s);
	stream_run(n->l)->steady = stream_steady(n->epoch);
}

/* The inverse. */
static __always_inline void stream_resume(const struct stream *s, struct stream_leg *l)
{
	if (!stream_run(l)->steady)
		return;
	l->expected = ((__u32)l->position + 1) & s->number_mask;
	stream_run(l)->steady = 0;
}

static __always_inline __u32 stream_merge(struct xdp_md *ctx, struct stream_packet *n, __u32 udp_at)
{
	const struct stream *s = n->s;
	struct stream_leg *l = n->l;
	__u64 p = 0;
	__u32 v;

	if (!stream_look(n))
		return STREAM_CONTENDED;
	n->sure = stream_follow(n);
	if (__builtin_expect((__u32)n->sessions == n->session && n->epoch, 1)) {
		if (l->distrusted)
			l->distrusted = 0;
		v = stream_place(n, &p);
	} else {
		v = stream_change(n, &p);
	}
	if (v != STREAM_PASSED) {
		if (v == STREAM_LATE && stream_sampled(n->st, p, false))
			compare_copy(ctx, n->stream, n->leg, udp_at, p);
		return v;
	}
	l->position = p + n->count - 1;
	v = stream_claim_at(s, p);
	/* Seen long ago, and no packets since, by what is known after the claim. */
	if (v == STREAM_DUPLICATE)
		n->quiet = n->now - READ_ONCE(n->st->pass_ns);
	if (__builtin_expect(v == STREAM_DUPLICATE, 0) && stream_begins(n, false)) {
		p = stream_restart(n);
		if (!p)
			return v;
		n->sure = true;
		l->position = p + n->count - 1;
		v = stream_claim_at(s, p);
	}
	if (v <= STREAM_DUPLICATE && stream_sampled(n->st, p, !v))
		compare_copy(ctx, n->stream, v ? n->leg : n->leg | STREAM_SAMPLE_PASSED, udp_at, p);
	if (v == STREAM_PASSED) {
		if (__builtin_expect(n->sure, 1))
			stream_advance(n->st, p);
		stream_tick(n);
		l->won++;
		if (s->count_width)
			l->numbers += n->count;
		if (p <= READ_ONCE(n->st->next_floor))
			n->pulse->filled += n->count;
	}
	if (n->sure && v <= STREAM_DUPLICATE && (__s64)(n->now - READ_ONCE(n->st->pass_ns)) <= 0 &&
	    p > READ_ONCE(n->st->floor) && !stream_test_broken)
		stream_steadies(n);
	return v;
}

/* The best leg that is not silent passes. */
static __always_inline __u32 stream_failover(const struct stream_packet *n, __u64 seen)
{
	const struct stream *s = n->s;
	struct stream_state *st = n->st;
	__u32 active = READ_ONCE(st->active) & (XDPCAST_MAX_LEGS - 1);
	__u64 since = READ_ONCE(st->session_ns);
	bool better = false;

	if ((__s64)(n->now - seen) > (__s64)s->silence_ns)
		WRITE_ONCE(n->l->up_ns, n->now);
	if (__builtin_expect(active == n->leg && since, 1))
		return STREAM_PASSED;
	if (n->leg < active) {
		/* At first, which leg is heard first is arbitrary: a better one takes over at once.
		 */
		if (READ_ONCE(st->restarts) <= 1)
			better = (__s64)(n->now - since) <= (__s64)s->silence_ns;
		if (s->back_ns && (__s64)(n->now - READ_ONCE(n->l->up_ns)) >= (__s64)s->back_ns)
			better = true;
	}
	if (since && !better &&
	    (__s64)(n->now - READ_ONCE(st->legs[active].seen_ns)) <= (__s64)s->silence_ns)
		return STREAM_STANDBY;
	if (__sync_val_compare_and_swap(&st->active, active, n->leg) != active)
		return READ_ONCE(st->active) == n->leg ? STREAM_PASSED : STREAM_STANDBY;
	WRITE_ONCE(st->session_ns, n->now);
	__sync_fetch_and_add(&st->restarts, 1);
	return STREAM_PASSED;
}

static __always_inline __u32 stream_decide(struct xdp_md *ctx, struct stream_packet *n,
					   __u32 udp_at, __u32 v)
{
	__u64 seen = READ_ONCE(n->l->seen_ns);
	__u32 passes = STREAM_PASSED;

	/* Not steady any longer: a packet without a number must not carry that into this tick. */
	stream_resume(n->s, n->l);
	if (seen != n->now)
		WRITE_ONCE(n->l->seen_ns, n->now);
	n->first = seen != n->now;
	if (n->s->kind == STREAM_FAILOVER) {
		passes = stream_failover(n, seen);
		if (passes == STREAM_PASSED)
			n->l->won++;
	}
	if (!n->format)
		return passes;
	if (n->s->kind == n->format)
		return v == STREAM_PASSED ? stream_merge(ctx, n, udp_at) : v;
	/* The numbers are only monitored. */
	if (v != STREAM_PASSED) {
		n->l->others++;
	} else if (stream_follow(n) && n->s->kind == STREAM_SINGLE) {
		n->l->position += (n->l->expected - 1 - (__u32)n->l->position) & n->s->number_mask;
		stream_steadies(n);
	}
	return passes;
}

/* Whether a packet of a plain leg has the number of a position. udp is at a fixed place. */
static __always_inline bool plain_number(const struct stream_leg *l, const struct udphdr *udp,
					 void *data_end, __u64 position)
{
	const struct stream_plain *f = (const void *)&l->up_ns;
	__u8 *p = (__u8 *)(udp + 1);
	__u32 raw, differs;

	if (*(const __s32 *)f < 0) { /* PLAIN_RTP */
		if ((void *)(p + STREAM_RTP_HEADER) > data_end ||
		    bpf_ntohs(udp->len) < sizeof(*udp) + STREAM_RTP_HEADER)
			return false;
		raw = bpf_ntohl(*(__be32 *)p);
		/* Of version 2, and not RTCP (rtp_number). */
		return (__u16)raw == (__u16)position && raw >> 30 == 2 && (raw >> 21 & 7) != 6 &&
		       *(__be32 *)(p + 8) == bpf_htonl(l->session);
	}
	p = (__u8 *)udp + (f->at & 0x3ff);
	if (__builtin_expect((void *)(p + 4) > data_end || bpf_ntohs(udp->len) < f->least, 0))
		return false;
	raw = *(__u32 *)p;
	if (*(const __s64 *)f >= 0) /* not PLAIN_LITTLE */
		raw = bpf_ntohl(raw);
	differs = raw ^ (__u32)position;
	if (READ_ONCE(f->flags) & PLAIN_SHORT)
		differs = (__u16)differs;
	return !differs;
}

/* Whether a leg is as judge_leg left it: the last packet of the leg was in this tick, since when
 * neither the stream has been restarted nor the leg's numbers jumped. The floors have not changed
 * either, since judge_leg had seen the stream's turn in this tick: the leg is above the floor.
 */
static __always_inline bool leg_is_steady(const struct stream_state *st, struct stream_leg *l,
					  __u64 now)
{
	/* With failover none is. */
	if (READ_ONCE(*(const __u64 *)&l->run) != (__u64)stream_steady(READ_ONCE(st->epoch)) << 16)
		return false;
	if (__builtin_expect(l->seen_ns != now, 0))
		return stream_test_clock && l->seen_ns == stream_clock();
	return true;
}

static __always_inline void stream_went_on(struct stream_leg *l, __u64 position)
{
	if (~l->history)
		l->history = l->history << 1 | 1;
	l->position = position;
}

/* The leg that a packet of compare_copy is of. flow, if there is one, has both: for plain_next,
 * which reads them only for a sample.
 */
struct sampled_leg {
	struct xdp_md *ctx;
	const struct flow *flow;
	__u32 stream;
	__u32 leg;
	__u32 udp_at;
};

static __always_inline void sample_next(struct sampled_leg of, const struct stream_state *st,
					__u64 p, __u32 passed)
{
	if (!stream_sampled(st, p, passed))
		return;
	if (of.flow) {
		OPAQUE(of.flow);
		of.stream = of.flow->stream;
		of.leg = of.flow->leg;
	}
	compare_copy(of.ctx, of.stream, of.leg | passed, of.udp_at, p);
}

/* Claims position p, the next one of a steady leg, and notes that the leg has brought it, with
 * count - 1 numbers after it.
 */
static __always_inline __u32 stream_claim_next(struct sampled_leg of, struct stream_state *st,
					       struct stream_leg *l, __u64 *word, __u64 p,
					       __u32 count, bool counts)
{
	__u64 old = READ_ONCE(*word), bit = 1ULL << (p & 31), new = old | bit;
	__u32 block = stream_block(p), newer = (__u32)(old >> 32) - block;

	if (__builtin_expect(newer, 0)) {
		if (newer < STREAM_NEWER_BLOCKS)
			return STREAM_VERDICTS;
		new = (__u64)block << 32 | bit;
	} else if (old & bit) {
		stream_went_on(l, p + count - 1);
		sample_next(of, st, p, 0);
		return STREAM_DUPLICATE;
	}
	if (__builtin_expect(p <= READ_ONCE(st->next_floor), 0))
		return STREAM_VERDICTS;
	new = __sync_val_compare_and_swap(word, old, new);
	OPAQUE(new); /* or it becomes a flag first */
	if (__builtin_expect(new != old, 0))
		return STREAM_VERDICTS;
	l->won++;
	if (counts)
		l->numbers += count;
	stream_went_on(l, p + count - 1);
	if (__builtin_expect(p >> STREAM_BLOCK_BITS > READ_ONCE(st->head) >> STREAM_BLOCK_BITS, 0))
		stream_advance(st, p);
	sample_next(of, st, p, STREAM_SAMPLE_PASSED);
	return STREAM_PASSED;
}

/* What most packets are, but for failover: the number after their leg's last one, with the stream
 * where it was then, and nothing else due. plain_next and judge_next do with them what judge_leg
 * does, at a third of the cost; or nothing, and return STREAM_VERDICTS.
 *
 * plain_next is for legs with stream_plain, and part of the short way of plain packets
 * (plain_packet of relay.bpf.c): its caller does nothing before either. What it looks up comes
 * first, so that nothing else is kept across the calls.
 */
static __always_inline __u32 plain_next(struct xdp_md *ctx, const struct flow *flow, void *data,
					__u32 udp_at, const struct rule_stats *stats)
{
	struct sampled_leg of = {.ctx = ctx, .flow = flow, .udp_at = udp_at};
	__u32 stream = flow->stream, row, at;
	struct stream_state *st = bpf_map_lookup_elem(&stream_states, &stream);
	__u64 p, *word = NULL;
	struct stream_leg *l;
	void *window;

	if (!st)
		return STREAM_VERDICTS;
	l = &st->legs[flow->leg & (XDPCAST_MAX_LEGS - 1)];
	OPAQUE(l);
	if (__builtin_expect(!leg_is_steady(st, l, stats->last_seen_ns), 0))
		return STREAM_VERDICTS;
	p = READ_ONCE(l->position) + 1;
	row = stream_plain(l)->row;
	window = bpf_map_lookup_elem(&stream_windows, &row);
	if (window) {
		at = p >> STREAM_BLOCK_BITS & (STREAM_WORDS - 1);
		word = bpf_map_lookup_elem(window, &at);
	}
	/* In the order of their use, now that registers need not survive calls. */
	OPAQUE(data);
	if (__builtin_expect(!plain_number(l, data + udp_at, (void *)(long)ctx->data_end, p), 0))
		return STREAM_VERDICTS;
	if (!word) {
		if (stream_plain(l)->row != PLAIN_WATCHED)
			return STREAM_VERDICTS;
		stream_went_on(l, p);
		return STREAM_PASSED;
	}
	if (__builtin_expect((__s64)(READ_ONCE(st->head) - p) > STREAM_PLAIN_BEHIND, 0))
		return STREAM_VERDICTS;
	return stream_claim_next(of, st, l, word, p, 1, false);
}

/* For all other formats and windows, and watched numbers. Out of line, since most rules have one
 * input, and global, so that it is verified once.
 */
__noinline int judge_next(struct xdp_md *ctx, __u32 stream, __u32 leg, __u32 udp_at, __u64 now)
{
	const struct stream *s = bpf_map_lookup_elem(&streams, &stream);
	struct stream_state *st = bpf_map_lookup_elem(&stream_states, &stream);
	void *data_end = (void *)(long)ctx->data_end;
	void *data = (void *)(long)ctx->data;
	struct udphdr *udp = data + (udp_at & 0xff);
	struct sampled_leg of = {.ctx = ctx, .stream = stream, .leg = leg, .udp_at = udp_at};
	struct stream_number u = {.count = 1};
	struct stream_leg *l;
	__u64 p, *word;
	bool merges;

	if (!s || !st || (void *)(udp + 1) > data_end)
		return STREAM_VERDICTS;
	l = &st->legs[leg & (XDPCAST_MAX_LEGS - 1)];
	OPAQUE(l);
	if (!leg_is_steady(st, l, now))
		return STREAM_VERDICTS;
	p = READ_ONCE(l->position) + 1;
	merges = s->kind != STREAM_SINGLE;
	if (merges && p + s->behind < READ_ONCE(st->head))
		return STREAM_VERDICTS;
	if (stream_number(s, merges ? s->kind : s->watch, udp, data_end, &u) != STREAM_PASSED ||
	    u.session != l->session)
		return STREAM_VERDICTS;
	/* Not expected: another CPU that takes packets of the leg may have changed one of the two.
	 */
	if ((u.raw - (__u32)p) & s->number_mask)
		return STREAM_VERDICTS;
	if (!merges) {
		stream_went_on(l, p + u.count - 1);
		return STREAM_PASSED;
	}
	word = stream_word(s, p);
	if (!word)
		return STREAM_VERDICTS;
	return stream_claim_next(of, st, l, word, p, u.count, s->count_width);
}

/* Returns the verdict on a packet of a leg: enum stream_verdict. now is the coarse clock, read in
 * this tick. Out of line and global, like judge_next.
 */
__noinline int judge_leg(struct xdp_md *ctx, __u32 stream, __u32 leg, __u32 udp_at, __u64 now)
{
	void *data_end = (void *)(long)ctx->data_end;
	void *data = (void *)(long)ctx->data;
	struct udphdr *udp = data + (udp_at & 0xff);
	struct stream_packet n = {
		.number = {.count = 1, .type = 127}, .stream = stream, .leg = leg};
	__u32 v = STREAM_NO_NUMBER;

	n.s = bpf_map_lookup_elem(&streams, &stream);
	n.st = bpf_map_lookup_elem(&stream_states, &stream);
	n.h = bpf_map_lookup_elem(&stream_health, &stream);
	if (!n.s || !n.st || !n.h || leg >= XDPCAST_MAX_LEGS)
		return STREAM_NO_NUMBER;
	n.l = &n.st->legs[leg];
	n.pulse = &n.h->legs[leg];
	n.format = n.s->kind;
	if (n.format == STREAM_FAILOVER || n.format == STREAM_SINGLE)
		n.format = n.s->watch;
	n.now = stream_test_clock || n.s->kind == STREAM_FAILOVER ? stream_clock() : now;
	if (n.format && (void *)(udp + 1) <= data_end)
		v = stream_number(n.s, n.format, udp, data_end, &n.number);
	v = stream_decide(ctx, &n, udp_at, v);
	if (v == STREAM_BEAT || v == STREAM_NO_NUMBER) {
		n.l->others++;
		return v == STREAM_BEAT || n.s->pass_other ? STREAM_PASSED : v;
	}
	return v;
}
