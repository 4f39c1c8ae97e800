package labtest

import (
	"bytes"
	"os"
)

// Emulated says whether the CPU is one of QEMU, as in the virtual machines of test/kernels.txt: far slower than
// others, and with a root that may do everything.
func Emulated() bool {
	text, err := os.ReadFile("/proc/cpuinfo")
	return err == nil && bytes.Contains(text, []byte("QEMU"))
}
