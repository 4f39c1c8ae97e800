package loader

import (
	"fmt"
	"strings"

	"golang.org/x/sys/unix"
)

// capability is a capability that the loader needs, named as in capabilities(7).
type capability struct {
	name   string
	number uint
	// orAdmin: the kernel also accepts CAP_SYS_ADMIN.
	orAdmin bool
}

var (
	needed = [...]capability{
		{"CAP_BPF", unix.CAP_BPF, true},
		{"CAP_PERFMON", unix.CAP_PERFMON, true},
		{"CAP_NET_ADMIN", unix.CAP_NET_ADMIN, false},
	}
	// capNetRaw is for packet sockets and AF_XDP sockets, which some paths need.
	capNetRaw = capability{"CAP_NET_RAW", unix.CAP_NET_RAW, false}
)

func (c capability) in(effective uint64) bool {
	return effective&(1<<c.number) != 0 || c.orAdmin && effective&(1<<unix.CAP_SYS_ADMIN) != 0
}

// effectiveCapabilities are those of the calling thread, one bit each.
func effectiveCapabilities() (uint64, error) {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&header, &data[0]); err != nil {
		return 0, fmt.Errorf("read capabilities: %w", err)
	}
	return uint64(data[1].Effective)<<32 | uint64(data[0].Effective), nil
}

// checkCapabilities names missing capabilities, which the kernel's errors do not. The warning is
// about those that only some paths need; the error matches os.ErrPermission.
func checkCapabilities() (warning string, err error) {
	effective, err := effectiveCapabilities()
	if err != nil {
		return "", err
	}
	return capabilitiesIn(effective)
}

func capabilitiesIn(effective uint64) (warning string, err error) {
	missing, optional := MissingCapabilities(effective)
	if len(missing) > 0 {
		return "", fmt.Errorf("without %s (see capabilities(7)): %w", strings.Join(missing, ", "), unix.EPERM)
	}
	if len(optional) > 0 {
		return "without " + strings.Join(optional, ", ") + " the paths afxdp and fanout do not work", nil
	}
	return "", nil
}
