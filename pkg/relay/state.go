package relay

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"xdpcast/pkg/control"
	"xdpcast/pkg/rules"
)

// readState reads the rules that were added through the API of an earlier process;
// none when there is no file.
func readState(path string) ([]rules.Rule, error) {
	data, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read saved rules: %w", err)
	}
	var saved []control.Rule
	if err := json.Unmarshal(data, &saved); err != nil {
		return nil, fmt.Errorf("saved rules %s: %w; remove the file to start without them", path, err)
	}
	all := make([]rules.Rule, 0, len(saved))
	for _, s := range saved {
		rule, err := control.ToRule(s)
		if err != nil {
			return nil, fmt.Errorf("saved rules %s: %w; remove the file to start without them", path, err)
		}
		all = append(all, rule)
	}
	return all, nil
}

// writeState saves the rules of the API, in one step: a reader, or a crash, meets
// the old file or the new one.
func (r *Relay) writeState() error {
	data, err := encodeState(r.ordered)
	if err != nil {
		return fmt.Errorf("save rules: %w", err)
	}
	next := r.opts.StateFile + ".next"
	if err := os.MkdirAll(filepath.Dir(next), 0o755); err != nil {
		return fmt.Errorf("save rules: %w", err)
	}
	if err := os.WriteFile(next, data, 0o600); err != nil {
		return fmt.Errorf("save rules: %w", err)
	}
	if err := os.Rename(next, r.opts.StateFile); err != nil {
		return fmt.Errorf("save rules: %w", err)
	}
	return nil
}

// encodeState has a line for each rule, for people to read. It is called for every
// rule that is added, with all of them.
func encodeState(ordered []*wantedRule) ([]byte, error) {
	var data bytes.Buffer
	separator := "[\n"
	for _, w := range ordered {
		if w.origin != control.OriginAPI {
			continue
		}
		line, err := json.Marshal(control.FromRule(w.rule))
		if err != nil {
			return nil, err
		}
		data.WriteString(separator)
		data.Write(line)
		separator = ",\n"
	}
	if data.Len() == 0 {
		return []byte("[]\n"), nil
	}
	data.WriteString("\n]\n")
	return data.Bytes(), nil
}
