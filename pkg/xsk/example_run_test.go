package xsk_test

import (
	"context"
	"errors"
	"net"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"xdpcast/internal/lab"
	"xdpcast/internal/labtest"
)

// The example receives a group, ends with its context, and reports when the interface
// is down.
func TestExampleReceives(t *testing.T) {
	src, dst := labtest.Host(t, "xska"), labtest.Host(t, "xskb")
	labtest.Connect(t, lab.End{Host: src, Name: "eth0", Addrs: []string{"10.0.0.1/24"}}, lab.End{Host: dst, Name: "eth0", Addrs: []string{"10.0.0.2/24"}})
	labtest.Enter(t, dst)
	eth0, err := net.InterfaceByName("eth0")
	if err != nil {
		t.Fatal(err)
	}
	xsks, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.XSKMap, KeySize: 4, ValueSize: 4, MaxEntries: 1})
	if err != nil {
		t.Fatal(err)
	}
	defer xsks.Close()
	const pass = 2
	program, err := ebpf.NewProgram(&ebpf.ProgramSpec{Type: ebpf.XDP, License: "GPL", Instructions: asm.Instructions{
		asm.LoadMapPtr(asm.R1, xsks.FD()),
		asm.Mov.Imm(asm.R2, 0),
		asm.Mov.Imm(asm.R3, pass),
		asm.FnRedirectMap.Call(),
		asm.Return(),
	}})
	if err != nil {
		t.Fatal(err)
	}
	defer program.Close()
	attached, err := link.AttachXDP(link.XDPOptions{Program: program, Interface: eth0.Index, Flags: link.XDPDriverMode})
	if err != nil {
		t.Fatal(err)
	}
	defer attached.Close()

	group := []byte{239, 1, 2, 3}
	sender := sendGroup(t, src, group)
	ctx, cancel := context.WithCancel(t.Context())
	sent := make(chan struct{})
	go func() { // repeat until one arrives: the socket is opened meanwhile
		defer close(sent)
		for ctx.Err() == nil {
			if _, err := sender.Write([]byte("hello")); err != nil {
				t.Error(err)
				return
			}
		}
	}()
	var packet []byte
	if err := receive(ctx, eth0.Index, xsks, func(p []byte) {
		if len(p) == 47 && string(p[30:34]) == string(group) {
			packet = append(packet[:0], p...)
			cancel()
		}
	}); err != nil {
		t.Fatal(err)
	}
	<-sent
	if string(packet[42:]) != "hello" {
		t.Errorf("received % x", packet)
	}
	if err := dst.SetUp("eth0", false); err != nil {
		t.Fatal(err)
	}
	labtest.Eventually(t, "the example says that the interface is down", func() bool {
		err := receive(t.Context(), eth0.Index, xsks, func([]byte) {})
		if !errors.Is(err, unix.ENETDOWN) && !errors.Is(err, unix.EBUSY) {
			t.Fatal(err)
		}
		return errors.Is(err, unix.ENETDOWN)
	})
}

func sendGroup(t *testing.T, h *lab.Host, group []byte) (c *net.UDPConn) {
	t.Helper()
	labtest.Do(t, h, func() (err error) {
		if err := h.AddRoute("239.0.0.0/8", "eth0"); err != nil {
			return err
		}
		c, err = net.DialUDP("udp4", nil, &net.UDPAddr{IP: group, Port: 5000})
		return err
	})
	t.Cleanup(func() { c.Close() })
	return c
}
