package loader

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"

	"xdpcast/bpf"
	"xdpcast/internal/labtest"
	"xdpcast/pkg/flow"
)

func reopen(t testing.TB, l *Loader) *Loader {
	t.Helper()
	opts := l.opts
	closeLoader(t, l)
	l = open(t, opts)
	if !l.Adopted() {
		t.Fatal("the pinned state is not adopted")
	}
	return l
}

func TestSecondOwnerIsRefused(t *testing.T) {
	t.Parallel()
	newLab(t, 0)
	opts := stateOptions(t)
	l := open(t, opts)
	_, err := Open(opts)
	if !errors.Is(err, ErrLocked) || !strings.Contains(err.Error(), fmt.Sprintf("process %d", os.Getpid())) {
		t.Errorf("second Open: %v, want ErrLocked with the process", err)
	}
	if err := Unload(opts); !errors.Is(err, ErrLocked) {
		t.Errorf("Unload: %v, want ErrLocked", err)
	}
	closeLoader(t, l)
	open(t, opts)
}

// A second start finds everything as it was, and applying the same rules writes nothing.
func TestAdoptKeepsEverything(t *testing.T) {
	t.Parallel()
	n := newLab(t, 2)
	l := open(t, testOptions(t))
	if l.Adopted() {
		t.Error("fresh state is called adopted")
	}
	attachAll(t, l, append(n.out, n.in)...)
	rules := someRules(n)
	sync1(t, l, rules...)
	s := startStream(t, n, "239.1.1.2", 1, 1)
	s.more()
	s.finish()
	before, ids, stats := dump(t, l), idsOf(t, l), statsOf(t, l, "two")
	attached := l.Attachments()
	l = reopen(t, l)
	if diff := cmp.Diff(before, dump(t, l)); diff != "" {
		t.Errorf("after adoption (-before +after):\n%s", diff)
	}
	if diff := cmp.Diff(ids, idsOf(t, l)); diff != "" {
		t.Errorf("ids after adoption (-before +after):\n%s", diff)
	}
	if diff := cmp.Diff(attached, l.Attachments()); diff != "" {
		t.Errorf("attachments (-before +after):\n%s", diff)
	}
	got := statsOf(t, l, "two")
	if diff := cmp.Diff(counters(stats), counters(got)); diff != "" || got.Matched.Packets == 0 || got.LastSeen < 0 {
		t.Errorf("counters (-before +after), last seen %v:\n%s", got.LastSeen, diff)
	}
	sync1(t, l, rules...)
	slices.Reverse(rules)
	sync1(t, l, rules...)
	if diff := cmp.Diff(before, dump(t, l)); diff != "" {
		t.Errorf("after the same rules again (-before +after):\n%s", diff)
	}
	for _, i := range append(n.out, n.in) {
		a, err := l.Attach(i.Index, ModeNative)
		if err != nil || !slices.Contains(attached, a) {
			t.Errorf("attach again: %+v, %v", a, err)
		}
	}
	allocatorsFit(t, l)
	kernelFits(t, l)
	sync1(t, l)
	allocatorsFit(t, l)
	kernelFits(t, l)
}

// otherRelease has programs that do the same with one more instruction.
type otherRelease struct{ embedded }

func padded(spec *ebpf.CollectionSpec, name string) {
	p := spec.Programs[name]
	first := p.Instructions[0]
	more := asm.Mov.Imm(asm.R0, 0)
	more.Metadata, first.Metadata = first.Metadata, asm.Metadata{}
	p.Instructions = append(asm.Instructions{more, first}, p.Instructions[1:]...)
}

func (otherRelease) relay(m *mapSet, can Capabilities, _ *ebpf.Program) (*ebpf.Program, error) {
	spec, err := bpf.LoadRelay()
	if err != nil {
		return nil, err
	}
	padded(spec, bpf.RelayProgRelay)
	var out struct {
		P *ebpf.Program `ebpf:"relay"`
	}
	err = loadInto(spec, m, &out)
	return out.P, err
}

func (otherRelease) egress(m *mapSet, can Capabilities, _ *ebpf.Program) (*ebpf.Program, error) {
	spec, err := bpf.LoadEgress()
	if err != nil {
		return nil, err
	}
	padded(spec, bpf.EgressProgEgress)
	var out struct {
		P *ebpf.Program `ebpf:"egress"`
	}
	err = loadInto(spec, m, &out)
	return out.P, err
}

// A loaded program is recognized without loading it again, and taken for no other: not for another
// release's, nor for one with other maps.
func TestLoadedProgramIsRecognized(t *testing.T) {
	newLab(t, 0)
	l, other := open(t, testOptions(t)), open(t, stateOptions(t))
	tapped, err := l.opts.programs.tapped(l.maps, true, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { tapped.Close() })
	for _, p := range []struct {
		name string
		spec func() (*ebpf.CollectionSpec, error)
		have *ebpf.Program
	}{
		{bpf.RelayProgRelay, bpf.LoadRelay, l.relay}, {bpf.EgressProgEgress, bpf.LoadEgress, l.egress}, {bpf.TappedProgTapped, bpf.LoadTapped, tapped},
	} {
		spec, err := p.spec()
		if err == nil {
			err = fitKernel(spec, l.can)
		}
		if err != nil {
			t.Fatal(err)
		}
		check := func(what string, m *mapSet, have *ebpf.Program, want bool) {
			t.Helper()
			if got := m.isLoaded(spec.Programs[p.name], have); got != want {
				t.Errorf("%s, %s: is loaded: %v", p.name, what, got)
			}
		}
		check("none", l.maps, nil, false)
		check("the same", l.maps, p.have, true)
		check("with other maps", other.maps, p.have, false)
		check("another program", l.maps, other.relay, false)
		padded(spec, p.name)
		check("another release", l.maps, p.have, false)
	}
	again, err := l.opts.programs.relay(l.maps, l.can, l.relay)
	if err != nil {
		t.Fatal(err)
	}
	if programID(t, again) != programID(t, l.relay) {
		t.Error("the relay program was loaded again")
	}
	again.Close()
}

// Another release's programs replace those in the kernel under traffic: no frame is lost, no link
// changes.
func TestAdoptUpgrades(t *testing.T) {
	t.Parallel()
	n := newLab(t, 2)
	l := open(t, testOptions(t))
	attachAll(t, l, append(n.out, n.in)...)
	sync1(t, l, someRules(n)...)
	one := startStream(t, n, "239.1.1.1", 1)
	same := startStream(t, n, "239.1.1.3", 0, 2)
	for _, release := range []programSource{otherRelease{}, embedded{}, otherRelease{}} {
		one.more()
		same.more()
		before := idsOf(t, l)
		opts := l.opts
		opts.programs = release
		closeLoader(t, l)
		l = open(t, opts)
		after := idsOf(t, l)
		if diff := cmp.Diff(before.Links, after.Links); diff != "" {
			t.Errorf("links (-before +after):\n%s", diff)
		}
		if diff := cmp.Diff(before.Maps, after.Maps); diff != "" {
			t.Errorf("maps (-before +after):\n%s", diff)
		}
		relay, egress := programID(t, l.relay), programID(t, l.egress)
		if slices.Contains(before.Programs, relay) || slices.Contains(before.Programs, egress) {
			t.Errorf("programs %d and %d are those from before", relay, egress)
		}
		for _, a := range l.Attachments() {
			if a.ProgramID != uint32(relay) {
				t.Errorf("%s runs program %d, want %d", a.Interface, a.ProgramID, relay)
			}
		}
		rows := 0
		check := func(_ uint32, v bpf.RelayBpfDevmapVal) string {
			rows++
			if v.BpfProg.Fd != 0 && v.BpfProg.Fd != int32(egress) {
				t.Errorf("a row runs program %d, want %d", v.BpfProg.Fd, egress)
			}
			return ""
		}
		dumpMap(t, &strings.Builder{}, "devices", l.maps.Devices, check)
		for _, id := range fanoutRows(t, l) {
			slots, err := ebpf.NewMapFromID(id)
			if err != nil {
				t.Fatal(err)
			}
			dumpMap(t, &strings.Builder{}, "slots", slots, check)
			slots.Close()
		}
		if rows != 5 {
			t.Errorf("%d rows, want 5", rows)
		}
	}
	one.more()
	same.more()
	one.finish()
	same.finish()
	for _, name := range []string{"one", "same"} {
		s := statsOf(t, l, name)
		for slot, o := range s.Outputs {
			if o.Rule.Ready && (o.Sent != s.Matched || len(o.Drops) != 0) {
				t.Errorf("rule %s, output %d: %+v of %+v sent, drops %v", name, slot, o.Sent, s.Matched, o.Drops)
			}
		}
	}
}

func TestSchemaMismatchIsRefused(t *testing.T) {
	t.Parallel()
	n := newLab(t, 2)
	l := open(t, stateOptions(t))
	attachAll(t, l, n.in)
	sync1(t, l, someRules(n)...)
	config, err := l.maps.config(l.opts.PinDir)
	if err != nil {
		t.Fatal(err)
	}
	config.Schema = bpf.Schema + 7
	if err := l.maps.Config.Put(uint32(0), &config); err != nil {
		t.Fatal(err)
	}
	opts := l.opts
	closeLoader(t, l)
	_, err = Open(opts)
	if !errors.Is(err, ErrSchema) || !strings.Contains(err.Error(), fmt.Sprint(bpf.Schema+7)) || !strings.Contains(err.Error(), fmt.Sprint(bpf.Schema)) {
		t.Errorf("Open: %v, want ErrSchema with both versions", err)
	}
	if _, err := OpenReader(opts.PinDir); !errors.Is(err, ErrSchema) {
		t.Errorf("OpenReader: %v, want ErrSchema", err)
	}
	if id := xdpProgram(t, n.in.Index); id == 0 {
		t.Error("the refused Open has detached the program")
	}
	replaceConfig(t, opts.PinDir, 1)
	_, err = Open(opts)
	if !errors.Is(err, ErrSchema) || !strings.Contains(err.Error(), fmt.Sprintf("it has 1, this xdpcast has %d", bpf.Schema)) {
		t.Errorf("Open of a shorter config: %v, want ErrSchema with both versions", err)
	}
	replaceConfig(t, opts.PinDir, bpf.Schema-1)
	if _, err = Open(opts); !errors.Is(err, ErrDamaged) || !strings.Contains(err.Error(), "has 8 bytes, want at least 24") {
		t.Errorf("Open of a config cut short: %v, want ErrDamaged", err)
	}
	if err := Unload(opts); err != nil {
		t.Errorf("Unload: %v", err)
	}
}

// replaceConfig pins a config map of 8 bytes, as another release may have had.
func replaceConfig(t *testing.T, dir string, schema uint32) {
	t.Helper()
	m, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: 8, MaxEntries: 1})
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	if err := m.Put(uint32(0), [2]uint32{schema}); err != nil {
		t.Fatal(err)
	}
	pin := filepath.Join(dir, bpf.RelayMapConfig)
	if err := os.Remove(pin); err != nil {
		t.Fatal(err)
	}
	if err := m.Pin(pin); err != nil {
		t.Fatal(err)
	}
}

func xdpProgram(t testing.TB, index int) uint32 {
	t.Helper()
	lk, err := netlink.LinkByIndex(index)
	if err != nil {
		t.Fatal(err)
	}
	if lk.Attrs().Xdp == nil {
		return 0
	}
	return lk.Attrs().Xdp.ProgId
}

// Pins are untrusted input: impossible state is rejected, and nothing in it is changed.
func TestDamagedPinsAreRefused(t *testing.T) {
	t.Parallel()
	n := newLab(t, 2)
	edit := func(name string, change func(l *Loader, e *entry, flow *bpf.RelayFlow)) func(t *testing.T, l *Loader) {
		return func(t *testing.T, l *Loader) {
			e := l.rules[name]
			flow := encodeFlow(e)
			change(l, e, &flow)
			if err := (&transaction{Loader: l}).tableOf(e.rule.In).Put(encodeKey(e.rule.In), &flow); err != nil {
				t.Fatal(err)
			}
		}
	}
	put := func(m *ebpf.Map, key uint32, value any) {
		if err := m.Put(key, value); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct {
		name   string
		damage func(t *testing.T, l *Loader)
		want   string
	}{
		{"map of another type", func(t *testing.T, l *Loader) {
			m, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Hash, KeySize: 4, ValueSize: l.maps.Rules.ValueSize(), MaxEntries: l.maps.Rules.MaxEntries()})
			if err != nil {
				t.Fatal(err)
			}
			defer m.Close()
			if err := repin(m, filepath.Join(l.opts.PinDir, bpf.RelayMapRules)); err != nil {
				t.Fatal(err)
			}
		}, "map rules: type is Hash, not Array"},
		{"map of another size", func(t *testing.T, l *Loader) {
			m, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: l.maps.Rules.ValueSize(), MaxEntries: 7})
			if err != nil {
				t.Fatal(err)
			}
			defer m.Close()
			if err := repin(m, filepath.Join(l.opts.PinDir, bpf.RelayMapRules)); err != nil {
				t.Fatal(err)
			}
		}, "map rules: 7 entries, not 2048"},
		{"map is missing", func(t *testing.T, l *Loader) {
			if err := os.Remove(filepath.Join(l.opts.PinDir, bpf.RelayMapOutputs)); err != nil {
				t.Fatal(err)
			}
		}, "outputs"},
		{"program is missing", func(t *testing.T, l *Loader) {
			if err := os.Remove(egressPin(l.opts.PinDir)); err != nil {
				t.Fatal(err)
			}
		}, "programs/egress is missing"},
		{"rule without a name", edit("one", func(l *Loader, e *entry, _ *bpf.RelayFlow) { put(l.maps.Rules, e.id, &bpf.RelayRule{}) }), "has no name"},
		{"name without an end", edit("one", func(l *Loader, e *entry, _ *bpf.RelayFlow) {
			row := encodeRule(e)
			for i := range row.Name {
				row.Name[i] = 'x'
			}
			put(l.maps.Rules, e.id, &row)
		}), "has no name"},
		{"name used twice", edit("one", func(l *Loader, e *entry, _ *bpf.RelayFlow) {
			row := encodeRule(l.rules["two"])
			put(l.maps.Rules, e.id, &row)
		}), "twice"},
		{"rule number used twice", edit("one", func(l *Loader, _ *entry, f *bpf.RelayFlow) { f.Rule = l.rules["six"].id }), "twice"},
		{"rule number beyond the map", edit("one", func(_ *Loader, _ *entry, f *bpf.RelayFlow) { f.Rule = 1 << 20 }), "rule number 1048576"},
		{"first output beyond the map", edit("one", func(_ *Loader, _ *entry, f *bpf.RelayFlow) { f.FirstOutput = 1 << 20 }), "output 0"},
		{"first output wraps", edit("two", func(_ *Loader, _ *entry, f *bpf.RelayFlow) { f.FirstOutput = 1<<32 - 1 }), "output 0"},
		{"outputs overlap", edit("two", func(l *Loader, _ *entry, f *bpf.RelayFlow) { f.FirstOutput = l.rules["one"].first }), "overlap"},
		{"no outputs", edit("two", func(_ *Loader, _ *entry, f *bpf.RelayFlow) { f.Outputs = 0 }), "0 outputs"},
		{"too many outputs", edit("two", func(_ *Loader, _ *entry, f *bpf.RelayFlow) { f.Outputs = 65 }), "output"},
		{"output of no family", edit("one", func(l *Loader, e *entry, _ *bpf.RelayFlow) {
			o := encodeOutput(e.rule.Out[0], e.firstStats, 0)
			o.Family = 5
			put(l.maps.Outputs, e.first, &o)
		}), "family 5"},
		{"output of the other family", edit("one", func(l *Loader, e *entry, _ *bpf.RelayFlow) {
			o := encodeOutput(e.rule.Out[0], e.firstStats, 0)
			o.Family = 6
			put(l.maps.Outputs, e.first, &o)
		}), "another family"},
		{"counters beyond the map", edit("one", func(l *Loader, e *entry, _ *bpf.RelayFlow) {
			o := encodeOutput(e.rule.Out[0], 1<<20, 0)
			put(l.maps.Outputs, e.first, &o)
		}), "output counters"},
		{"row beyond the map", edit("one", func(_ *Loader, _ *entry, f *bpf.RelayFlow) { f.Device = 1 << 20 }), "row 1048576"},
		{"key without an interface", func(t *testing.T, l *Loader) {
			flow := encodeFlow(l.rules["one"])
			if err := l.tables[exact4].Put(&bpf.RelayFlow4{Port: 1, Group: [4]byte{239, 1, 1, 9}}, &flow); err != nil {
				t.Fatal(err)
			}
		}, "interface index 0"},
		{"pin of a link that is none", func(t *testing.T, l *Loader) {
			if err := repin(l.maps.Drops, filepath.Join(l.opts.PinDir, linksDir, "if99")); err != nil {
				t.Fatal(err)
			}
		}, "if99"},
	} {
		t.Run(c.name, func(t *testing.T) {
			labtest.Enter(t, n.relay)
			opts := stateOptions(t)
			l := open(t, opts)
			attachAll(t, l, n.in)
			sync1(t, l, someRules(n)...)
			c.damage(t, l)
			closeLoader(t, l)
			program := xdpProgram(t, n.in.Index)
			pins := pinsBelow(t, opts.PinDir)
			damaged, err := Open(opts)
			if err == nil {
				closeLoader(t, damaged)
				t.Fatal("Open adopts damaged state")
			}
			if !strings.Contains(err.Error(), c.want) {
				t.Errorf("Open: %v, want %q in it", err, c.want)
			}
			if got := xdpProgram(t, n.in.Index); got != program || got == 0 {
				t.Errorf("program %d runs, want %d", got, program)
			}
			if diff := cmp.Diff(pins, pinsBelow(t, opts.PinDir)); diff != "" {
				t.Errorf("pins (-before +after):\n%s", diff)
			}
			if err := Unload(opts); err != nil {
				t.Errorf("Unload: %v", err)
			}
			if got := xdpProgram(t, n.in.Index); got != 0 {
				labtest.Eventually(t, "the program is gone", func() bool { return xdpProgram(t, n.in.Index) == 0 })
			}
		})
	}
}

// pinsBelow lists the files below a directory.
func pinsBelow(t testing.TB, dir string) (paths []string) {
	t.Helper()
	err := filepath.WalkDir(dir, func(path string, _ os.DirEntry, err error) error {
		paths = append(paths, path)
		return err
	})
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	return paths
}

func TestForeignNamespaceIsRefused(t *testing.T) {
	t.Parallel()
	n := newLab(t, 1)
	l := open(t, stateOptions(t))
	attachAll(t, l, n.in)
	opts := l.opts
	closeLoader(t, l)
	err := n.source.Do(func() error {
		l, err := Open(opts)
		if err == nil {
			return errors.Join(l.Close(), errors.New("adopted in another network namespace"))
		}
		return err
	})
	if !errors.Is(err, ErrForeignNamespace) {
		t.Errorf("Open: %v, want ErrForeignNamespace", err)
	}
	if xdpProgram(t, n.in.Index) == 0 {
		t.Error("the refused Open has detached the program")
	}
	open(t, opts)
}

func TestMountsBPFFileSystem(t *testing.T) {
	newLab(t, 0)
	opts := stateOptions(t)
	parent := filepath.Dir(opts.PinDir)
	if mounted, err := isBPFFS(parent); err == nil && mounted {
		t.Fatal("a BPF file system is mounted already")
	}
	open(t, opts)
	if mounted, err := isBPFFS(parent); err != nil || !mounted {
		t.Errorf("no BPF file system at %s: %v", parent, err)
	}
	opts.PinDir += ".1"
	if _, err := Open(opts); err == nil || !strings.Contains(err.Error(), "no dot") {
		t.Errorf("name with a dot: %v", err)
	}
}

func TestUnloadLeavesNothing(t *testing.T) {
	n := newLab(t, 2)
	opts := testOptions(t)
	if err := Unload(opts); !errors.Is(err, ErrNotLoaded) {
		t.Errorf("Unload of nothing: %v, want ErrNotLoaded", err)
	}
	l := open(t, opts)
	attachAll(t, l, append(n.out, n.in)...)
	sync1(t, l, someRules(n)...)
	ids := idsOf(t, l)
	closeLoader(t, l)
	if ids.gone() {
		t.Fatal("everything was gone already")
	}
	if err := Unload(opts); err != nil {
		t.Fatal(err)
	}
	labtest.Eventually(t, "maps and programs are gone", ids.gone)
	for _, i := range append(n.out, n.in) {
		labtest.Eventually(t, i.Name+" has no program", func() bool { return xdpProgram(t, i.Index) == 0 })
	}
	if left, err := filepath.Glob(opts.PinDir + "*"); err != nil || len(left) != 0 {
		t.Errorf("left in the BPF file system: %v, %v", left, err)
	}
	if err := Unload(opts); !errors.Is(err, ErrNotLoaded) {
		t.Errorf("second Unload: %v, want ErrNotLoaded", err)
	}
	l = open(t, opts) // the lock is free
	if l.Adopted() || len(l.Attachments()) != 0 {
		t.Error("something was left to adopt")
	}
}

func TestDetach(t *testing.T) {
	t.Parallel()
	n := newLab(t, 1)
	l := open(t, testOptions(t))
	attachAll(t, l, n.in, n.out[0])
	for range 2 {
		if err := l.Detach(n.in.Index); err != nil {
			t.Error(err)
		}
	}
	labtest.Eventually(t, "the program is gone", func() bool { return xdpProgram(t, n.in.Index) == 0 })
	if xdpProgram(t, n.out[0].Index) == 0 {
		t.Error("the other interface has lost its program")
	}
	l = reopen(t, l)
	if got := l.Attachments(); len(got) != 1 || got[0].Index != n.out[0].Index {
		t.Errorf("adopted %+v", got)
	}
	attachAll(t, l, n.in)
}

func TestFailedOpenLeavesNothing(t *testing.T) {
	t.Parallel()
	newLab(t, 0)
	opts := testOptions(t)
	opts.programs = brokenRelease{}
	if _, err := Open(opts); !errors.Is(err, errBroken) {
		t.Errorf("Open: %v", err)
	}
	if left, err := filepath.Glob(opts.PinDir + "*"); err != nil || len(left) != 0 {
		t.Errorf("left in the BPF file system: %v, %v", left, err)
	}
	opts.programs = nil
	open(t, opts)
}

var errBroken = errors.New("broken")

type brokenRelease struct{ embedded }

func (brokenRelease) egress(*mapSet, Capabilities, *ebpf.Program) (*ebpf.Program, error) {
	return nil, errBroken
}

// What a process leaves when it dies midway is removed by the next one.
func TestSweepsLeftovers(t *testing.T) {
	n := newLab(t, 2)
	l := open(t, testOptions(t))
	attachAll(t, l, n.in)
	sync1(t, l, someRules(n)...)
	before := dump(t, l)
	pins := pinsBelow(t, filepath.Dir(l.opts.PinDir))
	dir := l.opts.PinDir
	stale := dir + "_new_1234"
	for _, sub := range []string{"", "/building", "/links", "/programs"} {
		if err := os.Mkdir(stale+sub, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	for path, p := range map[string]pinner{
		stale + "/config":                        l.maps.Config,
		stale + "/programs/relay":                l.relay,
		filepath.Join(dir, "links", "if77_next"): l.maps.Drops,
		filepath.Join(dir, "flows4_next"):        l.tables[exact4],
	} {
		if err := repin(p, path); err != nil {
			t.Fatal(err)
		}
	}
	orphan := bpf.RelayRule{Name: [bpf.NameLen]int8{'x'}}
	slots, _, err := l.newBroadcast(nil)
	if err != nil {
		t.Fatal(err)
	}
	defer slots.Close()
	key := bpf.RelayDropKey{Id: 999}
	perCPU := make([]bpf.RelayCounter, ebpf.MustPossibleCPU())
	for _, err := range []error{
		l.maps.Rules.Put(uint32(999), &orphan),
		l.maps.Copies.Put(uint32(4000), &bpf.RelayCopy{Ifindex: 1, Same: 1}),
		l.maps.Broadcast.Put(uint32(4000), slots),
		l.maps.RuleDrops.Put(&key, perCPU),
		l.maps.Devices.Put(uint32(500), &bpf.RelayBpfDevmapVal{Ifindex: uint32(n.out[0].Index)}),
		l.maps.DeviceRows.Put(uint32(500), uint32(n.out[0].Index)),
		l.maps.DeviceStats.Put(uint32(4711), make([]bpf.TransmitDeviceStats, ebpf.MustPossibleCPU())),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	l = reopen(t, l)
	if diff := cmp.Diff(before, dump(t, l)); diff != "" {
		t.Errorf("after adoption (-before +after):\n%s", diff)
	}
	if diff := cmp.Diff(pins, pinsBelow(t, filepath.Dir(dir))); diff != "" {
		t.Errorf("pins (-before +after):\n%s", diff)
	}
	if err := l.maps.RuleDrops.Lookup(&key, &perCPU); !errors.Is(err, ebpf.ErrKeyNotExist) {
		t.Errorf("drop counters of nobody: %v", err)
	}
	kernelFits(t, l)
}

// An interface that disappears takes its link and its rows with it; the next start copes, and so
// does the running process.
func TestInterfaceGoes(t *testing.T) {
	t.Parallel()
	n := newLab(t, 3)
	l := open(t, testOptions(t))
	attachAll(t, l, append(n.out, n.in)...)
	rules := someRules(n)
	sync1(t, l, rules...)
	remove := func(i *net.Interface) {
		lk, err := netlink.LinkByIndex(i.Index)
		if err != nil {
			t.Fatal(err)
		}
		if err := netlink.LinkDel(lk); err != nil {
			t.Fatal(err)
		}
	}
	remove(n.out[0])
	opts := l.opts
	opts.programs = otherRelease{}
	closeLoader(t, l)
	l = open(t, opts)
	if got := len(l.Attachments()); got != 3 {
		t.Errorf("%d attachments, want 3", got)
	}
	if _, err := os.Stat(linkPin(opts.PinDir, n.out[0].Index)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the link is still pinned: %v", err)
	}
	remove(n.out[1])
	if err := l.Detach(n.out[1].Index); err != nil {
		t.Errorf("detach from a removed interface: %v", err)
	}
	for i := range rules {
		for slot := range rules[i].Out {
			rules[i].Out[slot].Ready = false
		}
	}
	rules = append(rules, flow.Flow{Name: "new", In: input(n.in, "239.1.1.9", "", 5000), Out: []flow.Output{output(n.out[2], "239.9.9.9", "10.1.2.1", 1)}})
	sync1(t, l, rules...)
	s := startStream(t, n, "239.1.1.9", 0, 0, 1)
	s.more()
	s.finish()
	kernelFits(t, l)
	allocatorsFit(t, l)
}

func TestNoFileDescriptorLeaks(t *testing.T) {
	n := newLab(t, 2)
	opts := testOptions(t)
	var before []string
	for round := range 3 {
		if round == 1 {
			before = openFDs(t) // the first round has opened what stays open, such as epoll
		}
		l := open(t, opts)
		attachAll(t, l, append(n.out, n.in)...)
		rules := someRules(n)
		sync1(t, l, rules...)
		sync1(t, l, rules[1:]...)
		bad := append(slices.Clone(rules), flow.Flow{Name: "bad", In: input(n.in, "239.1.1.9", "", 1), Out: []flow.Output{output(&net.Interface{Index: 9999, HardwareAddr: n.in.HardwareAddr}, "239.1.1.1", "10.0.0.1", 1)}})
		if err := l.Sync(pointers(bad)); err == nil {
			t.Fatal("an interface that is not there is accepted")
		}
		r, err := OpenReader(opts.PinDir)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := r.Stats(); err != nil {
			t.Error(err)
		}
		if err := r.Close(); err != nil {
			t.Error(err)
		}
		if err := l.Detach(n.in.Index); err != nil {
			t.Error(err)
		}
		closeLoader(t, l)
	}
	if diff := cmp.Diff(before, openFDs(t)); diff != "" {
		t.Errorf("file descriptors (-before +after):\n%s", diff)
	}
}

// A process that dies while it moves a rule from IPv6 to IPv4 leaves it in both tables; the next
// one continues with the new one.
func TestAdoptsHalfMovedRule(t *testing.T) {
	t.Parallel()
	n := newLab(t, 1)
	opts := stateOptions(t)
	l := open(t, opts)
	old := flow.Flow{Name: "cam1", In: input(n.in, "ff0e::1", "", 5000), Out: []flow.Output{output(n.out[0], "ff0e::2", "fd00::1", 6000)}}
	sync1(t, l, old)
	moved := flow.Flow{Name: "cam1", In: input(n.in, "239.1.1.1", "", 5000), Out: []flow.Output{output(n.out[0], "239.2.2.2", "10.1.0.1", 6000)}}
	second := moved
	second.Name = "cam2"
	sync1(t, l, old, second)
	// Under the other name this is what a half-done move leaves.
	row := encodeRule(l.rules["cam2"])
	row.Name = encodeRule(l.rules["cam1"]).Name
	if err := l.maps.Rules.Put(l.rules["cam2"].id, &row); err != nil {
		t.Fatal(err)
	}
	closeLoader(t, l)
	l = open(t, opts)
	if rules := l.Rules(); len(rules) != 1 || !rules[0].In.Group.Is4() {
		t.Fatalf("adopted %+v", rules)
	}
	if flows, err := l.tables.read(); err != nil || len(flows) != 1 {
		t.Fatalf("%d flow entries, %v", len(flows), err)
	}
	sync1(t, l, moved)
}

// A process that dies after it added new entries next to the leaving ones also leaves a rule twice
// in one table.
func TestAdoptsRuleThatIsThereTwice(t *testing.T) {
	t.Parallel()
	n := newLab(t, 1)
	opts := stateOptions(t)
	l := open(t, opts)
	rule := func(name, group string) flow.Flow {
		return flow.Flow{Name: name, In: input(n.in, group, "", 5000), Out: []flow.Output{output(n.out[0], "239.2.2.2", "10.1.0.1", 6000)}}
	}
	sync1(t, l, rule("cam1", "239.1.1.1"), rule("cam2", "239.1.1.2"))
	row := encodeRule(l.rules["cam2"])
	row.Name = encodeRule(l.rules["cam1"]).Name
	if err := l.maps.Rules.Put(l.rules["cam2"].id, &row); err != nil {
		t.Fatal(err)
	}
	l = reopen(t, l)
	if rules := l.Rules(); len(rules) != 1 || rules[0].Name != "cam1" {
		t.Fatalf("adopted %+v", rules)
	}
	if flows, err := l.tables.read(); err != nil || len(flows) != 1 {
		t.Fatalf("%d flow entries, %v", len(flows), err)
	}
	kernelFits(t, l)
	allocatorsFit(t, l)
	sync1(t, l, rule("cam1", "239.1.1.2"))
	kernelFits(t, l)
}
