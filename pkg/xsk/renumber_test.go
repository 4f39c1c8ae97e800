package xsk

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"golang.org/x/sys/unix"

	"xdpcast/internal/labtest"
)

// victimVariable makes a process of the test binary one that is killed, with the index of an interface: see runVictim.
const victimVariable = "XDPCAST_TEST_VICTIM"

// victimPackets is the number of its packet sockets, each of which the kernel closes with a grace period.
const victimPackets = 200

// victimNumber is above all of their descriptors.
const victimNumber = 1000

// runVictim opens a socket on queue 0 of the interface with this index, with the highest descriptor, and puts it into the map that it has as
// descriptor 3. Then it waits to be killed.
func runVictim(told string) error {
	xsks, err := ebpf.NewMapFromFD(3)
	if err != nil {
		return err
	}
	u, err := NewUMEM(UMEMOptions{Frames: 64})
	if err != nil {
		return err
	}
	f, err := u.NewFrames(64)
	if err != nil {
		return err
	}
	index, err := strconv.Atoi(told)
	if err != nil {
		return err
	}
	s, err := Open(f, index, 0, Options{})
	if err != nil {
		return err
	}
	if err := s.Renumber(victimNumber); err != nil {
		return err
	}
	if s.FD() < victimNumber {
		return fmt.Errorf("the descriptor is %d", s.FD())
	}
	for range victimPackets {
		if _, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0); err != nil {
			return err
		}
	}
	if err := xsks.Put(uint32(0), uint32(s.FD())); err != nil {
		return err
	}
	fmt.Println("ready")
	_, err = os.Stdin.Read(make([]byte, 1)) // for ever
	return errors.Join(err, errors.New("it was not killed"))
}

// When a process is killed, the kernel closes the highest descriptors first: the socket that packets are directed to
// is gone before anything else, of which the kernel closes each packet socket with a grace period.
func TestHighestDescriptorIsClosedFirst(t *testing.T) {
	labtest.RequireRoot(t)
	a, _ := pair(t, 1500, 1)
	xsks, err := ebpf.NewMap(&ebpf.MapSpec{Name: "xsks", Type: ebpf.XSKMap, KeySize: 4, ValueSize: 4, MaxEntries: 1})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { xsks.Close() })
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{Type: ebpf.XDP, License: "GPL", Instructions: asm.Instructions{
		asm.LoadMapPtr(asm.R1, xsks.FD()), asm.Mov.Imm(asm.R2, 0), asm.Mov.Imm(asm.R3, xdpPass), asm.FnRedirectMap.Call(), asm.Return(),
	}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Close() })
	directed := func() bool {
		verdict, err := p.Run(&ebpf.RunOptions{Data: make([]byte, 64)})
		if err != nil {
			t.Fatal(err)
		}
		return verdict != xdpPass
	}
	packets := func() (n int) {
		labtest.Do(t, a, func() error {
			text, err := os.ReadFile("/proc/thread-self/net/packet")
			n = strings.Count(string(text), "\n") - 1 // the title
			return err
		})
		return n
	}
	program, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	fd, err := unix.FcntlInt(uintptr(xsks.FD()), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		t.Fatal(err)
	}
	file := os.NewFile(uintptr(fd), "xsks")
	defer file.Close()
	cmd := exec.Command(program)
	cmd.Env, cmd.ExtraFiles, cmd.Stderr = append(os.Environ(), fmt.Sprintf("%s=%d", victimVariable, labtest.Index(t, a, "eth0"))), []*os.File{file}, t.Output()
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := a.Start(cmd); err != nil {
		t.Fatal(err)
	}
	ready := bufio.NewScanner(out).Scan()
	if !ready || !directed() {
		t.Errorf("the process is ready: %v", ready)
	}
	had := packets()
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	for directed() {
	}
	left := packets()
	t.Logf("%d of %d packet sockets are left", left, had)
	if had < victimPackets || left < victimPackets/2 {
		t.Errorf("of %d packet sockets %d are left when the socket is gone, want most", had, left)
	}
	_ = cmd.Wait() // killed
}
