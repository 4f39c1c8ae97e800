package membership

import (
	"encoding/binary"
	"encoding/hex"
	"errors"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"xdpcast/internal/labtest"
)

// groupReport is an IGMP or MLD report or leave as it was on the wire, every
// field that RFC 2236, 3376 or 3810 gives a meaning. Reports about groups that
// the host is in by itself are left out.
type groupReport struct {
	Kind        string // protocol, version and message
	EtherDst    string
	Src, Dst    netip.Addr
	TTL         int // hop limit
	RouterAlert bool
	ChecksumOK  bool
	Records     []groupRecord
}

type groupRecord struct {
	Type    string // "" in IGMPv2
	Group   netip.Addr
	Sources []netip.Addr
}

// Record types: RFC 3376 section 4.2.12, RFC 3810 section 5.2.12.
var recordTypes = map[byte]string{
	1: "MODE_IS_INCLUDE", 2: "MODE_IS_EXCLUDE",
	3: "CHANGE_TO_INCLUDE_MODE", 4: "CHANGE_TO_EXCLUDE_MODE",
	5: "ALLOW_NEW_SOURCES", 6: "BLOCK_OLD_SOURCES",
}

// capture receives frames on an interface of the peer.
type capture struct {
	testing.TB
	fd, index int
}

func (b bench) capture(t testing.TB, ifname string) *capture {
	t.Helper()
	c := &capture{TB: t}
	link, err := b.peer.Link(ifname)
	if err != nil {
		t.Fatal(err)
	}
	c.index = link.Attrs().Index
	labtest.Do(t, b.peer, func() error {
		c.fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
		return err
	})
	t.Cleanup(func() { unix.Close(c.fd) })
	var all [2]byte
	binary.BigEndian.PutUint16(all[:], unix.ETH_P_ALL)
	if err := errors.Join(
		unix.SetsockoptTimeval(c.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: int64(labtest.Timeout.Seconds())}),
		unix.Bind(c.fd, &unix.SockaddrLinklayer{Protocol: binary.NativeEndian.Uint16(all[:]), Ifindex: c.index}),
	); err != nil {
		t.Fatal(err)
	}
	return c
}

// next returns the next report about one of our groups.
func (c *capture) next() groupReport {
	c.Helper()
	buf := make([]byte, 2048)
	for {
		n, from, err := unix.Recvfrom(c.fd, buf, 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			c.Fatalf("no report came: %v", err)
		}
		if from.(*unix.SockaddrLinklayer).Pkttype == unix.PACKET_OUTGOING {
			continue
		}
		if r, ok := decodeReport(c, buf[:n]); ok {
			return r
		}
	}
}

// expect compares the next reports with what is wanted.
func (c *capture) expect(what string, want ...groupReport) {
	c.Helper()
	for _, w := range want {
		if diff := cmp.Diff(w, c.next(), compareAddrs); diff != "" {
			c.Errorf("%s, - wanted + found:\n%s", what, diff)
		}
	}
}

// send sends a frame out of the peer's interface.
func (c *capture) send(frame []byte) {
	c.Helper()
	if err := unix.Sendto(c.fd, frame, 0, &unix.SockaddrLinklayer{Ifindex: c.index}); err != nil {
		c.Fatal(err)
	}
}

// decodeReport decodes an Ethernet frame; false means that it is not a report
// about one of our groups.
func decodeReport(t testing.TB, frame []byte) (groupReport, bool) {
	t.Helper()
	if len(frame) < 14+20 {
		return groupReport{}, false
	}
	r := groupReport{EtherDst: net.HardwareAddr(frame[:6]).String()}
	packet := frame[14:]
	switch binary.BigEndian.Uint16(frame[12:]) {
	case unix.ETH_P_IP:
		if packet[9] != unix.IPPROTO_IGMP {
			return r, false
		}
		r.decodeIGMP(t, packet)
	case unix.ETH_P_IPV6:
		// MLD comes behind a hop-by-hop header of eight bytes (RFC 3810 section 5).
		if len(packet) < 40+8+8 || packet[6] != unix.IPPROTO_HOPOPTS || packet[40] != unix.IPPROTO_ICMPV6 {
			return r, false
		}
		r.decodeMLD(t, packet)
	default:
		return r, false
	}
	r.Records = slices.DeleteFunc(r.Records, func(rec groupRecord) bool {
		return rec.Group.IsLinkLocalMulticast()
	})
	return r, len(r.Records) > 0
}

// decodeIGMP decodes an IPv4 packet with IGMP: RFC 2236 section 2, RFC 3376
// section 4.
func (r *groupReport) decodeIGMP(t testing.TB, packet []byte) {
	headerLength := int(packet[0]&0xf) * 4
	header, igmp := packet[:headerLength], packet[headerLength:binary.BigEndian.Uint16(packet[2:])]
	r.Src, r.Dst = addrFrom(header[12:16]), addrFrom(header[16:20])
	r.TTL = int(header[8])
	r.RouterAlert = string(header[20:]) == "\x94\x04\x00\x00" // RFC 2113
	r.ChecksumOK = checksum(header) == 0 && checksum(igmp) == 0
	switch igmp[0] {
	case 0x22:
		r.Kind = "IGMPv3 report"
		r.Records = decodeRecords(t, igmp, 4)
	case 0x16, 0x17:
		r.Kind = map[byte]string{0x16: "IGMPv2 report", 0x17: "IGMPv2 leave"}[igmp[0]]
		r.Records = []groupRecord{{Group: addrFrom(igmp[4:8])}}
	default:
		r.Kind = "IGMP type " + hex.EncodeToString(igmp[:1])
	}
}

// decodeMLD decodes an IPv6 packet with MLD: RFC 2710 section 3, RFC 3810
// section 5.
func (r *groupReport) decodeMLD(t testing.TB, packet []byte) {
	mld := packet[48 : 40+binary.BigEndian.Uint16(packet[4:])]
	r.Src, r.Dst = addrFrom(packet[8:24]), addrFrom(packet[24:40])
	r.TTL = int(packet[7])
	r.RouterAlert = string(packet[42:46]) == "\x05\x02\x00\x00" // RFC 2711
	pseudo := slices.Concat(packet[8:40], binary.BigEndian.AppendUint32(nil, uint32(len(mld))), []byte{0, 0, 0, unix.IPPROTO_ICMPV6})
	r.ChecksumOK = checksum(slices.Concat(pseudo, mld)) == 0
	switch mld[0] {
	case 143:
		r.Kind = "MLDv2 report"
		r.Records = decodeRecords(t, mld, 16)
	case 131, 132:
		r.Kind = map[byte]string{131: "MLDv1 report", 132: "MLDv1 done"}[mld[0]]
		r.Records = []groupRecord{{Group: addrFrom(mld[8:24])}}
	default:
		r.Kind = "ICMPv6 type " + hex.EncodeToString(mld[:1])
	}
}

// decodeRecords decodes the group records of an IGMPv3 or MLDv2 report, whose
// addresses have the given size.
func decodeRecords(t testing.TB, report []byte, size int) []groupRecord {
	t.Helper()
	count, rest := int(binary.BigEndian.Uint16(report[6:])), report[8:]
	var records []groupRecord
	for range count {
		rec := groupRecord{Type: recordTypes[rest[0]], Group: addrFrom(rest[4 : 4+size])}
		if rest[1] != 0 {
			t.Errorf("%v: auxiliary data", rec.Group)
		}
		sources := int(binary.BigEndian.Uint16(rest[2:]))
		rest = rest[4+size:]
		for range sources {
			rec.Sources = append(rec.Sources, addrFrom(rest[:size]))
			rest = rest[size:]
		}
		slices.SortFunc(rec.Sources, netip.Addr.Compare)
		records = append(records, rec)
	}
	if len(rest) != 0 {
		t.Errorf("%d bytes behind the last record", len(rest))
	}
	return records
}

func addrFrom(b []byte) netip.Addr {
	addr, _ := netip.AddrFromSlice(b)
	return addr
}

// checksum is the Internet checksum, RFC 1071.
func checksum(b []byte) uint16 {
	var sum uint32
	for i, octet := range b {
		sum += uint32(octet) << (8 * (1 - i%2))
	}
	for sum>>16 != 0 {
		sum = sum&0xffff + sum>>16
	}
	return ^uint16(sum)
}

// igmp3 is the IGMPv3 report that the host should send.
func igmp3(records ...groupRecord) groupReport {
	return groupReport{
		Kind: "IGMPv3 report", EtherDst: "01:00:5e:00:00:16",
		Src: netip.MustParseAddr("10.0.0.1"), Dst: netip.MustParseAddr("224.0.0.22"),
		TTL: 1, RouterAlert: true, ChecksumOK: true, Records: records,
	}
}

func mld2(src netip.Addr, records ...groupRecord) groupReport {
	return groupReport{
		Kind: "MLDv2 report", EtherDst: "33:33:00:00:00:16",
		Src: src, Dst: netip.MustParseAddr("ff02::16"),
		TTL: 1, RouterAlert: true, ChecksumOK: true, Records: records,
	}
}

func rec(kind, group string, sources ...string) groupRecord {
	r := groupRecord{Type: kind, Group: netip.MustParseAddr(group)}
	for _, s := range sources {
		r.Sources = append(r.Sources, netip.MustParseAddr(s))
	}
	return r
}

// wireStep is an operation and the record that it puts on the wire.
type wireStep struct {
	what   string
	do     func(testing.TB, *Manager, ...Membership)
	ms     string
	report groupRecord
}

func wireSteps(group, one, two string) []wireStep {
	return []wireStep{
		{"first source", mustJoin, one + "@" + group, rec("ALLOW_NEW_SOURCES", group, one)},
		{"second source", mustJoin, two + "@" + group, rec("ALLOW_NEW_SOURCES", group, two)},
		{"any source too", mustJoin, group, rec("CHANGE_TO_EXCLUDE_MODE", group)},
		{"no longer any source", mustLeave, group, rec("CHANGE_TO_INCLUDE_MODE", group, one, two)},
		{"first source left", mustLeave, one + "@" + group, rec("BLOCK_OLD_SOURCES", group, one)},
		{"second source left", mustLeave, two + "@" + group, rec("BLOCK_OLD_SOURCES", group, two)},
		{"any source", mustJoin, group, rec("CHANGE_TO_EXCLUDE_MODE", group)},
		{"any source left", mustLeave, group, rec("CHANGE_TO_INCLUDE_MODE", group)},
	}
}

// newTerseBench is a bench whose host sends each IGMP report once: a robustness
// variable of 1, RFC 3376 section 8.1. Interfaces take it over when they are
// made.
func newTerseBench(t testing.TB) bench {
	t.Helper()
	b := bench{labtest.Host(t, "mbr"), labtest.Host(t, "peer")}
	labtest.Sysctl(t, b.host, "net/ipv4/igmp_qrv", "1")
	b.connect(t, "eth0")
	return b
}

func TestIGMPv3OnTheWire(t *testing.T) {
	b := newTerseBench(t)
	c := b.capture(t, "eth0")
	m := b.manager(t)
	for _, step := range wireSteps("232.1.1.1", "10.9.0.5", "10.9.0.6") {
		step.do(t, m, b.membership(t, "eth0", step.ms))
		c.expect(step.what, igmp3(step.report))
	}

	// Another interface with the name of one that is gone.
	ms := b.membership(t, "eth0", "10.9.0.5@232.1.1.1")
	mustJoin(t, m, ms)
	c.expect("joined", igmp3(rec("ALLOW_NEW_SOURCES", "232.1.1.1", "10.9.0.5")))
	labtest.RemoveLink(t, b.host, "eth0")
	m.DropInterface(ms.Index, 0)
	b.connect(t, "eth0")
	c = b.capture(t, "eth0")
	mustJoin(t, m, b.membership(t, "eth0", "10.9.0.5@232.1.1.1"))
	c.expect("joined again", igmp3(rec("ALLOW_NEW_SOURCES", "232.1.1.1", "10.9.0.5")))

	// Closing leaves.
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	c.expect("closed", igmp3(rec("BLOCK_OLD_SOURCES", "232.1.1.1", "10.9.0.5")))
}

// TestMLDv2OnTheWire: the host's robustness variable is at least 2 (RFC 3810
// section 9.1), and not the namespace's to set: every report comes as often.
func TestMLDv2OnTheWire(t *testing.T) {
	b := newBench(t)
	setting, err := os.ReadFile("/proc/sys/net/ipv6/mld_qrv")
	if err != nil {
		t.Fatal(err)
	}
	robustness := number(t, strings.TrimSpace(string(setting)), 10)
	c := b.capture(t, "eth0")
	m := b.manager(t)
	self := b.linkLocal(t, "eth0")
	for _, step := range wireSteps("ff3e::1", "fd00::5", "fd00::6") {
		step.do(t, m, b.membership(t, "eth0", step.ms))
		c.expect(step.what, slices.Repeat([]groupReport{mld2(self, step.report)}, robustness)...)
	}
}

// TestRefreshOnTheWire: what a refresh restores is reported.
func TestRefreshOnTheWire(t *testing.T) {
	b := newTerseBench(t)
	c := b.capture(t, "eth0")
	m := b.manager(t)
	one, two := b.membership(t, "eth0", "10.9.0.5@232.1.1.1"), b.membership(t, "eth0", "10.9.0.6@232.1.1.1")
	mustJoin(t, m, one)
	c.expect("joined", igmp3(rec("ALLOW_NEW_SOURCES", "232.1.1.1", "10.9.0.5")))
	b.set(t, "eth0", false)
	mustJoin(t, m, two)
	b.set(t, "eth0", true)
	if failed := m.Refresh(one.Index, 0); failed != nil {
		t.Fatal(failed)
	}
	allowed := map[netip.Addr]bool{}
	for !allowed[one.Source] || !allowed[two.Source] {
		for _, r := range c.next().Records {
			if r.Group == one.Group && r.Type == "ALLOW_NEW_SOURCES" {
				for _, s := range r.Sources {
					allowed[s] = true
				}
			}
		}
	}
}

// TestIGMPv2FallbackOnTheWire: a router that speaks IGMPv2 makes the host do so
// (RFC 3376 section 7.2.1). Then sources cannot be told, nor a second one be
// reported.
func TestIGMPv2FallbackOnTheWire(t *testing.T) {
	b := newTerseBench(t)
	c := b.capture(t, "eth0")
	c.send(igmp2Query())
	labtest.Eventually(t, "the host has heard an IGMPv2 query", func() bool {
		var version string
		labtest.Do(t, b.host, func() error {
			for _, f := range procLines(t, "igmp") {
				if len(f) > 4 && f[1] == "eth0" {
					version = f[4]
				}
			}
			return nil
		})
		return version == "V2"
	})
	m := b.manager(t)
	report := groupReport{
		Kind: "IGMPv2 report", EtherDst: "01:00:5e:01:01:01",
		Src: netip.MustParseAddr("10.0.0.1"), Dst: netip.MustParseAddr("239.1.1.1"),
		TTL: 1, RouterAlert: true, ChecksumOK: true, Records: []groupRecord{rec("", "239.1.1.1")},
	}
	leave := report
	leave.Kind, leave.EtherDst, leave.Dst = "IGMPv2 leave", "01:00:5e:00:00:02", netip.MustParseAddr("224.0.0.2")

	one, two := b.membership(t, "eth0", "10.9.0.5@239.1.1.1"), b.membership(t, "eth0", "10.9.0.6@239.1.1.1")
	mustJoin(t, m, one)
	c.expect("first source", report)
	mustJoin(t, m, two)
	mustLeave(t, m, one)
	mustLeave(t, m, two)
	c.expect("last source left", leave)
	mustJoin(t, m, b.membership(t, "eth0", "239.1.1.1"))
	c.expect("any source", report)
}

// igmp2Query is a general query, RFC 2236 section 2, from the peer.
func igmp2Query() []byte {
	igmp := []byte{0x11, 1, 0, 0, 0, 0, 0, 0} // answers within 0.1 s
	binary.BigEndian.PutUint16(igmp[2:], checksum(igmp))
	ip := []byte{0x46, 0xc0, 0, 24 + 8, 0, 0, 0, 0, 1, unix.IPPROTO_IGMP, 0, 0,
		10, 0, 0, 2, 224, 0, 0, 1, 0x94, 4, 0, 0}
	binary.BigEndian.PutUint16(ip[10:], checksum(ip))
	return slices.Concat([]byte{1, 0, 0x5e, 0, 0, 1, 2, 0, 0, 0, 0, 2, 8, 0}, ip, igmp)
}

// TestMLDv1FallbackOnTheWire has the version forced: RFC 3810 section 8.2.1.
func TestMLDv1FallbackOnTheWire(t *testing.T) {
	b := bench{labtest.Host(t, "mbr"), labtest.Host(t, "peer")}
	// From the first report of the interface on: with one of MLDv2 still to be repeated,
	// the kernel would put our group into it.
	labtest.Sysctl(t, b.host, "net/ipv6/conf/default/force_mld_version", "1")
	labtest.Sysctl(t, b.host, "net/ipv6/conf/default/mldv1_unsolicited_report_interval", "1")
	b.connect(t, "eth0")
	c := b.capture(t, "eth0")
	m := b.manager(t)
	report := mld2(b.linkLocal(t, "eth0"), rec("", "ff1e::1"))
	report.Kind, report.EtherDst, report.Dst = "MLDv1 report", "33:33:00:00:00:01", netip.MustParseAddr("ff1e::1")
	done := report
	done.Kind, done.EtherDst, done.Dst = "MLDv1 done", "33:33:00:00:00:02", netip.MustParseAddr("ff02::2")

	one := b.membership(t, "eth0", "fd00::5@ff1e::1")
	mustJoin(t, m, one)
	c.expect("one source", report, report) // at once, and once more: RFC 2710 section 4
	mustLeave(t, m, one)
	c.expect("left", done)
}
