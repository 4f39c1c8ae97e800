package control

import (
	"errors"
	"fmt"
	"net"
	"slices"
	"unsafe"

	"golang.org/x/sys/unix"
)

// peer is the process at the other end of a connection, with its credentials when it connected.
type peer struct {
	pid    int32
	uid    uint32
	gid    uint32
	groups []uint32 // supplementary
}

// access is the level of access of a peer; each level includes the lower ones.
type access int

const (
	accessNone access = iota
	accessRead
	accessWrite
	accessLevels // number of levels
)

// access is the peer's access to a daemon that runs as ownUID.
func (p peer) access(ownUID uint32, readGroups []uint32) access {
	if p.uid == 0 || p.uid == ownUID {
		return accessWrite
	}
	for _, g := range readGroups {
		if p.gid == g || slices.Contains(p.groups, g) {
			return accessRead
		}
	}
	return accessNone
}

// peerOf reads the peer's credentials from the kernel.
func peerOf(c *net.UnixConn) (peer, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return peer{}, fmt.Errorf("peer credentials: %w", err)
	}
	var p peer
	var sockErr error
	err = raw.Control(func(fd uintptr) {
		var cred *unix.Ucred
		if cred, sockErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); sockErr != nil {
			return
		}
		p = peer{pid: cred.Pid, uid: cred.Uid, gid: cred.Gid}
		p.groups, sockErr = peerGroups(fd)
	})
	if err := errors.Join(err, sockErr); err != nil {
		return peer{}, fmt.Errorf("peer credentials: %w", err)
	}
	return p, nil
}

// peerGroups reads SO_PEERGROUPS (socket(7)): an array of gid_t, ERANGE with the required length if
// the buffer is too short.
func peerGroups(fd uintptr) ([]uint32, error) {
	const gidSize = 4
	groups := make([]uint32, 32)
	for {
		size := uint32(len(groups) * gidSize)
		_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, fd, unix.SOL_SOCKET, unix.SO_PEERGROUPS,
			uintptr(unsafe.Pointer(&groups[0])), uintptr(unsafe.Pointer(&size)), 0)
		switch {
		case errno == 0:
			return groups[:size/gidSize], nil
		case errno == unix.ERANGE && int(size) > len(groups)*gidSize:
			groups = make([]uint32, size/gidSize)
		case errno == unix.ENOPROTOOPT: // before Linux 4.13, or a peer without a group list
			return nil, nil
		default:
			return nil, fmt.Errorf("groups: %w", errno)
		}
	}
}
