package bpf

import (
	"crypto/sha256"
	"encoding/hex"
	"path/filepath"
	"strings"
	"testing"
)

// The committed objects were made from the committed C: sources.txt, which
// generating them writes, has the hash of every source. No compiler is needed to
// find a stale object.
func TestObjectsAreNotStale(t *testing.T) {
	recorded := map[string]string{}
	for line := range strings.Lines(readFile(t, "sources.txt")) {
		fields := strings.Fields(line)
		if len(fields) == 2 && len(fields[0]) == hex.EncodedLen(sha256.Size) {
			recorded[strings.TrimPrefix(fields[1], "bpf/")] = fields[0]
		}
	}
	var sources []string
	for _, pattern := range []string{"*.bpf.c", "include/*.h"} {
		found, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		sources = append(sources, found...)
	}
	for _, source := range sources {
		hash := sha256.Sum256([]byte(readFile(t, source)))
		if got := hex.EncodeToString(hash[:]); recorded[source] != got {
			t.Errorf("%s has changed since the objects were made: run make generate", source)
		}
		delete(recorded, source)
	}
	for source := range recorded {
		t.Errorf("the objects were made from %s, which is gone: run make generate", source)
	}
	if len(sources) == 0 {
		t.Error("found no sources")
	}
}
