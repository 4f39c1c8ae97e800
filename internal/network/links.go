package network

import (
	"maps"
	"slices"
)

// fewLinks is the number of links up to which they are read one by one rather than in a list of
// all; more are allowed up to an eighth of all links.
const fewLinks = 64

// readLinks reads the links marked in unread again, and returns whether any changed. On an error
// nothing changes.
func (w *Watcher) readLinks() (differ bool, err error) {
	n := &w.unread
	w.addUppers()
	all := n.all || len(n.links) > fewLinks+len(w.links)/8
	if !all && len(n.links) == 0 {
		return false, nil
	}
	var fresh map[int]*Link
	if all {
		fresh, err = w.readEveryLink()
	} else {
		fresh, err = w.readSomeLinks()
	}
	if err != nil {
		return false, err
	}
	if all {
		for index := range w.links {
			if fresh[index] == nil {
				fresh[index] = nil // gone
			}
		}
	}
	for _, index := range slices.Sorted(maps.Keys(fresh)) {
		differ = w.replace(index, fresh[index]) || differ
	}
	differ = w.pairVeths(fresh) || differ
	differ = w.boundBonds() || differ
	n.gone, n.reborn = nil, false // counted
	return differ, nil
}

// addUppers adds to unread the links stacked on one that appears or disappears. The kernel does not
// announce that a lower link left for another namespace, or came back.
func (w *Watcher) addUppers() {
	came := false
	for index := range w.unread.links {
		came = came || w.links[index] == nil
	}
	if !came && len(w.unread.gone) == 0 {
		return
	}
	for index, l := range w.links {
		if l.peer != 0 && l.peerNetns == ownNetns && w.unread.gone[l.peer] {
			w.unread.link(index)
		}
		if came && l.outside || l.Lower != 0 && w.unread.gone[l.Lower] {
			w.unread.link(index)
		}
	}
}

// replace stores the current description of an index, nil if the link is gone, and returns whether
// anything changed.
func (w *Watcher) replace(index int, l *Link) bool {
	old := w.links[index]
	switch {
	case l == nil:
		delete(w.links, index)
		return old != nil
	case old == nil || w.unread.reborn || w.unread.gone[index]:
		w.generations++
		l.Generation = w.generations
	default:
		l.Generation = old.Generation
		if l.Kind == bond {
			l.PeerMTU = old.PeerMTU // see boundBonds
		}
		if old.Equal(l) {
			return false
		}
	}
	w.links[index] = l
	return true
}

// pairVeths passes the MTUs of newly read veths to their peers in this network namespace, and
// returns whether any changed: nothing announces that a peer's MTU changed, or that it came back
// here.
func (w *Watcher) pairVeths(fresh map[int]*Link) (differ bool) {
	for _, l := range fresh {
		if l == nil || l.peer == 0 || l.peerNetns != ownNetns {
			continue
		}
		peer := w.links[l.peer]
		if peer == nil || peer.Kind != "veth" || peer.peer == l.Index && peer.peerNetns == ownNetns && peer.PeerMTU == l.MTU {
			continue
		}
		changed := *peer
		changed.peer, changed.peerNetns, changed.PeerMTU, changed.PeerUnread = l.Index, ownNetns, l.MTU, ""
		w.links[l.peer], differ = &changed, true
	}
	return differ
}

// bond is the kind of a link that sends redirected frames through its ports.
const bond = "bond"

// boundBonds sets each bond's peer MTU to the smallest of its ports' peers, and returns whether any
// changed.
func (w *Watcher) boundBonds() (differ bool) {
	least := map[int]int{}
	for _, l := range w.links {
		if l.PeerMTU != 0 && l.MasterKind == bond && (least[l.Master] == 0 || l.PeerMTU < least[l.Master]) {
			least[l.Master] = l.PeerMTU
		}
	}
	for index, l := range w.links {
		if l.Kind == bond && l.PeerMTU != least[index] {
			changed := *l
			changed.PeerMTU = least[index]
			w.links[index], differ = &changed, true
		}
	}
	return differ
}

// readPeers reads the MTUs of the peers of the veths among links. Links missing from it have not
// changed.
func (w *Watcher) readPeers(links map[int]*Link) {
	for _, l := range links {
		switch {
		case l == nil || l.peer == 0:
		case l.peerNetns != ownNetns:
			var err error
			if l.PeerMTU, err = w.kernel.peerMTU(l.peerNetns, l.peer); err != nil {
				l.PeerUnread = err.Error()
			}
		default:
			peer, fresh := links[l.peer]
			if !fresh {
				peer = w.links[l.peer]
			}
			if peer != nil {
				l.PeerMTU = peer.MTU
			}
		}
	}
}

// readEveryLink reads all links, with one request per list.
func (w *Watcher) readEveryLink() (map[int]*Link, error) {
	all, err := w.kernel.links()
	if err != nil {
		return nil, err
	}
	addrs, err := w.kernel.addrs(0)
	if err != nil {
		return nil, err
	}
	features, err := w.kernel.features(0)
	if err != nil {
		return nil, err
	}
	queues, err := w.kernel.queues(0)
	for index, l := range all {
		l.Addrs, l.Features = addrs[index], features[index]
		switch n, ok := queues[index]; {
		case ok:
			l.Queues = n
		case err != nil:
			// A list ends at the first suspended device: request them one by one.
			w.readQueues(l)
		case queues != nil:
			l.Queues = 1 // a driver without the operation has one queue each way
		}
	}
	w.readPeers(all)
	return all, nil
}

// readSomeLinks reads the links of unread; nil for those that are gone.
func (w *Watcher) readSomeLinks() (map[int]*Link, error) {
	some := make(map[int]*Link, len(w.unread.links))
	for index := range w.unread.links {
		l, err := w.kernel.link(index)
		if err != nil {
			return nil, err
		}
		if some[index] = l; l == nil {
			continue
		}
		addrs, err := w.kernel.addrs(index)
		if err != nil {
			return nil, err
		}
		l.Addrs = addrs[index]
		features, err := w.kernel.features(index)
		if err != nil {
			return nil, err
		}
		l.Features = features[index]
		w.readQueues(l)
	}
	w.readPeers(some)
	return some, nil
}

// readQueues requests the queues of one link. They stay unknown if the driver gives no answer.
func (w *Watcher) readQueues(l *Link) {
	queues, err := w.kernel.queues(l.Index)
	if err != nil {
		w.log.Debug("receive queues of an interface", "interface", l.Name, "error", err)
	}
	l.Queues = queues[l.Index]
}
