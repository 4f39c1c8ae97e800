// Package fanout receives frames from AF_PACKET sockets that share an
// interface's traffic by PACKET_FANOUT, and sends frames through AF_PACKET. It
// knows nothing of rules: a socket filter chooses the frames, the caller says
// what becomes of them.
//
// # Receiving
//
// A [Group] is a number of workers, each a socket with a ring of blocks
// (TPACKET_V3, Documentation/networking/packet_mmap.rst). The kernel copies
// frames into a block, and hands it over when it is full or its time is up; the
// caller reads the frames where they lie, and gives the block back:
//
//	for {
//		block, err := worker.Wait()
//		if err != nil {
//			...
//		}
//		for block.Next(&frame) {
//			... // frame.Data is valid until Release
//		}
//		block.Release()
//	}
//
// A block that is not full is handed over after a millisecond at the earliest. With
// [Options].Frames a worker has a second ring (TPACKET_V2), whose frames are handed over one
// by one, at once. A program in the kernel gives each frame to one of the two rings: to
// the frame ring while that has room, to a block when more frames wait than that. Wait and
// Next hand out the frames of both in the order in which they came.
//
// That order is exact for frames that one CPU handled. Frames of a flow that several CPUs handle, while frames
// come by both rings, are put in order by the time at which they were received: a step of
// the clock in that moment can reorder them.
//
// Every frame that arrives goes to one worker of the group, never to two, and
// the host's own receivers get theirs as if the group were not there. Frames
// that the host sends are not received.
//
// # Opening without a race
//
// A packet socket that is bound but not yet in its group receives all of the
// interface's traffic, next to the group: packets come twice. And the kernel
// joins none that is not bound: it answers EINVAL to PACKET_FANOUT on a socket
// without a protocol, and EINVAL to bind on a member (fanout_add and
// packet_do_bind of net/packet/af_packet.c). So the order is
//
//  1. a socket of protocol 0, which receives nothing;
//  2. a filter that drops everything;
//  3. version, virtio header, ring and mapping;
//  4. bind, then PACKET_FANOUT;
//  5. when every worker has joined, first with the rings of blocks and then with the
//     frame rings: the filter that was asked for.
//
// Nothing is in a ring before step 5, and from then on the number of members,
// which decides who gets which flow, no longer changes.
//
// # Group ids
//
// The first socket asks for an id that no group of the network namespace has
// (PACKET_FANOUT_FLAG_UNIQUEID). The group is made for exactly its number of
// sockets (max_num_members of struct fanout_args), so that another program that
// uses the id by accident or habit is refused with ENOSPC, rather than given a
// share of the packets.
//
// # Merged datagrams, unfinished checksums, VLAN tags
//
// Generic receive offload merges the datagrams of a flow where an interface has
// rx-udp-gro-forwarding or rx-gro-list on; a sender on the same machine may hand
// over several as one (UDP_SEGMENT). The kernel tells in a virtio header
// (PACKET_VNET_HDR), and [Block.Next] takes them apart again. Kernels before 6.2
// cannot tell, and count such frames as dropped.
//
// A frame from a sender on the same machine may lack its checksum:
// [Frame.CompleteChecksum]. The kernel takes the outer VLAN tag out of a frame:
// [Frame.RestoreVLAN] puts it back.
//
// # Sending
//
// A [Sender] sends batches of frames with sendmmsg(2), on devices with an
// Ethernet header and on those without (tun, WireGuard), and says which frame
// of a batch the kernel refused.
package fanout
