package relay

import (
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
	all, err := rules.ParseFile(path, data)
	if err != nil {
		return nil, fmt.Errorf("saved rules: %w; remove the file to start without them", err)
	}
	return all, nil
}

// writeState saves the rules of the API, in one step: a reader, or a crash, meets
// the old file or the new one.
func (r *Relay) writeState() error {
	next := r.opts.StateFile + ".next"
	if err := os.MkdirAll(filepath.Dir(next), 0o755); err != nil {
		return fmt.Errorf("save rules: %w", err)
	}
	if err := os.WriteFile(next, encodeState(r.ordered), 0o600); err != nil {
		return fmt.Errorf("save rules: %w", err)
	}
	if err := os.Rename(next, r.opts.StateFile); err != nil {
		return fmt.Errorf("save rules: %w", err)
	}
	return nil
}

// encodeState writes the rules of the API as a file of rules. It is called for every
// rule that is added, with all of them.
func encodeState(ordered []*wantedRule) []byte {
	var file []byte
	for _, w := range ordered {
		if w.origin == control.OriginAPI {
			file = rules.AppendRule(file, w.rule)
		}
	}
	return rules.EndFile(file)
}
