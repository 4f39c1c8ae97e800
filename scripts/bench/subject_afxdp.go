package main

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

//go:embed ref/forward.c
var forwardSource string

// referenceAFXDP is ref/forward.c, written as the kernel's documentation suggests.
func referenceAFXDP() subject {
	return subject{
		name: "afxdp-c", what: "AF_XDP forwarder in C, one thread, copy mode: Ethernet addresses swapped, nothing else rewritten",
		most:     setup{Outputs: 1, Rules: 1, Frame: 3500, Queues: 1},
		programs: []string{"clang"},
		start:    startReference,
	}
}

func startReference(ctx context.Context, n *network, _ options) (*running, error) {
	program := filepath.Join(n.dir, "forward")
	if err := compile(ctx, forwardSource, program); err != nil {
		return nil, err
	}
	objs, err := attachXDP(n, func(o *forwardObjects) *ebpf.Program { return o.ToSocket })
	if err != nil {
		return nil, err
	}
	p, err := startForwarder(n, program, objs.Sockets)
	if err != nil {
		return nil, errors.Join(err, objs.Close())
	}
	stop := func() error { return errors.Join(p.stop(), objs.Close()) }
	if err := p.until(ctx, func() string {
		if strings.Contains(p.log.String(), "ready") {
			return ""
		}
		return "it is not ready"
	}); err != nil {
		return nil, errors.Join(err, stop())
	}
	return &running{stop: stop, pids: []int{p.cmd.Process.Pid}}, nil
}

// startForwarder starts the program and passes it the map of sockets.
func startForwarder(n *network, program string, sockets *ebpf.Map) (_ *process, err error) {
	fd, err := unix.FcntlInt(uintptr(sockets.FD()), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("duplicate the map of sockets: %w", err)
	}
	file := os.NewFile(uintptr(fd), "sockets")
	defer func() { err = errors.Join(err, file.Close()) }()
	cmd := exec.Command(program, "in", n.out(0), "3") // the first of ExtraFiles
	cmd.ExtraFiles = []*os.File{file}
	return startProcess(n.relay, cmd)
}

// compile builds a program from C.
func compile(ctx context.Context, source, program string) error {
	cmd := exec.CommandContext(ctx, "clang", "-O2", "-Wall", "-Wextra", "-Werror", "-x", "c", "-o", program, "-")
	cmd.Stdin = strings.NewReader(source)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("compile the reference forwarder: %w\n%s", err, out)
	}
	return nil
}
