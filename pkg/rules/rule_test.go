package rules

import (
	"math/rand/v2"
	"slices"
	"testing"
)

func TestPath(t *testing.T) {
	for want, s := range []string{"auto", "kernel", "afxdp", "fanout"} {
		p, err := ParsePath(s)
		if err != nil || p != Path(want) || p.String() != s {
			t.Errorf("ParsePath(%q) = %v (%d), %v", s, p, p, err)
		}
	}
	for s, text := range map[string]string{
		"fast":   `path "fast": want auto, kernel, afxdp or fanout`,
		"Kernel": `path "Kernel": want auto, kernel, afxdp or fanout`,
		"":       `path missing: write auto, kernel, afxdp or fanout`,
	} {
		_, err := ParsePath(s)
		checkLines(t, err, text)
	}
	if s := Path(9).String(); s != "Path(9)" {
		t.Errorf("Path(9) is %q", s)
	}
}

func TestMulticast(t *testing.T) {
	for s, want := range map[string]bool{
		"239.1.1.1:1%eth0": true, "[ff3e::1]:1%eth0": true,
		"10.0.0.1:1%eth0": false, "[2001:db8::1]:1%eth0": false,
	} {
		if got := mustInput(t, s).Multicast(); got != want {
			t.Errorf("%s: %v", s, got)
		}
	}
	if (Input{}).Multicast() {
		t.Error("the zero input is multicast")
	}
}

func TestEqual(t *testing.T) {
	base := mustRule(t, "a 239.1.1.1:1%eth0 -> 239.1.1.2:1%eth1 239.1.1.3:1%eth1,ttl=4")
	if !Equal(base, mustRule(t, "a 239.1.1.1:1%eth0 -> 239.1.1.2:1%eth1 239.1.1.3:1%eth1,ttl=4")) {
		t.Error("equal rules differ")
	}
	for _, s := range []string{
		"b 239.1.1.1:1%eth0 -> 239.1.1.2:1%eth1 239.1.1.3:1%eth1,ttl=4",
		"a 239.1.1.1:2%eth0 -> 239.1.1.2:1%eth1 239.1.1.3:1%eth1,ttl=4",
		"a 239.1.1.1:1%eth0 -> 239.1.1.3:1%eth1,ttl=4 239.1.1.2:1%eth1",
		"a 239.1.1.1:1%eth0 -> 239.1.1.2:1%eth1 239.1.1.3:1%eth1,ttl=5",
		"a 239.1.1.1:1%eth0 -> 239.1.1.2:1%eth1",
	} {
		if Equal(base, mustRule(t, s)) {
			t.Errorf("%s: equal", s)
		}
	}
	path := base
	path.Path = PathKernel
	if Equal(base, path) {
		t.Error("rules of different paths are equal")
	}
}

func TestRuleString(t *testing.T) {
	r := mustRule(t, "cam1 10.0.0.5@239.1.1.1:5000%eth0 -> 239.2.2.2:6000%eth1 10.0.9.9:6000%eth2,ttl=16")
	r.Path = PathFanout
	const want = "cam1 10.0.0.5@239.1.1.1:5000%eth0 -> 239.2.2.2:6000%eth1 10.0.9.9:6000%eth2,ttl=16 path=fanout"
	if got := r.String(); got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
}

// TestCompare sorts in every order and expects one: interface, address, port,
// and of inputs that overlap the more specific first.
func TestCompare(t *testing.T) {
	var want []Input
	for _, s := range []string{
		"10.0.0.1:1%eth0",
		"10.0.0.5@239.1.1.1:1%eth0",
		"10.0.0.6@239.1.1.1:1%eth0",
		"239.1.1.1:1%eth0",
		"10.0.0.5@239.1.1.1:2%eth0",
		"239.1.1.2:1%eth0",
		"[2001:db8::5]@[ff3e::1]:1%eth0",
		"[ff3e::1]:1%eth0",
		"239.1.1.1:1%eth1",
	} {
		want = append(want, mustInput(t, s))
	}
	random := rand.New(rand.NewPCG(1, 2))
	for range 50 {
		got := slices.Clone(want)
		random.Shuffle(len(got), func(i, j int) { got[i], got[j] = got[j], got[i] })
		slices.SortFunc(got, Compare)
		if !slices.Equal(got, want) {
			t.Fatalf("got %v\nwant %v", got, want)
		}
	}
	for i, a := range want {
		for j, b := range want {
			if (Compare(a, b) == 0) != (i == j) || Compare(a, b) != -Compare(b, a) {
				t.Errorf("Compare(%v, %v) = %d, the reverse %d", a, b, Compare(a, b), Compare(b, a))
			}
		}
	}
}

func TestWinner(t *testing.T) {
	for _, c := range []struct{ a, b, want string }{
		{"10.0.0.5@239.1.1.1:1%eth0", "239.1.1.1:1%eth0", "10.0.0.5@239.1.1.1:1%eth0"},
		{"239.1.1.1:1%eth0", "239.1.1.1:1%eth0", "239.1.1.1:1%eth0"},
		{"10.0.0.5@239.1.1.1:1%eth0", "10.0.0.5@239.1.1.1:1%eth0", "10.0.0.5@239.1.1.1:1%eth0"},
		{"10.0.0.5@239.1.1.1:1%eth0", "10.0.0.6@239.1.1.1:1%eth0", ""},
		{"239.1.1.1:1%eth0", "239.1.1.1:1%eth1", ""},
		{"239.1.1.1:1%eth0", "239.1.1.1:2%eth0", ""},
		{"10.0.0.5@239.1.1.2:1%eth0", "239.1.1.1:1%eth0", ""},
	} {
		a, b := mustInput(t, c.a), mustInput(t, c.b)
		for range 2 {
			got, ok := Winner(a, b)
			if ok != (c.want != "") || ok && got.String() != c.want {
				t.Errorf("Winner(%v, %v) = %v, %v; want %q", a, b, got, ok, c.want)
			}
			a, b = b, a
		}
	}
}

// TestPortRangesClash: a port of a range goes to no other rule for the same group and
// senders, but ranges may be of different interfaces, senders and groups.
func TestPortRangesClash(t *testing.T) {
	base := "a 239.1.1.1:5000-5010%eth0 -> 239.2.2.2:+1000%eth9"
	const want = `rule "a": in "239.1.1.1:5000-5010%eth0": want ports that no other rule has for the same: rule "b" takes `
	for other, clash := range map[string]bool{
		"239.1.1.1:5005%eth0": true, "239.1.1.1:5010-5020%eth0": true, "239.1.1.1:5005%eth+": true, "239.1.1.1:4990-5990%+": true,
		"239.1.1.1:5011%eth0": false, "239.1.1.1%eth0": false, "10.0.0.1@239.1.1.1:5005%eth0": false, "10.0.0.0/8@239.1.1.1:5005-5006%eth0": false,
		"239.1.1.0/24:5005%eth0,join=none": false, "239.1.1.1:5005%eth1": false, "239.1.1.1:5005%eth0,vlan=7": false, "239.1.1.1:5000-5010%eth+": false,
	} {
		err := ValidateSet(mustRules(t, base, "b "+other+" -> 239.2.2.3:7%eth9"))
		if !clash {
			if err != nil {
				t.Errorf("%s: %v", other, err)
			}
			continue
		}
		f := fieldError(t, err)
		if f.Err != ErrDuplicateInput || len(errorLines(err)) != 1 || f.Rule == "a" && err.Error() != want+mustInput(t, other).String() {
			t.Errorf("%s: %v", other, err)
		}
	}
}
