// Package forward is the relay of the user-space paths: it finds the rule of a
// frame, makes each output's copy with package packet, and gives the copies to the
// senders of the outputs' interfaces. It decides as the BPF programs do
// (bpf/relay.bpf.c): the same rule, bytes, drop reasons and counters.
//
// # Parts
//
// A [Set] holds the rules of a path and their counters. Each worker of the path
// has an [Engine], which one goroutine at a time uses, a batch of frames after the
// other:
//
//	engine.Begin()
//	for each frame {
//		engine.Frame(index, frame, at)
//	}
//	engine.End() // from here on the frames may be reused
//
// [Set.Update] exchanges the rules at any time; an engine takes them up at its next
// batch. [Fanout] is the PACKET_FANOUT path made of these and package fanout, and
// [AFXDP] the AF_XDP path, of these and package xsk.
//
// # Never in each other's way
//
// Workers share no lock, but for fragments, and write counters of their own.
// Nothing is allocated for a packet. What a device does not take is tried again for
// a bounded share of the worker's time, and then dropped for that output alone.
//
// # Checks that the relay program has made
//
// On an input interface that has the relay program, the program has done the loop
// and checksum checks, the policing and the counting of a rule before the frame
// comes here. Whoever hands over rules of such an interface leaves out their Rate
// and sets AllowLoop and AllowNoChecksum, so that nothing is policed twice.
package forward
