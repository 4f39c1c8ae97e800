package loader

import (
	"errors"
	"maps"
	"sync/atomic"
	"testing"

	"github.com/cilium/ebpf"

	"xdpcast/internal/labtest"
)

// TestReadMany: reading many entries at once gives the same as one by one, for any number, and with
// empty rows in between.
func TestReadMany(t *testing.T) {
	labtest.RequireRoot(t)
	for _, tt := range []struct {
		name    string
		kind    ebpf.MapType
		room    uint32
		entries uint32
		every   uint32
	}{
		{"empty hash", ebpf.Hash, 8, 0, 1},
		{"full hash", ebpf.Hash, 3*readChunk + 1, 3*readChunk + 1, 1},
		{"array", ebpf.Array, readChunk, readChunk, 1},
		{"array, one more", ebpf.Array, readChunk + 1, readChunk + 1, 1},
	} {
		t.Run(tt.name, func(t *testing.T) {
			m, err := ebpf.NewMap(&ebpf.MapSpec{Type: tt.kind, KeySize: 4, ValueSize: 4, MaxEntries: tt.room})
			if err != nil {
				t.Fatal(err)
			}
			defer m.Close()
			for i := uint32(0); i < tt.entries; i += tt.every {
				if err := m.Put(i, i*3); err != nil {
					t.Fatal(err)
				}
			}
			each := entriesOf(t, m, readEach[uint32, uint32])
			if want := int((tt.entries + tt.every - 1) / tt.every); len(each) != want {
				t.Errorf("%d entries one by one, want %d", len(each), want)
			}
			if all := entriesOf(t, m, readAll[uint32, uint32]); !maps.Equal(all, each) {
				t.Errorf("%d entries at once, %d one by one", len(all), len(each))
			}
			if tt.kind != ebpf.Array {
				return
			}
			for _, n := range []int{0, 1, readChunk - 1, readChunk, readChunk + 1, 1 << 30} {
				values, err := readArray[uint32](m, n)
				if err != nil || len(values) != min(n, int(tt.room)) {
					t.Fatalf("%d values of %d: %v", len(values), n, err)
				}
				for i, v := range values {
					if v != uint32(i)*3 {
						t.Fatalf("value %d is %d", i, v)
					}
				}
			}
		})
	}
}

func entriesOf(t *testing.T, m *ebpf.Map, read func(*ebpf.Map) ([]uint32, []uint32, error)) map[uint32]uint32 {
	t.Helper()
	keys, values, err := read(m)
	if err != nil {
		t.Fatal(err)
	}
	all := map[uint32]uint32{}
	for i, k := range keys {
		all[k] = values[i]
	}
	if len(all) != len(keys) {
		t.Fatalf("%d keys, %d of them different", len(keys), len(all))
	}
	return all
}

// Before Linux 6.8 the kernel waits for a grace period with each row read from a map of maps, which
// took minutes for all 65,536 of a map: no code may read all.
func TestReadAllRefusesMapsOfMaps(t *testing.T) {
	inner := &ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: 4, MaxEntries: 1}
	for _, kind := range []ebpf.MapType{ebpf.ArrayOfMaps, ebpf.HashOfMaps} {
		m, err := ebpf.NewMap(&ebpf.MapSpec{Type: kind, KeySize: 4, ValueSize: 4, MaxEntries: 4, InnerMap: inner})
		if err != nil {
			t.Fatal(err)
		}
		defer m.Close()
		if _, _, err := readAll[uint32, uint32](m); !errors.Is(err, errors.ErrUnsupported) {
			t.Errorf("%s: got %v, want %v", kind, err, errors.ErrUnsupported)
		}
	}
}

// Each index is in exactly one part, there are as many parts as may wait together, and every error
// is returned.
func TestAtOnce(t *testing.T) {
	for _, n := range []int{0, 1, 2, rowWaits - 1, rowWaits, rowWaits + 1, 3*rowWaits + 5} {
		var calls atomic.Int32
		times := make([]atomic.Int32, n)
		failed := errors.New("failed")
		err := atOnce(n, func(from, to int) error {
			calls.Add(1)
			for i := from; i < to; i++ {
				times[i].Add(1)
			}
			if to == n {
				return failed
			}
			return nil
		})
		if got := errors.Is(err, failed); got != (n > 0) {
			t.Errorf("%d: error %v", n, err)
		}
		if got, want := int(calls.Load()), min(n, rowWaits); got != want {
			t.Errorf("%d: %d parts, want %d", n, got, want)
		}
		for i := range times {
			if got := times[i].Load(); got != 1 {
				t.Errorf("%d: %d is in %d parts", n, i, got)
			}
		}
	}
}
