package membership_test

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"

	"xdpcast/internal/labtest"
	"xdpcast/pkg/membership"
)

// Be a member of a group for as long as a program that takes its packets elsewhere runs.
func Example() {
	eth0, err := net.InterfaceByName("eth0")
	if err != nil {
		fmt.Println(err)
		return
	}
	if err := hold(eth0.Index, netip.MustParseAddr("239.1.1.1"), func() { fmt.Println("joined") }); err != nil {
		fmt.Println(err)
	}
}

// hold is a member of a group on an interface while work runs.
func hold(index int, group netip.Addr, work func()) (err error) {
	memberships := membership.New(membership.Options{})
	defer func() { err = errors.Join(err, memberships.Close()) }() // leaves all groups
	if err := memberships.Join(membership.Membership{Interface: "eth0", Index: index, Group: group}); err != nil {
		if membership.Transient(err) {
			return fmt.Errorf("%w (it may succeed later)", err)
		}
		return err
	}
	work()
	return nil
}

// The example joins its group and leaves it, and names an interface that is not there.
func TestExampleHolds(t *testing.T) {
	host := labtest.Host(t, "member")
	labtest.Enter(t, host)
	lo, err := net.InterfaceByName("lo")
	if err != nil {
		t.Fatal(err)
	}
	held := false
	if err := hold(lo.Index, netip.MustParseAddr("239.1.1.1"), func() { held = true }); err != nil || !held {
		t.Errorf("held %v: %v", held, err)
	}
	err = hold(lo.Index+1000, netip.MustParseAddr("239.1.1.1"), func() { t.Error("joined on no interface") })
	var missing *membership.InterfaceNotFoundError
	if !errors.As(err, &missing) || !errors.Is(err, unix.ENODEV) {
		t.Errorf("got %v", err)
	}
}
