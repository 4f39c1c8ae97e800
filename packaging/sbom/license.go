package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime/debug"
	"slices"
	"strings"

	"github.com/google/licensecheck"
)

// licensesOf returns the license of each module, as an SPDX expression, from its sources, which the
// build has downloaded.
func licensesOf(modules []*debug.Module) (map[*debug.Module]string, error) {
	args := []string{"mod", "download", "-json"}
	for _, m := range modules {
		args = append(args, m.Path+"@"+m.Version)
	}
	cmd := exec.Command(goCommand(), args...)
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("go mod download: %w", err)
	}
	dirs := map[string]string{}
	for dec := json.NewDecoder(bytes.NewReader(out)); ; {
		var m struct{ Path, Version, Dir string }
		if err := dec.Decode(&m); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			return nil, fmt.Errorf("go mod download: %w", err)
		}
		dirs[m.Path+"@"+m.Version] = m.Dir
	}
	licenses := map[*debug.Module]string{}
	for _, m := range modules {
		if licenses[m], err = licenseIn(dirs[m.Path+"@"+m.Version]); err != nil {
			return nil, fmt.Errorf("module %s: %w", m.Path, err)
		}
	}
	return licenses, nil
}

func goCommand() string {
	if path := os.Getenv("GO"); path != "" {
		return path
	}
	return "go"
}

// licenseOfGo is the license of the standard library.
func licenseOfGo() (string, error) {
	root, err := exec.Command(goCommand(), "env", "GOROOT").Output()
	if err != nil {
		return "", fmt.Errorf("go env GOROOT: %w", err)
	}
	return licenseIn(strings.TrimSpace(string(root)))
}

// permissive are the licenses of modules that may be linked into the program: those that require no
// more than a notice.
var permissive = regexp.MustCompile(`^(MIT|Apache-2\.0|BSD-[23]-Clause|ISC)( (AND|OR) (MIT|Apache-2\.0|BSD-[23]-Clause|ISC|GPL-2\.0-only))*$`)

// exceptions are modules with another license, by path, with the license and the reason; none so
// far.
var exceptions = map[string]struct{ license, reason string }{}

// checkLicenses reports the modules linked into a package whose licenses are not allowed.
func checkLicenses(dir, pkg string) error {
	cmd := exec.Command(goCommand(), "list", "-deps", "-f", "{{with .Module}}{{if not .Main}}{{.Path}} {{.Dir}}{{end}}{{end}}", pkg)
	cmd.Dir, cmd.Stderr = dir, os.Stderr
	out, err := cmd.Output()
	if err != nil {
		return fmt.Errorf("go list: %w", err)
	}
	lines := strings.Split(strings.TrimSpace(string(out)), "\n")
	slices.Sort(lines)
	var errs []error
	for _, line := range slices.Compact(lines) {
		module, sources, _ := strings.Cut(line, " ")
		if module == "" {
			continue // of the standard library, and our own
		}
		license, err := licenseIn(sources)
		switch {
		case err != nil:
			errs = append(errs, fmt.Errorf("module %s: %w", module, err))
		case !permissive.MatchString(license) && exceptions[module].license != license:
			errs = append(errs, fmt.Errorf("module %s has the license %s: want MIT, Apache-2.0, BSD, ISC, or a reason among the exceptions of packaging/sbom/license.go", module, license))
		}
	}
	return errors.Join(errs...)
}

var (
	licenseFile = regexp.MustCompile(`(?i)^(licen[sc]e|copying)(\.(txt|md))?$`)
	spdxLine    = regexp.MustCompile(`SPDX-License-Identifier: ([A-Za-z0-9.()+ -]*[A-Za-z0-9.)+])`)
)

// licenseIn returns the license of a directory: the one its license files declare, otherwise what
// their texts match. An unknown text is an error: a person has to read it.
func licenseIn(dir string) (string, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return "", err
	}
	var ids []string
	for _, e := range entries {
		if !licenseFile.MatchString(e.Name()) || !e.Type().IsRegular() {
			continue
		}
		text, err := os.ReadFile(filepath.Join(dir, e.Name()))
		if err != nil {
			return "", err
		}
		if declared := spdxLine.FindSubmatch(text); declared != nil {
			return string(declared[1]), nil
		}
		found := licensecheck.Scan(text)
		if found.Percent < 75 {
			return "", fmt.Errorf("%s: %.0f%% of it are a known license", filepath.Join(dir, e.Name()), found.Percent)
		}
		for _, m := range found.Match {
			ids = append(ids, m.ID)
		}
	}
	if ids == nil {
		return "", fmt.Errorf("no license in %s", dir)
	}
	slices.Sort(ids)
	return strings.Join(slices.Compact(ids), " AND "), nil
}
