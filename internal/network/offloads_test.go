package network

import (
	"errors"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"xdpcast/internal/lab"
	"xdpcast/internal/labtest"
)

// TestDeviceFeatures: what takes tags off is switched off and on again, and what cannot be says
// so.
func TestDeviceFeatures(t *testing.T) {
	h, peer := labtest.Host(t, "network"), labtest.Host(t, "networkp")
	labtest.Connect(t, lab.End{Host: h, Name: "eth0"}, lab.End{Host: peer, Name: "eth0"})
	labtest.Do(t, h, func() error {
		f, err := OpenFeatures("eth0")
		if err != nil {
			return err
		}
		defer f.Close()
		for _, on := range []bool{false, true, true, false} {
			if err := f.Set(TagFeatures(), on); err != nil {
				return err
			}
			again, err := OpenFeatures("eth0")
			if err != nil {
				return err
			}
			for _, name := range TagFeatures() {
				if f.Active(name) != on || again.Active(name) != on {
					t.Errorf("%s is %v, want %v", name, again.Active(name), on)
				}
			}
			if err := again.Close(); err != nil {
				return err
			}
		}
		if f.Active("of-no-kernel") {
			t.Error("a feature is on that there is not")
		}
		lo, err := OpenFeatures("lo")
		if err != nil {
			return err
		}
		defer lo.Close()
		// netns-local is one of those that never change until Linux 6.12, loopback is fixed for this device.
		if err := lo.Set([]string{"netns-local", "loopback"}, false); !errors.Is(err, unix.EOPNOTSUPP) || !strings.Contains(err.Error(), "is fixed") {
			t.Errorf("error is %v", err)
		}
		// What can be changed is, beside what never can.
		for name, bit := range lo.names {
			if lo.blocks[bit/32].neverChanged&(1<<(bit%32)) == 0 {
				continue
			}
			for _, on := range []bool{false, true} {
				if err := lo.Set([]string{name, "rx-gro"}, on); err != nil && !strings.Contains(err.Error(), name+" is fixed") || lo.Active("rx-gro") != on {
					t.Errorf("rx-gro beside %s, which never changes: %v, %v, want %v", name, err, lo.Active("rx-gro"), on)
				}
			}
		}
		for _, name := range []string{"nope0", "a-name-longer-than-fifteen"} {
			if _, err := OpenFeatures(name); !errors.Is(err, unix.ENODEV) || !strings.Contains(err.Error(), name) {
				t.Errorf("of no interface the error is %v", err)
			}
		}
		return nil
	})
}
