package control

import (
	"errors"
	"io"
	"net/http"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"xdpcast/pkg/rules"
)

func TestCheckRule(t *testing.T) {
	good := Rule{Name: "cam1", In: "239.1.1.1:5000%eth0", Out: []string{"239.2.2.2:6000%eth1,ttl=8"}, Path: "auto"}
	if diff := cmp.Diff(Check{Faults: []Fault{}, Rule: &good}, CheckRule(good)); diff != "" {
		t.Error(diff)
	}
	several := Rule{Name: "cam2", In: "239.1.1.1:5000%eth0 239.1.1.2:5000%eth2", Out: good.Out, Path: "auto", Merge: "rtp,skew=100ms"}
	if diff := cmp.Diff(Check{Faults: []Fault{}, Rule: &several}, CheckRule(several)); diff != "" {
		t.Error(diff)
	}
	several.Merge, several.Failover = "", "30ms,back=2s"
	if diff := cmp.Diff(Check{Faults: []Fault{}, Rule: &several}, CheckRule(several)); diff != "" {
		t.Error(diff)
	}
	for _, tt := range []struct {
		change func(r *Rule)
		want   string // field: part of the message; "; " between faults
	}{
		{func(r *Rule) { r.Name = "" }, "name: want|missing"},
		{func(r *Rule) { r.Name = "a b" }, "name: want 1 to 63"},
		{func(r *Rule) { r.In = "" }, "in: missing"},
		{func(r *Rule) { r.In = "239.1.1.1:0%eth0" }, "in: want 1 to 65535"},
		{func(r *Rule) { r.Out = nil }, "out[0]: missing"},
		{func(r *Rule) { r.Out = append(r.Out, "239.2.2.3%") }, "out[1]: interface"},
		{func(r *Rule) { r.Out = append(r.Out, "239.2.2.3:5%e,ttl=900", "x") }, "out[1]: ttl; out[2]: x"},
		{func(r *Rule) { r.Out = append(r.Out, r.Out[0]) }, "out[1]: want"},
		{func(r *Rule) { r.Out[0] = "[ff3e::1]:5000%eth1" }, "out[0]: want"},
		{func(r *Rule) { r.Path = "fast" }, "path: fast"},
		{func(r *Rule) { r.In += " 239.1.1.2:5000%eth2" }, "merge: missing"},
		{func(r *Rule) { r.In, r.Merge = r.In+" x", "rtp" }, "in: x"},
		{func(r *Rule) { r.In, r.Merge = r.In+" 239.1.1.2:5000%eth2,rate=5Mbit", "rtp" }, "in: rate"},
		{func(r *Rule) { r.Merge = "rtp" }, "merge: want several inputs"},
		{func(r *Rule) { r.In, r.Merge = r.In+" 239.1.1.2:5000%eth2", "mp3" }, "merge: mp3"},
		{func(r *Rule) { r.In, r.Failover = r.In+" 239.1.1.2:5000%eth2", "soon" }, "failover: soon"},
		{func(r *Rule) { r.Out = slices.Repeat([]string{""}, 1000) }, "out[64]: 1000 outputs: want 1 to 64"},
		{func(r *Rule) { r.Name, r.In, r.Path = "-", "x", "y" }, "in: x; path: y; name: want"},
	} {
		r := Rule{Name: good.Name, In: good.In, Out: append([]string{}, good.Out...), Path: good.Path}
		tt.change(&r)
		got := CheckRule(r)
		want := strings.Split(tt.want, "; ")
		if len(r.Out) > rules.MaxOutputs { // each of those that are looked at is empty
			if len(got.Faults) != rules.MaxOutputs+1 {
				t.Errorf("%d faults of %d outputs", len(got.Faults), len(r.Out))
			}
			got.Faults = got.Faults[len(got.Faults)-1:]
		}
		if got.Rule != nil || len(got.Faults) != len(want) {
			t.Errorf("%+v: %+v, want %q", r, got, tt.want)
			continue
		}
		for i, w := range want {
			field, message, _ := strings.Cut(w, ": ")
			one := false
			for m := range strings.SplitSeq(message, "|") {
				one = one || strings.Contains(got.Faults[i].Message, m)
			}
			if got.Faults[i].Field != field || !one {
				t.Errorf("%+v: fault %+v, want %q", r, got.Faults[i], w)
			}
		}
		// Whatever is wrong, adding the rule fails, too.
		if _, err := ToRule(r); !errors.Is(err, ErrInvalid) {
			t.Errorf("%+v: %v", r, err)
		}
	}
}

func TestPutCheckAndExport(t *testing.T) {
	b := &fake{}
	c := NewClient(serve(t, b, Options{}))
	rule := Rule{Name: "a.b", In: "239.1.1.1:5000%eth0", Out: []string{"239.2.2.2:6000%eth1"}, Path: "auto"}
	result, err := c.PutRule(t.Context(), rule, ApplyOptions{DryRun: true})
	if err != nil || !result.DryRun || !b.options.DryRun || result.Changes[0].Rule.Name != rule.Name {
		t.Errorf("%+v, %v", result, err)
	}
	if err := c.call(t.Context(), http.MethodPut, "/v1/rules/other", rule, nil); !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), "want the name of the path") {
		t.Errorf("%v", err)
	}
	// Everybody who may read can have a rule checked: it must not take a gigabyte.
	huge := rule
	huge.Out = slices.Repeat([]string{""}, 1_000_000)
	if _, err := ask[Check](t.Context(), c, http.MethodPost, "/v1/check", huge); !errors.Is(err, ErrTooLarge) {
		t.Errorf("check of %d outputs: %v", len(huge.Out), err)
	}
	mirrored := RuleStatus{Rule: rule, Origin: OriginMroute}
	mirrored.Name = "mroute.1"
	b.rules = append(b.rules, mirrored)
	check, err := ask[Check](t.Context(), c, http.MethodPost, "/v1/check", rule)
	if err != nil || len(check.Faults) != 0 || check.Rule.Name != rule.Name {
		t.Errorf("%+v, %v", check, err)
	}
	for path, want := range map[string]int{"/v1/export": 1, "/v1/export?origin=api": 1, "/v1/export?origin=file": 0} {
		req, err := request(t.Context(), http.MethodGet, path, nil)
		if err != nil {
			t.Fatal(err)
		}
		answer, err := c.http.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		text := new(strings.Builder)
		_, err = io.Copy(text, answer.Body)
		answer.Body.Close()
		all, parseErr := rules.ParseFile("export", []byte(text.String()))
		if err != nil || parseErr != nil || len(all) != want {
			t.Errorf("%s: %q, %v, %v", path, text, err, parseErr)
		}
	}
	if err := c.call(t.Context(), http.MethodGet, "/v1/export?origin=x", nil, nil); !errors.Is(err, ErrInvalid) {
		t.Errorf("%v", err)
	}
}
