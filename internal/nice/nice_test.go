package nice

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// niceOf returns the nice values of this process's threads (proc_pid_stat(5), field 19).
func niceOf(t *testing.T) map[int]int {
	t.Helper()
	tasks, err := os.ReadDir("/proc/self/task")
	if err != nil {
		t.Fatal(err)
	}
	all := map[int]int{}
	for _, task := range tasks {
		text, err := os.ReadFile(filepath.Join("/proc/self/task", task.Name(), "stat"))
		if err != nil {
			continue // it has ended
		}
		tid, err := strconv.Atoi(task.Name())
		if err != nil {
			t.Fatal(err)
		}
		_, rest, _ := strings.Cut(string(text), ") ")
		if all[tid], err = strconv.Atoi(strings.Fields(rest)[16]); err != nil {
			t.Fatalf("%v in %s", err, text)
		}
	}
	return all
}

// Only the thread of the function has the low priority, however many the process starts meanwhile, and it ends with
// the function.
func TestDo(t *testing.T) {
	mine := niceOf(t)[os.Getpid()]
	for range 3 {
		thread := 0
		Do(func() {
			thread = unix.Gettid()
			if thread == os.Getpid() {
				t.Error("the function runs on the first thread")
			}
			// A goroutine in a system call needs a thread, of which 50 must be new.
			var pipe [2]int
			if err := unix.Pipe2(pipe[:], unix.O_CLOEXEC); err != nil {
				t.Error(err)
				return
			}
			var reading, started sync.WaitGroup
			for range 50 {
				started.Add(1)
				reading.Go(func() {
					started.Done()
					_, _ = unix.Read(pipe[0], make([]byte, 1))
				})
			}
			started.Wait()
			for deadline := time.Now().Add(time.Minute); len(niceOf(t)) < 50 && time.Now().Before(deadline); {
				time.Sleep(time.Millisecond)
			}
			all := niceOf(t)
			if len(all) < 50 {
				t.Errorf("%d threads run", len(all))
			}
			for tid, nice := range all {
				want := mine
				if tid == thread {
					want = min(mine+Increment, 19)
				}
				if nice != want {
					t.Errorf("thread %d has nice value %d, want %d (the function's is %d)", tid, nice, want, thread)
				}
			}
			_ = unix.Close(pipe[1])
			reading.Wait()
			_ = unix.Close(pipe[0])
		})
		for deadline := time.Now().Add(time.Minute); ; time.Sleep(time.Millisecond) {
			if _, runs := niceOf(t)[thread]; !runs {
				break
			}
			if time.Now().After(deadline) {
				t.Fatalf("thread %d still runs", thread)
			}
		}
	}
}

func ExampleDo() {
	sum := 0
	Do(func() {
		for i := range 10 {
			sum += i
		}
	})
	fmt.Println(sum)
	// Output: 45
}
