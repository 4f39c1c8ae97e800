// Package traffic sends and receives numbered, time-stamped UDP packets, to measure what a network,
// in particular a relay, does to them: what it loses, duplicates, reorders, corrupts or delays, and
// which header fields it changes.
//
// A Sender and a Receiver open their sockets in the network namespace of the calling thread;
// afterwards they run on any goroutine. Parsing, the payload, the pacing, the sequence accounting
// and the latency histogram are pure code without system calls.
package traffic
