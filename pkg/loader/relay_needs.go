package loader

import "net/netip"

// NoNeighbour stands in for the reason of the data plane to come.
const NoNeighbour Reason = 200

// SetOwnAddresses stands in for the loop check of the data plane to come.
func (l *Loader) SetOwnAddresses([]netip.Addr) error { return nil }
