package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// testpmd is DPDK's forwarder with one of its drivers for the kernel's devices.
func testpmd(driver string) subject {
	return subject{
		name:  "testpmd-" + strings.ReplaceAll(driver, "_", "-"),
		what:  "DPDK testpmd over net_" + driver + ", one thread that never sleeps: Ethernet addresses swapped, nothing else rewritten",
		spins: true, most: setup{Outputs: 1, Rules: 1, Frame: 1514, Queues: 1}, programs: []string{"dpdk-testpmd", "stdbuf"},
		start: func(ctx context.Context, n *network, _ options) (*running, error) {
			return startTestpmd(ctx, n, driver)
		},
	}
}

func startTestpmd(ctx context.Context, n *network, driver string) (*running, error) {
	// It ends at the end of its input. Without stdbuf it would say that it is ready when it ends.
	input, keep, err := os.Pipe()
	if err != nil {
		return nil, fmt.Errorf("make input of testpmd: %w", err)
	}
	cmd := exec.Command("stdbuf", "-oL", "dpdk-testpmd", "--no-huge", "-m", "256", "--no-pci", "--no-telemetry",
		"-l", "0-1", "--file-prefix", n.relay.Name,
		fmt.Sprintf("--vdev=net_%s0,iface=in", driver), fmt.Sprintf("--vdev=net_%s1,iface=%s", driver, n.out(0)),
		"--", "--auto-start", "--no-mlockall", "--forward-mode=macswap", "--nb-cores=1", "--total-num-mbufs=16384")
	cmd.Stdin = input
	p, err := startProcess(n.relay, cmd)
	if err = errors.Join(err, input.Close()); err != nil {
		return nil, errors.Join(err, keep.Close())
	}
	// It cannot end while its thread waits for room in a ring (poll without a timeout in
	// drivers/net/af_packet of DPDK), and keeps nothing that an orderly end would save.
	stop := func() error {
		return errors.Join(p.kill(), keep.Close(), os.RemoveAll(filepath.Join("/var/run/dpdk", n.relay.Name)))
	}
	if err := p.until(ctx, func() string {
		if strings.Contains(p.log.String(), "Press enter to exit") {
			return ""
		}
		return "it does not forward yet"
	}); err != nil {
		return nil, errors.Join(err, stop())
	}
	return &running{stop: stop, pids: []int{p.cmd.Process.Pid}}, nil
}
