package demo

import (
	"os/exec"
	"path/filepath"
	"strings"

	"xdpcast/internal/lab"
)

// Command is a shell command to try in a lab.
type Command struct {
	About   string `json:"about"`
	Command string `json:"command"`
}

// commands lists commands to try, as root, in a lab that stays.
func (p places) commands(program string) []Command {
	self := shellName(program)
	relay := self + " --socket " + p.socket() + " "
	inside := func(host string) string {
		return "nsenter --net=" + filepath.Join(lab.RunDir, p.namespace(host)) + " " + self + " "
	}
	bpftool := func(what, name, key string) string {
		return "bpftool map " + what + " pinned " + filepath.Join(p.pinDir(), name) + key
	}
	const first = " key 0 0 0 0" // the maps of rules and outputs are long arrays
	return []Command{
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
	}
}

// shellName is the shortest name by which a shell finds the program.
func shellName(program string) string {
	if found, err := exec.LookPath("xdpcast"); err == nil {
		if found, err = filepath.EvalSymlinks(found); err == nil && found == program {
			return "xdpcast"
		}
	}
	return program
}
