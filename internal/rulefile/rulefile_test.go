package rulefile_test

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"xdpcast/internal/rulefile"
	"xdpcast/pkg/rules"
)

func write(t *testing.T, name, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(name, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

const (
	camera = "rules:\n  - {name: cam1, in: 239.1.1.1:5000%eth0, out: [239.2.2.1:5000%eth1]}\n"
	studio = "rules:\n  - {name: mic1, in: 239.1.1.2:5000%eth0, out: [239.2.2.2:5000%eth1]}\n"
)

func TestRead(t *testing.T) {
	dir := t.TempDir()
	main := dir + "/rules.yaml"
	write(t, main, "include: rules.d/*.yaml\n"+camera)
	write(t, dir+"/rules.d/mic.yaml", studio)
	write(t, dir+"/rules.d/.#mic.yaml", "not yet")
	if err := os.Symlink("mic.yaml", dir+"/rules.d/other"); err != nil {
		t.Fatal(err)
	}
	c, err := rulefile.Read(main)
	all := c.Rules
	if err != nil || len(all) != 2 || all[0].Name != "cam1" || all[1].Name != "mic1" {
		t.Errorf("%v, %v", all, err)
	}
}

func TestReadFaults(t *testing.T) {
	dir := t.TempDir()
	main := dir + "/rules.yaml"
	write(t, dir+"/b.yaml", strings.Replace(studio, "mic1", "cam1", 1))
	if err := unix.Mkfifo(dir+"/pipe", 0o600); err != nil {
		t.Fatal(err)
	}
	for include, want := range map[string]string{
		"[b.yaml]":    dir + `/b.yaml:2: rule "cam1": name "cam1": want a unique name: rule #1 (` + main + `:3) has it`,
		"pipe":        main + `:1: include "pipe": ` + dir + `/pipe: want a regular file`,
		".":           main + `:1: include ".": ` + dir + `: want a regular file`,
		"c.yaml":      main + `:1: include "c.yaml": open ` + dir + `/c.yaml: no such file or directory`,
		"rules.d/*":   main + `:1: include "rules.d/*": open ` + dir + `/rules.d: no such file or directory`,
		"rules.ya*":   main + `:1: include "rules.ya*": ` + main + ` is this file: want only others`,
		"b.yaml/none": main + `:1: include "b.yaml/none": open ` + dir + `/b.yaml/none: not a directory`,
	} {
		write(t, main, "include: "+include+"\n"+camera)
		c, err := rulefile.Read(main)
		all := c.Rules
		var fault *rules.FileError
		if all != nil || !errors.As(err, &fault) || err.Error() != want {
			t.Errorf("include %s: %v\n%v\nwant %s", include, all, err, want)
		}
	}
	if _, err := rulefile.Read(dir + "/none.yaml"); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
	if err := os.Truncate(dir+"/b.yaml", rules.MaxFileSize+1); err != nil {
		t.Fatal(err)
	}
	if _, err := rulefile.Read(dir + "/b.yaml"); err == nil || !strings.Contains(err.Error(), "more than a file of rules can have") {
		t.Error(err)
	}
}
