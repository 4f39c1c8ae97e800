package main

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"strings"
)

// socat runs one process per output that receives datagrams and sends them on.
func socat() subject {
	return subject{
		name: "socat", what: "socat, a process for each output; destination and TTL its own, the rest the host's",
		rewrites: true, most: setup{Rules: 1},
		programs: []string{"socat"},
		start:    startSocat,
	}
}

func startSocat(ctx context.Context, n *network, _ options) (_ *running, err error) {
	r := &running{}
	var all cleanup
	r.stop = all.run
	defer func() {
		if err != nil {
			err = errors.Join(err, all.run())
		}
	}()
	for output := range n.setup.Outputs {
		from := fmt.Sprintf("UDP4-RECV:%d,reuseaddr,ip-add-membership=%v:in", groupPort, firstGroup)
		to := fmt.Sprintf("UDP4-DATAGRAM:%v:%d,ip-multicast-if=%v,ip-multicast-ttl=8", plus(firstOut, output), outPort+output, relayAddr(output%len(n.outs)))
		p, err := startProcess(n.relay, exec.Command("socat", "-u", "-b", fmt.Sprint(max(n.setup.Frame, 2048)), from, to))
		if err != nil {
			return nil, err
		}
		all.add(p.stop)
		r.pids = append(r.pids, p.cmd.Process.Pid)
	}
	// Each has joined the group once it can receive.
	joined := func() string {
		out, err := command(ctx, n.relay, "", "ip", "-4", "maddress", "show", "dev", "in")
		if err != nil {
			return err.Error()
		}
		users := ""
		for line := range strings.Lines(out) {
			if fields := strings.Fields(line); len(fields) > 1 && fields[1] == firstGroup.String() {
				users = strings.Join(fields[2:], " ")
			}
		}
		want := ""
		if n.setup.Outputs > 1 {
			want = fmt.Sprintf("users %d", n.setup.Outputs)
		}
		if !strings.Contains(out, firstGroup.String()) || users != want {
			return fmt.Sprintf("memberships of the input are %q", out)
		}
		return ""
	}
	return r, until(ctx, joined)
}
