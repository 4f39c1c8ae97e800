package loader

import (
	"encoding/binary"
	"encoding/json"
	"os"
	"path/filepath"
	"testing"

	"xdpcast/pkg/flow"
)

// The relay program takes all frames made by another tool (pkg/packet/testdata/frames.py), and all
// fragments of a datagram or none.
func TestRelayProgramScapy(t *testing.T) {
	t.Parallel()
	n, r := programLab(t, 1)
	rule := func(name, group, to, from string, outer, vlan uint16) flow.Flow {
		in := input(n.in, group, "", 5000)
		in.OuterVLAN, in.VLAN = outer, vlan
		return flow.Flow{Name: name, In: in, Out: []flow.Output{output(n.out[0], to, from, 6000)}}
	}
	sync1(t, r.l,
		rule("six", "ff3e::1", "ff3e::2", "fd00::1", 0, 0), rule("six tagged", "ff3e::1", "ff3e::2", "fd00::1", 10, 100),
		rule("four", "239.1.1.1", "239.2.2.2", "10.1.0.1", 0, 0), rule("four tagged", "239.1.1.1", "239.2.2.2", "10.1.0.1", 0, 100))
	const dir = "../packet/testdata"
	var frames []struct{ Name, Part string }
	about, err := os.ReadFile(filepath.Join(dir, "frames.json"))
	if err == nil {
		err = json.Unmarshal(about, &frames)
	}
	if err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(filepath.Join(dir, "frames.pcap"))
	if err != nil {
		t.Fatal(err)
	}
	data = data[24:]
	for i, f := range frames {
		length := binary.LittleEndian.Uint32(data[8:])
		frame := data[16 : 16+length]
		data = data[16+length:]
		if got := r.run(t, n.in.Index, frame, len(frame)); got.verdict != xdpRedirect {
			t.Errorf("frame %d, %s, %s: verdict %d, want it relayed", i, f.Name, f.Part, got.verdict)
		}
	}
}
