package hold

import (
	"fmt"
	"os"
	"os/signal"
	"slices"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"xdpcast/internal/notify"
)

func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == notify.StartStage {
		fmt.Fprintln(os.Stderr, notify.Stage(os.Args[2:]))
		os.Exit(127)
	}
	if len(os.Args) > 1 && os.Args[1] == CopyStage {
		if Copy(signal.Ignore) != nil {
			os.Exit(1)
		}
		os.Exit(0)
	}
	if os.Getenv(replacesVariable) != "" {
		os.Exit(takeOver())
	}
	if file := os.Getenv(countVariable); file != "" {
		os.Exit(sendAndDie(file))
	}
	if dir := os.Getenv(standbyEnv); dir != "" {
		os.Exit(wantStandby(dir))
	}
	goleak.VerifyTestMain(m)
}

func message(t *testing.T, descriptors int, lines ...string) *notify.Message {
	t.Helper()
	m := &notify.Message{Lines: lines}
	for range descriptors {
		fd, err := unix.MemfdCreate("store-test", unix.MFD_CLOEXEC)
		if err != nil {
			t.Fatal(err)
		}
		m.Files = append(m.Files, fd)
	}
	return m
}

// The store does what sd_notify(3) says of FDSTORE, FDNAME and FDSTOREREMOVE.
func TestStore(t *testing.T) {
	s := NewStore(4)
	defer s.Close()
	names := func() (all []string) {
		for _, f := range s.Files() {
			if _, err := unix.FcntlInt(uintptr(f.FD), unix.F_GETFD, 0); err != nil {
				t.Errorf("%s is closed", f.Name)
			}
			all = append(all, f.Name)
		}
		return all
	}
	for _, step := range []struct {
		message *notify.Message
		want    string
		fault   string
	}{
		{message(t, 1, "FDSTORE=1", "FDPOLL=0", "FDNAME=m.1"), "m.1", ""},
		{message(t, 2, "FDSTORE=1", "FDNAME=m.2"), "m.1 m.2 m.2", ""},
		{message(t, 1, "FDSTORE=1", "FDNAME=with:colon"), "m.1 m.2 m.2 stored", ""},
		{message(t, 2, "FDSTORE=1", "FDNAME=m.3"), "m.1 m.2 m.2 stored", "2 descriptors called m.3 are not kept: there are 4 already, and no more are to be"},
		{message(t, 0, "FDSTOREREMOVE=1", "FDNAME=m.2"), "m.1 stored", ""},
		{message(t, 0, "FDSTOREREMOVE=1"), "m.1 stored", ""},
		{message(t, 1, "FDSTORE=1"), "m.1 stored stored", ""},
		{message(t, 1, "BARRIER=1"), "m.1 stored stored", ""},
		{&notify.Message{Lines: []string{"FDSTORE=1"}, Cut: true}, "m.1 stored stored", "descriptors to keep have not come: this process may have no more open (ulimit -n)"},
	} {
		err := s.Take(step.message)
		if got := strings.Join(names(), " "); got != step.want || err == nil && step.fault != "" || err != nil && err.Error() != step.fault {
			t.Errorf("%q: it has %s, want %s; %v, want %s", step.message.Lines, got, step.want, err, step.fault)
		}
		if len(step.message.Files) > 0 {
			t.Errorf("%q: descriptors stay open", step.message.Lines)
		}
	}
}

// A process that ends soon after its start, again and again, is restarted at once and then ever
// later.
func TestDelays(t *testing.T) {
	var pause time.Duration
	var got []time.Duration
	for range 9 {
		got = append(got, pause)
		pause = longer(pause)
	}
	want := []time.Duration{0, 100 * time.Millisecond, 200 * time.Millisecond, 400 * time.Millisecond, 800 * time.Millisecond,
		1600 * time.Millisecond, 3200 * time.Millisecond, 6400 * time.Millisecond, 10 * time.Second}
	if !slices.Equal(got, want) {
		t.Errorf("delays %v, want %v", got, want)
	}
}
