package relay

import (
	"errors"
	"fmt"
	"os"

	"xdpcast/internal/plan"
	"xdpcast/internal/savefile"
	"xdpcast/pkg/rules"
)

// readState reads the rules that were added through the API of an earlier process;
// found is false when there is no file.
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

// stageState writes the rules of the API beside the file that they are saved in, and
// commitState puts what it wrote in the place of that. A reader, or a crash, meets the old
// file or the new one.
func (r *Relay) stageState() error {
	if err := savefile.Stage(r.opts.StateFile, textOf(r.rules, plan.OriginAPI)); err != nil {
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
