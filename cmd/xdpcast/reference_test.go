package main

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/cpuguy83/go-md2man/v2/md2man"
	"github.com/urfave/cli/v2"
)

// TestReference holds docs/cli.md to the commands as they are.
func TestReference(t *testing.T) {
	golden(t, "../../docs/cli.md", reference(newApp(time.Now)))
}

// TestManPage holds the man page of the packages to the commands as they are.
func TestManPage(t *testing.T) {
	golden(t, "../../packaging/man/xdpcast.8", string(md2man.Render([]byte(manPage(newApp(time.Now))))))
}

// manPage renders the commands as the Markdown that md2man makes a man page of.
func manPage(app *cli.App) string {
	var b strings.Builder
	b.WriteString("% XDPCAST 8\n\n# NAME\n\nxdpcast - " + app.Usage + "\n\n# SYNOPSIS\n\n**xdpcast** [*flags*] *command* [*arguments*]\n\n" +
		"# DESCRIPTION\n\nxdpcast takes UDP streams in on one interface and sends them out, rewritten, on others: in XDP programs " +
		"where the devices allow it, through AF_XDP or AF_PACKET sockets elsewhere. **xdpcast run** is the daemon; the other commands " +
		"talk to it, or read what it has pinned in the kernel.\n\n" +
		"A rule's input is written *[SOURCE@]ADDRESS[/LEN][:PORT]%INTERFACE[,option...]*, and its outputs likewise with policies, such as " +
		"*239.2.2.2:6000%eth1,ttl=8*. **/usr/share/doc/xdpcast/rules.md** has the grammar.\n\n# FLAGS\n\n")
	manFlags(&b, app.Flags)
	b.WriteString("# COMMANDS\n\n")
	manCommands(&b, app.Name, app.Commands)
	b.WriteString("# FILES\n\n**/etc/xdpcast/rules.yaml**\n: the rules of the packaged service\n\n" +
		"**/run/xdpcast**\n: the control socket, the lock file, and the rules that were added through the API\n\n" +
		"**/var/lib/xdpcast**\n: the sets of rules that **xdpcast rollback** brings back\n\n" +
		"**/sys/fs/bpf/xdpcast**\n: programs, maps and attachments, which outlive the daemon\n\n" +
		"# EXIT STATUS\n\n0: done and saved. 1: failed. 2: wrong usage. Errors go to standard error, a line each.\n\n" +
		"# SEE ALSO\n\n**bpftool**(8), **ip-link**(8), **ethtool**(8); /usr/share/doc/xdpcast\n")
	return b.String()
}

func manCommands(b *strings.Builder, parent string, commands []*cli.Command) {
	for _, c := range commands {
		if c.Hidden {
			continue
		}
		path := parent + " " + c.Name
		if len(c.Subcommands) > 0 {
			manCommands(b, path, c.Subcommands)
			continue
		}
		fmt.Fprintf(b, "## %s %s\n\n%s\n\n", path, strings.ReplaceAll(c.ArgsUsage, "<", "\\<"), c.Usage)
		if c.Description != "" {
			fmt.Fprintf(b, "%s\n\n", description(c.Description))
		}
		manFlags(b, c.Flags)
	}
}

func manFlags(b *strings.Builder, flags []cli.Flag) {
	for _, f := range flags {
		doc, ok := f.(cli.DocGenerationFlag)
		if visible, isVisible := f.(cli.VisibleFlag); !ok || isVisible && !visible.IsVisible() {
			continue
		}
		fmt.Fprintf(b, "**%s**\n: %s", strings.ReplaceAll(flagNames(doc), "`", ""), strings.ReplaceAll(flagMeaning(doc), "`", "*"))
		if value := flagDefault(doc); value != "" {
			fmt.Fprintf(b, " (default %s)", strings.Trim(value, "`"))
		}
		b.WriteString("\n\n")
	}
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
