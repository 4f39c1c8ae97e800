package loader

import (
	"errors"
	"fmt"
	"math"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/features"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// Capabilities are the optional features of the running kernel. They are probed, never derived from
// the version: distributions backport features.
type Capabilities struct {
	// MultiBuffer: programs take frames in several buffers (BPF_F_XDP_HAS_FRAGS, Linux 5.18).
	// Without it drivers refuse native mode if the MTU requires such frames, and generic mode
	// linearizes them.
	MultiBuffer bool
	// SocketMultiBuffer: AF_XDP sockets receive and send frames in several buffers (XDP_USE_SG,
	// Linux 6.6). Without it such frames are dropped with reason MultiBuffer.
	SocketMultiBuffer bool
	// TCX: links attach programs to traffic control (Linux 6.6). Without it the host's stack also
	// gets the packets of PathFanout.
	TCX bool
}

// need is a required kernel feature.
type need struct {
	what  string // for messages
	since string // the first Linux release with it
	has   probe
}

// probe tests one kernel feature. An error means that it could not be determined.
type probe func() (bool, error)

// kernelProbes are the probes of Open. Tests replace some of them to simulate another kernel.
type kernelProbes struct {
	needs                               []need
	multiBuffer, socketMultiBuffer, tcx probe
}

func probesOfKernel() *kernelProbes {
	return &kernelProbes{
		needs: []need{
			{"AF_XDP sockets (CONFIG_XDP_SOCKETS)", "4.18", supported(func() error { return features.HaveMapType(ebpf.XSKMap) })},
			{"the helper bpf_ktime_get_coarse_ns", "5.11", supported(func() error {
				return features.HaveProgramHelper(ebpf.XDP, asm.FnKtimeGetCoarseNs)
			})},
			{"atomic compare and exchange in BPF programs", "5.12", hasCompareExchange},
			{"copies of a frame to several interfaces (BPF_F_BROADCAST)", "5.14", hasBroadcast},
			{"network namespace cookies (SO_NETNS_COOKIE)", "5.14", hasNetnsCookie},
		},
		multiBuffer:       hasMultiBuffer,
		socketMultiBuffer: hasSocketMultiBuffer,
		tcx:               hasTCX,
	}
}

// run probes the kernel. The error matches ErrNotSupported if a required feature is missing, and
// names it in one line.
func (p *kernelProbes) run() (c Capabilities, err error) {
	var missing []string
	for _, n := range p.needs {
		has, err := n.has()
		if err != nil {
			return c, probeError(n.what, err)
		}
		if !has {
			missing = append(missing, fmt.Sprintf("%s, since Linux %s", n.what, n.since))
		}
	}
	if len(missing) > 0 {
		return c, fmt.Errorf("%w (%s), which lacks %s", ErrNotSupported, kernelRelease(), strings.Join(missing, "; "))
	}
	for _, o := range []struct {
		what string
		has  probe
		to   *bool
	}{
		{"frames of several buffers", p.multiBuffer, &c.MultiBuffer},
		{"frames of several buffers in AF_XDP sockets", p.socketMultiBuffer, &c.SocketMultiBuffer},
		{"tcx", p.tcx, &c.TCX},
	} {
		if *o.to, err = o.has(); err != nil {
			return c, probeError(o.what, err)
		}
	}
	return c, nil
}

func probeError(what string, err error) error {
	if errors.Is(err, unix.EPERM) {
		return permissionError(err)
	}
	return fmt.Errorf("find out whether the kernel has %s: %w", what, err)
}

func permissionError(err error) error {
	return fmt.Errorf("%w: needs root, or the capabilities CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON", err)
}

// kernelRelease names the running kernel, for messages.
func kernelRelease() string {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return "release unknown"
	}
	return unix.ByteSliceToString(u.Release[:])
}

// supported is a probe whose error matches ebpf.ErrNotSupported if the feature is missing.
func supported(try func() error) probe {
	return func() (bool, error) {
		err := try()
		if errors.Is(err, ebpf.ErrNotSupported) {
			return false, nil
		}
		return err == nil, err
	}
}

// loads says whether the verifier accepts a program. It rejects with EINVAL, EACCES or E2BIG.
func loads(spec *ebpf.ProgramSpec) (bool, error) {
	p, err := ebpf.NewProgram(spec)
	switch {
	case err == nil:
		return true, p.Close()
	case errors.Is(err, ebpf.ErrNotSupported), errors.Is(err, unix.EINVAL), errors.Is(err, unix.EACCES), errors.Is(err, unix.E2BIG):
		return false, nil
	default:
		return false, err
	}
}

func hasCompareExchange() (bool, error) {
	return loads(&ebpf.ProgramSpec{
		Name: "probe_cmpxchg", Type: ebpf.XDP, License: "MIT",
		Instructions: asm.Instructions{
			asm.Mov.Imm(asm.R0, 0),
			asm.StoreMem(asm.RFP, -8, asm.R0, asm.DWord),
			asm.Mov.Imm(asm.R1, 1),
			asm.CmpXchg.Mem(asm.RFP, asm.R1, asm.DWord, -8),
			asm.Mov.Imm(asm.R0, 0),
			asm.Return(),
		},
	})
}

// hasBroadcast runs a program that broadcasts: older kernels load it, and reject the flag only when
// it runs.
func hasBroadcast() (_ bool, err error) {
	const xdpRedirect, ethernetMinimum = 4, 64
	devmap, err := ebpf.NewMap(&ebpf.MapSpec{Name: "probe_devmap", Type: ebpf.DevMap, KeySize: 4, ValueSize: 8, MaxEntries: 1})
	if errors.Is(err, unix.EINVAL) { // Linux 5.8: rows with programs
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer func() { err = errors.Join(err, devmap.Close()) }()
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: "probe_bcast", Type: ebpf.XDP, License: "MIT",
		Instructions: asm.Instructions{
			asm.LoadMapPtr(asm.R1, devmap.FD()),
			asm.Mov.Imm(asm.R2, 0),
			asm.Mov.Imm(asm.R3, unix.BPF_F_BROADCAST),
			asm.FnRedirectMap.Call(),
			asm.Return(),
		},
	})
	if err != nil {
		return false, err
	}
	defer func() { err = errors.Join(err, p.Close()) }()
	verdict, err := p.Run(&ebpf.RunOptions{Data: make([]byte, ethernetMinimum)})
	return verdict == xdpRedirect, err
}

func hasNetnsCookie() (bool, error) {
	_, err := netnsCookie()
	if errors.Is(err, unix.ENOPROTOOPT) {
		return false, nil
	}
	return err == nil, err
}

func hasMultiBuffer() (bool, error) {
	return loads(&ebpf.ProgramSpec{
		Name: "probe_frags", Type: ebpf.XDP, License: "MIT", Flags: unix.BPF_F_XDP_HAS_FRAGS,
		Instructions: asm.Instructions{asm.FnXdpGetBuffLen.Call(), asm.Mov.Imm(asm.R0, 0), asm.Return()},
	})
}

// nowhere is an interface index that no interface has.
const nowhere = math.MaxInt32

// hasSocketMultiBuffer binds a socket to no interface: the kernel checks the flags first (xsk_bind
// of net/xdp/xsk.c).
func hasSocketMultiBuffer() (_ bool, err error) {
	fd, err := unix.Socket(unix.AF_XDP, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
	if errors.Is(err, unix.EPERM) { // without CAP_NET_RAW the path does not work at all
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("AF_XDP socket: %w", err)
	}
	defer func() { err = errors.Join(err, unix.Close(fd)) }()
	err = unix.Bind(fd, &unix.SockaddrXDP{Flags: unix.XDP_USE_SG, Ifindex: nowhere})
	switch {
	case errors.Is(err, unix.ENODEV):
		return true, nil
	case errors.Is(err, unix.EINVAL):
		return false, nil
	default:
		return false, fmt.Errorf("bind AF_XDP socket: %w", err)
	}
}

// hasTCX attaches to no interface: the kernel checks the type of the link first.
func hasTCX() (_ bool, err error) {
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: "probe_tcx", Type: ebpf.SchedCLS, License: "MIT",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 0), asm.Return()},
	})
	if err != nil {
		return false, err
	}
	defer func() { err = errors.Join(err, p.Close()) }()
	lk, err := link.AttachTCX(link.TCXOptions{Program: p, Interface: nowhere, Attach: ebpf.AttachTCXIngress})
	switch {
	case err == nil:
		return true, lk.Close()
	case errors.Is(err, ebpf.ErrNotSupported):
		return false, nil
	case errors.Is(err, unix.ENODEV):
		return true, nil
	default:
		return false, err
	}
}
