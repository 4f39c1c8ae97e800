package membership

import (
	"fmt"
	"net/netip"
)

// Advice returns a one-line hint for a user who asks for this group, or "" if there is none. Such
// groups can be joined, but seldom behave as expected. The zero source means any.
func Advice(group, source netip.Addr) string {
	switch {
	case within(group, "224.0.0.0/24"):
		return fmt.Sprintf("%v is in the local network control block (RFC 5771 section 4): switches flood it, routers never forward it, and what protocols say there is meant for one link", group)
	case within(group, "ff00::/8") && group.As16()[1]&0xf <= 1:
		return fmt.Sprintf("%v has interface-local or reserved scope (RFC 4291 section 2.7): nothing sent to it may leave a host, so nothing will arrive", group)
	case within(group, "ff00::/8") && group.As16()[1]&0xf == 2:
		return fmt.Sprintf("%v has link-local scope (RFC 4291 section 2.7): routers never forward it, and what protocols say there is meant for one link", group)
	case !source.IsValid() && sourceSpecific(group):
		return fmt.Sprintf("%v is a source-specific group (RFC 4607) without a source: routers ignore such joins (RFC 4604 section 3.1); name the source", group)
	}
	return ""
}

// sourceSpecific reports whether RFC 4607 section 1 reserves the group for source-specific
// multicast: 232.0.0.0/8 and ff3x::/32.
func sourceSpecific(group netip.Addr) bool {
	if group.Is4() {
		return within(group, "232.0.0.0/8")
	}
	b := group.As16()
	return b[0] == 0xff && b[1]>>4 == 3 && b[2] == 0 && b[3] == 0
}

func within(addr netip.Addr, prefix string) bool {
	return netip.MustParsePrefix(prefix).Contains(addr)
}
