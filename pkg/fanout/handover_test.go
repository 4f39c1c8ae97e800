package fanout

import (
	"errors"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"xdpcast/internal/lab"
	"xdpcast/internal/labtest"
)

// duplicates returns duplicates of a group's descriptors, as another process has them.
func duplicates(t *testing.T, g *Group) (fds []int) {
	t.Helper()
	for _, fd := range g.Files() {
		fd, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 3)
		if err != nil {
			t.Fatal(err)
		}
		fds = append(fds, fd)
	}
	return fds
}

// heirOf inherits a group of a host that was opened with these options.
func heirOf(t *testing.T, h *lab.Host, g *Group, opts Options) *Group {
	t.Helper()
	var heir *Group
	labtest.Do(t, h, func() (err error) {
		heir, err = Inherit(opts, duplicates(t, g))
		return err
	})
	t.Cleanup(func() {
		if err := heir.Close(); err != nil {
			t.Error(err)
		}
	})
	return heir
}

// kill closes a group's descriptors as the end of its process does.
func kill(t *testing.T, g *Group) {
	t.Helper()
	g.mu.Lock()
	defer g.mu.Unlock()
	g.closed, g.resumed = true, false
	for _, w := range g.workers {
		if w.block.held {
			w.mu.Unlock()
		}
		if err := w.free(); err != nil {
			t.Error(err)
		}
	}
	if g.choice != nil {
		if err := g.choice.close(); err != nil {
			t.Error(err)
		}
	}
	if err := g.state.free(g.sys); err != nil {
		t.Error(err)
	}
}

// inheritable are options whose ring wraps around within a test, but not within a burst.
func inheritable(t *testing.T, h *lab.Host, workers, ring int) Options {
	return Options{
		Interface: "in", Index: index(t, h, "in"), Workers: workers, Mode: ModeHash, Frames: ring,
		Blocks: 8, BlockTimeout: 20 * time.Millisecond, Filter: Filter{Classic: portFilter(5000)},
	}
}

// burster sends numbered frames.
func burster(t *testing.T, b *bench) (burst func(n int)) {
	sender, number := openSender(t, b.source, "eth0", SenderOptions{}), 0
	return func(n int) {
		t.Helper()
		var packets []Packet
		for range n {
			packets = append(packets, Packet{Header: frame(0, number).Build()})
			number++
		}
		sendAll(t, sender, packets)
	}
}

// TestInherit continues with a group through duplicates of its descriptors, as another process does:
// frames that arrived before, between and afterwards are received once and in order.
func TestInherit(t *testing.T) { eachRing(t, testInherit) }

func testInherit(t *testing.T, ring int) {
	b := newBench(t)
	opts := inheritable(t, b.relay, 2, ring)
	current := openGroup(t, b.relay, "in", opts)
	burst := burster(t, b)
	var all []captured
	total := 0
	for range 8 {
		c := collect(t, current)
		burst(10)
		c.udp(10, toGroup)
		heir := heirOf(t, b.relay, current, opts)
		if heir.Released() {
			t.Error("a group in use is released")
		}
		burst(10)
		c.stop()
		burst(10)
		total += 30
		if err := current.Close(); err != nil {
			t.Fatal(err)
		}
		if !heir.Released() {
			t.Error("a closed group is not released")
		}
		if current.Files() != nil || current.Holds() {
			t.Error("a closed group has descriptors or frames")
		}
		all = append(all, c.frames...)
		if !heir.Holds() {
			t.Error("10 frames wait in the rings, and Holds says that there are none")
		}
		if err := heir.Resume(); err != nil {
			t.Fatal(err)
		}
		if err := heir.Resume(); err == nil {
			t.Error("resumed twice")
		}
		if heir.ID() != current.ID() || heir.Ethernet() != current.Ethernet() {
			t.Errorf("group %d, ethernet %v; want %d, %v", heir.ID(), heir.Ethernet(), current.ID(), current.Ethernet())
		}
		current = heir
	}
	c := collect(t, current)
	burst(5)
	total += 5
	labtest.Eventually(t, "the last frames have arrived", func() bool {
		c.mu.Lock()
		defer c.mu.Unlock()
		return len(all)+len(c.frames) >= total
	})
	labtest.Eventually(t, "the rings are empty", func() bool { return !current.Holds() })
	c.stop()
	checkOnceInOrder(t, append(all, c.frames...), 1, total)
	for i, s := range groupStats(t, current) {
		if s.Dropped+s.Malformed+s.Truncated > 0 {
			t.Errorf("worker %d: %+v", i, s)
		}
	}
}

// next reads the next n frames of the only worker, committing all but the last uncommitted ones. It
// returns how many were committed.
func next(t *testing.T, w *Worker, n, uncommitted int, to *[]captured) (block *Block, committed int) {
	t.Helper()
	w.SetDeadline(time.Now().Add(30 * time.Second))
	for {
		block, err := w.Wait()
		if err != nil {
			t.Fatal(err)
		}
		committed = len(*to) // by the release of the block before
		var f Frame
		for block.Next(&f) {
			*to = append(*to, captured{Frame: clone(f)})
			if n--; n >= uncommitted {
				block.Commit()
				committed = len(*to)
			}
			if n == 0 {
				return block, committed
			}
		}
	}
}

// upTo reads the numbers of frames up to this one.
func upTo(t *testing.T, w *Worker, last int) (numbers []int) {
	t.Helper()
	w.SetDeadline(time.Now().Add(30 * time.Second))
	for len(numbers) == 0 || numbers[len(numbers)-1] != last {
		block, err := w.Wait()
		if err != nil {
			t.Fatalf("%v after %v: want up to %d", err, numbers, last)
		}
		var f Frame
		for block.Next(&f) {
			if _, n, ok := numbered(f.Data); ok {
				numbers = append(numbers, n)
			}
		}
		block.Release()
	}
	return numbers
}

// TestInheritFromKilled continues with the group of a process that was killed at any moment: each frame
// that it had not committed comes once and in order, and none that it had.
func TestInheritFromKilled(t *testing.T) { eachRing(t, testInheritFromKilled) }

func testInheritFromKilled(t *testing.T, ring int) {
	for _, c := range []struct {
		name        string
		uncommitted int                           // of the frames read
		atMost      bool                          // dies commits frames that were not counted
		dies        func(w *Worker, block *Block) // what it does before it dies
	}{
		{"with frames in hand", 0, false, func(*Worker, *Block) {}},
		{"before it commits", 3, false, func(*Worker, *Block) {}},
		{"before its first", 7, false, func(*Worker, *Block) {}},
		{"having given all back", 0, true, func(_ *Worker, b *Block) {
			var f Frame
			for b.Next(&f) {
				b.Commit()
			}
			b.Release()
		}},
		{"before it gives the block back", 0, true, func(w *Worker, b *Block) {
			var f Frame
			for b.Next(&f) {
				b.Commit()
			}
			if b.memory != nil {
				atomic.AddUint64(&w.cursor.block, 1)
			}
		}},
		{"while it gives frames back", 0, false, func(w *Worker, b *Block) {
			b.Commit()
			for i := range b.used / 2 {
				atomic.StoreUint32(w.frames.status(i), unix.TP_STATUS_KERNEL)
			}
		}},
		{"before it counts them", 0, false, func(w *Worker, b *Block) {
			b.Commit()
			for i := range b.used {
				atomic.StoreUint32(w.frames.status(i), unix.TP_STATUS_KERNEL)
			}
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := newBench(t)
			opts := inheritable(t, b.relay, 1, ring)
			current := openGroup(t, b.relay, "in", opts)
			burst := burster(t, b)
			sent, committed := 0, 0
			for round := range 8 {
				burst(20)
				sent += 20
				w := current.Workers()[0]
				var frames []captured
				block, done := next(t, w, 7, c.uncommitted, &frames)
				c.dies(w, block)
				want := committed + done
				heir := heirOf(t, b.relay, current, opts)
				kill(t, current)
				burst(5)
				sent += 5
				if heir.Released() {
					t.Error("a killed process has released its group")
				}
				if err := heir.Resume(); err != nil {
					t.Fatal(err)
				}
				current = heir
				rest := upTo(t, heir.Workers()[0], sent-1)
				if c.atMost && rest[0] < want || !c.atMost && rest[0] != want {
					t.Fatalf("round %d: the first frame afterwards is %d, want %d", round, rest[0], want)
				}
				for i, n := range rest {
					if n != rest[0]+i {
						t.Fatalf("round %d: frame %d is where %d is expected", round, n, rest[0]+i)
					}
				}
				committed = sent
			}
			if s := groupStats(t, current)[0]; s.Dropped+s.Malformed > 0 {
				t.Errorf("%+v", s)
			}
		})
	}
}

// Rings of another layout are refused by name, and nothing is left open.
func TestInheritRefuses(t *testing.T) {
	b := newBench(t)
	opts := inheritable(t, b.relay, 2, minFrames)
	g := openGroup(t, b.relay, "in", opts)
	another := openGroup(t, b.relay, "in", opts)
	labtest.Enter(t, b.relay)
	before := labtest.Held()
	refused := func(name string, opts Options, fds []int, want string) {
		t.Helper()
		heir, err := Inherit(opts, fds)
		if err == nil {
			heir.Close()
			t.Errorf("%s: inherited", name)
			return
		}
		if !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v: want %q in it", name, err, want)
		}
		if after := labtest.Held(); after != before {
			t.Errorf("%s: holds %+v, want %+v", name, after, before)
		}
	}
	for name, change := range map[string]func(*Options){
		"workers":       func(o *Options) { o.Workers = 1 },
		"blocks":        func(o *Options) { o.Blocks = 9 },
		"block size":    func(o *Options) { o.BlockSize = 2 * DefaultBlockSize },
		"block timeout": func(o *Options) { o.BlockTimeout = time.Millisecond },
		"frames":        func(o *Options) { o.Frames = 2 * minFrames },
		"no frames":     func(o *Options) { o.Frames = 0 },
		"frame size":    func(o *Options) { o.FrameSize = 4096 },
		"mode":          func(o *Options) { o.Mode = ModeCPU },
		"outgoing":      func(o *Options) { o.Outgoing = true },
		"interface":     func(o *Options) { o.Index++ },
	} {
		other := opts
		change(&other)
		refused(name, other, duplicates(t, g), ErrLayout.Error())
		if _, err := Inherit(other, duplicates(t, g)); !errors.Is(err, ErrLayout) {
			t.Errorf("%s: %v: want ErrLayout", name, err)
		}
	}
	refused("no workers", Options{Interface: "in", Workers: -1}, duplicates(t, g), "interface index 0")
	fds := duplicates(t, g)
	fds[0], fds[1] = fds[1], fds[0]
	refused("memory and map exchanged", opts, fds, "inherit")
	fds = duplicates(t, g)
	fds[2], fds[0] = fds[0], fds[2]
	refused("memory and socket exchanged", opts, fds, ErrLayout.Error())
	exchange := func(n int, fd int) (fds []int) {
		fds = duplicates(t, g)
		if err := unix.Dup3(fd, fds[n], unix.O_CLOEXEC); err != nil {
			t.Fatal(err)
		}
		return fds
	}
	refused("memory of another group", opts, exchange(0, another.Files()[0]), fmt.Sprintf("its state is of group %d", another.ID()))
	refused("socket of another group", opts, exchange(4, another.Files()[4]), fmt.Sprintf("the kernel says %d", another.ID()))

	// Memory whose size can change is refused: reading what is no longer there would end the process.
	state := g.state.memory
	file, err := unix.MemfdCreate("unsealed", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := unix.Write(file, state); err != nil {
		t.Fatal(err)
	}
	fds = exchange(0, file)
	if err := unix.Close(file); err != nil {
		t.Fatal(err)
	}
	refused("unsealed memory", opts, fds, "not sealed")
	if err := unix.Ftruncate(g.state.fd, 0); !errors.Is(err, unix.EPERM) {
		t.Errorf("truncate the memory of a group: %v, want EPERM", err)
	}

	for name, damage := range map[string]func(c *cursor){
		"block 0":            func(c *cursor) { c.block = 0 },
		"a later block":      func(c *cursor) { c.block += 3 },
		"more given back":    func(c *cursor) { c.released = c.read + 1 },
		"a block of the end": func(c *cursor) { c.block = 1 << 63 },
	} {
		heir, err := Inherit(opts, duplicates(t, g))
		if err != nil {
			t.Fatal(err)
		}
		intact := *g.state.cursor(1)
		damage(g.state.cursor(1))
		err = heir.Resume()
		*g.state.cursor(1) = intact
		if !errors.Is(err, ErrLayout) || !strings.Contains(fmt.Sprint(err), "worker 1") {
			t.Errorf("%s: %v: want ErrLayout of worker 1", name, err)
		}
		if err := heir.Close(); err != nil {
			t.Error(err)
		}
	}
	if after := labtest.Held(); after != before {
		t.Errorf("holds %+v, want %+v", after, before)
	}
}

// The group of another network namespace is refused although its interface has the same name and index there.
func TestInheritOfAnotherNamespace(t *testing.T) {
	here, there := newBench(t), newBench(t)
	opts := inheritable(t, here.relay, 1, minFrames)
	if there := inheritable(t, there.relay, 1, minFrames); there.Index != opts.Index {
		t.Fatalf("index %d and %d: the test needs equal ones", opts.Index, there.Index)
	}
	g := openGroup(t, there.relay, "in", opts)
	labtest.Enter(t, here.relay)
	before := labtest.Held()
	heir, err := Inherit(opts, duplicates(t, g))
	if !errors.Is(err, ErrNamespace) {
		t.Errorf("%v, want ErrNamespace", err)
	}
	if err == nil {
		heir.Close()
	}
	if after := labtest.Held(); after != before {
		t.Errorf("holds %+v, want %+v", after, before)
	}
}

// Whichever call of Inherit fails, nothing is left.
func TestInheritFails(t *testing.T) { eachRing(t, testInheritFails) }

func testInheritFails(t *testing.T, ring int) {
	b := newBench(t)
	opts := inheritable(t, b.relay, 2, ring)
	g := openGroup(t, b.relay, "in", opts)
	labtest.Enter(t, b.relay)
	for i := 1; ; i++ {
		before := labtest.Held()
		f := &faults{failAt: i, err: unix.EPERM}
		heir, err := inherit(opts, duplicates(t, g), f.system())
		if !f.failed {
			if err != nil {
				t.Fatal(err)
			}
			f.failAt = 0
			if err := heir.Close(); err != nil {
				t.Error(err)
			}
			break
		}
		var failure *Error
		if !errors.As(err, &failure) || failure.Step != StepInherit || !errors.Is(err, unix.EPERM) || heir != nil {
			t.Fatalf("call %d: %v, %v", i, heir, err)
		}
		if after := labtest.Held(); after != before {
			t.Fatalf("call %d: holds %+v, want %+v", i, after, before)
		}
	}
}
