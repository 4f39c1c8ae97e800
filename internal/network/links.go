package network

import (
	"maps"
	"slices"
)

// fewLinks is the number of links that are read one by one rather than in a list of all, of
// which an eighth may be more.
const fewLinks = 64

// readLinks reads again what unread says of links, and says whether any is different. On an error
// nothing is.
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
	n.gone, n.reborn = nil, false // counted
	return differ, nil
}

// addUppers adds to unread the links that are made upon one that comes or goes. The kernel does
// not announce that a lower link has left for another namespace, or is back.
func (w *Watcher) addUppers() {
	came := false
	for index := range w.unread.links {
		came = came || w.links[index] == nil
	}
	if !came && len(w.unread.gone) == 0 {
		return
	}
	for index, l := range w.links {
		if came && l.outside || l.Lower != 0 && w.unread.gone[l.Lower] {
			w.unread.link(index)
		}
	}
}

// replace takes a link as it is now, nil when it is gone, for what was known of its index, and
// says whether anything is different.
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
		if old.Equal(l) {
			return false
		}
	}
	w.links[index] = l
	return true
}

// readEveryLink reads all links, each list once.
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
			// A list ends at the first device that is asleep: ask one by one.
			w.readQueues(l)
		case queues != nil:
			l.Queues = 1 // a driver without the operation has one each way
		}
	}
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
	return some, nil
}

// readQueues asks for the queues of one link. They stay unknown where the driver gives no
// answer.
func (w *Watcher) readQueues(l *Link) {
	queues, err := w.kernel.queues(l.Index)
	if err != nil {
		w.log.Debug("receive queues of an interface", "interface", l.Name, "error", err)
	}
	l.Queues = queues[l.Index]
}
