package relay

import (
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
	saved := []control.Rule{}
	for _, w := range r.orderedRules() {
		if w.origin == control.OriginAPI {
			saved = append(saved, control.FromRule(w.rule))
		}
	}
	data, err := json.MarshalIndent(saved, "", "  ")
	if err != nil {
		return fmt.Errorf("save rules: %w", err)
	}
	next := r.opts.StateFile + ".next"
	if err := os.MkdirAll(filepath.Dir(next), 0o755); err != nil {
		return fmt.Errorf("save rules: %w", err)
	}
	if err := os.WriteFile(next, append(data, '\n'), 0o600); err != nil {
		return fmt.Errorf("save rules: %w", err)
	}
	if err := os.Rename(next, r.opts.StateFile); err != nil {
		return fmt.Errorf("save rules: %w", err)
	}
	return nil
}
