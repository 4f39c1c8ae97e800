package rules

import (
	"bytes"
	"errors"
	"slices"
	"strings"
	"testing"
)

type goodFile struct {
	name, text string
	want       []Rule
}

func goodFiles(t testing.TB) []goodFile {
	two := mustRules(t,
		"cam1 10.0.0.5@239.1.1.1:5000%eth0 -> 239.2.2.2:6000%eth1 10.0.9.9:6000%eth2,ttl=16",
		"1.50 239.1.1.2:5000%eth0 -> 239.2.2.3:6000%eth1,src=keep")
	two[1].Path = PathKernel
	return []goodFile{
		{"empty list", "rules: []\n", nil},
		{"empty list of lines", "# none\n---\nrules:\n  []\n", nil},
		{"plain", `
rules:
  - name: cam1
    in: 10.0.0.5@239.1.1.1:5000%eth0
    out: [239.2.2.2:6000%eth1, "10.0.9.9:6000%eth2,ttl=16"]
    path: auto     # optional
  - name: 1.50
    in: 239.1.1.2:5000%eth0
    out: 239.2.2.3:6000%eth1,src=keep
    path: kernel
`, two},
		{"other ways to write it", `--- # one document
{"rules": [{"out": ["239.2.2.2:6000%eth1", '10.0.9.9:6000%eth2,ttl=16'], "in": "10.0.0.5@239.1.1.1:5000%eth0", "name": "cam1"},
 {name: !!str 1.50, path: kernel, in:
    239.1.1.2:5000%eth0
  , out: &unused '239.2.2.3:6000%eth1,src=keep'}]}
...
`, two},
		{"carriage returns", "rules:\r\n- name: a\r\n  in: 239.1.1.1:1%eth0\r\n  out:\r\n  - 239.1.1.2:1%eth1\r\n",
			mustRules(t, "a 239.1.1.1:1%eth0 -> 239.1.1.2:1%eth1")},
		{"IPv6", "rules:\n- name: a\n  in: \"[ff0e::1]:1%eth0\"\n  out: '[ff0e::2]:1%eth1'\n",
			mustRules(t, "a [ff0e::1]:1%eth0 -> [ff0e::2]:1%eth1")},
	}
}

func TestParseFile(t *testing.T) {
	for _, c := range goodFiles(t) {
		t.Run(c.name, func(t *testing.T) {
			checkScan(t, []byte(c.text))
			got, err := ParseFile("f.yaml", []byte(c.text))
			if err != nil || !slices.EqualFunc(got, c.want, Equal) {
				t.Errorf("got %v, %v\nwant %v", got, err, c.want)
			}
		})
	}
}

type faultyFile struct {
	name, text string
	want       []string // without the file's name
}

func faultyFiles() []faultyFile {
	const name63 = "1 to 63 bytes of A-Z a-z 0-9 . _ : -, a letter or digit first"
	const oneRule = "rules:\n- name: a\n  in: 239.1.1.1:1%eth0\n  out: 239.1.1.2:1%eth1\n"
	const noRules = `rules missing: want them in a list below "rules:", or "rules: []" for none`
	return []faultyFile{
		{"empty", "", []string{" " + noRules}},
		{"blank", " \n\n", []string{" " + noRules}},
		{"comment", "# nothing yet\n", []string{" " + noRules}},
		{"document mark", "---\n", []string{" " + noRules}},
		{"null", "~", []string{" " + noRules}},
		{"cut off behind the key", "# head\nrules:\n", []string{"2: " + noRules}},
		{"null as rules", "rules: null\n", []string{"1: " + noRules}},
		{"empty mapping", "{}", []string{"1: " + noRules}},
		{"not a mapping", "- a", []string{`1: want a mapping (rules, include, mroute), not a list`}},
		{"text", "\n\nhello", []string{`3: want a mapping (rules, include, mroute), not text`}},
		{"tagged", "!!binary x", []string{`1: want a mapping (rules, include, mroute), not a value tagged "!!binary"`}},
		{"unknown top key", "rule: []\nRules: []", []string{`1: unknown key "rule": want rules, include, mroute`, `2: unknown key "Rules": want rules, include, mroute`}},
		{"repeated top key", "rules: []\n\nrules: []", []string{`3: key "rules" given again: want it once`}},
		{"odd keys", "? [a]\n: 1\n? {b: c}\n: 2\n~: 3\n<<: {}\n", []string{
			`1: key: want rules, include, mroute, not a list`, `3: key: want rules, include, mroute, not a mapping`, `5: unknown key "": want rules, include, mroute`, `6: unknown key "<<": want rules, include, mroute`}},
		{"rules is text", "rules: x", []string{`1: rules: want a list, not text`}},
		{"rules is a mapping", "rules:\n  cam1: {}", []string{`2: rules: want a list, not a mapping`}},
		{"rules is an alias", "x: &x []\nrules: *x", []string{`1: unknown key "x": want rules, include, mroute`, `2: rules: want a list, not an alias: aliases are not supported`}},
		{"rule of the wrong type", "rules:\n- a\n-\n- [b]\n", []string{
			`2: rule "#1": want a mapping (name, in, out, path, merge, failover), not text`,
			`3: rule "#2": want a mapping (name, in, out, path, merge, failover), not nothing`,
			`4: rule "#3": want a mapping (name, in, out, path, merge, failover), not a list`}},
		{"missing keys", "rules:\n\n- name: a\n- in: 239.1.1.1:1%eth0\n", []string{
			`3: rule "a": in missing: write [SOURCE@]ADDRESS[/LEN][:PORT]%INTERFACE[,option...]`,
			`3: rule "a": out missing: write 1 to 64 outputs`,
			`4: rule "#2": name missing: write ` + name63,
			`4: rule "#2": out missing: write 1 to 64 outputs`}},
		{"empty values", "rules:\n- name:\n  in:\n  out:\n  path:\n- name: ''\n  in: ''\n  out: ''\n- name: c\n  in: 239.1.1.1:1%eth0\n  out: []\n- name: d\n  in: 239.1.1.2:1%eth0\n  out:\n  -\n", []string{
			`2: rule "#1": name missing: write ` + name63,
			`3: rule "#1": input "": interface missing: write ADDRESS[/LEN][:PORT]%INTERFACE`,
			`4: rule "#1": out missing: write 1 to 64 outputs`,
			`5: rule "#1": path missing: write auto, kernel, afxdp or fanout`,
			`6: rule "#2": name missing: write ` + name63,
			`7: rule "#2": input "": interface missing: write ADDRESS[/LEN][:PORT]%INTERFACE`,
			`8: rule "#2": output "": interface missing: write ADDRESS[/LEN][:PORT]%INTERFACE`,
			`11: rule "c": out missing: write 1 to 64 outputs`,
			`15: rule "d": output "": interface missing: write ADDRESS[/LEN][:PORT]%INTERFACE`}},
		{"wrong types", "rules:\n- name: [a]\n  in: {}\n  out: {}\n  path: []\n- name: b\n  in: !!int 5\n  out: [[x], {y: z}, !!float 1]\n", []string{
			`2: rule "#1": name: want text, not a list`,
			`3: rule "#1": in: want text, not a mapping`,
			`4: rule "#1": out: want a list of outputs, not a mapping`,
			`5: rule "#1": path: want text, not a list`,
			`7: rule "b": in: want text, not a value tagged "!!int"`,
			`8: rule "b": out[0]: want text, not a list`,
			`8: rule "b": out[1]: want text, not a mapping`,
			`8: rule "b": out[2]: want text, not a value tagged "!!float"`}},
		{"unknown and repeated keys in a rule", oneRule + "  nmae: x\n  in: 239.1.1.3:1%eth0\n  IN: y\n", []string{
			`5: rule "a": unknown key "nmae": want name, in, out, path, merge, failover`,
			`6: rule "a": key "in" given again: want it once`,
			`7: rule "a": unknown key "IN": want name, in, out, path, merge, failover`}},
		{"aliases", "rules:\n- name: &n a\n  in: &i 239.1.1.1:1%eth0\n  out: &o [239.1.1.2:1%eth1]\n- name: *n\n  in: *i\n  out: *o\n- &r\n  name: c\n  in: 239.1.1.3:1%eth0\n  out: [*i]\n- *r\n- {<<: *r, name: e}\n", []string{
			`5: rule "#2": name: want text, not an alias: aliases are not supported`,
			`6: rule "#2": in: want text, not an alias: aliases are not supported`,
			`7: rule "#2": out: want a list of outputs, not an alias: aliases are not supported`,
			`11: rule "c": out[0]: want text, not an alias: aliases are not supported`,
			`12: rule "#4": want a mapping (name, in, out, path, merge, failover), not an alias: aliases are not supported`,
			`13: rule "e": unknown key "<<": want name, in, out, path, merge, failover`,
			`13: rule "e": in missing: write [SOURCE@]ADDRESS[/LEN][:PORT]%INTERFACE[,option...]`,
			`13: rule "e": out missing: write 1 to 64 outputs`}},
		{"endpoints", "rules:\n- name: a\n  in: 239.1.1.1:70000%eth0\n  out:\n  - 239.1.1.2:1%eth1\n  - 239.1.1.2:x%eth1\n  - 239.1.1.2:2%eth1,ttl=0\n  path: fast\n", []string{
			`3: rule "a": input "239.1.1.1:70000%eth0": port "70000": want 1 to 65535, or no ':' for any port`,
			`6: rule "a": output "239.1.1.2:x%eth1": port "x": want 1 to 65535, +N or -N to shift the packet's, or no ':' to keep it`,
			`7: rule "a": output "239.1.1.2:2%eth1,ttl=0": policy "ttl=0": want ttl=keep, ttl=dec or ttl=1 to 255`,
			`8: rule "a": path "fast": want auto, kernel, afxdp or fanout`}},
		{"name after the fault", "rules:\n- in: x\n  out: 239.1.1.2:1%eth1\n  name: late\n", []string{
			`2: rule "late": input "x": interface missing: write ADDRESS[/LEN][:PORT]%INTERFACE`}},
		{"policy without quotes in a list", "rules:\n- name: a\n  in: 239.1.1.1:1%eth0\n  out: [239.1.1.2:1%eth1,ttl=4]\n", []string{
			`4: rule "a": output "ttl=4": want an address before it: quote an output that has policies, "ADDRESS:PORT%INTERFACE,ttl=4"`}},
		{"meaning", "rules:\n- name: a b\n  in: 232.1.1.1:1%eth0\n  out:\n  - 127.0.0.1:1%eth1\n  - 239.1.1.1:1%eth1\n  - 239.1.1.1:1%eth1,ttl=3\n", []string{
			`2: rule "a b": name "a b": want ` + name63,
			`3: rule "a b": in.source missing: write SOURCE@232.1.1.1: groups of 232.0.0.0/8 need a source (RFC 4607 section 4.1)`,
			`5: rule "a b": out[0].address "127.0.0.1": want an address outside 127.0.0.0/8, loopback (RFC 1122 section 3.2.1.3)`,
			`7: rule "a b": out[2] "239.1.1.1:1%eth1,ttl=3": want another interface, address, port or VLAN: out[1] has these`}},
		{"between rules", oneRule + "- in: 239.1.1.1:1%eth0\n  name: a\n  out: 239.1.1.2:1%eth1\n- name: x\n  in: 239.1.1.2:1%eth1\n  out: [239.1.1.9:9%eth9, 239.1.1.1:1%eth0]\n", []string{
			`5: rule "a": in "239.1.1.1:1%eth0": want an input of its own: rule "a" (line 2) takes it`,
			`6: rule "a": name "a": want a unique name: rule #1 (line 2) has it`,
			`10: rule "x": out[1] "239.1.1.1:1%eth0": want no loop between rules: a (line 2) -> x (line 8) -> a` + insist}},
		{"a second document", oneRule + "---\nrules: []\n", []string{`5: a second document: want only one`}},
		{"an empty second document", oneRule + "---\n", []string{`5: a second document: want only one`}},
		{"a broken second document", oneRule + "---\na: b: c\n", []string{`6: mapping values are not allowed in this context`}},

		{"tab", "rules:\n\t- name: a\n", []string{`2: found character that cannot start any token (indent with spaces: YAML does not allow tabs)`}},
		{"indentation", "rules:\n  - name: a\n   in: b\n  - name: c\n", []string{`3: did not find expected '-' indicator`}},
		{"indentation, far down", strings.Repeat("# comment\n", 5000) + "rules:\n  - name: a\n   in: b\n\n\n\n  - name: c\n", []string{`5003: did not find expected '-' indicator`}},
		{"list not closed", "rules:\n- name: a\n  in: b\n  out: [\n    c,\n    d\n  path: auto\n- name: e\n  in: f\n", []string{`6: did not find expected ',' or ']'`}},
		{"quote not closed", "rules:\n- name: \"a\n  in: b\n- name: c\n", []string{`2: found unexpected end of stream`}},
		{"brackets without quotes", "rules:\n- name: a\n  in: [ff0e::1]:1%eth0\n  out: x\n- name: b\n", []string{`3: did not find expected key (an endpoint that begins with "[" needs quotes)`}},
		{"unknown anchor", "rules:\n- name: a\n  in: *b\n  out: c\n", []string{`3: unknown anchor 'b' referenced`}},
		{"first line", "a: b: c", []string{`1: mapping values are not allowed in this context`}},
		{"not UTF-8", "rules:\n- name: \xff\n", []string{`2: invalid leading UTF-8 octet`}},
		{"too deep", strings.Repeat("[", 20_000), []string{`1: exceeded max depth of 10000`}},
	}
}

func TestParseFileErrors(t *testing.T) {
	for _, c := range faultyFiles() {
		t.Run(c.name, func(t *testing.T) {
			checkScan(t, []byte(c.text))
			got, err := ParseFile("f.yaml", []byte(c.text))
			if got != nil {
				t.Errorf("rules %v beside the error", got)
			}
			var want []string
			for _, line := range c.want {
				want = append(want, "f.yaml:"+line)
			}
			checkLines(t, err, want...)
			for _, err := range joined(t, err) {
				if _, ok := err.(*FileError); !ok {
					t.Errorf("%T in the list", err)
				}
			}
		})
	}
}

// TestFileErrorsMatch: the classes and fields of faults are there behind the lines.
func TestFileErrorsMatch(t *testing.T) {
	_, err := ParseFile("f.yaml", []byte("rules:\n- name: a\n  in: 239.1.1.1:1%eth0\n  out: 239.1.1.2:1%eth1\n- name: a\n  in: 239.1.1.1:0%eth0\n  out: 239.1.1.1:1%eth0\n"))
	if !errors.Is(err, ErrDuplicateName) || errors.Is(err, ErrDuplicateInput) {
		t.Errorf("%v: want a duplicate name alone", err)
	}
	var file *FileError
	if !errors.As(err, &file) || file.File != "f.yaml" || file.Line != 5 {
		t.Errorf("%+v", file)
	}
	if f := fieldError(t, err); f.Field != "name" || f.Value != "a" || f.Rule != "a" {
		t.Errorf("%+v", f)
	}
}

func TestFileFaultsAreCapped(t *testing.T) {
	// Each rule: input unreadable, outputs missing; each but the first: name taken.
	for rules, last := range map[int]string{90: "f.yaml: and 169 more", 150: "f.yaml: and 349 more"} {
		_, err := ParseFile("f.yaml", []byte("rules:\n"+strings.Repeat("- name: a\n  in: x\n", rules)))
		lines := errorLines(err)
		if n := len(lines); n != maxFaults+1 || lines[n-1] != last {
			t.Errorf("%d rules: %d lines, the last %q", rules, n, lines[n-1])
		}
	}
}

// TestAliasBomb: what doubles with each line is refused in no time.
func TestAliasBomb(t *testing.T) {
	var b strings.Builder
	b.WriteString("a0: &a0 [x, x]\n")
	for i := 'b'; i < 'z'; i++ {
		b.WriteString(string(i) + ": &" + string(i) + " [*a0, *a0]\n")
	}
	b.WriteString("rules: *y\n")
	_, err := ParseFile("f.yaml", []byte(b.String()))
	if lines := errorLines(err); len(lines) != 26 || !strings.HasSuffix(lines[25], "not an alias: aliases are not supported") {
		t.Error(err)
	}
}

func TestFileTooLarge(t *testing.T) {
	_, err := ParseFile("f.yaml", make([]byte, MaxFileSize+1))
	checkLines(t, err, "f.yaml: size 33554433 bytes: want at most 33554432")
}

func TestFormatFile(t *testing.T) {
	rules := mustRules(t,
		"cam1 10.0.0.5@239.1.1.1:5000%eth0 -> 239.2.2.2:6000%eth1 10.0.9.9:6000%eth2,ttl=16",
		"1.5 [ff0e::1]:1%eth0 -> [ff0e::2]:1%x#y",
		"a:b 2001:db8::5@[ff0e::1]:1%eth0 -> [ff0e::2]:1%a\"b\\",
		"null 239.1.1.2:1%eth0 -> 239.2.2.2:1%eth1")
	rules[3].Path = PathFanout
	const want = `rules:
  - name: cam1
    in: 10.0.0.5@239.1.1.1:5000%eth0
    out:
      - 239.2.2.2:6000%eth1
      - "10.0.9.9:6000%eth2,ttl=16"
  - name: "1.5"
    in: "[ff0e::1]:1%eth0"
    out:
      - "[ff0e::2]:1%x#y"
  - name: "a:b"
    in: "2001:db8::5@[ff0e::1]:1%eth0"
    out:
      - "[ff0e::2]:1%a\"b\\"
  - name: "null"
    in: 239.1.1.2:1%eth0
    out:
      - 239.2.2.2:1%eth1
    path: fanout
`
	data, err := FormatFile(rules)
	if err != nil || string(data) != want {
		t.Errorf("%v\n%s", err, data)
	}
	got, err := ParseFile("f", data)
	if err != nil || !slices.EqualFunc(got, rules, Equal) {
		t.Errorf("read back: %v, %v", got, err)
	}

	data, err = FormatFile(nil)
	if err != nil || string(data) != "rules: []\n" {
		t.Errorf("no rules: %q, %v", data, err)
	}
	data, err = FormatFile(append(rules, rules[0]))
	if data != nil || !errors.Is(err, ErrDuplicateName) {
		t.Errorf("a set that is not valid: %q, %v", data, err)
	}
}

// TestManyRulesRoundTrip writes and reads a large set.
func TestManyRulesRoundTrip(t *testing.T) {
	rules := camRules(10_000)
	data, err := FormatFile(rules)
	if err != nil {
		t.Fatal(err)
	}
	got, err := ParseFile("f", data)
	if err != nil || !slices.EqualFunc(got, rules, Equal) {
		t.Fatalf("%d rules, %v", len(got), err)
	}
	again, err := FormatFile(got)
	if err != nil || !bytes.Equal(again, data) {
		t.Errorf("written again: %v, not the same", err)
	}
}
