package forward

import (
	"bytes"
	"fmt"
	"io"
	"log/slog"
	"math"
	"os"
	"strconv"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	// lookEvery bounds how often a worker reads how long it has waited, which takes microseconds.
	lookEvery = 2 * time.Millisecond
	// shortWait is what a thread may wait each time that it gets a CPU: more than the switch to it takes.
	shortWait = 10 * time.Microsecond
	// waitsHalve is the time after which a wait counts half.
	waitsHalve = 10 * time.Second
	// fewWaits, 0.14 % of the time if it goes on, are no reason to avoid a CPU: another one may be worse, and to find
	// out costs packets. Neither are those of up to avoidRatio times the best one's. A CPU that is avoided is used again
	// when it has fewWaits/avoidRatio, or the fewest.
	fewWaits   = 20 * time.Millisecond
	avoidRatio = 2
	// reviseEvery is how often a worker that avoids CPUs looks whether it still has to.
	reviseEvery = time.Second
)

// waits are the recent waits of a thread for each CPU. They decide on which it runs.
type waits struct {
	cpus []int // that it may use
	on   map[int]time.Duration
	at   time.Time // of the durations, which shrink
}

func newWaits(cpus []int) *waits { return &waits{cpus: cpus, on: map[int]time.Duration{}} }

// add counts a wait.
func (w *waits) add(cpu int, waited time.Duration, now time.Time) {
	w.shrink(now)
	w.on[cpu] += waited
}

func (w *waits) shrink(now time.Time) {
	keep := math.Exp2(-now.Sub(w.at).Seconds() / waitsHalve.Seconds())
	w.at = now
	for cpu := range w.on {
		w.on[cpu] = time.Duration(float64(w.on[cpu]) * keep)
	}
}

// choose returns the CPUs for which the thread waits least, at least one, when it now uses those of a set.
func (w *waits) choose(now time.Time, used *unix.CPUSet) (set unix.CPUSet) {
	w.shrink(now)
	least := time.Duration(math.MaxInt64)
	for _, cpu := range w.cpus {
		least = min(least, w.on[cpu])
	}
	for _, cpu := range w.cpus {
		few, much := fewWaits/avoidRatio, least
		if used.IsSet(cpu) {
			few, much = fewWaits, avoidRatio*least
		}
		if waited := w.on[cpu]; waited < few || waited <= much {
			set.Set(cpu)
		}
	}
	return set
}

// contended says whether the thread waits on the best of its CPUs, too, when it did or did not before.
func (w *waits) contended(now time.Time, before bool) bool {
	w.shrink(now)
	few := fewWaits
	if before {
		few /= avoidRatio
	}
	for _, cpu := range w.cpus {
		if w.on[cpu] < few {
			return false
		}
	}
	return true
}

// placement keeps the thread of a worker off the CPUs for which it waits: a woken thread often gets the
// CPU on which its packets arrived, beside a thread that goes on until the scheduler's next tick, although another CPU
// is idle. It needs no privilege, and moves nobody else's thread. It belongs to the thread; nil is a worker that is
// placed by the scheduler alone.
type placement struct {
	log   *slog.Logger
	stat  io.ReaderAt              // schedstat of the thread
	is    func(*unix.CPUSet) error // reads its CPUs
	apply func(*unix.CPUSet) error // sets them
	on    func() (cpu int, err error)

	waits   *waits
	set     unix.CPUSet // of the thread
	contend bool        // it waits on all of them
	looked  time.Time
	revised time.Time
	waited  time.Duration // at looked, in all
	turns   uint64        // in which it got a CPU
	buffer  [64]byte
}

// place lets the calling thread, to which its goroutine must be locked for ever, choose among its CPUs. It returns nil if there
// is nothing to choose, no statistics (CONFIG_SCHED_INFO), or no permission, which a filter of system calls may refuse.
func place(log *slog.Logger) *placement {
	p := &placement{
		log: log, on: currentCPU,
		is:    func(set *unix.CPUSet) error { return unix.SchedGetaffinity(0, set) },
		apply: func(set *unix.CPUSet) error { return unix.SchedSetaffinity(0, set) },
	}
	if err := p.is(&p.set); err != nil || p.set.Count() < 2 {
		return nil
	}
	if err := p.apply(&p.set); err != nil {
		log.Warn("worker cannot choose its CPU (--worker-placement)", "error", err)
		return nil
	}
	stat, err := os.Open(fmt.Sprintf("/proc/self/task/%d/schedstat", unix.Gettid()))
	if err != nil {
		return nil
	}
	p.stat = stat
	p.waits = newWaits(cpuNumbers(&p.set))
	if !p.read() {
		stat.Close()
		return nil
	}
	p.looked = time.Now()
	return p
}

// cpuNumbers returns the numbers of the CPUs of a set.
func cpuNumbers(set *unix.CPUSet) (cpus []int) {
	for cpu := 0; len(cpus) < set.Count(); cpu++ {
		if set.IsSet(cpu) {
			cpus = append(cpus, cpu)
		}
	}
	return cpus
}

// leave ends it, before the thread's goroutine ends: the process's first thread stays for ever.
func (p *placement) leave() {
	if p == nil {
		return
	}
	var all unix.CPUSet
	for _, cpu := range p.waits.cpus {
		all.Set(cpu)
	}
	if all != p.set {
		_ = p.apply(&all) // the thread ends, or is idle
	}
	if c, ok := p.stat.(io.Closer); ok {
		_ = c.Close() // it was read only
	}
}

// look moves the thread if it has waited for its CPU lately. To be called after each turn of the worker, whether it has
// slept before or not.
func (p *placement) look(now time.Time) {
	if p == nil || now.Sub(p.looked) < lookEvery {
		return
	}
	p.looked = now
	waited, turns := p.waited, p.turns
	if !p.read() {
		return
	}
	long := p.waited - waited - time.Duration(p.turns-turns)*shortWait
	if long > 0 {
		cpu, err := p.on()
		if err != nil {
			return
		}
		p.waits.add(cpu, long, now)
	} else if p.set.Count() == len(p.waits.cpus) && !p.contend || now.Sub(p.revised) < reviseEvery {
		return
	}
	p.revised = now
	p.contend = p.waits.contended(now, p.contend)
	if set := p.waits.choose(now, &p.set); set != p.set {
		p.move(&set)
	}
}

// contended says whether no CPU is free for the worker: without a placement that is not known, and so yes.
func (p *placement) contended() bool { return p == nil || p.contend }

// move changes the thread's CPUs, unless someone else has: then these are the ones that it may use.
func (p *placement) move(set *unix.CPUSet) {
	var is unix.CPUSet
	if err := p.is(&is); err == nil && is != p.set {
		p.waits, p.set = newWaits(cpuNumbers(&is)), is
		return
	}
	if err := p.apply(set); err != nil {
		p.log.Debug("worker stays on its CPUs", "error", err)
		return
	}
	p.set = *set
}

// read reads how long the thread has waited for a CPU, and how often it got one (Documentation/scheduler/sched-stats.rst).
func (p *placement) read() bool {
	n, err := p.stat.ReadAt(p.buffer[:], 0)
	if n == 0 || err != nil && err != io.EOF {
		return false
	}
	fields := p.buffer[:n]
	_, fields, _ = bytes.Cut(fields, []byte{' '}) // the time on a CPU
	waited, fields, _ := bytes.Cut(fields, []byte{' '})
	turns, _, _ := bytes.Cut(fields, []byte{'\n'})
	ns, err1 := strconv.ParseInt(string(waited), 10, 64)
	count, err2 := strconv.ParseUint(string(turns), 10, 64)
	if err1 != nil || err2 != nil || count == 0 {
		return false
	}
	p.waited, p.turns = time.Duration(ns), count
	return true
}

// currentCPU returns the number of the CPU on which the calling thread runs.
func currentCPU() (int, error) {
	var cpu uint32
	if _, _, errno := unix.RawSyscall(unix.SYS_GETCPU, uintptr(unsafe.Pointer(&cpu)), 0, 0); errno != 0 {
		return -1, errno
	}
	return int(cpu), nil
}
