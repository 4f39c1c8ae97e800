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

// licensesOf finds the license of each module, as an SPDX expression, in its sources, which the
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

// licenseOfGo is that of the standard library.
func licenseOfGo() (string, error) {
	root, err := exec.Command(goCommand(), "env", "GOROOT").Output()
	if err != nil {
		return "", fmt.Errorf("go env GOROOT: %w", err)
	}
	return licenseIn(strings.TrimSpace(string(root)))
}

var (
	licenseFile = regexp.MustCompile(`(?i)^(licen[sc]e|copying)(\.(txt|md))?$`)
	spdxLine    = regexp.MustCompile(`SPDX-License-Identifier: ([A-Za-z0-9.()+ -]*[A-Za-z0-9.)+])`)
)

// licenseIn reads the license files of a directory: what they declare, or else what their texts are.
// A text that is not known is an error: somebody has to read it.
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
