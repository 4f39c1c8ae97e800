package main

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/urfave/cli/v2"
)

// TestReference holds docs/cli.md to the commands as they are.
func TestReference(t *testing.T) {
	golden(t, "../../docs/cli.md", reference(newApp(time.Now)))
}

// reference renders the commands as Markdown.
func reference(app *cli.App) string {
	var b strings.Builder
	b.WriteString("# Commands\n\n" +
		"Generated from the program: `go test ./cmd/xdpcast -run TestReference -update`.\n\n" +
		"Exit codes: 0 done, 1 failed, 2 wrong usage. Errors go to standard error, a line each. " +
		"Flags may stand before or behind the arguments, and those of the program before or behind the command; " +
		"after `--`, nothing is a flag.\n\n" +
		"## xdpcast\n\n" + app.Usage + "\n\n")
	writeFlags(&b, app.Flags)
	writeCommands(&b, app.Name, app.Commands)
	return strings.TrimRight(b.String(), "\n") + "\n"
}

func writeCommands(b *strings.Builder, parent string, commands []*cli.Command) {
	for _, c := range commands {
		if c.Hidden {
			continue
		}
		path := parent + " " + c.Name
		if len(c.Subcommands) > 0 {
			writeCommands(b, path, c.Subcommands)
			continue
		}
		synopsis := path
		if c.ArgsUsage != "" {
			synopsis += " " + c.ArgsUsage
		}
		if len(c.Flags) > 0 {
			synopsis += " [flags]"
		}
		fmt.Fprintf(b, "## %s\n\n    %s\n\n", path, synopsis)
		if c.Usage != "" {
			fmt.Fprintf(b, "%s\n\n", c.Usage)
		}
		if c.Description != "" {
			fmt.Fprintf(b, "%s\n\n", description(c.Description))
		}
		writeFlags(b, c.Flags)
	}
}

// description makes lines indented by three blanks a block of code, which
// takes four.
func description(text string) string {
	lines := strings.Split(text, "\n")
	for i, line := range lines {
		if strings.HasPrefix(line, "   ") {
			lines[i] = " " + line
		}
	}
	return strings.Join(lines, "\n")
}

func writeFlags(b *strings.Builder, flags []cli.Flag) {
	rows := 0
	for _, f := range flags {
		doc, ok := f.(cli.DocGenerationFlag)
		if visible, isVisible := f.(cli.VisibleFlag); !ok || isVisible && !visible.IsVisible() {
			continue
		}
		if rows == 0 {
			b.WriteString("| flag | meaning | default |\n|---|---|---|\n")
		}
		rows++
		fmt.Fprintf(b, "| %s | %s | %s |\n", flagNames(doc), flagMeaning(doc), flagDefault(doc))
	}
	if rows > 0 {
		b.WriteString("\n")
	}
}

func flagNames(f cli.DocGenerationFlag) string {
	var names []string
	for _, name := range f.Names() {
		dashes := "--"
		if len(name) == 1 {
			dashes = "-"
		}
		names = append(names, "`"+dashes+name+"`")
	}
	return strings.Join(names, ", ")
}

func flagMeaning(f cli.DocGenerationFlag) string {
	meaning := strings.ReplaceAll(f.GetUsage(), "|", "\\|")
	if vars := f.GetEnvVars(); len(vars) > 0 {
		meaning += " (environment: `" + strings.Join(vars, "`, `") + "`)"
	}
	return meaning
}

func flagDefault(f cli.DocGenerationFlag) string {
	value := f.GetDefaultText()
	if value == "" {
		value = f.GetValue()
	}
	if !f.TakesValue() || value == "" || value == "[]" {
		return ""
	}
	return "`" + strings.Trim(value, "\"") + "`"
}
