package membership

import (
	"bufio"
	"bytes"
	"cmp"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"sync/atomic"
	"time"
)

// Observe reads from the kernel which groups the interfaces have joined, in the network namespace
// of the calling thread, and forgets memberships whose group is missing: the sockets still have
// those, but the interface lost them, as it does when it leaves the namespace, even if it comes
// back, or when its MTU becomes too small for IP. It returns the lost memberships, sorted; they can
// be joined again.
//
// It ignores source filters: the kernel's list of them is incomplete. It takes quadratic time in
// the groups of an interface: two seconds with 100,000. See Look for callers that cannot wait.
func (m *Manager) Observe() (lost []Membership, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.observe()
}

func (m *Manager) observe() (lost []Membership, err error) {
	look, err := m.look()
	if err != nil {
		return nil, err
	}
	defer look.close()
	if err := look.read(m.missing); err != nil {
		return nil, err
	}
	return m.forget(look), nil
}

// Look is Observe in parts: Manager.Look must be called in the network namespace and is fast;
// Look.Read takes all the time and may be called from any goroutine while the manager is used;
// Manager.Forget applies the result.
type Look struct {
	m       *Manager
	at      time.Duration // from Manager.started
	room    int           // for groups
	tables  []groupTable
	stopped atomic.Bool
	lost    map[heldKey]bool
}

// groupTable is one of the kernel's lists of groups, opened in the network namespace.
type groupTable struct {
	name string
	file *os.File
	add  func(joined *joinedGroups, line []byte) error
}

// heldKey identifies a membership.
type heldKey struct {
	of life
	key
}

// Look opens the kernel's lists of groups, for the families of held memberships. The caller must
// Read it.
func (m *Manager) Look() (*Look, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.look()
}

func (m *Manager) look() (_ *Look, err error) {
	var want4, want6 bool
	for _, p := range m.ifaces {
		for k := range p.records {
			group, _ := k.addrs()
			want4, want6 = want4 || group.Is4(), want6 || group.Is6()
			if want4 && want6 {
				break
			}
		}
	}
	l := &Look{m: m, at: time.Since(m.started), room: otherGroups}
	for _, p := range m.ifaces {
		l.room += len(p.records)
	}
	index := 0 // of the interface whose lines follow
	for _, t := range []struct {
		groupTable
		want bool
	}{
		{groupTable{name: "igmp", add: func(joined *joinedGroups, line []byte) error { return addGroup4(joined, &index, line) }}, want4},
		{groupTable{name: "igmp6", add: addGroup6}, want6},
	} {
		if !t.want {
			continue
		}
		t.file, err = os.Open("/proc/thread-self/net/" + t.name)
		if errors.Is(err, os.ErrNotExist) {
			l.close()
			l.tables = nil // a kernel without the family, or without procfs, reports nothing
			return l, nil
		}
		if err != nil {
			l.close()
			return nil, fmt.Errorf("groups that are joined: %w", err)
		}
		l.tables = append(l.tables, t.groupTable)
	}
	return l, nil
}

// Stop makes Read end soon. It may be called from any goroutine.
func (l *Look) Stop() { l.stopped.Store(true) }

// Read reads the joined groups. It may be called once.
func (l *Look) Read() error {
	defer l.close()
	return l.read(func(l *Look, joined *joinedGroups) map[heldKey]bool {
		l.m.mu.Lock()
		defer l.m.mu.Unlock()
		return l.m.missing(l, joined)
	})
}

func (l *Look) read(compare func(*Look, *joinedGroups) map[heldKey]bool) error {
	if len(l.tables) == 0 {
		return nil
	}
	joined, err := l.joined()
	if err != nil || l.stopped.Load() {
		return err
	}
	missing := compare(l, joined)
	if len(missing) == 0 {
		return nil
	}
	// An entry may be missing from a list that changes while it is read, and leaving a held group
	// would interrupt its packets: a lost group must be missing twice.
	if joined, err = l.joined(); err != nil || l.stopped.Load() {
		return err
	}
	again := compare(l, joined)
	maps.DeleteFunc(missing, func(k heldKey, _ bool) bool { return !again[k] })
	l.lost = missing
	return nil
}

func (l *Look) close() {
	for _, t := range l.tables {
		_ = t.file.Close()
	}
}

// joined reads the lists until stopped.
func (l *Look) joined() (*joinedGroups, error) {
	joined := &joinedGroups{list: make([]groupOn, 0, l.room)}
	for _, t := range l.tables {
		_, err := t.file.Seek(0, io.SeekStart)
		lines := bufio.NewScanner(t.file)
		for err == nil && !l.stopped.Load() && lines.Scan() {
			err = t.add(joined, lines.Bytes())
		}
		if err = cmp.Or(err, lines.Err()); err != nil {
			return nil, fmt.Errorf("groups that are joined: /proc/net/%s: %w", t.name, err)
		}
	}
	slices.SortFunc(joined.list, groupOn.compare)
	return joined, nil
}

// missing returns the memberships held since before the look whose group is not joined.
func (m *Manager) missing(l *Look, joined *joinedGroups) map[heldKey]bool {
	missing := map[heldKey]bool{}
	for of, p := range m.ifaces {
		for k, r := range p.records {
			group, _ := k.addrs()
			if r.since < l.at && !joined.has(of.index, group) {
				missing[heldKey{of, k}] = true
			}
		}
	}
	return missing
}

// Forget forgets the memberships that a look found lost, if they have been held since before it,
// and returns them, sorted.
func (m *Manager) Forget(l *Look) (lost []Membership) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.forget(l)
}

func (m *Manager) forget(l *Look) (lost []Membership) {
	for k := range l.lost {
		p := m.ifaces[k.of]
		if p == nil {
			continue
		}
		r := p.records[k.key]
		if r == nil || r.since >= l.at {
			continue
		}
		ms := r.named(k.of, k.key)
		delete(p.records, k.key)
		_ = m.kernelLeave(p, r, ms) // so that the socket can join it again
		m.forgetIfEmpty(p, k.of)
		lost = append(lost, ms)
	}
	slices.SortFunc(lost, Membership.Compare)
	return lost
}

// joinedGroups are the groups that interfaces have joined: a list of 20 bytes for each, sorted once it is complete. A map takes
// six times as much, and as much again while it grows, every few seconds.
type joinedGroups struct{ list []groupOn }

// otherGroups is room for groups that the kernel joins by itself, a few on each interface.
const otherGroups = 64

// groupOn is a group on an interface.
type groupOn struct {
	index int32
	group [16]byte // netip.Addr.As16: multicast groups of the two families differ
}

func (g groupOn) compare(o groupOn) int {
	return cmp.Or(cmp.Compare(g.index, o.index), bytes.Compare(g.group[:], o.group[:]))
}

func (j *joinedGroups) add(index int, group netip.Addr) {
	j.list = append(j.list, groupOn{int32(index), group.As16()})
}

func (j *joinedGroups) has(index int, group netip.Addr) bool {
	_, found := slices.BinarySearchFunc(j.list, groupOn{int32(index), group.As16()}, groupOn.compare)
	return found
}

// addGroup4 parses a line of the table of parseIGMPVersions: the line of an interface is followed
// by one for each of its groups, which begins with a tab and the address's bytes as a number in
// host byte order (igmp_mc_seq_show in net/ipv4/igmp.c). index is the interface's.
func addGroup4(joined *joinedGroups, index *int, line []byte) error {
	first, _, _ := bytes.Cut(bytes.TrimLeft(line, "\t "), []byte{'\t'})
	first, _, _ = bytes.Cut(first, []byte{' '})
	switch {
	case len(first) == 0 || line[0] == 'I': // the header
	case line[0] != '\t':
		n, err := strconv.Atoi(string(first))
		if err != nil {
			return fmt.Errorf("line %q: interface index: %w", line, err)
		}
		*index = n
	default:
		var addr [4]byte
		n, err := strconv.ParseUint(string(first), 16, 32)
		if err != nil {
			return fmt.Errorf("line %q: group: %w", line, err)
		}
		binary.NativeEndian.PutUint32(addr[:], uint32(n))
		joined.add(*index, netip.AddrFrom4(addr))
	}
	return nil
}

// addGroup6 parses a line like this (igmp6_mc_seq_show in net/ipv6/mcast.c):
//
//	7    eth0            ff3e0000000000000000000000000001     1 00000004 0
func addGroup6(joined *joinedGroups, line []byte) error {
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
	joined.add(index, netip.AddrFrom16(addr))
	return nil
}
