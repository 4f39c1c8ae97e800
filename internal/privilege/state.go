package privilege

import (
	"errors"
	"fmt"
	"io/fs"
	"math/bits"
	"os"
	"reflect"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
	"kernel.org/pub/linux/libs/security/libcap/cap"
)

// Set is a set of capabilities, a bit for each, as in /proc/PID/status.
type Set uint64

func mask(values ...cap.Value) (s Set) {
	for _, v := range values {
		s |= 1 << v
	}
	return s
}

// Has says whether a capability is in the set.
func (s Set) Has(v cap.Value) bool { return s&(1<<v) != 0 }

func (s Set) values() (all []cap.Value) {
	for rest := uint64(s); rest != 0; rest &= rest - 1 {
		all = append(all, cap.Value(bits.TrailingZeros64(rest)))
	}
	return all
}

// String names the capabilities as in capabilities(7), without CAP_; "none" if there are none.
func (s Set) String() string {
	var names []string
	for _, v := range s.values() {
		names = append(names, strings.ToUpper(strings.TrimPrefix(v.String(), "cap_")))
	}
	if names == nil {
		return "none"
	}
	return strings.Join(names, " ")
}

// State is the privileges of all threads of a process, as reported by the kernel.
type State struct {
	UIDs, GIDs [4]int // real, effective, saved, file system
	Groups     []int  // supplementary, sorted

	Inheritable, Permitted, Effective, Bounding, Ambient Set

	NoNewPrivs bool
	Threads    int
}

// equal says whether two threads, or processes, have the same privileges.
func (s State) equal(o State) bool {
	groups := slices.Equal(s.Groups, o.Groups)
	s.Groups, o.Groups, s.Threads = nil, nil, o.Threads
	return groups && reflect.DeepEqual(s, o)
}

func (s State) String() string {
	return fmt.Sprintf("users %v, groups %v %v, inheritable %s, permitted %s, effective %s, bounding %s, ambient %s, no_new_privs %v, %d threads",
		s.UIDs, s.GIDs, s.Groups, s.Inheritable, s.Permitted, s.Effective, s.Bounding, s.Ambient, s.NoNewPrivs, s.Threads)
}

// Read reads the privileges of all threads of this process from /proc/self/task. It is an error if
// threads differ.
func Read() (State, error) { return read("/proc/self/task") }

func read(tasks string) (State, error) {
	for {
		s, again, err := readOnce(tasks)
		if err != nil || !again {
			return s, err
		}
	}
}

// readOnce returns again if threads were created meanwhile.
func readOnce(tasks string) (s State, again bool, err error) {
	entries, err := os.ReadDir(tasks)
	if err != nil {
		return State{}, false, fmt.Errorf("read privileges: %w", err)
	}
	first := ""
	for _, e := range entries {
		text, err := os.ReadFile(tasks + "/" + e.Name() + "/status")
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH) {
			continue // a thread that has ended
		}
		if err != nil {
			return State{}, false, fmt.Errorf("read privileges: %w", err)
		}
		t, err := parse(string(text))
		if err != nil {
			return State{}, false, fmt.Errorf("read privileges of thread %s: %w", e.Name(), err)
		}
		if first != "" && !t.equal(s) {
			return State{}, false, fmt.Errorf("the privileges of threads differ: thread %s has %v, thread %s %v", first, s, e.Name(), t)
		}
		t.Threads = s.Threads + 1
		s = t
		if first == "" {
			first = e.Name()
		}
	}
	if first == "" {
		return State{}, false, fmt.Errorf("read privileges: no thread in %s", tasks)
	}
	after, err := os.ReadDir(tasks)
	if err != nil {
		return State{}, false, fmt.Errorf("read privileges: %w", err)
	}
	return s, slices.ContainsFunc(after, func(e fs.DirEntry) bool {
		return !slices.ContainsFunc(entries, func(o fs.DirEntry) bool { return o.Name() == e.Name() })
	}), nil
}

// parse parses proc_pid_status(5).
func parse(text string) (s State, err error) {
	seen := 0
	for line := range strings.Lines(text) {
		key, value, _ := strings.Cut(line, ":")
		fields := strings.Fields(value)
		sets := map[string]*Set{"CapInh": &s.Inheritable, "CapPrm": &s.Permitted, "CapEff": &s.Effective, "CapBnd": &s.Bounding, "CapAmb": &s.Ambient}
		ids := map[string]*[4]int{"Uid": &s.UIDs, "Gid": &s.GIDs}
		switch {
		case sets[key] != nil && len(fields) == 1:
			n, err := strconv.ParseUint(fields[0], 16, 64)
			if err != nil {
				return s, fmt.Errorf("%s: %w", key, err)
			}
			*sets[key] = Set(n)
		case ids[key] != nil && len(fields) == 4:
			for i, f := range fields {
				if ids[key][i], err = strconv.Atoi(f); err != nil {
					return s, fmt.Errorf("%s: %w", key, err)
				}
			}
		case key == "Groups":
			for _, f := range fields {
				n, err := strconv.Atoi(f)
				if err != nil {
					return s, fmt.Errorf("%s: %w", key, err)
				}
				s.Groups = append(s.Groups, n)
			}
			slices.Sort(s.Groups)
		case key == "NoNewPrivs" && len(fields) == 1:
			s.NoNewPrivs = fields[0] == "1"
		default:
			continue
		}
		seen++
	}
	if seen != 9 {
		return s, fmt.Errorf("%d of 9 lines of proc_pid_status(5) are there", seen)
	}
	return s, nil
}
