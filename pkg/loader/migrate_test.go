package loader

import (
	"bytes"
	"compress/gzip"
	"encoding/binary"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"maps"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/link"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"xdpcast/bpf"
	"xdpcast/internal/labtest"
	"xdpcast/pkg/flow"
)

var updatePinned = flag.Bool("update-pinned", false, "write testdata/pinned by the releases' own programs")

// releases has the last commit that wrote each schema migrated by this release.
var releases = map[uint32]string{
	4: "117cc45f36fd2993543f88f4d50766a834afb7a4",
	5: "911f07e9dc9ec2406d38ccba8f10df985ace6a3e",
	6: "c02ce5669608f520222425380d5b957299386956",
}

// pinnedRule is a rule of the state that releases left, the frame sent for it, and the number of
// copies of each packet at each sink.
type pinnedRule struct {
	name, text string
	group      string
	copies     []int
	drops      Reason    // with no copies
	since      uint32    // the first schema that has such rules; 0: all have
	again      string    // the group of a second input, which carries the same numbers; empty: none
	path       flow.Path // of its packets while a daemon runs
}

// pinnedRulesOf are the rules of a schema.
func pinnedRulesOf(schema uint32) []pinnedRule {
	return slices.DeleteFunc(slices.Clone(pinnedRules), func(r pinnedRule) bool { return r.since > schema })
}

var pinnedRules = []pinnedRule{
	{name: "one", text: `{in: "239.1.1.1:5000%in", out: "239.2.1.1:6000%out0,ttl=9"}`, group: "239.1.1.1", copies: []int{1}},
	{name: "two", text: `{in: "239.1.1.2:5000%in", out: ["239.2.1.2:6000%out0", "239.2.2.2:6000%out1"]}`, group: "239.1.1.2", copies: []int{1, 1}},
	{name: "same", text: `{in: "192.168.7.7@239.1.1.3:5000%in", out: ["239.2.2.3:6000%out1", "239.2.2.3:6001%out1", "239.2.1.3:6000%out0"]}`, group: "239.1.1.3", copies: []int{1, 2}},
	{name: "plant", text: `{in: "239.5.0.0/24:5000%in,join=none", out: "239.6.0.0/24:+1000%out1"}`, group: "239.5.0.9", copies: []int{0, 1}},
	{name: "low", text: `{in: "239.1.1.7:5000%in", out: "239.2.1.7:6000%out0,minttl=64"}`, group: "239.1.1.7", drops: TTL},
	{name: "rated", text: `{in: "239.1.1.8:5000%in,rate=100000pps", out: "239.2.1.8:6000%out0"}`, group: "239.1.1.8", copies: []int{1}},
	{name: "six", text: `{in: "fd00:7::7@[ff3e::1]:5000%in", out: "[ff3e::2]:6000%out0,src=[fd00::1]"}`, group: "ff3e::1", copies: []int{1}},
	{name: "socket", text: `{in: "239.1.1.9:5000%in", out: "239.2.1.9:6000%out0", path: afxdp}`, group: "239.1.1.9", copies: []int{1}, path: flow.PathAFXDP},
	{name: "tapped", text: `{in: "239.1.1.10:5000%in", out: "239.2.2.10:6000%out1", path: fanout}`, group: "239.1.1.10", copies: []int{0, 1}, path: flow.PathFanout},
	// The number follows "stream 239.1.3.1 ".
	{name: "merged", text: `{in: ["239.1.3.1:5000%in", "239.1.3.2:5000%in"], merge: "field:17:8,skew=10s,reset=60s", out: ["239.2.1.3:7000%out0", "239.2.2.3:7000%out1"]}`,
		group: "239.1.3.1", copies: []int{1, 1}, since: 6, again: "239.1.3.2"},
}

// pinnedFrames is how many frames were sent for each rule before the state was stored.
const pinnedFrames = 5

// pinnedState is what a release left pinned, and its programs.
type pinnedState struct {
	Schema        uint32
	Commit        string
	Monotonic     time.Duration     // the clock of times in maps
	Interfaces    map[string]uint32 // index by name
	Maps          []pinnedMap
	Relay, Egress []byte
}

// pinnedMap is a map, without the zero entries of arrays.
type pinnedMap struct {
	Pin                                            string `json:",omitempty"`
	Type, KeySize, ValueSize, MaxEntries, MapFlags uint32
	Entries                                        []pinnedEntry `json:",omitempty"`
}

type pinnedEntry struct {
	Key   []byte
	Value []byte     `json:",omitempty"` // of all CPUs
	Pin   string     `json:",omitempty"` // of a map with its own pin
	Map   *pinnedMap `json:",omitempty"`
}

func pinnedFile(schema uint32) string {
	return filepath.Join("testdata", "pinned", fmt.Sprintf("schema%d.json.gz", schema))
}

// State left by each release is taken over under traffic: no packet is lost or duplicated, and the
// counters continue.
func TestMigrate(t *testing.T) {
	for _, schema := range slices.Sorted(maps.Keys(schemas)) {
		t.Run(fmt.Sprintf("schema %d", schema), func(t *testing.T) {
			t.Parallel()
			n := newLab(t, 2)
			opts := testOptions(t)
			restore(t, n, opts.PinDir, schema)
			migrateUnderTraffic(t, n, opts, schema)
		})
	}
}

// The same with state that the release's own program writes now, which requires building it: long
// form. With -update-pinned it is stored for TestMigrate.
func TestMigrateFromRelease(t *testing.T) {
	if !*updatePinned {
		labtest.LongOnly(t, "builds the programs of earlier releases, for which the history is needed; TestMigrate has what they left")
	}
	for _, schema := range slices.Sorted(maps.Keys(releases)) {
		t.Run(fmt.Sprintf("schema %d", schema), func(t *testing.T) {
			program := buildRelease(t, releases[schema])
			n := newLab(t, 2)
			opts := testOptions(t)
			runRelease(t, n, program, opts, schema)
			if *updatePinned {
				keep(t, n, opts.PinDir, schema)
			}
			migrateUnderTraffic(t, n, opts, schema)
		})
	}
}

// migrateUnderTraffic opens pinned state of an earlier release while streams of one output and of
// several flow.
func migrateUnderTraffic(t *testing.T, n *testLab, opts Options, schema uint32) {
	t.Helper()
	_, err := OpenReader(opts.PinDir)
	if !errors.Is(err, ErrSchema) || !strings.Contains(err.Error(), fmt.Sprintf("it has %d, this xdpcast has %d", schema, bpf.Schema)) {
		t.Errorf("OpenReader: %v, want ErrSchema with both numbers", err)
	}
	running := map[string]*stream{}
	for _, r := range pinnedRulesOf(schema) {
		switch r.name {
		case "one", "same", "socket":
			running[r.name] = startStream(t, n, r.group, r.copies...)
		case "merged":
			running[r.name] = startNumbers(t, n, pinnedFrames, []string{r.group, r.again}, r.copies...)
		default:
			continue
		}
		running[r.name].more()
	}
	l := open(t, opts)
	if !l.Adopted() {
		t.Error("the state is not adopted")
	}
	for _, s := range running {
		s.more()
	}
	for _, s := range running {
		s.finish()
	}
	for _, a := range l.Attachments() {
		if a.ProgramID != uint32(programID(t, l.relay)) {
			t.Errorf("%s runs program %d, want %d", a.Interface, a.ProgramID, programID(t, l.relay))
		}
	}
	for _, r := range pinnedRulesOf(schema) {
		var since uint64
		if s := running[r.name]; s != nil {
			since = s.sent.Load()
		}
		switch {
		case r.again != "":
			checkPinnedStream(t, n, l, r, since)
		case r.path != 0 && schema < 5: // whose workers' counts died with the process
			checkKernelCounts(t, l, r, since)
		default:
			checkPinnedRule(t, l, r, pinnedFrames+since)
		}
	}
	allocatorsFit(t, l)
	kernelFits(t, l)
	for _, entry := range pinsBelow(t, opts.PinDir) {
		if name := filepath.Base(entry); name == pinMigrating || name == pinMigrated || name == "ports" || name == "fanout" {
			t.Errorf("%s is left", entry)
		}
	}
	// It continues as if it had always had this schema.
	reopen(t, l)
	for _, r := range pinnedRulesOf(schema) {
		if len(r.copies) > 0 && !strings.Contains(r.group, ":") && r.again == "" && r.path != flow.PathFanout {
			s := startStream(t, n, r.group, r.copies...)
			s.more()
			s.finish()
		}
	}
}

// checkPinnedRule checks how many packets a rule has matched, and what happened to them.
func checkPinnedRule(t *testing.T, l *Loader, r pinnedRule, want uint64) {
	t.Helper()
	s := statsOf(t, l, r.name)
	if s.Matched.Packets != want || s.LastSeen < 0 {
		t.Errorf("rule %s: %d matched, last seen %v, want %d", r.name, s.Matched.Packets, s.LastSeen, want)
	}
	if len(s.Drops) != 0 {
		t.Errorf("rule %s: drops %v", r.name, s.Drops)
	}
	for slot, o := range s.Outputs {
		if len(r.copies) == 0 {
			if o.Sent.Packets != 0 || o.Drops[r.drops] != s.Matched || len(o.Drops) != 1 {
				t.Errorf("rule %s, output %d: %+v sent, drops %v, want all dropped for %v", r.name, slot, o.Sent, o.Drops, r.drops)
			}
		} else if o.Sent != s.Matched || len(o.Drops) != 0 {
			t.Errorf("rule %s, output %d: %+v of %+v sent, drops %v", r.name, slot, o.Sent, s.Matched, o.Drops)
		}
	}
}

// checkPinnedStream checks that a merged stream has relayed each number once, and continues to know
// those that were relayed before the migration.
func checkPinnedStream(t *testing.T, n *testLab, l *Loader, r pinnedRule, since uint64) {
	t.Helper()
	source := labtest.NewTap(t, n.source, "eth0")
	for i := range uint64(pinnedFrames) {
		source.Send(sourceFrame(n, r.again, 5000, pinnedPayload(i)).Build())
	}
	want := since + pinnedFrames
	labtest.Eventually(t, "the second input's packets are matched", func() bool { return statsOf(t, l, r.name+"%1").Matched.Packets >= want })
	checkPinnedRule(t, l, pinnedRule{name: r.name + "%0", copies: r.copies}, want)
	second := statsOf(t, l, r.name+"%1")
	// Those from before the migration are duplicates until they are older than the skew.
	if second.Matched.Packets != want || second.Drops[Duplicate].Packets+second.Drops[Late].Packets != want || second.Drops[Duplicate].Packets < since {
		t.Errorf("rule %s: second input: %d matched, drops %v, want %d, all duplicates or late", r.name, second.Matched.Packets, second.Drops, want)
	}
	if first := statsOf(t, l, r.name+"%0"); first.Stream == nil || first.Stream.Restarts != 0 {
		t.Errorf("rule %s: stream %+v, want one that was not restarted", r.name, first.Stream)
	}
}

// checkKernelCounts checks the counts of a rule on a user-space path without those of its workers.
func checkKernelCounts(t *testing.T, l *Loader, r pinnedRule, since uint64) {
	t.Helper()
	matched := since
	if r.path == flow.PathAFXDP {
		matched += pinnedFrames // counted by the relay program
	}
	s := statsOf(t, l, r.name)
	if s.Matched.Packets != matched || s.Outputs[0].Sent.Packets != since || len(s.Drops)+len(s.Outputs[0].Drops) != 0 {
		t.Errorf("rule %s: %+v, want %d matched, %d sent", r.name, counters(s), matched, since)
	}
}

// buildRelease builds the program of a commit. It skips the test without the git history, as in a
// source archive.
func buildRelease(t *testing.T, commit string) string {
	t.Helper()
	root, err := exec.Command("git", "rev-parse", "--show-toplevel").Output()
	if err != nil {
		t.Skipf("no git history here: %v", err)
	}
	repository := strings.TrimSpace(string(root))
	if err := exec.Command("git", "-C", repository, "cat-file", "-e", commit+"^{commit}").Run(); err != nil {
		t.Skipf("commit %s is not in the history here: %v", commit, err)
	}
	dir := t.TempDir()
	archive := exec.Command("git", "-C", repository, "archive", commit)
	unpack := exec.Command("tar", "-x", "-C", dir)
	if unpack.Stdin, err = archive.StdoutPipe(); err != nil {
		t.Fatal(err)
	}
	if err := unpack.Start(); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(archive.Run(), unpack.Wait()); err != nil {
		t.Fatalf("unpack commit %s: %v", commit, err)
	}
	program := filepath.Join(dir, "xdpcast-then")
	build := exec.Command("go", "build", "-trimpath", "-buildvcs=false", "-o", program, "./cmd/xdpcast")
	build.Dir = dir
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build commit %s: %v\n%s", commit, err, out)
	}
	return program
}

// runRelease loads the rules with a release's program, sends some packets for each, and kills it.
func runRelease(t *testing.T, n *testLab, program string, opts Options, schema uint32) {
	t.Helper()
	var file strings.Builder
	file.WriteString("rules:\n")
	for _, r := range pinnedRulesOf(schema) {
		fmt.Fprintf(&file, "  - {name: %s, %s\n", r.name, strings.TrimPrefix(r.text, "{"))
	}
	dir := t.TempDir()
	config, socket := filepath.Join(dir, "rules.yaml"), filepath.Join(dir, "api.sock")
	if err := os.WriteFile(config, []byte(file.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(program, "--socket", socket, "run", "-c", config, "--pin-dir", opts.PinDir, "--run-dir", opts.RunDir, "--max-rules", "64", "--max-outputs", "256")
	var output bytes.Buffer
	cmd.Stdout, cmd.Stderr = &output, &output
	if err := n.relay.Start(cmd); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	kill := func() { _ = cmd.Process.Kill() }
	defer kill()
	labtest.Eventually(t, "the release's program is ready", func() bool {
		select {
		case err := <-ended:
			t.Fatalf("the release's program has ended: %v\n%s", err, output.String())
		default:
		}
		out, err := exec.Command(program, "--socket", socket, "rule", "list").CombinedOutput()
		return err == nil && strings.Count(string(out), "active") >= len(pinnedRulesOf(schema))
	})
	sendPinned(t, n, schema)
	kill()
	if err := <-ended; cmd.ProcessState.Sys().(syscall.WaitStatus).Signal() != unix.SIGKILL {
		t.Fatalf("the release's program: %v\n%s", err, output.String())
	}
}

// sendPinned sends the frames of all rules, and waits for their copies.
func sendPinned(t *testing.T, n *testLab, schema uint32) {
	t.Helper()
	source := labtest.NewTap(t, n.source, "eth0")
	sinks := []*labtest.Tap{labtest.NewTap(t, n.sinks[0], "eth0"), labtest.NewTap(t, n.sinks[1], "eth0")}
	copies := make([]int, len(sinks))
	for _, r := range pinnedRulesOf(schema) {
		for i := range uint64(pinnedFrames) {
			source.Send(sourceFrame(n, r.group, 5000, pinnedPayload(i)).Build())
		}
		for sink, c := range r.copies {
			copies[sink] += c * pinnedFrames
		}
	}
	for i, sink := range sinks {
		if got := sink.Collect(copies[i], func(f []byte) bool { return bytes.Contains(f, []byte("pinned")) }); len(got) != copies[i] {
			t.Fatalf("%d frames at sink %d, want %d", len(got), i, copies[i])
		}
	}
}

// pinnedPayload has a number where those of numbered streams have it.
func pinnedPayload(number uint64) []byte {
	return binary.BigEndian.AppendUint64([]byte("pinned           "), number)
}

// keep writes the pinned state to testdata.
func keep(t *testing.T, n *testLab, dir string, schema uint32) {
	t.Helper()
	state := pinnedState{Schema: schema, Commit: releases[schema], Monotonic: monotonic(), Interfaces: map[string]uint32{n.in.Name: uint32(n.in.Index)}}
	for _, out := range n.out {
		state.Interfaces[out.Name] = uint32(out.Index)
	}
	for name, to := range map[string]*[]byte{"relay": &state.Relay, "egress": &state.Egress} {
		object, err := exec.Command("git", "show", releases[schema]+":bpf/"+name+"_bpfel.o").Output()
		if err != nil {
			t.Fatal(err)
		}
		*to = object
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	pinned := map[uint32]string{}
	for _, e := range entries {
		if e.IsDir() {
			continue
		}
		m, err := ebpf.LoadPinnedMap(filepath.Join(dir, e.Name()), nil)
		if err != nil {
			t.Fatal(err)
		}
		id, err := mapID(m)
		if err != nil {
			t.Fatal(err)
		}
		pinned[uint32(id)] = e.Name()
		m.Close()
	}
	for _, e := range entries {
		if e.IsDir() {
			continue
		}
		m, err := ebpf.LoadPinnedMap(filepath.Join(dir, e.Name()), nil)
		if err != nil {
			t.Fatal(err)
		}
		kept := keepMap(t, m, pinned)
		kept.Pin = e.Name()
		state.Maps = append(state.Maps, *kept)
		m.Close()
	}
	var packed bytes.Buffer
	to, err := gzip.NewWriterLevel(&packed, gzip.BestCompression)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(json.NewEncoder(to).Encode(state), to.Close(), os.MkdirAll(filepath.Dir(pinnedFile(schema)), 0o755),
		os.WriteFile(pinnedFile(schema), packed.Bytes(), 0o644)); err != nil {
		t.Fatal(err)
	}
}

func keepMap(t *testing.T, m *ebpf.Map, pinned map[uint32]string) *pinnedMap {
	t.Helper()
	kept := &pinnedMap{Type: uint32(m.Type()), KeySize: m.KeySize(), ValueSize: m.ValueSize(), MaxEntries: m.MaxEntries(), MapFlags: m.Flags()}
	add := func(key []byte) {
		value, err := m.LookupBytes(key)
		if err != nil || value == nil || bytes.Count(value, []byte{0}) == len(value) && isArray(m.Type()) {
			return
		}
		e := pinnedEntry{Key: slices.Clone(key), Value: value}
		if isOuter(m.Type()) {
			id := binary.NativeEndian.Uint32(value)
			if e.Value, e.Pin = nil, pinned[id]; e.Pin == "" {
				inner, err := ebpf.NewMapFromID(ebpf.MapID(id))
				if err != nil {
					t.Fatal(err)
				}
				defer inner.Close()
				e.Map = keepMap(t, inner, pinned)
			}
		}
		kept.Entries = append(kept.Entries, e)
	}
	switch m.Type() {
	case ebpf.Array, ebpf.PerCPUArray, ebpf.ArrayOfMaps, ebpf.DevMap, ebpf.XSKMap, ebpf.CPUMap:
		for i := range m.MaxEntries() {
			add(binary.NativeEndian.AppendUint32(nil, i))
		}
	default:
		var keys [][]byte
		var key []byte
		for {
			next, err := m.NextKeyBytes(nilOr(key))
			if err != nil {
				t.Fatal(err)
			}
			if next == nil {
				break
			}
			keys = append(keys, next)
			key = next
		}
		for _, key := range keys {
			add(key)
		}
	}
	return kept
}

func nilOr(key []byte) any {
	if key == nil {
		return nil
	}
	return key
}

func isOuter(kind ebpf.MapType) bool { return kind == ebpf.ArrayOfMaps || kind == ebpf.HashOfMaps }

func isArray(kind ebpf.MapType) bool { return kind == ebpf.Array || kind == ebpf.PerCPUArray }

// restore pins the testdata of a schema, with this lab's interfaces, and attaches that release's
// programs.
func restore(t testing.TB, n *testLab, dir string, schema uint32) {
	t.Helper()
	packed, err := os.Open(pinnedFile(schema))
	if err != nil {
		t.Fatal(err)
	}
	defer packed.Close()
	from, err := gzip.NewReader(packed)
	if err != nil {
		t.Fatal(err)
	}
	r := restorer{t: t, indexes: map[uint32]uint32{}, maps: map[string]*ebpf.Map{}}
	if err := json.NewDecoder(from).Decode(&r.state); err != nil {
		t.Fatal(err)
	}
	if _, err := mountBPFFS(dir); err != nil {
		t.Fatal(err)
	}
	for _, sub := range []string{programsDir, linksDir} {
		if err := os.MkdirAll(filepath.Join(dir, sub), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	here := append(slices.Clone(n.out), n.in)
	for _, i := range here {
		r.indexes[r.state.Interfaces[i.Name]] = uint32(i.Index)
	}
	if r.cookie, err = netnsCookie(); err != nil {
		t.Fatal(err)
	}
	can, err := probesOfKernel().run()
	if err != nil {
		t.Fatal(err)
	}
	relay, egress := r.load(r.state.Relay, can), r.load(r.state.Egress, can)
	for i := range r.state.Maps {
		r.make(&r.state.Maps[i], relay)
	}
	programs := map[string]*ebpf.Program{}
	for name, spec := range map[string]*ebpf.CollectionSpec{pinEgress: egress, pinRelay: relay} {
		programs[name] = r.program(name, spec)
		defer programs[name].Close()
		if err := programs[name].Pin(filepath.Join(dir, programsDir, name)); err != nil {
			t.Fatal(err)
		}
	}
	r.egress = programs[pinEgress]
	for i := range r.state.Maps {
		r.fill(r.maps[r.state.Maps[i].Pin], &r.state.Maps[i], relay)
	}
	for name, m := range r.maps {
		if err := pinClone(m, filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
		defer m.Close()
	}
	for _, i := range here {
		lk, err := link.AttachXDP(link.XDPOptions{Program: programs[pinRelay], Interface: i.Index, Flags: link.XDPDriverMode})
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(lk.Pin(linkPin(dir, i.Index)), lk.Close()); err != nil {
			t.Fatal(err)
		}
	}
}

type restorer struct {
	t       testing.TB
	state   pinnedState
	indexes map[uint32]uint32 // old to current interface indexes
	cookie  uint64
	maps    map[string]*ebpf.Map
	egress  *ebpf.Program
}

func (r *restorer) load(object []byte, can Capabilities) *ebpf.CollectionSpec {
	r.t.Helper()
	spec, err := ebpf.LoadCollectionSpecFromReader(bytes.NewReader(object))
	if err == nil {
		err = fitKernel(spec, can)
	}
	if err != nil {
		r.t.Fatal(err)
	}
	return spec
}

// make creates a map without its entries.
func (r *restorer) make(m *pinnedMap, relay *ebpf.CollectionSpec) {
	r.t.Helper()
	spec := &ebpf.MapSpec{Type: ebpf.MapType(m.Type), KeySize: m.KeySize, ValueSize: m.ValueSize, Flags: m.MapFlags, MaxEntries: m.MaxEntries}
	if of := relay.Maps[m.Pin]; of != nil {
		spec = of.Copy()
		spec.MaxEntries = m.MaxEntries
		spec.Pinning = ebpf.PinNone
	} else if inner := r.innerOf(m.Pin, relay); inner != nil {
		// With its types: before Linux 6.2 an outer map refuses one without (timer_off of bpf_map_meta_equal).
		spec = inner.Copy()
		spec.MaxEntries = m.MaxEntries
	}
	if spec.Type == ebpf.CPUMap {
		spec.MaxEntries = uint32(ebpf.MustPossibleCPU())
	}
	made, err := ebpf.NewMap(spec)
	if err != nil {
		r.t.Fatalf("make map %s: %v", m.Pin, err)
	}
	r.maps[m.Pin] = made
}

// innerOf is the template of a pinned map that an entry of an outer map refers to; nil for another map.
func (r *restorer) innerOf(pin string, relay *ebpf.CollectionSpec) *ebpf.MapSpec {
	for i := range r.state.Maps {
		outer := &r.state.Maps[i]
		if isOuter(ebpf.MapType(outer.Type)) && slices.ContainsFunc(outer.Entries, func(e pinnedEntry) bool { return e.Pin == pin }) {
			return relay.Maps[outer.Pin].InnerMap
		}
	}
	return nil
}

func (r *restorer) program(name string, spec *ebpf.CollectionSpec) *ebpf.Program {
	r.t.Helper()
	replacements := map[string]*ebpf.Map{}
	for of := range spec.Maps {
		if m := r.maps[of]; m != nil {
			spec.Maps[of].MaxEntries = m.MaxEntries()
			replacements[of] = m
		}
	}
	for other := range spec.Programs {
		if other != name {
			delete(spec.Programs, other)
		}
	}
	c, err := ebpf.NewCollectionWithOptions(spec, ebpf.CollectionOptions{MapReplacements: replacements})
	if r.state.Schema == 4 && errors.Is(err, unix.EACCES) { // that release did not run there either
		labtest.NeedsKernel(r.t, false, "arguments of global functions as map keys", "6.2")
	}
	if err != nil {
		r.t.Fatalf("load program %s: %v", name, err)
	}
	defer c.Close()
	return c.DetachProgram(name)
}

// fill writes the entries.
func (r *restorer) fill(to *ebpf.Map, m *pinnedMap, relay *ebpf.CollectionSpec) {
	r.t.Helper()
	for _, e := range m.Entries {
		if isOuter(to.Type()) {
			r.fillOuter(to, m, e, relay)
			continue
		}
		if to.Type() == ebpf.CPUMap || to.Type() == ebpf.XSKMap {
			continue
		}
		key, value := slices.Clone(e.Key), slices.Clone(e.Value)
		r.adapt(m.Pin, to, key, value)
		var err error
		if perCPU(to.Type()) {
			err = r.putPerCPU(to, key, value)
		} else {
			err = to.Put(key, value)
		}
		if err != nil {
			r.t.Fatalf("fill map %s: key %x: %v", m.Pin, key, err)
		}
	}
}

func perCPU(kind ebpf.MapType) bool { return kind == ebpf.PerCPUArray || kind == ebpf.PerCPUHash }

// putPerCPU adds the values of CPUs that this machine lacks to another one.
func (r *restorer) putPerCPU(to *ebpf.Map, key, value []byte) error {
	size := (int(to.ValueSize()) + 7) / 8 * 8
	here := make([][]byte, ebpf.MustPossibleCPU())
	for cpu := range here {
		here[cpu] = make([]byte, to.ValueSize())
	}
	for cpu := range len(value) / size {
		sum := here[cpu%len(here)]
		for at := 0; at+8 <= len(sum); at += 8 {
			word := binary.NativeEndian.Uint64(sum[at:]) + binary.NativeEndian.Uint64(value[cpu*size+at:])
			binary.NativeEndian.PutUint64(sum[at:], word)
		}
	}
	return to.Put(key, here)
}

func (r *restorer) fillOuter(to *ebpf.Map, m *pinnedMap, e pinnedEntry, relay *ebpf.CollectionSpec) {
	r.t.Helper()
	inner := r.maps[e.Pin]
	if e.Map != nil {
		spec := relay.Maps[m.Pin].InnerMap.Copy()
		spec.MaxEntries, spec.Key, spec.Value = e.Map.MaxEntries, nil, nil
		var err error
		if inner, err = ebpf.NewMap(spec); err != nil {
			r.t.Fatalf("make a map of %s: %v", m.Pin, err)
		}
		defer inner.Close()
		r.fill(inner, e.Map, relay)
	}
	if err := to.Put(e.Key, inner); err != nil {
		r.t.Fatalf("fill map %s: %v", m.Pin, err)
	}
}

// adapt inserts this lab's interfaces and network namespace.
func (r *restorer) adapt(pin string, m *ebpf.Map, key, value []byte) {
	r.t.Helper()
	index := func(b []byte) {
		if now, ok := r.indexes[binary.NativeEndian.Uint32(b)]; ok {
			binary.NativeEndian.PutUint32(b, now)
		}
	}
	switch pin {
	case "config":
		binary.NativeEndian.PutUint64(value[8:], r.cookie)
	case "flows4", "flows6", "queriers", "port_stats", "device_stats":
		index(key)
	case "prefixes4", "prefixes6":
		index(key[4:])
	case "outputs":
		index(value[48:])
	case "copies", "port_rows", "device_rows":
		index(value)
	}
	if m.Type() == ebpf.DevMap {
		index(value)
		if binary.NativeEndian.Uint32(value[4:]) != 0 {
			binary.NativeEndian.PutUint32(value[4:], uint32(r.egress.FD()))
		}
	}
	switch pin {
	case "stream_states":
		r.shiftTimes(value)
	case "policers":
		clear(value[:8]) // struct policer's full: a time of the machine that recorded the state
	}
	if pin == "shortcuts" {
		clear(value) // their slots depend on interface indexes
	}
}

// shiftTimes makes the times of a stream as old as they were when the state was recorded.
func (r *restorer) shiftTimes(value []byte) {
	r.t.Helper()
	states := make([]bpf.RelayStreamState, 1)
	if n := copy(bytesOf(states), value); n != len(value) {
		r.t.Fatalf("a stream has %d bytes, want at most %d", len(value), n)
	}
	s := &states[0]
	times := []*uint64{&s.TurnNs, &s.PassNs, &s.SessionNs}
	for i := range s.Legs {
		times = append(times, &s.Legs[i].JumpedNs, &s.Legs[i].SeenNs, &s.Legs[i].UpNs)
	}
	for _, at := range times {
		if *at != 0 {
			*at += uint64(monotonic() - r.state.Monotonic)
		}
	}
	copy(value, bytesOf(states))
}

// A process that dies at any point of a migration leaves state that the next one takes over, and no
// packet is affected.
func TestMigrationDies(t *testing.T) {
	t.Parallel()
	n := newLab(t, 2)
	opts := testOptions(t)
	restore(t, n, opts.PinDir, 6)
	s := startStream(t, n, "239.1.1.3", 1, 2)
	s.more()
	died := errors.New("died")
	var steps []string
	// The first process dies at its first step, each later one at its second, so that each step is
	// reached in state that a dead process left.
	for {
		seen := 0
		opts.at = func(step string) error {
			if seen++; seen > min(len(steps), 1) {
				steps = append(steps, step)
				return died
			}
			return nil
		}
		if l, err := Open(opts); err == nil {
			closeLoader(t, l)
			break
		} else if !errors.Is(err, died) {
			t.Fatalf("after %v: %v", steps, err)
		}
		s.more()
		if steps[len(steps)-1] == "upgrade" {
			break // one of three interfaces runs the new program
		}
	}
	for _, want := range []string{"built", "move config", "moved", "upgrade"} {
		if !slices.Contains(steps, want) {
			t.Errorf("none died at %q, but at %v", want, steps)
		}
	}
	opts.at = nil
	l := open(t, opts)
	s.more()
	s.finish()
	checkPinnedRule(t, l, pinnedRules[0], pinnedFrames)
	checkPinnedRule(t, l, pinnedRules[4], pinnedFrames)
	allocatorsFit(t, l)
	kernelFits(t, l)
}

// State that cannot be taken over is refused, with advice, or replaced: its programs keep relaying
// until the rules are published.
func TestReplace(t *testing.T) {
	setSchema := func(schema uint32) func(t *testing.T, dir string) {
		return func(t *testing.T, dir string) {
			m, err := ebpf.LoadPinnedMap(filepath.Join(dir, bpf.RelayMapConfig), nil)
			if err != nil {
				t.Fatal(err)
			}
			defer m.Close()
			value, err := m.LookupBytes(uint32(0))
			if err != nil {
				t.Fatal(err)
			}
			binary.NativeEndian.PutUint32(value, schema)
			if err := m.Put(uint32(0), value); err != nil {
				t.Fatal(err)
			}
		}
	}
	remove := func(names ...string) func(t *testing.T, dir string) {
		return func(t *testing.T, dir string) {
			for _, name := range names {
				if err := os.Remove(filepath.Join(dir, name)); err != nil {
					t.Fatal(err)
				}
			}
		}
	}
	for _, c := range []struct {
		name   string
		damage func(t *testing.T, dir string)
		is     error
		want   string
	}{
		{"newer", setSchema(bpf.Schema + 2), ErrSchema, "made by a newer release"},
		{"too old", setSchema(3), ErrSchema, "too old to be migrated"},
		{"pin missing", remove(bpf.RelayMapOutputs), ErrDamaged, "outputs is missing"},
		{"program missing", remove("programs/relay"), ErrDamaged, "programs/relay is missing"},
		{"other pins", func(t *testing.T, dir string) {
			remove(bpf.RelayMapRules)(t, dir)
			if err := os.Mkdir(filepath.Join(dir, bpf.RelayMapRules), 0o700); err != nil {
				t.Fatal(err)
			}
			remove(bpf.RelayMapRules, "flows4")(t, dir)
			if err := os.Mkdir(filepath.Join(dir, "stranger"), 0o700); err != nil {
				t.Fatal(err)
			}
		}, ErrDamaged, "rules is missing"},
		{"pin of no link", func(t *testing.T, dir string) {
			m, err := ebpf.LoadPinnedMap(filepath.Join(dir, bpf.RelayMapDrops), nil)
			if err != nil {
				t.Fatal(err)
			}
			defer m.Close()
			if err := pinClone(m, filepath.Join(dir, linksDir, "if99")); err != nil {
				t.Fatal(err)
			}
		}, ErrDamaged, "if99 is not a Link"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			n := newLab(t, 2)
			opts := testOptions(t)
			l := open(t, opts)
			attachAll(t, l, append(n.out, n.in)...)
			rules := someRules(n)
			sync1(t, l, rules...)
			opts = l.opts
			closeLoader(t, l)
			c.damage(t, opts.PinDir)
			s := startStream(t, n, "239.1.1.1", 1)
			s.more()
			_, err := Open(opts)
			if !errors.Is(err, c.is) || !strings.Contains(err.Error(), c.want) || !strings.Contains(err.Error(), "xdpcast unload --all --pin-dir "+opts.PinDir) {
				t.Errorf("Open: %v, want %v, %q and the command", err, c.is, c.want)
			}
			s.more()
			opts.Replace = true
			l = open(t, opts)
			s.more() // the old programs relay
			if l.Adopted() {
				t.Error("the state is called adopted")
			}
			hasWarning(t, l, "its programs run until the rules are active", c.want)
			s.finish() // packets pass unrelayed for a moment now
			sync1(t, l, rules...)
			hasWarning(t, l, "counters restarted at 0, and the streams of the kernel path were interrupted for", c.want)
			if l.replaced.interrupted <= 0 || l.replaced.interrupted > 10*time.Second {
				t.Errorf("interrupted for %v", l.replaced.interrupted)
			}
			s = startStream(t, n, "239.1.1.1", 1)
			s.more()
			s.finish()
			same := startStream(t, n, "239.1.1.3", 0, 2)
			same.more()
			same.finish()
			if got := statsOf(t, l, "one"); got.Matched.Packets != s.sent.Load() || got.Outputs[0].Sent != got.Matched {
				t.Errorf("rule one: %+v, want %d matched and sent", counters(got), s.sent.Load())
			}
			for _, a := range l.Attachments() {
				if a.ProgramID != uint32(programID(t, l.relay)) {
					t.Errorf("%s runs program %d, want %d", a.Interface, a.ProgramID, programID(t, l.relay))
				}
			}
			if slices.Contains(pinsBelow(t, opts.PinDir), filepath.Join(opts.PinDir, "stranger")) {
				t.Error("a pin of no release is left")
			}
			allocatorsFit(t, l)
			kernelFits(t, l)
			opts.Replace = false
			closeLoader(t, l)
			if l = open(t, opts); !l.Adopted() || len(l.Warnings()) != 0 {
				t.Errorf("opened again: adopted %v, warnings %q", l.Adopted(), l.Warnings())
			}
		})
	}
}

func hasWarning(t *testing.T, l *Loader, wants ...string) {
	t.Helper()
	if !slices.ContainsFunc(l.Warnings(), func(w string) bool {
		return !slices.ContainsFunc(wants, func(want string) bool { return !strings.Contains(w, want) })
	}) {
		t.Errorf("warnings %q: want one with all of %q", l.Warnings(), wants)
	}
}

// A link whose program the kernel does not update, such as one without an attach type, is
// reattached.
func TestReplaceAttachesAnew(t *testing.T) {
	t.Parallel()
	n := newLab(t, 1)
	opts := testOptions(t)
	l := open(t, opts)
	sync1(t, l, someRulesOn1(n)...)
	opts = l.opts
	closeLoader(t, l)
	spec := &ebpf.ProgramSpec{Type: ebpf.XDP, License: "MIT", Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, xdpPass), asm.Return()}}
	other, err := ebpf.NewProgram(spec)
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	for _, i := range []*net.Interface{n.in, n.out[0]} {
		lk, err := link.AttachXDP(link.XDPOptions{Program: other, Interface: i.Index, Flags: link.XDPDriverMode})
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(lk.Pin(linkPin(opts.PinDir, i.Index)), lk.Close()); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Remove(filepath.Join(opts.PinDir, bpf.RelayMapOutputs)); err != nil {
		t.Fatal(err)
	}
	opts.Replace = true
	l = open(t, opts)
	sync1(t, l, someRulesOn1(n)...)
	s := startStream(t, n, "239.1.1.1", 1)
	s.more()
	s.finish()
	for _, a := range l.Attachments() {
		if a.ProgramID != uint32(programID(t, l.relay)) || a.Mode != ModeNative {
			t.Errorf("%+v: want program %d in native mode", a, programID(t, l.relay))
		}
	}
}

// The layout of the pinned maps is fixed by their schema: a new layout needs a new schema.
func TestSchemaLayout(t *testing.T) {
	specs, err := (*definitions)(nil).mapSpecs(1, 1)
	if err != nil {
		t.Fatal(err)
	}
	var layout strings.Builder
	for _, name := range slices.Sorted(maps.Keys((&mapSet{}).slots())) {
		writeLayout(&layout, name, specs[name])
	}
	file := filepath.Join("testdata", "pinned", fmt.Sprintf("schema%d.txt", bpf.Schema))
	if *updatePinned {
		if err := os.WriteFile(file, []byte(layout.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(strings.Split(string(want), "\n"), strings.Split(layout.String(), "\n")); diff != "" {
		t.Errorf("the layout has changed (-schema %d +now): a release with schema %d would misread it. Before it is released, -update-pinned; after, docs/decisions/0023-migration-of-pinned-state.md:\n%s",
			bpf.Schema, bpf.Schema, diff)
	}
}

func writeLayout(to *strings.Builder, name string, spec *ebpf.MapSpec) {
	fmt.Fprintf(to, "%s: %v, keys of %d bytes, values of %d, flags %#x\n", name, spec.Type, spec.KeySize, spec.ValueSize, spec.Flags)
	for _, typ := range []btf.Type{spec.Key, spec.Value} {
		writeType(to, "  ", typ)
	}
	if spec.InnerMap != nil {
		writeLayout(to, name+" inner", spec.InnerMap)
	}
}

func writeType(to *strings.Builder, indent string, typ btf.Type) {
	if typ == nil {
		return
	}
	s, ok := btf.UnderlyingType(typ).(*btf.Struct)
	if !ok {
		return
	}
	fmt.Fprintf(to, "%sstruct %s, %d bytes\n", indent, s.Name, s.Size)
	for _, m := range s.Members {
		size, err := btf.Sizeof(m.Type)
		if err != nil {
			size = -1
		}
		fmt.Fprintf(to, "%s  %s at %d, %d bytes\n", indent, m.Name, m.Offset.Bytes(), size)
		inner := btf.UnderlyingType(m.Type)
		if array, ok := inner.(*btf.Array); ok {
			inner = array.Type
		}
		writeType(to, indent+"    ", inner)
	}
}
