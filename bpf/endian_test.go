package bpf

import (
	"go/build"
	"path/filepath"
	"testing"
)

// Every machine that Go compiles for either gets the programs, or the one line that says
// why it does not.
func TestEveryMachineIsTakenOrRefused(t *testing.T) {
	generated, err := filepath.Glob("*_bpfel.go")
	if err != nil || len(generated) == 0 {
		t.Fatalf("%d generated files, %v", len(generated), err)
	}
	bigEndian := map[string]bool{"mips": true, "mips64": true, "ppc64": true, "s390x": true}
	for _, arch := range []string{
		"386", "amd64", "arm", "arm64", "loong64", "mips", "mips64", "mips64le", "mipsle", "ppc64", "ppc64le", "riscv64", "s390x",
	} {
		ctx := build.Default
		ctx.GOOS, ctx.GOARCH = "linux", arch
		for _, file := range append(generated, "bigendian.go") {
			want := bigEndian[arch] == (file == "bigendian.go")
			if got, err := ctx.MatchFile(".", file); err != nil || got != want {
				t.Errorf("%s, %s: compiled %v, want %v: %v", arch, file, got, want, err)
			}
		}
	}
}
