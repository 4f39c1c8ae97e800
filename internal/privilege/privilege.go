// Package privilege reduces a process to a user and to the capabilities that the daemon needs, on
// all of its threads, and verifies the result with the kernel.
//
// See capabilities(7), and Documentation/userspace-api/no_new_privs.rst of the kernel.
package privilege

import (
	"errors"
	"fmt"
	"os"
	"os/user"
	"slices"
	"strconv"

	"golang.org/x/sys/unix"
	"kernel.org/pub/linux/libs/security/libcap/cap"
)

// Needed are the capabilities that the daemon needs.
func Needed() []cap.Value {
	return []cap.Value{cap.NET_ADMIN, cap.NET_RAW, cap.IPC_LOCK, cap.PERFMON, cap.BPF}
}

// User is the user to switch to.
type User struct {
	Name     string
	UID, GID int
	// Groups are the supplementary groups.
	Groups []int
}

// Lookup finds a user by name or uid, and the primary group by name or gid, "" for the user's own.
// It refuses root, which needs no capabilities for its files.
func Lookup(name, group string) (User, error) {
	found, err := user.Lookup(name)
	if _, e := strconv.ParseUint(name, 10, 31); e == nil && err != nil {
		found, err = user.LookupId(name)
	}
	if err != nil {
		return User{}, fmt.Errorf("user %q is not known: want the name or number of one, such as useradd --system makes", name)
	}
	u := User{Name: found.Username}
	if u.UID, err = strconv.Atoi(found.Uid); err != nil {
		return User{}, fmt.Errorf("user %q: number %q: %w", name, found.Uid, err)
	}
	if u.UID == 0 {
		return User{}, fmt.Errorf("user %q is root: want another one, or none", name)
	}
	gid := found.Gid
	if group != "" {
		g, err := user.LookupGroup(group)
		if _, e := strconv.ParseUint(group, 10, 31); e == nil && err != nil {
			g, err = user.LookupGroupId(group)
		}
		if err != nil {
			return User{}, fmt.Errorf("group %q is not known: want the name or number of one", group)
		}
		gid = g.Gid
	}
	if u.GID, err = strconv.Atoi(gid); err != nil {
		return User{}, fmt.Errorf("group number %q: %w", gid, err)
	}
	ids, err := found.GroupIds()
	if err != nil {
		return User{}, fmt.Errorf("groups of user %q: %w", name, err)
	}
	for _, id := range ids {
		n, err := strconv.Atoi(id)
		if err != nil {
			return User{}, fmt.Errorf("groups of user %q: number %q: %w", name, id, err)
		}
		u.Groups = append(u.Groups, n)
	}
	slices.Sort(u.Groups)
	u.Groups = slices.Compact(u.Groups)
	return u, nil
}

// Drop switches all threads to a user, unless to is nil, and leaves them only the needed
// capabilities and those of also, as far as they had them: permitted and effective, none inheritable. Executed
// programs gain none, not even by set-user-ID bits. The bounding set is reduced if the process has
// CAP_SETPCAP. It then verifies each thread with the kernel; after an error the process must end.
func Drop(to *User, also ...cap.Value) (State, error) {
	before, err := Read()
	if err != nil {
		return State{}, err
	}
	if to != nil && before.UIDs == [4]int{to.UID, to.UID, to.UID, to.UID} {
		to = nil // as started by a service manager, with its groups
	}
	want := mask(slices.Concat(Needed(), also)...)
	keep := before.Permitted & want
	if err := drop(to, before, keep, want); err != nil {
		return State{}, err
	}
	after, err := Read()
	if err != nil {
		return State{}, err
	}
	return after, after.check(to, keep, want, before)
}

func drop(to *User, before State, keep, bounding Set) error {
	// Before the user changes: it requires CAP_SETPCAP.
	if before.Effective.Has(cap.SETPCAP) {
		if err := cap.DropBound((before.Bounding &^ bounding).values()...); err != nil {
			return fmt.Errorf("reduce the bounding set of capabilities: %w", err)
		}
	}
	if to != nil {
		if err := cap.SetGroups(to.GID, to.Groups...); err != nil {
			return fmt.Errorf("change to group %d: %w", to.GID, err)
		}
		if err := cap.SetUID(to.UID); err != nil {
			return fmt.Errorf("change to user %d: %w", to.UID, err)
		}
	}
	if err := cap.ResetAmbient(); err != nil {
		return fmt.Errorf("clear ambient capabilities: %w", err)
	}
	set := cap.NewSet()
	if err := errors.Join(
		set.SetFlag(cap.Permitted, true, keep.values()...),
		set.SetFlag(cap.Effective, true, keep.values()...),
		set.SetProc(),
	); err != nil {
		return fmt.Errorf("reduce capabilities to %s: %w", keep, err)
	}
	if _, err := cap.Prctlw(unix.PR_SET_NO_NEW_PRIVS, 1); err != nil {
		return fmt.Errorf("set no_new_privs: %w", err)
	}
	return nil
}

// check says what differs from the intended state.
func (s State) check(to *User, keep, reduced Set, before State) error {
	bounding := before.Bounding
	if before.Effective.Has(cap.SETPCAP) {
		bounding &= reduced
	}
	uid, gid := os.Getuid(), os.Getgid()
	if to != nil {
		uid, gid = to.UID, to.GID
	}
	want := State{
		UIDs: [4]int{uid, uid, uid, uid}, GIDs: [4]int{gid, gid, gid, gid}, Groups: s.Groups,
		Permitted: keep, Effective: keep, Bounding: bounding, NoNewPrivs: true, Threads: s.Threads,
	}
	if to != nil {
		want.Groups = to.Groups
	}
	if !s.equal(want) {
		return fmt.Errorf("privileges were not dropped: %v, want %v", s, want)
	}
	return nil
}

// Ambient are the capabilities for a process started by this one, so that it can do the same: those
// of this one, unless it is root's, whose processes have them anyway.
func Ambient() ([]uintptr, error) {
	s, err := Read()
	if err != nil || os.Geteuid() == 0 {
		return nil, err
	}
	var all []uintptr
	for _, v := range s.Permitted.values() {
		all = append(all, uintptr(v))
	}
	return all, nil
}
