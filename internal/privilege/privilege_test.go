package privilege

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
	"kernel.org/pub/linux/libs/security/libcap/cap"

	"xdpcast/internal/labtest"
)

const (
	nobody = 65534
	// helperEnv makes the test program the process that a test looks at.
	helperEnv = "XDPCAST_TEST_PRIVILEGE"
)

func TestMain(m *testing.M) {
	if how := os.Getenv(helperEnv); how != "" {
		if err := dropped(how); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func needRoot(t *testing.T) {
	t.Helper()
	labtest.RequireRoot(t)
	s, err := Read()
	if err != nil {
		t.Fatal(err)
	}
	if !s.Effective.Has(cap.SETPCAP) {
		labtest.Lacking(t, "needs CAP_SETPCAP, to give capabilities up for good")
	}
}

// dropped drops privileges while many threads exist, and tries on each of them, and on new ones,
// what must work and what must not.
func dropped(how string) error {
	const threads = 20
	locked, release, results := make(chan struct{}), make(chan struct{}), make(chan error)
	try := func() {
		runtime.LockOSThread() // never given back: the thread ends with it
		locked <- struct{}{}
		<-release
		results <- tryThread()
	}
	for range threads {
		go try()
	}
	for range threads {
		<-locked
	}
	pipe := make([]int, 2)
	if err := unix.Pipe(pipe); err != nil {
		return err
	}
	blocked := make(chan error)
	go func() { // a thread in a system call
		buf := make([]byte, 1)
		for {
			_, err := unix.Read(pipe[0], buf)
			if !errors.Is(err, unix.EINTR) {
				blocked <- err
				return
			}
		}
	}()
	var to *User // it is that already, as a service manager starts it
	if how == "user" {
		to = &User{Name: "nobody", UID: nobody, GID: nobody, Groups: []int{nobody - 1, nobody}}
	}
	s, err := Drop(to)
	if err != nil {
		return err
	}
	if s.Threads < threads || s.UIDs[0] != nobody || s.Inheritable|s.Ambient != 0 || !s.NoNewPrivs || s.Effective != mask(Needed()...) {
		return fmt.Errorf("dropped: %v", s)
	}
	if how == "user" && (s.Bounding != mask(Needed()...) || fmt.Sprint(s.Groups) != fmt.Sprint(to.Groups)) {
		return fmt.Errorf("dropped: %v", s)
	}
	close(release)
	for range threads {
		if err := <-results; err != nil {
			return err
		}
	}
	if _, err := unix.Write(pipe[1], []byte{0}); err != nil {
		return err
	}
	if err := <-blocked; err != nil {
		return err
	}
	for range threads { // threads that are new
		go try()
	}
	for range threads {
		<-locked
	}
	for range threads { // release is closed
		if err := <-results; err != nil {
			return err
		}
	}
	// What is executed has nothing, with a set-user-ID bit neither.
	out, err := exec.Command("cat", "/proc/self/status").Output()
	if err != nil {
		return err
	}
	child, err := parse(string(out))
	if err != nil {
		return err
	}
	if child.Effective|child.Permitted|child.Ambient|child.Inheritable != 0 || child.UIDs != s.UIDs || !child.NoNewPrivs {
		return fmt.Errorf("a program has %v", child)
	}
	return nil
}

func tryThread() error {
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open a packet socket: %w", err)
	}
	if err := unix.Close(fd); err != nil {
		return err
	}
	if _, _, errno := unix.RawSyscall(unix.SYS_SETUID, 0, 0, 0); errno != unix.EPERM {
		return fmt.Errorf("become root again: %w", errno)
	}
	if _, err := os.ReadFile("/etc/shadow"); !errors.Is(err, fs.ErrPermission) {
		return fmt.Errorf("read /etc/shadow: %w", err)
	}
	if err := unix.Unshare(unix.CLONE_NEWNET); !errors.Is(err, unix.EPERM) {
		return fmt.Errorf("make a namespace: %w", err)
	}
	return nil
}

func TestDrop(t *testing.T) {
	needRoot(t)
	helper := func(how string, attr *syscall.SysProcAttr) {
		t.Helper()
		cmd := exec.Command("/proc/self/exe")
		cmd.Env = append(os.Environ(), helperEnv+"="+how)
		cmd.SysProcAttr = attr
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("%s: %v\n%s", how, err, out)
		}
	}
	helper("user", nil)
	var ambient []uintptr
	for _, v := range Needed() {
		ambient = append(ambient, uintptr(v))
	}
	helper("same", &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}, AmbientCaps: ambient})
}

// What Drop reads back is compared as a whole.
func TestCheck(t *testing.T) {
	to := &User{UID: 1, GID: 2, Groups: []int{2, 3}}
	before := State{Effective: mask(cap.SETPCAP), Bounding: mask(cap.SETPCAP, cap.BPF)}
	good := State{UIDs: [4]int{1, 1, 1, 1}, GIDs: [4]int{2, 2, 2, 2}, Groups: []int{2, 3}, Permitted: mask(cap.BPF), Effective: mask(cap.BPF), Bounding: mask(cap.BPF), NoNewPrivs: true, Threads: 5}
	if err := good.check(to, mask(cap.BPF), mask(Needed()...), before); err != nil {
		t.Error(err)
	}
	for name, harm := range map[string]func(*State){
		"user":        func(s *State) { s.UIDs[2] = 0 },
		"group":       func(s *State) { s.GIDs[3] = 0 },
		"groups":      func(s *State) { s.Groups = []int{0, 2} },
		"permitted":   func(s *State) { s.Permitted |= mask(cap.SYS_ADMIN) },
		"effective":   func(s *State) { s.Effective = 0 },
		"inheritable": func(s *State) { s.Inheritable = mask(cap.BPF) },
		"ambient":     func(s *State) { s.Ambient = mask(cap.BPF) },
		"bounding":    func(s *State) { s.Bounding |= mask(cap.SETPCAP) },
		"privs":       func(s *State) { s.NoNewPrivs = false },
	} {
		bad := good
		bad.Groups = append([]int(nil), good.Groups...)
		harm(&bad)
		if err := bad.check(to, mask(cap.BPF), mask(Needed()...), before); err == nil || !strings.Contains(err.Error(), "privileges were not dropped") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

const status = `Name:	x
Uid:	999	999	999	999
Gid:	995	995	995	995
Groups:	4 2
CapInh:	0000000000000000
CapPrm:	000000c000007000
CapEff:	000000c000007000
CapBnd:	000001ffffffffff
CapAmb:	0000000000000000
NoNewPrivs:	%s
`

func TestRead(t *testing.T) {
	dir := t.TempDir()
	thread := func(name, text string) {
		t.Helper()
		if err := errors.Join(os.MkdirAll(filepath.Join(dir, name), 0o755), os.WriteFile(filepath.Join(dir, name, "status"), []byte(text), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	thread("1", fmt.Sprintf(status, "1"))
	thread("2", fmt.Sprintf(status, "1"))
	s, err := read(dir)
	if err != nil || s.Threads != 2 || s.Effective.String() != "NET_ADMIN NET_RAW IPC_LOCK PERFMON BPF" || fmt.Sprint(s.Groups) != "[2 4]" || !s.NoNewPrivs {
		t.Errorf("%v, %v", s, err)
	}
	thread("3", fmt.Sprintf(status, "0"))
	if _, err := read(dir); err == nil || !strings.Contains(err.Error(), "the privileges of threads differ: thread 1 ") || !strings.Contains(err.Error(), "thread 3 ") {
		t.Errorf("threads that differ: %v", err)
	}
	thread("3", "Name:\tx\n")
	if _, err := read(dir); err == nil || !strings.Contains(err.Error(), "thread 3: 0 of 9 lines") {
		t.Errorf("a status without lines: %v", err)
	}
	if _, err := read(t.TempDir()); err == nil {
		t.Error("no thread is no error")
	}
}

func TestLookup(t *testing.T) {
	if u, err := Lookup("nobody", ""); err != nil || u.UID != nobody {
		t.Errorf("%+v, %v", u, err)
	}
	if u, err := Lookup(fmt.Sprint(nobody), "daemon"); err != nil || u.Name != "nobody" || u.GID != 1 {
		t.Errorf("%+v, %v", u, err)
	}
	for _, tt := range []struct{ user, group, want string }{
		{"no-such-user", "", `user "no-such-user" is not known: want the name or number of one`},
		{"4294967295", "", `user "4294967295" is not known`},
		{"root", "", `user "root" is root: want another one, or none`},
		{"0", "", `user "0" is root`},
		{"nobody", "no-such-group", `group "no-such-group" is not known: want the name or number of one`},
	} {
		if _, err := Lookup(tt.user, tt.group); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("Lookup(%q, %q): %v, want %q", tt.user, tt.group, err, tt.want)
		}
	}
}

func TestGive(t *testing.T) {
	needRoot(t)
	base := t.TempDir()
	dir := filepath.Join(base, "a", "b")
	ours := func(name string) bool { return strings.HasPrefix(name, "our") }
	owner := func(path string) int {
		t.Helper()
		info, err := os.Lstat(path)
		if err != nil {
			t.Fatal(err)
		}
		return int(info.Sys().(*syscall.Stat_t).Uid)
	}
	if err := Give(dir, 0o750, nobody, nobody, ours); err != nil || owner(dir) != nobody || owner(filepath.Dir(dir)) != 0 {
		t.Fatalf("a new directory: %v", err)
	}
	if info, err := os.Stat(dir); err != nil || info.Mode().Perm() != 0o750 {
		t.Errorf("a new directory: %v, %v", info.Mode(), err)
	}
	precious := filepath.Join(base, "precious")
	for _, path := range []string{precious, dir + "/our.file", dir + "/our/deep"} {
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, nil, 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	// A link is given, and not what it leads to.
	if err := errors.Join(os.Symlink(precious, dir+"/our-link"), os.Symlink(base, dir+"/our/dir")); err != nil {
		t.Fatal(err)
	}
	if err := Give(dir, 0o700, nobody, nobody, ours); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"our.file", "our", "our/deep", "our-link", "our/dir"} {
		if got := owner(filepath.Join(dir, name)); got != nobody {
			t.Errorf("%s belongs to %d", name, got)
		}
	}
	if owner(precious) != 0 || owner(base) != 0 {
		t.Error("what links lead to was given")
	}
	refused := func(what, want string) {
		t.Helper()
		if err := os.Chown(dir, 0, 0); err != nil {
			t.Fatal(err)
		}
		if err := Give(dir, 0o700, nobody, nobody, ours); err == nil || !strings.Contains(err.Error(), want) || owner(dir) != 0 {
			t.Errorf("%s: %v, want %q; owner %d", what, err, want, owner(dir))
		}
	}
	if err := os.Link(precious, dir+"/our-hard"); err != nil {
		t.Fatal(err)
	}
	refused("a hard link", "our-hard has 2 hard links: remove it")
	if err := errors.Join(os.Remove(dir+"/our-hard"), os.WriteFile(dir+"/theirs", nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	refused("another's file", "has theirs, which is not of xdpcast")
	if err := Give(precious, 0o700, nobody, nobody, ours); err == nil {
		t.Error("a file in place of a directory is no error")
	}
}
