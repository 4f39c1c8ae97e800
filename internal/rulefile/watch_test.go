package rulefile

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"xdpcast/internal/labtest"
	"xdpcast/pkg/rules"
)

// watching is a watcher that runs; each change of the files is one value of changed.
type watching struct {
	t       *testing.T
	changed chan struct{}
}

func watch(t *testing.T, name string, again time.Duration) *watching {
	t.Helper()
	w, err := NewWatcher(name, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	w.quiet, w.again = 20*time.Millisecond, again
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	changed := make(chan struct{}, 100)
	go func() {
		defer close(ended)
		w.Run(ctx, func() { changed <- struct{}{} })
	}()
	t.Cleanup(func() {
		cancel()
		<-ended
	})
	return &watching{t, changed}
}

// until waits for changes until the condition holds after one.
func (w *watching) until(what string, condition func() bool) {
	w.t.Helper()
	deadline := time.After(labtest.Timeout)
	for {
		select {
		case <-w.changed:
			if condition() {
				return
			}
		case <-deadline:
			w.t.Fatalf("%s: not noticed", what)
		}
	}
}

// must fails a test on any error.
func must(t *testing.T, errs ...error) {
	t.Helper()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
}

// ruleText is a file with one rule, or what is in front of it.
func ruleText(head string, n int) []byte {
	return fmt.Appendf(nil, "%srules: [{name: r%d, in: 239.1.1.1:%d%%eth0, out: [239.2.2.2:5000%%eth1]}]\n", head, n, n)
}

// reads the name of the only rule.
func holds(name string, n int) func() bool {
	return func() bool {
		c, err := Read(name)
		return err == nil && len(c.Rules) == 1 && c.Rules[0].Name == fmt.Sprint("r", n)
	}
}

// swap makes a link lead elsewhere by a rename, as Kubernetes does.
func swap(t *testing.T, link, target string) {
	t.Helper()
	must(t, os.Symlink(target, link+".tmp"), os.Rename(link+".tmp", link))
}

// TestWatchFinds notices each way in which a file comes to hold something else.
func TestWatchFinds(t *testing.T) {
	write := func(path string, n int) {
		t.Helper()
		must(t, os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, ruleText("", n), 0o600))
	}
	for _, tt := range []struct {
		name string
		// prepare makes the file with rule 1 and returns its name; change makes it hold rule 2.
		prepare func(dir string) string
		change  func(dir string)
	}{
		{"written in place", func(dir string) string {
			write(dir+"/rules.yaml", 1)
			return dir + "/rules.yaml"
		}, func(dir string) { write(dir+"/rules.yaml", 2) }},
		{"replaced by a rename", func(dir string) string {
			write(dir+"/rules.yaml", 1)
			return dir + "/rules.yaml"
		}, func(dir string) {
			write(dir+"/new", 2)
			must(t, os.Rename(dir+"/new", dir+"/rules.yaml"))
		}},
		{"removed and made again", func(dir string) string {
			write(dir+"/rules.yaml", 1)
			return dir + "/rules.yaml"
		}, func(dir string) {
			must(t, os.Remove(dir+"/rules.yaml"))
			write(dir+"/rules.yaml", 2)
		}},
		{"absent at first", func(dir string) string { return dir + "/later/rules.yaml" }, func(dir string) { write(dir+"/later/rules.yaml", 2) }},
		{"ConfigMap", func(dir string) string {
			write(dir+"/..1/rules.yaml", 1)
			must(t, os.Symlink("..1", dir+"/..data"), os.Symlink("..data/rules.yaml", dir+"/rules.yaml"))
			return dir + "/rules.yaml"
		}, func(dir string) {
			write(dir+"/..2/rules.yaml", 2)
			swap(t, dir+"/..data", "..2")
			must(t, os.RemoveAll(dir+"/..1"))
		}},
		{"link to a file elsewhere", func(dir string) string {
			write(dir+"/etc/a/rules.yaml", 1)
			must(t, os.Symlink("etc/a/rules.yaml", dir+"/rules.yaml"))
			return dir + "/rules.yaml"
		}, func(dir string) { write(dir+"/etc/a/rules.yaml", 2) }},
		{"directory replaced", func(dir string) string {
			write(dir+"/etc/rules.yaml", 1)
			return dir + "/etc/rules.yaml"
		}, func(dir string) {
			write(dir+"/etc2/rules.yaml", 2)
			must(t, os.Rename(dir+"/etc", dir+"/old"), os.Rename(dir+"/etc2", dir+"/etc"))
		}},
		{"chain of links", func(dir string) string {
			write(dir+"/a/rules.yaml", 1)
			must(t, os.Symlink(dir+"/a", dir+"/b"), os.Symlink("b", dir+"/c"), os.Symlink("c/rules.yaml", dir+"/rules.yaml"))
			return dir + "/rules.yaml"
		}, func(dir string) {
			write(dir+"/other/rules.yaml", 2)
			swap(t, dir+"/b", "other")
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			name := tt.prepare(dir)
			w := watch(t, name, time.Hour)
			tt.change(dir)
			w.until(tt.name, holds(name, 2))
			must(t, os.WriteFile(name+".beside", nil, 0o600))
			swap := ruleText("", 3)
			must(t, os.WriteFile(name, swap, 0o600))
			w.until("written afterwards", holds(name, 3))
		})
	}
}

// TestWatchIncludes notices files that come, change and go in what is included.
func TestWatchIncludes(t *testing.T) {
	dir := t.TempDir()
	name := dir + "/rules.yaml"
	must(t, os.WriteFile(name, []byte("include: [rules.d/*.yaml]\nrules: []\n"), 0o600))
	w := watch(t, name, time.Hour)
	rules := func(want int) func() bool {
		return func() bool {
			c, err := Read(name)
			return err == nil && len(c.Rules) == want
		}
	}
	must(t, os.Mkdir(dir+"/rules.d", 0o755))
	w.until("directory", rules(0))
	must(t, os.WriteFile(dir+"/rules.d/a.yaml", ruleText("", 1), 0o600))
	w.until("file", rules(1))
	must(t, os.WriteFile(dir+"/rules.d/b.tmp", ruleText("", 2), 0o600), os.Rename(dir+"/rules.d/b.tmp", dir+"/rules.d/b.yaml"))
	w.until("second file", rules(2))
	must(t, os.Remove(dir+"/rules.d/a.yaml"))
	w.until("removed", rules(1))
}

// TestWatchIgnores says nothing of what changes no rule, and notices the next change.
func TestWatchIgnores(t *testing.T) {
	dir := t.TempDir()
	name := dir + "/rules.yaml"
	must(t, os.WriteFile(name, ruleText("", 1), 0o600))
	w := watch(t, name, time.Hour)
	now := time.Now()
	again, err := os.OpenFile(name, os.O_WRONLY, 0) // not os.WriteFile, in the middle of which it is empty
	must(t, err)
	_, err = again.Write(ruleText("", 1))
	must(t, err, again.Close(), os.WriteFile(dir+"/other", nil, 0o600), os.Chtimes(name, now, now), os.Chmod(name, 0o644))
	must(t, os.WriteFile(name+"2", ruleText("", 1), 0o600), os.Rename(name+"2", name))
	select {
	case <-w.changed:
		t.Error("a change is told although the file holds the same")
	case <-time.After(200 * time.Millisecond): // several times what is waited for
	}
	must(t, os.WriteFile(name, ruleText("", 2), 0o600))
	w.until("change", holds(name, 2))
}

// TestWatchLooksAgain finds what the kernel has not announced.
func TestWatchLooksAgain(t *testing.T) {
	dir := t.TempDir()
	name := dir + "/rules.yaml"
	must(t, os.WriteFile(name, ruleText("", 1), 0o600))
	w, err := NewWatcher(name, slog.New(slog.DiscardHandler))
	must(t, err)
	for _, dir := range w.notify.WatchList() {
		must(t, w.notify.Remove(dir))
	}
	w.quiet, w.again = time.Millisecond, time.Millisecond
	ctx, cancel := context.WithCancel(t.Context())
	changed, ended := make(chan struct{}, 1), make(chan struct{})
	go func() {
		defer close(ended)
		w.Run(ctx, func() { changed <- struct{}{} })
	}()
	must(t, os.WriteFile(name, ruleText("# longer\n", 2), 0o600))
	(&watching{t, changed}).until("change", holds(name, 2))
	cancel()
	<-ended
}

// TestWatchRandom changes a file, its directory and the links to it at random while it is
// watched, without waiting. In the end the last change has been told.
func TestWatchRandom(t *testing.T) {
	for seed := range uint64(5) {
		random := rand.New(rand.NewPCG(seed, 3))
		dir := t.TempDir()
		name := dir + "/etc/rules.yaml"
		must(t, os.Mkdir(dir+"/etc", 0o755), os.WriteFile(name, ruleText("", 1), 0o600))
		w := watch(t, name, time.Hour)
		n := 1
		for range 30 {
			n++
			file := fmt.Sprint(dir, "/file", n)
			must(t, os.WriteFile(file, ruleText("", n), 0o600))
			switch random.IntN(4) {
			case 0:
				must(t, os.Rename(file, name))
			case 1:
				swap(t, name, file)
			case 2:
				must(t, os.Rename(dir+"/etc", fmt.Sprint(dir, "/old", n)), os.Mkdir(dir+"/etc", 0o755), os.Rename(file, name))
			case 3:
				must(t, os.Rename(dir+"/etc", fmt.Sprint(dir, "/old", n)), os.Mkdir(fmt.Sprint(dir, "/real", n), 0o755),
					os.Rename(file, fmt.Sprint(dir, "/real", n, "/rules.yaml")), os.Symlink(fmt.Sprint("real", n), dir+"/etc"))
			}
			time.Sleep(time.Duration(random.IntN(3)) * 10 * time.Millisecond) // any moment will do
		}
		n++
		must(t, os.WriteFile(dir+"/last", ruleText("", n), 0o600), os.Rename(dir+"/last", name))
		w.until(fmt.Sprint("seed ", seed), holds(name, n))
	}
}

var _ rules.Files = (*reads)(nil)

// TestWatchBesideOthers notices a change of an included file beside others that change without a pause.
func TestWatchBesideOthers(t *testing.T) {
	dir := t.TempDir()
	name := dir + "/rules.yaml"
	must(t, os.Mkdir(dir+"/d", 0o755), os.WriteFile(name, []byte("include: d/*.yaml\n"), 0o600), os.WriteFile(dir+"/d/a.yaml", ruleText("", 1), 0o600))
	w, err := NewWatcher(name, slog.New(slog.DiscardHandler))
	must(t, err)
	w.quiet, w.patience, w.again = 200*time.Millisecond, time.Second, time.Hour
	ctx, cancel := context.WithCancel(context.Background())
	changed := make(chan struct{}, 100)
	var running sync.WaitGroup
	running.Go(func() { w.Run(ctx, func() { changed <- struct{}{} }) })
	running.Go(func() {
		for ctx.Err() == nil {
			if err := errors.Join(os.WriteFile(dir+"/d/metrics.tmp", []byte("x"), 0o600), os.Rename(dir+"/d/metrics.tmp", dir+"/d/metrics")); err != nil {
				t.Error(err)
			}
			time.Sleep(time.Millisecond) // many times in the quiet time, on a busy machine, too
		}
	})
	defer running.Wait()
	defer cancel()
	must(t, os.WriteFile(dir+"/d/a.yaml", ruleText("", 2), 0o600))
	(&watching{t, changed}).until("an included file", holds(name, 2))
}
