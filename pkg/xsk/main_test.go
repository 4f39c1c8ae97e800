package xsk

import (
	"fmt"
	"os"
	"testing"

	"xdpcast/internal/labtest"
)

func TestMain(m *testing.M) {
	if told := os.Getenv(victimVariable); told != "" {
		fmt.Fprintln(os.Stderr, runVictim(told))
		os.Exit(1)
	}
	labtest.Main(m)
}
