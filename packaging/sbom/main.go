// Sbom writes the software bill of materials of a Go binary, in CycloneDX 1.6: the modules that the
// linker recorded in it, with their versions, checksums and licenses, and the standard library. The
// same binary and time give the same file.
//
//	sbom -o FILE [-time SECONDS] BINARY
//
// Or it checks that all modules linked into a package have allowed licenses:
//
//	sbom -check DIR PACKAGE
package main

import (
	"bytes"
	"crypto/sha256"
	"debug/buildinfo"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"flag"
	"fmt"
	"os"
	"runtime/debug"
	"strings"
	"time"

	cyclonedx "github.com/CycloneDX/cyclonedx-go"
)

func main() {
	out := flag.String("o", "", "`FILE` to write")
	seconds := flag.Int64("time", 0, "when it was made, in `SECONDS` since 1970")
	version := flag.String("version", "", "of the program")
	check := flag.String("check", "", "check the licenses of the modules that a package links, from `DIR`")
	flag.Parse()
	if *check != "" && flag.NArg() == 1 {
		if err := checkLicenses(*check, flag.Arg(0)); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	if flag.NArg() != 1 || *out == "" || *version == "" {
		flag.Usage()
		os.Exit(2)
	}
	if err := write(*out, flag.Arg(0), *version, time.Unix(*seconds, 0).UTC()); err != nil {
		fmt.Fprintf(os.Stderr, "sbom: %v\n", err)
		os.Exit(1)
	}
}

func write(out, binary, version string, made time.Time) error {
	bom, err := describe(binary, version, made)
	if err != nil {
		return fmt.Errorf("%s: %w", binary, err)
	}
	var text bytes.Buffer
	if err := cyclonedx.NewBOMEncoder(&text, cyclonedx.BOMFileFormatJSON).SetPretty(true).EncodeVersion(bom, cyclonedx.SpecVersion1_6); err != nil {
		return err
	}
	return os.WriteFile(out, text.Bytes(), 0o644)
}

// describe returns the bill of materials of a binary.
func describe(binary, version string, made time.Time) (*cyclonedx.BOM, error) {
	data, err := os.ReadFile(binary)
	if err != nil {
		return nil, err
	}
	info, err := buildinfo.Read(bytes.NewReader(data))
	if err != nil {
		return nil, err
	}
	sum := sha256.Sum256(data)
	goos, goarch := setting(info, "GOOS"), setting(info, "GOARCH")
	program := cyclonedx.Component{
		BOMRef: "pkg:generic/xdpcast@" + version + "?arch=" + goarch, Type: cyclonedx.ComponentTypeApplication,
		Name: "xdpcast", Version: version, PackageURL: "pkg:generic/xdpcast@" + version + "?arch=" + goarch,
		Hashes:   &[]cyclonedx.Hash{{Algorithm: cyclonedx.HashAlgoSHA256, Value: hex.EncodeToString(sum[:])}},
		Licenses: expression("Apache-2.0 AND (BSD-2-Clause OR GPL-2.0-only)"), // the latter for the BPF programs
	}
	var modules []*debug.Module
	for _, m := range info.Deps {
		if m.Replace != nil {
			m = m.Replace
		}
		modules = append(modules, m)
	}
	licenses, err := licensesOf(modules)
	if err != nil {
		return nil, err
	}
	ofGo, err := licenseOfGo()
	if err != nil {
		return nil, err
	}
	toolchain := strings.TrimPrefix(info.GoVersion, "go")
	components := []cyclonedx.Component{{
		BOMRef: "pkg:golang/std@" + toolchain, Type: cyclonedx.ComponentTypeLibrary, Name: "std", Version: toolchain,
		PackageURL: fmt.Sprintf("pkg:golang/std@%s?type=module&goos=%s&goarch=%s", toolchain, goos, goarch),
		Licenses:   expression(ofGo),
	}}
	for _, m := range modules {
		c, err := component(m, licenses[m])
		if err != nil {
			return nil, err
		}
		components = append(components, c)
	}
	var refs []string
	for _, c := range components {
		refs = append(refs, c.BOMRef)
	}
	bom := cyclonedx.NewBOM()
	bom.Metadata = &cyclonedx.Metadata{Timestamp: made.Format(time.RFC3339), Component: &program}
	bom.Components = &components
	bom.Dependencies = &[]cyclonedx.Dependency{{Ref: program.BOMRef, Dependencies: &refs}}
	return bom, nil
}

func setting(info *debug.BuildInfo, key string) string {
	for _, s := range info.Settings {
		if s.Key == key {
			return s.Value
		}
	}
	return ""
}

// component describes a module. Its checksum is that of go.sum: the SHA-256 of the list of its
// files with their checksums (golang.org/x/mod/sumdb/dirhash).
func component(m *debug.Module, license string) (cyclonedx.Component, error) {
	raw, err := base64.StdEncoding.DecodeString(strings.TrimPrefix(m.Sum, "h1:"))
	if err != nil || len(raw) != sha256.Size {
		return cyclonedx.Component{}, errors.Join(fmt.Errorf("module %s: checksum %q", m.Path, m.Sum), err)
	}
	purl := "pkg:golang/" + m.Path + "@" + m.Version
	return cyclonedx.Component{
		BOMRef: purl, Type: cyclonedx.ComponentTypeLibrary, Name: m.Path, Version: m.Version, PackageURL: purl + "?type=module",
		Hashes: &[]cyclonedx.Hash{{Algorithm: cyclonedx.HashAlgoSHA256, Value: hex.EncodeToString(raw)}}, Licenses: expression(license),
	}, nil
}

// expression is a license as an SPDX expression.
func expression(spdx string) *cyclonedx.Licenses { return &cyclonedx.Licenses{{Expression: spdx}} }
