package control

import (
	"errors"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"xdpcast/pkg/rules"
)

func TestConvert(t *testing.T) {
	for _, want := range []Rule{
		cam1,
		{Name: "ssm", In: "10.0.0.5@232.1.1.1:5000%eth0", Out: []string{"10.0.9.9:6000%eth2", "239.2.2.2:6000%eth1,dscp=af41"}, Path: "kernel"},
	} {
		r, err := ToRule(want)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, FromRule(r)); diff != "" {
			t.Errorf("there and back (-want +got):\n%s", diff)
		}
	}
	r := cam1
	r.Path = ""
	if got, err := ToRule(r); err != nil || got.Path != rules.PathAuto {
		t.Errorf("no path: %v, %v", got.Path, err)
	}
}

func TestConvertRefuses(t *testing.T) {
	for name, tt := range map[string]struct {
		change func(*Rule)
		want   []string
	}{
		"input":     {func(r *Rule) { r.In = "239.1.1.1:0%eth0" }, []string{`rule "cam1"`, "in", "port", `"0"`}},
		"output":    {func(r *Rule) { r.Out = []string{r.Out[0], "239.1.1.1:70000%eth0"} }, []string{`rule "cam1"`, "output", "70000"}},
		"path":      {func(r *Rule) { r.Path = "fast" }, []string{`rule "cam1"`, "path", "fast"}},
		"no output": {func(r *Rule) { r.Out = nil }, []string{`rule "cam1"`, "out"}},
		"no name":   {func(r *Rule) { r.Name = "" }, []string{"name"}},
	} {
		r := cam1
		tt.change(&r)
		_, err := ToRule(r)
		if !errors.Is(err, ErrInvalid) {
			t.Errorf("%s: %v, want %v", name, err, ErrInvalid)
			continue
		}
		for _, word := range tt.want {
			if !strings.Contains(err.Error(), word) || strings.Contains(err.Error(), "\n") {
				t.Errorf("%s: %v does not say %s, or not on one line", name, err, word)
			}
		}
	}
}
