package rules

import (
	"errors"
	"slices"
	"strings"
	"testing"
)

func FuzzParseInput(f *testing.F) {
	for _, s := range []string{
		"239.1.1.1:5000%eth0", "10.0.0.5@239.1.1.1:5000%eth0", "2001:db8::5@[ff3e::1]:5000%eth0", "[::1]@[::]:1%é",
		"[fe80::1%eth0]:5000%eth1", "239.1.0.0/16%eth0", "@:%", "[]:1%e", "[%]", "239.1.1.1:5%eth0,ttl=8", "239.1.1.1:05%eth+",
		"10.0.0.0/24@239.1.1.1:5000-5010%e,except=10.0.0.7+10.0.0.64/26", "2001:db8::/32@[ff05::1]:1-2%e", "224.0.0.0/4%e,join=none", "239.1.1.1:5%e,from=host,vlan=7", "1.2.3.4/@239.1.1.1:1-%e",
		"224.0.0.251:5353%eth0,local-control=allow", "255.255.255.255:9%e,broadcast=allow", "[ff02::fb]:1%e,local-control=allow,broadcast=allow",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		in, accept, err := ParseInput(s)
		if err != nil {
			if in != (Input{}) {
				t.Errorf("%q: an error and %+v", s, in)
			}
			checkParseError(t, err, "input ")
			return
		}
		if back, again, err := ParseInput(FormatInput(in, accept)); err != nil || back != in || !equalAcceptance(again, accept) {
			t.Errorf("%q: %+v is read back as %+v, %v", s, in, back, err)
		}
		checkPair(t, Rule{Name: "a", In: in, Out: []Output{{Interface: in.Interface, Address: in.Address, Port: in.Port}}})
	})
}

func FuzzParseOutput(f *testing.F) {
	for _, s := range []string{
		"239.2.2.2:6000%eth1", "239.2.2.2:6000%eth1,ttl=8,src=keep,dscp=af41", "[ff3e::2]:1%e,src=[2001:db8::1]:7,csum=update",
		"1.2.3.4:5%e,src=1.2.3.4:5,sport=6", "1.2.3.4:5%e,sport=1,src=::", "1.2.3.4:5%e,dscp=CS7,dscp=1", "1.2.3.4:5%e,,", "10.0.0.5@1.2.3.4:5%e",
		"255.255.255.255:9%e,broadcast=allow", "224.0.0.251:5353%e,broadcast=allow,broadcast=allow",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		out, err := ParseOutput(s)
		if err != nil {
			if out != (Output{}) {
				t.Errorf("%q: an error and %+v", s, out)
			}
			checkParseError(t, err, "output ")
			return
		}
		if back, err := ParseOutput(out.String()); err != nil || back != out {
			t.Errorf("%q: %+v is read back as %+v, %v", s, out, back, err)
		}
		checkPair(t, Rule{Name: "a", In: Input{Interface: out.Interface, Address: out.Address, Port: out.Port}, Out: []Output{out}})
	})
}

// checkParseError holds the errors of the endpoint parsers to their form.
func checkParseError(t *testing.T, err error, prefix string) {
	t.Helper()
	f := fieldError(t, err)
	if f.Field == "" || f.Want == "" || !strings.HasPrefix(err.Error(), prefix) || len(errorLines(err)) != 1 {
		t.Errorf("error %q, %+v", err, *f)
	}
}

// checkPair validates a rule alone and beside its mirror image, and writes it
// and reads it back if it is valid.
func checkPair(t *testing.T, r Rule) {
	t.Helper()
	if mirror, ok := mirrorRule(r); ok && ValidateSet([]Rule{r, mirror}) == nil {
		t.Errorf("%v and %v: no loop", r, mirror)
	}
	if r.Validate() != nil {
		return
	}
	data, err := FormatFile([]Rule{r})
	if err != nil {
		t.Fatal(err)
	}
	if back, err := ParseFile("f", data); err != nil || len(back) != 1 || !Equal(back[0], r) {
		t.Errorf("%+v is read back as %+v, %v", r, back, err)
	}
}

func FuzzParseFile(f *testing.F) {
	for _, s := range []string{
		"", "rules: []", "rules:\n- name: a\n  in: 239.1.1.1:1%eth0\n  out: 239.1.1.2:1%eth1\n",
		"rules:\n  - name: cam1\n    in: 10.0.0.5@239.1.1.1:5000%eth0\n    out: [239.2.2.2:6000%eth1, \"10.0.9.9:6000%eth2,ttl=16\"]\n    path: auto # x\n",
		"rules:\n- {name: a, in: 239.1.1.1:1%e, out: 239.1.1.2:1%e}\n- {name: b, in: 239.1.1.2:1%e, out: 239.1.1.1:1%e}\n",
		"a: &a [*a]\nrules: *a\n<<: *a\n", "--- x\n--- y\n", "rules:\n- name: [\n", "%YAML 1.1\n---\n? a\n: !!str b\n", "\xff\xfea\x00", "- |\n x\n\n- >-\n  y", "'\\\"", "\r\n\t: {",
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		rules, err := ParseFile("f.yaml", data)
		if err != nil {
			if rules != nil {
				t.Errorf("rules %v beside the error %v", rules, err)
			}
			checkFileError(t, err, len(data))
			return
		}
		if err := ValidateSet(rules); err != nil {
			t.Fatal(err)
		}
		text, err := FormatFile(rules)
		if err != nil {
			t.Fatal(err)
		}
		if back, err := ParseFile("f.yaml", text); err != nil || !slices.EqualFunc(back, rules, Equal) {
			t.Errorf("%v is read back as %v, %v from\n%s", rules, back, err, text)
		}
	})
}

// checkFileError holds the error of a file to its form: one line a fault, each
// with the file's name and a line that the file can have.
func checkFileError(t *testing.T, err error, size int) {
	t.Helper()
	list := joined(t, err)
	if len(list) == 0 || len(list) > maxFaults+1 || len(errorLines(err)) != len(list) {
		t.Errorf("%d faults in %d lines: %q", len(list), len(errorLines(err)), err)
	}
	last := 0
	for i, err := range list {
		var f *FileError
		if !errors.As(err, &f) || f.File != "f.yaml" || f.Line > size+1 || f.Line < last && i < maxFaults {
			t.Errorf("%q: %+v", err, f)
			continue
		}
		last = f.Line
	}
}
