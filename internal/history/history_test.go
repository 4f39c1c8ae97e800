package history

import (
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

// open opens the store of a directory.
func open(t *testing.T, dir string) *Store {
	t.Helper()
	s, err := Open(filepath.Join(dir, "changes.json"), filepath.Join(dir, "sets"), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func put(t *testing.T, s *Store, text string) Digest {
	t.Helper()
	d, err := s.Put([]byte(text))
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func save(t *testing.T, s *Store, state State) {
	t.Helper()
	if err := s.Save(state); err != nil {
		t.Fatal(err)
	}
}

func entry(file, api Digest, n int) Entry {
	uid := uint32(n)
	return Entry{Change: Change{Time: time.Unix(int64(n), 0).UTC(), What: fmt.Sprint("change ", n), UID: &uid, Added: n}, Set: Set{file, api}, Rules: n}
}

// stored lists the files of sets.
func stored(t *testing.T, s *Store) (names []string) {
	t.Helper()
	files, err := os.ReadDir(s.sets)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	for _, f := range files {
		names = append(names, f.Name())
	}
	return names
}

// TestRandomChanges saves random states, from process to process, with writes that fail
// in between. What is read back is what was saved last, each set that it names has its text,
// and no other set is on the disk.
func TestRandomChanges(t *testing.T) {
	for seed := range uint64(4) {
		r := rand.New(rand.NewPCG(seed, 0))
		dir := t.TempDir()
		s := open(t, dir)
		s.limits = limits{entries: 5, bytes: 400}
		texts := map[Digest]string{}
		var want State
		set := func() Digest {
			text := strings.Repeat(fmt.Sprint("set ", r.IntN(8), "\n"), r.IntN(50))
			d := put(t, s, text)
			texts[d] = text
			return d
		}
		for n := range 30 {
			next := s.State()
			next.Entries = append(next.Entries, entry(set(), set(), n))
			switch r.IntN(4) {
			case 0:
				next.Pending = &Pending{Change: Change{What: "reload"}, Before: Set{set(), set()}, Read: set(), Boot: "boot", Deadline: time.Minute}
			case 1:
				next.Pending = nil
				next.Held = &Held{Config: "/etc/rules.yaml", Undone: set(), File: set()}
			case 2:
				next.Held = nil
			}
			if r.IntN(5) == 0 {
				s.failWrites = unix.ENOSPC
				if err := s.Save(next); !errors.Is(err, unix.ENOSPC) {
					t.Fatalf("Save = %v, want ENOSPC", err)
				}
				s.failWrites = nil
			} else {
				save(t, s, next)
				want = s.State()
				if kept, made := len(want.Entries), len(next.Entries); kept > 5 || kept < min(2, made) {
					t.Fatalf("seed %d: %d entries are kept of %d", seed, kept, made)
				}
				if d := cmp.Diff(next.Entries[len(next.Entries)-len(want.Entries):], want.Entries); d != "" {
					t.Fatalf("seed %d: the entries that are kept are not the last:\n%s", seed, d)
				}
			}
			if r.IntN(3) == 0 {
				s = open(t, dir)
				s.limits = limits{entries: 5, bytes: 400}
			}
			if d := cmp.Diff(want, s.State()); d != "" {
				t.Fatalf("seed %d, change %d: the state is not what was saved:\n%s", seed, n, d)
			}
		}
		save(t, s, s.State()) // removes what failed changes have put
		named := s.state.digests()
		if got := len(stored(t, s)); got != len(named) {
			t.Errorf("seed %d: %d sets are on the disk, %d are named", seed, got, len(named))
		}
		for digest := range named {
			text, err := s.Get(digest)
			if err != nil || string(text) != texts[digest] {
				t.Errorf("seed %d: set %s is %q, %v; want %q", seed, digest, text, err, texts[digest])
			}
		}
	}
}

// TestBounds keeps the two newest entries at any size.
func TestBounds(t *testing.T) {
	s := open(t, t.TempDir())
	s.limits = limits{entries: MaxEntries, bytes: 1}
	for n := range 4 {
		next := s.State()
		next.Entries = append(next.Entries, entry(put(t, s, fmt.Sprint("file", n)), put(t, s, fmt.Sprint("api", n)), n))
		save(t, s, next)
	}
	var kept []int
	for _, e := range s.State().Entries {
		kept = append(kept, e.Rules)
	}
	if d := cmp.Diff([]int{2, 3}, kept); d != "" {
		t.Errorf("entries kept:\n%s", d)
	}
	s.limits = limits{entries: MaxEntries, bytes: MaxBytes}
	for n := range MaxEntries + 3 {
		next := s.State()
		next.Entries = append(next.Entries, entry(put(t, s, "same"), put(t, s, "same"), n))
		save(t, s, next)
	}
	if n := len(s.State().Entries); n != MaxEntries {
		t.Errorf("%d entries are kept, want %d", n, MaxEntries)
	}
	if sets := stored(t, s); len(sets) != 1 {
		t.Errorf("one set is on the disk as %v", sets)
	}
}

// TestDamage reads what is not what was written, or was written by a later release.
func TestDamage(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	text := strings.Repeat("rules: []\n", 100)
	digest := put(t, s, text)
	next := s.State()
	next.Entries = append(next.Entries, entry(digest, digest, 1))
	save(t, s, next)

	blob, err := os.ReadFile(s.path(digest))
	if err != nil {
		t.Fatal(err)
	}
	for at := range len(blob) {
		bad := append([]byte(nil), blob...)
		bad[at] ^= 0x10
		if err := os.WriteFile(s.path(digest), bad, 0o600); err != nil {
			t.Fatal(err)
		}
		got, err := s.Get(digest)
		if err == nil && string(got) != text || err != nil && !errors.Is(err, ErrDamaged) {
			t.Errorf("byte %d flipped: Get = %q, %v", at, got, err)
		}
	}
	for n := range len(blob) {
		if err := os.WriteFile(s.path(digest), blob[:n], 0o600); err != nil {
			t.Fatal(err)
		}
		if got, err := s.Get(digest); !errors.Is(err, ErrDamaged) {
			t.Fatalf("%d bytes of %d: Get = %q, %v; want ErrDamaged", n, len(blob), got, err)
		}
	}
	if again := put(t, s, text); again != digest {
		t.Errorf("Put of a damaged set = %s", again)
	}
	if got, err := s.Get(digest); err != nil || string(got) != text {
		t.Errorf("Put has not repaired the set: %q, %v", got, err)
	}
	if err := os.Remove(s.path(digest)); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Get(digest); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("Get of a set that is gone: %v", err)
	}

	for _, tt := range []struct{ name, text, want string }{
		{"empty", "", "damaged"},
		{"cut off", `{"version": 1, "entries": [`, "damaged"},
		{"no version", `{"entries": []}`, "damaged"},
		{"other type", `{"version": 1, "entries": {}}`, "damaged"},
		{"a path for a digest", `{"version": 1, "entries": [{"file": "../../etc/passwd", "api": ""}]}`, "is no digest of a set"},
		{"later release", `{"version": 2, "entries": {}}`, "version 2 is of a later release: want at most 1"},
	} {
		if err := os.WriteFile(s.file, []byte(tt.text), 0o600); err != nil {
			t.Fatal(err)
		}
		_, err := Open(s.file, s.sets, s.log)
		if err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: Open = %v, want %q", tt.name, err, tt.want)
		}
	}
}

// FuzzDecode holds changes.json to error or value, and a value to what is written of it.
func FuzzDecode(f *testing.F) {
	f.Add([]byte(`{"version":1,"entries":[{"time":"2026-01-02T03:04:05Z","what":"reload","uid":0,"file":"` + string(Sum(nil)) + `","api":"` + string(Sum(nil)) + `"}]}`))
	f.Add([]byte(`{"version":1,"pending":{"boot":"x","deadline":5},"held":{"config":"/a"}}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		state, err := decode(data)
		if err != nil {
			if len(state.Entries) > 0 || state.Pending != nil || state.Held != nil {
				t.Errorf("a state and an error: %v", err)
			}
			return
		}
		for digest := range state.digests() {
			if strings.ContainsAny(string(digest), "/.") {
				t.Errorf("digest %q is a path", digest)
			}
		}
	})
}

func TestClock(t *testing.T) {
	clock, err := NewClock()
	if err != nil {
		t.Fatal(err)
	}
	if clock.Boot == "" || clock.Now() <= 0 {
		t.Errorf("boot %q, %v ago", clock.Boot, clock.Now())
	}
	clock.Now = func() time.Duration { return time.Hour }
	for _, tt := range []struct {
		name string
		p    Pending
		want time.Duration
	}{
		{"in time", Pending{Boot: clock.Boot, Deadline: time.Hour + time.Minute}, time.Minute},
		{"over", Pending{Boot: clock.Boot, Deadline: time.Hour - time.Minute}, -time.Minute},
		{"another boot", Pending{Boot: "other", Deadline: 2 * time.Hour}, 0},
	} {
		if got := clock.Left(&tt.p); got != tt.want {
			t.Errorf("%s: %v left, want %v", tt.name, got, tt.want)
		}
	}
}
