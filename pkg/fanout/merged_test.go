package fanout

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"xdpcast/internal/lab"
	"xdpcast/internal/labtest"
	"xdpcast/pkg/packet"
)

// Merged datagrams are split exactly as the kernel itself splits them on output, byte for
// byte. A kernel that cannot describe them to packet sockets drops and counts them.
func TestMergedAsTheKernelSplits(t *testing.T) { eachRing(t, testMergedAsTheKernelSplits) }

func testMergedAsTheKernelSplits(t *testing.T, ring int) {
	b := newBench(t)
	g := openGroup(t, b.relay, "in", Options{Frames: ring})
	c := collect(t, g)
	described := labtest.MergedDatagrams(t, b.relay)
	for i, test := range []struct {
		to           string
		segment, len int
	}{
		{"239.1.1.1", 1000, 10000},
		{"239.1.1.1", 1000, 10001},
		{"239.1.1.1", 333, 20001},
		{"239.1.1.1", 1, 9},
		{"239.1.1.1", 1472, 60000},
		{"fd00::2", 1000, 10001},
		{"fd00::2", 999, 2998},
	} {
		port := 5000 + i
		payload := make([]byte, test.len)
		for j := range payload {
			payload[j] = byte(j * 7 >> 3)
		}
		datagrams := (test.len + test.segment - 1) / test.segment
		var got [2][][]byte
		for k, offload := range []bool{true, false} {
			c.mu.Lock()
			c.frames = nil
			c.mu.Unlock()
			before := groupStats(t, g)[0].Received
			labtest.Do(t, b.source, func() error { return lab.SetTxChecksum("eth0", offload) })
			dropped := groupStats(t, g)[0].Dropped
			sendSegmented(t, b.source, test.to, port, test.segment, payload)
			if offload && datagrams > 1 && !described {
				labtest.Eventually(t, "the merged datagram is counted as dropped", func() bool { return groupStats(t, g)[0].Dropped == dropped+1 })
				break // without the device's checksums such a kernel does not split it, either
			}
			frames := c.udp(datagrams, func(h packet.Headers) bool { return h.DstPort == uint16(port) })
			if merged := groupStats(t, g)[0].Received-before < uint64(datagrams); merged != (offload && datagrams > 1) {
				t.Fatalf("%+v: came merged: %v, offload: %v", test, merged, offload)
			}
			for j, f := range frames {
				if f.ChecksumPartial || f.SegmentSize != 0 || f.WireLen != len(f.Data) {
					t.Errorf("%+v: datagram %d: %+v", test, j, f)
				}
				got[k] = append(got[k], comparable(t, f.Data, frames[0].Data))
			}
		}
		if !described {
			continue
		}
		if len(got[0]) != datagrams || len(got[1]) != datagrams {
			t.Fatalf("%+v: %d and %d datagrams, want %d", test, len(got[0]), len(got[1]), datagrams)
		}
		for j := range got[0] {
			if !bytes.Equal(got[0][j], got[1][j]) {
				t.Fatalf("%+v: datagram %d:\n   ours %x\nkernel's %x", test, j, got[0][j], got[1][j])
			}
		}
	}
}

// comparable removes what differs between two sockets: the source port, the flow label,
// and the initial identification. The checksums are verified before they are removed.
func comparable(t *testing.T, frame, first []byte) []byte {
	t.Helper()
	h, ok := packet.Parse(frame)
	if !ok {
		t.Fatalf("not a datagram: %x", frame)
	}
	if ip, udp := packet.Checksums(frame, &h); !ip || !udp {
		t.Fatalf("checksums of %x: ip %v, udp %v", frame, ip, udp)
	}
	out := bytes.Clone(frame)
	clear(out[h.UDP : h.UDP+2])
	clear(out[h.UDP+6 : h.UDP+8])
	if h.Dst.Is4() {
		id := binary.BigEndian.Uint16(frame[h.L3+4:]) - binary.BigEndian.Uint16(first[h.L3+4:])
		binary.BigEndian.PutUint16(out[h.L3+4:], id)
		clear(out[h.L3+10 : h.L3+12])
	} else {
		clear(out[h.L3+1 : h.L3+4]) // flow label
	}
	return out
}

// sendSegmented sends a payload as datagrams of segment bytes, in one call.
func sendSegmented(t *testing.T, h *lab.Host, to string, port, segment int, payload []byte) {
	t.Helper()
	labtest.Do(t, h, func() error {
		conn, err := net.Dial("udp", netip.AddrPortFrom(netip.MustParseAddr(to), uint16(port)).String())
		if err != nil {
			return err
		}
		defer conn.Close()
		raw, err := conn.(*net.UDPConn).SyscallConn()
		if err != nil {
			return err
		}
		if err := raw.Control(func(fd uintptr) {
			err = unix.SetsockoptInt(int(fd), unix.IPPROTO_UDP, unix.UDP_SEGMENT, segment)
		}); err != nil {
			return err
		}
		if err != nil {
			return err
		}
		_, err = conn.Write(payload)
		return err
	})
}

// The checksums of frames from a sender on this machine that left them to the device
// are completed.
func TestChecksumLeftToTheDevice(t *testing.T) { eachRing(t, testChecksumLeftToTheDevice) }

func testChecksumLeftToTheDevice(t *testing.T, ring int) {
	b := newBench(t)
	c := collect(t, openGroup(t, b.relay, "in", Options{Frames: ring}))
	labtest.Do(t, b.source, func() error { return lab.SetTxChecksum("eth0", true) })
	for i, to := range []string{"239.1.1.1", "fd00::2"} {
		for size := range 20 {
			port := 5000 + 100*i + size
			labtest.Do(t, b.source, func() error {
				conn, err := net.Dial("udp", netip.AddrPortFrom(netip.MustParseAddr(to), uint16(port)).String())
				if err != nil {
					return err
				}
				defer conn.Close()
				_, err = conn.Write(bytes.Repeat([]byte{0xf7}, size))
				return err
			})
			f := c.udp(1, func(h packet.Headers) bool { return h.DstPort == uint16(port) })[0]
			h, _ := packet.Parse(f.Data)
			if _, udp := packet.Checksums(f.Data, &h); udp || !f.ChecksumPartial {
				t.Fatalf("%s: checksum right: %v, partial: %v", to, udp, f.ChecksumPartial)
			}
			if !f.CompleteChecksum() || f.ChecksumPartial || !f.CompleteChecksum() {
				t.Errorf("%s: not completed", to)
			}
			if ip, udp := packet.Checksums(f.Data, &h); !ip || !udp {
				t.Errorf("%s: %d bytes: checksums ip %v, udp %v", to, size, ip, udp)
			}
		}
	}
}

// Datagrams merged by generic receive offload are restored byte for byte.
func TestMergedByGRO(t *testing.T) { eachRing(t, testMergedByGRO) }

func testMergedByGRO(t *testing.T, ring int) {
	b := newBench(t)
	labtest.NeedsKernel(t, labtest.MergedDatagrams(t, b.relay), "merged datagrams at packet sockets", "6.2")
	dir := t.TempDir()
	labtest.Do(t, b.relay, func() error {
		if err := setFeature("in", "rx-udp-gro-forwarding"); err != nil {
			return err
		}
		return holdForGRO(dir, "in")
	})
	g := openGroup(t, b.relay, "in", Options{Frames: ring, Filter: Filter{Classic: portFilter(5000)}})
	c := collect(t, g)
	const total = 200
	var want [][]byte
	var packets []Packet
	for i := range total {
		data := frame(0, i).Build()
		h, _ := packet.Parse(data)
		// GRO merges only consecutive identifications.
		binary.BigEndian.PutUint16(data[h.L3+4:], uint16(65500+i))
		packet.FillChecksums(data, &h)
		want = append(want, data)
		packets = append(packets, Packet{Header: data})
	}
	sendAll(t, openSender(t, b.source, "eth0", SenderOptions{}), packets)
	frames := c.udp(total, toGroup)
	c.stop()
	if received := groupStats(t, g)[0].Received; received > total/2 {
		t.Errorf("%d datagrams came as %d frames: they were not merged", total, received)
	}
	for i, f := range frames {
		if f.ChecksumPartial || f.SegmentSize != 0 || !bytes.Equal(f.Data, want[i]) {
			t.Fatalf("datagram %d: partial %v, segment size %d\n got %x\nwant %x", i, f.ChecksumPartial, f.SegmentSize, f.Data, want[i])
		}
	}
}

// holdForGRO makes the interface hold mergeable packets for a while, instead of only
// for one poll. It is a sysfs setting, and sysfs shows the devices of the namespace in
// which it is mounted: here on a directory private to the calling thread, which must
// end afterwards.
func holdForGRO(dir, ifname string) error {
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("unshare mounts: %w", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_PRIVATE|unix.MS_REC, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	if err := unix.Mount("sysfs", dir, "sysfs", 0, ""); err != nil {
		return fmt.Errorf("mount sysfs: %w", err)
	}
	return os.WriteFile(filepath.Join(dir, "class/net", ifname, "gro_flush_timeout"), []byte("20000000"), 0o644)
}
