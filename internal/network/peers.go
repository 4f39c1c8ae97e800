package network

import (
	"encoding/binary"
	"errors"
	"maps"
	"slices"

	"golang.org/x/sys/unix"
)

// maxPeers bounds the filter of the peers' announcements. With more peers in other network namespaces
// their MTUs are seen with Resync alone.
const maxPeers = 1024

// peers are the veth peers in other network namespaces: their indexes there, and those of the links
// whose peers they are.
type peers map[int][]int

// peersOf lists the peers of links.
func peersOf(links map[int]*Link) peers {
	all := peers{}
	for _, index := range slices.Sorted(maps.Keys(links)) {
		if l := links[index]; l.peer != 0 && l.peerNetns != ownNetns {
			all[l.peer] = append(all[l.peer], index)
		}
	}
	return all
}

// listenToPeers opens a listener for links of all network namespaces that have an id in this one.
// The kernel permits that with CAP_NET_BROADCAST; without, nothing is heard of peers. Its filter
// lets announcements of known peers pass alone, so that other namespaces wake nobody.
func (w *Watcher) listenToPeers(open func(protocol int, hear func(message), lost func(), groups ...uint32) (*listener, error)) error {
	l, err := open(unix.NETLINK_ROUTE, func(m message) { w.pending.hearPeer(m, w.peers) }, func() { w.pending.all = true })
	if err != nil {
		return err
	}
	var refused error
	err = l.raw.Control(func(fd uintptr) {
		refused = errors.Join(
			filterPeers(int(fd), nil),
			unix.SetsockoptInt(int(fd), unix.SOL_NETLINK, unix.NETLINK_LISTEN_ALL_NSID, 1))
		if refused == nil {
			refused = join(int(fd), unix.RTNLGRP_LINK, true)
		}
	})
	if err != nil {
		return err
	}
	if refused != nil {
		w.log.Debug("changes of veth peers in other network namespaces are not heard", "error", refused)
		w.listeners = slices.DeleteFunc(w.listeners, func(o *listener) bool { return o == l })
		return l.socket.Close()
	}
	w.foreign = l
	return nil
}

// hearPeer takes up an announcement of a link that may be a peer in another namespace. An index may
// be that of others as well, so that it says only which links to read again.
func (n *news) hearPeer(m message, of peers) {
	if _, index, ok := parseIndex(m.data); ok {
		for _, own := range of[index] {
			n.link(own)
		}
	}
}

// followPeers has the peers of the links heard from now on. What changed before that of those that are
// new is read again.
func (w *Watcher) followPeers() {
	now := peersOf(w.links)
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.foreign == nil || maps.EqualFunc(now, w.peers, slices.Equal) {
		return
	}
	indexes := slices.Sorted(maps.Keys(now))
	if len(indexes) > maxPeers {
		indexes = nil
	}
	var refused error
	err := w.foreign.raw.Control(func(fd uintptr) { refused = filterPeers(int(fd), indexes) })
	if err := errors.Join(err, refused); err != nil {
		if !w.closed {
			w.log.Warn("changes of veth peers in other network namespaces are not heard", "error", err)
		}
		return
	}
	for index, own := range now {
		if slices.Equal(w.peers[index], own) {
			continue
		}
		for _, link := range own {
			w.pending.link(link)
		}
		w.signal()
	}
	w.peers = now
}

// filterPeers has a netlink socket take messages of links with these indexes alone.
func filterPeers(fd int, indexes []int) error {
	const indexAt = unix.SizeofNlMsghdr + 4 // of struct ifinfomsg
	filter := make([]unix.SockFilter, 0, 2*len(indexes)+2)
	filter = append(filter, unix.SockFilter{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: indexAt})
	for _, index := range indexes {
		// The load takes it for a number in network order.
		k := binary.BigEndian.Uint32(binary.NativeEndian.AppendUint32(nil, uint32(index)))
		filter = append(filter,
			unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, Jf: 1, K: k},
			unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: 0xffffffff})
	}
	filter = append(filter, unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K})
	return unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]})
}
