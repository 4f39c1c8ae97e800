package discover

import (
	"bytes"
	"cmp"
	"compress/zlib"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"xdpcast/internal/labtest"
	"xdpcast/pkg/packet"
	"xdpcast/pkg/rules"
)

func TestMain(m *testing.M) { labtest.Main(m) }

// payloads reads a file of testdata: a hexadecimal payload per line. Those of ffmpeg are as ffmpeg
// 5.1 sent them (-f sap, -f mpegts, -f rtp_mpegts).
func payloads(t testing.TB, name string) (all [][]byte) {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("testdata", name))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.FieldsSeq(string(text)) {
		b, err := hex.DecodeString(line)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, b)
	}
	return all
}

func udp(group string, port uint16, payload []byte, vlans ...uint16) []byte {
	dst := netip.MustParseAddr(group)
	src := netip.MustParseAddr("10.0.0.5")
	if dst.Is6() {
		src = netip.MustParseAddr("2001:db8::5")
	}
	return packet.Frame{DstMAC: packet.MulticastMAC(dst), SrcMAC: [6]byte{2, 0, 0, 0, 0, 1}, VLANs: vlans, Src: src, Dst: dst, SrcPort: 4000, DstPort: port, TTL: 17, Payload: payload}.Build()
}

// rtp is an RTP packet of L24 audio (RFC 3550, RFC 3190).
func rtp(sequence uint16, ssrc uint32, body string) []byte {
	b := []byte{0x80, 97}
	b = binary.BigEndian.AppendUint16(b, sequence)
	b = binary.BigEndian.AppendUint32(b, uint32(sequence)*48)
	b = binary.BigEndian.AppendUint32(b, ssrc)
	return append(b, body...)
}

// mold is a downstream packet of MoldUDP64.
func mold(session string, sequence uint64, messages ...string) []byte {
	b := []byte(fmt.Sprintf("%-10s", session))
	b = binary.BigEndian.AppendUint64(b, sequence)
	b = binary.BigEndian.AppendUint16(b, uint16(len(messages)))
	for _, m := range messages {
		b = append(binary.BigEndian.AppendUint16(b, uint16(len(m))), m...)
	}
	return b
}

// ptpAnnounce is an IEEE 1588-2019 message in domain 127, as used by SMPTE ST 2059-2.
func ptpAnnounce() []byte {
	b := make([]byte, 64)
	b[0], b[1], b[3], b[4] = 0x0b, 0x02, 64, 127
	return b
}

// ethernet prepends a header to an IP packet.
func ethernet(kind uint16, ip []byte) []byte {
	return append(binary.BigEndian.AppendUint16(make([]byte, 12), kind), ip...)
}

// igmp is an IGMP message in IPv4 with the router alert (RFC 2113).
func igmp(dst string, body []byte) []byte {
	ip := []byte{0x46, 0xc0, 0, byte(24 + len(body)), 0, 0, 0x40, 0, 1, 2, 0, 0, 10, 0, 0, 254}
	ip = append(append(ip, netip.MustParseAddr(dst).AsSlice()...), 0x94, 4, 0, 0)
	return ethernet(0x0800, append(ip, body...))
}

// mldFrame is an MLD message after hop-by-hop options.
func mldFrame(dst string, body []byte) []byte {
	ip := make([]byte, 8, 100)
	ip[0], ip[5], ip[6], ip[7] = 0x60, byte(8+len(body)), 0, 1
	ip = append(append(ip, netip.MustParseAddr("fe80::1").AsSlice()...), netip.MustParseAddr(dst).AsSlice()...)
	ip = append(ip, 58, 0, 5, 2, 0, 0, 1, 0)
	return ethernet(0x86dd, append(ip, body...))
}

// see feeds frames to a table, and returns its only stream.
func see(t *testing.T, frames ...[]byte) Stream {
	t.Helper()
	table := newTable("eth0", 10, nil, newTaken(nil))
	for _, f := range frames {
		table.see(f, len(f))
	}
	list := table.list(time.Second)
	if len(list) != 1 {
		t.Fatalf("%d streams: %+v", len(list), list)
	}
	return list[0]
}

// TestKinds: streams are identified by their packets.
func TestKinds(t *testing.T) {
	frames := func(group string, port uint16, all ...[]byte) (f [][]byte) {
		for _, p := range all {
			f = append(f, udp(group, port, p))
		}
		return f
	}
	for _, c := range []struct {
		name   string
		frames [][]byte
		want   string
	}{
		{"rtp", frames("239.1.1.1", 5004, rtp(65534, 0xdecade, "x"), rtp(65535, 0xdecade, "x"), rtp(0, 0xdecade, "x")), "rtp payload type 97, ssrc 00decade"},
		{"rtp with holes", frames("239.1.1.1", 5004, rtp(1, 7, "x"), rtp(4, 7, "x"), rtp(9, 7, "x")), "rtp payload type 97, ssrc 00000007"},
		{"rtp of ffmpeg", frames("239.1.1.1", 5004, payloads(t, "rtp-ffmpeg.hex")...), "rtp payload type 96, ssrc "},
		{"too little for rtp", frames("239.1.1.1", 5004, rtp(1, 7, "x"), rtp(2, 7, "x")), "unknown"},
		{"no rtp", frames("239.1.1.1", 5004, rtp(1, 7, "x"), rtp(1, 8, "x"), rtp(1, 9, "x"), rtp(1, 10, "x")), "unknown"},
		{"rtcp", frames("239.1.1.1", 5005, append([]byte{0x80, 200, 0, 6}, append(make([]byte, 24), 0x81, 202, 0, 1, 0, 0, 0, 7)...)), "rtcp"},
		{"rtcp cut short", frames("239.1.1.1", 5005, append([]byte{0x80, 200, 0, 6}, make([]byte, 20)...)), "unknown"},
		{"mpeg-ts of ffmpeg", frames("239.1.1.1", 1234, payloads(t, "mpegts-ffmpeg.hex")...), "mpeg-ts program 1"},
		{"mpeg-ts in rtp of ffmpeg", frames("239.1.1.1", 1234, payloads(t, "rtp-mpegts-ffmpeg.hex")...), "mpeg-ts in rtp payload type 33, ssrc "},
		{"sap of ffmpeg", frames("224.2.127.254", 9875, payloads(t, "sap-ffmpeg.hex")...), `sap "Tour de Test"`},
		{"moldudp64", frames("233.54.12.111", 26400, mold("000007214A", 17, "first", "", "third")), `moldudp64 "000007214A"`},
		{"moldudp64 heartbeat", frames("233.54.12.111", 26400, mold("SESSION", 17)), `moldudp64 "SESSION"`},
		{"moldudp64 cut short", frames("233.54.12.111", 26400, mold("SESSION", 17, "message")[:25]), "unknown"},
		{"ptp", frames("224.0.1.129", 320, ptpAnnounce()), "ptp version 2, domain 127, announce"},
		{"ptp event", frames("ff0e::181", 319, append([]byte{0, 2, 0, 44, 3}, make([]byte, 39)...)), "ptp version 2, domain 3, sync"},
		{"nothing known", frames("239.1.1.1", 5000, []byte("hello")), "unknown"},
		{"empty", frames("239.1.1.1", 5000, nil), "unknown"},
		{"igmp query", [][]byte{igmp("224.0.0.1", []byte{0x11, 100, 0, 0, 0, 0, 0, 0, 2, 125, 0, 0})}, "igmp IGMPv3 general query"},
		{"igmpv2 query", [][]byte{igmp("239.1.1.1", []byte{0x11, 100, 0, 0, 239, 1, 1, 1})}, "igmp IGMPv2 query for 239.1.1.1"},
		{"igmpv1 query", [][]byte{igmp("224.0.0.1", []byte{0x11, 0, 0, 0, 0, 0, 0, 0})}, "igmp IGMPv1 general query"},
		{"igmp report", [][]byte{igmp("224.0.0.22", append([]byte{0x22, 0, 0, 0, 0, 0, 0, 1, 4, 0, 0, 0}, 239, 1, 1, 1))}, "igmp IGMPv3 report"},
		{"mld query", [][]byte{mldFrame("ff02::1", append([]byte{130, 0, 0, 0, 0, 0, 0, 0}, make([]byte, 20)...))}, "mld MLDv2 general query"},
		{"mldv1 query", [][]byte{mldFrame("ff02::1", append([]byte{130, 0, 0, 0, 0, 0, 0, 0}, netip.MustParseAddr("ff05::9").AsSlice()...))}, "mld MLDv1 query for ff05::9"},
		{"mld report", [][]byte{mldFrame("ff02::16", []byte{143, 0, 0, 0, 0, 0, 0, 0})}, "mld MLDv2 report"},
	} {
		t.Run(c.name, func(t *testing.T) {
			if got := see(t, c.frames...); !strings.HasPrefix(got.Looks.String(), c.want) || c.want == "unknown" && got.Kind != Unknown {
				t.Errorf("got %q, want %q", got.Looks, c.want)
			}
		})
	}
}

// TestStream: packets, bytes and rates of a stream.
func TestStream(t *testing.T) {
	frame := udp("239.1.1.1", 5000, []byte("hello"), 100, 7)
	got := see(t, frame, frame, frame)
	want := Stream{
		Interface: "eth0", VLAN: 7, OuterVLAN: 100, Source: netip.MustParseAddr("10.0.0.5"), Group: netip.MustParseAddr("239.1.1.1"), Port: 5000, TTL: 17,
		Packets: 3, Bytes: 3 * uint64(len(frame)), PacketRate: 3, BitRate: 24 * float64(len(frame)),
	}
	got.Looks = Looks{}
	if fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("got %+v, want %+v", got, want)
	}
	// Fragments: the first has the port, the others are counted in no stream.
	fragments := packet.Fragment(udp("239.1.1.1", 5000, make([]byte, 3000)), 7, 1000)
	if got := see(t, fragments...); got.Packets != 1 {
		t.Errorf("of fragments: %+v", got)
	}
	table := newTable("eth0", 10, nil, newTaken(nil))
	for _, f := range fragments {
		table.see(f, len(f))
	}
	if n := uint64(len(fragments) - 1); table.fragments != n || n == 0 {
		t.Errorf("%d fragments are counted, want %d", table.fragments, n)
	}
	// Unicast and truncated frames are no streams.
	table = newTable("eth0", 10, nil, newTaken(nil))
	unicast := packet.Frame{Src: netip.MustParseAddr("10.0.0.5"), Dst: netip.MustParseAddr("10.0.0.6"), DstPort: 5000, TTL: 17}.Build()
	table.see(unicast, len(unicast))
	table.see(frame[:30], len(frame))
	if got := table.list(time.Second); len(got) != 0 {
		t.Errorf("got %+v", got)
	}
}

// TestBound: when the table is full, the streams silent for the longest are forgotten, and counted.
func TestBound(t *testing.T) {
	table := newTable("eth0", 100, nil, newTaken(nil))
	for i := range 1000 {
		busy, once := udp("239.1.1.1", 5000, nil), udp("239.2.2.2", uint16(1+i), nil)
		table.see(busy, len(busy))
		table.see(once, len(once))
	}
	list := table.list(time.Second)
	if len(list) != 100 || table.forgotten != 901 {
		t.Errorf("%d streams are kept, %d forgotten", len(list), table.forgotten)
	}
	if i := slices.IndexFunc(list, func(s Stream) bool { return s.Port == 5000 }); i < 0 || list[i].Packets != 1000 {
		t.Error("the busy stream was forgotten")
	}
}

// TestSessionsBound: announcements beyond the maximum number of sessions are counted.
func TestSessionsBound(t *testing.T) {
	var s sessions
	for range 2 {
		for i := range MaxSessions + 3 {
			s.see(sap(0, uint16(i), []byte(sdp)), "eth0", 0, uint16(i>>16))
		}
	}
	if len(s.list()) != MaxSessions || s.unkept != 6 {
		t.Errorf("%d sessions are kept, %d announcements not; want %d and 6", len(s.list()), s.unkept, MaxSessions)
	}
}

// TestTaken: streams that match a rule are left out, however the rule names them.
func TestTaken(t *testing.T) {
	for _, c := range []struct {
		in    string
		taken bool
	}{
		{"239.1.1.1:5000%eth0", true}, {"239.1.1.1%eth0", true}, {"239.1.0.0/16:5000%eth0", true}, {"10.0.0.5@239.1.1.1:5000%eth0", true},
		{"10.0.0.0/24@239.1.1.1:5000%eth0", true}, {"239.1.1.1:4000-6000%eth0", true}, {"239.1.1.1:5000%eth+", true},
		{"10.0.0.6@239.1.1.1:5000%eth0", false}, {"239.1.1.1:5001%eth0", false}, {"239.1.1.1:5000%eth1", false}, {"239.1.1.1:5000%eth0,vlan=7", false},
		{"239.1.1.1:5000%eth0,from=host", false},
	} {
		in, _, err := rules.ParseInput(c.in)
		if err != nil {
			t.Fatal(err)
		}
		table := newTable("eth0", 10, nil, newTaken([]rules.Input{in}))
		frame := udp("239.1.1.1", 5000, nil)
		table.see(frame, len(frame))
		if got := len(table.list(time.Second)) == 0; got != c.taken {
			t.Errorf("%s: left out: %v, want %v", c.in, got, c.taken)
		}
	}
}

const sdp = "v=0\r\no=- 1 1 IN IP4 10.0.0.5\r\ns=Studio 1: \"Live\"\x1b[2J\r\nc=IN IP4 239.1.1.1/32\r\nt=0 0\r\n" +
	"a=source-filter: incl IN IP4 239.1.1.1 10.0.0.5\r\nm=audio 5004 RTP/AVP 97\r\na=rtpmap:97 L24/48000/8\r\n" +
	"m=video 5006/2 RTP/AVP 96\r\nc=IN IP4 239.1.1.2/32\r\na=source-filter: incl IN IP4 239.1.1.2 10.0.0.6\r\na=rtpmap:96 raw/90000\r\n" +
	"m=application 0 TCP 1\r\nm=text 5008 RTP/AVP 98\r\nc=IN IP4 10.0.0.9\r\n"

// sap wraps a session description (RFC 2974).
func sap(flags byte, hash uint16, payload []byte) []byte {
	b := []byte{0x20 | flags, 1}
	b = binary.BigEndian.AppendUint16(b, hash)
	b = append(b, 10, 0, 0, 5, 0xde, 0xad, 0xbe, 0xef) // origin, and four bytes of authentication
	return append(append(b, "application/sdp\x00"...), payload...)
}

func TestSessions(t *testing.T) {
	name, media := parseSDP([]byte(sdp))
	want := `[{audio 239.1.1.1 5004 10.0.0.5 L24/48000/8} {video 239.1.1.2 5006 10.0.0.6 raw/90000}]`
	if name != `Studio 1: "Live"[2J` || fmt.Sprint(media) != want {
		t.Errorf("got %q %v, want %s", name, media, want)
	}
	var compressed bytes.Buffer
	compressed.Write(sap(1, 2, nil)[:12])
	z := zlib.NewWriter(&compressed)
	fmt.Fprint(z, "application/sdp\x00"+sdp)
	z.Close()
	var s sessions
	s.see(sap(0, 1, []byte(sdp)), "eth0", 0, 0)
	s.see(sap(0, 1, []byte(strings.Replace(sdp, "Studio 1", "Studio 2", 1))), "eth0", 0, 0) // the same announcement, changed
	s.see(compressed.Bytes(), "eth0", 7, 0)
	s.see(sap(2, 3, []byte(sdp)), "eth0", 0, 0) // encrypted
	s.see(sap(0, 4, []byte("hello")), "eth0", 0, 0)
	var got []string
	for _, session := range s.list() {
		got = append(got, fmt.Sprint(session.VLAN, " ", session.Name))
	}
	if strings.Join(got, ", ") != `7 Studio 1: "Live"[2J, 0 Studio 2: "Live"[2J` {
		t.Errorf("got %q", got)
	}
	s.see(sap(4, 1, nil), "eth0", 0, 0) // a deletion
	if got := s.list(); len(got) != 1 {
		t.Errorf("after a deletion: %+v", got)
	}
}

// TestRules: the proposals form a valid rule file.
func TestRules(t *testing.T) {
	table := newTable("eth0", 100, nil, newTaken(nil))
	send := func(frames ...[]byte) {
		for _, f := range frames {
			table.see(f, len(f))
		}
	}
	send(udp("239.1.1.1", 5004, []byte("announced")), udp("239.5.5.5", 5000, mold("ABC", 1)), udp("232.1.1.1", 5000, nil), udp("224.0.0.9", 520, nil), udp("ff3e::9", 5000, nil, 100))
	other := packet.Frame{Src: netip.MustParseAddr("10.0.0.6"), Dst: netip.MustParseAddr("239.6.6.6"), DstPort: 5000, TTL: 1}
	send(other.Build(), udp("239.6.6.6", 5000, nil))
	r := Result{Streams: table.list(time.Second)}
	_, media := parseSDP([]byte(sdp))
	r.Sessions = []Session{{Interface: "eth0", Name: "Studio 1/Ü", Origin: netip.MustParseAddr("10.0.0.5"), Media: media}, {Interface: "eth0", Name: "Studio 1/Ü", Media: media[:1]}}
	slices.SortFunc(r.Streams, func(a, b Stream) int { return cmp.Or(a.Group.Compare(b.Group), a.Source.Compare(b.Source)) })
	proposals, left := r.Rules("eth1")
	var all []rules.Rule
	var got []string
	for _, p := range proposals {
		all = append(all, p.Rule)
		got = append(got, p.Rule.String())
	}
	if err := rules.ValidateSet(all); err != nil {
		t.Errorf("%v", err)
	}
	slices.Sort(got)
	want := []string{
		"Studio-1-audio 10.0.0.5@239.1.1.1:5004%eth0 -> 239.1.1.1:5004%eth1",
		"Studio-1-video 10.0.0.6@239.1.1.2:5006%eth0 -> 239.1.1.2:5006%eth1",
		"moldudp64-239.5.5.5-5000 239.5.5.5:5000%eth0 -> 239.5.5.5:5000%eth1",
		"unknown-232.1.1.1-5000 10.0.0.5@232.1.1.1:5000%eth0 -> 232.1.1.1:5000%eth1",
		"unknown-239.6.6.6-5000 10.0.0.5@239.6.6.6:5000%eth0 -> 239.6.6.6:5000%eth1",
		"unknown-239.6.6.6-5000-2 10.0.0.6@239.6.6.6:5000%eth0 -> 239.6.6.6:5000%eth1",
		"unknown-ff3e::9-5000 2001:db8::5@[ff3e::9]:5000%eth0,vlan=100 -> [ff3e::9]:5000%eth1",
	}
	if len(got) != len(want) || left != 1 {
		t.Errorf("got %d rules, %d left out, want %d and 1:\n%s", len(got), left, len(want), strings.Join(got, "\n"))
	}
	for _, w := range want {
		if !slices.Contains(got, w) {
			t.Errorf("no rule %s among\n%s", w, strings.Join(got, "\n"))
		}
	}
	if proposals, left := r.Rules("eth0"); len(proposals) != 0 || left == 0 {
		t.Errorf("back to where they come from: %v, %d left out", proposals, left)
	}
}

func FuzzFrame(f *testing.F) {
	f.Add(udp("239.1.1.1", 5004, rtp(1, 7, "x")))
	f.Add(udp("224.2.127.254", 9875, sap(0, 1, []byte(sdp)), 100))
	f.Add(igmp("224.0.0.1", []byte{0x11, 100, 0, 0, 0, 0, 0, 0, 2, 125, 0, 0}))
	f.Add(mldFrame("ff02::1", append([]byte{130, 0, 0, 0, 0, 0, 0, 0}, make([]byte, 20)...)))
	f.Fuzz(func(t *testing.T, frame []byte) {
		kept := bytes.Clone(frame)
		table := newTable("eth0", 10, nil, newTaken(nil))
		for range 4 {
			table.see(frame, len(frame))
		}
		r := Result{Streams: table.list(time.Second), Sessions: table.sessions.list()}
		for _, s := range r.Streams {
			if !s.Group.IsMulticast() || s.Packets == 0 || s.Kind == "" {
				t.Errorf("stream %+v", s)
			}
		}
		checkRules(t, &r)
		if !bytes.Equal(frame, kept) {
			t.Error("the frame was changed")
		}
	})
}

// checkRules: proposals are always valid together.
func checkRules(t *testing.T, r *Result) {
	proposals, _ := r.Rules("eth1")
	var all []rules.Rule
	for _, p := range proposals {
		all = append(all, p.Rule)
	}
	if err := rules.ValidateSet(all); err != nil {
		t.Errorf("%v: %v", all, err)
	}
}

func FuzzPayload(f *testing.F) {
	f.Add(rtp(1, 7, "x"))
	f.Add(mold("ABC", 1, "message"))
	f.Add(ptpAnnounce())
	f.Add(sap(0, 1, []byte(sdp)))
	f.Add([]byte(sdp))
	f.Add([]byte("s=\x9e a space behind what is left out"))
	f.Add([]byte("s=a" + strings.Repeat("ä", maxText))) // the limit splits a character
	f.Add([]byte("s=" + strings.Repeat("a", maxText-1) + " the limit is behind a space"))
	for _, name := range []string{"mpegts-ffmpeg.hex", "rtp-mpegts-ffmpeg.hex", "sap-ffmpeg.hex"} {
		for _, p := range payloads(f, name) {
			f.Add(p)
		}
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		for _, port := range []uint16{5000, portSAP, portPTPEvent} {
			var id identity
			for n := range uint64(4) {
				id.see(b, port, n+1)
			}
			if l := id.looks(); l.Kind == "" || len(l.Programs) > maxPrograms || (l.PayloadType == nil) != (l.SSRC == nil) {
				t.Errorf("%+v", l)
			}
		}
		var s sessions
		s.see(b, "eth0", 0, 0)
		name, media := parseSDP(b)
		r := Result{Sessions: append(s.list(), Session{Interface: "eth0", Name: name, Media: media})}
		if len(name) > maxText || len(media) > maxMedia || clean(name) != name {
			t.Errorf("%q %v", name, media)
		}
		checkRules(t, &r)
	})
}

// BenchmarkSee measures the cost of a packet, for one stream and for a full table, and the table's
// memory.
func BenchmarkSee(b *testing.B) {
	for _, streams := range []int{1, MaxStreams} {
		b.Run(fmt.Sprintf("streams=%d", streams), func(b *testing.B) {
			frames := make([][]byte, streams)
			for i := range frames {
				frames[i] = udp(netip.AddrFrom4([4]byte{239, byte(i >> 16), byte(i >> 8), byte(i)}).String(), 5000, []byte("unknown"))
			}
			used := func() uint64 {
				var m runtime.MemStats
				runtime.GC()
				runtime.ReadMemStats(&m)
				return m.HeapAlloc
			}
			before := used()
			table := newTable("eth0", MaxStreams, nil, newTaken(nil))
			for _, f := range frames {
				table.see(f, len(f))
			}
			kept := used() - before
			i := 0
			for b.Loop() {
				f := frames[i%streams]
				i++
				table.see(f, len(f))
			}
			b.ReportMetric(float64(kept)/(1<<20), "MB")
			runtime.KeepAlive(table)
		})
	}
}
