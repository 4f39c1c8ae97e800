package relay

import (
	"errors"
	"fmt"
	"os"

	"xdpcast/internal/savefile"
	"xdpcast/pkg/rules"
)

// readState reads the API rules saved by an earlier process; found is false if there is no file.
func readState(path string) (all []rules.Rule, found bool, err error) {
	data, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil, false, nil
	}
	if err != nil {
		return nil, false, fmt.Errorf("read saved rules: %w", err)
	}
	all, err = rules.ParseFile(path, data)
	if err != nil {
		return nil, false, fmt.Errorf("saved rules: %w; remove the file to start without them", err)
	}
	return all, true, nil
}

// stageState writes the API rules to a temporary file, and commitState renames that to the saved
// one. A reader, or a crash, sees the old file or the new one.
func (r *Relay) stageState() error {
	parts := r.changes.api.of(r.rules)
	text := make([][]byte, len(parts))
	for i := range parts {
		text[i] = parts[i].Text
	}
	if err := savefile.StageParts(r.opts.StateFile, text); err != nil {
		return fmt.Errorf("save rules: %w", err)
	}
	return nil
}

func (r *Relay) commitState() error {
	if err := savefile.Commit(r.opts.StateFile); err != nil {
		return fmt.Errorf("save rules: %w", err)
	}
	return nil
}

// resaveIfDue saves the API rules again after a failure that has left others in the file, until it succeeds.
func (r *Relay) resaveIfDue() {
	if !r.unsaved {
		return
	}
	err := r.stageState()
	if err == nil {
		err = r.commitState()
	}
	if err != nil {
		err = fmt.Errorf("the saved rules are not those of the daemon: %w", err)
	}
	r.unsaved = err != nil
	r.warnUnless(aboutSaved, err)
}
