package forward

import (
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"path/filepath"
	"runtime"
	"sync/atomic"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"xdpcast/internal/lab"
	"xdpcast/internal/labtest"
	"xdpcast/pkg/fanout"
	"xdpcast/pkg/flow"
	"xdpcast/pkg/loader"
	"xdpcast/pkg/packet"
)

// xdpBench is a bench with the relay program and the AF_XDP path.
type xdpBench struct {
	*bench
	loader *loader.Loader
	opts   loader.Options
	path   *AFXDP
}

// newXDPBench makes a bench whose input has so many receive queues, and attaches the
// program to it.
func newXDPBench(t testing.TB, outputs, queues, mtu int) *xdpBench {
	t.Helper()
	b := &xdpBench{bench: &bench{source: labtest.Host(t, "src"), relay: labtest.Host(t, "rly")}}
	connect := func(x, y lab.End) {
		t.Helper()
		if err := lab.Connect(x, y, mtu); err != nil {
			t.Fatal(err)
		}
	}
	connect(lab.End{Host: b.source, Name: "eth0", Addrs: []string{"10.0.0.1/24"}, Queues: queues},
		lab.End{Host: b.relay, Name: "in", Addrs: []string{"10.0.0.2/24"}, Queues: queues})
	b.in = iface(t, b.relay, "in")
	for i := range outputs {
		sink := labtest.Host(t, "snk")
		b.sinks = append(b.sinks, sink)
		name := fmt.Sprintf("out%d", i)
		connect(lab.End{Host: b.relay, Name: name}, lab.End{Host: sink, Name: "eth0"})
		b.out = append(b.out, iface(t, b.relay, name))
	}
	dir := t.TempDir()
	t.Cleanup(func() {
		if err := unix.Unmount(filepath.Join(dir, "bpf"), unix.MNT_DETACH); err != nil {
			t.Errorf("unmount: %v", err)
		}
	})
	b.opts = loader.Options{PinDir: filepath.Join(dir, "bpf", "xdpcast"), RunDir: filepath.Join(dir, "run"), MaxRules: 256, MaxOutputs: 4096}
	labtest.Do(t, b.relay, func() (err error) {
		b.loader, err = loader.Open(b.opts)
		return err
	})
	t.Cleanup(func() {
		if err := b.loader.Close(); err != nil {
			t.Error(err)
		}
	})
	for _, i := range append([]*net.Interface{b.in}, b.out...) {
		b.attach(t, i)
	}
	return b
}

func (b *xdpBench) attach(t testing.TB, i *net.Interface) {
	t.Helper()
	labtest.Do(t, b.relay, func() error {
		_, err := b.loader.Attach(i.Index, loader.ModeNative)
		return err
	})
}

// up sets an interface of the relay up, and waits until the host at its other end can
// send.
func (b *xdpBench) up(t testing.TB, name string, other *lab.Host) {
	t.Helper()
	if err := b.relay.SetUp(name, true); err != nil {
		t.Fatal(err)
	}
	labtest.Eventually(t, name+" is up", func() bool {
		near, err := b.relay.Link(name)
		if err != nil {
			t.Fatal(err)
		}
		far, err := other.Link("eth0")
		if err != nil {
			t.Fatal(err)
		}
		return near.Attrs().OperState == netlink.OperUp && far.Attrs().OperState == netlink.OperUp
	})
}

func (b *xdpBench) open(t testing.TB) {
	t.Helper()
	b.openWith(t, AFXDPOptions{CheckOwnership: true})
}

func (b *xdpBench) openWith(t testing.TB, opts AFXDPOptions) {
	t.Helper()
	opts.Loader, opts.Accounts = b.loader, b.loader
	opts.Logger = slog.New(slog.NewTextHandler(t.Output(), nil))
	var err error
	if b.path, err = OpenAFXDP(opts); err != nil {
		t.Fatal(err)
	}
	path := b.path
	t.Cleanup(func() {
		if err := path.Close(); err != nil {
			t.Error(err)
		}
	})
}

// sync does what the control loop does.
func (b *xdpBench) sync(t testing.TB, rules ...flow.Flow) {
	t.Helper()
	labtest.Do(t, b.relay, func() error {
		if err := b.path.Prepare(rules, ownAddresses); err != nil {
			return err
		}
		if err := b.loader.Sync(pointers(rules)); err != nil {
			return err
		}
		return b.path.Sync(rules, ownAddresses)
	})
}

func xdpRule(name string, in *net.Interface, group string, port uint16, out ...flow.Output) flow.Flow {
	r := rule(name, in, group, port, out...)
	r.Path = flow.PathAFXDP
	return r
}

func (b *xdpBench) kernelStats(t testing.TB, name string) loader.RuleStats {
	t.Helper()
	stats, err := b.loader.Stats()
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range stats.Rules {
		if r.Name == name {
			return r
		}
	}
	t.Fatalf("rule %s has no counters", name)
	return loader.RuleStats{}
}

// inputs returns the state of the path.
func (b *xdpBench) inputs(t testing.TB) []InputStatus {
	t.Helper()
	all, err := b.path.Inputs()
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// adds checks that all packets matched by the program are accounted for, and that the
// losses by the rule's counters are those reported by sockets and rules.
func (b *xdpBench) adds(t testing.TB, name string, matched uint64) loader.RuleStats {
	t.Helper()
	var user, all loader.RuleStats
	labtest.Eventually(t, "the counters add up", func() bool {
		all = b.kernelStats(t, name)
		user = b.path.Stats([]string{name})[0]
		for slot := range all.Outputs {
			if accounted(&all, slot) != all.Matched {
				t.Logf("output %d: %+v", slot, all)
				return false
			}
		}
		return all.Matched.Packets >= matched && all.Drops[loader.WorkerLost].Packets == b.unseen(t)
	})
	if all.Matched.Packets != matched {
		t.Fatalf("%d packets matched, want %d", all.Matched.Packets, matched)
	}
	return user
}

// unseen counts packets that the sockets lost, or whose rule was gone.
func (b *xdpBench) unseen(t testing.TB) (n uint64) {
	t.Helper()
	for _, in := range b.inputs(t) {
		n += in.Lost.NoFrame + in.Lost.RingFull + in.Lost.Unclaimed
	}
	return n
}

func udpFrame(group, source string, size int, change func(*packet.Frame)) []byte {
	dst := netip.MustParseAddr(group)
	f := packet.Frame{
		DstMAC: packet.MulticastMAC(dst), SrcMAC: [6]byte{2, 0, 0, 0, 0, 9},
		Src: netip.MustParseAddr(source), Dst: dst, SrcPort: 4000, DstPort: 5000, TTL: 8, Payload: make([]byte, size),
	}
	for i := range f.Payload {
		f.Payload[i] = byte(i * 7)
	}
	if change != nil {
		change(&f)
	}
	return f.Build()
}

// once receives the numbered frames of a stream, each of which must arrive once, in any
// order.
type once struct {
	total atomic.Int64
}

func countOnce(t testing.TB, h *lab.Host) *once {
	t.Helper()
	catcher, o, done := catch(t, h, "eth0"), &once{}, make(chan struct{})
	w := catcher.group.Workers()[0]
	var stop atomic.Bool
	go func() {
		defer close(done)
		seen := map[int]bool{}
		for !stop.Load() {
			block, err := w.Wait()
			if err != nil {
				continue
			}
			var f fanout.Frame
			for block.Next(&f) {
				_, n, ok := number(f.Data)
				if ok && seen[n] {
					t.Errorf("frame %d came twice", n)
				}
				if ok && !seen[n] {
					seen[n] = true
					o.total.Add(1)
				}
			}
			block.Release()
		}
	}()
	t.Cleanup(func() {
		stop.Store(true)
		w.Wake()
		<-done
	})
	return o
}

// exactly checks that exactly so many frames arrived.
func exactly(t testing.TB, c *counted, n int) {
	t.Helper()
	labtest.Eventually(t, "all frames have arrived", func() bool { return c.total.Load() >= int64(n) })
	if got := c.total.Load(); got != int64(n) {
		t.Errorf("%s: %d frames arrived, want %d", c.name, got, n)
	}
}

// fragmented is a datagram in several fragments.
func fragmented(t testing.TB) [][]byte {
	t.Helper()
	parts := packet.Fragment(udpFrame("239.1.1.1", "10.0.0.1", 3000, nil), 77, 1000)
	if len(parts) < 3 {
		t.Fatalf("%d fragments", len(parts))
	}
	return parts
}

// TestAFXDPBytes sends every kind of frame through 1, 4 and 16 outputs, with the payload
// of short frames copied, as in copy mode, and shared, as with zero-copy. Before Linux 6.6,
// sockets do not accept packets of several frames, as long ones and shared payloads are.
func TestAFXDPBytes(t *testing.T) {
	multiBuffer := labtest.Root() && labtest.MultiBufferSockets(t)
	sizes := []int{0, 18, 22, 64, 1000, 1400, 1472, 1500, 2000}
	if multiBuffer {
		sizes = append(sizes, 3500, 3800, 4096, 8000, 8900)
	}
	for _, c := range []struct {
		outputs int
		shared  bool
	}{{1, false}, {4, false}, {4, true}, {16, false}, {16, true}} {
		t.Run(fmt.Sprintf("%d outputs, shared %v", c.outputs, c.shared), func(t *testing.T) {
			if c.shared && !multiBuffer {
				return
			}
			outputs := c.outputs
			b := newXDPBench(t, outputs, 1, 9000)
			b.open(t)
			var out4, out6, tagged []flow.Output
			for i, o := range b.out {
				o4 := sendTo(o, fmt.Sprintf("239.2.2.%d", i+1), 6000)
				o6 := sendTo(o, fmt.Sprintf("ff3e::2:%x", i+1), 6000)
				switch i % 4 {
				case 1:
					o4.VLAN, o4.VLANID = packet.VLANSet, 77
				case 2:
					o4.TTLMode, o4.TTL, o4.SetDSCP, o4.DSCP = packet.TTLSet, 33, true, 46
				case 3:
					o6.VLAN, o6.VLANID, o6.OuterVLAN = packet.VLANSet, 5, 6
				}
				ot := sendTo(o, fmt.Sprintf("239.3.3.%d", i+1), 6100)
				if i%2 == 0 {
					ot.VLAN = packet.VLANPop
				}
				out4, out6, tagged = append(out4, o4), append(out6, o6), append(tagged, ot)
			}
			vlan := xdpRule("vlan", b.in, "239.1.1.1", 5000, tagged...)
			vlan.In.VLAN = 100
			b.sync(t, xdpRule("v4", b.in, "239.1.1.1", 5000, out4...), xdpRule("v6", b.in, "ff3e::1", 5000, out6...), vlan)
			if c.shared {
				b.senders(func(s *afxdpSender) { s.share = 1 })
			}
			source := openSender(t, b.source, iface(t, b.source, "eth0").Index)
			var sent [][]byte
			var use [][]flow.Output
			add := func(frame []byte, out []flow.Output) { sent, use = append(sent, frame), append(use, out) }
			for _, size := range sizes {
				add(udpFrame("239.1.1.1", "10.0.0.1", size, nil), out4)
				add(udpFrame("ff3e::1", "fd00::1", size, nil), out6)
				add(udpFrame("239.1.1.1", "10.0.0.1", size, func(f *packet.Frame) { f.VLANs = []uint16{100} }), tagged)
			}
			for _, f := range fragmented(t) {
				add(f, out4)
			}
			var catchers []*catcher
			for i := range b.out {
				catchers = append(catchers, catch(t, b.sinks[i], "eth0"))
			}
			sendFrames(t, source, sent)
			for i, c := range catchers {
				var want [][]byte
				for j := range sent {
					want = append(want, expect(t, use[j][i], sent[j]))
				}
				receive(t, c, want)
			}
			b.adds(t, "v4", uint64(len(sizes)+len(fragmented(t))))
			b.adds(t, "v6", uint64(len(sizes)))
			b.adds(t, "vlan", uint64(len(sizes)))
			for _, s := range b.inputs(t)[0].Workers[0].Senders {
				if s.Queue != 0 {
					t.Errorf("output %d is sent to by queue %d: %s", s.Index, s.Queue, s.Cause)
				}
			}
			if w := b.inputs(t)[0].Workers[0]; w.ZeroCopy || w.MultiBuffer != multiBuffer {
				t.Errorf("%v: want copy, multi-buffer %v", w, multiBuffer)
			}
		})
	}
}

// senders calls fn for each sender, while no worker runs.
func (b *xdpBench) senders(fn func(s *afxdpSender)) {
	for _, in := range b.path.inputs {
		for _, w := range in.workers {
			w.mu.Lock()
			for _, s := range w.senders {
				fn(s)
			}
			w.mu.Unlock()
		}
	}
}

// TestAFXDPExactlyOnce relays 50 streams over two queues.
func TestAFXDPExactlyOnce(t *testing.T) {
	b := newXDPBench(t, 2, 2, 0)
	b.open(t)
	b.sync(t, xdpRule("r", b.in, "239.1.1.1", 5000, sendTo(b.out[0], "239.2.2.1", 6000), sendTo(b.out[1], "239.2.2.2", 6000)))
	c0, c1 := countOn(t, b.sinks[0]), countOn(t, b.sinks[1])
	const frames = 20000
	b.load(t, 50, frames, func() int64 { return min(c0.total.Load(), c1.total.Load()) })
	exactly(t, c0, frames)
	exactly(t, c1, frames)
	b.adds(t, "r", frames)
	table := b.path.set.table
	for q := range 2 {
		if table.rules[0].counts.workers[q] == nil {
			t.Errorf("queue %d had no frames, which proves little", q)
		}
	}
}

// TestAFXDPFallback removes the path and restores it.
func TestAFXDPFallback(t *testing.T) {
	for _, fallback := range []bool{true, false} {
		t.Run(fmt.Sprint(fallback), func(t *testing.T) {
			b := newXDPBench(t, 1, 1, 0)
			b.open(t)
			r := xdpRule("r", b.in, "239.1.1.1", 5000, sendTo(b.out[0], "239.2.2.1", 6000))
			r.Fallback = fallback
			b.sync(t, r)
			source := openSender(t, b.source, iface(t, b.source, "eth0").Index)
			c := catch(t, b.sinks[0], "eth0")
			send := func(n int) {
				f := numbered(0, n).Build()
				sendFrames(t, source, [][]byte{f})
				receive(t, c, [][]byte{expect(t, r.Out[0], f)})
			}
			send(0)
			b.adds(t, "r", 1)
			if err := b.path.Close(); err != nil {
				t.Fatal(err)
			}
			if fallback {
				send(1)
			} else {
				sendFrames(t, source, [][]byte{numbered(0, 1).Build()})
				labtest.Eventually(t, "the packet is dropped", func() bool {
					return b.kernelStats(t, "r").Drops[loader.NoSocket].Packets == 1
				})
			}
			b.open(t)
			b.sync(t, r)
			send(2)
			if got := b.path.Stats(nil)[0].Matched.Packets; got != 2 {
				t.Errorf("%d packets came to the path before and after, want 2", got)
			}
			b.adds(t, "r", 3)
		})
	}
}

// TestAFXDPFault sets the interfaces down and deletes one, under traffic.
func TestAFXDPFault(t *testing.T) {
	b := newXDPBench(t, 3, 1, 0)
	b.open(t)
	r := xdpRule("r", b.in, "239.1.1.1", 5000, sendTo(b.out[0], "239.2.2.1", 6000), sendTo(b.out[1], "239.2.2.2", 6000), sendTo(b.out[2], "239.2.2.3", 6000))
	b.sync(t, r)
	c := countOn(t, b.sinks[0])
	source := openSender(t, b.source, iface(t, b.source, "eth0").Index)
	n := 0
	send := func(times int) {
		t.Helper()
		for range times {
			sendFrames(t, source, [][]byte{numbered(0, n).Build()})
			n++
		}
		labtest.Eventually(t, "all arrived", func() bool { return c.total.Load() == int64(n) })
	}
	out := func(slot int) loader.OutputStats { return b.adds(t, "r", uint64(n)).Outputs[slot] }
	send(50)
	if err := b.relay.SetUp("out1", false); err != nil {
		t.Fatal(err)
	}
	link, err := b.relay.Link("out2")
	if err != nil {
		t.Fatal(err)
	}
	if err := b.relay.Netlink().LinkDel(link); err != nil {
		t.Fatal(err)
	}
	send(50)
	for slot := 1; slot < 3; slot++ {
		if o := out(slot); o.Sent.Packets != 50 || o.Drops[loader.NoDevice].Packets != 50 {
			t.Errorf("output %d: %d sent, drops %v: want 50 each", slot, o.Sent.Packets, o.Drops)
		}
	}
	b.sync(t, r) // while the faults persist
	send(10)
	b.up(t, "out1", b.sinks[1])
	b.sync(t, r)
	send(10)
	if o := out(1); o.Sent.Packets != 60 || o.Drops[loader.NoDevice].Packets != 60 {
		t.Errorf("%d sent, drops %v: want 60 each", o.Sent.Packets, o.Drops)
	}
	// The input: packets that arrive while it is down are not counted.
	if err := b.relay.SetUp("in", false); err != nil {
		t.Fatal(err)
	}
	labtest.Eventually(t, "the worker says so", func() bool { return b.inputs(t)[0].Workers[0].Down })
	b.up(t, "in", b.source)
	labtest.Eventually(t, "the worker says so", func() bool { return !b.inputs(t)[0].Workers[0].Down })
	send(10)
	exactly(t, c, n)
}

// TestAFXDPRuleChanges adds, changes and removes rules, and moves one between the
// paths, under load: nothing is lost or duplicated, though a move may reorder packets.
func TestAFXDPRuleChanges(t *testing.T) {
	b := newXDPBench(t, 2, 1, 0)
	b.open(t)
	steady := xdpRule("steady", b.in, "239.1.1.1", 5000, sendTo(b.out[0], "239.2.2.1", 6000))
	other := xdpRule("other", b.in, "239.9.9.9", 5000, sendTo(b.out[1], "239.2.2.9", 6000))
	wide := steady
	wide.Out = []flow.Output{sendTo(b.out[0], "239.2.2.1", 6000), sendTo(b.out[1], "239.2.2.2", 6000)}
	kernel := steady
	kernel.Path = flow.PathKernel
	b.sync(t, steady)
	c := countOnce(t, b.sinks[0])
	stop := make(chan struct{})
	done := make(chan struct{})
	var changes atomic.Int64
	go func() {
		defer close(done)
		sets := [][]flow.Flow{{steady, other}, {other, wide}, {wide}, {other, steady}, {steady}, {kernel, other}, {steady, other}, {kernel}, {steady}}
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			default:
			}
			rules := sets[i%len(sets)]
			if err := b.relay.Do(func() error {
				if err := b.path.Prepare(rules, nil); err != nil {
					return err
				}
				if err := b.loader.Sync(pointers(rules)); err != nil {
					return err
				}
				return b.path.Sync(rules, nil)
			}); err != nil {
				t.Error(err)
				return
			}
			changes.Add(1)
		}
	}()
	frames := 0
	source := openSender(t, b.source, iface(t, b.source, "eth0").Index)
	for changes.Load() < 40 || frames < 10000 {
		var burst [][]byte
		for range 50 {
			burst = append(burst, numbered(0, frames).Build())
			frames++
		}
		sendFrames(t, source, burst)
		labtest.Eventually(t, "earlier frames have arrived", func() bool { return c.total.Load() > int64(frames-window) })
	}
	labtest.Eventually(t, "all frames have arrived", func() bool { return c.total.Load() == int64(frames) })
	close(stop)
	<-done
	t.Logf("%d changes, %d frames", changes.Load(), frames)
}

// TestAFXDPSlowOutput has one unread output: packets without room are dropped for it
// alone, and all packets counted as sent are there.
func TestAFXDPSlowOutput(t *testing.T) {
	b := newXDPBench(t, 1, 1, 0)
	tap, slow := b.tap(t, "slow", 100)
	b.open(t)
	b.sync(t, xdpRule("r", b.in, "239.1.1.1", 5000, sendTo(slow, "239.2.2.1", 6000), sendTo(b.out[0], "239.2.2.2", 6000)))
	c := countOn(t, b.sinks[0])
	const frames = 5000
	b.load(t, 1, frames, c.total.Load)
	exactly(t, c, frames)
	s := b.adds(t, "r", frames)
	if s.Outputs[1].Sent.Packets != frames {
		t.Errorf("other output: %+v", s.Outputs[1])
	}
	sent, full := s.Outputs[0].Sent.Packets, s.Outputs[0].Drops[loader.TxFull].Packets
	if full == 0 || sent+full != frames {
		t.Errorf("slow output: %+v", s.Outputs[0])
	}
	buf := make([]byte, 2048)
	var held uint64
	for {
		n, err := unix.Read(tap, buf)
		if err != nil {
			break
		}
		if isUDP(buf[:n]) {
			held++
		}
	}
	if held != sent {
		t.Errorf("%d frames are counted as sent, and %d are there", sent, held)
	}
}

// tap makes a tap device in the relay, whose frames are read from a file.
func (b *xdpBench) tap(t testing.TB, name string, queue int) (fd int, i *net.Interface) {
	t.Helper()
	labtest.Do(t, b.relay, func() (err error) {
		if fd, err = unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0); err != nil {
			return err
		}
		request, err := unix.NewIfreq(name)
		if err != nil {
			return err
		}
		request.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI)
		return unix.IoctlIfreq(fd, unix.TUNSETIFF, request)
	})
	t.Cleanup(func() {
		if err := unix.Close(fd); err != nil {
			t.Error(err)
		}
	})
	link, err := b.relay.Link(name)
	if err != nil {
		t.Fatal(err)
	}
	if err := b.relay.Netlink().LinkSetTxQLen(link, queue); err != nil {
		t.Fatal(err)
	}
	if err := b.relay.SetUp(name, true); err != nil {
		t.Fatal(err)
	}
	return fd, iface(t, b.relay, name)
}

// TestAFXDPAllocs checks that there is no allocation per packet.
func TestAFXDPAllocs(t *testing.T) {
	b := newXDPBench(t, 2, 1, 9000)
	b.openWith(t, AFXDPOptions{})
	b.sync(t, xdpRule("r", b.in, "239.1.1.1", 5000, sendTo(b.out[0], "239.2.2.1", 6000), sendTo(b.out[1], "239.2.2.2", 6000)))
	source := openSender(t, b.source, iface(t, b.source, "eth0").Index)
	frames := []fanout.Packet{{Header: udpFrame("239.1.1.1", "10.0.0.1", 100, nil)}}
	if labtest.MultiBufferSockets(t) {
		frames = append(frames, fanout.Packet{Header: udpFrame("239.1.1.1", "10.0.0.1", 8900, nil)})
	}
	w := b.path.inputs[b.in.Index].workers[0]
	w.mu.Lock() // the worker waits while the test does its work
	defer w.mu.Unlock()
	turn := func() {
		if _, err := source.Send(frames); err != nil {
			t.Fatal(err)
		}
		work(w, len(frames))
	}
	turn()
	if n := testing.AllocsPerRun(200, turn); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

// work does a worker's work until so many frames have arrived, and returns the CPU time
// of forwarding.
func work(w *afxdpWorker, frames int) (busy time.Duration) {
	for got := 0; got < frames; {
		n := w.socket.Receive(w.descs)
		if n == 0 {
			runtime.Gosched()
			continue
		}
		w.held = w.descs[:n]
		for _, d := range w.held {
			if d.Options == 0 {
				got++
			}
		}
		before := threadTime()
		w.forward(w.held)
		w.release()
		busy += threadTime() - before
	}
	return busy
}

// threadTime returns the CPU time of the calling thread.
func threadTime() time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &ts); err != nil {
		panic(err)
	}
	return time.Duration(ts.Nano())
}

// BenchmarkAFXDPWork measures a worker's CPU time per frame, from the RX ring to the
// device, including the kernel's work in the same system call.
func BenchmarkAFXDPWork(b *testing.B) {
	for _, outputs := range []int{1, 4} {
		for _, size := range []int{86, 1400} {
			b.Run(fmt.Sprintf("1 to %d, %d bytes", outputs, size+42), func(b *testing.B) {
				n := newXDPBench(b, outputs, 1, 0)
				n.openWith(b, AFXDPOptions{})
				var out []flow.Output
				for i, o := range n.out {
					out = append(out, sendTo(o, fmt.Sprintf("239.2.2.%d", i+1), 6000))
				}
				n.sync(b, xdpRule("r", n.in, "239.1.1.1", 5000, out...))
				source := openSender(b, n.source, iface(b, n.source, "eth0").Index)
				var frames []fanout.Packet
				for range 64 {
					frames = append(frames, fanout.Packet{Header: udpFrame("239.1.1.1", "10.0.0.1", size, nil)})
				}
				w := n.path.inputs[n.in.Index].workers[0]
				w.mu.Lock()
				runtime.LockOSThread()
				defer runtime.UnlockOSThread()
				var busy time.Duration
				total := 0
				for b.Loop() {
					if m, err := source.Send(frames); err != nil || m != len(frames) {
						b.Fatal(m, err)
					}
					busy += work(w, len(frames))
					total += len(frames)
				}
				w.mu.Unlock()
				b.ReportMetric(float64(busy.Nanoseconds())/float64(total), "cpu-ns/frame")
				b.ReportMetric(0, "ns/op")
				for i, o := range n.path.Stats(nil)[0].Outputs {
					if o.Sent.Packets != uint64(total) {
						b.Errorf("output %d: %+v of %d", i, o, total)
					}
				}
			})
		}
	}
}

// BenchmarkAFXDP measures frames per second without loss: the sender waits for the
// receivers, so that rings never overflow.
func BenchmarkAFXDP(b *testing.B) {
	for _, outputs := range []int{1, 4} {
		b.Run(fmt.Sprintf("1 to %d", outputs), func(b *testing.B) {
			n := newXDPBench(b, outputs, 1, 0)
			n.openWith(b, AFXDPOptions{})
			var out []flow.Output
			for i, o := range n.out {
				out = append(out, sendTo(o, fmt.Sprintf("239.2.2.%d", i+1), 6000))
			}
			n.sync(b, xdpRule("r", n.in, "239.1.1.1", 5000, out...))
			source := openSender(b, n.source, iface(b, n.source, "eth0").Index)
			var packets []fanout.Packet
			for range 64 {
				packets = append(packets, fanout.Packet{Header: udpFrame("239.1.1.1", "10.0.0.1", 86, nil)})
			}
			sent := func() (least uint64) {
				for i, o := range n.path.Stats(nil)[0].Outputs {
					if i == 0 || o.Sent.Packets < least {
						least = o.Sent.Packets
					}
				}
				return least
			}
			total := 0
			for b.Loop() {
				for rest := packets; len(rest) > 0; {
					m, err := source.Send(rest)
					if rest = rest[m:]; err != nil && err != unix.EAGAIN && err != unix.ENOBUFS {
						b.Fatal(err)
					}
				}
				for total += len(packets); int(sent())+1024 < total; {
					runtime.Gosched()
				}
			}
			labtest.Eventually(b, "all are sent", func() bool { return int(sent()) == total })
			b.ReportMetric(float64(total)/b.Elapsed().Seconds(), "frames/s")
			b.ReportMetric(float64(total*outputs)/b.Elapsed().Seconds(), "copies/s")
			if lost := n.unseen(b); lost != 0 {
				b.Errorf("%d frames were lost", lost)
			}
		})
	}
}
