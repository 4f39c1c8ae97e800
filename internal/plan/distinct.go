package plan

import "hash/maphash"

// distinct lists values without duplicates, in insertion order. It finds duplicates with an
// open-addressing hash table: for 100,000 memberships a map would temporarily take ten times the
// memory on every change. It is not for concurrent use.
type distinct[T comparable] struct {
	list  []T
	seed  maphash.Seed
	table []int32 // index in list + 1, by hash with linear probing; 0 is free. Its length is a power of two
}

// newDistinct makes room for size values; more may be added.
func newDistinct[T comparable](size int) *distinct[T] {
	d := &distinct[T]{list: make([]T, 0, size), seed: maphash.MakeSeed()}
	d.resize(size)
	return d
}

// resize makes the table large enough for size values, at most half full.
func (d *distinct[T]) resize(size int) {
	length := 16
	for length < 2*size {
		length *= 2
	}
	d.table = make([]int32, length)
	for i, x := range d.list {
		d.table[d.find(x)] = int32(i + 1)
	}
}

// find returns the table entry of a value, or the free entry where it belongs.
func (d *distinct[T]) find(x T) uint64 {
	mask := uint64(len(d.table) - 1)
	at := maphash.Comparable(d.seed, x) & mask
	for d.table[at] != 0 && d.list[d.table[at]-1] != x {
		at = (at + 1) & mask
	}
	return at
}

// add appends a value; it returns false if the value is already listed.
func (d *distinct[T]) add(x T) bool {
	at := d.find(x)
	if d.table[at] != 0 {
		return false
	}
	d.list = append(d.list, x)
	if d.table[at] = int32(len(d.list)); 2*len(d.list) > len(d.table) {
		d.resize(2 * len(d.list))
	}
	return true
}
