package main

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// Each file is a command's, or the list at the top of main.go says what it holds; each
// command has a file, or that list says where it is.
func TestOneFileACommand(t *testing.T) {
	text, err := os.ReadFile("main.go")
	if err != nil {
		t.Fatal(err)
	}
	doc, _, _ := strings.Cut(string(text), "\npackage main")
	words := strings.FieldsFunc(doc, func(r rune) bool { return strings.ContainsRune(" ,;:/\t\n", r) })
	var commands []string
	for _, c := range newApp(time.Now).Commands {
		commands = append(commands, c.Name)
		if _, err := os.Stat(c.Name + ".go"); err != nil && !slices.Contains(words, c.Name) {
			t.Errorf("command %s has no file of its own, and main.go does not say where it is", c.Name)
		}
	}
	files, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		command, _, _ := strings.Cut(strings.TrimSuffix(file, ".go"), "_")
		if strings.HasSuffix(file, "_test.go") || file == "main.go" || slices.Contains(commands, command) || slices.Contains(words, file) {
			continue
		}
		t.Errorf("%s is not a command's: say at the top of main.go what it holds", file)
	}
	for _, word := range words {
		if strings.HasSuffix(word, ".go") && !strings.Contains(word, "*") && !slices.Contains(files, word) {
			t.Errorf("main.go names %s, which is not there", word)
		}
	}
}
