package events

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
)

// maxFile limits how much of a file is read: more than it ever holds (2 * Saved events of a few
// kB).
const maxFile = 16 << 20

// readFile reads the newest events of a file as written by append, one per line. An invalid line,
// as the last one may be after a crash, invalidates the events before it.
func readFile(path string) ([]Event, error) {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if info, err := f.Stat(); err != nil || !info.Mode().IsRegular() {
		return nil, errors.Join(err, fmt.Errorf("%s: not a regular file", path))
	}
	return parse(io.LimitReader(f, maxFile)), nil
}

func parse(r io.Reader) (all []Event) {
	lines := bufio.NewScanner(r)
	lines.Buffer(nil, 64<<10)
	for lines.Scan() {
		var e Event
		if json.Unmarshal(lines.Bytes(), &e) != nil || e.Number == 0 || e.Number == 1<<64-1 || e.Kind == "" {
			continue
		}
		if n := len(all); n > 0 && e.Number != all[n-1].Number+1 {
			all = all[:0]
		}
		e.bound()
		all = append(all, e)
	}
	return all[max(0, len(all)-Saved):]
}

// file has the newest events, one per line: at least the last Saved, and less than twice as many.
type file struct {
	path   string
	f      *os.File // nil until the first event
	lines  []Event  // the last Saved lines of it
	count  int      // lines in the file
	failed bool     // the failure was logged
}

// append appends events. It does not wait for the disk.
func (f *file) append(fresh []Event, log *slog.Logger) {
	f.lines = append(f.lines, fresh...)
	if over := len(f.lines) - Saved; over > 0 {
		f.lines = append(f.lines[:0], f.lines[over:]...)
	}
	err := f.write(fresh)
	switch {
	case err == nil:
		f.failed = false
	case !f.failed:
		log.Warn("events cannot be saved: the next daemon will not have them", "error", err)
		f.failed = true
	}
}

func (f *file) write(fresh []Event) error {
	if f.f == nil || f.count+len(fresh) >= 2*Saved {
		return f.rewrite()
	}
	_, err := f.f.Write(encode(fresh))
	if err != nil {
		return errors.Join(err, f.close()) // rewrite it next time
	}
	f.count += len(fresh)
	return nil
}

func encode(all []Event) []byte {
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	for i := range all {
		_ = enc.Encode(&all[i]) // strings, numbers and a current time: cannot fail
	}
	return b.Bytes()
}

// rewrite replaces the file by one with the last Saved events.
func (f *file) rewrite() (err error) {
	if err := errors.Join(f.close(), os.MkdirAll(filepath.Dir(f.path), 0o755)); err != nil {
		return err
	}
	next := f.path + ".next"
	if err := os.Remove(next); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err // left by a dead process
	}
	file, err := os.OpenFile(next, os.O_WRONLY|os.O_CREATE|os.O_EXCL|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	if _, err := file.Write(encode(f.lines)); err != nil {
		return errors.Join(err, file.Close(), os.Remove(next))
	}
	if err := os.Rename(next, f.path); err != nil {
		return errors.Join(err, file.Close(), os.Remove(next))
	}
	f.f, f.count = file, len(f.lines)
	return nil
}

func (f *file) close() error {
	if f == nil || f.f == nil {
		return nil
	}
	err := f.f.Close()
	f.f = nil
	return err
}
