package labtest

import (
	"testing"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"xdpcast/internal/lab"
)

// SetBridge creates or changes the bridge br0 of a host (IFLA_BR_* of
// include/uapi/linux/if_link.h); flags are those of the request.
func SetBridge(t testing.TB, h *lab.Host, flags int, options map[int][]byte) {
	t.Helper()
	Do(t, h, func() error {
		req := nl.NewNetlinkRequest(unix.RTM_NEWLINK, flags|unix.NLM_F_ACK)
		req.AddData(nl.NewIfInfomsg(unix.AF_UNSPEC))
		req.AddData(nl.NewRtAttr(unix.IFLA_IFNAME, nl.ZeroTerminated("br0")))
		info := nl.NewRtAttr(unix.IFLA_LINKINFO, nil)
		info.AddRtAttr(nl.IFLA_INFO_KIND, nl.NonZeroTerminated("bridge"))
		data := info.AddRtAttr(nl.IFLA_INFO_DATA, nil)
		for option, value := range options {
			data.AddRtAttr(option, value)
		}
		req.AddData(info)
		_, err := req.Execute(unix.NETLINK_ROUTE, 0)
		return err
	})
}

// Enslave makes an interface a port of br0.
func Enslave(t testing.TB, h *lab.Host, port string) {
	t.Helper()
	if err := h.Netlink().LinkSetMaster(Link(t, h, port), &netlink.Bridge{LinkAttrs: *Link(t, h, "br0").Attrs()}); err != nil {
		t.Fatal(err)
	}
}
