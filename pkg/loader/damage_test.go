package loader

import (
	"bytes"
	"encoding/binary"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/cilium/ebpf"

	"xdpcast/bpf"
	"xdpcast/internal/labtest"
)

// pinnedMaps are the pins of maps below a pin directory.
func pinnedMaps(t *testing.T, dir string) (pins []string) {
	t.Helper()
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		if m, err := ebpf.LoadPinnedMap(path, nil); err == nil {
			pins = append(pins, path)
			return m.Close()
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return pins
}

// overwrite deletes all entries of a map, or else makes each the same byte, as far as the kernel
// permits. It returns whether that has changed any.
func overwrite(t *testing.T, pin string, remove bool, value byte) (changed bool) {
	t.Helper()
	m, err := ebpf.LoadPinnedMap(pin, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	size := int(m.ValueSize())
	if perCPU := m.Type() == ebpf.PerCPUArray || m.Type() == ebpf.PerCPUHash || m.Type() == ebpf.LRUCPUHash; perCPU {
		size = (size + 7) / 8 * 8 * ebpf.MustPossibleCPU()
	}
	fill := make([]byte, size)
	for i := range fill {
		fill[i] = value
	}
	var keys [][]byte
	for key, err := m.NextKeyBytes(nil); key != nil; key, err = m.NextKeyBytes(key) {
		if err != nil {
			t.Fatal(err)
		}
		if keys = append(keys, key); len(keys) >= 3000 {
			break
		}
	}
	for _, key := range keys {
		var err error
		if remove {
			err = m.Delete(key) // an array keeps its entries
		} else {
			err = m.Put(key, fill) // a map of maps takes no number
		}
		changed = changed || err == nil
	}
	return changed
}

// Whatever has happened to one of the pinned maps, the next process takes the state over, or replaces
// it, and relays all rules.
func TestDamagedMaps(t *testing.T) {
	t.Parallel()
	n := newLab(t, 2)
	opts := testOptions(t)
	rules := someRules(n)
	l := open(t, opts)
	opts = l.opts
	opts.Replace = true
	attachAll(t, l, append(n.out, n.in)...)
	sync1(t, l, rules...)
	source, sinks := labtest.NewTap(t, n.source, "eth0"), []*labtest.Tap{labtest.NewTap(t, n.sinks[0], "eth0"), labtest.NewTap(t, n.sinks[1], "eth0")}
	sent := uint64(0)
	relays := func(group string, copies ...int) bool {
		sent++
		marker := binary.BigEndian.AppendUint64([]byte(group+" "), sent)
		source.Send(sourceFrame(n, group, 5000, marker).Build())
		for i, want := range copies {
			for range want {
				if sinks[i].Receive(2*time.Second, func(f []byte) bool { return bytes.Contains(f, marker) }) == nil {
					return false
				}
			}
		}
		return true
	}
	var names []string
	for _, pin := range pinnedMaps(t, opts.PinDir) {
		name, err := filepath.Rel(opts.PinDir, pin)
		if err != nil {
			t.Fatal(err)
		}
		if dir := filepath.Dir(name); dir != "." {
			name = dir // the devmaps of rules have other names each time
		}
		if name != bpf.RelayMapConfig && !slices.Contains(names, name) { // config says whose the rest is
			names = append(names, name)
		}
	}
	all := labtest.Soak(0, 1) != 0
	for _, name := range names {
		for _, c := range []struct {
			how    string
			damage func(pin string) (done bool)
		}{
			{"emptied", func(pin string) bool { return overwrite(t, pin, true, 0) }},
			{"zeroed", func(pin string) bool { return overwrite(t, pin, false, 0) }},
			{"overwritten", func(pin string) bool { return overwrite(t, pin, false, 0xff) }},
			{"removed", func(pin string) bool {
				if err := os.Remove(pin); err != nil {
					t.Fatal(err)
				}
				return true
			}},
		} {
			if (c.how == "overwritten" || c.how == "removed") && !all {
				continue
			}
			done := false
			for _, pin := range pinnedMaps(t, opts.PinDir) {
				if path := filepath.Join(opts.PinDir, name); pin == path || filepath.Dir(pin) == path {
					done = c.damage(pin) || done
				}
			}
			if !done {
				continue
			}
			closeLoader(t, l)
			failed := false
			var err error
			if l, err = Open(opts); err != nil {
				t.Errorf("%s %s: Open: %v", name, c.how, err)
				failed = true
			} else {
				for _, i := range append(n.out, n.in) {
					if l.links[i.Index] == nil {
						attachAll(t, l, i)
					}
				}
				if err := l.Sync(pointers(rules)); err != nil {
					t.Errorf("%s %s: Sync: %v", name, c.how, err)
					failed = true
				}
			}
			if !failed && (!relays("239.1.1.1", 1) || !relays("239.1.1.2", 1, 1) || !relays("239.1.1.3", 0, 2)) {
				t.Errorf("%s %s: rules do not relay", name, c.how)
				failed = true
			}
			if failed { // begin anew
				if l != nil {
					closeLoader(t, l)
				}
				if err := Unload(opts); err != nil {
					t.Fatal(err)
				}
				l = open(t, opts)
				attachAll(t, l, append(n.out, n.in)...)
				sync1(t, l, rules...)
			}
		}
	}
}
