package loader

import (
	"errors"
	"fmt"

	"github.com/cilium/ebpf"
)

// readChunk is the number of entries that one system call reads.
const readChunk = 4096

// readAll returns the entries of a map, unordered. Concurrently written ones may be missing.
//
// It refuses maps of maps, of which only rows in use should be read: see rowWaits.
func readAll[K, V any](m *ebpf.Map) ([]K, []V, error) {
	if m.Type() == ebpf.ArrayOfMaps || m.Type() == ebpf.HashOfMaps {
		return nil, nil, fmt.Errorf("read all of a map of type %s: %w", m.Type(), errors.ErrUnsupported)
	}
	keys, values, err := readMany[K, V](m, int(m.MaxEntries()))
	if err != nil {
		// The kernel cannot read entries of this type in batches.
		return readEach[K, V](m)
	}
	return keys, values, nil
}

// readMany returns at least n entries of a map, or all, in few system calls.
func readMany[K, V any](m *ebpf.Map, n int) (keys []K, values []V, err error) {
	keys, values = make([]K, 0, n), make([]V, 0, n)
	var cursor ebpf.MapBatchCursor
	for len(keys) < n {
		at := len(keys)
		chunk := min(n-at, readChunk)
		keys, values = append(keys, make([]K, chunk)...), append(values, make([]V, chunk)...)
		got, err := m.BatchLookup(&cursor, keys[at:], values[at:], nil)
		keys, values = keys[:at+got], values[:at+got]
		if errors.Is(err, ebpf.ErrKeyNotExist) {
			break // these were the last
		}
		if err != nil {
			return nil, nil, err
		}
	}
	return keys, values, nil
}

// readEach returns the entries of a map, one by one.
func readEach[K, V any](m *ebpf.Map) (keys []K, values []V, err error) {
	var key K
	var value V
	iter := m.Iterate()
	for iter.Next(&key, &value) {
		keys, values = append(keys, key), append(values, value)
	}
	return keys, values, iter.Err()
}

// readArray returns the first n values of an array map, or all.
func readArray[V any](m *ebpf.Map, n int) ([]V, error) {
	n = min(n, int(m.MaxEntries()))
	_, values, err := readMany[uint32, V](m, n)
	if errors.Is(err, ebpf.ErrNotSupported) {
		_, values, err = readEach[uint32, V](m)
	}
	if err != nil {
		return nil, err
	}
	return values[:n], nil
}
