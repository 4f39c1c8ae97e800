package loader

import (
	"errors"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/cilium/ebpf"

	"xdpcast/bpf"
)

// TestEachRow: for any number of wanted rows, however sparse, each is read once, with the same
// values as a lookup of its own.
func TestEachRow(t *testing.T) {
	const size = 20_000
	m, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.PerCPUArray, KeySize: 4, ValueSize: 16, MaxEntries: size})
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	cpus, err := ebpf.PossibleCPU()
	if err != nil {
		t.Fatal(err)
	}
	value := func(row uint32, cpu int) bpf.RelayOutputStats {
		return bpf.RelayOutputStats{Packets: uint64(row)*10 + uint64(cpu), Bytes: uint64(row) << 20}
	}
	perCPU := make([]bpf.RelayOutputStats, cpus)
	for row := range uint32(size) {
		for cpu := range perCPU {
			perCPU[cpu] = value(row, cpu)
		}
		if err := m.Put(row, perCPU); err != nil {
			t.Fatal(err)
		}
	}
	r := rand.New(rand.NewPCG(1, 2))
	for _, c := range []struct {
		name         string
		wanted, upTo int
	}{{"none", 0, 1}, {"one", 1, size}, {"few", 10, 20}, {"many", 5_000, 6_000}, {"all", size, size}, {"far apart", 500, size}, {"batches and rest", readChunk + 1, readChunk + 1}} {
		t.Run(c.name, func(t *testing.T) {
			var wanted []uint32
			for _, row := range r.Perm(c.upTo)[:c.wanted] {
				wanted = append(wanted, uint32(row))
			}
			seen := make([]int, len(wanted))
			err := eachRow(m, wanted, func(at int, perCPU []bpf.RelayOutputStats) {
				seen[at]++
				for cpu, got := range perCPU {
					if len(perCPU) != cpus || got != value(wanted[at], cpu) {
						t.Errorf("row %d of CPU %d: %+v", wanted[at], cpu, got)
					}
				}
			})
			if err != nil || slices.ContainsFunc(seen, func(n int) bool { return n != 1 }) {
				t.Errorf("%v, read %v", err, seen)
			}
		})
	}
	beyond := make([]uint32, 100)
	for i := range beyond {
		beyond[i] = uint32(size - 50 + i)
	}
	for _, wanted := range [][]uint32{beyond, {size}, slices.Concat(beyond[:50], make([]uint32, size), beyond[50:])} {
		if err := eachRow(m, wanted, func(int, []bpf.RelayOutputStats) {}); !errors.Is(err, ebpf.ErrKeyNotExist) {
			t.Errorf("beyond the end: %v", err)
		}
	}
}
