package loader

import (
	"bytes"
	"encoding/binary"
	"errors"
	"net"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"golang.org/x/sys/unix"

	"xdpcast/bpf"
	"xdpcast/internal/lab"
	"xdpcast/internal/labtest"
)

// Verdicts of include/uapi/linux/bpf.h, enum xdp_action.
const (
	xdpDrop     = 1
	xdpPass     = 2
	xdpRedirect = 4
)

// xdpContext is struct xdp_md.
type xdpContext struct {
	Data, DataEnd, DataMeta, IngressIfindex, RxQueueIndex, EgressIfindex uint32
}

// runner runs the programs of a Loader on single frames through BPF_PROG_RUN, which ends before
// anything is sent. It does the kernel's part itself: copying the frame for every row of the rule's
// devmap.
type runner struct {
	l       *Loader
	host    *lab.Host
	egress  *ebpf.Program
	partial bool // the kernel can spread a frame over buffers at any byte
	out     []byte
}

// ran is the result for one frame.
type ran struct {
	verdict uint32
	frame   []byte         // as the relay program left it
	copies  map[int][]byte // what leaves, by slot
}

// newRunner requires the relay program on every interface used.
func newRunner(t testing.TB, l *Loader, host *lab.Host) *runner {
	t.Helper()
	r := &runner{l: l, host: host, egress: plainEgress(t, l.maps), out: make([]byte, 1<<16)}
	r.stay(t)
	for index := range l.links {
		_, _, err := r.try(l.relay, index, make([]byte, 128), 64)
		r.partial = err == nil
		break
	}
	t.Cleanup(func() { r.egress.Close() })
	return r
}

// stay keeps the test on one CPU: if several outputs are on one interface, the output of a copy is
// counted per CPU, as the kernel sends all copies of a frame on one CPU.
func (r *runner) stay(t testing.TB) {
	t.Helper()
	var now, one unix.CPUSet
	if err := unix.SchedGetaffinity(0, &now); err != nil {
		t.Fatal(err)
	}
	for cpu := 0; ; cpu++ {
		if now.IsSet(cpu) {
			one.Set(cpu)
			break
		}
	}
	if err := unix.SchedSetaffinity(0, &one); err != nil {
		t.Fatal(err)
	}
}

// plainEgress loads the egress program as an XDP program of an interface:
// BPF_PROG_RUN runs no program of a devmap. Such a program may not read
// egress_ifindex; the one instruction that does reads ingress_ifindex instead.
func plainEgress(t testing.TB, m *mapSet) *ebpf.Program {
	t.Helper()
	spec, err := bpf.LoadEgress()
	if err != nil {
		t.Fatal(err)
	}
	const ingressOffset, egressOffset = 12, 20
	program, changed := spec.Programs[bpf.EgressProgEgress], 0
	context := map[asm.Register]bool{asm.R1: true} // holding the context, in the straight-line code at the start
	for i := range program.Instructions {
		ins := &program.Instructions[i]
		if ins.OpCode == asm.LoadMemOp(asm.Word) && ins.Offset == egressOffset && context[ins.Src] {
			ins.Offset = ingressOffset
			changed++
		}
		if ins.IsBuiltinCall() || changed > 0 {
			break
		}
		if class := ins.OpCode.Class(); class.IsLoad() || class.IsALU() {
			context[ins.Dst] = ins.OpCode == asm.Mov.Reg(ins.Dst, ins.Src).OpCode && context[ins.Src]
		}
	}
	if changed != 1 {
		t.Fatalf("the egress program reads egress_ifindex %d times, want once", changed)
	}
	program.AttachType = ebpf.AttachXDP
	var out struct {
		Egress *ebpf.Program `ebpf:"egress"`
	}
	if err := loadInto(spec, m, &out); err != nil {
		t.Fatal(err)
	}
	return out.Egress
}

// try runs a program on a frame whose first linear bytes are in its first buffer.
func (r *runner) try(p *ebpf.Program, index int, frame []byte, linear int) (verdict uint32, out []byte, err error) {
	opts := ebpf.RunOptions{Data: frame, DataOut: r.out, Context: xdpContext{DataEnd: uint32(linear), IngressIfindex: uint32(index)}, Repeat: 1}
	for {
		verdict, err = p.Run(&opts)
		if !errors.Is(err, unix.EINTR) {
			return verdict, bytes.Clone(opts.DataOut), err
		}
		opts.DataOut = r.out
	}
}

func (r *runner) must(t testing.TB, p *ebpf.Program, index int, frame []byte, linear int) (uint32, []byte) {
	t.Helper()
	verdict, out, err := r.try(p, index, frame, linear)
	if err != nil {
		t.Fatalf("run on a frame of %d bytes, %d linear: %v", len(frame), linear, err)
	}
	return verdict, out
}

// run sends a frame through the relay program, and its copies through the egress program.
func (r *runner) run(t testing.TB, index int, frame []byte, linear int) ran {
	t.Helper()
	r.inside(t)
	result := ran{copies: map[int][]byte{}}
	result.verdict, result.frame = r.must(t, r.l.relay, index, frame, linear)
	if result.verdict != xdpRedirect {
		return result
	}
	if result.frame[6] != 0xff {
		result.copies[0] = result.frame
		return result
	}
	first := binary.NativeEndian.Uint32(result.frame)
	var slots *ebpf.Map
	if err := r.l.maps.Broadcast.Lookup(first, &slots); err != nil {
		t.Fatalf("devmap of the rule with first output %d: %v", first, err)
	}
	defer slots.Close()
	var at uint32
	var row bpf.RelayBpfDevmapVal
	iter := slots.Iterate()
	for iter.Next(&at, &row) {
		// The kernel makes the copies in the order of the rows.
		var c bpf.RelayCopy
		if err := r.l.maps.Copies.Lookup(first+at, &c); err != nil {
			t.Fatal(err)
		}
		slot := c.Slot
		switch verdict, out := r.must(t, r.egress, int(row.Ifindex), result.frame, len(result.frame)); verdict {
		case xdpPass:
			result.copies[int(slot)] = out
		case xdpDrop:
		default:
			t.Fatalf("egress program says %d", verdict)
		}
	}
	if err := iter.Err(); err != nil {
		t.Fatal(err)
	}
	return result
}

// programLab is a lab with the relay program on every interface of the relay.
func programLab(t testing.TB, sinks int) (*testLab, *runner) {
	t.Helper()
	n := newLab(t, sinks)
	opts := testOptions(t)
	opts.programs = embedded{fragmentTimeout: time.Hour, anyTick: true}
	l := open(t, opts)
	attachAll(t, l, append([]*net.Interface{n.in}, n.out...)...)
	return n, newRunner(t, l, n.relay)
}

// enter moves another goroutine of the test, such as a subtest's, to the namespace of the runner.
func (r *runner) enter(t testing.TB) {
	labtest.Enter(t, r.host)
	r.stay(t)
}

// inside fails a test that forgot to call enter: BPF_PROG_RUN looks up the interface in the
// namespace of the calling thread, which may also have one of that index.
func (r *runner) inside(t testing.TB) {
	t.Helper()
	var here, there unix.Stat_t
	if err := errors.Join(unix.Stat("/proc/thread-self/ns/net", &here), unix.Fstat(r.host.FD(), &there)); err != nil {
		t.Fatal(err)
	}
	if here.Dev != there.Dev || here.Ino != there.Ino {
		t.Fatal("the frame would run in another network namespace: call enter")
	}
}
