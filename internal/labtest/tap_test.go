package labtest

import (
	"fmt"
	"os"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// recorder is a test that records why it failed.
type recorder struct {
	testing.TB
	failed string
}

func (r *recorder) Helper() {}

func (r *recorder) Fatalf(format string, args ...any) {
	r.failed = fmt.Sprintf(format, args...)
	runtime.Goexit()
}

// An error of a tap's socket fails the test at once, instead of being retried.
func TestTapFails(t *testing.T) {
	read, write, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer read.Close()
	defer write.Close()
	for _, tt := range []struct {
		fd   int
		do   func(*Tap)
		want error
	}{
		{-1, func(tap *Tap) { tap.Receive(Timeout, nil) }, unix.EBADF},
		{int(read.Fd()), func(tap *Tap) { tap.Receive(Timeout, nil) }, unix.ENOTSOCK},
		{int(read.Fd()), func(tap *Tap) { tap.Receive(0, nil) }, unix.ENOTSOCK},
		{-1, func(tap *Tap) { tap.Send([]byte("frame")) }, unix.EBADF},
	} {
		r := &recorder{TB: t}
		tap := &Tap{t: r, fd: tt.fd, name: "host/eth0", buf: make([]byte, 64), oob: make([]byte, 64)}
		started, ended := time.Now(), make(chan struct{})
		go func() {
			defer close(ended)
			tt.do(tap)
		}()
		<-ended
		if !strings.Contains(r.failed, "host/eth0: "+tt.want.Error()) || time.Since(started) > Timeout/2 {
			t.Errorf("%v: the test failed with %q after %v", tt.want, r.failed, time.Since(started))
		}
	}
}
