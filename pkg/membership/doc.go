// Package membership holds multicast group memberships for programs that receive their packets by
// other means (XDP, AF_XDP, AF_PACKET) and still need the host to be a member: so that it reports
// the groups to routers and snooping switches (IGMPv3, RFC 3376; MLDv2, RFC 3810) and programs its
// network cards' filters.
//
// # Helper sockets
//
// Memberships are held by helper sockets: UDP sockets that are never bound,
// connected, written or read. They are opened as they are needed and closed as
// soon as they hold nothing.
//
// A helper socket cannot receive, so its queue cannot fill up. The kernel finds a UDP socket for a
// packet in a table of local ports, and a socket enters that table when it gets a local port: by
// bind, connect or a first send. A membership alone does not assign one. So IP_MULTICAST_ALL and
// SO_RCVBUF need no change: the first selects among the sockets found in the table, the second
// limits a queue that stays empty.
//
// # Sharding
//
// The kernel limits what one socket holds: igmp_max_memberships groups (20), igmp_max_msf or
// mld_max_msf sources a group (10, 64), and optmem_max bytes in total. It answers ENOBUFS or
// ENOMEM; the next socket takes over. The number of sockets is limited only by file descriptors,
// and no sysctl is changed.
//
// One socket has one filter a group: all sources except some, or only some. So a group's any-source
// membership, and each ten of its sources, need different sockets. Sockets are therefore arranged
// in layers: a group has at most one filter in a layer; layer 0 is for any source, each layer above
// it for one more batch of sources. Within a layer any socket with room can take a group that is
// new to the layer, which makes finding one cheap. The kernel merges the filters of all sockets
// into the interface's (RFC 3376 section 3.2), and reports the result.
//
// # Interfaces
//
// Joins name the interface by index, with MCAST_JOIN_GROUP and its relatives (RFC 3678 section 5),
// so that IPv4 and IPv6 share code and an interface needs no address. Memberships outlast a rename,
// a link that loses its carrier, and address changes: the kernel keeps them and reports them again
// by itself. After an interface has been set down and up again, source-specific ones need a
// [Manager.Refresh]. None outlasts the interface: see [Manager.DropInterface].
//
// Sockets belong to the network namespace of the thread that opened them; Join and Refresh open
// them on the calling thread. A program in more than one namespace must lock the calling goroutine
// to a thread in the right one.
package membership
