package e2e_test

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/google/go-cmp/cmp"

	"xdpcast/internal/control"
	"xdpcast/internal/lab"
	"xdpcast/internal/labtest"
	"xdpcast/pkg/loader"
)

// everything is all state that a wrong request must not change.
type everything struct {
	Rules    []control.RuleStatus
	Groups   map[string][]netip.Addr
	Programs map[string]uint32
	Pins     map[string]uint32
	Files    []string
	State    string // saved rules
}

func (in *instance) everything() everything {
	in.t.Helper()
	if in.running != nil { // the daemon's first event makes a file, when it comes to it
		eventually(in.t, "the file of events is there", func() string {
			if _, err := os.Stat(loader.RunFile(in.runDir, in.pinDir, "events.ndjson")); err != nil {
				return err.Error()
			}
			return ""
		})
	}
	e := everything{
		Groups: igmp(in.t, in.host), Programs: attachedPrograms(in.t, in.host), Pins: pins(in.t, in.pinDir),
	}
	if in.running != nil {
		e.Rules = withoutCounters(in.rules())
	}
	files, err := os.ReadDir(in.runDir)
	if err != nil && !os.IsNotExist(err) {
		in.t.Fatal(err)
	}
	for _, f := range files {
		// A lock file cannot be removed: another process may be waiting for the lock. The file of events may be replaced
		// at any time.
		if filepath.Ext(f.Name()) != ".lock" && !strings.HasSuffix(f.Name(), "events.ndjson.next") {
			e.Files = append(e.Files, f.Name())
		}
	}
	state, err := os.ReadFile(loader.RunFile(in.runDir, in.pinDir, "api-rules.yaml"))
	if err != nil && !os.IsNotExist(err) {
		in.t.Fatal(err)
	}
	e.State = string(state)
	return e
}

// refused runs a command that must fail with this code and change nothing. Each line of stderr is
// given in full, without the program's name.
func (in *instance) refused(t *testing.T, code int, lines []string, args ...string) {
	t.Helper()
	in.refusedAs(t, nil, code, lines, args...)
}

func (in *instance) refusedAs(t *testing.T, attr *syscall.SysProcAttr, code int, lines []string, args ...string) {
	t.Helper()
	before := in.everything()
	got := in.cliAs(attr, args...)
	want := ""
	for _, line := range lines {
		want += "xdpcast: " + line + "\n"
	}
	if got.code != code || got.stdout != "" || got.stderr != want {
		t.Errorf("xdpcast %.200s: %s\nwant exit code %d\nstderr: %s", strings.Join(args, " "), got, code, want)
	}
	in.unchanged(t, before, "xdpcast "+strings.Join(args, " "))
}

func (in *instance) unchanged(t *testing.T, before everything, what string) {
	t.Helper()
	if d := cmp.Diff(before, in.everything(), cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); d != "" {
		t.Errorf("%.200s has changed something:\n%s", what, d)
	}
}

func TestBadRules(t *testing.T) {
	n := newNetwork(t)
	in := newInstance(t, n.relay)
	in.start()
	in.add("there", "239.1.1.1:5000%in0", "239.2.1.1:6000%out0")
	const goodOut = "239.2.2.2:6000%out1"
	tests := []struct {
		name    string
		input   string
		outputs []string
		more    []string
		code    int
		line    string
	}{
		{name: "neither group nor own address", input: "10.9.9.9:5000%in0", code: 1,
			line: `rule bad: address 10.9.9.9 is neither a multicast group nor an address of this host (on a router, take a prefix: it needs no address of this host)`},
		{name: "port 0", input: "239.1.1.2:0%in0", code: 2,
			line: `rule "bad": input "239.1.1.2:0%in0": port "0": want 1 to 65535, or no ':' for any port`},
		{name: "port 65536", input: "239.1.1.2:65536%in0", code: 2,
			line: `rule "bad": input "239.1.1.2:65536%in0": port "65536": want 1 to 65535, or no ':' for any port`},
		{name: "output port 0", input: "239.1.1.2:5000%in0", outputs: []string{"239.2.2.2:0%out0"}, code: 2,
			line: `rule "bad": output "239.2.2.2:0%out0": port "0": want 1 to 65535, +N or -N to shift the packet's, or no ':' to keep it`},
		{name: "no address", input: "cam1%in0", code: 2,
			line: `rule "bad": input "cam1%in0": address "cam1": want an IPv4 or IPv6 address`},
		{name: "no interface", input: "239.1.1.2:5000", code: 2,
			line: `rule "bad": input "239.1.1.2:5000": interface missing: write ADDRESS[/LEN][:PORT]%INTERFACE`},
		{name: "duplicate input", input: "239.1.1.1:5000%in0", code: 1,
			line: `rule "bad": in "239.1.1.1:5000%in0": want an input of its own: rule "there" takes it`},
		{name: "65 outputs", input: "239.1.1.2:5000%in0", outputs: manyOutputs(65), code: 2,
			line: `rule "bad": out "65 outputs": want 1 to 64 outputs`},
		{name: "feeds its own input", input: "239.1.1.2:5000%in0", outputs: []string{"239.1.1.2:5000%in0"}, code: 2,
			line: `rule "bad": out[0] "239.1.1.2:5000%in0": want no loop: it feeds the rule's own input, bad -> bad` + loopHint},
		{name: "interface name too long", input: "239.1.1.2:5000%in0", outputs: []string{"239.2.2.2:6000%averylonginterface"}, code: 2,
			line: `rule "bad": output "239.2.2.2:6000%averylonginterface": interface "averylonginterface": want at most 15 bytes`},
		{name: "output to this host", input: "239.1.1.2:5000%in0", outputs: []string{"10.2.1.1:6000%out0"}, code: 1,
			line: `rule bad: output 10.2.1.1:6000%out0: 10.2.1.1 is an address of this host: want another host's, or a multicast group`},
		{name: "prefix without a word on joining", input: "239.1.0.0/16%in0", code: 2,
			line: `rule "bad": in.join missing: write join=GROUP+GROUP... to join some, or join=none when the network floods the groups or another program joins them`},
		{name: "feeds itself through a prefix", input: "239.1.0.0/24%in0,join=none", outputs: []string{"239.1.0.7:5000%in0"}, code: 2,
			line: `rule "bad": out[0] "239.1.0.7:5000%in0": want no loop: it feeds the rule's own input, bad -> bad` + loopHint},
		{name: "port shifted out of range", input: "239.1.1.2:5000%in0", outputs: []string{"239.2.2.2:-5000%out1"}, code: 2,
			line: `rule "bad": out[0].port "-5000": want what leaves the input's port 5000 within 1 to 65535: it would be 0`},
		{name: "VLAN 4095", input: "239.1.1.2:5000%in0,vlan=4095", code: 2,
			line: `rule "bad": input "239.1.1.2:5000%in0,vlan=4095": option "vlan=4095": want vlan=ID or vlan=OUTER.ID, each 1 to 4094`},
		{name: "rate of nothing", input: "239.1.1.2:5000%in0,rate=0pps", code: 2,
			line: `rule "bad": input "239.1.1.2:5000%in0,rate=0pps": option "rate=0pps": want rate=Npps or rate=Nbit, N a number, or one with k, M or G (rate=100kpps, rate=50Mbit)`},
		{name: "unknown path", input: "239.1.1.2:5000%in0", more: []string{"--path", "warp"}, code: 2,
			line: `rule "bad": path "warp": want auto, kernel, afxdp or fanout`},
		{name: "unknown policy", input: "239.1.1.2:5000%in0", outputs: []string{"239.2.2.2:6000%out1,tll=3"}, code: 2,
			line: `rule "bad": output "239.2.2.2:6000%out1,tll=3": policy "tll=3": want KEY=VALUE, KEY one of src, sport, ttl, minttl, dscp, csum, vlan, pcp, broadcast, rate, burst`},
		{name: "TTL 256", input: "239.1.1.2:5000%in0", outputs: []string{"239.2.2.2:6000%out1,ttl=256"}, code: 2,
			line: `rule "bad": output "239.2.2.2:6000%out1,ttl=256": policy "ttl=256": want ttl=keep, ttl=dec or ttl=1 to 255`},
		{name: "source is a group", input: "239.9.9.9@239.1.1.2:5000%in0", code: 2,
			line: `rule "bad": in.source "239.9.9.9": want a unicast address: a group is never a source`},
		{name: "families mixed", input: "239.1.1.2:5000%in0", outputs: []string{"[ff3e::1]:6000%out1"}, code: 2,
			line: `rule "bad": out[0].address "ff3e::1": want the family of the input, 239.1.1.2: a rule cannot translate between IPv4 and IPv6`},
		{name: "loopback input", input: "239.1.1.2:5000%lo", code: 1,
			line: `rule bad: interface lo is the loopback: want one that leads to a network`},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if tt.outputs == nil {
				tt.outputs = []string{goodOut}
			}
			args := append([]string{"rule", "add", "bad", "--in", tt.input}, tt.more...)
			for _, o := range tt.outputs {
				args = append(args, "--out", o)
			}
			in.refused(t, tt.code, []string{tt.line}, args...)
			// The API itself gives the same answer.
			before := in.everything()
			rule := control.Rule{Name: "bad", In: tt.input, Out: tt.outputs}
			if len(tt.more) > 0 {
				rule.Path = tt.more[1]
			}
			_, err := in.client.AddRule(t.Context(), rule)
			if err == nil || err.Error() != tt.line {
				t.Errorf("the API says %v", err)
			}
			in.unchanged(t, before, "the API")
		})
	}

	bad := in.write("bad.yaml", badYAML)
	for _, tt := range []struct {
		code  int
		lines []string
		args  []string
	}{
		{1, []string{"rule there exists already (from the api): delete it first, or choose another name"},
			[]string{"rule", "add", "there", "--in", "239.1.1.2:5000%in0", "--out", goodOut}},
		{2, []string{`rule "a/b": name "a/b": want 1 to 63 bytes of A-Z a-z 0-9 . _ : -, a letter or digit first`},
			[]string{"rule", "add", "a/b", "--in", "239.1.1.2:5000%in0", "--out", goodOut}},
		{1, []string{"no rule is named nobody"}, []string{"rule", "del", "nobody"}},
		{1, []string{"no rule is named nobody"}, []string{"rule", "show", "nobody"}},
		{1, badYAMLFaults(bad), []string{"rule", "apply", bad}},
		{1, badYAMLFaults(bad), []string{"check", bad}},
		{1, []string{"nothing to reload: the relay was started without a file"}, []string{"reload"}},
	} {
		in.refused(t, tt.code, tt.lines, tt.args...)
	}
}

// loopHint ends the report of a loop.
const loopHint = " (loop=two-way on an input allows a loop between interfaces, loop=allow any loop: looping packets are detected and dropped)"

const badYAML = `rules:
  - name: a
    in: 239.1.1.2:5000%in0
    outs: [239.2.2.2:6000%out1]
  - name: b
    in: 239.1.1.3:0%in0
    out: [239.2.2.2:6000%out1]
  - name: c
    in: 239.1.1.4:5000%in0
    out: [239.2.2.4:6000%out1]
    path: warp
`

func badYAMLFaults(path string) []string {
	return []string{
		path + `:2: rule "a": out missing: write 1 to 64 outputs`,
		path + `:4: rule "a": unknown key "outs": want name, in, out, path, merge, failover`,
		path + `:6: rule "b": input "239.1.1.3:0%in0": port "0": want 1 to 65535, or no ':' for any port`,
		path + `:11: rule "c": path "warp": want auto, kernel, afxdp or fanout`,
	}
}

func manyOutputs(n int) []string {
	all := make([]string, n)
	for i := range all {
		all[i] = fmt.Sprintf("239.2.2.2:%d%%out0", 6000+i)
	}
	return all
}

func TestBadStart(t *testing.T) {
	n := newNetwork(t)
	in := newInstance(t, n.relay)
	nobody := &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}

	type try struct {
		as    *syscall.SysProcAttr
		code  int
		lines []string
		args  []string
	}
	check := func(tries []try) {
		t.Helper()
		for _, tt := range tries {
			in.refusedAs(t, tt.as, tt.code, tt.lines, tt.args...)
		}
	}
	absent, bad := in.dir+"/absent.yaml", in.write("bad.yaml", badYAML)
	broken, other := in.write("broken.yaml", "rules: [\n  - name: {"), in.write("other.yaml", "rulez: []\n")
	add := []string{"rule", "add", "x", "--in", "239.1.1.2:5000%in0", "--out", "239.2.1.1:6000%out0"}

	// Nothing is loaded.
	check([]try{
		{nil, 1, []string{"read configuration: open " + absent + ": no such file or directory"}, []string{"run", "-c", absent}},
		{nil, 1, []string{"read configuration: read " + in.dir + ": is a directory"}, []string{"run", "-c", in.dir}},
		{nil, 1, badYAMLFaults(bad), []string{"run", "-c", bad}},
		{nil, 1, []string{broken + ":1: did not find expected node content"}, []string{"run", "-c", broken}},
		{nil, 1, []string{other + `:1: unknown key "rulez": want rules, include, mroute`}, []string{"run", "-c", other}},
		{nil, 2, []string{`--mode: mode "fast": want native, generic or auto`}, []string{"run", "--mode", "fast"}},
		{nil, 2, []string{"--max-rules 99999999: want at most 16777216"}, []string{"run", "--max-rules", "99999999"}},
		{nil, 2, []string{"xdpcast load: --interface missing: name at least one"}, []string{"load"}},
		{nil, 1, []string{`interface "nosuch0" not found: "ip link" lists the interfaces`}, []string{"load", "-i", "nosuch0"}},
		{nil, 1, []string{"nothing is loaded in " + in.pinDir}, []string{"unload", "--all"}},
		{nil, 1, []string{"nothing is loaded in " + in.pinDir}, []string{"upgrade"}},
		{nil, 1, []string{"no xdpcast is running (no answer at " + in.socket + `): start one with "xdpcast run"`}, []string{"rule", "list"}},
		{nobody, 1, []string{"listen: open lock file: open " + in.socket + ".lock: permission denied: run it as root"}, []string{"run"}},
		{nobody, 1, []string{"without CAP_BPF, CAP_PERFMON, CAP_NET_ADMIN (see capabilities(7)): operation not permitted: run it as root"}, []string{"load", "-i", "in0"}},
	})

	in.start()
	in.add("there", "239.1.1.1:5000%in0", "239.2.1.1:6000%out0")
	listening := []string{"another xdpcast is listening at " + in.socket + ": stop it first, or choose another --socket"}
	owned := fmt.Sprintf("another xdpcast owns the pin directory %s (process %d): ", in.pinDir, in.running.cmd.Process.Pid)
	locked := []string{owned + "stop it first (the kernel keeps relaying), or change its rules and interfaces instead"}
	check([]try{
		{nil, 1, listening, []string{"run"}},
		{nil, 1, []string{owned + "stop it first (the kernel keeps relaying), or choose another --pin-dir"}, []string{"--socket", in.dir + "/second.sock", "run"}},
		{nil, 1, listening, []string{"run", "--pin-dir", in.dir + "/bpf/second"}},
		{nil, 1, locked, []string{"load", "-i", "in0"}},
		{nil, 1, locked, []string{"unload", "--all"}},
		{nil, 1, locked, []string{"upgrade"}},
		{nobody, 1, []string{"not allowed to reach " + in.socket + ": root is needed"}, add},
		{nobody, 1, []string{"not allowed to reach " + in.socket + ": root is needed"}, []string{"rule", "list"}},
		{nobody, 1, []string{"listen: open lock file: open " + in.socket + ".lock: permission denied: run it as root"}, []string{"run"}},
		{nobody, 1, []string{"open lock file: open " + in.runDir + "/" + strings.NewReplacer("-", "%2d", "/", "-").Replace(in.pinDir[1:]) + ".lock: permission denied: run it as root"}, []string{"unload", "--all"}},
	})
	for _, path := range []string{in.dir + "/second.sock", in.dir + "/bpf/second"} {
		if _, err := os.Stat(path); !os.IsNotExist(err) {
			t.Errorf("%s was left behind by a daemon that was refused: %v", path, err)
		}
	}
}

// TestAnothersProgram: an interface with another's XDP program is left alone, and what would be
// attached with it is not attached either.
func TestAnothersProgram(t *testing.T) {
	n := newNetwork(t)
	in := newInstance(t, n.relay)
	line := fmt.Sprintf("interface in0 already has an XDP program (program other, id %d), which is left alone: detach it first", attachOther(t, n.relay, "in0"))
	in.refused(t, 1, []string{line}, "load", "-i", "out0", "-i", "in0")
	in.start()
	in.refused(t, 1, []string{"rule x: " + line}, "rule", "add", "x", "--path", "kernel", "--in", "239.1.1.2:5000%in0", "--out", "239.2.1.1:6000%out0")
	// The packet tap needs no program.
	in.add("x", "239.1.1.3:5000%in0", "239.2.1.1:6000%out0")
	if s := in.rule("x"); s.UsedPath != "fanout" || s.Reason != "path fanout: "+line {
		t.Errorf("path %s, %q", s.UsedPath, s.Reason)
	}

	// It does not matter on an output: the driver sends anyway.
	in.add("y", "239.1.1.2:5000%out0", "239.2.1.1:6000%in0")
}

// attachOther attaches a foreign program and returns its id.
func attachOther(t *testing.T, h *lab.Host, ifname string) ebpf.ProgramID {
	t.Helper()
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: "other", Type: ebpf.XDP, License: "Dual BSD/GPL",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 2), asm.Return()}, // XDP_PASS
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Close() })
	index := linkIndex(t, h, ifname)
	var l link.Link
	labtest.Do(t, h, func() (err error) {
		l, err = link.AttachXDP(link.XDPOptions{Program: p, Interface: index})
		return err
	})
	t.Cleanup(func() { l.Close() })
	info, err := p.Info()
	if err != nil {
		t.Fatal(err)
	}
	id, _ := info.ID()
	return id
}
