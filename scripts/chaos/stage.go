package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"xdpcast/internal/control"
	"xdpcast/internal/lab"
	"xdpcast/internal/traffic"
)

// patience bounds every wait; no wait reaches it while all is well.
const patience = time.Minute

// stage is the network and its daemon.
type stage struct {
	opts                options
	source, relay, sink *lab.Host
	dir, runDir, pinDir string
	client              *control.Client
	daemon              *exec.Cmd
	successor           int // process that replaced it; 0: none
	log                 bytes.Buffer
}

func newStage(o options) (_ *stage, err error) {
	s := &stage{opts: o}
	if s.opts.program, err = filepath.Abs(o.program); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.close())
		}
	}()
	for name, host := range map[string]**lab.Host{"source": &s.source, "relay": &s.relay, "sink": &s.sink} {
		if *host, err = lab.NewHost(lab.UniqueName("chaos-" + name)); err != nil {
			return nil, err
		}
	}
	for _, pair := range [][2]lab.End{
		{{Host: s.relay, Name: "in0", Addrs: []string{"10.1.0.1/24"}}, {Host: s.source, Name: "src0", Addrs: []string{"10.1.0.2/24"}}},
		{{Host: s.relay, Name: "out0", Addrs: []string{"10.2.0.1/24"}}, {Host: s.sink, Name: "sink0", Addrs: []string{"10.2.0.2/24"}}},
		{{Host: s.relay, Name: "other0", Addrs: []string{"10.3.0.1/24"}}, {Host: s.sink, Name: "other0", Addrs: []string{"10.3.0.2/24"}}},
	} {
		if err := lab.Connect(pair[0], pair[1], 0); err != nil {
			return nil, err
		}
	}
	if s.dir, err = os.MkdirTemp("/tmp", "chaos"); err != nil {
		return nil, err
	}
	s.runDir, s.pinDir = filepath.Join(s.dir, "run"), filepath.Join(s.dir, "bpf", "xdpcast")
	if err := os.Mkdir(s.runDir, 0o755); err != nil {
		return nil, err
	}
	// Its own file system, so that it can be filled.
	if err := unix.Mount("tmpfs", s.runDir, "tmpfs", 0, "size=4m,mode=755"); err != nil {
		return nil, fmt.Errorf("mount %s: %w", s.runDir, err)
	}
	s.client = control.NewClient(s.socket())
	if err := s.writeRules(0); err != nil {
		return nil, err
	}
	return s, s.start()
}

func (s *stage) socket() string { return filepath.Join(s.runDir, "s") }

func (s *stage) env() []string {
	return append(os.Environ(), "XDPCAST_SOCKET="+s.socket(), "XDPCAST_PIN_DIR="+s.pinDir, "XDPCAST_RUN_DIR="+s.runDir, "XDPCAST_STATE_DIR="+filepath.Join(s.dir, "state"))
}

// writeRules writes the file: the stream's rule and a number of others.
func (s *stage) writeRules(others int) error {
	text := fmt.Sprintf("rules:\n  - {name: stream, in: 239.1.1.1:5000%%in0, out: [239.2.1.1:6000%%out0], path: %s}\n", s.opts.path)
	for i := range others {
		text += fmt.Sprintf("  - {name: other%d, in: 239.1.8.%d:5000%%in0, out: [239.2.8.%d:6000%%out0]}\n", i, i+1, i+1)
	}
	return os.WriteFile(filepath.Join(s.dir, "rules.yaml"), []byte(text), 0o644)
}

// start starts a daemon and waits until the stream's rule is active.
func (s *stage) start() error {
	s.log.Reset()
	s.daemon = exec.Command(s.opts.program, "run", "-c", filepath.Join(s.dir, "rules.yaml"))
	s.daemon.Env, s.daemon.Stdout, s.daemon.Stderr = s.env(), &s.log, &s.log
	if err := s.relay.Start(s.daemon); err != nil {
		return err
	}
	return s.settle()
}

// settle waits until the daemon answers and the stream's rule is active.
func (s *stage) settle() error {
	var last error
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		rule, err := s.client.Rule(context.Background(), "stream")
		if err == nil && rule.State == control.StateActive {
			return nil
		}
		last = err
		if err == nil {
			last = fmt.Errorf("rule stream is %s (%s)", rule.State, rule.Reason)
		}
	}
	return fmt.Errorf("the daemon does not get ready: %w", last)
}

// pid is the daemon's process id.
func (s *stage) pid() int {
	if s.successor != 0 {
		return s.successor
	}
	return s.daemon.Process.Pid
}

// end ends the daemon.
func (s *stage) end(sig os.Signal) error {
	if s.daemon == nil {
		return nil
	}
	if err := syscall.Kill(s.pid(), sig.(syscall.Signal)); err != nil {
		return err
	}
	err := s.daemon.Wait() // waits for its successor as well, which has its output
	s.daemon, s.successor = nil, 0
	var exit *exec.ExitError
	if sig == os.Kill && errors.As(err, &exit) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("the daemon: %w:\n%s", err, s.log.String())
	}
	return nil
}

func (s *stage) close() error {
	errs := []error{s.end(os.Interrupt)}
	if _, err := os.Stat(s.pinDir); err == nil && s.pinDir != "" {
		errs = append(errs, s.cli("unload", "--all"))
	}
	for _, dir := range []string{filepath.Join(s.dir, "bpf"), s.runDir} {
		if s.dir != "" {
			errs = append(errs, ignore(ignore(unix.Unmount(dir, 0), unix.EINVAL), unix.ENOENT))
		}
	}
	for _, host := range []*lab.Host{s.source, s.relay, s.sink} {
		if host != nil {
			errs = append(errs, host.Close())
		}
	}
	if s.dir != "" {
		errs = append(errs, os.RemoveAll(s.dir))
	}
	return errors.Join(errs...)
}

// holding is what the daemon's process holds.
type holding struct {
	descriptors, objects int // the latter: maps, programs and links
	resident             int // bytes
}

func (s *stage) holding() (h holding, err error) {
	dir := fmt.Sprintf("/proc/%d/", s.pid())
	descriptors, err := os.ReadDir(dir + "fdinfo")
	if err != nil {
		return h, err
	}
	h.descriptors = len(descriptors)
	for _, d := range descriptors {
		text, _ := os.ReadFile(dir + "fdinfo/" + d.Name()) // a descriptor closed in the meantime has none
		if bytes.Contains(text, []byte("memlock:")) || bytes.Contains(text, []byte("link_id:")) {
			h.objects++
		}
	}
	status, err := os.ReadFile(dir + "status")
	if err != nil {
		return h, err
	}
	_, rest, _ := strings.Cut(string(status), "VmRSS:")
	kB, err := strconv.Atoi(strings.Fields(rest)[0])
	h.resident = kB << 10
	return h, err
}

// measure runs a disturbance while packets flow.
func (s *stage) measure(ctx context.Context, d disturbance) (r result, err error) {
	r.name = d.name
	if r.before, err = s.holding(); err != nil {
		return r, err
	}
	leaves, err := watchLeaves(s.source)
	if err != nil {
		return r, err
	}
	defer leaves.close()
	stream, err := s.startStream()
	if err != nil {
		return r, err
	}
	defer stream.close()
	for range s.opts.rounds {
		if err := d.do(ctx, s); err != nil {
			return r, errors.Join(err, errors.New(s.log.String()))
		}
		if err := s.settle(); err != nil {
			return r, err
		}
		if err := sleep(ctx, s.long(time.Second)); err != nil {
			return r, err
		}
	}
	if r.sent, r.lost, r.doubled, r.reordered, err = stream.end(); err != nil {
		return r, err
	}
	r.leaves = leaves.count()
	r.after, err = s.holding()
	return r, err
}

// stream is numbered packets flowing through the relay.
type stream struct {
	sender       *traffic.Sender
	receiver     *traffic.Receiver
	stop, finish context.CancelFunc
	sent, got    chan error
}

func (s *stage) startStream() (*stream, error) {
	target, err := traffic.ParseTarget("239.1.1.1:5000%src0")
	if err != nil {
		return nil, err
	}
	sub, err := traffic.ParseSubscription("239.2.1.1:6000%sink0")
	if err != nil {
		return nil, err
	}
	st := &stream{sent: make(chan error, 1), got: make(chan error, 1)}
	if err := s.sink.Do(func() (err error) {
		st.receiver, err = traffic.NewReceiver(traffic.RecvConfig{Subscriptions: []traffic.Subscription{sub}, FromStart: true, SocketBuffer: 256 << 20})
		return err
	}); err != nil {
		return nil, err
	}
	if err := s.source.Do(func() (err error) {
		st.sender, err = traffic.NewSender(traffic.SendConfig{Target: target, TTL: 16, Rate: traffic.Rate{Value: s.opts.rate}})
		return err
	}); err != nil {
		return nil, errors.Join(err, st.receiver.Close())
	}
	sending, stop := context.WithCancel(context.Background())
	receiving, finish := context.WithCancel(context.Background())
	st.stop, st.finish = stop, finish
	go func() { st.got <- st.receiver.Run(receiving) }()
	go func() { st.sent <- st.sender.Run(sending) }()
	return st, nil
}

// end ends the stream and counts its packets once no more arrive.
func (st *stream) end() (sent, lost, doubled, reordered uint64, err error) {
	st.stop()
	err = <-st.sent
	st.sent <- nil
	sent = st.sender.Report().Packets
	received, since := uint64(0), time.Now()
	for received < sent && time.Since(since) < 3*time.Second {
		if n := st.receiver.Report().Total.Received; n != received {
			received, since = n, time.Now()
		}
		time.Sleep(5 * time.Millisecond)
	}
	total := st.receiver.Report().Total
	if total.Corrupt > 0 || total.SocketDrops > 0 {
		err = errors.Join(err, fmt.Errorf("%d packets corrupt, %d dropped by the receiver's own socket", total.Corrupt, total.SocketDrops))
	}
	return sent, sent - min(sent, total.Received), total.Duplicated, total.Reordered, err
}

func (st *stream) close() {
	st.stop()
	st.finish()
	<-st.sent
	<-st.got
	_, _ = st.sender.Close(), st.receiver.Close()
}
