package forward

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"xdpcast/internal/labtest"
	"xdpcast/pkg/fanout"
	"xdpcast/pkg/flow"
)

// store is a Keeper like a service manager.
type store struct {
	t     *testing.T
	files map[string]int
	full  bool
}

func newStore(t *testing.T) *store {
	s := &store{t: t, files: map[string]int{}}
	t.Cleanup(func() {
		for name := range s.files {
			if err := s.Drop(name); err != nil {
				t.Error(err)
			}
		}
	})
	return s
}

func (s *store) Keep(name string, fd int) error {
	if s.full {
		return errors.New("the store is full")
	}
	if _, taken := s.files[name]; taken {
		s.t.Errorf("%s is stored twice", name)
	}
	fd, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 3)
	s.files[name] = fd
	return err
}

func (s *store) Drop(names ...string) error {
	var errs []error
	for _, name := range names {
		fd, ok := s.files[name]
		if !ok {
			errs = append(errs, fmt.Errorf("%s is not stored", name))
			continue
		}
		delete(s.files, name)
		errs = append(errs, unix.Close(fd))
	}
	return errors.Join(errs...)
}

// handover is what the next process gets.
func (s *store) handover() *FanoutHandover {
	h := &FanoutHandover{}
	for name, fd := range s.files {
		fd, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 3)
		if err != nil {
			s.t.Fatal(err)
		}
		if !h.Add(name, fd) {
			s.t.Errorf("%s is refused", name)
		}
	}
	return h
}

// numbers reads the numbers of the frames that arrive at a sink.
type numbers struct {
	mu  sync.Mutex
	all []int
}

func readNumbers(t *testing.T, c *catcher) *numbers {
	n := &numbers{}
	var running sync.WaitGroup
	w := c.group.Workers()[0]
	running.Go(func() {
		for {
			block, err := w.Wait()
			if err != nil {
				return
			}
			var f fanout.Frame
			for block.Next(&f) {
				if _, number, ok := number(f.Data); ok {
					n.mu.Lock()
					n.all = append(n.all, number)
					n.mu.Unlock()
				}
			}
			block.Release()
		}
	})
	t.Cleanup(func() {
		w.Wake()
		running.Wait()
	})
	return n
}

func (n *numbers) count() int {
	n.mu.Lock()
	defer n.mu.Unlock()
	return len(n.all)
}

// check fails unless each number has come once and in order.
func (n *numbers) check(t *testing.T, total int) {
	t.Helper()
	labtest.Eventually(t, fmt.Sprintf("%d frames have arrived", total), func() bool { return n.count() >= total })
	n.mu.Lock()
	defer n.mu.Unlock()
	for i, number := range n.all {
		if number != i {
			t.Fatalf("frame %d is number %d: %d arrived of %d", i, number, len(n.all), total)
		}
	}
	if len(n.all) != total {
		t.Errorf("%d frames arrived, want %d", len(n.all), total)
	}
}

// stream sends numbered frames until stop, which returns how many.
func stream(t *testing.T, b *bench) (stop func() int) {
	sender := openSender(t, b.source, iface(t, b.source, "eth0").Index)
	end, sent := make(chan struct{}), make(chan int, 1)
	go func() {
		total := 0
		for {
			select {
			case <-end:
				sent <- total
				return
			case <-time.After(time.Millisecond):
			}
			packets := []fanout.Packet{{Header: numbered(0, total).Build()}, {Header: numbered(0, total+1).Build()}}
			n, err := sender.Send(packets)
			if total += n; err != nil {
				t.Errorf("send: %v", err)
			}
		}
	}()
	return sync.OnceValue(func() int {
		close(end)
		return <-sent
	})
}

// handoverBench is a bench with a keeper, a path that it keeps the rings of, and a rule whose packets arrive
// as numbers.
type handoverBench struct {
	*bench
	keeper  *store
	opts    FanoutOptions
	path    *Fanout
	rule    flow.Flow
	arrived *numbers
}

func newHandoverBench(t *testing.T) *handoverBench {
	b := &handoverBench{bench: newBench(t, 1), keeper: newStore(t)}
	b.opts = FanoutOptions{Workers: 2, Mode: fanout.ModeHash, Keeper: b.keeper}
	b.rule = rule("r", b.in, "239.1.1.1", 5000, sendTo(b.out[0], "239.9.9.1", 6000))
	b.arrived = readNumbers(t, catch(t, b.sinks[0], "eth0"))
	return b
}

// open opens the path with the current options.
func (b *handoverBench) open(t *testing.T, rules ...flow.Flow) {
	t.Helper()
	b.path = b.bench.path(t, b.opts)
	b.sync(t, b.path, rules...)
}

func (b *handoverBench) close(t *testing.T) {
	t.Helper()
	if err := b.path.Close(); err != nil {
		t.Fatal(err)
	}
}

func (b *handoverBench) checkKept(t *testing.T, want int, what string) {
	t.Helper()
	if n := len(b.keeper.files); n != want {
		t.Errorf("%d descriptors are kept, want %d: %s", n, want, what)
	}
}

// more waits until further packets have arrived.
func (b *handoverBench) more(t *testing.T) {
	t.Helper()
	from := b.arrived.count()
	labtest.Eventually(t, "packets flow", func() bool { return b.arrived.count() >= from+50 })
}

// logged has a path write its log into a buffer.
func logged(path *Fanout) *bytes.Buffer {
	var text bytes.Buffer
	path.log = slog.New(slog.NewTextHandler(&text, nil))
	return &text
}

// successor opens a path that takes over from another one, as another process does.
func (b *bench) successor(t *testing.T, old *Fanout, opts FanoutOptions) (next *Fanout, log *bytes.Buffer) {
	t.Helper()
	h, err := old.HandOver()
	if err != nil {
		t.Fatal(err)
	}
	if opts.Inherited = h; opts.Suspend == nil {
		opts.Suspend = old.Suspend
	}
	if opts.Gate, err = old.Gate(); err != nil {
		t.Fatal(err)
	}
	opts.TakeOver = func() error {
		if !old.Drain(labtest.Timeout) {
			return errors.New("the old path is not empty")
		}
		return nil
	}
	next = b.path(t, opts)
	return next, logged(next)
}

// handOver has a path with the current options take over from the current one while packets flow. It
// returns the log of the new path.
func (b *handoverBench) handOver(t *testing.T) (log string) {
	t.Helper()
	next, text := b.successor(t, b.path, b.opts)
	b.sync(t, next, b.rule)
	b.close(t)
	b.path = next
	b.checkKept(t, 2+2*b.opts.Workers, "those of one group")
	b.more(t)
	return text.String()
}

// sends returns a function that sends the next n numbered frames, and how many it has sent.
func (b *handoverBench) sends(t *testing.T) (send func(n int), total *int) {
	sender := openSender(t, b.source, iface(t, b.source, "eth0").Index)
	total = new(int)
	return func(n int) {
		t.Helper()
		var frames [][]byte
		for range n {
			frames = append(frames, numbered(0, *total).Build())
			*total++
		}
		sendFrames(t, sender, frames)
	}, total
}

// TestFanoutHandsOver passes the rings of a path to another one several times while packets flow: none is
// lost, doubled or overtaken.
func TestFanoutHandsOver(t *testing.T) {
	b := newHandoverBench(t)
	b.open(t, b.rule)
	stop := stream(t, b.bench)
	b.more(t)
	b.checkKept(t, 2+2*2, "those of one group")
	for range 4 {
		before, err := b.path.Groups()
		if err != nil {
			t.Fatal(err)
		}
		if log := b.handOver(t); strings.Contains(log, "not inherited") {
			t.Errorf("the rings are not inherited:\n%s", log)
		}
		after, err := b.path.Groups()
		if err != nil {
			t.Fatal(err)
		}
		if len(after) != 1 || after[0].GroupID != before[0].GroupID {
			t.Errorf("groups %+v, want those of %+v", after, before)
		}
	}
	b.arrived.check(t, stop())
}

// A path whose rings have another layout opens its own, and so does one whose predecessor does not
// suspend: the reason is logged, and no packet is lost either.
func TestFanoutHandsOverNothing(t *testing.T) {
	b := newHandoverBench(t)
	b.open(t, b.rule)
	stop := stream(t, b.bench)
	b.more(t)
	for _, c := range []struct {
		workers int
		suspend func() error
		want    string
	}{
		{3, nil, "another layout"},
		{3, func() error { return errors.New("too late") }, "too late"},
		{3, func() error { return nil }, "still uses those of interface in"},
	} {
		b.opts.Workers, b.opts.Suspend = c.workers, c.suspend
		if log := b.handOver(t); !strings.Contains(log, "not inherited") || !strings.Contains(log, c.want) {
			t.Errorf("want %q in the log:\n%s", c.want, log)
		}
	}
	b.arrived.check(t, stop())
}

// A path takes its groups back from a process that has ended, whether it had taken them over or not, and had closed
// them or was killed: nothing is lost, doubled or overtaken.
func TestFanoutTakesBack(t *testing.T) {
	for _, c := range []struct {
		name          string
		taken, killed bool
	}{{"not taken over", false, false}, {"closed", true, false}, {"killed", true, true}} {
		t.Run(c.name, func(t *testing.T) {
			b := newHandoverBench(t)
			b.open(t, b.rule)
			send, total := b.sends(t)
			send(20)
			old := b.path
			kept, err := old.HandOver()
			if err != nil {
				t.Fatal(err)
			}
			if c.taken {
				other := b.opts
				other.Keeper = nil // it tells the store only once it is ready
				next, _ := b.successor(t, b.path, other)
				b.sync(t, next, b.rule)
				send(20)
				if err := next.Close(); err != nil {
					t.Fatal(err)
				}
			}
			if c.killed { // it did not say that it has closed them
				const offsetOfClosed = 36
				if _, err := unix.Pwrite(kept.groups[groupOf(b.rule.In)][0], make([]byte, 4), offsetOfClosed); err != nil {
					t.Fatal(err)
				}
			}
			send(20)
			b.opts.Inherited, b.opts.Suspend, b.opts.Own = kept, old.Suspend, true
			b.path = b.bench.path(t, b.opts)
			log := logged(b.path)
			b.sync(t, b.path, b.rule)
			if strings.Contains(log.String(), "not inherited") {
				t.Errorf("the rings are not taken back:\n%s", log)
			}
			if err := old.Close(); err != nil {
				t.Error(err)
			}
			send(20)
			b.arrived.check(t, *total)
			b.checkKept(t, 2+2*2, "those of one group")
		})
	}
}

// Packets that arrive while no path runs wait in the rings that a keeper has, for the next one.
func TestFanoutIsKept(t *testing.T) {
	b := newHandoverBench(t)
	other := rule("other", b.out[0], "239.1.1.2", 5000, sendTo(b.in, "239.9.9.2", 6000))
	send, total := b.sends(t)
	for range 3 {
		b.open(t, b.rule, other)
		send(20)
		b.close(t)
		send(20) // to nobody yet
		b.checkKept(t, 12, "those of two groups")
		b.opts.Inherited = b.keeper.handover()
	}
	b.open(t, b.rule) // a group that no rule needs any more is dropped
	b.checkKept(t, 6, "those of one group")
	b.arrived.check(t, *total)
	if groups, err := b.path.Groups(); err != nil || len(groups) != 1 || sumOf(groups[0]).Dropped != 0 {
		t.Errorf("%+v, %v", groups, err)
	}

	// Those of another layout are dropped, and the group is opened anew.
	b.close(t)
	b.opts.Workers, b.opts.Inherited = 1, b.keeper.handover()
	b.open(t, b.rule)
	send(1)
	b.arrived.check(t, *total)
	b.checkKept(t, 4, "those of a group of one worker")

	// Packets that have waited too long are discarded.
	b.close(t)
	send(7)
	*total -= 7
	b.opts.Inherited, b.opts.stale = b.keeper.handover(), time.Nanosecond
	b.open(t, b.rule)
	labtest.Eventually(t, "the old packets are discarded", func() bool {
		groups, err := b.path.Groups()
		return err == nil && sumOf(groups[0]).Dropped == 7
	})
	send(3)
	b.arrived.check(t, *total)

	// So is everything that is not complete.
	b.close(t)
	h := b.keeper.handover()
	key := groupOf(b.rule.In)
	if err := unix.Close(h.groups[key][1]); err != nil {
		t.Fatal(err)
	}
	delete(h.groups[key], 1)
	if err := b.keeper.Drop(key.fileName(1)); err != nil {
		t.Fatal(err)
	}
	b.opts.Inherited, b.opts.stale = h, 0
	b.open(t, b.rule)
	send(3)
	b.arrived.check(t, *total)
	b.checkKept(t, 4, "those of one group")

	// A full store is no obstacle.
	b.sync(t, b.path)
	b.checkKept(t, 0, "none")
	b.keeper.full = true
	b.sync(t, b.path, b.rule)
	send(3)
	b.arrived.check(t, *total)
}

func sumOf(g GroupStatus) (sum WorkerStatus) {
	for _, w := range g.Workers {
		sum.Dropped += w.Dropped
		sum.Received += w.Received
	}
	return sum
}

// Names of descriptors are read as they are written, and no others.
func TestRingNames(t *testing.T) {
	for _, key := range []groupKey{{1, false}, {1, true}, {1 << 30, false}} {
		for _, n := range []int{0, 1, 99} {
			if got, number, ok := parseFileName(key.fileName(n)); !ok || got != key || number != n {
				t.Errorf("%s is %+v, %d, %v", key.fileName(n), got, number, ok)
			}
		}
	}
	for _, name := range []string{"", "f.", "f.1", "f.1.", "f..1", "f.1x.1", "f.01.1", "f.1.+1", "f.1ss.1", "f.-1.1x", "m.1", "afxdp.1", "f.99999999999.1"} {
		if IsRing(name) {
			t.Errorf("%q is taken for a ring", name)
		}
	}
	h := &FanoutHandover{}
	fd, err := unix.Dup(int(os.Stderr.Fd()))
	if err != nil {
		t.Fatal(err)
	}
	if !h.Add("f.1.0", fd) || h.Add("f.1.0", fd) || h.Add("other", fd) {
		t.Error("a name is taken twice, or another's")
	}
	if err := h.Close(); err != nil {
		t.Error(err)
	}
	var none *FanoutHandover
	if err := errors.Join(none.Close(), none.Discard(nil)); err != nil {
		t.Error(err)
	}
}
