package fanout_test

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"testing"
	"time"

	"xdpcast/internal/lab"
	"xdpcast/internal/labtest"
	"xdpcast/pkg/fanout"
	"xdpcast/pkg/packet"
)

// Receive what arrives on eth0 for a second.
func Example() {
	eth0, err := net.InterfaceByName("eth0")
	if err != nil {
		fmt.Println(err)
		return
	}
	err = receive(eth0.Index, time.Now().Add(time.Second), func(frame []byte) bool {
		fmt.Printf("% x\n", frame)
		return true
	})
	if err != nil {
		fmt.Println(err)
	}
}

// receive passes each frame to handle until that has enough or the deadline expires. The frame is
// valid during the call.
func receive(index int, until time.Time, handle func(frame []byte) bool) (err error) {
	group, err := fanout.Open(fanout.Options{Interface: "eth0", Index: index})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, group.Close()) }()
	worker := group.Workers()[0] // the only one; with several, each needs its own goroutine
	worker.SetDeadline(until)
	for {
		block, err := worker.Wait()
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return nil
		}
		if err != nil {
			return err
		}
		var frame fanout.Frame
		for block.Next(&frame) {
			if !handle(frame.Data) {
				block.Release()
				return nil
			}
		}
		block.Release()
	}
}

// The example receives what a neighbour sends, and ends at its deadline if that is silent.
func TestExampleReceives(t *testing.T) {
	src, dst := labtest.Host(t, "fana"), labtest.Host(t, "fanb")
	labtest.Connect(t, lab.End{Host: src, Name: "eth0"}, lab.End{Host: dst, Name: "eth0"})
	var from int
	labtest.Do(t, src, func() error {
		eth0, err := net.InterfaceByName("eth0")
		if err == nil {
			from = eth0.Index
		}
		return err
	})
	labtest.Enter(t, dst)
	eth0, err := net.InterfaceByName("eth0")
	if err != nil {
		t.Fatal(err)
	}
	sent := packet.Frame{
		DstMAC: [6]byte{1, 0, 0x5e, 1, 1, 1}, SrcMAC: [6]byte{2, 0, 0, 0, 0, 1}, TTL: 1,
		Src: netip.MustParseAddr("10.0.0.1"), Dst: netip.MustParseAddr("239.1.1.1"), SrcPort: 4000, DstPort: 5000, Payload: []byte("hello"),
	}.Build()
	started := time.Now()
	if err := receive(eth0.Index, started.Add(20*time.Millisecond), func(f []byte) bool { return string(f) != string(sent) }); err != nil {
		t.Fatal(err)
	}
	if waited := time.Since(started); waited < 20*time.Millisecond {
		t.Errorf("the deadline came after %v", waited)
	}

	var sender *fanout.Sender
	labtest.Do(t, src, func() (err error) {
		sender, err = fanout.OpenSender(from, fanout.SenderOptions{})
		return err
	})
	defer sender.Close()
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() { // repeat until one arrives: the group is opened meanwhile
		defer close(stopped)
		for {
			select {
			case <-stop:
				return
			case <-time.After(time.Millisecond):
				if _, err := sender.Send([]fanout.Packet{{Header: sent}}); err != nil {
					t.Error(err)
					return
				}
			}
		}
	}()
	got := false
	err = receive(eth0.Index, time.Now().Add(time.Minute), func(f []byte) bool {
		got = string(f) == string(sent)
		return !got
	})
	close(stop)
	<-stopped
	if err != nil || !got {
		t.Errorf("received %v: %v", got, err)
	}
}
