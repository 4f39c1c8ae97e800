// Package traffic sends and receives numbered, time-stamped UDP, to show what
// a network - a relay, above all - does to it: what it loses, repeats,
// reorders, corrupts or delays, and which header fields it changes.
//
// A Sender and a Receiver open their sockets in the network namespace of the
// thread that makes them; after that they run on any goroutine. Parsing, the
// payload, the pacing, the sequence accounting and the latency histogram are
// plain values without system calls.
package traffic
