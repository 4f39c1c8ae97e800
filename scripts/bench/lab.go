package main

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"xdpcast/internal/lab"
	"xdpcast/pkg/loader"
	"xdpcast/pkg/packet"
)

// sinks is how many sink hosts there are; more outputs share them.
const sinks = 4

// benchLab is a source, a relay and sinks. Its goroutine is in the relay.
type benchLab struct {
	dir             string
	source          *lab.Host
	sourceIndex     int
	in              *net.Interface
	out             []*net.Interface // one for each output
	generator, tail *ebpf.Program
	sent, received  *ebpf.Map
	frame           packet.Frame
}

// inLab makes the lab, runs fn inside the relay, and removes everything.
func inLab(outputs, size int, fn func(*benchLab) error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		done <- buildLab(outputs, size, fn)
	}()
	return <-done
}

func buildLab(outputs, size int, fn func(*benchLab) error) (err error) {
	l := &benchLab{}
	var cleanup []func() error
	defer func() {
		for i := len(cleanup) - 1; i >= 0; i-- {
			err = errors.Join(err, cleanup[i]())
		}
	}()
	if l.dir, err = os.MkdirTemp("", "xdpcast-bench"); err != nil {
		return err
	}
	cleanup = append(cleanup, func() error { return os.RemoveAll(l.dir) })
	cleanup = append(cleanup, func() error {
		if err := unix.Unmount(filepath.Join(l.dir, "bpf"), 0); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
			return err
		}
		return nil
	})
	host := func(name string) *lab.Host {
		h, hostErr := lab.NewHost(lab.UniqueName(name))
		if hostErr != nil {
			err = errors.Join(err, hostErr)
			return nil
		}
		cleanup = append(cleanup, h.Close)
		return h
	}
	l.source = host("bench-source")
	relay := host("bench-relay")
	var sinkHosts []*lab.Host
	for range min(sinks, outputs) {
		sinkHosts = append(sinkHosts, host("bench-sink"))
	}
	if err != nil {
		return err
	}
	if err := lab.Connect(lab.End{Host: l.source, Name: "eth0", Addrs: []string{"10.0.0.1/24"}}, lab.End{Host: relay, Name: "in"}, 0); err != nil {
		return err
	}
	for i, s := range sinkHosts {
		if err := lab.Connect(lab.End{Host: relay, Name: fmt.Sprintf("out%d", i), Addrs: []string{fmt.Sprintf("10.1.%d.1/24", i)}}, lab.End{Host: s, Name: "eth0"}, 0); err != nil {
			return err
		}
	}
	if err := l.load(size); err != nil {
		return err
	}
	cleanup = append(cleanup, l.closePrograms)
	for _, s := range sinkHosts {
		if err := s.Do(l.attachSink); err != nil {
			return err
		}
	}
	if err := l.source.Do(l.attachTail); err != nil {
		return err
	}
	if err := unix.Setns(relay.FD(), unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("enter relay: %w", err)
	}
	if l.in, err = net.InterfaceByName("in"); err != nil {
		return err
	}
	for i := range outputs {
		out, err := net.InterfaceByName(fmt.Sprintf("out%d", i%len(sinkHosts)))
		if err != nil {
			return err
		}
		l.out = append(l.out, out)
	}
	return fn(l)
}

func (l *benchLab) load(size int) (err error) {
	group := netip.MustParseAddr("239.1.1.1")
	l.frame = packet.Frame{
		DstMAC: packet.MulticastMAC(group), SrcMAC: [6]byte{2, 0, 0, 0, 0, 1},
		Src: netip.MustParseAddr("10.0.0.1"), Dst: group, SrcPort: 4000, DstPort: 5000, TTL: 16,
		Payload: make([]byte, size-42),
	}
	if l.received, err = newCounter(); err != nil {
		return err
	}
	if l.sent, err = newCounter(); err != nil {
		return err
	}
	if l.generator, err = newGenerator(l.frame.Build(), l.sent); err != nil {
		return err
	}
	l.tail, err = newSink(l.received)
	return err
}

func (l *benchLab) closePrograms() error {
	return errors.Join(l.generator.Close(), l.tail.Close(), l.sent.Close(), l.received.Close())
}

// attachSink runs in a sink.
func (l *benchLab) attachSink() error { return attachHere("eth0", l.tail) }

// attachTail runs in the source: a veth sends XDP frames only with a program on.
func (l *benchLab) attachTail() error {
	i, err := net.InterfaceByName("eth0")
	if err != nil {
		return err
	}
	l.sourceIndex = i.Index
	return attachHere("eth0", l.tail)
}

// attachHere attaches for as long as the namespace lives.
func attachHere(name string, p *ebpf.Program) error {
	i, err := net.InterfaceByName(name)
	if err != nil {
		return err
	}
	return attachNetlink(i.Index, p)
}

// attachBare attaches the kernel's own redirect: to one output without a copy, to
// several by broadcast. It returns how to detach.
func (l *benchLab) attachBare() (func() error, error) {
	devmap, err := newDevmap(l.out)
	if err != nil {
		return nil, err
	}
	p, err := newRedirect(devmap, len(l.out) > 1)
	if err != nil {
		return nil, errors.Join(err, devmap.Close())
	}
	var links []link.Link
	detach := func() error {
		var errs []error
		for _, lk := range links {
			errs = append(errs, lk.Close())
		}
		return errors.Join(append(errs, p.Close(), devmap.Close())...)
	}
	for _, i := range l.interfaces() {
		lk, err := link.AttachXDP(link.XDPOptions{Program: p, Interface: i, Flags: link.XDPDriverMode})
		if err != nil {
			return nil, errors.Join(err, detach())
		}
		links = append(links, lk)
	}
	return detach, nil
}

func (l *benchLab) interfaces() []int {
	all := []int{l.in.Index}
	for i, o := range l.out {
		if i < sinks {
			all = append(all, o.Index)
		}
	}
	return all
}

// attachRelay loads xdpcast with a rule that rewrites everything.
func (l *benchLab) attachRelay() (func() error, error) {
	opts := loader.Options{PinDir: filepath.Join(l.dir, "bpf", "xdpcast"), RunDir: filepath.Join(l.dir, "run")}
	ld, err := loader.Open(opts)
	if err != nil {
		return nil, err
	}
	detach := func() error { return errors.Join(ld.Close(), loader.Unload(opts)) }
	for _, i := range l.interfaces() {
		if _, err := ld.Attach(i, loader.ModeNative); err != nil {
			return nil, errors.Join(err, detach())
		}
	}
	rule := loader.Rule{Name: "bench", In: loader.Input{Index: l.in.Index, MAC: [6]byte(l.in.HardwareAddr), Group: l.frame.Dst, Port: l.frame.DstPort}}
	for i, o := range l.out {
		dst := netip.AddrFrom4([4]byte{239, 2, 2, byte(i)})
		rule.Out = append(rule.Out, loader.Output{Ready: true, Index: o.Index, MTU: o.MTU, Rewrite: packet.Rewrite{
			DstMAC: packet.MulticastMAC(dst), SrcMAC: [6]byte(o.HardwareAddr), Dst: dst,
			Src: netip.AddrFrom4([4]byte{10, 1, 0, 1}), DstPort: uint16(6000 + i), TTLMode: packet.TTLSet, TTL: 8,
		}})
	}
	if err := ld.Sync([]loader.Rule{rule}); err != nil {
		return nil, errors.Join(err, detach())
	}
	return detach, nil
}

// batch is how many frames the source sends at a time. A veth holds 256 frames, and
// the sinks share them.
func (l *benchLab) batch() int {
	const most, held = 32, 256
	perSink := (len(l.out) + sinks - 1) / sinks
	return max(1, min(most, held/2/perSink))
}

// maxLost is the part of the copies that may be lost in a measurement: the source
// overruns the receive ring of a veth when the machine is busy elsewhere.
const maxLost = 0.01

// errOverrun: a measurement is worth nothing, since too many copies were lost.
var errOverrun = errors.New("receive rings were overrun")

// measureAgain is measure, tried again when the machine was busy elsewhere.
func (l *benchLab) measureAgain(frames int) (rate float64, err error) {
	for range 10 {
		if rate, err = l.measure(frames); !errors.Is(err, errOverrun) {
			break
		}
	}
	return rate, err
}

// measure sends frames and returns the copies a second that arrived. It fails when
// many did not, or more than were sent.
func (l *benchLab) measure(frames int) (rate float64, err error) {
	before, err := total(l.received)
	if err != nil {
		return 0, err
	}
	sentBefore, err := total(l.sent)
	if err != nil {
		return 0, err
	}
	var took time.Duration
	err = l.source.Do(func() error {
		start := time.Now()
		err := sendLive(l.generator, l.frame.Build(), l.sourceIndex, frames, l.batch())
		took = time.Since(start)
		return err
	})
	if err != nil {
		return 0, err
	}
	sent, err := total(l.sent)
	if err != nil {
		return 0, err
	}
	want := (sent - sentBefore) * uint64(len(l.out))
	arrived, err := l.settle(before)
	if err != nil {
		return 0, err
	}
	if arrived > want {
		return 0, fmt.Errorf("%d copies arrived of %d", arrived, want)
	}
	if float64(want-arrived) > maxLost*float64(want) {
		return 0, fmt.Errorf("%w: %d of %d copies arrived", errOverrun, arrived, want)
	}
	return float64(arrived) / took.Seconds(), nil
}

// settle waits until no more copies arrive, and returns how many did since before.
func (l *benchLab) settle(before uint64) (uint64, error) {
	last := before
	for {
		time.Sleep(20 * time.Millisecond)
		now, err := total(l.received)
		if err != nil {
			return 0, err
		}
		if now == last {
			return now - before, nil
		}
		last = now
	}
}
