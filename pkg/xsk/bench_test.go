package xsk

import (
	"errors"
	"fmt"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"golang.org/x/sys/unix"

	"xdpcast/internal/lab"
	"xdpcast/internal/labtest"
)

// There is no allocation from the fill ring to the completion ring.
func TestTransferDoesNotAllocate(t *testing.T) {
	for _, check := range []bool{false, true} {
		src, dst := pair(t, 0, 1)
		_, out := makeUMEMAsIs(t, UMEMOptions{Frames: 128, CheckOwnership: check})
		u, in := makeUMEMAsIs(t, UMEMOptions{Frames: 128, CheckOwnership: check, MultiBuffer: labtest.MultiBufferSockets(t)})
		sender := openOn(t, src, "eth0", out, 0, Options{NoRX: true})
		receiver := openOn(t, dst, "eth0", in, 0, Options{})
		receiver.Fill(64)
		redirect(t, dst, "eth0", receiver)
		packet := frame(1, 100)
		var descs [16]Desc
		lost := false
		allocs := testing.AllocsPerRun(200, func() {
			for i := range descs {
				addr, _ := out.Get()
				descs[i] = Desc{Addr: addr, Len: uint32(copy(out.umem.Frame(addr), packet))}
			}
			if n, err := sender.Send(descs[:]); n != len(descs) || err != nil {
				lost = true
			}
			for sender.Outstanding() > 0 {
				if err := sender.Flush(); err != nil && err != unix.EAGAIN {
					lost = true
				}
				sender.Complete(64)
			}
			deadline := time.Now().Add(labtest.Timeout)
			for got := 0; got < len(descs) && !lost; {
				n := receiver.Receive(descs[:])
				for _, d := range descs[:n] {
					if ours(u.Data(d)) {
						got++
					}
				}
				in.ReleaseAll(descs[:n])
				receiver.Fill(64)
				lost = lost || receiver.WakeRX() != nil || time.Now().After(deadline)
			}
		})
		if lost {
			t.Fatal("packets were lost")
		}
		if allocs != 0 {
			t.Errorf("check %v: %v allocations a run", check, allocs)
		}
	}
}

// BenchmarkForward forwards frames of 128 bytes from one veth to another with their
// addresses rewritten, while BPF_PROG_RUN sends more than that: an operation is one
// packet. It reports the rate and the CPU time of the forwarding thread, and checks
// that every frame sent has arrived.
func BenchmarkForward(b *testing.B) {
	for _, budget := range []int{0, 256} {
		b.Run(fmt.Sprint("budget=", max(budget, minTXBudget)), func(b *testing.B) {
			l := newForwardLab(b, Options{NoRX: true, TXBudget: budget})
			before := threadTime(b)
			b.ResetTimer()
			sent := l.forward(b, b.N)
			b.StopTimer()
			used := threadTime(b) - before
			dropped := l.finish(b, sent)
			b.ReportMetric(float64(sent)/b.Elapsed().Seconds(), "packets/s")
			b.ReportMetric(float64(used.Nanoseconds())/float64(sent), "cpu-ns/packet")
			b.ReportMetric(float64(dropped), "dropped")
		})
	}
}

// More arrives than can be forwarded: the packets taken must still arrive.
func TestForwardUnderLoad(t *testing.T) {
	l := newForwardLab(t, Options{NoRX: true, TXSize: 256, CompletionSize: 128})
	l.finish(t, l.forward(t, 20_000))
}

// forwardLab is two veths with a source of frames at one end, and sockets in between.
type forwardLab struct {
	umem    *UMEM
	in, out *Socket
	sink    *lab.Host
	before  uint64 // packets that the sink had received
	stop    func()
}

// newForwardLab starts the source, and moves the test's goroutine to another CPU.
func newForwardLab(t testing.TB, opts Options) *forwardLab {
	src, relay, dst := newHost(t, "src"), newHost(t, "rly"), newHost(t, "dst")
	connect(t, src, "eth0", relay, "in", 0, 1)
	connect(t, relay, "out", dst, "eth0", 0, 1)
	u, frames := makeUMEMAsIs(t, UMEMOptions{Frames: 8192})
	l := &forwardLab{umem: u, sink: dst, in: openOn(t, relay, "in", frames, 0, Options{NoTX: true}), out: openOn(t, relay, "out", frames, 0, opts)}
	l.in.Fill(allOfThem)
	redirect(t, relay, "in", l.in)
	// Softirqs of the source's CPU receive into the UMEM; those of our CPU do the rest.
	pin(t, 1)
	l.before = arrived(t, dst)
	l.stop = generate(t, src, 128)
	return l
}

// finish stops the source and checks that every packet sent has arrived once, except
// those that the device dropped.
func (l *forwardLab) finish(t testing.TB, sent int) (dropped uint64) {
	t.Helper()
	l.stop()
	completeAll(t, l.out)
	stats, err := l.out.Statistics()
	if err != nil {
		t.Fatal(err)
	}
	want := uint64(sent) - stats.TXDeviceDropped
	labtest.Eventually(t, "all has arrived", func() bool { return arrived(t, l.sink)-l.before >= want })
	if got := arrived(t, l.sink) - l.before; got != want {
		t.Errorf("%d of %d frames arrived", got, want)
	}
	return stats.TXDeviceDropped
}

// forward forwards at least n packets, and returns how many.
func (l *forwardLab) forward(t testing.TB, n int) (sent int) {
	t.Helper()
	in, out := l.in, l.out
	var descs [64]Desc
	for idle := time.Now(); sent < n; {
		got := descs[:in.Receive(descs[:])]
		if len(got) == 0 {
			in.Fill(allOfThem)
			if time.Since(idle) > labtest.Timeout {
				t.Fatalf("no more packets after %d", sent)
			}
			continue
		}
		idle = time.Now()
		for _, d := range got {
			data := l.umem.Data(d)
			copy(data[:6], "\x01\x00\x5e\x02\x02\x02")
			copy(data[6:12], "\x02\x00\x00\x00\x00\x02")
		}
		for len(got) > 0 {
			took, err := out.Send(got)
			if err != nil {
				t.Fatal(err)
			}
			got, sent = got[took:], sent+took
			if err := out.Flush(); err != nil && !errors.Is(err, unix.EAGAIN) {
				t.Fatal(err)
			}
			out.Complete(allOfThem)
		}
		in.Fill(allOfThem)
	}
	return sent
}

// generate sends frames from a host as fast as it can, from a thread of another CPU,
// until stop, which returns after the last is sent.
func generate(t testing.TB, h *lab.Host, size int) (stop func()) {
	t.Helper()
	index := labtest.Index(t, h, "eth0")
	var p *ebpf.Program
	labtest.Do(t, h, func() (err error) {
		p, err = ebpf.NewProgram(&ebpf.ProgramSpec{Type: ebpf.XDP, License: "GPL", Instructions: asm.Instructions{
			asm.Mov.Imm(asm.R1, int32(index)),
			asm.Mov.Imm(asm.R2, 0),
			asm.FnRedirect.Call(),
			asm.Return(),
		}})
		return err
	})
	t.Cleanup(func() { p.Close() })
	var stopped atomic.Bool
	done := make(chan error, 1)
	go func() {
		done <- h.Do(func() error {
			if runtime.NumCPU() > 1 {
				if err := setCPU(0); err != nil {
					return err
				}
			}
			for !stopped.Load() {
				if _, err := p.Run(&ebpf.RunOptions{Data: frame(1, size), Repeat: 100_000, Flags: unix.BPF_F_TEST_XDP_LIVE_FRAMES}); err != nil {
					return err
				}
			}
			return nil
		})
	}()
	stop = sync.OnceFunc(func() {
		stopped.Store(true)
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(stop)
	return stop
}

// pin keeps the benchmark's goroutine on a CPU, if there is more than one.
func pin(t testing.TB, cpu int) {
	t.Helper()
	runtime.LockOSThread()
	var before unix.CPUSet
	if err := unix.SchedGetaffinity(0, &before); err != nil {
		t.Fatal(err)
	}
	if runtime.NumCPU() > cpu {
		if err := setCPU(cpu); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() {
		if err := unix.SchedSetaffinity(0, &before); err != nil {
			t.Error(err)
		}
		runtime.UnlockOSThread()
	})
}

func setCPU(cpu int) error {
	var set unix.CPUSet
	set.Set(cpu)
	return unix.SchedSetaffinity(0, &set)
}

// arrived returns how many packets a host's eth0 has received.
func arrived(t testing.TB, h *lab.Host) uint64 {
	t.Helper()
	l, err := h.Link("eth0")
	if err != nil {
		t.Fatal(err)
	}
	return l.Attrs().Statistics.RxPackets
}
