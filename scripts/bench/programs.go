package main

// The programs of the source, of the sinks and of the simplest forwarders; see
// bpf/. Generate with `make generate`, which sets the compiler flags.
//
//go:generate go tool bpf2go -go-package main -target bpfel -no-global-types source bpf/source.bpf.c
//go:generate go tool bpf2go -go-package main -target bpfel -type histogram sink bpf/sink.bpf.c
//go:generate go tool bpf2go -go-package main -target bpfel -no-global-types forward bpf/forward.bpf.c
