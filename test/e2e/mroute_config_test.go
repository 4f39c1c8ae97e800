package e2e_test

import (
	"encoding/binary"
	"encoding/json"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"xdpcast/internal/control"
	"xdpcast/internal/doctor"
	"xdpcast/internal/labtest"
)

// mirrors waits until there are this many routes, and this many of them are forwarded in XDP.
func (in *instance) mirrors(entries, accelerated int) (s *control.MrouteStatus) {
	in.t.Helper()
	eventually(in.t, fmt.Sprintf("%d of %d routes are forwarded in XDP", accelerated, entries), func() string {
		status, err := in.client.Status(in.t.Context())
		if err != nil {
			return err.Error()
		}
		if s = status.Mroutes; s == nil {
			return "none are mirrored"
		}
		if s.Entries != entries || s.Accelerated != accelerated {
			return fmt.Sprintf("%+v", s)
		}
		return ""
	})
	return s
}

// TestMrouteConfig: the file selects which routes are mirrored, a reload changes that, a missing
// confirmation restores the previous settings, and status and doctor report why the other routes
// are left to the kernel.
func TestMrouteConfig(t *testing.T) {
	n := newNetwork(t)
	router := labtest.NewRouter(t, n.relay, true, 0)
	other := labtest.NewRouter(t, n.relay, true, 100)
	for _, r := range []*labtest.Router{router, other} {
		for _, name := range []string{"in0", "out0", "out1"} {
			r.AddVIF(name, 1)
		}
	}
	for i := range 3 {
		router.Add(routedSource, fmt.Sprintf("239.1.%d.1", i), "in0", map[string]uint8{"out0": 1})
	}
	router.Add(routedSource, "239.1.9.1", "in0", map[string]uint8{"out1": 1})
	other.Add(routedSource, "239.3.1.1", "in0", map[string]uint8{"out0": 1})

	in := newInstance(t, n.relay)
	rule := "rules:\n  - {name: mine, in: 239.7.7.7:5000%in0, out: [239.8.8.8:5000%out0]}\n"
	file := in.write("rules.yaml", rule)
	in.start("-c", file)
	in.waitState("mine", control.StateActive)
	if status, err := in.client.Status(t.Context()); err != nil || status.Mroutes != nil {
		t.Errorf("without the section: %+v, %v", status.Mroutes, err)
	}

	in.write("rules.yaml", rule+"mroute: {}\n")
	if text := in.mustCLI("reload", "--dry-run"); !strings.Contains(text, "+ multicast routes of the kernel are mirrored\n") {
		t.Errorf("dry run: %s", text)
	}
	in.mustCLI("reload")
	in.mirrors(4, 4)
	id := in.rule("mine").ID

	// Fewer routes, by groups and interfaces.
	in.write("rules.yaml", rule+"mroute:\n  groups: [239.1.0.0/16]\n  leave: [239.1.2.0/24]\n  interfaces: [in0, out0]\n")
	if text := in.mustCLI("reload"); !strings.Contains(text, "> other multicast routes of the kernel are mirrored\n") {
		t.Errorf("reload: %s", text)
	}
	left := in.mirrors(4, 2).Left
	want := map[string]int{"its group is in a prefix left to the kernel": 1, "interface out1 is not mirrored": 1}
	for _, l := range left {
		if want[l.Reason] != l.Entries || !l.Expected {
			t.Errorf("left: %+v", l)
		}
	}
	text := in.mustCLI("status")
	for _, line := range []string{"4 multicast routes: 2 forwarded in XDP, 2 left to the kernel", "mroute/" + routedSource + "/239.1.2.1"} {
		if !strings.Contains(text, line) {
			t.Errorf("status lacks %q:\n%s", line, text)
		}
	}
	// Other tables; a fault changes nothing.
	in.write("rules.yaml", rule+"mroute:\n  tables: [main, 100]\n")
	in.mustCLI("reload")
	in.mirrors(5, 5)
	in.write("rules.yaml", rule+"mroute:\n  tables: [zero]\n")
	if got := in.cli("reload"); got.code != 1 || !strings.Contains(got.stderr, file+`:4: mroute.tables "zero": want main, or a number from 1 to 4294967295`) {
		t.Errorf("reload of a fault: %s", got)
	}
	if got := in.cli("check", file); got.code != 1 || !strings.Contains(got.stderr, file+":4: mroute.tables") {
		t.Errorf("check of a fault: %s", got)
	}
	in.mirrors(5, 5)

	// A change that is not confirmed, and one that is rolled back.
	in.write("rules.yaml", rule)
	if text := in.mustCLI("reload", "--confirm", "1s"); !strings.Contains(text, "- multicast routes of the kernel are mirrored\n") {
		t.Errorf("reload: %s", text)
	}
	in.mirrors(5, 5)
	in.mustCLI("reload")
	if text := in.mustCLI("rule", "list"); strings.Contains(text, "mroute/") {
		t.Errorf("routes without the section: %s", text)
	}
	if text := in.mustCLI("rollback", "1"); !strings.Contains(text, "+ multicast routes") {
		t.Errorf("rollback: %s", text)
	}
	in.mirrors(5, 5)
	if now := in.rule("mine").ID; now != id {
		t.Errorf("the rule of the file has number %d in the kernel, had %d", now, id)
	}

	// The doctor reports an interface that cannot send.
	if err := n.relay.SetUp("out1", false); err != nil {
		t.Fatal(err)
	}
	in.mirrors(5, 4)
	report := doctor.Report{}
	if err := json.Unmarshal([]byte(in.cli("doctor", "-o", "json").stdout), &report); err != nil {
		t.Fatal(err)
	}
	found := ""
	for _, s := range report.Sections {
		for _, f := range s.Findings {
			if f.Check == "routes" {
				found = f.Text
			}
		}
	}
	if want := "1 of 5 multicast routes are left to the kernel, the first mroute/" + routedSource + "/239.1.9.1: interface out1 is down"; found != want {
		t.Errorf("doctor says %q, want %q", found, want)
	}
}

// TestMrouteFlags: options and file must not both set it.
func TestMrouteFlags(t *testing.T) {
	n := newNetwork(t)
	in := newInstance(t, n.relay)
	file := in.write("rules.yaml", "rules: []\nmroute: {}\n")
	got := in.cli("run", "-c", file, "--mroute")
	if want := file + ":2: mroute: also given by --mroute: want it in only one place"; got.code != 1 || !strings.Contains(got.stderr, want) {
		t.Errorf("%s\nwant %s", got, want)
	}
	for flags, want := range map[string]string{
		"--mroute-group 239.0.0.0/8":                                             "--mroute-group without --mroute: want both",
		"--mroute --mroute-table 0":                                              `--mroute-table "0": want main, or a number from 1 to 4294967295`,
		"--mroute --mroute-family ip":                                            `--mroute-family "ip": want ipv4 or ipv6`,
		"--mroute --mroute-leave 10.0.0.0/8":                                     `--mroute-leave "10.0.0.0/8": want a prefix of multicast groups, such as 239.1.0.0/16, or a group`,
		"--mroute --mroute-joined x":                                             `--mroute-joined "x": want leave or take`,
		"--mroute --mroute-family ipv4 --mroute-group ff3e::/32":                 `--mroute-group "ff3e::/32": want IPv4 groups: families has only ipv4`,
		"--mroute --mroute-interface eth0 --mroute-interface eth0":               `--mroute-interface "eth0": want each value once`,
		"--mroute --mroute-interface a/b --mroute-joined take --mroute-table 10": `--mroute-interface "a/b": want an interface name`,
	} {
		if got := in.cli(append([]string{"run"}, strings.Fields(flags)...)...); got.code != 2 || !strings.Contains(got.stderr, want) {
			t.Errorf("%s: %s\nwant %s", flags, got, want)
		}
	}
}

// TestMrouteJoined: a group that a program on the router joins on the route's input is left to the
// kernel while joined, so that the program and the receiver beyond both get each packet.
func TestMrouteJoined(t *testing.T) {
	n := newNetwork(t)
	router := labtest.NewRouter(t, n.relay, true, 0)
	router.AddVIF("in0", 1)
	router.AddVIF("out0", 1)
	router.Add(routedSource, routedGroup, "in0", map[string]uint8{"out0": 1})
	in := newInstance(t, n.relay)
	file := in.write("rules.yaml", "rules: []\nmroute: {}\n")
	in.start("-c", file)
	in.mirrors(1, 1)

	frame := n.routedFrames(t, routedSource, routedGroup)[0].frame
	from, sink := labtest.NewTap(t, n.source, "src0"), labtest.NewTap(t, n.sinks[0], "sink0")
	group := netip.MustParseAddrPort(routedGroup + ":5000")
	program := labtest.Listen(t, n.relay, "in0", group)
	if left := in.mirrors(1, 0).Left; left[0].Reason != "a program on this host has joined its group on in0" || left[0].Expected {
		t.Errorf("left: %+v", left)
	}
	beyond := func(f []byte) bool { return len(f) >= 46 && binary.BigEndian.Uint16(f[36:]) == 5000 }
	received := make([]byte, 2048)
	for i := range 100 {
		from.Send(frame)
		if err := program.SetReadDeadline(time.Now().Add(labtest.Timeout)); err != nil {
			t.Fatal(err)
		}
		if _, err := program.Read(received); err != nil {
			t.Fatalf("packet %d: %v", i, err)
		}
		sink.Collect(1, beyond)
	}
	// A group that the relay itself joins for a rule is no program's.
	in.mustCLI("rule", "add", "own", "--in", routedGroup+":7000%in0", "--out", "239.8.8.8:7000%out0")
	if err := program.Close(); err != nil {
		t.Fatal(err)
	}
	in.mirrors(1, 1)
	before := in.rule("mroute/" + routedSource + "/" + routedGroup).Matched.Packets
	from.Send(frame)
	sink.Collect(1, beyond)
	if after := in.rule("mroute/" + routedSource + "/" + routedGroup).Matched.Packets; after != before+1 {
		t.Errorf("%d packets forwarded in XDP, want %d", after, before+1)
	}

	// Taken whether or not a program has joined.
	labtest.Listen(t, n.relay, "in0", group)
	in.mirrors(1, 0)
	in.write("rules.yaml", "rules: []\nmroute: {joined: take}\n")
	in.mustCLI("reload")
	in.mirrors(1, 1)
}
