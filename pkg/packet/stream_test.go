package packet_test

import (
	"testing"

	"xdpcast/internal/streamtest"
	"xdpcast/pkg/packet"
)

// A leg that brings other packets with the numbers of the stream is found, also when it brings shorter
// ones, and until it brings the right ones again.
func TestStreamLegsDiffer(t *testing.T) {
	for name, change := range map[string]func(p []byte) []byte{
		"content":      func(p []byte) []byte { p[40]++; return p },
		"length":       func(p []byte) []byte { return p[:len(p)-1] },
		"a short tail": func(p []byte) []byte { return p[:14] },
	} {
		state := packet.NewStreamState(streamtest.RTPStream)
		now := uint64(100e9)
		for i := range uint32(30_000) {
			now += 1e6
			p := streamtest.RTP(i, 7)
			state.Packet(0, p, len(p), now)
			if i >= 10_000 && i < 20_000 {
				p = change(p)
			}
			state.Packet(1, p, len(p), now)
			switch {
			case (i == 9_999 || i == 29_999) && state.Differs[1] != 0, i == 9_999 && state.Differ[1] != 0:
				t.Errorf("%s: at %d the legs differ %d times", name, i, state.Differ[1])
			case i == 19_999 && (state.Differs[1] == 0 || state.Differ[1] < 100 || state.Differ[1] > 220):
				t.Errorf("%s: at %d the legs differ %d times, want about 10,000/64", name, i, state.Differ[1])
			}
		}
		if state.Differ[0] != 0 {
			t.Errorf("%s: the first leg differs from itself %d times", name, state.Differ[0])
		}
	}
}

// What happens to streams, by the twin alone; package loader runs the program beside it.
func TestStreamScenarios(t *testing.T) {
	for _, s := range streamtest.Scenarios() {
		t.Run(s.Name, func(t *testing.T) {
			state := packet.NewStreamState(s.Stream)
			s.Play(t, func(leg int, payload []byte, now uint64) bool {
				return state.Packet(leg, payload, len(payload), now) == packet.StreamPassed
			})
		})
	}
}
