package packet_test

import (
	"testing"

	"xdpcast/internal/streamtest"
	"xdpcast/pkg/packet"
)

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
