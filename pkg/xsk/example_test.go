package xsk_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"time"

	"github.com/cilium/ebpf"

	"xdpcast/pkg/xsk"
)

// Receive a multicast group on queue 0 of eth0. A socket of the application has
// joined it, and an XDP program redirects its packets to entry 0 of a pinned XSKMAP.
func Example() {
	ctx, stop := context.WithTimeout(context.Background(), time.Minute)
	defer stop()
	eth0, err := net.InterfaceByName("eth0")
	if err != nil {
		fmt.Println(err)
		return
	}
	xsks, err := ebpf.LoadPinnedMap("/sys/fs/bpf/xsks", nil)
	if err != nil {
		fmt.Println(err)
		return
	}
	defer xsks.Close()
	if err := receive(ctx, eth0.Index, xsks, func(packet []byte) { fmt.Printf("% x\n", packet) }); err != nil {
		fmt.Println(err)
	}
}

// receive passes every packet to handle, until the context ends or the interface fails.
func receive(ctx context.Context, ifindex int, xsks *ebpf.Map, handle func(packet []byte)) (err error) {
	umem, err := xsk.NewUMEM(xsk.UMEMOptions{Frames: 4096})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, umem.Close()) }()
	frames, err := umem.NewFrames(4096)
	if err != nil {
		return err
	}
	socket, err := xsk.Open(frames, ifindex, 0, xsk.Options{NoTX: true})
	if err != nil {
		return err
	}
	defer socket.Close()
	waiter, err := xsk.NewWaiter()
	if err != nil {
		return err
	}
	defer waiter.Close()
	defer context.AfterFunc(ctx, waiter.Wake)()
	socket.Fill(2048)
	if err := errors.Join(waiter.Set(socket, xsk.Readable), xsks.Put(uint32(0), uint32(socket.FD()))); err != nil {
		return err
	}
	for descs := make([]xsk.Desc, 64); ctx.Err() == nil; {
		if ready, err := waiter.Wait(time.Second); err != nil || ready == 0 {
			if err = errors.Join(err, socket.Check()); err != nil { // the interface is down or gone
				return err
			}
		}
		got := descs[:socket.Receive(descs)]
		for _, d := range got {
			handle(umem.Data(d))
		}
		frames.ReleaseAll(got)
		socket.Fill(len(got))
	}
	return nil
}
