//go:build armbe || arm64be || m68k || mips || mips64 || mips64p32 || ppc || ppc64 || s390 || s390x || shbe || sparc || sparc64

package bpf

// The programs and what they share with Go are compiled for little-endian machines. The
// undefined name below is the message of a build for another one.
var _ = xdpcast_needs_a_little_endian_machine_such_as_amd64_or_arm64
