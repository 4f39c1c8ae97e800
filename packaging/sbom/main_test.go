package main

import (
	"bytes"
	"os"
	"path/filepath"
	"runtime/debug"
	"strings"
	"testing"
	"time"

	cyclonedx "github.com/CycloneDX/cyclonedx-go"
)

// TestDescribe describes this test's own binary, whose modules the runtime knows.
func TestDescribe(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	made := time.Unix(1_700_000_000, 0).UTC()
	var texts [2][]byte
	for i := range texts {
		out := filepath.Join(t.TempDir(), "sbom.json")
		if err := write(out, self, "1.2.3", made); err != nil {
			t.Fatal(err)
		}
		if texts[i], err = os.ReadFile(out); err != nil {
			t.Fatal(err)
		}
	}
	if !bytes.Equal(texts[0], texts[1]) {
		t.Error("two of one binary differ")
	}
	var bom cyclonedx.BOM
	if err := cyclonedx.NewBOMDecoder(bytes.NewReader(texts[0]), cyclonedx.BOMFileFormatJSON).Decode(&bom); err != nil {
		t.Fatal(err)
	}
	if m := bom.Metadata; m.Component.Name != "xdpcast" || m.Component.Version != "1.2.3" || m.Timestamp != "2023-11-14T22:13:20Z" {
		t.Errorf("it describes %+v", m)
	}
	info, ok := debug.ReadBuildInfo()
	if !ok {
		t.Fatal("the runtime knows no modules")
	}
	want := map[string]bool{"pkg:golang/std@" + strings.TrimPrefix(info.GoVersion, "go"): true}
	for _, m := range info.Deps {
		want["pkg:golang/"+m.Path+"@"+m.Version] = true
	}
	if len(want) < 2 {
		t.Fatal("the runtime knows no modules")
	}
	for _, c := range *bom.Components {
		if !want[c.BOMRef] {
			t.Errorf("it lists %s, which is not in the binary, or lists it twice", c.BOMRef)
		}
		delete(want, c.BOMRef)
	}
	for missing := range want {
		t.Errorf("it does not list %s", missing)
	}
	if err := write(filepath.Join(t.TempDir(), "x"), "/etc/passwd", "1", made); err == nil {
		t.Error("a file that is no Go binary was described")
	}
}
