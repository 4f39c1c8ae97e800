package rulefile

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/fsnotify/fsnotify"

	"xdpcast/pkg/rules"
)

const (
	// quiet is how long a file must be unchanged before it is read: one that is written in place
	// should be complete by then.
	quiet = 500 * time.Millisecond
	// patience is how long other files of a directory, from which a pattern includes some, can postpone
	// that: a program may write there without a pause.
	patience = 5 * time.Second
	// lookAgain is the polling interval without notifications, which network file systems do not
	// send.
	lookAgain = 10 * time.Second
	// maxLinks limits a chain of symbolic links, as in the kernel (path_resolution(7)).
	maxLinks = 40
)

// Watcher notices when the content of a rule file, or of an included one, changes: written in
// place, replaced by a rename, or behind a symbolic link that was changed anywhere on its path, as
// Kubernetes does with a ConfigMap. It is not safe for concurrent use.
type Watcher struct {
	name   string
	log    *slog.Logger
	notify *fsnotify.Watcher

	quiet, patience, again time.Duration

	read      reads
	content   [sha256.Size]byte // of everything that was read
	signature string            // metadata, for a cheap check
	entries   map[string]bool   // entries on the paths
	folders   map[string]bool   // directories of which every entry counts
	watched   map[string]bool   // directories watched by the kernel
}

// NewWatcher starts watching the named file: Run notices changes made after it has returned. The
// caller must Run or Close it.
func NewWatcher(name string, log *slog.Logger) (*Watcher, error) {
	name, err := filepath.Abs(name)
	if err != nil {
		return nil, err
	}
	notify, err := fsnotify.NewWatcher()
	if err != nil {
		return nil, fmt.Errorf("watch %s: %w", name, err)
	}
	w := &Watcher{name: name, log: log, notify: notify, quiet: quiet, patience: patience, again: lookAgain}
	w.look()
	return w, nil
}

// Close ends watching.
func (w *Watcher) Close() error { return w.notify.Close() }

// Run calls changed whenever the content of the files has changed and they have been unchanged for
// half a second since, until ctx ends. Then it closes the watcher.
func (w *Watcher) Run(ctx context.Context, changed func()) {
	defer w.Close()
	timer := time.NewTimer(w.again)
	defer timer.Stop()
	announced := false
	var since time.Time // of the first notification since the last look
	unsettled := false  // the content had changed, but may have been half written
	for {
		select {
		case <-ctx.Done():
			return
		case e := <-w.notify.Events:
			if e.Op != fsnotify.Chmod && (w.entries[e.Name] || w.folders[filepath.Dir(e.Name)]) {
				if announced = true; since.IsZero() {
					since = time.Now()
				}
				if time.Since(since) < w.patience {
					timer.Reset(w.quiet)
				}
			}
			continue
		case err := <-w.notify.Errors: // an overflow: notifications were lost
			w.log.Warn("watch the file of rules", "file", w.name, "error", err)
			announced = true
			timer.Reset(w.quiet)
			continue
		case <-timer.C:
		}
		postponed := !since.IsZero() && time.Since(since) >= w.patience
		differs := (announced || unsettled || w.signature != w.sign()) && w.look()
		announced, since = false, time.Time{}
		if unsettled, differs = differs && postponed, differs || unsettled; unsettled {
			timer.Reset(w.quiet) // not after a pause: the same content twice proves that it is complete
			continue
		}
		if differs {
			changed()
		}
		timer.Reset(w.again)
	}
}

// look reads the files, follows their paths again, and returns whether their content has changed.
func (w *Watcher) look() (changed bool) {
	// The directories first: changes during the read are then announced.
	for {
		w.read = readAllOf(w.name)
		if !w.follow() {
			break
		}
	}
	w.signature = w.sign()
	before := w.content
	w.content = sha256.Sum256(w.read.text.Bytes())
	w.read.text.Reset()
	return before != w.content
}

// follow watches the directories on the paths, and returns whether any are new.
func (w *Watcher) follow() (added bool) {
	w.entries, w.folders = map[string]bool{}, map[string]bool{}
	for _, file := range w.read.files {
		w.walk(file, maxLinks)
	}
	for _, folder := range w.read.folders {
		w.folders[w.walk(folder, maxLinks)] = true
	}
	want := map[string]bool{}
	for entry := range w.entries {
		want[filepath.Dir(entry)] = true
	}
	for folder := range w.folders {
		want[folder] = true
	}
	for dir := range w.watched {
		if !want[dir] {
			_ = w.notify.Remove(dir) // the kernel has removed the watch of a deleted directory
		}
	}
	before := w.watched
	w.watched = map[string]bool{}
	for dir := range want {
		switch err := w.notify.Add(dir); {
		case err == nil:
			w.watched[dir] = true
			added = added || !before[dir]
		case !errors.Is(err, fs.ErrNotExist):
			w.log.Warn("watch the file of rules: changes are noticed some seconds later", "directory", dir, "error", err)
		}
	}
	return added
}

// walk records the entries of the directories on a path, following symbolic links, and returns
// where it ends.
func (w *Watcher) walk(path string, links int) string {
	at := "/"
	parts := strings.Split(strings.TrimPrefix(filepath.Clean(path), "/"), "/")
	for i, part := range parts {
		entry := filepath.Join(at, part)
		w.entries[entry] = true
		target, err := os.Readlink(entry)
		if err != nil || links == 0 {
			at = entry // not a link, or absent: then it is waited for
			continue
		}
		if !filepath.IsAbs(target) {
			target = filepath.Join(at, target)
		}
		return w.walk(filepath.Join(append([]string{target}, parts[i+1:]...)...), links-1)
	}
	return at
}

// sign is a signature of the files' metadata, without reading them.
func (w *Watcher) sign() string {
	var b strings.Builder
	for _, paths := range [][]string{w.read.files, w.read.folders} {
		for _, path := range paths {
			if info, err := os.Stat(path); err == nil {
				fmt.Fprintln(&b, path, info.Size(), info.ModTime().UnixNano())
			} else {
				fmt.Fprintln(&b, err)
			}
		}
	}
	return b.String()
}

// reads implements rules.Files and records what is read.
type reads struct {
	files, folders []string
	text           bytes.Buffer
}

// readAllOf reads a rule file and its includes.
func readAllOf(name string) (r reads) {
	data, err := ReadFile(name)
	r.note(&r.files, name, data, err)
	if err == nil && bytes.Contains(data, []byte("include")) {
		_, _ = rules.ParseFiles(name, data, &r) // faults are reported where the rules are used
	}
	return r
}

func (r *reads) note(paths *[]string, path string, data []byte, err error) {
	*paths = append(*paths, path)
	fmt.Fprintln(&r.text, path, len(data), err)
	r.text.Write(data)
}

// ReadFile implements rules.Files.
func (r *reads) ReadFile(name string) ([]byte, error) {
	data, err := disk{}.ReadFile(name)
	r.note(&r.files, name, data, err)
	return data, err
}

// ReadDir implements rules.Files. Only the files read count, not the directory.
func (r *reads) ReadDir(dir string) ([]string, error) {
	names, err := disk{}.ReadDir(dir)
	r.note(&r.folders, dir, nil, err)
	return names, err
}
