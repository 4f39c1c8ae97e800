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

func TestLicenseIn(t *testing.T) {
	dir := t.TempDir()
	expect := func(name, text, want, fault string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		got, err := licenseIn(dir)
		if got != want || (err == nil) != (fault == "") || err != nil && !strings.Contains(err.Error(), fault) {
			t.Errorf("%s: %q, %v; want %q, %q", name, got, err, want, fault)
		}
	}
	if _, err := licenseIn(dir); err == nil || !strings.Contains(err.Error(), "no license in") {
		t.Errorf("an empty directory: %v", err)
	}
	own, err := os.ReadFile("../../LICENSE")
	if err != nil {
		t.Fatal(err)
	}
	expect("LICENSE", string(own), "Apache-2.0", "")
	expect("COPYING", "All rights reserved by whoever wrote this, and nobody else may use it.", "", "of it are a known license")
	expect("COPYING", "/* SPDX-License-Identifier: BSD-3-Clause OR GPL-2.0-only */\n", "BSD-3-Clause OR GPL-2.0-only", "")
}

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
		if c.Licenses == nil || len(*c.Licenses) != 1 || !permissive.MatchString((*c.Licenses)[0].Expression) {
			t.Errorf("%s has the licenses %+v: want permissive ones", c.Name, c.Licenses)
		}
	}
	for missing := range want {
		t.Errorf("it does not list %s", missing)
	}
	if err := write(filepath.Join(t.TempDir(), "x"), "/etc/passwd", "1", made); err == nil {
		t.Error("a file that is no Go binary was described")
	}
}

// Every module linked into the program has an allowed license, and any other license is found.
func TestCheckLicenses(t *testing.T) {
	if err := checkLicenses("../..", "./cmd/xdpcast"); err != nil {
		t.Error(err)
	}
	for license, want := range map[string]bool{
		"MIT": true, "Apache-2.0": true, "BSD-3-Clause AND MIT": true, "BSD-3-Clause OR GPL-2.0-only": true,
		"MPL-2.0": false, "GPL-2.0-only": false, "MIT AND MPL-2.0": false, "": false,
	} {
		if got := permissive.MatchString(license); got != want {
			t.Errorf("license %q: allowed is %v", license, got)
		}
	}
}
