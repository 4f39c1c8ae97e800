// Package xsk receives and sends frames of a network interface through AF_XDP
// sockets: memory shared with the kernel, and rings of descriptors instead of a
// system call per frame.
//
// # Parts
//
// A [UMEM] is the memory, divided into frames of equal size. [Frames] allocates a
// share of them, and counts references to each. A [Socket] belongs to one queue of
// one interface; frames travel through its four rings:
//
//	free frames --Fill--> fill ring ==kernel==> RX ring --Receive--> yours
//	yours --Send--> TX ring ==kernel==> completion ring --Complete--> released
//
// Sockets of several queues and interfaces share one UMEM, so that a frame received
// on one is sent on another without a copy. Receive gives the caller a reference to
// each frame, Send takes one per descriptor, and Complete drops it; a frame without
// references is free. [Frames.Retain] adds references: the same payload can be in
// many TX rings at once, each time after a header in a frame of its own
// ([UMEMOptions.MultiBuffer]).
//
// # Concurrency
//
// There are no locks. Frames and all sockets opened with them belong to one
// goroutine at a time. A process with a worker per queue gives each worker its own
// Frames of one UMEM. Any goroutine may call the methods of UMEM, [Waiter.Wake],
// [Socket.FD], [Socket.Ifindex], [Socket.Queue] and [Socket.ZeroCopy].
//
// # Copy mode
//
// If the driver cannot use the UMEM itself, the kernel copies, which works on every
// interface: the driver's NAPI copies received frames into the UMEM; the system call
// of [Socket.Kick] copies sent frames, at most [Options.TXBudget] per call, which is
// why [Socket.Flush] repeats it. A frame completes when the driver frees its copy.
//
// # Another process
//
// A process can leave its sockets to another one, which continues with the packets in them:
// [UMEMOptions.Shared], [Socket.Suspend], [Inherit] and [Socket.Resume].
//
// # Requirements
//
// Linux 5.11, 6.4 to inherit sockets, and 6.6 for multi-buffer; CAP_NET_RAW to open sockets. The UMEM is
// locked memory and counts against RLIMIT_MEMLOCK, unless the process has
// CAP_IPC_LOCK. An XDP program delivers frames to a socket by redirecting them to its
// entry in a BPF_MAP_TYPE_XSKMAP, which the caller writes with [Socket.FD].
//
// The source of formats, constants and ordering rules is the kernel's
// Documentation/networking/af_xdp.rst, include/uapi/linux/if_xdp.h and
// net/xdp/xsk_queue.h.
package xsk
