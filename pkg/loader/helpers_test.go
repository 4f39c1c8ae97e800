package loader

import (
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/netip"
	"path/filepath"
	"slices"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"golang.org/x/sys/unix"

	"xdpcast/bpf"
	"xdpcast/internal/lab"
	"xdpcast/internal/labtest"
	"xdpcast/pkg/flow"
	"xdpcast/pkg/packet"
)

// testOptions uses a BPF file system of the test's own.
func testOptions(t testing.TB) Options {
	t.Helper()
	dir := t.TempDir()
	t.Cleanup(func() {
		if err := unix.Unmount(filepath.Join(dir, "bpf"), unix.MNT_DETACH); err != nil && err != unix.EINVAL && err != unix.ENOENT {
			t.Errorf("unmount: %v", err)
		}
	})
	return Options{
		PinDir:     filepath.Join(dir, "bpf", "xdpcast"),
		RunDir:     filepath.Join(dir, "run"),
		MaxRules:   2048,
		MaxOutputs: 8192,
		Logger:     slog.New(slog.NewTextHandler(testWriter{t}, &slog.HandlerOptions{Level: slog.LevelDebug})),
	}
}

// stateOptions are testOptions for tests of the pinned state that send no packets.
func stateOptions(t testing.TB) Options {
	t.Helper()
	opts := testOptions(t)
	opts.programs = standIn{}
	return opts
}

// standIn has a relay program that passes all packets. Verifying the real one takes longer than the
// rest of Open.
type standIn struct{ embedded }

func (standIn) relay(_ *mapSet, can Capabilities, _ *ebpf.Program) (*ebpf.Program, error) {
	spec := &ebpf.ProgramSpec{
		Name: bpf.RelayProgRelay, Type: ebpf.XDP, License: "MIT",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, xdpPass), asm.Return()},
	}
	if can.MultiBuffer { // as in the egress program
		spec.Flags = unix.BPF_F_XDP_HAS_FRAGS
	}
	return ebpf.NewProgram(spec)
}

type testWriter struct{ t testing.TB }

func (w testWriter) Write(b []byte) (int, error) {
	w.t.Log(string(b[:len(b)-1]))
	return len(b), nil
}

func open(t testing.TB, opts Options) *Loader {
	t.Helper()
	l, err := Open(opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if l.lock != (locks{}) {
			closeLoader(t, l)
		}
	})
	return l
}

func closeLoader(t testing.TB, l *Loader) {
	t.Helper()
	if err := l.Close(); err != nil {
		t.Errorf("close: %v", err)
	}
}

// testLab is a source, the relay and some sinks. The test's goroutine runs in the relay.
type testLab struct {
	source, relay *lab.Host
	sinks         []*lab.Host
	in            *net.Interface
	out           []*net.Interface
}

// newLab connects the relay's in to the source's eth0, and each of its out0, out1... to a sink.
func newLab(t testing.TB, sinks int) *testLab {
	t.Helper()
	n := &testLab{source: labtest.Host(t, "src"), relay: labtest.Host(t, "rly")}
	labtest.Connect(t, lab.End{Host: n.source, Name: "eth0", Addrs: []string{"10.0.0.1/24"}}, lab.End{Host: n.relay, Name: "in", Addrs: []string{"10.0.0.2/24"}})
	for i := range sinks {
		sink := labtest.Host(t, "snk")
		labtest.Connect(t, lab.End{Host: n.relay, Name: fmt.Sprintf("out%d", i), Addrs: []string{fmt.Sprintf("10.1.%d.1/24", i)}},
			lab.End{Host: sink, Name: "eth0", Addrs: []string{fmt.Sprintf("10.1.%d.2/24", i)}})
		n.sinks = append(n.sinks, sink)
	}
	labtest.Enter(t, n.relay)
	n.in = iface(t, "in")
	for i := range sinks {
		n.out = append(n.out, iface(t, fmt.Sprintf("out%d", i)))
	}
	return n
}

func iface(t testing.TB, name string) *net.Interface {
	t.Helper()
	i, err := net.InterfaceByName(name)
	if err != nil {
		t.Fatal(err)
	}
	return i
}

func attachAll(t testing.TB, l *Loader, interfaces ...*net.Interface) {
	t.Helper()
	for _, i := range interfaces {
		a, err := l.Attach(i.Index, ModeNative)
		if err != nil {
			t.Fatal(err)
		}
		if a.Mode != ModeNative {
			t.Fatalf("%s runs in %s mode", i.Name, a.Mode)
		}
	}
}

func mac(i *net.Interface) [6]byte { return [6]byte(i.HardwareAddr) }

// input matches a group on an interface; source may be empty.
func input(i *net.Interface, group, source string, port uint16) flow.Input {
	in := flow.Input{Index: i.Index, MAC: mac(i), Group: netip.MustParseAddr(group), Port: port}
	if source != "" {
		in.Source = netip.MustParseAddr(source)
	}
	return in
}

// output sends to a group from a given source address.
func output(i *net.Interface, group, source string, port uint16) flow.Output {
	dst := netip.MustParseAddr(group)
	return flow.Output{Ready: true, Index: i.Index, MTU: int32(i.MTU), Rewrite: packet.Rewrite{
		DstMAC: packet.MulticastMAC(dst), SrcMAC: mac(i), Dst: dst, Src: netip.MustParseAddr(source), DstPort: port,
	}}
}

func sync1(t testing.TB, l *Loader, rules ...flow.Flow) {
	t.Helper()
	if err := l.Sync(pointers(rules)); err != nil {
		t.Fatal(err)
	}
}

// change1 is sync1 by Change, with the differences from the current rules alone.
func change1(t testing.TB, l *Loader, rules ...flow.Flow) {
	t.Helper()
	if err := tryChange(l, rules...); err != nil {
		t.Fatal(err)
	}
}

// tryChange makes these the rules by Change.
func tryChange(l *Loader, rules ...flow.Flow) error {
	var put []*flow.Flow
	gone := maps.Clone(l.rules)
	for _, r := range pointers(rules) {
		old := gone[r.Name]
		if delete(gone, r.Name); old == nil || !old.rule.Equal(r.Normalized()) {
			put = append(put, r)
		}
	}
	return l.Change(put, slices.Collect(maps.Keys(gone)))
}

func statsOf(t testing.TB, l *Loader, name string) RuleStats {
	t.Helper()
	s, err := l.Stats()
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range s.Rules {
		if r.Name == name {
			return r
		}
	}
	t.Fatalf("no counters of rule %s", name)
	return RuleStats{}
}

// pointers converts rules for Sync.
func pointers(rules []flow.Flow) []*flow.Flow {
	all := make([]*flow.Flow, len(rules))
	for i, r := range rules {
		all[i] = &r // a copy: tests modify theirs later
	}
	return all
}
