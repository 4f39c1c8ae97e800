package main

import (
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"xdpcast/internal/lab"
)

// labCommand is a command to try in a lab.
type labCommand struct {
	About   string `json:"about"`
	Command string `json:"command"`
}

// commands are those to try in a lab that stays, as root.
func (p labPlaces) commands() ([]labCommand, error) {
	self, err := ownName()
	if err != nil {
		return nil, err
	}
	relay := self + " --socket " + p.socket() + " "
	inside := func(host string) string {
		return "nsenter --net=" + filepath.Join(lab.RunDir, p.namespace(host)) + " " + self + " "
	}
	bpftool := func(what, name, key string) string {
		return "bpftool map " + what + " pinned " + filepath.Join(p.pinDir(), name) + key
	}
	const first = " key 0 0 0 0" // the maps of rules and outputs are long arrays
	return []labCommand{
		{"the relay and its interfaces", relay + "status"},
		{"the rules", relay + "rule list"},
		{"the memberships", relay + "group list"},
		{"add a rule", relay + "rule add more --in 239.1.9.1:5000%eth0 --out 239.2.9.1:5000%eth1,ttl=8 --out 239.2.9.2:5000%eth2"},
		{"receive its packets on a sink, until Ctrl-C", inside("sink1") + "recv 239.2.9.1:5000%eth0"},
		{"send it some, from another terminal", inside(sourceHost) + "gen --rate 10k 239.1.9.1:5000%eth0"},
		{"watch the counters", relay + "stats --watch"},
		{"the flow table in the kernel", bpftool("dump", "flows4", "")},
		{"the first rule and the first output in the kernel", bpftool("lookup", "rules", first)},
		{"", bpftool("lookup", "outputs", first)},
		{"remove the lab", self + strings.TrimPrefix(p.removal(), "xdpcast")},
	}, nil
}

// ownName is how a shell finds this program.
func ownName() (string, error) {
	self, err := os.Executable()
	if err != nil {
		return "", err
	}
	if found, err := exec.LookPath("xdpcast"); err == nil {
		if found, err = filepath.EvalSymlinks(found); err == nil && found == self {
			return "xdpcast", nil
		}
	}
	return self, nil
}

// writeLabCommands shows the commands; none when there are none.
func writeLabCommands(w io.Writer, commands []labCommand) error {
	if len(commands) == 0 {
		return nil
	}
	if _, err := fmt.Fprintln(w, "\nThe lab stays, with its relay running. To try, as root:"); err != nil {
		return err
	}
	for _, c := range commands {
		if c.About != "" {
			fmt.Fprintf(w, "\n# %s\n", c.About)
		}
		if _, err := fmt.Fprintln(w, c.Command); err != nil {
			return err
		}
	}
	return nil
}
