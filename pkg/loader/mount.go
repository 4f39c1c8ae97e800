package loader

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// privateMount is a warning if the BPF file system of a pin directory is mounted in this process's
// mount namespace but not in that of the host's first process: it ends with the namespace, together
// with all pins. "" if that is not so, or cannot be determined.
func privateMount(pinDir string) string {
	var st unix.Stat_t
	if err := unix.Stat(pinDir, &st); err != nil {
		return ""
	}
	mounts, err := os.Open("/proc/1/mountinfo")
	if err != nil {
		return ""
	}
	defer mounts.Close()
	if known, err := isMounted(mounts, st.Dev); err != nil || known {
		return ""
	}
	return fmt.Sprintf("the BPF file system of %s is mounted in this mount namespace alone: when its last process ends, the relaying ends with it"+
		" (\"ip netns exec\" makes such a namespace: use \"nsenter --net=FILE\", or mount a BPF file system outside and name it by --pin-dir)", filepath.Clean(pinDir))
}

// isMounted says whether a list of mounts (proc_pid_mountinfo(5)) contains the file system of a
// device:
//
//	36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw
func isMounted(mounts io.Reader, device uint64) (bool, error) {
	want := fmt.Sprintf("%d:%d", unix.Major(device), unix.Minor(device))
	lines := bufio.NewScanner(mounts)
	for lines.Scan() {
		if fields := strings.Fields(lines.Text()); len(fields) > 2 && fields[2] == want {
			return true, nil
		}
	}
	return false, lines.Err()
}
