package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"xdpcast/internal/control"
)

// replace has a signal end the daemon; its holder starts another.
func (s *stage) replace(sig syscall.Signal) error {
	before := s.pid
	fmt.Fprintf(&s.log, "time=%s chaos: %v to %d\n", time.Now().Format("2006-01-02T15:04:05.000Z07:00"), sig, before)
	if err := syscall.Kill(before, sig); err != nil {
		return err
	}
	return s.settleAfter(before)
}

// upgrade replaces the programs in the kernel without a daemon.
func upgrade(_ context.Context, s *stage) error {
	if err := s.end(); err != nil {
		return err
	}
	if err := s.installOther(); err != nil {
		return err
	}
	if err := s.cli("upgrade"); err != nil {
		return err
	}
	return s.start()
}

// replaceDaemon has the daemon replace itself.
func replaceDaemon(_ context.Context, s *stage) error {
	before := s.pid
	if err := s.installOther(); err != nil {
		return err
	}
	if err := s.cli("upgrade", "--exec"); err != nil {
		return err
	}
	return s.settleAfter(before)
}

// reload adds another rule, and removes it again.
func reload(ctx context.Context, s *stage) error {
	for _, others := range []int{50, 0} {
		if err := s.writeRules(others); err != nil {
			return err
		}
		if _, err := s.client.Reload(ctx, control.ApplyOptions{}); err != nil {
			return err
		}
	}
	return nil
}

// rollback undoes a reload.
func rollback(ctx context.Context, s *stage) error {
	if err := s.writeRules(50); err != nil {
		return err
	}
	if _, err := s.client.Reload(ctx, control.ApplyOptions{Confirm: time.Hour}); err != nil {
		return err
	}
	if _, err := s.client.Rollback(ctx, 1, control.ApplyOptions{}); err != nil {
		return err
	}
	return s.writeRules(0)
}

// flap takes another interface's carrier down and up again.
func flap(ctx context.Context, s *stage) error {
	for _, up := range []bool{false, true} {
		if err := s.relay.SetUp("other0", up); err != nil {
			return err
		}
		if err := sleep(ctx, 50*time.Millisecond); err != nil {
			return err
		}
	}
	return nil
}

// stormGroup is the group of the storm's interfaces.
const stormGroup = 77

// storm creates interfaces one by one, and deletes them all at once.
func storm(ctx context.Context, s *stage) error {
	links := s.relay.Netlink()
	for i := range s.many(1000) {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		link := &netlink.Veth{
			LinkAttrs: netlink.LinkAttrs{Name: fmt.Sprintf("storm%d", i), Group: stormGroup, TxQLen: -1}, PeerName: fmt.Sprintf("mrots%d", i),
		}
		if err := links.LinkAdd(link); err != nil {
			return err
		}
	}
	return s.relay.Do(func() error {
		del := nl.NewNetlinkRequest(unix.RTM_DELLINK, unix.NLM_F_ACK)
		del.AddData(nl.NewIfInfomsg(unix.AF_UNSPEC))
		del.AddData(nl.NewRtAttr(unix.IFLA_GROUP, nl.Uint32Attr(stormGroup)))
		_, err := del.Execute(unix.NETLINK_ROUTE, 0)
		return err
	})
}

// pressure allocates a quarter of the free memory, at most 4 GiB, and frees it.
func pressure(ctx context.Context, s *stage) error {
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		return err
	}
	size := int(min(uint64(info.Freeram)*uint64(info.Unit)/4, 4<<30)) / s.opts.part()
	memory, err := unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON|unix.MAP_POPULATE)
	if err != nil {
		return err
	}
	return errors.Join(sleep(ctx, s.long(time.Second)), unix.Munmap(memory))
}

// part is the divisor of all amounts in a smoke test.
func (o options) part() int {
	if o.smoke {
		return 16
	}
	return 1
}

// fullDirectory fills the file system of the run directory; a rule that cannot be saved is refused.
func fullDirectory(ctx context.Context, s *stage) error {
	fill := filepath.Join(s.runDir, "fill")
	block := make([]byte, 4096)
	f, err := os.Create(fill)
	if err != nil {
		return err
	}
	for err == nil {
		_, err = f.Write(block)
	}
	if err = errors.Join(ignore(err, unix.ENOSPC), f.Close()); err != nil {
		return err
	}
	_, err = s.client.AddRule(ctx, control.Rule{Name: "full", In: "239.1.9.1:5000%in0", Out: []string{"239.2.9.1:6000%out0"}})
	if err == nil {
		return errors.New("a rule was added that cannot be saved")
	}
	if !strings.Contains(err.Error(), "no space left on device") {
		return err
	}
	return os.Remove(fill)
}

func ignore(err, expected error) error {
	if errors.Is(err, expected) {
		return nil
	}
	return err
}

// stepClock sets the host's clock an hour ahead, and back.
func stepClock(ctx context.Context, s *stage) error {
	for _, step := range []time.Duration{time.Hour, -time.Hour} {
		now := unix.NsecToTimespec(time.Now().Add(step).UnixNano())
		if err := unix.ClockSettime(unix.CLOCK_REALTIME, &now); err != nil {
			return fmt.Errorf("set the clock: %w", err)
		}
		if err := sleep(ctx, s.long(time.Second)); err != nil {
			return err
		}
	}
	return nil
}

// freeze stops the daemon's process for ten seconds.
func freeze(ctx context.Context, s *stage) error {
	if err := syscall.Kill(s.pid, syscall.SIGSTOP); err != nil {
		return err
	}
	return errors.Join(sleep(ctx, s.long(10*time.Second)), syscall.Kill(s.pid, syscall.SIGCONT))
}

// cli runs a command of the program on the relay.
func (s *stage) cli(args ...string) error {
	var out strings.Builder
	cmd := exec.Command(s.binary(), args...)
	cmd.Env, cmd.Stdout, cmd.Stderr = s.env(), &out, &out
	if err := s.relay.Start(cmd); err != nil {
		return err
	}
	if err := cmd.Wait(); err != nil {
		return fmt.Errorf("xdpcast %s: %w: %s", strings.Join(args, " "), err, out.String())
	}
	return nil
}
