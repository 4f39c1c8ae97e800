// Package live sends and receives numbered frames inside the kernel, at rates of millions a second: for
// benchmarks and long runs that must account for every packet.
//
// A [Source] sends by BPF_PROG_RUN with live frames, paced inside the kernel; what its veth did not
// take is counted apart ([Refused]). A [Witness] is an XDP program at the far end that keeps account
// of the numbers.
package live

// The programs; see bpf/. Generate with `make generate`, which sets the compiler flags.
//
//go:generate go tool bpf2go -go-package live -target bpfel -no-global-types source bpf/source.bpf.c
//go:generate go tool bpf2go -go-package live -target bpfel -type stream -type wrong witness bpf/witness.bpf.c
