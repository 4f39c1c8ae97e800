package labtest

import (
	"errors"
	"fmt"
	"math"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"xdpcast/internal/lab"
)

// Optional features of the running kernel, probed independently of the product's own probes. Tests
// use them to expect what docs/kernels.md promises without a feature; tests of the feature itself
// skip (NeedsKernel).

// nowhere is an interface index that no interface has.
const nowhere = math.MaxInt32

// NeedsKernel skips the test on a kernel that lacks the tested feature. test/kernels.txt lists the
// expected skips.
func NeedsKernel(t testing.TB, has bool, what, since string) {
	t.Helper()
	if !has {
		t.Skipf("this kernel lacks %s (Linux %s)", what, since)
	}
}

// MultiBufferSockets says whether AF_XDP sockets take packets of several frames (XDP_USE_SG, Linux
// 6.6). The kernel checks the flags of bind before the interface (xsk_bind of net/xdp/xsk.c).
func MultiBufferSockets(t testing.TB) bool {
	t.Helper()
	fd := xdpSocket(t)
	defer unix.Close(fd)
	err := unix.Bind(fd, &unix.SockaddrXDP{Flags: unix.XDP_USE_SG, Ifindex: nowhere})
	if !errors.Is(err, unix.ENODEV) && !errors.Is(err, unix.EINVAL) {
		t.Fatalf("bind AF_XDP socket: %v", err)
	}
	return errors.Is(err, unix.ENODEV)
}

// TXBudget says whether the number of frames per system call of an AF_XDP socket can be set
// (XDP_MAX_TX_SKB_BUDGET, Linux 6.17). The kernel refuses it while there is no TX ring.
func TXBudget(t testing.TB) bool {
	t.Helper()
	fd := xdpSocket(t)
	defer unix.Close(fd)
	err := unix.SetsockoptInt(fd, unix.SOL_XDP, unix.XDP_MAX_TX_SKB_BUDGET, 32)
	if err != nil && !errors.Is(err, unix.EACCES) && !errors.Is(err, unix.ENOPROTOOPT) {
		t.Fatalf("set XDP_MAX_TX_SKB_BUDGET: %v", err)
	}
	return !errors.Is(err, unix.ENOPROTOOPT)
}

func xdpSocket(t testing.TB) int {
	t.Helper()
	fd, err := unix.Socket(unix.AF_XDP, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatalf("AF_XDP socket: %v", err)
	}
	return fd
}

// MergedDatagrams says whether packet sockets with virtio_net_hdr take merged datagrams: the kernel
// describes them in the header since it has that offload for tun devices (TUN_F_USO4, Linux 6.2).
func MergedDatagrams(t testing.TB, h *lab.Host) (described bool) {
	t.Helper()
	Do(t, h, func() error {
		fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("open /dev/net/tun: %w", err)
		}
		defer unix.Close(fd)
		request, err := unix.NewIfreq("")
		if err != nil {
			return err
		}
		request.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
		if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, request); err != nil {
			return fmt.Errorf("make tun device: %w", err)
		}
		err = unix.IoctlSetInt(fd, unix.TUNSETOFFLOAD, unix.TUN_F_CSUM|unix.TUN_F_USO4|unix.TUN_F_USO6)
		if described = err == nil; !described && !errors.Is(err, unix.EINVAL) {
			return fmt.Errorf("set TUN_F_USO4: %w", err)
		}
		return nil
	})
	return described
}

// TCX says whether links attach programs to traffic control (Linux 6.6). The kernel checks the type
// of the link before the interface.
func TCX(t testing.TB) bool {
	t.Helper()
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Type: ebpf.SchedCLS, License: "MIT",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 0), asm.Return()},
	})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	_, err = link.AttachTCX(link.TCXOptions{Program: p, Interface: nowhere, Attach: ebpf.AttachTCXIngress})
	if !errors.Is(err, unix.ENODEV) && !errors.Is(err, ebpf.ErrNotSupported) {
		t.Fatalf("attach by tcx to no interface: %v", err)
	}
	return errors.Is(err, unix.ENODEV)
}

// DevicesTellFeatures says whether devices report their XDP features (the netlink family netdev,
// Linux 6.3).
func DevicesTellFeatures(t testing.TB, h *lab.Host) (they bool) {
	t.Helper()
	Do(t, h, func() error {
		_, err := netlink.GenlFamilyGet("netdev")
		if they = err == nil; errors.Is(err, unix.ENOENT) {
			err = nil
		}
		return err
	})
	return they
}
