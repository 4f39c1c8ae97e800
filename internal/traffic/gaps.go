package traffic

import "sort"

// gap is a run of missing numbers followed by a higher one.
type gap struct {
	from, to uint64 // both inclusive
	at       int64  // when the higher one arrived
}

// gaps are the gaps of one flow, in order, within the window of its tracker.
type gaps struct{ list []gap }

// open records that the numbers between the highest one so far and a new one are missing.
func (g *gaps) open(from, to uint64, at int64, window uint64) {
	if to-from >= window {
		from = to - window + 1
	}
	// The front half is removed at once, so that each gap is moved once on average.
	if half := len(g.list) / 2; half > 32 && g.list[half].to+window < to {
		g.list = g.list[:copy(g.list, g.list[half:])]
	}
	g.list = append(g.list, gap{from, to, at})
}

// opened is since when a number has been missing; false if no gap contains it.
func (g *gaps) opened(number uint64) (at int64, ok bool) {
	i := sort.Search(len(g.list), func(i int) bool { return g.list[i].to >= number })
	if i == len(g.list) || g.list[i].from > number {
		return 0, false
	}
	return g.list[i].at, true
}
