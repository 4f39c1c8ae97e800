package fanout

import (
	"errors"
	"fmt"
	"math"
	"time"

	"golang.org/x/sys/unix"
)

// Offset of the packet type for a classic program (include/uapi/linux/filter.h).
const (
	skfAdOff     = 1<<32 - 0x1000 // SKF_AD_OFF, -0x1000
	skfAdPktType = 4              // SKF_AD_PKTTYPE
)

// skipOutgoing prepends to a classic BPF program instructions that drop the frames that the
// host sends. PACKET_FANOUT_FLAG_IGNORE_OUTGOING does so without a filter, but kernels
// before Linux 6.2 accept the flag and ignore it.
func skipOutgoing(program []unix.SockFilter) []unix.SockFilter {
	return append([]unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_B | unix.BPF_ABS, K: skfAdOff + skfAdPktType},
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: unix.PACKET_OUTGOING, Jf: skipLen - 2},
		{Code: unix.BPF_RET | unix.BPF_K, K: 0},
	}, program...)
}

// skipLen is the number of instructions that skipOutgoing adds.
const skipLen = 3

// keep returns a classic BPF program that keeps so many bytes of every frame.
func keep(bytes uint32) []unix.SockFilter {
	return []unix.SockFilter{{Code: unix.BPF_RET | unix.BPF_K, K: bytes}}
}

// openWorker opens a socket that has joined the group and still drops everything.
func (g *Group) openWorker(number int) (*Worker, error) {
	w := g.newWorker(number, -1)
	if err := g.do([]step{
		{StepSocket, func() (err error) { w.fd, err = g.sys.openPacket(); return err }},
		{StepDropAll, func() error { return g.sys.setFilter(w.fd, keep(0)) }},
		{StepVersion, func() error { return w.setOption(unix.PACKET_VERSION, unix.TPACKET_V3) }},
		{StepVnetHeader, func() error { return w.setOption(unix.PACKET_VNET_HDR, 1) }},
		{StepRing, w.makeRing},
		{StepMap, w.mapRing},
		{StepBind, func() error { return g.sys.bindTo(w.fd, g.opts.Index) }},
		{StepHardware, w.readHardwareType},
		{StepJoin, func() error { return g.join(w.fd) }},
		{StepGroupID, func() error { return g.readID(w.fd) }},
		{StepEventFD, w.openEvent},
	}); err != nil {
		return nil, errors.Join(err, w.free())
	}
	w.polls(w.fd, w.event)
	return w, nil
}

func (g *Group) newWorker(number, fd int) *Worker {
	w := &Worker{group: g, fd: fd, event: -1, blockSize: g.opts.BlockSize, cursor: g.state.cursor(number)}
	w.block.worker = w
	return w
}

// polls adds descriptors to those for which Wait waits.
func (w *Worker) polls(fds ...int) {
	for _, fd := range fds {
		w.fds = append(w.fds, unix.PollFd{Fd: int32(fd), Events: unix.POLLIN})
	}
}

// openFrameRing gives a worker its frame ring. All workers must have joined before the
// first frame ring, since choice relies on that order.
func (g *Group) openFrameRing(w *Worker, number int) error {
	r := g.newFrameRing(w, number, -1)
	if err := g.do(r.steps(w)); err != nil {
		return errors.Join(err, r.free(g.sys))
	}
	r.admit()
	w.frames = r
	w.polls(r.fd)
	return nil
}

func (g *Group) newFrameRing(w *Worker, number, fd int) *frameRing {
	return &frameRing{
		fd: fd, size: g.opts.FrameSize, count: g.opts.Frames, slack: slackOf(&g.opts),
		admits: g.choice.of(number), cursor: w.cursor, earliest: make([]int64, g.opts.Frames),
	}
}

// step is one step of opening.
type step struct {
	name Step
	do   func() error
}

func (g *Group) do(steps []step) error {
	for _, s := range steps {
		if err := s.do(); err != nil {
			return g.fail(s.name, err)
		}
	}
	return nil
}

func (w *Worker) setOption(option, value int) error {
	return w.group.sys.setInt(w.fd, unix.SOL_PACKET, option, value)
}

func (s *system) openPacket() (int, error) {
	return s.socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
}

func (w *Worker) makeRing() error {
	o := &w.group.opts
	return w.group.sys.setRing(w.fd, &unix.TpacketReq3{
		Block_size: uint32(o.BlockSize),
		Block_nr:   uint32(o.Blocks),
		// Frames in blocks are of variable size; the kernel ignores the frame size.
		Frame_size:     uint32(o.BlockSize),
		Frame_nr:       uint32(o.Blocks),
		Retire_blk_tov: uint32(o.BlockTimeout / time.Millisecond),
	})
}

func (w *Worker) mapRing() (err error) {
	w.ring, err = w.group.sys.mmap(w.fd, w.group.opts.BlockSize*w.group.opts.Blocks)
	return err
}

func (s *system) bindTo(fd, index int) error {
	return s.bind(fd, &unix.SockaddrLinklayer{Protocol: networkOrder(unix.ETH_P_ALL), Ifindex: index})
}

func (w *Worker) readHardwareType() error {
	link, err := w.group.sys.boundTo(w.fd)
	if err != nil {
		return err
	}
	w.group.ethernet = hasEthernetHeader(link.Hatype)
	return nil
}

// join makes a socket join the group; the first one creates it.
func (g *Group) join(fd int) error {
	// A group has its own packet hook: the socket option PACKET_IGNORE_OUTGOING does
	// not affect it.
	args := fanoutArgs{
		modeFlags:  uint16(g.opts.Mode.kernelMode()),
		maxMembers: uint32(g.opts.Workers),
	}
	if g.choice != nil {
		args.modeFlags = unix.PACKET_FANOUT_EBPF
		args.maxMembers = uint32(2 * g.opts.Workers)
	}
	if !g.opts.Outgoing {
		args.modeFlags |= unix.PACKET_FANOUT_FLAG_IGNORE_OUTGOING
	}
	if g.id < 0 {
		args.modeFlags |= unix.PACKET_FANOUT_FLAG_UNIQUEID
	} else {
		args.id = uint16(g.id)
	}
	err := g.sys.setFanout(fd, args)
	if !errors.Is(err, unix.EINVAL) {
		return err
	}
	// Before Linux 6.13 the kernel returns EINVAL on an interface that is down.
	if errno, _ := g.sys.getInt(fd, unix.SOL_SOCKET, unix.SO_ERROR); errno != 0 {
		return unix.Errno(errno)
	}
	return err
}

// readID reads the id chosen by the kernel, and checks it for later members.
func (g *Group) readID(fd int) error {
	v, err := g.sys.getInt(fd, unix.SOL_PACKET, unix.PACKET_FANOUT)
	if err != nil {
		return err
	}
	id := int(uint16(v))
	if g.id >= 0 && g.id != id {
		return fmt.Errorf("the kernel says %d, must be %d", id, g.id)
	}
	g.id = id
	return nil
}

func (w *Worker) openEvent() (err error) {
	w.event, err = w.group.sys.eventfd()
	return err
}

func (w *Worker) setFilter(f Filter) error {
	for _, fd := range w.sockets() {
		if err := w.group.sys.attach(fd, f); err != nil {
			return w.group.fail(StepFilter, err)
		}
	}
	return nil
}

func (s *system) attach(fd int, f Filter) error {
	switch {
	case f.Program != nil:
		return s.setInt(fd, unix.SOL_SOCKET, unix.SO_ATTACH_BPF, f.Program.FD())
	case len(f.Classic) > 0:
		return s.setFilter(fd, skipOutgoing(f.Classic))
	}
	return s.setFilter(fd, skipOutgoing(keep(math.MaxUint32)))
}

// sockets returns the sockets of the worker's rings.
func (w *Worker) sockets() []int {
	if w.frames == nil {
		return []int{w.fd}
	}
	return []int{w.fd, w.frames.fd}
}

// free releases the worker's resources, also after a partial open.
func (w *Worker) free() error {
	var errs []error
	if w.ring != nil {
		errs = append(errs, w.group.sys.munmap(w.ring))
		w.ring = nil
	}
	if w.frames != nil {
		errs = append(errs, w.frames.free(w.group.sys))
		w.frames = nil
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
