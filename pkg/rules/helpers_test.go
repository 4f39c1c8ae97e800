package rules

import (
	"errors"
	"net/netip"
	"strings"
	"testing"
)

func addr(s string) netip.Addr { return netip.MustParseAddr(s) }

func mustInput(t testing.TB, s string) Input {
	t.Helper()
	in, _, err := ParseInput(s)
	if err != nil {
		t.Fatal(err)
	}
	return in
}

func mustOutput(t testing.TB, s string) Output {
	t.Helper()
	out, err := ParseOutput(s)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// mustRule is a rule of `NAME IN -> OUT OUT`.
func mustRule(t testing.TB, s string) Rule {
	t.Helper()
	words := strings.Fields(s)
	if len(words) < 3 || words[2] != "->" {
		t.Fatalf("rule %q: want NAME IN -> OUT...", s)
	}
	r := Rule{Name: words[0], In: mustInput(t, words[1])}
	_, r.Accept, _ = ParseInput(words[1])
	for _, w := range words[3:] {
		r.Out = append(r.Out, mustOutput(t, w))
	}
	return r
}

func mustRules(t testing.TB, lines ...string) []Rule {
	t.Helper()
	var rules []Rule
	for _, line := range lines {
		rules = append(rules, mustRule(t, line))
	}
	return rules
}

// errorLines are the lines of an error, none for nil.
func errorLines(err error) []string {
	if err == nil {
		return nil
	}
	return strings.Split(err.Error(), "\n")
}

func checkLines(t testing.TB, err error, want ...string) {
	t.Helper()
	got := errorLines(err)
	if strings.Join(got, "\n") != strings.Join(want, "\n") {
		t.Errorf("got:\n  %s\nwant:\n  %s", strings.Join(got, "\n  "), strings.Join(want, "\n  "))
	}
}

// joined are the errors that errors.Join has put together.
func joined(t testing.TB, err error) []error {
	t.Helper()
	if err == nil {
		return nil
	}
	list, ok := err.(interface{ Unwrap() []error })
	if !ok {
		t.Fatalf("%T is not a list of errors", err)
	}
	return list.Unwrap()
}

func fieldError(t testing.TB, err error) *FieldError {
	t.Helper()
	var f *FieldError
	if !errors.As(err, &f) {
		t.Fatalf("%v: holds no *FieldError", err)
	}
	return f
}
