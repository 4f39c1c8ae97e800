package loader

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"xdpcast/pkg/flow"
)

// withoutSysAdmin runs fn on a thread that has only the capabilities of the packaged service.
func withoutSysAdmin(t *testing.T, netns int, fn func() error) {
	t.Helper()
	onThread(t, func() error {
		if err := unix.Setns(netns, unix.CLONE_NEWNET); err != nil {
			return err
		}
		header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
		var data [2]unix.CapUserData
		for _, n := range []int{unix.CAP_NET_ADMIN, unix.CAP_NET_RAW, unix.CAP_BPF, unix.CAP_PERFMON, unix.CAP_IPC_LOCK} {
			data[n/32].Effective |= 1 << (n % 32)
			data[n/32].Permitted |= 1 << (n % 32)
		}
		if err := unix.Capset(&header, &data[0]); err != nil {
			return err
		}
		return fn()
	})
}

// A process takes over, changes and upgrades another's pinned state without CAP_SYS_ADMIN, also if
// an earlier release pinned no devmaps, or a process died while it swapped a table.
func TestTakeOverWithoutSysAdmin(t *testing.T) {
	for _, tt := range []struct {
		name string
		harm func(t *testing.T, dir string)
		same bool // devmaps are the previous ones
	}{
		{"whole", func(*testing.T, string) {}, true},
		{"devmaps are not pinned", func(t *testing.T, dir string) {
			if err := os.RemoveAll(filepath.Join(dir, broadcastsDir)); err != nil {
				t.Fatal(err)
			}
		}, false},
		{"programs of links are not pinned", func(t *testing.T, dir string) {
			for _, name := range []string{pinDevmapXmit, pinRedirectErr, pinCPUEnqueue, pinCPUThread} {
				if err := os.Remove(filepath.Join(dir, programsDir, name)); err != nil {
					t.Fatal(err)
				}
			}
		}, true},
		{"a table was swapped and not pinned yet", func(t *testing.T, dir string) {
			path := tablePin(dir, exact4)
			if err := os.Rename(path, nextPin(path)); err != nil {
				t.Fatal(err)
			}
		}, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			n := newLab(t, 2)
			opts := testOptions(t)
			several := func(name, group string) flow.Flow {
				rule := flow.Flow{Name: name, In: input(n.in, group, "", 5000)}
				for i := range 2 {
					rule.Out = append(rule.Out, output(n.out[i], fmt.Sprint("239.5.5.", i), "10.1.0.1", 6000))
				}
				return rule
			}
			a, b := several("a", "239.1.1.1"), several("b", "239.1.1.2")
			l := open(t, opts)
			sync1(t, l, a)
			before := fanoutRows(t, l)
			closeLoader(t, l)
			tt.harm(t, opts.PinDir)
			withoutSysAdmin(t, n.relay.FD(), func() (err error) {
				l, err := Open(opts)
				if err != nil {
					return err
				}
				defer func() { err = errors.Join(err, l.Close()) }()
				if !l.Adopted() || len(l.Warnings()) > 0 {
					t.Errorf("adopted: %v, warnings %q", l.Adopted(), l.Warnings())
				}
				if err := l.Sync([]*flow.Flow{&a, &b}); err != nil {
					return err
				}
				if o := l.Observe(); len(o.Errs)+len(o.Lost)+len(o.Repaired) > 0 {
					t.Errorf("observed %+v", o)
				}
				return l.Upgrade()
			})
			l = open(t, opts)
			rows := fanoutRows(t, l)
			if len(rows) != 2 {
				t.Fatalf("rows of map broadcast: %v", rows)
			}
			for row, id := range rows {
				if was, there := before[row]; there && (was == id) != tt.same {
					t.Errorf("row %d holds devmap %d, before %d", row, id, was)
				}
				if _, err := os.Stat(broadcastPin(opts.PinDir, id)); err != nil {
					t.Error(err)
				}
			}
			kernelFits(t, l)
			sync1(t, l)
			if pins, err := os.ReadDir(filepath.Join(opts.PinDir, broadcastsDir)); err != nil || len(pins) != 0 {
				t.Errorf("pins of devmaps without rules: %v, %v", pins, err)
			}
		})
	}
}
