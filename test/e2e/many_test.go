package e2e_test

import (
	"encoding/binary"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/google/go-cmp/cmp"

	"xdpcast/internal/control"
	"xdpcast/internal/lab"
	"xdpcast/internal/labtest"
	"xdpcast/internal/traffic"
	"xdpcast/pkg/rules"
)

// TestThousandRules adds 1,000 rules, sends through some, and removes them: some one by one, the others at once.
// Everything must return to its initial state. The short form adds one by one only those rules with which the number
// of rules comes near a power of two, to which tables grow, and the others at once.
func TestThousandRules(t *testing.T) {
	const count = 1000
	near := labtest.Soak(16, count) // rules on each side of a power of two
	// To delete a rule waits until the kernel has freed what its packets used.
	single := labtest.Soak(50, 200)
	n := newNetwork(t)
	labtest.Connect(t, lab.End{Host: n.relay, Name: "in1", Addrs: []string{"10.3.0.1/24"}},
		lab.End{Host: n.source, Name: "src1", Addrs: []string{"10.3.0.2/24"}})
	in := newInstance(t, n.relay)
	in.start("--max-rules", "2048", "--max-outputs", "4096", "-i", "in0", "-i", "in1", "-i", "out0", "-i", "out1", "-i", "out2")
	// The first rules create what then stays, such as the runtime's own files.
	in.addMany(t, 0, 8)
	in.deleteMany(t, 0, 8)
	var before holdings
	eventually(t, "the last client is gone, and no file is open for a moment only", func() string {
		earlier := before
		before = in.holdings()
		// Permanent sockets: the control socket; those for notifications of interfaces, of routes
		// and neighbours, of queues, of features, and of veth peers in other namespaces; and two for
		// queries about them.
		if n := before.Files["socket:"]; n != 8 {
			return fmt.Sprintf("%d sockets", n)
		}
		return cmp.Diff(earlier.exact(), before.exact())
	})

	started := time.Now()
	slowest, singly := time.Duration(0), 0
	for from, to := 0, 0; from < count; from = to {
		one := nearPower(from, near)
		for to = from; to < count && nearPower(to, near) == one; to++ {
		}
		if one {
			slowest = max(slowest, in.addMany(t, from, to))
			singly += to - from
		} else {
			in.applyMany(t, to)
		}
	}
	took := time.Since(started)
	t.Logf("adding %d rules, %d of them one by one, took %v; the slowest %v", count, singly, took.Round(time.Millisecond), slowest.Round(time.Microsecond))
	full := in.holdings()
	t.Logf("memory of the daemon: %d kB before, %d kB with the rules", before.Memory, full.Memory)
	if got := full.Filled["flows4"]; got != count {
		t.Errorf("%d entries in the flow table, want %d", got, count)
	}
	if got := full.Filled["broadcast"]; got != count/8 {
		t.Errorf("%d devmaps, want %d", got, count/8)
	}
	if got := full.Memberships; got != count {
		t.Errorf("%d memberships, want %d", got, count)
	}
	for _, i := range []int{0, 1, 2, 3, 255, 256, 509, 510, 511, 998, 999} {
		m := manyRule(i)
		var sinks []*sink
		for slot := range m.Out {
			sinks = append(sinks, receive(t, n.sinks[slot], fmt.Sprintf("239.%d.%d.%d:6000%%sink0", 3+slot, i>>8, i&255), traffic.Expected{}))
		}
		s := send(t, n.source, traffic.SendConfig{
			Target: target(t, fmt.Sprintf("%s:5000%%src%d", manyGroup(i), i&1)), Count: 50, TTL: 16, Rate: traffic.Rate{Value: 20_000},
		})
		s.wait()
		for _, sink := range sinks {
			if fault := sink.finish(50); fault != "" {
				t.Errorf("rule %d: %s", i, fault)
			}
		}
		checkCounted(t, in.rule(m.Name), 50)
	}

	started = time.Now()
	in.deleteMany(t, 0, single)
	t.Logf("deleting %d of them one by one took %v", single, time.Since(started).Round(time.Millisecond))
	in.applyMany(t, 0)
	before.Pins["flows4"] = 0 // the current flow table is a different one now
	var after holdings
	eventually(t, "all is back to where it was", func() string {
		after = in.holdings()
		after.Pins["flows4"] = 0
		return cmp.Diff(before.exact(), after.exact())
	})
	t.Logf("memory of the daemon: %d kB after", after.Memory)
	// The collector returns memory when it likes.
	if limit := before.Memory + 128<<10; after.Memory > limit {
		t.Errorf("the daemon has %d kB, before the rules %d kB", after.Memory, before.Memory)
	}

	// And all at once, in one swap of the flow table.
	started = time.Now()
	in.applyMany(t, count)
	t.Logf("applying them at once took %v", time.Since(started).Round(time.Millisecond))
	in.applyMany(t, 0)
	eventually(t, "all is back to where it was", func() string {
		after := in.holdings().exact()
		after.Pins["flows4"] = 0
		return cmp.Diff(before.exact(), after)
	})
}

// manyRule is rule i of many: with one output or three, any-source or source-specific, on one of
// two interfaces.
func manyRule(i int) control.Rule {
	r := control.Rule{Name: fmt.Sprintf("r%d", i), In: fmt.Sprintf("%s:5000%%in%d", manyGroup(i), i&1)}
	if i&2 != 0 {
		r.In = fmt.Sprintf("10.%d.0.2@", 1+2*(i&1)) + r.In
	}
	// Few have three: each waits until the kernel has freed what it replaces.
	outputs := 1
	if i%8 == 7 {
		outputs = 3
	}
	for slot := range outputs {
		r.Out = append(r.Out, fmt.Sprintf("239.%d.%d.%d:6000%%out%d", 3+slot, i>>8, i&255, slot))
	}
	return r
}

func manyGroup(i int) string {
	if i&2 != 0 {
		return fmt.Sprintf("232.1.%d.%d", i>>8, i&255)
	}
	return fmt.Sprintf("239.1.%d.%d", i>>8, i&255)
}

func (in *instance) addMany(t *testing.T, from, to int) (slowest time.Duration) {
	t.Helper()
	for i := from; i < to; i++ {
		started := time.Now()
		status, err := in.client.AddRule(t.Context(), manyRule(i))
		if err != nil {
			t.Fatal(err)
		}
		slowest = max(slowest, time.Since(started))
		if status.State != control.StateActive {
			t.Fatalf("rule %s is %s (%s)", status.Name, status.State, status.Reason)
		}
	}
	return slowest
}

// nearPower says whether a number is at most n from a power of two.
func nearPower(number, n int) bool {
	for power := 1; power <= number+n; power *= 2 {
		if power >= number-n {
			return true
		}
	}
	return false
}

// applyMany makes the first of the many the only rules.
func (in *instance) applyMany(t *testing.T, count int) {
	t.Helper()
	all := make([]rules.Rule, count)
	for i := range all {
		var err error
		if all[i], err = control.ToRule(manyRule(i)); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := in.client.Apply(t.Context(), all, control.ApplyOptions{}); err != nil {
		t.Fatal(err)
	}
}

func (in *instance) deleteMany(t *testing.T, from, to int) {
	t.Helper()
	for i := from; i < to; i++ {
		if err := in.client.DeleteRule(t.Context(), fmt.Sprintf("r%d", i)); err != nil {
			t.Fatal(err)
		}
	}
}

// holdings is what a daemon and its pinned state hold.
type holdings struct {
	// Files counts open files by kind: bpf maps, programs and links, sockets.
	Files map[string]int
	// Memberships is the number of groups on all interfaces.
	Memberships int
	Pins        map[string]uint32
	// Filled counts the entries of maps that hold one per rule or output.
	Filled map[string]int
	// Programs are those attached to interfaces.
	Programs map[string]uint32
	Memory   int // resident, kB
}

// exact is the part that must be equal, not just similar.
func (h holdings) exact() holdings {
	h.Memory = 0
	h.Pins = maps.Clone(h.Pins)
	return h
}

func (in *instance) holdings() holdings {
	in.t.Helper()
	pid := strconv.Itoa(in.running.cmd.Process.Pid)
	h := holdings{
		Files: openFiles(in.t, pid), Pins: pins(in.t, in.pinDir), Programs: attachedPrograms(in.t, in.host),
		Filled: map[string]int{}, Memory: residentMemory(in.t, pid),
	}
	for _, groups := range igmp(in.t, in.host) {
		h.Memberships += len(groups)
	}
	for _, name := range []string{"flows4", "flows6", "broadcast", "rules", "rule_drops", "devices", "device_stats", "device_rows"} {
		h.Filled[name] = filled(in.t, filepath.Join(in.pinDir, name))
	}
	return h
}

var inode = regexp.MustCompile(`\[\d+\]`)

// openFiles counts the open files of a process by kind.
func openFiles(t testing.TB, pid string) map[string]int {
	t.Helper()
	dir := filepath.Join("/proc", pid, "fd")
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	count := map[string]int{}
	for _, e := range entries {
		link, err := os.Readlink(filepath.Join(dir, e.Name()))
		if err != nil {
			continue // closed in the meantime
		}
		count[inode.ReplaceAllString(link, "")]++
	}
	return count
}

func residentMemory(t testing.TB, pid string) int {
	t.Helper()
	status, err := os.ReadFile(filepath.Join("/proc", pid, "status"))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(status)) {
		if rest, ok := strings.CutPrefix(line, "VmRSS:"); ok {
			kB, err := strconv.Atoi(strings.Fields(rest)[0])
			if err != nil {
				t.Fatal(err)
			}
			return kB
		}
	}
	t.Fatal("no VmRSS")
	return 0
}

// filled counts the entries of a map; for an array, the non-zero ones.
func filled(t testing.TB, path string) int {
	t.Helper()
	m, err := ebpf.LoadPinnedMap(path, &ebpf.LoadPinOptions{ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	// Only keys, since an array of maps returns a value only for occupied entries.
	var key, next []byte
	n := 0
	for {
		var from any
		if key != nil {
			from = key
		}
		if err := m.NextKey(from, &next); err != nil {
			break
		}
		key = append(key[:0], next...)
		value, err := m.LookupBytes(key)
		if err != nil {
			t.Fatal(err)
		}
		if m.Type() == ebpf.ArrayOfMaps {
			if value != nil && labtest.MapHasEntries(ebpf.MapID(binary.NativeEndian.Uint32(value))) {
				n++
			}
		} else if !isZero(value) {
			n++
		}
	}
	return n
}

func isZero(b []byte) bool {
	for _, c := range b {
		if c != 0 {
			return false
		}
	}
	return true
}
