package loader

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"

	"github.com/cilium/ebpf"

	"xdpcast/bpf"
)

// SetOwnAddresses sets the unicast addresses of this host: a packet from one of them was sent by
// this host and is dropped with reason Loop, unless its rule allows it. The addresses stay when the
// loader is closed.
func (l *Loader) SetOwnAddresses(addrs []netip.Addr) error {
	want := map[bpf.RelayOwnAddress]bool{}
	for _, a := range addrs {
		want[bpf.RelayOwnAddress{Address: a.As16()}] = true // an IPv4 address as ::ffff:a.b.c.d
	}
	return setOwn(l, l.maps.OwnAddresses, bpf.RelayMapOwnAddresses, want, func() { l.own = ownBits(want) })
}

// setOwn makes a map of the host's own addresses equal to want; setFilter sets the filter in map
// config that spares most packets the map lookup.
func setOwn[K comparable](l *Loader, m *ebpf.Map, name string, want map[K]bool, setFilter func()) error {
	have := map[K]bool{}
	var key K
	var value uint8
	iter := m.Iterate()
	for iter.Next(&key, &value) {
		have[key] = true
	}
	if err := iter.Err(); err != nil {
		return fmt.Errorf("read map %s: %w", name, err)
	}
	for key := range want {
		if have[key] {
			continue
		}
		if err := m.Put(&key, uint8(1)); err != nil {
			return fmt.Errorf("write map %s: %w", name, err)
		}
	}
	// Update the filter after adding addresses and before deleting them.
	setFilter()
	if err := l.writeConfig(); err != nil {
		return err
	}
	for key := range have {
		if want[key] {
			continue
		}
		if err := m.Delete(&key); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return fmt.Errorf("write map %s: %w", name, err)
		}
	}
	return nil
}

// ownBits is the field own of map config: the same hash as in bpf/include/own.h.
func ownBits(addrs map[bpf.RelayOwnAddress]bool) (bits [4]uint64) {
	for key := range addrs {
		a := netip.AddrFrom16(key.Address).Unmap()
		var sum uint32
		for b := a.AsSlice(); len(b) > 0; b = b[4:] {
			sum ^= binary.NativeEndian.Uint32(b)
		}
		bit := sum * 0x9e3779b1 >> 24
		bits[bit>>6] |= 1 << (bit & 63)
	}
	return bits
}
