package control

import (
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strings"

	"xdpcast/pkg/rules"
)

// NewHandler serves b to clients without a unix socket, such as a browser: everyone may read, and
// clients with the token may write; with an empty token nobody may. Restricting who can connect is
// left to the caller.
func NewHandler(b Backend, o Options, token string) http.Handler {
	s := NewServer(b, o)
	want := sha256.Sum256([]byte(token))
	s.allow = func(r *http.Request, need access) error {
		if need < accessWrite {
			return nil
		}
		if token == "" {
			return Errorf(KindForbidden, "this address only reads: changes need xdpcast run --token-file")
		}
		given, ok := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
		// Hashes have equal length, so the comparison's time reveals nothing about the token's.
		if got := sha256.Sum256([]byte(given)); !ok || subtle.ConstantTimeCompare(got[:], want[:]) != 1 {
			s.opts.Log.Warn("change without the token refused", "peer", r.RemoteAddr, "method", r.Method, "path", oneLine(r.URL.Path, 200))
			return Errorf(KindForbidden, "the token is missing or wrong: want the header Authorization: Bearer TOKEN")
		}
		return nil
	}
	return s.handler()
}

// Fault is a fault of a rule's field: "name", "in", "out[2]", "path", "merge", "failover", or "" for
// the rule as a whole.
type Fault struct {
	Field   string `json:"field"`
	Message string `json:"message"`
}

// Check is what CheckRule finds.
type Check struct {
	Faults []Fault `json:"faults"`
	// Rule is the rule in its canonical form if there are no faults.
	Rule *Rule `json:"rule,omitempty"`
}

// CheckRule validates a rule by itself, and returns each fault with its field. Of more outputs than a
// rule can have, the others are not looked at.
func CheckRule(r Rule) Check {
	c := Check{Faults: []Fault{}}
	parsed := rules.Rule{Name: r.Name}
	c.add("in", parsed.ParseInputs(r.In))
	for i, text := range r.Out[:min(len(r.Out), rules.MaxOutputs)] {
		o, err := rules.ParseOutput(text)
		parsed.Out = append(parsed.Out, o)
		c.add(fmt.Sprintf("out[%d]", i), err)
	}
	if n := len(r.Out); n > rules.MaxOutputs {
		c.add(fmt.Sprintf("out[%d]", rules.MaxOutputs), fmt.Errorf("%d outputs: want 1 to %d", n, rules.MaxOutputs))
	}
	if r.Path != "" {
		var err error
		parsed.Path, err = rules.ParsePath(r.Path)
		c.add("path", err)
	}
	c.add("merge", parsed.ParseStream(r.Merge, ""))
	c.add("failover", parsed.ParseStream("", r.Failover))
	whole := len(c.Faults) == 0
	for _, fault := range split(parsed.Validate()) {
		var field *rules.FieldError
		switch {
		case !errors.As(fault, &field):
			if whole {
				c.add("", fault)
			}
		case whole || field.Field == "name":
			text := *field
			text.Rule = ""
			c.add(baseField(field.Field), &text)
		}
	}
	if len(c.Faults) == 0 {
		canonical := FromRule(parsed)
		c.Rule = &canonical
	}
	return c
}

// add adds a fault of a field, unless err is nil.
func (c *Check) add(field string, err error) {
	if err == nil {
		return
	}
	c.Faults = append(c.Faults, Fault{field, oneLine(err.Error(), maxErrorText)})
}

// split splits a joined error.
func split(err error) []error {
	if joined, ok := err.(interface{ Unwrap() []error }); ok {
		return joined.Unwrap()
	}
	if err == nil {
		return nil
	}
	return []error{err}
}

// baseField is the field as filled in by a user: "out[2]" of "out[2].ttl", and "in" of "in[1].vlan",
// since all inputs are one text.
func baseField(field string) string {
	base, _, _ := strings.Cut(field, ".")
	switch {
	case base == "out":
		return "out[0]"
	case strings.HasPrefix(base, "in["):
		return "in"
	}
	return base
}

func (s *Server) postCheck(r *http.Request) (any, error) {
	rule, err := decodeRule(r.Body)
	if err != nil {
		return nil, err
	}
	return CheckRule(rule), nil
}

func (s *Server) putRule(r *http.Request) (any, error) {
	o, err := applyOptions(r)
	if err != nil {
		return nil, err
	}
	rule, err := decodeRule(r.Body)
	if err != nil {
		return nil, err
	}
	if name := r.PathValue("name"); rule.Name != name {
		return nil, Errorf(KindInvalid, "rule %q: want the name of the path, %q", oneLine(rule.Name, 100), oneLine(name, 100))
	}
	v, err := s.backend.PutRule(r.Context(), rule, o)
	v.fill()
	return v, err
}

// serveExport answers with the rules as a file.
func (s *Server) serveExport(w http.ResponseWriter, r *http.Request) {
	origin := r.URL.Query().Get(queryOrigin)
	if origin != "" && origin != OriginFile && origin != OriginAPI {
		s.fail(w, r, Errorf(KindInvalid, "query key %s is %q: must be %s or %s", queryOrigin, oneLine(origin, 100), OriginFile, OriginAPI))
		return
	}
	all, err := s.backend.Rules(r.Context())
	if err != nil {
		s.fail(w, r, err)
		return
	}
	var file []byte
	for i := range all {
		if all[i].Origin == OriginMroute || origin != "" && all[i].Origin != origin {
			continue // a routing daemon changes the mirrored routes: as rules they would stay when it removes them
		}
		rule, err := ToRule(all[i].Rule)
		if err != nil {
			s.fail(w, r, err)
			return
		}
		file = rules.AppendRule(file, rule)
	}
	w.Header().Set("Content-Type", yamlType)
	_, _ = w.Write(rules.EndFile(file)) // a disconnected client needs no answer
}

const queryOrigin = "origin"

// PutRule implements Backend.
func (c *Client) PutRule(ctx context.Context, rule Rule, o ApplyOptions) (ApplyResult, error) {
	path, err := rulePath(rule.Name)
	if err != nil {
		return ApplyResult{}, err
	}
	rule.fill()
	return ask[ApplyResult](ctx, c, http.MethodPut, path+o.query(), rule)
}

// ServeJSON answers with a value, or with its error.
func ServeJSON(w http.ResponseWriter, value any, err error) {
	w.Header().Set("Content-Type", "application/json")
	if err != nil {
		w.WriteHeader((&Error{Kind: kindOf(err)}).status())
		_, _ = w.Write(errorBody(err))
		return
	}
	_ = json.NewEncoder(w).Encode(value)
}
