// Package genl sends requests to generic netlink families (Documentation/userspace-api/netlink). It
// complements the netlink library, whose header for such messages has two uninitialized bytes that
// some families refuse.
package genl

import (
	"encoding/binary"
	"fmt"
	"syscall"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// HeaderLen is the length of a header in bytes.
const HeaderLen = 4

// Header is struct genlmsghdr (include/uapi/linux/genetlink.h).
type Header struct{ Command, Version uint8 }

// Len implements nl.NetlinkRequestData.
func (h Header) Len() int { return HeaderLen }

// Serialize implements nl.NetlinkRequestData.
func (h Header) Serialize() []byte { return []byte{h.Command, h.Version, 0, 0} }

// Family is a generic netlink family of the running kernel.
type Family struct {
	ID     uint16
	Groups map[string]uint32 // numbers of its multicast groups
}

// Find looks up a family. The error matches ENOENT if the kernel does not have it.
func Find(name string) (Family, error) {
	f := Family{Groups: map[string]uint32{}}
	answers, err := Ask(nl.GENL_ID_CTRL, Header{nl.GENL_CTRL_CMD_GETFAMILY, nl.GENL_CTRL_VERSION},
		nl.NewRtAttr(nl.GENL_CTRL_ATTR_FAMILY_NAME, nl.ZeroTerminated(name)))
	if err != nil {
		return f, fmt.Errorf("find netlink family %s: %w", name, err)
	}
	for _, attrs := range answers {
		for _, a := range attrs {
			switch a.Attr.Type & nl.NLA_TYPE_MASK {
			case nl.GENL_CTRL_ATTR_FAMILY_ID:
				if len(a.Value) >= 2 {
					f.ID = binary.NativeEndian.Uint16(a.Value)
				}
			case nl.GENL_CTRL_ATTR_MCAST_GROUPS:
				if err := f.addGroups(a.Value); err != nil {
					return f, fmt.Errorf("groups of netlink family %s: %w", name, err)
				}
			}
		}
	}
	if f.ID == 0 {
		return f, fmt.Errorf("netlink family %s: the answer has no number", name)
	}
	return f, nil
}

// addGroups parses a list of entries, each with a name and an id.
func (f Family) addGroups(data []byte) error {
	entries, err := nl.ParseRouteAttr(data)
	if err != nil {
		return err
	}
	for _, e := range entries {
		fields, err := nl.ParseRouteAttr(e.Value)
		if err != nil {
			return err
		}
		name, number := "", uint32(0)
		for _, field := range fields {
			switch field.Attr.Type & nl.NLA_TYPE_MASK {
			case nl.GENL_CTRL_ATTR_MCAST_GRP_NAME:
				name = nl.BytesToString(field.Value)
			case nl.GENL_CTRL_ATTR_MCAST_GRP_ID:
				if len(field.Value) >= 4 {
					number = binary.NativeEndian.Uint32(field.Value)
				}
			}
		}
		f.Groups[name] = number
	}
	return nil
}

// Ask sends a request with one attribute to a family, and returns the attributes of each answer.
func Ask(family uint16, h Header, attr *nl.RtAttr) (answers [][]syscall.NetlinkRouteAttr, err error) {
	req := nl.NewNetlinkRequest(int(family), 0)
	req.AddData(h)
	req.AddData(attr)
	messages, err := req.Execute(unix.NETLINK_GENERIC, 0)
	if err != nil {
		return nil, err
	}
	for _, m := range messages {
		if len(m) < HeaderLen {
			continue
		}
		attrs, err := nl.ParseRouteAttr(m[HeaderLen:])
		if err != nil {
			return nil, err
		}
		answers = append(answers, attrs)
	}
	return answers, nil
}
