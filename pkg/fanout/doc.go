// Package fanout receives frames from AF_PACKET sockets that share an
// interface's traffic through PACKET_FANOUT, and sends frames through AF_PACKET.
// It knows nothing of rules: a socket filter selects the frames, and the caller
// processes them.
//
// # Receiving
//
// A [Group] consists of workers, each a socket with a ring of blocks
// (TPACKET_V3, Documentation/networking/packet_mmap.rst). The kernel copies
// frames into a block, and hands it over when it is full or its timeout expires;
// the caller reads the frames in place, and releases the block:
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
// The kernel hands over a partly filled block after a millisecond at the earliest. With
// [Options].Frames a worker has a second ring (TPACKET_V2), whose frames are handed over
// immediately, one by one. A BPF program assigns each frame to one of the two rings: to the
// frame ring while that has room, otherwise to a block. Wait and Next return the frames of
// both in order of arrival.
//
// That order is exact for frames handled by one CPU. If several CPUs handle a flow while
// frames arrive through both rings, frames are sorted by their receive timestamps: a clock
// step at that moment can reorder them.
//
// Every frame that arrives goes to one worker of the group, never to two, and
// the host's own receivers are unaffected. Frames that the host sends are not
// received; see [Options].Outgoing.
//
// # Opening without a race
//
// A packet socket that is bound but has not yet joined its group receives all of
// the interface's traffic in addition to the group, so packets arrive twice. But
// only a bound socket can join: PACKET_FANOUT returns EINVAL on a socket without
// a protocol, and bind returns EINVAL on a member (fanout_add and packet_do_bind
// of net/packet/af_packet.c). Therefore the order is
//
//  1. a socket of protocol 0, which receives nothing;
//  2. a filter that drops everything;
//  3. version, virtio header, ring and mapping;
//  4. bind, then PACKET_FANOUT;
//  5. when every worker has joined, first with the rings of blocks and then with the
//     frame rings: the caller's filter.
//
// The rings are empty before step 5. After it, the number of members, which
// determines the worker of each flow, no longer changes.
//
// # Group ids
//
// The first socket requests an id unused in the network namespace
// (PACKET_FANOUT_FLAG_UNIQUEID). The group is limited to exactly its number of
// sockets (max_num_members of struct fanout_args), so that another program that
// happens to use the same id is refused with ENOSPC instead of receiving a share
// of the packets.
//
// # Merged datagrams, partial checksums, VLAN tags
//
// Generic receive offload merges the datagrams of a flow on interfaces with
// rx-udp-gro-forwarding or rx-gro-list enabled; a sender on the same machine may
// pass several as one (UDP_SEGMENT). The kernel reports this in a virtio header
// (PACKET_VNET_HDR), and [Block.Next] splits them again. Kernels before 6.2
// cannot report it, and count such frames as dropped.
//
// A frame from a sender on the same machine may lack its checksum:
// [Frame.CompleteChecksum] fills it in. The kernel removes the outer VLAN tag
// from a frame: [Frame.RestoreVLAN] puts it back.
//
// # Handing over
//
// Another process can continue with a group through duplicates of its descriptors ([Group.Files]): it maps
// them with [Inherit], and takes over with [Group.Resume] when this process has closed the group, or
// has ended in any way. Frames wait in the rings meanwhile. A worker's position is in shared memory, and
// [Block.Commit] says which frames of a block are no longer to be handed out.
//
// # Sending
//
// A [Sender] sends batches of frames with sendmmsg(2), on devices with and
// without an Ethernet header (tun, WireGuard), and reports which frame of a
// batch the kernel refused.
package fanout
