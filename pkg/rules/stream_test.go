package rules

import (
	"errors"
	"strings"
	"testing"
	"time"
)

// streamRule is a rule of inputs with blanks between.
func streamRule(t testing.TB, in, merge, failover string) Rule {
	t.Helper()
	r := Rule{Name: "cam", Out: []Output{mustOutput(t, "239.2.2.2:6000%out0")}}
	if err := r.ParseInputs(in); err != nil {
		t.Fatal(err)
	}
	if err := r.ParseStream(merge, failover); err != nil {
		t.Fatal(err)
	}
	return r
}

// A rule with several inputs is written and read back the same, as a file and as texts.
func TestStreamFormats(t *testing.T) {
	const two = "10.0.0.5@239.1.1.1:5000%eth0,vlan=7 10.0.1.5@239.101.1.1:5000%eth1,join=none"
	for _, r := range []Rule{
		streamRule(t, two, "rtp", ""),
		streamRule(t, two, "rtp,skew=450ms,reset=1m,other=pass", ""),
		streamRule(t, two+" 239.1.1.3:5000%eth2 239.1.1.4:5000%eth2", "rfc4175,window=262144", ""),
		streamRule(t, two, "field:10:8:count=18:2,skew=1.5s,reset=1h", ""),
		streamRule(t, two, "field:4:4le:count=2:1", ""),
		streamRule(t, two, "", "30ms"),
		streamRule(t, two, "", "1m,back=1h"),
	} {
		if err := r.Validate(); err != nil {
			t.Fatalf("%v: %v", r, err)
		}
		data, err := FormatFile([]Rule{r})
		if err != nil {
			t.Fatal(err)
		}
		back, err := ParseFile("f.yaml", data)
		if err != nil || len(back) != 1 || !Equal(back[0], r) {
			t.Errorf("%s\nis read back as %v, %v", data, back, err)
		}
		var again Rule
		merge, failover := r.FormatStream()
		if err := errors.Join(again.ParseInputs(r.FormatInputs()), again.ParseStream(merge, failover)); err != nil || !equalStream(again.Stream, r.Stream) || again.In != r.In {
			t.Errorf("%v is read back as %v, %v", r, again, err)
		}
	}
}

// Files have inputs as a list or in one text, in the shape that is scanned and in any other.
func TestStreamFiles(t *testing.T) {
	want := streamRule(t, "239.1.1.1:5000%eth0 239.1.1.2:5000%eth1,vlan=7", "rtp", "")
	for _, text := range []string{
		"rules:\n  - name: cam\n    in: [239.1.1.1:5000%eth0, \"239.1.1.2:5000%eth1,vlan=7\"]\n    merge: rtp\n    out: 239.2.2.2:6000%out0\n",
		"rules:\n  - name: cam\n    in:\n      - 239.1.1.1:5000%eth0\n      - \"239.1.1.2:5000%eth1,vlan=7\"\n    merge: rtp\n    out: 239.2.2.2:6000%out0\n",
		"rules:\n  - name: cam\n    in: \"239.1.1.1:5000%eth0 239.1.1.2:5000%eth1,vlan=7\"\n    merge: \"rtp\"\n    out: 239.2.2.2:6000%out0\n",
		"rules: [{name: cam, in: [239.1.1.1:5000%eth0, '239.1.1.2:5000%eth1,vlan=7'], merge: rtp, out: 239.2.2.2:6000%out0}]\n",
	} {
		if got, err := ParseFile("f.yaml", []byte(text)); err != nil || len(got) != 1 || !Equal(got[0], want) {
			t.Errorf("%s\nis read as %v, %v", text, got, err)
		}
	}
	for text, fault := range map[string]string{
		"rules:\n- name: cam\n  in:\n  - 239.1.1.1:5000%eth0\n  - 239.1.1.2%eth1\n  merge: rtp\n  out: 239.2.2.2:6000%out0\n":                                                                      `f.yaml:5: rule "cam": in[1].port missing: write :PORT: an input among several`,
		"rules:\n- name: cam\n  in:\n  - 239.1.1.1:5000%eth0\n  - nothing\n  merge: rtp\n  out: 239.2.2.2:6000%out0\n":                                                                             `f.yaml:5: rule "cam": input "nothing": interface missing: write ADDRESS[/LEN][:PORT]%INTERFACE`,
		"rules:\n- name: cam\n  in: [239.1.1.1:5000%eth0, 239.1.1.2:5000%eth1,vlan=7]\n  merge: rtp\n  out: 239.2.2.2:6000%out0\n":                                                                 `f.yaml:3: rule "cam": input "vlan=7": want an address before it: quote an input that has options, "ADDRESS:PORT%INTERFACE,vlan=7"`,
		"rules:\n- name: cam\n  in: [239.1.1.1:5000%eth0, 239.1.1.2:5000%eth1]\n  merge: mpeg\n  out: 239.2.2.2:6000%out0\n":                                                                       `f.yaml:4: rule "cam": merge "mpeg": want ` + wantFormat,
		"rules:\n- name: cam\n  in: [239.1.1.1:5000%eth0, 239.1.1.2:5000%eth1]\n  failover: 1ms\n  out: 239.2.2.2:6000%out0\n":                                                                     `f.yaml:4: rule "cam": failover "1ms": want a silence of 5ms to 1m`,
		"rules:\n- name: cam\n  in: [239.1.1.1:5000%eth0, [a]]\n  merge: rtp\n  out: 239.2.2.2:6000%out0\n":                                                                                        `f.yaml:3: rule "cam": in[1]: want text, not a list`,
		"rules:\n- {name: a, in: 239.1.1.2:5000%eth1, out: 239.2.2.3:6000%out0}\n- name: cam\n  in:\n  - 239.1.1.1:5000%eth0\n  - 239.1.1.2:5000%eth1\n  merge: rtp\n  out: 239.2.2.2:6000%out0\n": `f.yaml:6: rule "cam": in[1] "239.1.1.2:5000%eth1": want an input of its own: rule "a" (line 2) takes it`,
	} {
		if _, err := ParseFile("f.yaml", []byte(text)); err == nil || !strings.Contains(err.Error(), fault) {
			t.Errorf("%s\nis refused with\n%v\nwant\n%s", text, err, fault)
		}
	}
}

// What holds for inputs of several rules holds for several inputs of one.
func TestStreamSets(t *testing.T) {
	cam := streamRule(t, "239.1.1.1:5000%eth0 239.1.1.2:5000%eth1", "rtp", "")
	other := mustRule(t, "other 239.1.1.2:5000%eth1 -> 239.2.2.9:6000%out0")
	for _, set := range [][]Rule{{cam, other}, {other, cam}} {
		if err := ValidateSet(set); !errors.Is(err, ErrDuplicateInput) {
			t.Errorf("an input of two rules: %v", err)
		}
	}
	back := mustRule(t, "back 239.2.2.2:6000%out0 -> 239.1.1.2:5000%eth1")
	if err := ValidateSet([]Rule{cam, back}); !errors.Is(err, ErrLoop) {
		t.Errorf("a circle by the second input: %v", err)
	}
	self := cam
	self.Out = []Output{mustOutput(t, "239.1.1.2:5000%eth1")}
	if err := self.Validate(); !errors.Is(err, ErrLoop) {
		t.Errorf("an output that feeds the second input: %v", err)
	}
	range2 := mustRule(t, "range 239.1.1.2:4990-5010%eth1 -> 239.2.2.9:6000%out0")
	if err := ValidateSet([]Rule{cam, range2}); !errors.Is(err, ErrDuplicateInput) {
		t.Errorf("a range with the port of the second input: %v", err)
	}
	twice := cam
	twice.Out = other.Out
	if err := ValidateSet([]Rule{cam, twice}); !errors.Is(err, ErrDuplicateName) || strings.Count(err.Error(), "unique name") != 1 {
		t.Errorf("one name twice: %v", err)
	}
	wide := mustRule(t, "wide 239.1.1.2%eth1 -> 239.2.2.9:6000%out0")
	if o := Overlaps([]Rule{wide, cam}, 4); len(o[0]) != 1 || o[0][0] != (Overlap{Rule: 1, Wins: true}) || len(o[1]) != 1 || o[1][0].Rule != 0 {
		t.Errorf("overlaps %v", o)
	}
	changed := streamRule(t, "239.1.1.1:5000%eth0 239.1.1.3:5000%eth1", "rtp,skew=1ms", "")
	if text := Compute([]Rule{cam}, []Rule{changed}).String(); !strings.Contains(text, "in 239.1.1.1:5000%eth0 239.1.1.2:5000%eth1 => 239.1.1.1:5000%eth0 239.1.1.3:5000%eth1; merge rtp => rtp,skew=1ms") {
		t.Errorf("the change is %q", text)
	}
}

func FuzzParseStream(f *testing.F) {
	for _, s := range []string{"rtp", "rtp,skew=50ms,reset=1s,window=65536,other=pass", "field:0:4le:count=4:2", "field:503:8", "rtp,", "field:1:2:count=", "mdp3,skew=1.5s"} {
		f.Add(s, "30ms,back=2s")
	}
	f.Fuzz(func(t *testing.T, merge, failover string) {
		if m, err := ParseMerge(merge); err == nil {
			if back, err := ParseMerge(m.String()); err != nil || back != m {
				t.Errorf("%q: %+v is read back as %+v, %v", merge, m, back, err)
			}
		} else if m != (Merge{}) {
			t.Errorf("%q: an error and %+v", merge, m)
		}
		if x, err := ParseFailover(failover); err == nil {
			if back, err := ParseFailover(x.String()); err != nil || back != x || x.Silence < time.Microsecond {
				t.Errorf("%q: %+v is read back as %+v, %v", failover, x, back, err)
			}
		}
	})
}
