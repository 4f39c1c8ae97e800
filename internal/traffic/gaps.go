package traffic

import "sort"

// gap is a run of numbers that a higher one came before.
type gap struct {
	from, to uint64 // both are of it
	at       int64  // when the higher one came
}

// gaps are those of one flow, in their order, as far back as its tracker tells late from doubled.
type gaps struct{ list []gap }

// open notes that the numbers between the highest one so far and a new one are missing.
func (g *gaps) open(from, to uint64, at int64, window uint64) {
	if to-from >= window {
		from = to - window + 1
	}
	// The front half goes at once, so that each gap is moved once on the average.
	if half := len(g.list) / 2; half > 32 && g.list[half].to+window < to {
		g.list = g.list[:copy(g.list, g.list[half:])]
	}
	g.list = append(g.list, gap{from, to, at})
}

// opened is since when a number is missing; false for one that no gap has.
func (g *gaps) opened(number uint64) (at int64, ok bool) {
	i := sort.Search(len(g.list), func(i int) bool { return g.list[i].to >= number })
	if i == len(g.list) || g.list[i].from > number {
		return 0, false
	}
	return g.list[i].at, true
}
