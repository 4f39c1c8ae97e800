package fanout

import (
	"errors"
	"fmt"
	"math"
	"time"

	"golang.org/x/sys/unix"
)

// Of include/uapi/linux/filter.h: where a classic program finds the type of the packet.
const (
	skfAdOff     = 1<<32 - 0x1000 // SKF_AD_OFF, -0x1000
	skfAdPktType = 4              // SKF_AD_PKTTYPE
)

// skipOutgoing puts in front of a classic BPF program what drops the frames that the host
// sends. PACKET_FANOUT_FLAG_IGNORE_OUTGOING does so without a filter, but kernels before
// Linux 6.2 take the flag and do nothing.
func skipOutgoing(program []unix.SockFilter) []unix.SockFilter {
	return append([]unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_B | unix.BPF_ABS, K: skfAdOff + skfAdPktType},
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: unix.PACKET_OUTGOING, Jf: skipLen - 2},
		{Code: unix.BPF_RET | unix.BPF_K, K: 0},
	}, program...)
}

// skipLen is how many instructions skipOutgoing adds.
const skipLen = 3

// keep is a classic BPF program that keeps so many bytes of every frame.
func keep(bytes uint32) []unix.SockFilter {
	return []unix.SockFilter{{Code: unix.BPF_RET | unix.BPF_K, K: bytes}}
}

// openWorker opens a socket that has joined the group and still drops everything.
func (g *Group) openWorker() (*Worker, error) {
	w := &Worker{group: g, fd: -1, event: -1, blockSize: g.opts.BlockSize}
	for _, s := range []struct {
		step Step
		do   func() error
	}{
		{StepSocket, w.openSocket},
		{StepDropAll, func() error { return g.sys.setFilter(w.fd, keep(0)) }},
		{StepVersion, func() error { return w.setOption(unix.PACKET_VERSION, unix.TPACKET_V3) }},
		{StepVnetHeader, func() error { return w.setOption(unix.PACKET_VNET_HDR, 1) }},
		{StepRing, w.makeRing},
		{StepMap, w.mapRing},
		{StepBind, w.bind},
		{StepHardware, w.readHardwareType},
		{StepJoin, w.join},
		{StepGroupID, w.readGroupID},
		{StepEventFD, w.openEvent},
	} {
		if err := s.do(); err != nil {
			return nil, errors.Join(g.fail(s.step, err), w.free())
		}
	}
	w.fds[0] = unix.PollFd{Fd: int32(w.fd), Events: unix.POLLIN}
	w.fds[1] = unix.PollFd{Fd: int32(w.event), Events: unix.POLLIN}
	w.block.worker = w
	return w, nil
}

func (w *Worker) setOption(option, value int) error {
	return w.group.sys.setInt(w.fd, unix.SOL_PACKET, option, value)
}

func (w *Worker) openSocket() (err error) {
	w.fd, err = w.group.sys.socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
	return err
}

func (w *Worker) makeRing() error {
	o := &w.group.opts
	return w.group.sys.setRing(w.fd, &unix.TpacketReq3{
		Block_size: uint32(o.BlockSize),
		Block_nr:   uint32(o.Blocks),
		// Frames have no size of their own in a ring of blocks.
		Frame_size:     uint32(o.BlockSize),
		Frame_nr:       uint32(o.Blocks),
		Retire_blk_tov: uint32(o.BlockTimeout / time.Millisecond),
	})
}

func (w *Worker) mapRing() (err error) {
	w.ring, err = w.group.sys.mmap(w.fd, w.group.opts.BlockSize*w.group.opts.Blocks)
	return err
}

func (w *Worker) bind() error {
	return w.group.sys.bind(w.fd, &unix.SockaddrLinklayer{Protocol: networkOrder(unix.ETH_P_ALL), Ifindex: w.group.opts.Index})
}

func (w *Worker) readHardwareType() error {
	link, err := w.group.sys.boundTo(w.fd)
	if err != nil {
		return err
	}
	w.group.ethernet = hasEthernetHeader(link.Hatype)
	return nil
}

// join joins the group; the first worker makes it.
func (w *Worker) join() error {
	g := w.group
	// A group has a hook of its own into the traffic: PACKET_IGNORE_OUTGOING, the
	// option of a socket, does not reach it.
	args := fanoutArgs{
		modeFlags:  uint16(g.opts.Mode.kernelMode() | unix.PACKET_FANOUT_FLAG_IGNORE_OUTGOING),
		maxMembers: uint32(g.opts.Workers),
	}
	if g.id < 0 {
		args.modeFlags |= unix.PACKET_FANOUT_FLAG_UNIQUEID
	} else {
		args.id = uint16(g.id)
	}
	err := g.sys.setFanout(w.fd, args)
	if !errors.Is(err, unix.EINVAL) {
		return err
	}
	// Before Linux 6.13 that is the answer on an interface that is down.
	if errno, _ := g.sys.getInt(w.fd, unix.SOL_SOCKET, unix.SO_ERROR); errno != 0 {
		return unix.Errno(errno)
	}
	return err
}

// readGroupID reads which id the kernel chose, and checks it of those who join.
func (w *Worker) readGroupID() error {
	v, err := w.group.sys.getInt(w.fd, unix.SOL_PACKET, unix.PACKET_FANOUT)
	if err != nil {
		return err
	}
	id := int(uint16(v))
	if w.group.id >= 0 && w.group.id != id {
		return fmt.Errorf("the kernel says %d, must be %d", id, w.group.id)
	}
	w.group.id = id
	return nil
}

func (w *Worker) openEvent() (err error) {
	w.event, err = w.group.sys.eventfd()
	return err
}

func (w *Worker) setFilter(f Filter) (err error) {
	switch {
	case f.Program != nil:
		err = w.group.sys.setInt(w.fd, unix.SOL_SOCKET, unix.SO_ATTACH_BPF, f.Program.FD())
	case len(f.Classic) > 0:
		err = w.group.sys.setFilter(w.fd, skipOutgoing(f.Classic))
	default:
		err = w.group.sys.setFilter(w.fd, skipOutgoing(keep(math.MaxUint32)))
	}
	if err != nil {
		return w.group.fail(StepFilter, err)
	}
	return nil
}

// free gives back what the worker has, as far as it got.
func (w *Worker) free() error {
	var errs []error
	if w.ring != nil {
		errs = append(errs, w.group.sys.munmap(w.ring))
		w.ring = nil
	}
	for _, fd := range []*int{&w.fd, &w.event} {
		if *fd >= 0 {
			errs = append(errs, w.group.sys.close(*fd))
			*fd = -1
		}
	}
	if err := errors.Join(errs...); err != nil {
		return w.group.fail(StepClose, err)
	}
	return nil
}
