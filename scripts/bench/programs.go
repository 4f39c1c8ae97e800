package main

// The programs of the sinks and of the simplest forwarders; see
// bpf/. Generate with `make generate`, which sets the compiler flags.
//
//go:generate go tool bpf2go -go-package main -target bpfel -type histogram sink bpf/sink.bpf.c
//go:generate go tool bpf2go -go-package main -target bpfel -no-global-types forward bpf/forward.bpf.c
