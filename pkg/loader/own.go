package loader

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"

	"github.com/cilium/ebpf"

	"xdpcast/bpf"
)

// SetOwnAddresses says which unicast addresses are this host's: a packet that comes
// from one of them was sent by us and is dropped with reason Loop, unless its rule
// says otherwise. The addresses stay when the loader is closed.
func (l *Loader) SetOwnAddresses(addrs []netip.Addr) error {
	want := map[bpf.RelayOwnAddress]bool{}
	for _, a := range addrs {
		want[bpf.RelayOwnAddress{Address: a.As16()}] = true // an IPv4 address as ::ffff:a.b.c.d
	}
	have := map[bpf.RelayOwnAddress]bool{}
	var key bpf.RelayOwnAddress
	var value uint8
	iter := l.maps.OwnAddresses.Iterate()
	for iter.Next(&key, &value) {
		have[key] = true
	}
	if err := iter.Err(); err != nil {
		return fmt.Errorf("read map own_addresses: %w", err)
	}
	for key := range want {
		if have[key] {
			continue
		}
		if err := l.maps.OwnAddresses.Put(&key, uint8(1)); err != nil {
			return fmt.Errorf("write map own_addresses: %w", err)
		}
	}
	// The bits before what they stand for goes, behind what they stand for comes.
	l.own = ownBits(want)
	if err := l.writeConfig(); err != nil {
		return err
	}
	for key := range have {
		if want[key] {
			continue
		}
		if err := l.maps.OwnAddresses.Delete(&key); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return fmt.Errorf("write map own_addresses: %w", err)
		}
	}
	return nil
}

// ownBits is the field own of map config: bpf/include/own.h has the same hash.
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
