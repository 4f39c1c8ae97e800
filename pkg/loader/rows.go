package loader

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"unsafe"

	"github.com/cilium/ebpf"
)

const (
	// batchRows is the number of wanted rows from which several are read with one system call,
	// unless the last wanted row is beyond sparseRows times their number.
	batchRows  = 64
	sparseRows = 8
	// batchBytes bounds the memory of one batch: a row has a value for each possible CPU.
	batchBytes = 1 << 20
)

// eachRow calls fn with the values, one for each CPU, of the wanted rows of a per-CPU array, in
// ascending order. at is the row's index in wanted. fn must not keep perCPU.
func eachRow[V any](m *ebpf.Map, wanted []uint32, fn func(at int, perCPU []V)) error {
	if len(wanted) == 0 {
		return nil
	}
	order := make([]int, len(wanted))
	for i := range order {
		order[i] = i
	}
	slices.SortFunc(order, func(a, b int) int { return cmp.Compare(wanted[a], wanted[b]) })
	if last := wanted[order[len(order)-1]]; len(wanted) < batchRows || uint64(last) >= sparseRows*uint64(len(wanted)) {
		var perCPU []V
		for _, at := range order {
			if err := m.Lookup(wanted[at], &perCPU); err != nil {
				return fmt.Errorf("row %d: %w", wanted[at], err)
			}
			fn(at, perCPU)
		}
		return nil
	}
	cpus, err := ebpf.PossibleCPU()
	if err != nil {
		return err
	}
	var value V
	chunk := min(readChunk, max(1, batchBytes/(cpus*int(unsafe.Sizeof(value)))))
	keys, values := make([]uint32, chunk), make([]V, chunk*cpus)
	var cursor ebpf.MapBatchCursor
	for next := 0; next < len(order); {
		n, err := m.BatchLookup(&cursor, keys, values, nil)
		if err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return err
		}
		for i, key := range keys[:n] {
			for next < len(order) && wanted[order[next]] == key {
				fn(order[next], values[i*cpus:(i+1)*cpus])
				next++
			}
		}
		if err != nil && next < len(order) { // the map has no more rows
			return fmt.Errorf("row %d: %w", wanted[order[next]], err)
		}
	}
	return nil
}
