package notify

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"xdpcast/internal/labtest"
)

func TestMain(m *testing.M) {
	if os.Getenv("NOTIFY_TEST_CHILD") != "" {
		child()
	}
	goleak.VerifyTestMain(m)
}

// listen stands for the service manager.
func listen(t *testing.T, name string) *net.UnixConn {
	t.Helper()
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: name, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	t.Setenv("NOTIFY_SOCKET", name)
	return conn
}

// receive returns a message and the descriptors that came with it.
func receive(t *testing.T, conn *net.UnixConn) (string, []int) {
	t.Helper()
	if err := conn.SetReadDeadline(time.Now().Add(labtest.Timeout)); err != nil {
		t.Fatal(err)
	}
	text, oob := make([]byte, 4096), make([]byte, 4096)
	n, oobn, _, _, err := conn.ReadMsgUnix(text, oob)
	if err != nil {
		t.Fatal(err)
	}
	messages, err := syscall.ParseSocketControlMessage(oob[:oobn])
	if err != nil {
		t.Fatal(err)
	}
	var fds []int
	for i := range messages {
		rights, err := syscall.ParseUnixRights(&messages[i])
		if err != nil {
			t.Fatal(err)
		}
		fds = append(fds, rights...)
	}
	return string(text[:n]), fds
}

func connect(t *testing.T) *Manager {
	t.Helper()
	m, err := Connect()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := m.Close(); err != nil {
			t.Error(err)
		}
	})
	return m
}

func TestWithoutManager(t *testing.T) {
	t.Setenv("NOTIFY_SOCKET", "")
	m := connect(t)
	if m != nil || m.Notify(Ready) != nil || m.Barrier() != nil || m.WatchdogInterval() != 0 {
		t.Error("there is none, and something is done")
	}
	t.Setenv("NOTIFY_SOCKET", "run/notify")
	if _, err := Connect(); err == nil || err.Error() != `NOTIFY_SOCKET "run/notify": want a path, or @ and a name` {
		t.Error(err)
	}
	t.Setenv("NOTIFY_SOCKET", filepath.Join(t.TempDir(), "notify"))
	if err := connect(t).Notify(Ready); !errors.Is(err, os.ErrNotExist) || !strings.Contains(err.Error(), "READY=1") {
		t.Errorf("nobody listens: %v", err)
	}
}

func TestStore(t *testing.T) {
	for _, name := range []string{filepath.Join(t.TempDir(), "notify"), fmt.Sprintf("@xdpcast-notify-test-%d", os.Getpid())} {
		conn := listen(t, name)
		t.Setenv("FDSTORE", "4")
		s := connect(t).Store(2)
		file, err := os.Open("/dev/null")
		if err != nil {
			t.Fatal(err)
		}
		defer file.Close()
		for _, name := range []string{"m.1", "m.2"} {
			if err := s.Keep(name, int(file.Fd())); err != nil {
				t.Fatal(err)
			}
			text, fds := receive(t, conn)
			if text != "FDSTORE=1\nFDPOLL=0\nFDNAME="+name || len(fds) != 1 {
				t.Errorf("got %q with %v", text, fds)
			}
			if link, err := os.Readlink("/proc/self/fd/" + strconv.Itoa(fds[0])); err != nil || link != "/dev/null" {
				t.Errorf("got %s, %v", link, err)
			}
			unix.Close(fds[0])
		}
		if err := s.Keep("m.3", int(file.Fd())); err == nil || !strings.Contains(err.Error(), "no more than 4 descriptors (raise FileDescriptorStoreMax= of the service)") {
			t.Errorf("a fifth: %v", err)
		}
		if err := s.Drop("m.1", "m.2"); err != nil {
			t.Error(err)
		}
		for _, name := range []string{"m.1", "m.2"} {
			if text, fds := receive(t, conn); text != "FDSTOREREMOVE=1\nFDNAME="+name || len(fds) != 0 {
				t.Errorf("got %q with %v", text, fds)
			}
		}
		if err := s.Keep("m.3", int(file.Fd())); err != nil {
			t.Errorf("there is room again: %v", err)
		}
		_, fds := receive(t, conn)
		unix.Close(fds[0])
	}
}

func TestBarrier(t *testing.T) {
	conn := listen(t, filepath.Join(t.TempDir(), "notify"))
	m := connect(t)
	done := make(chan error, 1)
	go func() { done <- m.Barrier() }()
	text, fds := receive(t, conn)
	if text != "BARRIER=1" || len(fds) != 1 {
		t.Fatalf("got %q with %v", text, fds)
	}
	select {
	case err := <-done:
		t.Errorf("it has not waited: %v", err)
	default:
	}
	unix.Close(fds[0])
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func TestWatchdog(t *testing.T) {
	listen(t, filepath.Join(t.TempDir(), "notify"))
	own, other := strconv.Itoa(os.Getpid()), strconv.Itoa(os.Getpid()+1)
	for _, tt := range []struct {
		usec, pid string
		want      time.Duration
	}{
		{"", "", 0}, {"3000000", "", 3 * time.Second}, {"3000000", own, 3 * time.Second}, {"3000000", other, 0},
		{"-1", own, 0}, {"x", own, 0}, {"9223372036854775807", own, 0},
	} {
		t.Setenv("WATCHDOG_USEC", tt.usec)
		t.Setenv("WATCHDOG_PID", tt.pid)
		if got := connect(t).WatchdogInterval(); got != tt.want {
			t.Errorf("WATCHDOG_USEC=%s WATCHDOG_PID=%s: %v, want %v", tt.usec, tt.pid, got, tt.want)
		}
	}
}

// child prints what it has received.
func child() {
	files, err := Received()
	for _, f := range files {
		flags, errno := unix.FcntlInt(uintptr(f.FD), unix.F_GETFD, 0)
		link, _ := os.Readlink("/proc/self/fd/" + strconv.Itoa(f.FD))
		fmt.Printf("%s=%s %v %v\n", f.Name, link, flags&unix.FD_CLOEXEC != 0, errno)
	}
	again, err2 := Received()
	fmt.Printf("%v; %d more, %v, LISTEN_FDS=%s\n", err, len(again), err2, os.Getenv("LISTEN_FDS"))
	os.Exit(0)
}

func TestReceived(t *testing.T) {
	const end = "0 more, <nil>, LISTEN_FDS="
	for _, tt := range []struct {
		pid, fds, names string
		want            []string
	}{
		{"$$", "2", "m.1:memberships", []string{"m.1=/dev/null true <nil>", "memberships=/dev/zero true <nil>", "<nil>; " + end}},
		{"1", "2", "m.1:memberships", []string{"<nil>; " + end}},
		{"", "", "", []string{"<nil>; " + end}},
		{"$$", "0", "", []string{"<nil>; " + end}},
		{"$$", "-1", "", []string{`LISTEN_FDS "-1": want a number of descriptors; ` + end}},
		{"$$", "2", "one", []string{"=/dev/null true <nil>", "=/dev/zero true <nil>", "LISTEN_FDNAMES has 1 names of 2 descriptors; " + end}},
	} {
		cmd := exec.Command("sh", "-c", "LISTEN_PID="+tt.pid+` exec "$0"`, os.Args[0])
		cmd.Env = append(os.Environ(), "NOTIFY_TEST_CHILD=1", "LISTEN_FDS="+tt.fds, "LISTEN_FDNAMES="+tt.names)
		for _, path := range []string{"/dev/null", "/dev/zero"} {
			f, err := os.Open(path)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			cmd.ExtraFiles = append(cmd.ExtraFiles, f)
		}
		out, err := cmd.Output()
		if lines := strings.Split(strings.TrimSpace(string(out)), "\n"); err != nil || !slices.Equal(lines, tt.want) {
			t.Errorf("%+v: %v, %q", tt, err, lines)
		}
	}
}
