package fanout

import (
	"errors"
	"fmt"
)

// ErrWoken is returned by [Worker.Wait] after [Worker.Wake].
var ErrWoken = errors.New("worker woken")

// ErrLayout is the cause of the error of [Inherit] when the rings are not those that the options ask for.
var ErrLayout = errors.New("the rings have another layout")

// ErrNamespace is the cause of the error of [Inherit] when the rings receive from the interfaces of another network
// namespace, which have the same indexes.
var ErrNamespace = errors.New("the rings belong to another network namespace")

// A Step is the operation that failed.
type Step string

// The steps of opening and running a group, in order.
const (
	StepOptions    Step = "check options"
	StepState      Step = "make memory for positions"
	StepSocket     Step = "open packet socket"
	StepDropAll    Step = "attach filter that drops everything"
	StepVersion    Step = "set PACKET_VERSION"
	StepVnetHeader Step = "set PACKET_VNET_HDR"
	StepRing       Step = "set PACKET_RX_RING"
	StepMap        Step = "map ring"
	StepBind       Step = "bind"
	StepJoin       Step = "join group"
	StepGroupID    Step = "read group id"
	StepHardware   Step = "read hardware type"
	StepEventFD    Step = "open eventfd"
	StepChoice     Step = "load program that chooses the ring"
	StepSteering   Step = "attach steering program (PACKET_FANOUT_DATA)"
	StepFilter     Step = "attach filter"
	StepReceive    Step = "receive"
	StepStats      Step = "read PACKET_STATISTICS"
	StepInherit    Step = "inherit"
	StepResume     Step = "resume"
	StepClose      Step = "close"
)

// Error is a failure of a group. Match its cause with errors.Is; if the kernel
// refused, it is the errno: EPERM without CAP_NET_RAW, ENODEV if the interface is
// gone, ENETDOWN if it is down, ENOMEM if there is no memory for a ring, ENOSPC
// if another program joined the group first.
type Error struct {
	Step Step
	// Interface is the name given in Options.
	Interface string
	// GroupID is the fanout group, -1 before the kernel chose one.
	GroupID int
	Mode    Mode
	Err     error
}

// Error returns the group, its mode, the interface, the step and the cause.
func (e *Error) Error() string {
	group := "new group"
	if e.GroupID >= 0 {
		group = fmt.Sprintf("group %d", e.GroupID)
	}
	return fmt.Sprintf("PACKET_FANOUT %s (mode %s) on %s: %s: %v", group, e.Mode, e.Interface, e.Step, e.Err)
}

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.Err }
