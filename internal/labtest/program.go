package labtest

import (
	"context"
	"fmt"
	"os/exec"
	"path/filepath"
	"time"
)

// buildTimeout allows for a build with an empty cache on a slow machine.
const buildTimeout = 5 * time.Minute

// BuildProgram builds the xdpcast program in dir, with go build's further flags, and
// returns its path. For TestMain and tests that run the program as users do.
func BuildProgram(dir string, flags ...string) (string, error) {
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
