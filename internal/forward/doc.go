// Package forward is the relay of the user-space paths: it finds the rule of a
// frame, makes each output's copy with package packet, and passes the copies to the
// senders of the outputs' interfaces. It behaves like the BPF programs
// (bpf/relay.bpf.c): the same rule, bytes, drop reasons and counters.
//
// # Parts
//
// A [Set] holds the rules of a path and their counters. Each worker of the path
// has an [Engine], which one goroutine at a time uses, one batch of frames after
// another:
//
//	engine.Begin()
//	for each frame {
//		engine.Frame(index, frame, at)
//	}
//	engine.End() // from here on the frames may be reused
//
// [Set.Update] replaces the rules at any time; an engine uses them from its next
// batch. [Fanout] is the PACKET_FANOUT path, built from these and package fanout;
// [AFXDP] is the AF_XDP path, built from these and package xsk.
//
// # No contention
//
// Workers share no lock, except for fragments, and write their own counters. There
// is no allocation per packet. Packets that a device does not take are retried for a
// bounded share of the worker's time, and then dropped for that output alone.
//
// # Checks made by the relay program
//
// On an input interface with the relay program, the program has done a rule's loop
// and checksum checks, policing and counting before the frame arrives here. For
// rules of such an interface the caller omits Rate and sets AllowLoop and
// AllowNoChecksum, so that nothing is policed twice.
package forward
