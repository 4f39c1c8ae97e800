// Package xsk gives a process the frames of a network interface by AF_XDP sockets,
// and lets it send some: memory shared with the kernel, and rings of descriptors
// instead of a system call for each frame.
//
// # Parts
//
// A [UMEM] is the memory, cut into frames of equal size. [Frames] hands a share of
// them out, and counts who refers to each. A [Socket] belongs to one queue of one
// interface; frames travel through its four rings:
//
//	free frames --Fill--> fill ring ==kernel==> RX ring --Receive--> yours
//	yours --Send--> TX ring ==kernel==> completion ring --Complete--> released
//
// Sockets of several queues and interfaces share one UMEM, so that a frame received
// on one is sent on another without a copy. Receive gives one reference to a frame,
// Send takes one for each descriptor, and Complete gives that one up; the frame is
// free when the last one is gone. [Frames.Retain] adds references: the same payload
// can be in many TX rings at once, each time behind a header in a frame of its own
// ([UMEMOptions.MultiBuffer]).
//
// # Concurrency
//
// There are no locks. Frames and all the sockets that were opened with them belong to
// one goroutine at a time. A process with a worker for each queue gives each worker
// its own Frames of one UMEM. Methods of UMEM, [Waiter.Wake] and
// [Socket.FD], [Socket.Ifindex], [Socket.Queue] and [Socket.ZeroCopy] are for any goroutine.
//
// # Copy mode
//
// Where the driver cannot use the UMEM itself, the kernel copies (every interface can):
// received frames are copied into the UMEM by the driver's NAPI; sent frames by the
// system call that [Socket.Kick] makes, at most [Options.TXBudget] of them in each
// call, which is why [Socket.Flush] repeats it. A frame completes when the driver
// frees its copy.
//
// # Needs
//
// Linux 5.11, and 6.6 for multi-buffer; CAP_NET_RAW to open sockets. UMEM is locked
// memory and counted against RLIMIT_MEMLOCK, unless the process has CAP_IPC_LOCK.
// Frames reach a socket by an XDP program that redirects them to its entry in a
// BPF_MAP_TYPE_XSKMAP, which the caller writes with [Socket.FD].
//
// The source of formats, constants and ordering rules is the kernel's
// Documentation/networking/af_xdp.rst, include/uapi/linux/if_xdp.h and
// net/xdp/xsk_queue.h.
package xsk
