package control

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
)

// decode reads exactly one JSON value without unknown keys.
func decode(body io.Reader, v any) error {
	dec := newDecoder(body)
	if err := dec.Decode(v); err != nil {
		return bodyError(err)
	}
	return bodyError(atEnd(dec))
}

// decodeRules reads a list of rules, one at a time: the text of 100,000 of
// them is never held as a whole. null is refused, as it is not a way to say
// that every rule should go.
func decodeRules(body io.Reader) ([]Rule, error) {
	dec := newDecoder(body)
	first, err := dec.Token()
	if err != nil {
		return nil, bodyError(err)
	}
	if first != json.Delim('[') {
		return nil, Errorf(KindInvalid, "body: a list of rules is needed, [] for none")
	}
	rules := []Rule{}
	for dec.More() {
		var r Rule
		if err := dec.Decode(&r); err != nil {
			return nil, bodyError(fmt.Errorf("rule %d of the list: %w", len(rules)+1, plain(err)))
		}
		rules = append(rules, r)
	}
	if _, err := dec.Token(); err != nil { // the closing bracket
		return nil, bodyError(unexpectedEnd(err))
	}
	if err := atEnd(dec); err != nil {
		return nil, bodyError(err)
	}
	return rules, nil
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
