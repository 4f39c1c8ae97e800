package mroute

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"net/netip"
	"os"
	"strconv"
)

// On is a group on an interface.
type On struct {
	Index int
	Group netip.Addr
}

// Joins counts the members of a group on an interface.
type Joins struct {
	// Sockets is the number of members, including the host's own memberships.
	Sockets int
	// sources maps each source to the number of sockets that include it (INCLUDE mode of RFC 3376).
	sources map[netip.Addr]int
}

// Joined is this host's group memberships.
type Joined map[On]Joins

// Receives reports whether the kernel may deliver packets from a source to sockets of this host. It
// ignores without of them; named lists the sources that these name, each its own. It errs towards
// true: the kernel does not report how many sockets exclude sources (ip_check_mc_rcu of
// net/ipv4/igmp.c).
func (j Joins) Receives(source netip.Addr, without int, named []netip.Addr) bool {
	sockets := j.Sockets - without
	if sockets <= 0 {
		return false
	}
	less := map[netip.Addr]int{}
	for _, s := range named {
		less[s]++
	}
	most := 0 // lower bound of the sockets in INCLUDE mode
	for s, n := range j.sources {
		n -= less[s]
		if s == source && n > 0 {
			return true
		}
		most = max(most, n)
	}
	return most < sockets
}

// Equal reports whether two are equal.
func (j Joins) Equal(o Joins) bool {
	if j.Sockets != o.Sockets || len(j.sources) != len(o.sources) {
		return false
	}
	for s, n := range j.sources {
		if o.sources[s] != n {
			return false
		}
	}
	return true
}

// ReadJoined reads the groups joined in the calling thread's network namespace.
func ReadJoined() (Joined, error) {
	joined := Joined{}
	for _, t := range []struct {
		name  string
		parse func(Joined, []byte) error
	}{{"igmp", Joined.addGroups4}, {"igmp6", Joined.addGroups6}, {"mcfilter", Joined.addSources4}, {"mcfilter6", Joined.addSources6}} {
		// Not /proc/net, which is the namespace of the process's first thread.
		data, err := os.ReadFile("/proc/thread-self/net/" + t.name)
		if os.IsNotExist(err) {
			continue // a kernel without IPv6
		}
		if err == nil {
			err = t.parse(joined, data)
		}
		if err != nil {
			return nil, fmt.Errorf("groups that programs have joined: /proc/net/%s: %w", t.name, err)
		}
	}
	return joined, nil
}

// addGroups4 parses igmp_mc_seq_show of net/ipv4/igmp.c: a line for each interface, followed by one
// for each of its groups: a tab, the address (its bytes as a hexadecimal integer in host byte
// order), and the number of users.
func (j Joined) addGroups4(data []byte) error {
	index := 0
	for line := range bytes.Lines(data) {
		fields := bytes.Fields(line)
		if len(fields) == 0 || line[0] == 'I' { // the header
			continue
		}
		if line[0] != '\t' {
			n, err := strconv.Atoi(string(fields[0]))
			if err != nil {
				return fmt.Errorf("line %q: interface index: %w", line, err)
			}
			index = n
			continue
		}
		if len(fields) < 2 {
			return fmt.Errorf("line %q: want a group and its users", line)
		}
		n, err := strconv.ParseUint(string(fields[0]), 16, 32)
		if err != nil {
			return fmt.Errorf("line %q: group: %w", line, err)
		}
		var addr [4]byte
		binary.NativeEndian.PutUint32(addr[:], uint32(n))
		if err := j.addUsers(index, netip.AddrFrom4(addr), fields[1]); err != nil {
			return fmt.Errorf("line %q: %w", line, err)
		}
	}
	return nil
}

// addGroups6 reads igmp6_mc_seq_show of net/ipv6/mcast.c:
//
//	7    eth0            ff3e0000000000000000000000000001     1 00000004 0
func (j Joined) addGroups6(data []byte) error {
	for line := range bytes.Lines(data) {
		fields := bytes.Fields(line)
		if len(fields) < 4 {
			return fmt.Errorf("line %q: want an index, a name, a group and its users", line)
		}
		index, err := strconv.Atoi(string(fields[0]))
		if err != nil {
			return fmt.Errorf("line %q: interface index: %w", line, err)
		}
		group, err := hexAddr6(fields[2])
		if err == nil {
			err = j.addUsers(index, group, fields[3])
		}
		if err != nil {
			return fmt.Errorf("line %q: %w", line, err)
		}
	}
	return nil
}

func (j Joined) addUsers(index int, group netip.Addr, users []byte) error {
	n, err := strconv.Atoi(string(users))
	if err != nil {
		return fmt.Errorf("users: %w", err)
	}
	j[On{index, group}] = Joins{Sockets: n}
	return nil
}

// addSources4 reads igmp_mcf_seq_show of net/ipv4/igmp.c:
//
//	7   eth0 0xe8010101 0x0a000005      1      0
func (j Joined) addSources4(data []byte) error {
	return j.addSources(data, func(text []byte) (netip.Addr, error) {
		n, err := strconv.ParseUint(string(bytes.TrimPrefix(text, []byte("0x"))), 16, 32)
		var addr [4]byte
		binary.BigEndian.PutUint32(addr[:], uint32(n))
		return netip.AddrFrom4(addr), err
	})
}

// addSources6 reads igmp6_mcf_seq_show of net/ipv6/mcast.c.
func (j Joined) addSources6(data []byte) error {
	return j.addSources(data, hexAddr6)
}

// addSources parses lines of index, name, group, source, number of sockets that include the source,
// and number of sockets that exclude it.
func (j Joined) addSources(data []byte, address func([]byte) (netip.Addr, error)) error {
	for line := range bytes.Lines(data) {
		fields := bytes.Fields(line)
		if line[0] == 'I' { // the header
			continue
		}
		if len(fields) != 6 {
			return fmt.Errorf("line %q: want an index, a name, a group, a source and two numbers", line)
		}
		group, err := address(fields[2])
		if err != nil {
			return fmt.Errorf("line %q: group: %w", line, err)
		}
		source, err := address(fields[3])
		if err != nil {
			return fmt.Errorf("line %q: source: %w", line, err)
		}
		index, err := strconv.Atoi(string(fields[0]))
		if err != nil {
			return fmt.Errorf("line %q: interface index: %w", line, err)
		}
		take, err := strconv.Atoi(string(fields[4]))
		if err != nil {
			return fmt.Errorf("line %q: sockets: %w", line, err)
		}
		on := On{index, group}
		joins, ok := j[on]
		if !ok {
			continue // joined after the groups were read: the next call finds it
		}
		if joins.sources == nil {
			joins.sources = map[netip.Addr]int{}
		}
		joins.sources[source] = take
		j[on] = joins
	}
	return nil
}

func hexAddr6(text []byte) (netip.Addr, error) {
	var addr [16]byte
	if n, err := hex.Decode(addr[:], text[:min(len(text), 32)]); err != nil || n != len(addr) {
		return netip.Addr{}, fmt.Errorf("address %q: want 32 hexadecimal digits", text)
	}
	return netip.AddrFrom16(addr), nil
}
