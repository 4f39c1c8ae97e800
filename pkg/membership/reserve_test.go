package membership

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"xdpcast/internal/lab"
	"xdpcast/internal/labtest"
)

// childOf says to the test's own program, started again with a limit of its own, what to be.
const childOf = "XDPCAST_TEST_RESERVE"

// However many memberships are wanted, helper sockets leave file descriptors for the rest
// of the process, and what could not be joined says why and can be tried again.
func TestMembershipsLeaveDescriptors(t *testing.T) {
	if os.Getenv(childOf) != "" {
		joinBeyondTheLimit(t)
		return
	}
	host, peer := labtest.Host(t, "res"), labtest.Host(t, "peer")
	labtest.Connect(t, lab.End{Host: host, Name: "in0", Addrs: []string{"10.0.0.1/24"}}, lab.End{Host: peer, Name: "in0"})
	// The shell sets the limit for good: Go raises the soft one to the hard one at start.
	cmd := exec.Command("sh", "-c", "ulimit -n 120 && exec \"$@\"", "sh", os.Args[0], "-test.run=^TestMembershipsLeaveDescriptors$", "-test.v")
	cmd.Env = append(os.Environ(), childOf+"=1")
	var out strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := host.Start(cmd); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("%v:\n%s", err, out.String())
	}
}

func joinBeyondTheLimit(t *testing.T) {
	m := New(Options{})
	defer m.Close()
	in0, err := net.InterfaceByName("in0")
	if err != nil {
		t.Fatal(err)
	}
	joined, refused := 0, 0
	var last error
	for i := range 3000 {
		err := m.Join(Membership{Interface: "in0", Index: in0.Index, Group: netip.AddrFrom4([4]byte{239, 1, byte(i >> 8), byte(i)})})
		if err == nil {
			joined++
			continue
		}
		refused++
		last = err
	}
	if joined < 1000 || refused == 0 {
		t.Errorf("%d joined, %d refused: want most sockets used, and then refusals", joined, refused)
	}
	var socketErr *HelperSocketError
	if !errors.As(last, &socketErr) || !errors.Is(last, unix.EMFILE) || !Transient(last) || !strings.Contains(fmt.Sprint(last), "the last 30 of 120 file descriptors are kept") {
		t.Errorf("refused with %v", last)
	}
	// The rest of the process still opens what it needs.
	for range 25 {
		f, err := os.Open("/dev/null")
		if err != nil {
			t.Fatalf("nothing is left: %v", err)
		}
		defer f.Close()
	}
}

func TestReserve(t *testing.T) {
	for limit, want := range map[uint64]uint64{8: 8, 64: 16, 120: 30, 1024: 256, 1 << 20: 256} {
		if got := reserve(limit); got != want {
			t.Errorf("of %d: %d, want %d", limit, got, want)
		}
	}
}
