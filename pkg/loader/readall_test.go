package loader

import (
	"maps"
	"testing"

	"github.com/cilium/ebpf"

	"xdpcast/internal/labtest"
)

// TestReadMany: many entries at once are what there is one by one, however many, and
// with rows empty in between.
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
		{"map of maps", ebpf.ArrayOfMaps, 2 * readChunk, 5, 1},
		{"map of maps with empty rows", ebpf.ArrayOfMaps, 2 * readChunk, 2 * readChunk, 1000},
	} {
		t.Run(tt.name, func(t *testing.T) {
			inner := &ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: 4, MaxEntries: 1}
			m, err := ebpf.NewMap(&ebpf.MapSpec{Type: tt.kind, KeySize: 4, ValueSize: 4, MaxEntries: tt.room, InnerMap: inner})
			if err != nil {
				t.Fatal(err)
			}
			defer m.Close()
			one, err := ebpf.NewMap(inner)
			if err != nil {
				t.Fatal(err)
			}
			defer one.Close()
			for i := uint32(0); i < tt.entries; i += tt.every {
				value := i * 3
				if tt.kind == ebpf.ArrayOfMaps {
					value = uint32(one.FD())
				}
				if err := m.Put(i, value); err != nil {
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
