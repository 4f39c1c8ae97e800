package e2e_test

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/cilium/ebpf"

	"xdpcast/internal/control"
	"xdpcast/internal/labtest"
	"xdpcast/pkg/packet"
)

// badLeg makes the packets of a leg that has gone wrong.
type badLeg struct {
	*rand.Rand
	frame packet.Frame
	n     uint32 // packets so far
}

// rtpBytes is the length of its payloads. Those of legSender have another.
const rtpBytes = 60

func (b *badLeg) rtp(number, ssrc uint32) []byte {
	p := make([]byte, rtpBytes)
	p[0], p[1] = 0x80, 96
	binary.BigEndian.PutUint16(p[2:], uint16(number))
	binary.BigEndian.PutUint32(p[8:], ssrc)
	return p
}

// kinds are all that a leg may bring, besides its stream. Each makes the next frame.
func (b *badLeg) kinds() map[string]func() []byte {
	payload := func(make func() []byte) func() []byte {
		return func() []byte {
			f := b.frame
			f.Payload = make()
			return f.Build()
		}
	}
	return map[string]func() []byte{
		"another sender for every four packets": payload(func() []byte { return b.rtp(b.n, 1000+b.n/4) }),
		"two senders in turns":                  payload(func() []byte { return b.rtp(b.n, 20+b.n/8%2) }),
		"another sender for every packet":       payload(func() []byte { return b.rtp(b.n, b.Uint32()) }),
		"random numbers":                        payload(func() []byte { return b.rtp(b.Uint32(), 7) }),
		"random numbers, four in a row":         payload(func() []byte { return b.rtp(b.n/4*12345+b.n%4, 7) }),
		"a recording again and again":           payload(func() []byte { return b.rtp(b.n%1000, 7) }),
		"numbers that go backwards":             payload(func() []byte { return b.rtp(-b.n, 7) }),
		"too short for a number":                payload(func() []byte { return b.rtp(b.n, 7)[:b.n%12] }),
		"no RTP":                                payload(func() []byte { return make([]byte, b.n%200) }),
		"RTCP": payload(func() []byte {
			p := b.rtp(b.n, b.n)
			p[1] = 200
			return p
		}),
		"spoofed addresses and ports": func() []byte {
			f := b.frame
			b.spoof(&f)
			f.Payload = b.rtp(b.n, 7)
			return f.Build()
		},
		"spoofed fragments without their first": func() []byte {
			f := b.frame
			b.spoof(&f)
			f.Payload = b.rtp(b.n, 7)
			frame := f.Build()
			binary.BigEndian.PutUint16(frame[20:], 0x2000|uint16(1+b.n%1000)) // behind the first one, and more follow
			return frame
		},
		"first fragments alone": func() []byte {
			f := b.frame
			b.spoof(&f)
			f.Payload = b.rtp(b.n, 7)
			frame := f.Build()
			binary.BigEndian.PutUint16(frame[18:], uint16(b.n))
			binary.BigEndian.PutUint16(frame[20:], 0x2000)
			return frame
		},
		"longer than its packet": func() []byte {
			f := b.frame
			f.Payload = b.rtp(b.n, 7)
			frame := f.Build()
			binary.BigEndian.PutUint16(frame[38:], 9000)
			return frame
		},
	}
}

func (b *badLeg) spoof(f *packet.Frame) {
	f.Src = netip.AddrFrom4([4]byte{10, byte(b.n >> 16), byte(b.n >> 8), byte(b.n)})
	f.SrcMAC = [6]byte{2, 1, byte(b.n >> 24), byte(b.n >> 16), byte(b.n >> 8), byte(b.n)}
	f.SrcPort = uint16(1 + b.n%60000)
}

// Whatever a leg brings costs no memory: the kernel's maps, the daemon and its files are after much of each kind what
// they were after little of it.
func TestBadLegsTakeNoMemory(t *testing.T) {
	t.Setenv("GOGC", "10") // of the daemon: its heap is little more than what it needs
	l := newLegLab(t)
	l.in.start("-c", l.in.write("rules.yaml", "rules:\n- name: cam\n  in: ["+strings.ReplaceAll(legInputs, " ", ", ")+"]\n  merge: rtp,skew=5ms,reset=10ms\n  out: 239.2.1.1:6000%out0\n"))
	l.in.waitState("cam", control.StateActive)
	const numbers = 60_000
	sink := newNumberSink(t, l.sinks[0], "sink0", "239.2.1.1:6000", numbers)
	tap := labtest.NewTap(t, l.sinks[2], "sink0")
	group := netip.MustParseAddr("239.101.1.1")
	bad := &badLeg{Rand: rand.New(rand.NewPCG(1, 2)), frame: packet.Frame{
		DstMAC: packet.MulticastMAC(group), SrcMAC: [6]byte{2, 0, 0, 0, 0, 9}, Src: netip.MustParseAddr("10.2.2.2"), Dst: group, SrcPort: 7, DstPort: 5000, TTL: 9,
	}}
	kinds := bad.kinds()
	good := uint32(0)
	sendGood := func() {
		if err := l.legs[0].send(good); err != nil {
			t.Fatal(err)
		}
		good++
	}
	// send sends so many packets of each kind, and meanwhile one in 50 on the other leg, which is well.
	send := func(packets int) {
		before, sent := l.in.rule("cam").Inputs[1], uint64(0)
		for _, frame := range kinds {
			for i := range packets {
				bad.n++
				tap.Send(frame())
				sent++
				if i%50 == 0 {
					sendGood()
				}
			}
		}
		// A busy machine's queues drop some.
		if n := l.in.rule("cam").Inputs[1].Matched.Packets - before.Matched.Packets; n < sent/2 {
			t.Errorf("%d packets of the bad leg matched, of %d", n, sent)
		}
	}
	send(500)
	few := l.memory(t)
	const many = 6_000
	send(many)
	// It counts from its first look, and looks once a second: all may have come before.
	eventually(t, "the daemon has looked at the stream, and tells that its sender is another", func() string {
		send(100)
		for _, e := range l.in.events() {
			if e.Kind == "stream" && e.State == "restarted" {
				return ""
			}
		}
		return fmt.Sprintf("restarts: %+v", l.in.rule("cam").Stream)
	})
	after := l.memory(t)
	for name, was := range few.maps {
		// A reason to drop that had not occurred yet takes an entry.
		if now := after.maps[name]; now.bytes > was.bytes+4096 || now.entries > was.entries+16 {
			t.Errorf("map %s took %d bytes with %d entries after little bad traffic, and takes %d with %d after much", name, was.bytes, was.entries, now.bytes, now.entries)
		}
	}
	const allowed = 3 << 20 // less than 40 bytes a packet, which includes what the Go runtime takes for itself
	if after.daemon > few.daemon+allowed {
		t.Errorf("the daemon's memory has grown from %d to %d bytes with %d packets", few.daemon, after.daemon, many*len(kinds))
	}
	if after.files > few.files+64<<10 {
		t.Errorf("the daemon's files have grown from %d to %d bytes", few.files, after.files)
	}
	if n := after.events - few.events; n > 50 {
		t.Errorf("%d events of the stream: want those of a stream that flaps, and not of each look or packet", n)
	}
	t.Logf("%d bad packets: %d maps of %d bytes; daemon %d to %d KiB, files %d to %d bytes, %d events", many*len(kinds), len(after.maps), after.all(), few.daemon>>10, after.daemon>>10,
		few.files, after.files, after.events)

	// The stream goes on, and nothing of the good leg has passed twice.
	total := sink.total.Load()
	eventually(t, "the stream goes on", func() string {
		sendGood()
		if n := sink.total.Load(); n < total+100 {
			return fmt.Sprintf("%d numbers have come, then %d", total, n)
		}
		return ""
	})
	for i := range sink.seen[:good] {
		if n := sink.seen[i].Load(); n > 1 {
			t.Fatalf("number %d came %d times", i, n)
		}
	}
}

// mapSize is what a map takes, and how many entries it has if these are made as they are needed.
type mapSize struct {
	bytes   uint64
	entries int
}

// memory is what an instance takes.
type memory struct {
	maps          map[string]mapSize // by name, the maps in a map summed up
	daemon, files uint64             // bytes
	events        int                // of streams
}

func (m *memory) all() (bytes uint64) {
	for _, s := range m.maps {
		bytes += s.bytes
	}
	return bytes
}

func (l *legLab) memory(t *testing.T) (m memory) {
	t.Helper()
	m.maps = map[string]mapSize{}
	pinned, err := filepath.Glob(filepath.Join(l.in.pinDir, "*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range pinned {
		if info, err := os.Stat(path); err != nil || info.IsDir() {
			continue
		}
		of, err := ebpf.LoadPinnedMap(path, &ebpf.LoadPinOptions{ReadOnly: true})
		if err != nil {
			t.Fatalf("%s: %v", path, err)
		}
		size, err := sizeOf(of)
		of.Close()
		if err != nil {
			t.Fatalf("%s: %v", path, err)
		}
		m.maps[filepath.Base(path)] = size
	}
	if len(m.maps) < 20 || m.maps["stream_windows"].bytes < 16<<10 {
		t.Fatalf("the maps in %s are %+v: want all of the relay program, and a window of 16 KiB", l.in.pinDir, m.maps)
	}
	if m.daemon, err = field(fmt.Sprintf("/proc/%d/status", l.in.running.cmd.Process.Pid), "RssAnon:"); err != nil {
		t.Fatal(err)
	}
	m.daemon <<= 10
	err = filepath.WalkDir(l.in.runDir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		info, err := d.Info()
		if err == nil {
			m.files += uint64(info.Size())
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range l.in.events() {
		if e.Kind == "stream" {
			m.events++
		}
	}
	return m
}

// sizeOf adds up a map and, if it holds maps, those.
func sizeOf(of *ebpf.Map) (size mapSize, err error) {
	if size.bytes, err = field(fmt.Sprintf("/proc/self/fdinfo/%d", of.FD()), "memlock:"); err != nil {
		return size, err
	}
	switch of.Type() {
	case ebpf.Hash, ebpf.PerCPUHash, ebpf.LPMTrie:
		for key := any(nil); ; size.entries++ {
			next, err := of.NextKeyBytes(key)
			if err != nil || next == nil {
				return size, err
			}
			key = next
		}
	case ebpf.ArrayOfMaps, ebpf.HashOfMaps:
		var id ebpf.MapID
		for i := range of.MaxEntries() {
			if of.Lookup(i, &id) != nil {
				continue
			}
			inner, err := ebpf.NewMapFromID(id)
			if err != nil {
				return size, err
			}
			s, err := sizeOf(inner)
			inner.Close()
			if err != nil {
				return size, err
			}
			size.bytes += s.bytes
			size.entries++
		}
	}
	return size, nil
}

// field is the number behind a word that begins a line of a file.
func field(path, name string) (uint64, error) {
	f, err := os.Open(path)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	for lines := bufio.NewScanner(f); lines.Scan(); {
		if words := strings.Fields(lines.Text()); len(words) > 1 && words[0] == name {
			return strconv.ParseUint(words[1], 10, 64)
		}
	}
	return 0, fmt.Errorf("%s has no %s", path, name)
}
