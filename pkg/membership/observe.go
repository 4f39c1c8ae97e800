package membership

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strconv"
)

// Observe asks the kernel which groups the interfaces have joined, in the network
// namespace of the calling thread, and forgets the memberships whose group is not among
// them: the sockets still have those, but the interface lost them, as it does when it leaves
// the namespace, even if it comes back, or when its MTU becomes too small for IP. It returns
// them, sorted; they can be joined again.
//
// Source filters are not looked at: the kernel's list of them is not complete. How
// long it takes is quadratic in the groups of an interface: half a second with
// 100,000.
func (m *Manager) Observe() (lost []Membership, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.observe()
}

func (m *Manager) observe() (lost []Membership, err error) {
	missing, err := m.missing()
	if err != nil || len(missing) == 0 {
		return nil, err
	}
	// An entry may be missing from a list that changes while it is read, and to leave a group
	// that is held would interrupt its packets: what is lost is missing twice.
	again, err := m.missing()
	if err != nil {
		return nil, err
	}
	for r := range missing {
		if !again[r] {
			continue
		}
		ms := r.status.Membership
		p := m.ifaces[ms.life()]
		delete(p.records, ms.key())
		_ = m.kernelLeave(p, r) // so that the socket can join it again
		m.forgetIfEmpty(p, ms.life())
		lost = append(lost, ms)
	}
	slices.SortFunc(lost, Membership.Compare)
	return lost, nil
}

// missing returns the records whose group the kernel does not list.
func (m *Manager) missing() (map[*record]bool, error) {
	var want4, want6 bool
	for _, p := range m.ifaces {
		for of := range p.records {
			want4, want6 = want4 || of.group.Is4(), want6 || of.group.Is6()
		}
	}
	joined := map[groupOn]bool{}
	for _, file := range []struct {
		name string
		want bool
		add  func(joined map[groupOn]bool, table []byte) error
	}{{"igmp", want4, addGroups4}, {"igmp6", want6, addGroups6}} {
		if !file.want {
			continue
		}
		table, err := os.ReadFile("/proc/thread-self/net/" + file.name)
		if errors.Is(err, os.ErrNotExist) {
			return nil, nil // a kernel without the family, or without procfs, tells nothing
		}
		if err == nil {
			err = file.add(joined, table)
		}
		if err != nil {
			return nil, fmt.Errorf("groups that are joined: /proc/net/%s: %w", file.name, err)
		}
	}
	missing := map[*record]bool{}
	for of, p := range m.ifaces {
		for k, r := range p.records {
			if !joined[groupOn{of.index, k.group}] {
				missing[r] = true
			}
		}
	}
	return missing, nil
}

// groupOn is a group on an interface.
type groupOn struct {
	index int
	group netip.Addr
}

// addGroups4 reads the table of parseIGMPVersions: below the line of an interface one for each
// of its groups, which begins with a tab and the address as a number of the host's byte order
// over the address's bytes (igmp_mc_seq_show in net/ipv4/igmp.c).
func addGroups4(joined map[groupOn]bool, table []byte) error {
	index := 0
	for line := range bytes.Lines(table) {
		fields := bytes.Fields(line)
		switch {
		case len(fields) == 0 || line[0] == 'I': // the title
		case line[0] != '\t':
			n, err := strconv.Atoi(string(fields[0]))
			if err != nil {
				return fmt.Errorf("line %q: interface index: %w", line, err)
			}
			index = n
		default:
			n, err := strconv.ParseUint(string(fields[0]), 16, 32)
			if err != nil {
				return fmt.Errorf("line %q: group: %w", line, err)
			}
			var addr [4]byte
			binary.NativeEndian.PutUint32(addr[:], uint32(n))
			joined[groupOn{index, netip.AddrFrom4(addr)}] = true
		}
	}
	return nil
}

// addGroups6 reads lines like (igmp6_mc_seq_show in net/ipv6/mcast.c):
//
//	7    eth0            ff3e0000000000000000000000000001     1 00000004 0
func addGroups6(joined map[groupOn]bool, table []byte) error {
	for line := range bytes.Lines(table) {
		fields := bytes.Fields(line)
		if len(fields) < 3 {
			return fmt.Errorf("line %q: want an index, a name and a group", line)
		}
		index, err := strconv.Atoi(string(fields[0]))
		if err != nil {
			return fmt.Errorf("line %q: interface index: %w", line, err)
		}
		var addr [16]byte
		if n, err := hex.Decode(addr[:], fields[2][:min(len(fields[2]), 32)]); err != nil || n != len(addr) {
			return fmt.Errorf("line %q: group %q: want 32 hexadecimal digits", line, fields[2])
		}
		joined[groupOn{index, netip.AddrFrom16(addr)}] = true
	}
	return nil
}
