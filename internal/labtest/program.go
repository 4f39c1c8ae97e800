package labtest

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"time"
)

// buildTimeout allows for a build with an empty cache on a slow machine.
const buildTimeout = 5 * time.Minute

// built is the environment variable that names an xdpcast program that has been built already: once for all
// test processes of scripts/test, or for a machine without Go, as those of scripts/kernels.
const built = "XDPCAST_E2E_PROGRAM"

// Program returns the path of the xdpcast program under test, for TestMain and tests that run the program as
// users do: the one that the environment names, or else one that it builds in dir, with go build's further flags.
func Program(dir string, flags ...string) (string, error) {
	if program := os.Getenv(built); program != "" {
		return program, nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), buildTimeout)
	defer cancel()
	program := filepath.Join(dir, "xdpcast")
	// Without the commit, which git refuses if another user owns the checkout.
	args := append([]string{"build", "-buildvcs=false", "-o", program}, flags...)
	if out, err := exec.CommandContext(ctx, "go", append(args, "xdpcast/cmd/xdpcast")...).CombinedOutput(); err != nil {
		return "", fmt.Errorf("build the program: %w\n%s", err, out)
	}
	return program, nil
}
