package hold

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"
	"unicode"

	"golang.org/x/sys/unix"

	"xdpcast/internal/notify"
)

// What a process that is to replace this one writes to its standard error says why it fails, also before it can report
// anything. So it first writes to a pipe, of which this process copies everything to its own standard error, and which the other one
// replaces by that (StderrName, KeepStderr) before it is ready. One of a release that does not know of this gets a process that goes
// on with copying (Copy), or it would be killed by SIGPIPE for its first line after this process's end.

// StderrName is the name of the descriptor of the standard error of the process that is replaced.
const StderrName = "stderr"

// CopyStage is the first argument of a program that calls Copy.
const CopyStage = "copy-standard-error"

// KeepStderr replaces this process's standard error by the descriptor called StderrName, which it closes.
func KeepStderr(fd int) error {
	return errors.Join(unix.Dup3(fd, unix.Stderr, 0), unix.Close(fd))
}

// Copy copies standard input to standard error, for another process: until its end, whatever signals the group gets.
func Copy(ignore func(...os.Signal)) error {
	ignore(unix.SIGINT, unix.SIGTERM, unix.SIGHUP, unix.SIGQUIT)
	_, err := io.Copy(os.Stderr, os.Stdin)
	return err
}

// stderrCopy copies the standard error of another process.
type stderrCopy struct {
	read, write *os.File // ends of the pipe; the other process has write
	to          *os.File
	words       lastWords
	done        chan struct{}
}

func copyStderr(to *os.File) (*stderrCopy, error) {
	read, write, err := os.Pipe()
	if err != nil {
		return nil, fmt.Errorf("pipe: %w", err)
	}
	return &stderrCopy{read: read, write: write, to: to, done: make(chan struct{})}, nil
}

// started is called when the other process has the write end.
func (c *stderrCopy) started() error {
	go func() {
		defer close(c.done)
		_, _ = io.Copy(io.MultiWriter(&c.words, c.to), c.read) // a full disk, say, is no reason to fail
	}()
	return c.write.Close()
}

// last returns the last words of a process that has ended, unless a child of it goes on writing.
func (c *stderrCopy) last() string {
	select {
	case <-c.done:
	case <-time.After(time.Second):
	}
	return c.words.String()
}

// finish ends the copying: if the process works, another one goes on with it where that is needed.
func (c *stderrCopy) finish(self string, works bool) (err error) {
	if works && !c.ended() {
		if err = c.handOver(self); err != nil {
			err = fmt.Errorf("copy the standard error of the new process: %w", err)
		}
	}
	err = errors.Join(err, c.read.Close())
	select { // what is read is written
	case <-c.done:
	case <-time.After(time.Second):
	}
	return err
}

func (c *stderrCopy) handOver(self string) error {
	raw, err := c.read.SyscallConn()
	if err != nil {
		return err
	}
	failed := raw.Control(func(fd uintptr) { // Fd would make the goroutine's read one that Close does not end
		_, err = syscall.ForkExec(self, []string{self, CopyStage}, &syscall.ProcAttr{
			Env: notify.WithoutProtocol(os.Environ()), Files: []uintptr{fd, c.to.Fd(), c.to.Fd()}, Sys: &syscall.SysProcAttr{Setpgid: true},
		})
	})
	return errors.Join(failed, err)
}

// ended says whether the pipe has no writer.
func (c *stderrCopy) ended() bool {
	raw, err := c.read.SyscallConn()
	hung := false
	if err == nil {
		err = raw.Control(func(fd uintptr) {
			fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
			n, err := unix.Poll(fds, 0)
			hung = err == nil && n > 0 && fds[0].Revents&unix.POLLHUP != 0
		})
	}
	return err == nil && hung
}

// Bounds of lastWords.
const (
	mostWords = 3
	mostBytes = 400
)

// lastWords are the last lines of a text that say why a process fails: not those of a log below warnings, and of a panic the
// first.
type lastWords struct {
	mu    sync.Mutex
	rest  []byte // an unfinished line
	lines []string
	panic string
}

func (w *lastWords) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for rest := p; len(rest) > 0; {
		line, after, whole := bytes.Cut(rest, []byte("\n"))
		rest = after
		if room := mostBytes - len(w.rest); room > 0 {
			w.rest = append(w.rest, line[:min(len(line), room)]...)
		}
		if whole {
			w.add(string(w.rest))
			w.rest = w.rest[:0]
		}
	}
	return len(p), nil
}

func (w *lastWords) add(line string) {
	line = strings.TrimSpace(strings.ToValidUTF8(strings.Map(func(r rune) rune {
		if unicode.IsControl(r) {
			return ' '
		}
		return r
	}, line), "?"))
	switch {
	case line == "" || strings.Contains(line, "level=INFO") || strings.Contains(line, "level=DEBUG"):
		return
	case w.panic == "" && (strings.HasPrefix(line, "panic: ") || strings.HasPrefix(line, "fatal error: ")):
		w.panic = line
	}
	w.lines = append(w.lines, line)
	if len(w.lines) > mostWords {
		w.lines = w.lines[1:]
	}
}

// String is one line.
func (w *lastWords) String() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.rest) > 0 {
		w.add(string(w.rest))
		w.rest = w.rest[:0]
	}
	if w.panic != "" {
		return shortened(w.panic)
	}
	text := ""
	for _, line := range slices.Backward(w.lines) {
		switch {
		case text == "":
			text = line
		case len(line)+len(text) < mostBytes:
			text = line + "; " + text
		default:
			return shortened(text)
		}
	}
	return shortened(text)
}

func shortened(text string) string {
	if len(text) <= mostBytes {
		return text
	}
	return strings.ToValidUTF8(text[:mostBytes], "") + "..."
}
