package control

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"strings"

	"xdpcast/pkg/rules"
)

// decodeRule decodes exactly one rule.
func decodeRule(body io.Reader) (r Rule, err error) {
	dec := newDecoder(body)
	if err := r.decode(dec); err != nil {
		return r, bodyError(err)
	}
	return r, bodyError(atEnd(dec))
}

// decode decodes one rule with strict keys: encoding/json by itself ignores case and all but the
// last of several equal keys.
func (r *Rule) decode(dec *json.Decoder) error {
	start, err := dec.Token()
	if err != nil {
		return err
	}
	if start != json.Delim('{') {
		return errors.New("a rule is needed: {\"name\": ..., \"in\": ..., \"out\": [...]}")
	}
	fields := map[string]any{"name": &r.Name, "in": &r.In, "out": &r.Out, "path": &r.Path, "merge": &r.Merge, "failover": &r.Failover}
	read := map[string]bool{}
	for dec.More() {
		token, err := dec.Token()
		if err != nil {
			return unexpectedEnd(err)
		}
		key := token.(string) // the decoder accepts only strings as keys
		field := fields[key]
		switch {
		case field == nil:
			return fmt.Errorf("unknown field %q: want name, in, out, path, merge, failover", oneLine(key, 100))
		case read[key]:
			return fmt.Errorf("field %q given again: want it once", key)
		}
		read[key] = true
		err = dec.Decode(field)
		var wrongType *json.UnmarshalTypeError
		switch {
		case errors.As(err, &wrongType) && key == "out":
			return fmt.Errorf("field %q: want a list of texts, not %s", key, wrongType.Value)
		case errors.As(err, &wrongType):
			return fmt.Errorf("field %q: want text, not %s", key, wrongType.Value)
		case err != nil:
			return fmt.Errorf("field %q: %w", key, plain(err))
		}
	}
	_, err = dec.Token() // the closing brace
	return unexpectedEnd(err)
}

// yamlType is the media type of a rule file (RFC 9512).
const yamlType = "application/yaml"

// readRules decodes the set of rules in a body: a rule file if the media type says so, otherwise a
// JSON list.
func readRules(r *http.Request) ([]rules.Rule, error) {
	switch media, _, err := mime.ParseMediaType(r.Header.Get("Content-Type")); {
	case err == nil && media == yamlType:
		data, err := io.ReadAll(r.Body)
		if err != nil {
			return nil, bodyError(err)
		}
		all, err := rules.ParseFile("body", data)
		return all, wrapSet(err)
	default: // curl declares any body as a form
		return decodeRules(r.Body)
	}
}

// decodeRules decodes a list of rules, one at a time, so that the text of 100,000 of them is never
// held in memory. It refuses null, which should not mean removing every rule.
func decodeRules(body io.Reader) ([]rules.Rule, error) {
	dec := newDecoder(body)
	first, err := dec.Token()
	if err != nil {
		return nil, bodyError(err)
	}
	if first != json.Delim('[') {
		return nil, Errorf(KindInvalid, "body: a list of rules is needed, [] for none")
	}
	all, faults := []rules.Rule{}, []error(nil)
	for n := 1; dec.More(); n++ {
		var r Rule
		if err := r.decode(dec); err != nil {
			return nil, bodyError(fmt.Errorf("rule %d of the list: %w", n, plain(err)))
		}
		rule, err := toRule(r)
		if err != nil {
			faults = append(faults, fmt.Errorf("rule %.100q: %w", r.Name, err))
		}
		all = append(all, rule)
	}
	if _, err := dec.Token(); err != nil { // the closing bracket
		return nil, bodyError(unexpectedEnd(err))
	}
	if err := atEnd(dec); err != nil {
		return nil, bodyError(err)
	}
	if len(faults) > 0 {
		return nil, Wrap(KindInvalid, errors.Join(faults...))
	}
	if err := ValidateSet(all); err != nil {
		return nil, err
	}
	return all, nil
}

// ValidateSet is rules.ValidateSet with API kinds: KindConflict for a fault between rules,
// KindInvalid for one of a rule by itself.
func ValidateSet(all []rules.Rule) error { return wrapSet(rules.ValidateSet(all)) }

func wrapSet(err error) error {
	if errors.Is(err, rules.ErrDuplicateInput) || errors.Is(err, rules.ErrDuplicateName) || errors.Is(err, rules.ErrLoop) {
		return Wrap(KindConflict, err)
	}
	return Wrap(KindInvalid, err)
}

func newDecoder(body io.Reader) *json.Decoder { return json.NewDecoder(&oneSpace{from: body}) }

// oneSpace filters JSON, replacing each run of white space between values by a single byte.
// json.Decoder rescans a run from its beginning with each read, which takes quadratic time: seconds
// for some megabytes of blanks.
type oneSpace struct {
	from                     io.Reader
	inText, escaped, inSpace bool
}

// Read implements io.Reader.
func (r *oneSpace) Read(p []byte) (int, error) {
	for {
		n, err := r.from.Read(p)
		if n = r.squeeze(p[:n]); n > 0 || err != nil || len(p) == 0 {
			return n, err
		}
	}
}

// squeeze moves the remaining bytes to the front, and returns their number.
func (r *oneSpace) squeeze(p []byte) (n int) {
	for _, c := range p {
		space := !r.inText && (c == ' ' || c == '\t' || c == '\r' || c == '\n')
		switch {
		case space && r.inSpace:
			continue
		case r.escaped:
			r.escaped = false
		case c == '"':
			r.inText = !r.inText
		case c == '\\':
			r.escaped = r.inText
		}
		r.inSpace = space
		p[n] = c
		n++
	}
	return n
}

// atEnd checks that nothing follows the value.
func atEnd(dec *json.Decoder) error {
	_, err := dec.Token()
	switch {
	case errors.Is(err, io.EOF):
		return nil
	case err == nil:
		return errors.New("trailing data after the value")
	default:
		return err
	}
}

func unexpectedEnd(err error) error {
	if errors.Is(err, io.EOF) {
		return errors.New("unexpected end")
	}
	return err
}

// plain removes the package's name from an error of encoding/json.
func plain(err error) error {
	if text, ok := strings.CutPrefix(err.Error(), "json: "); ok {
		return errors.New(text)
	}
	return unexpectedEnd(err)
}

// bodyError assigns a kind to an error of reading or decoding a body.
func bodyError(err error) error {
	var tooLarge *http.MaxBytesError
	switch {
	case err == nil:
		return nil
	case errors.As(err, &tooLarge):
		return Errorf(KindTooLarge, "body is over %d bytes", tooLarge.Limit)
	case errors.Is(err, io.EOF):
		return Errorf(KindInvalid, "body is empty: JSON is needed")
	default:
		return Errorf(KindInvalid, "body: %w", plain(err))
	}
}
