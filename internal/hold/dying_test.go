package hold

import (
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"xdpcast/internal/notify"
)

// countVariable makes the test program a daemon: the first one has descriptors kept, says that it is ready, and dies at
// once; the next one writes how many it got into this file, and stays.
const countVariable = "XDPCAST_TEST_COUNT"

const manyKept = 100

func sendAndDie(file string) int {
	manager, err := notify.Connect()
	if err != nil {
		return 10
	}
	files, err := notify.Received()
	if err != nil {
		return 11
	}
	if _, err := os.Stat(file + ".first"); err == nil {
		next := file + ".next"
		if os.WriteFile(next, []byte(strconv.Itoa(len(files))), 0o600) != nil || os.Rename(next, file) != nil {
			return 12
		}
		time.Sleep(time.Hour) // until the holder ends it
	}
	if os.WriteFile(file+".first", nil, 0o600) != nil {
		return 13
	}
	for i := range manyKept {
		if manager.Notify(fmt.Sprintf("FDSTORE=1\nFDPOLL=0\nFDNAME=kept.%d", i), 2) != nil {
			return 14
		}
	}
	if manager.Notify(notify.Ready) != nil {
		return 15
	}
	return 3
}

// What a daemon has sent before it died counts, however much of it is unread when the holder sees that it is dead: the
// descriptors are kept, and it was ready, so that it is started again.
func TestLastWordsOfTheDead(t *testing.T) {
	outer, err := notify.Connect() // none
	if err != nil {
		t.Fatal(err)
	}
	for range 5 {
		file := filepath.Join(t.TempDir(), "count")
		t.Setenv(countVariable, file)
		signals := make(chan os.Signal, 1)
		ended := make(chan error, 1)
		go func() {
			code, err := Run(Options{
				Command: []string{os.Args[0]}, Socket: filepath.Join(t.TempDir(), "s"), Max: 2 * manyKept, Outer: outer,
				Log: slog.New(slog.DiscardHandler), Signals: signals,
			})
			if err == nil && code != 128+int(unix.SIGTERM) {
				err = fmt.Errorf("exit code %d", code)
			}
			ended <- err
		}()
		var count []byte
		for count == nil {
			select {
			case err := <-ended:
				t.Fatalf("the holder has ended instead of starting the daemon again: %v", err)
			case <-time.After(5 * time.Millisecond):
			}
			count, _ = os.ReadFile(file) // it may not be there yet
		}
		signals <- unix.SIGTERM
		if err := <-ended; err != nil {
			t.Error(err)
		}
		if want := strconv.Itoa(manyKept + 1); string(count) != want { // and the holder's pipe
			t.Errorf("the next daemon gets %s descriptors, want %s", count, want)
		}
	}
}
