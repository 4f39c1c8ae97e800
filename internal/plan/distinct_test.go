package plan

import (
	"math/rand/v2"
	"slices"
	"testing"
)

// TestDistinct: as a map and a list would have it, whatever the room at first.
func TestDistinct(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 1))
	for _, size := range []int{0, 1, 8, 5000} {
		d := newDistinct[int](size)
		seen := map[int]bool{}
		var want []int
		for range 5000 {
			x := r.IntN(3000)
			if added := d.add(x); added == seen[x] {
				t.Fatalf("%d is added: %v", x, added)
			}
			if !seen[x] {
				want = append(want, x)
			}
			seen[x] = true
		}
		if !slices.Equal(d.list, want) {
			t.Errorf("with room for %d the list is %v, want %v", size, d.list, want)
		}
	}
}
