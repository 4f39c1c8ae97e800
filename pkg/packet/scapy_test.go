package packet

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"os"
	"testing"
)

// scapyFrame is a frame of testdata/frames.pcap, which testdata/frames.py has made with
// code that shares nothing with ours.
type scapyFrame struct {
	Name, Part string
	data       []byte
}

func scapyFrames(t *testing.T) (all []scapyFrame) {
	t.Helper()
	about, err := os.ReadFile("testdata/frames.json")
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(about, &all); err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile("testdata/frames.pcap")
	if err != nil {
		t.Fatal(err)
	}
	// A header of 24 bytes, then records with headers of 16: the third word is the length.
	const header, record = 24, 16
	data = data[header:]
	for i := range all {
		n := binary.LittleEndian.Uint32(data[8:])
		all[i].data = data[record : record+n]
		data = data[record+n:]
	}
	if len(data) > 0 {
		t.Fatalf("frames.json has %d frames, %d bytes are left", len(all), len(data))
	}
	return all
}

// What another tool says is UDP with so much payload is that, in whatever it is wrapped.
func TestParseScapy(t *testing.T) {
	payloads := map[string][]byte{}
	ids := map[string]uint32{}
	for i, f := range scapyFrames(t) {
		h, ok := Parse(f.data)
		want := map[string]Part{"whole": Whole, "first": FirstFragment, "later": LaterFragment}[f.Part]
		if !ok || h.Part != want {
			t.Errorf("frame %d, %s: parsed %v as part %d, want %s", i, f.Name, ok, h.Part, f.Part)
			continue
		}
		switch {
		case want != LaterFragment && (h.DstPort != 5000 || h.SrcPort != 4000):
			t.Errorf("frame %d, %s: ports %d and %d", i, f.Name, h.SrcPort, h.DstPort)
		case want == FirstFragment:
			ids[f.Name] = h.FragmentID
		case want == LaterFragment && h.FragmentID != ids[f.Name]:
			t.Errorf("frame %d, %s: another identification than the first", i, f.Name)
		}
		if ip, udp := Checksums(f.data, &h); !ip || !udp {
			t.Errorf("frame %d, %s: checksums %v and %v", i, f.Name, ip, udp)
		}
		payloads[f.Name] = append(payloads[f.Name], f.data[h.Payload:h.L3+h.L3Len]...)
	}
	for name, payload := range payloads {
		n := len(payload) / len("relay")
		if n != 4 && n != 400 || !bytes.Equal(payload, bytes.Repeat([]byte("relay"), n)) {
			t.Errorf("%s: payload of %d bytes: %q", name, len(payload), payload[:min(len(payload), 40)])
		}
	}
}
