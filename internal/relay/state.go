package relay

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"xdpcast/internal/plan"
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

// stageState writes the rules of the API beside the file that they are saved in, and
// commitState puts what it wrote in the place of that. A reader, or a crash, meets the old
// file or the new one.
func (r *Relay) stageState() error {
	if err := stageFile(r.opts.StateFile, encodeState(r.rules)); err != nil {
		return fmt.Errorf("save rules: %w", err)
	}
	return nil
}

func (r *Relay) commitState() error {
	if err := commitFile(r.opts.StateFile); err != nil {
		return fmt.Errorf("save rules: %w", err)
	}
	return nil
}

// stageFile writes what is to be in a file into path.next, and has it on the disk. It
// makes the directory if it is absent, and follows no link.
func stageFile(path string, data []byte) (err error) {
	next := path + ".next"
	if err := os.MkdirAll(filepath.Dir(next), 0o755); err != nil {
		return err
	}
	if err := os.Remove(next); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err // left by a process that died
	}
	f, err := os.OpenFile(next, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		discardFile(path)
	}
	return err
}

// discardFile removes what stageFile wrote.
func discardFile(path string) { _ = os.Remove(path + ".next") }

// commitFile puts path.next in the place of path, and has the directory on the disk. After
// an error either of the two may be in the file.
func commitFile(path string) error {
	if err := os.Rename(path+".next", path); err != nil {
		discardFile(path)
		return err
	}
	return syncDir(filepath.Dir(path))
}

func syncDir(path string) error {
	dir, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}

// encodeState writes the rules of the API as a file of rules. It is called for every
// rule that is added, with all of them.
func encodeState(all []*plan.Rule) []byte {
	var file []byte
	for _, rule := range all {
		if rule.Origin == plan.OriginAPI {
			file = rules.AppendRule(file, rule.Rule)
		}
	}
	return rules.EndFile(file)
}
