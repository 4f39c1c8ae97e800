// Command bench measures xdpcast against its alternatives, in one run on one machine, and writes a
// report. Source, relay and sinks run in network namespaces of their own.
//
// The source is BPF_PROG_RUN with live frames, paced inside the kernel; the sinks are XDP programs
// that check, count and drop. Every subject has its own network and all run at once, while the
// trials take turns, so that a change in the machine's pace affects all of them.
//
// # Map
//
// What to run:
//
//	main.go     the modes: measure everything, or only prove that it works
//	options.go  the command line, and which subject is measured with what (jobs)
//	traffic.go  setup: outputs, flows, frame length; the addresses of both sides
//
// Subjects, what is measured:
//
//	subject.go          what a subject is, how it starts and accounts for packets
//	subject_xdpcast.go  xdpcast, on each of its paths
//	subject_xdp.go      direct, a bare redirect and a bare broadcast: the ceilings
//	subject_kernel.go   multicast routing, tc, nftables
//	subject_afxdp.go    ref/forward.c, an AF_XDP forwarder in C
//	subject_testpmd.go  testpmd, the forwarder of DPDK, on two of its drivers
//	subject_socat.go    socat
//	process.go          programs that run on a host of the lab
//
// Around a subject:
//
//	lab.go         its network: source, relay, sinks
//	programs.go    generation of the BPF programs in bpf/
//	source.go      sends by BPF_PROG_RUN, with internal/live
//	source_xsk.go  sends frames too long for BPF_PROG_RUN, by AF_XDP
//	sink.go        what arrived: counts, faults, latencies
//	histogram.go   the sinks' latencies
//
// Measuring:
//
//	trial.go    one trial: a number of frames at a rate, and their outcome
//	search.go   the highest loss-free rate (RFC 2544)
//	measure.go  rounds of trials in turns: throughput, loss-free rate, latency
//	survive.go  packets lost while the daemon is killed and restarted
//	memory.go   the memory of the daemon and of its maps
//	proof.go    proofs that the bench measures what it says
//	smoke.go    every subject once, without figures (CI)
//	cpu.go      CPU time, and what other users of the machine took
//	machine.go  the machine and software versions behind the figures
//
// Reporting:
//
//	report.go    all results of a run as JSON, and whether the machine was noisy
//	summary.go   figures from samples
//	targets.go   the targets and their verdicts
//	markdown.go  the report for people
//	charts.go    which charts there are
//	svg.go       how a chart is drawn
package main
