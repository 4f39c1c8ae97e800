package main

import (
	"errors"
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

// igmp is an IPv4 packet with the Router Alert option and an IGMP message.
func igmp(message ...byte) []byte {
	return append([]byte{0x46, 0, 0, 0, 0, 0, 0, 0, 1, 2, 0, 0, 10, 0, 0, 1, 224, 0, 0, 22, 0x94, 4, 0, 0}, message...)
}

func TestLeavesIn(t *testing.T) {
	for _, tt := range []struct {
		name   string
		packet []byte
		want   int
	}{
		{"leave, version 2", igmp(0x17, 0, 0, 0, 239, 1, 1, 1), 1},
		{"leave of another group", igmp(0x17, 0, 0, 0, 239, 1, 1, 2), 0},
		{"report, version 2", igmp(0x16, 0, 0, 0, 239, 1, 1, 1), 0},
		{"change to include nothing", igmp(0x22, 0, 0, 0, 0, 0, 0, 1, 3, 0, 0, 0, 239, 1, 1, 1), 1},
		{"another group behind it", igmp(0x22, 0, 0, 0, 0, 0, 0, 2, 3, 0, 0, 0, 239, 1, 1, 2, 3, 0, 0, 0, 239, 1, 1, 1), 1},
		{"block of a source", igmp(0x22, 0, 0, 0, 0, 0, 0, 1, 6, 0, 0, 1, 239, 1, 1, 1, 10, 0, 0, 5), 1},
		{"change to exclude nothing", igmp(0x22, 0, 0, 0, 0, 0, 0, 1, 4, 0, 0, 0, 239, 1, 1, 1), 0},
		{"cut off", igmp(0x22, 0, 0, 0, 0, 0, 0, 2, 3, 0, 0, 9, 239, 1, 1, 1), 0},
		{"no IGMP", make([]byte, 60), 0},
		{"nothing", nil, 0},
	} {
		if got := leavesIn(tt.packet); got != tt.want {
			t.Errorf("%s: %d leaves, want %d", tt.name, got, tt.want)
		}
	}
}

// What cannot be read is an error, not an end: leaves behind it would not be counted.
func TestCountsAllLeaves(t *testing.T) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(pair[0])
	l := leaves{pair[1]}
	defer l.close()
	for range 3 {
		if _, err := unix.Write(pair[0], igmp(0x17, 0, 0, 0, 239, 1, 1, 1)); err != nil {
			t.Fatal(err)
		}
	}
	if n, err := l.count(); n != 3 || err != nil {
		t.Errorf("%d leaves, %v", n, err)
	}
	read, write, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer read.Close()
	defer write.Close()
	if _, err := (&leaves{int(read.Fd())}).count(); !errors.Is(err, unix.ENOTSOCK) {
		t.Errorf("error is %v, want %v", err, unix.ENOTSOCK)
	}
}
