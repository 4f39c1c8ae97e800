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

// decode reads exactly one JSON value without unknown keys.
func decode(body io.Reader, v any) error {
	dec := newDecoder(body)
	if err := dec.Decode(v); err != nil {
		return bodyError(err)
	}
	return bodyError(atEnd(dec))
}

// yamlType is the media type of a file of rules (RFC 9512).
const yamlType = "application/yaml"

// readRules reads the set of rules that a body is: a file of rules if it says so, else
// a JSON list.
func readRules(r *http.Request) ([]rules.Rule, error) {
	switch media, _, err := mime.ParseMediaType(r.Header.Get("Content-Type")); {
	case err == nil && media == yamlType:
		data, err := io.ReadAll(r.Body)
		if err != nil {
			return nil, bodyError(err)
		}
		all, err := rules.ParseFile("body", data)
		return all, wrapSet(err)
	default: // curl calls all that it sends a form
		return decodeRules(r.Body)
	}
}

// decodeRules reads a list of rules, one at a time: the text of 100,000 of
// them is never held as a whole. null is refused, as it is not a way to say
// that every rule should go.
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
		if err := dec.Decode(&r); err != nil {
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
	return all, ValidateSet(all)
}

// ValidateSet is rules.ValidateSet, with the kind that a fault has here: KindConflict for
// one between rules, KindInvalid for one of a rule by itself.
func ValidateSet(all []rules.Rule) error { return wrapSet(rules.ValidateSet(all)) }

func wrapSet(err error) error {
	if errors.Is(err, rules.ErrDuplicateInput) || errors.Is(err, rules.ErrDuplicateName) || errors.Is(err, rules.ErrLoop) {
		return Wrap(KindConflict, err)
	}
	return Wrap(KindInvalid, err)
}

func newDecoder(body io.Reader) *json.Decoder {
	dec := json.NewDecoder(body)
	dec.DisallowUnknownFields()
	return dec
}

// atEnd makes sure that nothing follows the value.
func atEnd(dec *json.Decoder) error {
	_, err := dec.Token()
	switch {
	case errors.Is(err, io.EOF):
		return nil
	case err == nil:
		return errors.New("something follows the value")
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

// plain takes the package's name off an error of encoding/json.
func plain(err error) error {
	if text, ok := strings.CutPrefix(err.Error(), "json: "); ok {
		return errors.New(text)
	}
	return unexpectedEnd(err)
}

// bodyError gives an error of reading or decoding a body its kind.
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
