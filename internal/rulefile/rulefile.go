// Package rulefile reads files of rules, and those that they include, from disk.
package rulefile

import (
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"

	"xdpcast/pkg/rules"
)

// Read reads, parses and validates the file of a daemon with what it includes; see
// rules.ParseConfig. What is wrong with a file is a *rules.FileError; a file that cannot
// be read, one of package os.
func Read(name string) (rules.Config, error) {
	data, err := ReadFile(name)
	if err != nil {
		return rules.Config{}, err
	}
	return Parse(name, data)
}

// Parse is Read with what the file holds; name says from where it includes others.
func Parse(name string, data []byte) (rules.Config, error) {
	return rules.ParseConfig(name, data, disk{})
}

// ParseRules is Parse for a file of rules alone.
func ParseRules(name string, data []byte) ([]rules.Rule, error) {
	return rules.ParseFiles(name, data, disk{})
}

// Find says in which file a rule stands, and in which line; see rules.FindInFiles.
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

// disk is rules.Files.
type disk struct{}

// ReadFile reads an included file. Only a regular one: a pattern may match a pipe, which
// would hold up the reader for ever.
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
