package membership

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// IGMPVersions returns the IGMP version that the kernel uses on each interface, by index: 3, or 1
// or 2 while it has heard a querier of that version (RFC 3376 section 7.2.1) or force_igmp_version
// is set. Interfaces without IPv4 groups are missing. It reads the network namespace of the calling
// thread, in quadratic time in the groups of an interface: see OpenIGMPTable for callers that cannot
// wait.
func IGMPVersions() (map[int]int, error) {
	t, err := OpenIGMPTable()
	if err != nil {
		return nil, err
	}
	defer t.Close()
	return t.Versions()
}

// IGMPTable is the kernel's table of interfaces and their IPv4 groups.
type IGMPTable struct{ file *os.File }

// OpenIGMPTable opens the table of the network namespace of the calling thread. The caller must Close
// it, which it may do from another goroutine to end Versions.
func OpenIGMPTable() (*IGMPTable, error) {
	file, err := os.Open("/proc/thread-self/net/igmp")
	if err != nil {
		return nil, fmt.Errorf("read IGMP versions: %w", err)
	}
	return &IGMPTable{file}, nil
}

// Versions is IGMPVersions. It may be called once, from any goroutine. An error matches os.ErrClosed
// after Close.
func (t *IGMPTable) Versions() (map[int]int, error) {
	table, err := io.ReadAll(t.file)
	if err != nil {
		return nil, fmt.Errorf("read IGMP versions: %w", err)
	}
	versions, err := parseIGMPVersions(table)
	if err != nil {
		return nil, fmt.Errorf("/proc/net/igmp: %w", err)
	}
	return versions, nil
}

// Close closes the table. Closing it again returns an error that matches os.ErrClosed.
func (t *IGMPTable) Close() error { return t.file.Close() }

// parseIGMPVersions parses the lines of interfaces, which begin with the index and end with the
// version (igmp_mc_seq_show in net/ipv4/igmp.c):
//
//	Idx	Device    : Count Querier	Group    Users Timer	Reporter
//	2	eth0      :     2      V3
//					010101EF     1 0:00000000		0
func parseIGMPVersions(table []byte) (map[int]int, error) {
	versions := map[int]int{}
	for line := range bytes.Lines(table) {
		if line[0] < '0' || line[0] > '9' {
			continue // the header, or a group
		}
		fields := strings.Fields(string(line))
		index, err := strconv.Atoi(fields[0])
		if err != nil {
			return nil, fmt.Errorf("line %q: interface index: %w", line, err)
		}
		last := fields[len(fields)-1]
		digits, ok := strings.CutPrefix(last, "V")
		version, err := strconv.Atoi(digits)
		if !ok || err != nil || version < 1 || version > 3 {
			return nil, fmt.Errorf("line %q: version %q: want V1, V2 or V3", line, last)
		}
		versions[index] = version
	}
	return versions, nil
}

// MLDVersion returns the MLD version that the kernel uses on an interface. The kernel does not
// report it, so this is its rule (RFC 3810 section 8.2.1): force_mld_version if set, otherwise 1
// while it hears MLDv1 queries, which the caller must know, otherwise 2. It reads the network
// namespace of the calling thread.
func MLDVersion(ifname string, hearsV1 bool) int {
	// An interface without IPv6 has no such file, and forces nothing.
	forced, _ := os.ReadFile(filepath.Join("/proc/sys/net/ipv6/conf", ifname, "force_mld_version"))
	switch strings.TrimSpace(string(forced)) {
	case "1":
		return 1
	case "2":
		return 2
	}
	if hearsV1 {
		return 1
	}
	return 2
}
