// Package rulefile reads rule files and their includes from disk.
package rulefile

import (
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"

	"xdpcast/pkg/rules"
)

// Read reads, parses and validates a daemon's file and its includes; see rules.ParseConfig. Faults
// of a file are *rules.FileError; errors of reading it are those of package os.
func Read(name string) (rules.Config, error) {
	data, err := ReadFile(name)
	if err != nil {
		return rules.Config{}, err
	}
	return Parse(name, data)
}

// Parse is Read with the given contents; name is the base for its includes.
func Parse(name string, data []byte) (rules.Config, error) {
	return rules.ParseConfig(name, data, disk{})
}

// ParseRules is Parse for a file with only rules.
func ParseRules(name string, data []byte) ([]rules.Rule, error) {
	return rules.ParseFiles(name, data, disk{})
}

// Find returns the file and line of a rule; see rules.FindInFiles.
func Find(rule, name string) (file string, line int, ok bool) {
	data, err := ReadFile(name)
	if err != nil {
		return "", 0, false
	}
	return rules.FindInFiles(rule, name, data, disk{})
}

// ReadFile reads a file of at most rules.MaxFileSize bytes.
func ReadFile(name string) ([]byte, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return readAll(f, name)
}

func readAll(f io.Reader, name string) ([]byte, error) {
	data, err := io.ReadAll(io.LimitReader(f, rules.MaxFileSize+1))
	switch {
	case err != nil:
		return nil, err
	case len(data) > rules.MaxFileSize:
		return nil, fmt.Errorf("%s: over %d bytes, which is more than a file of rules can have", name, rules.MaxFileSize)
	}
	return data, nil
}

// disk implements rules.Files.
type disk struct{}

// ReadFile reads an included file. It must be regular: a pattern may match a pipe, which would
// block the reader forever.
func (disk) ReadFile(name string) ([]byte, error) {
	f, err := os.OpenFile(name, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	switch {
	case err != nil:
		return nil, err
	case !info.Mode().IsRegular():
		return nil, fmt.Errorf("%s: want a regular file", name)
	}
	return readAll(f, name)
}

// ReadDir returns the names in a directory.
func (disk) ReadDir(dir string) ([]string, error) {
	f, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return f.Readdirnames(-1)
}
