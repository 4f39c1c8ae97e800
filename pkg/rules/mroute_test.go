package rules

import (
	"errors"
	"net/netip"
	"strings"
	"testing"
)

func TestMrouteSection(t *testing.T) {
	prefixes := func(all ...string) (out []netip.Prefix) {
		for _, s := range all {
			out = append(out, netip.MustParsePrefix(s))
		}
		return out
	}
	for _, c := range []struct {
		name, text string
		want       *Mroute
	}{
		{"none", "rules: []\n", nil},
		{"all", "rules: []\nmroute: {}\n", &Mroute{}},
		{"before the rules", "mroute: {}\nrules: []\n", &Mroute{}},
		{"tables", "rules: []\nmroute:\n  tables: [main, 100]\n", &Mroute{Tables: []uint32{0, 100}}},
		{"one value", "rules: []\nmroute:\n  tables: 7\n  families: ipv6\n", &Mroute{Tables: []uint32{7}, IPv6: true}},
		{"both families", "rules: []\nmroute: {families: [ipv4, ipv6]}\n", &Mroute{}},
		{"interfaces", "rules: []\nmroute: {interfaces: [eth0, vlan+]}\n", &Mroute{Interfaces: []string{"eth0", "vlan+"}}},
		{"groups", "rules: []\nmroute:\n  groups:\n    - 239.0.0.0/8\n    - 'ff3e::1'\n  leave: 239.9.9.9\n",
			&Mroute{Groups: prefixes("239.0.0.0/8", "ff3e::1/128"), Leave: prefixes("239.9.9.9/32")}},
		{"joined", "rules: []\nmroute: {joined: take}\n", &Mroute{TakeJoined: true}},
		{"joined as without", "rules: []\nmroute: {joined: leave}\n", &Mroute{}},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, err := ParseConfig("f", []byte(c.text), nil)
			if err != nil || !got.Mroute.Equal(c.want) {
				t.Fatalf("%+v, %v", got.Mroute, err)
			}
			again, err := ParseConfig("f", AppendMroute(EndFile(nil), got.Mroute), nil)
			if err != nil || !again.Mroute.Equal(c.want) {
				t.Errorf("written and read again: %+v, %v", again.Mroute, err)
			}
			if c.want != nil {
				if _, err := ParseFile("f", []byte(c.text)); err == nil || !strings.Contains(err.Error(), "mroute: want only rules here") {
					t.Errorf("as a file of rules alone: %v", err)
				}
			}
		})
	}
}

func TestMrouteFaults(t *testing.T) {
	for _, c := range []struct{ text, want string }{
		{"mroute:\n", "f:2: mroute: want a mapping (tables, families, interfaces, groups, leave, joined), or {} for all routes, not nothing"},
		{"mroute: true\n", "f:2: mroute: want a mapping (tables, families, interfaces, groups, leave, joined), or {} for all routes, not text"},
		{"mroute:\n  table: main\n", `f:3: unknown key "table": want tables, families, interfaces, groups, leave, joined`},
		{"mroute:\n  tables: [main, 0]\n", `f:3: mroute.tables "0": want main, or a number from 1 to 4294967295`},
		{"mroute:\n  tables:\n    - main\n    - main\n", `f:5: mroute.tables "main": want each value once`},
		{"mroute:\n  tables: 4294967296\n", `f:3: mroute.tables "4294967296": want main, or a number from 1 to 4294967295`},
		{"mroute:\n  families: [ipv5]\n", `f:3: mroute.families "ipv5": want ipv4 or ipv6`},
		{"mroute:\n  families: []\n", "f:3: mroute.families: want at least one value: without the key all are taken"},
		{"mroute:\n  interfaces: [a/b]\n", `f:3: mroute.interfaces "a/b": want an interface name without '/', ':', ',' or '%'`},
		{"mroute:\n  interfaces: {a: b}\n", "f:3: mroute.interfaces: want text, not a mapping"},
		{"mroute:\n  groups: [10.0.0.0/8]\n", `f:3: mroute.groups "10.0.0.0/8": want a prefix of multicast groups, such as 239.1.0.0/16, or a group`},
		{"mroute:\n  groups: [239.1.1.1/16]\n", `f:3: mroute.groups "239.1.1.1/16": want a prefix of multicast groups, such as 239.1.0.0/16, or a group`},
		{"mroute:\n  leave:\n", "f:3: mroute.leave: want text, not nothing"},
		{"mroute:\n  families: ipv4\n  groups: [239.0.0.0/8, 'ff3e::/32']\n", `f:4: mroute.groups "ff3e::/32": want IPv4 groups: families has only ipv4`},
		{"mroute:\n  families: ipv6\n  leave: 239.0.0.0/8\n", `f:4: mroute.leave "239.0.0.0/8": want IPv6 groups: families has only ipv6`},
		{"mroute:\n  joined: maybe\n", `f:3: mroute.joined "maybe": want leave or take`},
		{"mroute:\n  joined: [take]\n", "f:3: mroute.joined: want text, not a list"},
		{"mroute: {}\nmroute: {}\n", `f:3: key "mroute" given again: want it once`},
	} {
		got, err := ParseConfig("f", []byte("rules: []\n"+c.text), nil)
		var fault *FileError
		if got.Rules != nil || got.Mroute != nil || err == nil || err.Error() != c.want || !errors.As(err, &fault) {
			t.Errorf("%q:\n got  %v\n want %s", c.text, err, c.want)
		}
	}
	// Without rules a file is refused: it may be what is left of one that was cut off.
	if _, err := ParseConfig("f", []byte("mroute: {}\n"), nil); err == nil || !strings.Contains(err.Error(), "rules missing") {
		t.Errorf("without rules: %v", err)
	}
}

func TestMrouteIncluded(t *testing.T) {
	files := memory{"d/a.yaml": "rules: []\nmroute: {joined: take}\n", "d/b.yaml": "rules: []\nmroute: {}\n"}
	got, err := ParseConfig("f", []byte("include: d/a.yaml\n"), files)
	if err != nil || got.Mroute == nil || !got.Mroute.TakeJoined || got.MrouteFile != "d/a.yaml" || got.MrouteLine != 2 {
		t.Errorf("%+v, %v", got, err)
	}
	_, err = ParseConfig("f", []byte("include: d/*.yaml\n"), files)
	if want := "d/b.yaml:2: mroute: given already in d/a.yaml:2: want it once"; err == nil || err.Error() != want {
		t.Errorf("%v, want %s", err, want)
	}
}

// FuzzMroute: what is read of the section is written and read again as the same.
func FuzzMroute(f *testing.F) {
	for _, s := range []string{
		"{}", "{tables: [main, 100], families: [ipv4, ipv6], interfaces: [eth0, é+], groups: [239.0.0.0/8], leave: ['ff3e::/32'], joined: take}",
		"{families: ipv6, groups: 'ff00::/8'}", "{joined: leave}", "\n  tables: 7",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		got, err := ParseConfig("f", []byte("rules: []\nmroute: "+s+"\n"), nil)
		if err != nil {
			if got.Rules != nil || got.Mroute != nil {
				t.Errorf("%q: an error and %+v", s, got)
			}
			return
		}
		text := AppendMroute(EndFile(nil), got.Mroute)
		again, err := ParseConfig("f", text, nil)
		if err != nil || !again.Mroute.Equal(got.Mroute) {
			t.Errorf("%q: %+v is read back as %+v of %s, %v", s, got.Mroute, again.Mroute, text, err)
		}
	})
}
