package fanout

import (
	"errors"
	"fmt"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// state is how far a group's workers have come, in memory that outlives their process: another one
// continues from there ([Inherit]), even if this one was killed.
type state struct {
	fd     int
	memory []byte
}

// layoutVersion is the version of identity and cursor.
const layoutVersion = 1

// identity is the first line of the memory: which group it belongs to.
type identity struct {
	version, index, workers      uint32
	mode                         uint32 // and outgoingFlag
	blockSize, blocks, timeoutMS uint32
	frames, frameSize            uint32
	closed                       uint32 // 1 once the process that used it has closed the group
	group                        uint32 // its id, once the group is open
	_                            [5]uint32
}

// outgoingFlag is Options.Outgoing in identity.mode.
const outgoingFlag = 1 << 8

// cursor is how far a worker has come; a cache line. The worker writes each number before it acts on
// it, in an order in which a process that finds the memory after any instruction skips rather than
// repeats a frame.
type cursor struct {
	// block is the number (seq_num of struct tpacket_hdr_v1) of the block that the worker holds or
	// reads next. The kernel numbers blocks in the order of the ring, from 1.
	block uint64
	// taken is how many frames of that block were committed, below the low half of its number; with
	// another number none.
	taken uint64
	// read and released are the frames of the frame ring that were committed, and given back.
	read, released uint64
	_              [4]uint64
}

const (
	sizeofIdentity = int(unsafe.Sizeof(identity{}))
	sizeofCursor   = int(unsafe.Sizeof(cursor{}))
)

func identityOf(o *Options) identity {
	mode := uint32(o.Mode)
	if o.Outgoing {
		mode |= outgoingFlag
	}
	l := identity{
		version: layoutVersion, index: uint32(o.Index), workers: uint32(o.Workers), mode: mode,
		blockSize: uint32(o.BlockSize), blocks: uint32(o.Blocks), timeoutMS: uint32(o.BlockTimeout / time.Millisecond),
	}
	if o.Frames != 0 {
		l.frames, l.frameSize = uint32(o.Frames), uint32(o.FrameSize)
	}
	return l
}

func stateSize(workers int) int { return sizeofIdentity + workers*sizeofCursor }

// newState makes the memory for a new group.
func newState(sys *system, o *Options) (_ *state, err error) {
	s := &state{fd: -1}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.free(sys))
		}
	}()
	if s.fd, err = sys.memory(stateSize(o.Workers)); err != nil {
		return nil, err
	}
	if s.memory, err = sys.mmap(s.fd, stateSize(o.Workers)); err != nil {
		return nil, err
	}
	*s.identity() = identityOf(o)
	for i := range o.Workers {
		s.cursor(i).block = 1
	}
	return s, nil
}

// inheritState maps the memory of a group with these options. It takes ownership of fd.
func inheritState(sys *system, o *Options, fd int) (_ *state, err error) {
	s := &state{fd: fd}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.free(sys))
		}
	}()
	var stat unix.Stat_t
	if err := unix.Fstat(fd, &stat); err != nil {
		return nil, err
	}
	if want := stateSize(o.Workers); stat.Size != int64(want) {
		return nil, fmt.Errorf("%w: its state has %d bytes, want %d", ErrLayout, stat.Size, want)
	}
	// The size must not change any more. Only memory from memfd_create has seals: EINVAL.
	switch seals, err := sys.seals(fd); {
	case err != nil && !errors.Is(err, unix.EINVAL):
		return nil, err
	case err != nil || seals&memorySeals != memorySeals:
		return nil, fmt.Errorf("%w: the size of its state is not sealed", ErrLayout)
	}
	if s.memory, err = sys.mmap(fd, stateSize(o.Workers)); err != nil {
		return nil, err
	}
	have, want := *s.identity(), identityOf(o)
	have.closed, have.group = 0, 0
	if have != want {
		return nil, fmt.Errorf("%w: %s, want %s", ErrLayout, have.String(), want.String())
	}
	return s, nil
}

func (l identity) String() string {
	text := fmt.Sprintf("version %d on interface %d, %d workers (mode %s), %d blocks of %d bytes for %d ms", l.version, l.index, l.workers, Mode(l.mode&^outgoingFlag), l.blocks, l.blockSize, l.timeoutMS)
	if l.frames > 0 {
		text += fmt.Sprintf(", %d frames of %d bytes", l.frames, l.frameSize)
	}
	if l.mode&outgoingFlag != 0 {
		text += ", outgoing"
	}
	return text
}

func (s *state) identity() *identity { return (*identity)(unsafe.Pointer(&s.memory[0])) }

func (s *state) cursor(worker int) *cursor {
	return (*cursor)(unsafe.Pointer(&s.memory[sizeofIdentity+worker*sizeofCursor]))
}

func (s *state) setClosed(closed uint32) { atomic.StoreUint32(&s.identity().closed, closed) }

func (s *state) isClosed() bool { return atomic.LoadUint32(&s.identity().closed) != 0 }

func (s *state) free(sys *system) error {
	var errs []error
	if s.memory != nil {
		errs = append(errs, sys.munmap(s.memory))
		s.memory = nil
	}
	if s.fd >= 0 {
		errs = append(errs, sys.close(s.fd))
		s.fd = -1
	}
	return errors.Join(errs...)
}
