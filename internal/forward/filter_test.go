package forward

import (
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"

	"xdpcast/internal/labtest"
	"xdpcast/pkg/flow"
)

func openGate(t *testing.T) *gate {
	t.Helper()
	g, err := newGate(nil)
	if err != nil {
		t.Fatal(err)
	}
	return g
}

// The filter itself drops frames that the host sends on an input. A plain packet socket stands
// for a group on kernels before Linux 6.2, which pass such frames to the filter.
func TestFilterDropsOutgoing(t *testing.T) {
	b := newBench(t, 0)
	labtest.Enter(t, b.relay)
	f, err := newFilter(openGate(t))
	if err != nil {
		t.Fatal(err)
	}
	defer f.close()
	if _, err := f.allow(map[wantedKey]bool{wantedOf(flow.Input{Index: b.in.Index, Group: netip.MustParseAddr("239.1.1.1")}): true}); err != nil {
		t.Fatal(err)
	}
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ATTACH_BPF, f.program.FD()); err != nil {
		t.Fatal(err)
	}
	all := int(uint16(unix.ETH_P_ALL)<<8 | uint16(unix.ETH_P_ALL)>>8)
	if err := unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: uint16(all), Ifindex: b.in.Index}); err != nil {
		t.Fatal(err)
	}
	back := openSender(t, b.relay, b.in.Index)
	forth := openSender(t, b.source, iface(t, b.source, "eth0").Index)
	const n = 10
	for i := range n {
		sendFrames(t, back, [][]byte{numbered(7, i).Build()})
		sendFrames(t, forth, [][]byte{numbered(0, i).Build()})
	}
	timeout := unix.NsecToTimeval(labtest.Timeout.Nanoseconds())
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &timeout); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 2048)
	for i := range n {
		size, _, err := unix.Recvfrom(fd, buf, 0)
		if err != nil {
			t.Fatal(err)
		}
		if stream, got, ok := number(buf[:size]); !ok || stream != 0 || got != i {
			t.Fatalf("frame %d of stream %d, want frame %d of stream 0", got, stream, i)
		}
	}
}
