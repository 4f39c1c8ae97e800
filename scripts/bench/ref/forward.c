// SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0-only)
/* A small AF_XDP forwarder to measure against: one thread takes frames from a socket
 * on queue 0 of one interface, swaps their Ethernet addresses, and sends them by a
 * socket on queue 0 of another that shares the memory. Copy mode, need_wakeup. It is
 * written from the kernel's Documentation/networking/af_xdp.rst.
 *
 * usage: forward IN OUT XSKMAP, where the latter is an open descriptor of a map whose
 * entry 0 leads to the receiving socket. Prints "ready" and forwards until SIGTERM.
 */
#include <errno.h>
#include <linux/bpf.h>
#include <linux/if_xdp.h>
#include <net/if.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#define FRAMES 4096
#define FRAME_SIZE 4096
#define RING 2048
#define BATCH 64

static void fail(const char *what)
{
	fprintf(stderr, "forward: %s: %s\n", what, strerror(errno));
	exit(1);
}

/* A ring that both sides see; ours is the cached index. */
struct ring {
	uint32_t *producer;
	uint32_t *consumer;
	uint32_t *flags;
	void *entries;
	uint32_t mask;
	uint32_t cached;
};

static struct ring map_ring(int fd, off_t offset, const struct xdp_ring_offset *at, size_t entry)
{
	struct ring r = {.mask = RING - 1};
	char *p = mmap(NULL, at->desc + RING * entry, PROT_READ | PROT_WRITE,
		       MAP_SHARED | MAP_POPULATE, fd, offset);

	if (p == MAP_FAILED)
		fail("map ring");
	r.producer = (uint32_t *)(p + at->producer);
	r.consumer = (uint32_t *)(p + at->consumer);
	r.flags = (uint32_t *)(p + at->flags);
	r.entries = p + at->desc;
	return r;
}

/* How many entries the kernel has put into a ring that we read. */
static uint32_t filled(const struct ring *r)
{
	return __atomic_load_n(r->producer, __ATOMIC_ACQUIRE) - r->cached;
}

/* How many entries have room in a ring that we write. */
static uint32_t room(const struct ring *r)
{
	return RING - (r->cached - __atomic_load_n(r->consumer, __ATOMIC_ACQUIRE));
}

static void consume(struct ring *r, uint32_t n)
{
	r->cached += n;
	__atomic_store_n(r->consumer, r->cached, __ATOMIC_RELEASE);
}

static void produce(struct ring *r, uint32_t n)
{
	r->cached += n;
	__atomic_store_n(r->producer, r->cached, __ATOMIC_RELEASE);
}

static int needs_wakeup(const struct ring *r)
{
	return __atomic_load_n(r->flags, __ATOMIC_RELAXED) & XDP_RING_NEED_WAKEUP;
}

struct xsk {
	int fd;
	struct ring fill, completion, rx, tx;
};

static void set(int fd, int option, const void *value, socklen_t len)
{
	if (setsockopt(fd, SOL_XDP, option, value, len))
		fail("set socket option");
}

/* Opens a socket on queue 0; the first one has the memory, others share it. */
static struct xsk open_socket(const char *ifname, void *umem, int share)
{
	struct xdp_umem_reg reg = {.addr = (uintptr_t)umem,
				   .len = (uint64_t)FRAMES * FRAME_SIZE,
				   .chunk_size = FRAME_SIZE};
	struct sockaddr_xdp addr = {.sxdp_family = AF_XDP,
				    .sxdp_flags = XDP_COPY | XDP_USE_NEED_WAKEUP};
	struct xdp_mmap_offsets at;
	socklen_t len = sizeof(at);
	int size = RING;
	struct xsk x;

	x.fd = socket(AF_XDP, SOCK_RAW | SOCK_CLOEXEC, 0);
	if (x.fd < 0)
		fail("open socket");
	if (share < 0)
		set(x.fd, XDP_UMEM_REG, &reg, sizeof(reg));
	set(x.fd, XDP_UMEM_FILL_RING, &size, sizeof(size));
	set(x.fd, XDP_UMEM_COMPLETION_RING, &size, sizeof(size));
	set(x.fd, XDP_RX_RING, &size, sizeof(size));
	set(x.fd, XDP_TX_RING, &size, sizeof(size));
	if (getsockopt(x.fd, SOL_XDP, XDP_MMAP_OFFSETS, &at, &len))
		fail("ask for ring offsets");
	x.fill = map_ring(x.fd, XDP_UMEM_PGOFF_FILL_RING, &at.fr, sizeof(uint64_t));
	x.completion = map_ring(x.fd, XDP_UMEM_PGOFF_COMPLETION_RING, &at.cr, sizeof(uint64_t));
	x.rx = map_ring(x.fd, XDP_PGOFF_RX_RING, &at.rx, sizeof(struct xdp_desc));
	x.tx = map_ring(x.fd, XDP_PGOFF_TX_RING, &at.tx, sizeof(struct xdp_desc));
	addr.sxdp_ifindex = if_nametoindex(ifname);
	if (!addr.sxdp_ifindex)
		fail(ifname);
	if (share >= 0) {
		addr.sxdp_flags = XDP_SHARED_UMEM;
		addr.sxdp_shared_umem_fd = share;
	}
	if (bind(x.fd, (struct sockaddr *)&addr, sizeof(addr)))
		fail("bind socket");
	return x;
}

static void register_socket(int map, int fd)
{
	uint32_t key = 0, value = fd;
	union bpf_attr attr;

	memset(&attr, 0, sizeof(attr));
	attr.map_fd = map;
	attr.key = (uintptr_t)&key;
	attr.value = (uintptr_t)&value;
	if (syscall(__NR_bpf, BPF_MAP_UPDATE_ELEM, &attr, sizeof(attr)))
		fail("enter socket into map");
}

/* Gives frames that have been sent back to the fill ring; returns how many. */
static uint32_t recycle(struct xsk *in, struct xsk *out)
{
	uint32_t i, n = filled(&out->completion), space = room(&in->fill);
	uint64_t *from = out->completion.entries, *to = in->fill.entries;

	if (n > space)
		n = space;
	for (i = 0; i < n; i++)
		to[(in->fill.cached + i) & in->fill.mask] =
			from[(out->completion.cached + i) & out->completion.mask];
	if (n) {
		consume(&out->completion, n);
		produce(&in->fill, n);
	}
	return n;
}

static void swap_addresses(uint8_t *frame)
{
	uint8_t mac[6];

	memcpy(mac, frame, 6);
	memcpy(frame, frame + 6, 6);
	memcpy(frame + 6, mac, 6);
}

/* Forwards up to a batch; returns how many. */
static uint32_t forward(struct xsk *in, struct xsk *out, uint8_t *umem)
{
	const struct xdp_desc *from = in->rx.entries;
	struct xdp_desc *to = out->tx.entries;
	uint32_t i, n = filled(&in->rx), space = room(&out->tx);

	if (n > BATCH)
		n = BATCH;
	if (n > space)
		n = space;
	for (i = 0; i < n; i++) {
		struct xdp_desc d = from[(in->rx.cached + i) & in->rx.mask];

		swap_addresses(umem + d.addr);
		to[(out->tx.cached + i) & out->tx.mask] = d;
	}
	if (n) {
		consume(&in->rx, n);
		produce(&out->tx, n);
	}
	return n;
}

int main(int argc, char **argv)
{
	struct xsk in, out;
	struct pollfd wait;
	uint8_t *umem;
	uint32_t i, outstanding = 0;

	if (argc != 4) {
		fprintf(stderr, "usage: forward IN OUT XSKMAP\n");
		return 2;
	}
	umem = mmap(NULL, (size_t)FRAMES * FRAME_SIZE, PROT_READ | PROT_WRITE,
		    MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
	if (umem == MAP_FAILED)
		fail("map memory");
	in = open_socket(argv[1], umem, -1);
	out = open_socket(argv[2], umem, in.fd);
	for (i = 0; i < RING; i++)
		((uint64_t *)in.fill.entries)[i] = (uint64_t)i * FRAME_SIZE;
	produce(&in.fill, RING);
	register_socket(atoi(argv[3]), in.fd);
	printf("ready\n");
	fflush(stdout);
	wait.fd = in.fd;
	wait.events = POLLIN;
	for (;;) {
		outstanding += forward(&in, &out, umem);
		if (!outstanding) {
			poll(&wait, 1, 100);
			continue;
		}
		/* In copy mode the system call sends, some frames at a time. */
		if (needs_wakeup(&out.tx) && sendto(out.fd, NULL, 0, MSG_DONTWAIT, NULL, 0) < 0 &&
		    errno != EAGAIN && errno != EBUSY && errno != ENOBUFS && errno != ENETDOWN)
			fail("send");
		outstanding -= recycle(&in, &out);
	}
}
